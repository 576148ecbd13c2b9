"""The recorder: what a training run leaves behind for the reverse loop.

Keras's callbacks never see a batch, so the training function itself is stood in for. The stand-in
is put into the model before a batch and takes itself out as soon as it is called: whatever is
raised in between or afterwards, by whomever, the model is not left hooked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_drmad import batches as packing
from keras_drmad.objectives import averages, seed_variables
from keras_drmad.trajectories import State, Trajectory


class Recorder:
    """Records training steps of a model: batches, seeds, learning rates, states.

    Args:
        model: A compiled model with an optimizer of `keras_drmad.optimizers`.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self._function: Callable | None = None
        self._key: Any = None
        self.begin(None, ())

    def begin(
        self,
        steps: int | None,
        trajectories: Sequence[tuple[Trajectory, int]],
        max_batches: int | None = None,
    ) -> None:
        """Forget the last run and start another.

        Args:
            steps: How many steps it will have, or None if that is not known.
            trajectories: Each is offered every state and keeps those that it wants. With each,
                the first step that will be walked on it.
            max_batches: How many batches are kept at most, thinned evenly; None keeps all.
        """
        self.steps = 0
        self.kept: list[int] = []  # the steps whose batches are kept
        self.batches: list[Any] = []
        self.seeds: list[list[tf.Tensor]] = []
        self._rates: list[tf.Tensor] = []  # vectors, but for the newest
        self._newest_rates: list[tf.Tensor] = []
        self._trajectories = [trajectory for trajectory, _ in trajectories]
        for trajectory, first in trajectories:
            trajectory.begin(steps, first)
        first = min((first for _, first in trajectories), default=0)
        self._max_batches, self._first = max_batches, first
        self._averages: list[keras.Variable] | None = None  # known once the model is built
        self._stride = 1
        if max_batches is not None and steps is not None:
            self._stride = max(1, math.ceil((steps - first) / max_batches))

    def arm(self, before: Callable[[Any], None]) -> None:
        """Stand in for the model's training function, for one call.

        Args:
            before: Called with the batch's element spec before the run's first step, when model
                and optimizer may not have been built.

        Raises:
            ValueError: if a recorder has armed itself for the same step already.
        """
        model = self.model
        if isinstance(model.train_function, _StandIn) and not model.train_function.stale:
            unhook(model)
            raise ValueError(
                "Two DrMADCallbacks are in one `fit`. Pass one: it can tune every "
                "Hyperparameter of the optimizer and `variables` of the model at once."
            )
        unhook(model)
        _set_train_function(model, _StandIn(self, model.train_function, before))

    def record(self, original: Callable, iterator: Any, before: Callable[[Any], None]) -> Any:
        if self.steps == 0:
            before(iterator.element_spec)
        t = self.steps
        wanting = [trajectory for trajectory in self._trajectories if trajectory.wants(t)]
        state = self.snapshot() if wanting else []
        # Nothing is kept of a step for which there is no data: so ends an epoch of unknown length.
        logs, data, seeds, rate = self._train(original)(iterator)
        for trajectory in wanting:
            trajectory.add(t, list(state), len(self.model.trainable_variables))
        if t >= self._first and (t - self._first) % self._stride == 0:
            self._keep(t, data, seeds)
        self._newest_rates.append(rate)
        if len(self._newest_rates) == 256:  # a tensor for each step would take kilobytes
            self._pack_rates()
        self.steps = t + 1
        return logs

    def _keep(self, t: int, data: Any, seeds: list[tf.Tensor]) -> None:
        self.kept.append(t)
        self.batches.append(data)
        self.seeds.append(seeds)
        if self._max_batches is not None and len(self.kept) > self._max_batches:
            self._stride *= 2
            self.kept, self.batches, self.seeds = (
                [x for x, at in zip(of, self.kept, strict=True)
                 if (at - self._first) % self._stride == 0]
                for of in (list(self.kept), self.batches, self.seeds)
            )  # fmt: skip

    def finish(self) -> None:
        """Keep the state after the last step."""
        state = self.snapshot()
        for trajectory in self._trajectories:
            weights = len(self.model.trainable_variables)
            trajectory.finish(self.steps, list(state), weights)

    def take_rates(self) -> tf.Tensor:
        """The scalar learning rate of each step; what is handed out is forgotten."""
        self._pack_rates()
        rates, self._rates = tf.concat(self._rates, 0), []
        return rates

    def _pack_rates(self) -> None:
        if self._newest_rates:
            self._rates.append(tf.stack(self._newest_rates))
            self._newest_rates = []

    def snapshot(self) -> State:
        """The state now: weights, then slots, then moving averages."""
        optimizer = self.model.optimizer
        variables = list(self.model.trainable_variables)
        variables += [slot for slots in optimizer.slot_variables for slot in slots]
        if self._averages is None:
            self._averages = averages(self.model)
        variables += self._averages
        # `v.value` is an alias of the variable; the copy is its value now.
        return [tf.identity(v.value) for v in variables]

    def nbytes(self) -> int:
        """Bytes of the batches and states that are kept now."""
        states = {id(x): x for t in self._trajectories for state in t.states for x in state}
        return sum(packing.nbytes(x) for x in (*self.batches, *states.values()))

    def _train(self, original: Callable) -> Callable:
        # Keras makes a new training function when the model is compiled again.
        if self._function is None or self._key is not original:
            self._function, self._key = _recording_function(self.model), original
        return self._function


class _StandIn:
    """Stands in the place of `model.train_function` for one call."""

    def __init__(self, recorder: Recorder, original: Callable, before: Callable[[Any], None]):
        self.recorder, self.original, self.before = recorder, original, before
        self._fit = self._present_fit()

    def _present_fit(self) -> Any:
        # Keras gives each `fit` a History of its own.
        return getattr(self.recorder.model, "history", None)

    @property
    def stale(self) -> bool:
        """Whether the `fit` that it was made for has been left, by an exception."""
        return self._fit is not self._present_fit()

    def __call__(self, iterator: Any) -> Any:
        _set_train_function(self.recorder.model, self.original)
        if self.stale or not isinstance(iterator, tf.data.Iterator):  # `train_on_batch` has none
            return self.original(iterator)
        return self.recorder.record(self.original, iterator, self.before)


def unhook(model: keras.Model) -> None:
    """Take out a stand-in that an interrupted `fit` never called."""
    if isinstance(model.train_function, _StandIn):
        _set_train_function(model, model.train_function.original)


def _set_train_function(model: keras.Model, function: Callable) -> None:
    # Past Keras's attribute tracking, which has nothing to do here and takes time at every step.
    vars(model)["train_function"] = function


def _recording_function(model: keras.Model) -> Callable:
    """A training function like that of Keras which also returns what it trained on."""
    optimizer = model.optimizer

    def step(data):
        return model.train_step(data)

    def recording(iterator):
        data = keras.tree.map_structure(
            lambda x: None if isinstance(x, tf.experimental.Optional) else x,
            iterator.get_next(),
        )
        seeds = [tf.identity(v.value) for v in seed_variables(model)]
        rate = tf.identity(optimizer.fixed_learning_rate())
        return step(data), data, seeds, rate

    step = tf.autograph.experimental.do_not_convert(step)
    recording = tf.autograph.experimental.do_not_convert(recording)
    if not model.run_eagerly:
        step = tf.function(step, reduce_retracing=True, jit_compile=model.jit_compile)
        recording = tf.function(recording, reduce_retracing=True)
    return recording
