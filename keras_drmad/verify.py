"""Hypergradients as a function, and an estimator against the truth on the user's own training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad import checks, trajectories
from keras_drmad.callback import DrMADCallback
from keras_drmad.estimator import Estimator, Hypergradients
from keras_drmad.fidelity import Agreement, agreement
from keras_drmad.objectives import OuterLoss, seed_variables
from keras_drmad.optimizers import Optimizer
from keras_drmad.reports import Record
from keras_drmad.settings import Amount, Setting
from keras_drmad.trajectories import Linear, State, Stored


@dataclass(frozen=True)
class Probe:
    """One entry of a hyperparameter: its hypergradient beside a central finite difference."""

    argument: str
    layer: str
    index: tuple[int, ...]
    hypergradient: float  # exact, by the value
    difference: float  # of the outer loss of two trainings


@dataclass(frozen=True)
class Verification:
    """What `verify_hypergradients` found. As a string it is a table."""

    setting: str
    steps: int
    agreements: dict[str, Agreement]  # argument -> estimate beside the exact hypergradient
    probes: list[Probe]  # exact hypergradient beside finite differences

    def __str__(self) -> str:
        lines = [
            f"{self.setting}, over {self.steps} steps, against the exact hypergradient",
            f"{'hyperparameter':<28}{'cosine':>8}{'signs':>8}{'norm':>9}",
        ]
        for name, found in self.agreements.items():
            lines.append(f"{name:<28}{found.cosine:>8.3f}{found.signs:>8.2f}{found.norm:>9.3g}")
        if self.probes:
            lines.append("the exact hypergradient against finite differences")
            lines.append(f"{'entry':<44}{'exact':>13}{'difference':>13}")
        for probe in self.probes:
            name = f"{probe.argument}/{probe.layer}{list(probe.index)}"
            lines.append(f"{name:<44}{probe.hypergradient:>13.5g}{probe.difference:>13.5g}")
        return "\n".join(lines)


def hypergradients(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    hyper_data: Any,
    trajectory: str | trajectories.Trajectory = "replay",
    curvature: str | None = None,
    window: Amount = None,
    reverse_steps: Amount = None,
    hyper_batch_size: int | None = None,
    **fit_arguments: Any,
) -> Record:
    """Train a model, and differentiate the outer loss through that training.

    The calculation of `DrMADCallback` as a function. Nothing is tuned, and afterwards the model
    and its optimizer are as they were before.

    Example:

    >>> record = kd.hypergradients(model, x, y, hyper_data=(x_hyper, y_hyper), epochs=2)
    >>> record.hypergradients["learning_rate"]["dense"]

    Args:
        model: A model compiled with an optimizer of `kd.optimizers` that has a `Hyperparameter`.
        x, y: Training data, as for `fit`.
        hyper_data: What the outer loss is measured on (see `DrMADCallback`).
        trajectory: A name or an object of `kd.trajectories`. Defaults to `"replay"`, exact.
        curvature: As in `DrMADCallback`.
        window, reverse_steps: As in `DrMADCallback`.
        hyper_batch_size: Examples per batch of the outer loss, where arrays are passed.
        **fit_arguments: For `fit`: `epochs`, `batch_size`, `shuffle`, ...

    Returns:
        A `Record`.

    Raises:
        TypeError, ValueError: as `DrMADCallback`.
    """
    callback = DrMADCallback(
        hyper_data,
        # Steps of size zero: a measurement moves nothing. The restart keeps the first weights.
        outer_optimizer=keras.optimizers.SGD(0.0),
        restart=True,
        horizon=_epochs(fit_arguments),
        trajectory=trajectory,
        curvature=curvature,
        window=window,
        reverse_steps=reverse_steps,
        hyper_batch_size=hyper_batch_size,
    )
    _fit(model, x, y, callback, fit_arguments)
    return callback.history[-1]


def verify_hypergradients(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    hyper_data: Any,
    trajectory: str | trajectories.Trajectory = "linear",
    curvature: str | None = None,
    window: Amount = None,
    reverse_steps: Amount = None,
    entries: int = 3,
    hyper_batch_size: int | None = None,
    **fit_arguments: Any,
) -> Verification:
    """Measure an estimator against the exact hypergradient, and that against finite differences.

    The model is trained once over the data given, every state of that run is stored, and the
    estimator asked for and the exact one walk back over it. Then a few entries of the
    hyperparameters are moved and the same steps (same batches, same dropout masks) are run again.
    Pass a short run: it keeps one copy of the weights a step. Afterwards the model and its
    optimizer are as they were before.

    Example:

    >>> print(kd.verify_hypergradients(model, x[:2000], y[:2000], hyper_data=(x_hyper, y_hyper)))

    Args:
        model: A model compiled with an optimizer of `kd.optimizers` that has a `Hyperparameter`.
        x, y: Training data, as for `fit`.
        hyper_data: What the outer loss is measured on (see `DrMADCallback`).
        trajectory, curvature, window, reverse_steps: The estimator that is verified, as in
            `DrMADCallback`. Defaults to `"linear"` with Gauss-Newton.
        entries: How many entries of each argument are checked by finite differences, those with
            the largest hypergradients. Defaults to 3. In float32 they are good to a few percent.
        hyper_batch_size: Examples per batch of the outer loss, where arrays are passed.
        **fit_arguments: For `fit`: `epochs`, `batch_size`, `shuffle`, ...

    Returns:
        A `Verification`: cosine, sign agreement and norm ratio per hyperparameter, and the
        finite differences.

    Raises:
        TypeError, ValueError: as `DrMADCallback`; or if the exact walk itself is not finite.
    """
    callback = _Verifying(
        hyper_data,
        outer_optimizer=keras.optimizers.SGD(0.0),
        restart=True,
        horizon=_epochs(fit_arguments),
        trajectory=trajectory,
        curvature=curvature,
        window=window,
        reverse_steps=reverse_steps,
        hyper_batch_size=hyper_batch_size,
    )
    callback.entries = checks.positive_int(entries, "entries") if entries else 0
    _fit(model, x, y, callback, fit_arguments)
    return callback.comparison.result


class _Verifying(DrMADCallback):
    """Estimates by the setting asked for and exactly, and compares."""

    entries = 3

    def _method_for(self, max_batches: int | None):
        asked = super()._method_for(max_batches).chosen
        if asked is None:
            raise ValueError("`trajectory` is named in a verification: 'auto' is none.")
        self.comparison = _Comparison(asked, self.entries, self._outer_loss)
        return self.comparison


class _Comparison:
    """In the place of a choice of setting: walks one run by the setting and by the exact one."""

    def __init__(self, setting: Setting, entries: int, outer: OuterLoss):
        self.chosen, self.why = setting, "as asked"
        self._entries, self._outer = entries, outer
        curvature = "hessian" if setting.curvature == "gauss_newton" else setting.curvature
        self._exact = Setting(Stored(), curvature)
        self._ends = Setting(Linear(), curvature)

    @property
    def curvatures(self) -> list[str]:
        return [setting.curvature for setting in self.settings()]

    def settings(self) -> list[Setting]:
        return [self.chosen, self._exact, self._ends]

    def hypergradients(self, estimator: Estimator, outer_loss: float, rate: float):
        first_state = self._ends.trajectory.states[0]
        exact = estimator.walk(self._exact)
        if exact.problem:
            raise ValueError(f"The exact hypergradient can't serve as the truth: {exact.problem}.")
        found = estimator.walk(self.chosen)
        agreements = agreement(estimator.model.optimizer, [], found, exact)
        probes = _probe(estimator, self._outer, exact, first_state, self._entries)
        self.result = Verification(str(self.chosen), estimator.steps, agreements, probes)
        return found, agreements


def _probe(
    estimator: Estimator, outer: OuterLoss, exact: Hypergradients, first: State, entries: int
) -> list[Probe]:
    """Central differences of the outer loss, by running the recorded steps again."""
    optimizer = estimator.model.optimizer
    candidates: dict[str, list[tuple[float, int, tuple[int, ...]]]] = {}
    for i, (group, found) in enumerate(zip(optimizer.groups, exact.values, strict=True)):
        values = found.numpy()
        for index in np.ndindex(values.shape):
            of_argument = candidates.setdefault(group.argument, [])
            of_argument.append((abs(float(values[index])), i, index))
    probes = []
    for argument, found in candidates.items():
        for _, i, index in sorted(found, reverse=True)[:entries]:
            at = [v.numpy() for v in optimizer.values()]
            value = float(exact.values[i][index])
            # So far that the loss moves by more than it is rounded, and no farther.
            wanted = exact.outer_loss * (1e-6 if at[i].dtype == np.float64 else 1e-3)
            step = wanted / max(abs(value), 1e-12)
            domain, middle = optimizer.groups[i].domain, float(at[i][index])
            while domain.name != "positive" and not (
                domain.contains(middle + step) and domain.contains(middle - step)
            ):
                step /= 2.0
            losses = []
            for sign in (1.0, -1.0):
                moved = [v.copy() for v in at]
                moved[i][index] += sign * step
                losses.append(float(outer(estimator.rerun(first, moved))[0]))
            difference = (losses[0] - losses[1]) / (2.0 * step)
            probes.append(Probe(argument, optimizer.groups[i].key, index, value, difference))
    return probes


def _epochs(arguments: dict[str, Any]) -> int:
    """How many epochs a fit takes, all of them one horizon."""
    first, last = arguments.get("initial_epoch", 0), arguments.get("epochs", 1)
    if not isinstance(last - first, int) or last <= first:
        raise ValueError(
            f"`epochs` is the number of the last epoch. Received: epochs={last!r} with "
            f"initial_epoch={first!r}, so that there is no training. Pass at least "
            f"epochs={first + 1}."
        )
    return last - first


def _fit(model, x, y, callback: DrMADCallback, arguments: dict[str, Any]) -> None:
    """A fit after which model and optimizer are as they were."""
    arguments = {"verbose": 0, **arguments}
    callbacks = [*(arguments.pop("callbacks", None) or ()), callback]
    restore_schedules = _schedules_of(model)
    seeds = [(v, tf.identity(v.value)) for v in seed_variables(model)]
    try:
        model.fit(x, y, callbacks=callbacks, **arguments)
    finally:
        callback.restore_first_weights()
        restore_schedules()
        for variable, value in seeds:
            variable.assign(value)


def _schedules_of(model: keras.Model) -> Callable[[], None]:
    """What sets schedules back to the horizon and the blocks that they have now."""
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, Optimizer) or not optimizer.built:
        return lambda: None
    horizon, position = optimizer.horizon, int(optimizer.position)
    raw = [v.numpy() for v in optimizer.raw_variables]

    def restore() -> None:
        if optimizer.set_horizon(*horizon):
            model.make_train_function(force=True)  # it holds on to variables that were replaced
        optimizer.position.assign(position)
        for variable, value in zip(optimizer.raw_variables, raw, strict=True):
            variable.assign(value)

    return restore
