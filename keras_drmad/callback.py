"""The callback: wiring between `fit` and the rooms that do the work."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import keras

from keras_drmad import checks, outer, sample_weights, tensorboard, trajectories
from keras_drmad import curvature as curvatures
from keras_drmad import hyper_data as data_of
from keras_drmad import initial_scale as scales
from keras_drmad.estimator import Estimator
from keras_drmad.fidelity import Auto, Fixed
from keras_drmad.hyperparameters import Hyperparameter
from keras_drmad.normalization import uncorrected_layers
from keras_drmad.objectives import OuterLoss, get_loss, trace
from keras_drmad.recorder import unhook
from keras_drmad.reports import Progress, Record, table
from keras_drmad.search_space import SearchSpace
from keras_drmad.settings import Amount, Setting
from keras_drmad.tuning_run import TuningRun

log = logging.getLogger("keras_drmad")


class DrMADCallback(keras.callbacks.Callback):
    """Tunes the optimizer's hyperparameters by gradient while `fit` trains (Fu et al., 2016).

    After every horizon it walks back through the training steps, differentiates the outer loss
    with respect to every `Hyperparameter`, and takes a step of the outer optimizer.

    Example:

    >>> callback = kd.DrMADCallback((x_hyper, y_hyper), horizon=2)
    >>> model.fit(x, y, epochs=20, callbacks=[callback])
    >>> callback.history[-1].hypergradients["l2"]["dense"]

    Args:
        hyper_data: What the outer loss is measured on: `(x, y[, sample_weight])`, a
            `tf.data.Dataset` of batches, or a `PyDataset`. Not the training data; and not the
            test data, which would no longer be unseen.
        outer_optimizer: A Keras optimizer, its name (then with learning rate 0.1), or
            `kd.optimizers.Sign(step)`. It moves raw values: logarithms of positive values,
            logits of those between 0 and 1. Defaults to `"adam"`.
        horizon: Epochs between two updates. Defaults to 1.
        restart: `True`: each horizon starts from the first weights again (the paper's
            meta-iterations); `"fresh"`: from newly initialised ones. The last horizon's weights
            stay. Defaults to `False`: training goes on.
        trajectory: `"linear"`, `"piecewise"`, `"replay"`, `"stored"`, or an object of
            `kd.trajectories`. Defaults to `"auto"`: the cheapest that reaches `fidelity` against
            the exact replay on this run, measured at the first update and again now and then.
        curvature: `"gauss_newton"`, `"hessian"` or `"finite_difference"`. Defaults to `None`:
            `"hessian"` on an exact path, `"gauss_newton"` on a reconstructed one.
        fidelity: The cosine with the exact hypergradient that `"auto"` aims at. Defaults to `None`:
            0.9.
        memory_limit: Bytes that what `"auto"` chooses may keep of a horizon. Runs on which it
            measures keep more. Defaults to `None`.
        verify_every: Updates from one verification of a named trajectory to the next: the
            horizon is walked exactly as well, and the record says how the two agree. Defaults to
            `None`, never.
        window: How many last steps of the horizon are walked: a number, a fraction of them, or
            `None` for all. Defaults to `None`.
        reverse_steps: How many steps of the window are visited, likewise. Defaults to `None`.
        max_batches: How many training batches are kept where the path is not exact. Defaults to
            `None`: one epoch's worth.
        variables: Non-trainable `keras.Variable`s of the model or its loss to tune as well, or
            pairs `(variable, domain)`; the domain is `"real"` where none is given. Or layers and
            losses of `kd.layers`, `kd.losses`, `kd.SampleWeights`, with their own variables and
            domains (see `kd.tunable`).
        initial_scale: A `Hyperparameter` by which the initial weights are multiplied, tuned in the
            domain `"positive"`; with `restart` only. Defaults to `None`.
        max_step: No raw value moves farther in one update. Defaults to 1.0, a factor of e for a
            positive value.
        outer_loss: A `keras.losses.Loss` or its name, measured on the hyper data instead of the
            compiled loss. Defaults to `None`.
        hyper_batch_size: Examples per batch of the outer loss, where arrays are passed; datasets
            have batches of their own. Defaults to `None`: 1024.
        jit_compile: Whether XLA compiles the reverse pass. `"auto"` tries it once reverse passes
            have taken some 10 seconds, and stays with what is faster; where a layer draws random
            numbers, such as dropout, or computes in bfloat16, it goes as `fit` goes. Defaults to
            `"auto"`.
        log_dir: The folder on which TensorBoard is started; what is written goes to its subfolder
            `drmad`. Or a `kd.tensorboard.Writer`. Defaults to `None`: nothing is written.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        hyper_data: Any,
        outer_optimizer: str | keras.optimizers.Optimizer = "adam",
        horizon: int = 1,
        restart: bool | str = False,
        trajectory: str | trajectories.Trajectory = "auto",
        curvature: str | None = None,
        fidelity: float | None = None,
        memory_limit: int | None = None,
        verify_every: int | None = None,
        window: Amount = None,
        reverse_steps: Amount = None,
        max_batches: int | None = None,
        variables: Sequence[Any] = (),
        initial_scale: Hyperparameter | None = None,
        max_step: float = 1.0,
        outer_loss: str | keras.losses.Loss | None = None,
        hyper_batch_size: int | None = None,
        jit_compile: bool | str = "auto",
        log_dir: str | os.PathLike | tensorboard.Writer | None = None,
    ):
        super().__init__()
        if not isinstance(restart, (bool, str)) or restart not in (True, False, "fresh"):
            raise ValueError(f"`restart` is False, True or 'fresh'. Received: restart={restart!r}")
        if curvature is not None:
            curvatures.get(curvature)
        if not isinstance(jit_compile, (bool, str)) or jit_compile not in (True, False, "auto"):
            raise ValueError(
                f"`jit_compile` is True, False or 'auto'. Received: jit_compile={jit_compile!r}"
            )
        if hyper_batch_size is not None:
            checks.positive_int(hyper_batch_size, "hyper_batch_size")
        self.hyper_data = data_of.batches_of(hyper_data, hyper_batch_size)
        optimizer = outer.get(outer_optimizer)
        self.horizon = checks.positive_int(horizon, "horizon")
        self.restart = restart
        is_auto = isinstance(trajectory, str) and trajectory == "auto"
        self.trajectory = trajectory if is_auto else trajectories.get(trajectory)
        self.curvature = curvature
        self.window = checks.step_amount(window, "window")
        self.reverse_steps = checks.step_amount(reverse_steps, "reverse_steps")
        for value, argument in (
            (max_batches, "max_batches"),
            (memory_limit, "memory_limit"),
            (verify_every, "verify_every"),
        ):
            if value is not None:
                checks.positive_int(value, argument)
        self.fidelity = 0.9 if fidelity is None else checks.fraction(fidelity, "fidelity")
        checks.check_choice(
            self.trajectory, curvature, window, reverse_steps, verify_every, memory_limit,
            fidelity, max_batches,
        )  # fmt: skip
        self.max_batches, self.memory_limit = max_batches, memory_limit
        self.verify_every = verify_every
        self.variables = outer.tuned_variables(variables)
        self._space = SearchSpace(self.variables, scales.checked(initial_scale, restart, window))
        self.max_step = checks.positive_float(max_step, "max_step")
        self.outer_loss = get_loss(outer_loss)
        self.jit_compile = jit_compile
        self._writer = tensorboard.get(log_dir)
        self._run = TuningRun(self._space, optimizer, restart, self.max_step)
        self.history = self._run.history
        self._key: Any = None

    @property
    def outer_optimizer(self) -> keras.optimizers.Optimizer:
        """The outer optimizer; another one may be set between two fits."""
        return self._run.outer_optimizer

    @outer_optimizer.setter
    def outer_optimizer(self, optimizer: str | keras.optimizers.Optimizer) -> None:
        self._run.outer_optimizer = outer.get(optimizer)

    @property
    def traces(self) -> int:
        """How often the reverse loop was traced (int)."""
        return 0 if self._key is None else self._estimator.traces

    @property
    def settled(self) -> bool:
        """Whether `jit_compile="auto"` has decided: nothing is left to be tried (bool)."""
        chosen = None if self._key is None else self._method.chosen
        return chosen is not None and self._estimator.settled(chosen)

    # What `fit` calls ------------------------------------------------------------------------

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        scale = self._space.scale
        scaled = scale is not None and scale.spec.tunable
        checks.check_model_and_optimizer(model, self._space.targets, scaled)
        unhook(model)

    def on_train_begin(self, logs=None) -> None:
        model, optimizer = self.model, self.model.optimizer
        steps = self.params.get("steps")
        checks.check_horizon(optimizer, steps)
        if optimizer.built:
            checks.check_trained_variables(model)
        self._steps = None if steps is None else steps * self.horizon
        if optimizer.set_horizon(self.horizon, self._steps or 0):
            # What was traced before holds on to variables that were replaced.
            model.make_train_function(force=True)
        key = (model, optimizer, model.train_function)
        if self._key is None or any(a is not b for a, b in zip(key, self._key, strict=True)):
            self._key = key
            tuned = self._space.targets
            self._estimator = Estimator(model, tuned, jit_compile=self.jit_compile)
            self._outer_loss = OuterLoss(model, self.hyper_data, tuned, self.outer_loss)
            self._method = self._method_for(self.max_batches or steps)
            self._run.begin(model, self._estimator, self._method)
        self._epochs_recorded = 0
        if optimizer.built:
            optimizer.attach(self._run)

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        if self._epochs_recorded == 0:
            if self.model.optimizer.built:
                # BackupAndRestore may have built and loaded it only now, with its horizon.
                self.model.optimizer.set_horizon(self.horizon, self._steps or 0)
                self.model.optimizer.attach(self._run)
            self._begin_horizon()

    def on_train_batch_begin(self, batch: int, logs=None) -> None:
        self._estimator.arm(self._before_first_step)

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        self._epochs_recorded += 1
        if self._epochs_recorded == self.horizon:
            self._epochs_recorded = 0
            if self._estimator.recorder.batches:
                self._update(epoch)
            else:
                self._run.warn_once(
                    "No update was made after a horizon: training stopped before the first step "
                    "that is walked back over."
                )
        if logs is not None:
            # In every epoch: CSVLogger takes its columns from the first one.
            logs["outer_loss"] = self.history[-1].outer_loss if self.history else math.nan
            logs["update"] = len(self.history)

    def on_train_end(self, logs=None) -> None:
        unhook(self.model)
        if self._epochs_recorded:
            few = (
                f"The last {self._epochs_recorded} epochs are less than a horizon of "
                f"{self.horizon}: no update was made from them."
            )
            log.info(few)
            if not self.history:
                self._run.warn_once(
                    f"{few} A horizon is begun anew by each `fit`: train for at least "
                    f"{self.horizon} epochs in one, or pass a smaller `horizon`."
                )
        self._estimator.forget()
        if self.model.optimizer.built:  # not after `epochs=0`
            self.model.optimizer.position.assign(0)
        self.model.optimizer.detach()
        if self._writer is not None:
            self._writer.close()

    def summary(self, by_layer: bool = False) -> None:
        """Print what is tuned as a table.

        Its columns: hyperparameter, grain, number of values, where they started and are now (mean,
        lowest and highest), norm of the last hypergradient, and the cosine with the exact one
        where that was last verified (see `verify_every`).

        Example:

        >>> callback.summary()

        Args:
            by_layer: Whether each layer has a row of its own. Defaults to `False`.

        Raises:
            RuntimeError: before the first training step, when the values do not exist yet.
        """
        if self.model is None or not self.model.optimizer.built:
            raise RuntimeError("There is nothing to sum up before the first `fit`. Call it first.")
        labels, values = self._space.labels(self.model), self._space.values(self.model)
        print(table(labels, values, self.history, by_layer))

    def restore_first_weights(self) -> None:
        """Set model and optimizer back to where the first horizon started (with `restart`).

        What is tuned stays as it is; the weights are those first ones times `initial_scale`.
        """
        self._run.restore_first_weights()

    # The horizon -----------------------------------------------------------------------------

    def _begin_horizon(self) -> None:
        self._run.start_again()
        if self.model.optimizer.built:
            self.model.optimizer.position.assign(0)
        self._estimator.begin(self._steps, self._method.settings())

    def _before_first_step(self, spec: Any) -> None:
        """Build what Keras would build in its first trace, and look at the data's form."""
        model = self.model
        if not model.built:
            trace(model, spec)
        hyper_spec = data_of.element_spec(self.hyper_data)
        data_of.check_against(spec, hyper_spec, model)
        if doubt := data_of.other_kind(spec, hyper_spec):
            self._run.warn_once(doubt)
        self._outer_loss.check()
        sample_weights.check_use(model, hyper_spec)
        if not self.history:
            data_of.check_labels(self.hyper_data, model, self.outer_loss or model.loss)
        checks.check_trainable(model)
        checks.check_functions(model)
        for curvature in self._method.curvatures:
            checks.check_curvature(model, curvature)
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
            self._run.attach()
        checks.check_trained_variables(model)
        if doubt := self._estimator.look_at_step(spec):
            self._run.warn_once(doubt)
        self._run.before_first_step()

    def _method_for(self, max_batches: int | None) -> Fixed | Auto:
        """How hypergradients are to be estimated: by what was asked, or by measuring."""
        if isinstance(self.trajectory, str):  # "auto"
            # Where the Hessian is wrong, differences of gradients are the exact way.
            smooth = not uncorrected_layers(self.model)
            exact = self.curvature or ("hessian" if smooth else "finite_difference")
            whole = self._space.scale is not None  # its gradient is known at the first step alone
            return Auto(self.fidelity, self.memory_limit, max_batches, exact, whole)
        default = "hessian" if self.trajectory.exact else "gauss_newton"
        setting = Setting(
            self.trajectory,
            self.curvature or default,
            self.window,
            self.reverse_steps,
            max_batches,
        )
        differences = setting.curvature == "finite_difference"
        return Fixed(setting, self.verify_every, "finite_difference" if differences else "hessian")

    def _update(self, epoch: int) -> Record:
        optimizer, estimator = self.model.optimizer, self._estimator
        self._look_at_data(estimator.recorder)
        trained_with = self._space.values(self.model)
        if moved := estimator.moved:
            self._run.warn_once(
                f"The training step reads {', '.join(moved)}, which changed while it was recorded, "
                "and is no weight that is trained. The reverse pass takes it as it is now, so "
                "hypergradients may be off."
            )
        estimator.finish(self._outer_loss)
        before = str(self._method.chosen)
        what = f"Update {len(self.history) + 1}: walking back"
        estimator.progress = Progress(what, self.params.get("verbose", 0))
        estimate, agreement = self._method.hypergradients(
            estimator, float(estimator.outer[0]), float(optimizer.learning_rate)
        )
        estimator.forget()
        if str(self._method.chosen) != before:
            self._say(f"DrMAD: {self._method.chosen}: {self._method.why}.")
        record = self._run.update(estimate, agreement, trained_with, epoch)
        if self._writer is not None:
            self._writer.write(self.history)
        return record

    def _look_at_data(self, recorder: Any) -> None:
        """Say once what is kept, and whether the hyper data is the training data."""
        if self.history:
            return
        sample_weights.check_indices(self.model, recorder.batches)
        if len(recorder.kept) == recorder.steps:
            if more := sample_weights.too_many(self.model, recorder.batches):
                self._run.warn_once(more)
        log.info(
            "Recorded %d steps: %d batches and what is kept of the states, %.1f MB.",
            recorder.steps,
            len(recorder.kept),
            recorder.nbytes() / 1e6,
        )
        if recorder.batches and data_of.overlap(recorder.batches[0], self.hyper_data) > 0.5:
            self._run.warn_once(
                "Most of a training batch is found in `hyper_data`: it looks like the training "
                "data. Hyperparameters tuned on it will overfit; hold some data out."
            )

    def _say(self, message: str) -> None:
        if self.params.get("verbose"):
            print(message)
        log.info(message)
