"""One training step, forward and back, as pure functions of the state.

At the state before a step, with the cotangents (w_bar, s_bar) of the weights and slots after it,
and a_bar of moving averages of what the weights give (those of BatchNormalization),

    w_bar', s_bar', g_bar, l_bar = VJP of the update rule
    w_bar <- w_bar' + (C g_bar + a_bar' d averages / d weights)
                                                 C: curvature of the step's training loss; what
                                                 is in brackets, bounded on a reconstructed path
    s_bar <- s_bar'
    a_bar <- a_bar' d averages / d averages before
    hypergradient of the rule's values += l_bar
    hypergradient of tuned variables   += d <gradient, g_bar> / d tuned

(Maclaurin et al., 2015, algorithm 2; Fu et al., 2016, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from keras_drmad import rules
from keras_drmad.batches import Packed
from keras_drmad.curvature import Curvature, bounded, gauss_newton
from keras_drmad.trajectories import State

Tensors = list[tf.Tensor]


class Run(NamedTuple):
    """What happened in a training run, as tensors."""

    batches: Packed
    seeds: Tensors  # (batches, *shape) each: seed states before each batch
    rates: tf.Tensor  # (steps,): the scalar learning rate of each step
    values: Tensors  # of each group, (blocks, *shape): the values trained with
    tuned: Tensors  # values of the tuned variables
    iteration: tf.Tensor  # the optimizer's count of updates before the first step (int64)
    horizon: tf.Tensor  # steps that schedules stretch over (int64)


class Given(NamedTuple):
    """What one training step was made with, beside the state."""

    batch: Any
    values: Tensors  # of each group, at this step
    tuned: Tensors
    seeds: Tensors
    rate: tf.Tensor  # the scalar learning rate
    count: tf.Tensor  # the number of the update, from 1 (int64)


# (weights, slots, gradients, values, learning_rate, t) -> (weights, slots)
Update = Callable[..., tuple[Tensors, list[rules.Slots]]]
# (weights, tuned, moving averages, seeds, batch) -> objectives.Forward
TrainLoss = Callable[[Sequence[tf.Tensor], Sequence[tf.Tensor], Tensors, Tensors, Any], Any]


@dataclass(eq=False)
class Steps:
    """The steps of one model and optimizer.

    Args:
        loss: The training loss as a pure function.
        update: The update of all variables as a pure function.
        curvature: One of `keras_drmad.curvature`.
        slots: The number of slots of each variable.
        block_of: (position, blocks, horizon) -> the block of a schedule at a step.
    """

    loss: TrainLoss
    update: Update
    curvature: Curvature
    slots: Sequence[int]
    block_of: Callable[[tf.Tensor, int, tf.Tensor], tf.Tensor]

    def given(self, run: Run, t: tf.Tensor, row: tf.Tensor, batch: Any) -> Given:
        """What step t was made with."""
        values = [
            tf.gather(array, self.block_of(t, array.shape[0], run.horizon)) for array in run.values
        ]
        seeds = [tf.gather(seed, row) for seed in run.seeds]
        rate, count = tf.gather(run.rates, t), run.iteration + t + 1
        return Given(batch, values, run.tuned, seeds, rate, count)

    def forward(self, state: State, given: Given) -> State:
        """The state after a step."""
        weights, slots, averages = split(state, self.slots)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            forward = self.loss(weights, given.tuned, averages, given.seeds, given.batch)
        gradients = tape.gradient(forward.loss, weights)
        gradients = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        return self._updated(weights, slots, gradients, given) + list(forward.averages)

    def back(
        self, state: State, given: Given, bars: Tensors, ceiling: tf.Tensor | None = None
    ):  # fmt: skip
        """One step back.

        With a ceiling, the state is a guess, and curvature that no training could have met is cut.

        Returns:
            The state after the step; and the new cotangents of the state, those of the values and
            those of tuned variables.
        """
        weights, slots, averages = split(state, self.slots)
        n, m = len(weights), len(bars) - len(averages)
        moved: Tensors = []  # the moving averages after the step

        def loss(w, h):
            tuned, before = h[: len(given.tuned)], h[len(given.tuned) :]
            forward = self.loss(w, tuned, before, given.seeds, given.batch)
            moved[:] = moved or forward.averages  # the first pass is at the state
            return forward

        gradient, product = self.curvature(loss, weights, [*given.tuned, *averages])
        used = [i for i, g in enumerate(gradient) if g is not None]
        known = [gradient[i] for i in used]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([weights, slots, known, given.values])
            after = self._updated(weights, slots, gradient, given)
        parts = [*state[:m], *known, *given.values]
        found = tape.gradient(after, parts, bars[:m], unconnected_gradients="zero")
        new, g_bar, l_bar = found[:m], found[m : m + len(known)], found[m + len(known) :]
        direction = [tf.zeros_like(w) for w in weights]
        for i, bar in zip(used, g_bar, strict=True):
            direction[i] = bar
        curved, mixed = product(direction, bars[m:])
        if ceiling is not None and self.curvature is gauss_newton:
            curved = bounded(new[:n], curved, ceiling)
        new = [*map(tf.add, new[:n], curved), *new[n:], *mixed[len(given.tuned) :]]
        return after + moved, (new, l_bar, mixed[: len(given.tuned)])

    def _updated(self, weights, slots, gradient, given: Given) -> State:
        weights, slots = self.update(
            weights, slots, gradient, given.values, given.rate, given.count
        )
        return [*weights, *(s for of_one in slots for s in of_one)]


def split(state: State, slots: Sequence[int]) -> tuple[Tensors, list[rules.Slots], Tensors]:
    """A flat state as the weights, of each weight the slots, and the moving averages."""
    weights, rest = list(state[: len(slots)]), list(state[len(slots) :])
    grouped: list[rules.Slots] = []
    for count in slots:
        grouped.append(tuple(rest[:count]))
        del rest[:count]
    return weights, grouped, rest


def given_spec(run: Run, leaves: list[tf.TensorSpec]) -> Given:
    """The spec of what a step is made with, its batch as the leaves that it has."""

    def one(array: tf.Tensor) -> tf.TensorSpec:
        return tf.TensorSpec(array.shape[1:], array.dtype)

    return Given(
        leaves,
        [one(values) for values in run.values],
        [tf.TensorSpec(v.shape, v.dtype) for v in run.tuned],
        [one(seeds) for seeds in run.seeds],
        one(run.rates),
        tf.TensorSpec([], tf.int64),
    )
