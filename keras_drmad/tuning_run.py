"""A tuning run: what it has done so far, and all that it needs to go on as if it had never stopped.

It moves what is tuned, writes the records, sets the weights back where horizons start again, and is
saved by the model's optimizer (see `Optimizer.attach`).
"""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad import outer, saving
from keras_drmad.estimator import Estimator, Hypergradients
from keras_drmad.fidelity import Agreement, Auto, Fixed
from keras_drmad.objectives import seed_variables
from keras_drmad.reports import Record, load_history, nested, save_history
from keras_drmad.restart import Start
from keras_drmad.search_space import SearchSpace


class TuningRun:
    """One callback's run, over any number of fits.

    Args:
        space: What is tuned.
        outer_optimizer: A Keras optimizer.
        restart: `False`, `True` or `"fresh"`, as in `DrMADCallback`.
        max_step: No raw value moves farther in one update.
    """

    model: keras.Model
    estimator: Estimator
    method: Fixed | Auto

    def __init__(
        self,
        space: SearchSpace,
        outer_optimizer: keras.optimizers.Optimizer,
        restart: bool | str,
        max_step: float,
    ):
        self.space, self.outer_optimizer = space, outer_optimizer
        self.restart, self.max_step = restart, max_step
        self.history: list[Record] = []
        self._steps_done = 0
        self._start: Start | None = None
        self._said: set[str] = set()

    def begin(self, model: keras.Model, estimator: Estimator, method: Fixed | Auto) -> None:
        """Begin or go on with a model, by these ways to estimate."""
        if getattr(self, "model", None) is not model:
            self._start = None
        self.model, self.estimator, self.method = model, estimator, method

    # Where a horizon starts from -----------------------------------------------------------------

    def start_again(self) -> None:
        """Set the weights back to where this horizon is to start from."""
        again = bool(self.history) or self.space.scale is not None
        if self._start is not None and (self.restart is True or (self.restart and again)):
            self._go_to(self._start, fresh=self.restart == "fresh")

    def before_first_step(self) -> None:
        """Keep the first weights, of which there may be none before the first step of a fit."""
        if self.restart and self._start is None:
            self._start = Start(self.model)
            if self.space.scale is not None:
                self.space.scale.apply(self.model)

    def attach(self) -> None:
        """Be saved with the optimizer from now on, and take over what was loaded with it.

        Within a horizon, before its first step: what came has a place to start from.
        """
        self.model.optimizer.attach(self)
        if self._start is not None:
            self._go_to(self._start, fresh=self.restart == "fresh")

    def restore_first_weights(self) -> None:
        """Set model and optimizer back to where the first horizon started."""
        if self._start is not None:
            self._go_to(self._start, fresh=False)

    def _go_to(self, start: Start, fresh: bool) -> None:
        """Set everything back but what is tuned, and scale the initial weights."""
        tuned = [(v, tf.identity(v.value)) for v in self.space.targets]
        if fresh:
            start.restore_with_new_weights(self.model, len(self.history))
        else:
            start.restore()
        for variable, value in tuned:
            variable.assign(value)  # a weight of a layer, it may be part of what was set back
        if self.space.scale is not None:
            self.space.scale.apply(self.model)

    # Updates -------------------------------------------------------------------------------------

    def update(
        self,
        estimate: Hypergradients,
        agreement: dict[str, Agreement] | None,
        trained_with: Sequence[Any],
        epoch: int,
    ) -> Record:
        """Move what is tuned, if the estimate can be trusted, and add the record.

        Args:
            estimate: The hypergradients.
            agreement: How they agree with the exact ones, where that was measured.
            trained_with: The values that the horizon was trained with.
            epoch: After which this is.
        """
        reason = estimate.problem or self._move(estimate)
        self._steps_done += self.estimator.steps
        labels = self.space.labels(self.model)
        hypergradients = self.space.hypergradients(self.model, estimate)
        record = Record(
            outer_loss=estimate.outer_loss,
            hyperparameters=nested(labels, trained_with),
            hypergradients=nested(labels, hypergradients),
            initial_weights_gradient=None
            if estimate.weights is None
            else [g.numpy() for g in estimate.weights],
            epoch=epoch,
            step=self._steps_done,
            accepted=not reason,
            reason=reason,
            verification=None
            if agreement is None
            else {name: dataclasses.asdict(found) for name, found in agreement.items()},
            setting=str(self.method.chosen),
            labels=tuple(labels),
        )
        if self.history:
            # One copy of the weights' gradient, not one per update.
            self.history[-1] = dataclasses.replace(self.history[-1], initial_weights_gradient=None)
        self.history.append(record)
        self._tell(estimate, reason)
        return record

    def _move(self, estimate: Hypergradients) -> str:
        moved = self.space.moved(self.model)
        self.outer_optimizer = outer.built_for(self.outer_optimizer, [t.raw for t in moved])
        hypergradients = self.space.moved_hypergradients(self.model, estimate)
        return outer.update(self.outer_optimizer, moved, hypergradients, self.max_step)

    def _tell(self, estimate: Hypergradients, reason: str) -> None:
        for variable, h in zip(self.space.targets, estimate.tuned, strict=True):
            if not reason and not np.any(h):
                self.warn_once(
                    f"The hypergradient of {variable.path} is exactly zero: nothing that was "
                    "trained or measured depends on it. Is it part of this model or its loss?"
                )
        if reason:
            self.warn_once(
                f"An update of the hyperparameters was skipped: {reason}. They stay as they are. "
                "If it comes again, that is noted in `history` alone.",
                kind=re.sub(r"\d+", "", reason),
            )
        if estimate.fallback:
            self.warn_once(
                f"curvature={estimate.fallback!r} made the adjoint explode on this trajectory; "
                "the horizon was walked with Gauss-Newton instead. trajectory='replay' is exact."
            )

    def warn_once(self, message: str, kind: str = "") -> None:
        """Warn, unless of this kind (or by this message) it was warned before."""
        if (kind or message) not in self._said:
            self._said.add(kind or message)
            warnings.warn(message, stacklevel=2)

    # What the optimizer asks ---------------------------------------------------------------------

    def get_state(self) -> saving.State:
        """What this run needs to go on, beside what Keras saves of model and optimizer."""
        state = {"history": saving.bytes_of(lambda file: save_history(self.history, file))}
        for prefix, variables in self._saved_variables().items():
            state.update(saving.values_of(variables, prefix))
        if self._start is not None:
            state.update(saving.values_of(self._start.values(), "start_"))
            state["drawn_from"] = np.asarray(self._start.seed)
        return saving.with_notes(
            state,
            steps_done=self._steps_done,
            unfinished=self.estimator.recorder.steps,
            outer_optimizer=type(self.outer_optimizer).__name__,
            method=self.method.get_state(),
        )

    def set_state(self, state: saving.State) -> None:
        """Go on from where `get_state` was called."""
        notes = saving.notes_of(state)
        if notes["outer_optimizer"] != type(self.outer_optimizer).__name__:
            raise ValueError(
                f"The saved tuning run has the outer optimizer {notes['outer_optimizer']}, this "
                f"callback has {type(self.outer_optimizer).__name__}. Pass the same one, or call "
                "`model.optimizer.forget_run()` to begin a new run with the hyperparameters as "
                "they are."
            )
        # All that can fail comes before all that is assigned.
        history = load_history(io.BytesIO(state["history"].tobytes()))
        start = None
        if self.restart and "start_0" in state:
            start = Start(self.model)
            start.set_values(saving.entries(state, "start_"))
            if "drawn_from" in state:
                start.seed = int(state["drawn_from"])
        saved = self._saved_variables()
        for prefix, variables in saved.items():
            saving.check(variables, state, prefix)
        self.method.set_state(notes["method"])
        for prefix, variables in saved.items():
            saving.assign(variables, state, prefix)
        self.history[:] = history
        self._start = start or self._start
        self._steps_done = notes["steps_done"]
        if notes["unfinished"]:
            self.warn_once(
                f"What was loaded was saved {notes['unfinished']} steps after the last update of "
                "the hyperparameters. These steps count for no update: a new horizon begins. Save "
                "once in a horizon; and let callbacks that save (BackupAndRestore, "
                "ModelCheckpoint) stand behind DrMADCallback in `callbacks`, so that they see the "
                "update."
            )

    def _saved_variables(self) -> dict[str, Sequence[keras.Variable]]:
        """The variables of this run that neither model nor optimizer saves, by prefix."""
        scale = self.space.scale
        raw = [t.raw for t in self.space.moved(self.model)]
        self.outer_optimizer = outer.built_for(self.outer_optimizer, raw)
        if not self.outer_optimizer.built:
            self.outer_optimizer.build(raw)
        of_model = {id(v) for v in self.model.variables}
        return {
            # Of the loss, say.
            "variable_": [v for v in self.space.targets if id(v) not in of_model],
            "scale_": [] if scale is None else scale.raw(self.model),
            "seed_": seed_variables(self.model),
            "outer_optimizer_": self.outer_optimizer.variables,
        }
