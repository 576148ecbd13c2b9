"""A step back in two halves: what recomputing the step works out, and what the cotangents add.

A replayed step is made twice over otherwise, once to go on from it and once to differentiate it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_drmad.batches import Batches, leaves_of
from keras_drmad.linearize import Linearized, linearize

Tensors = list[tf.Tensor]


@dataclass(frozen=True)
class Halves:
    """The halves of a step, for each kind of batch, which keep the same number of tensors.

    Args:
        of_kind: The halves by the shapes of a batch's leaves.
        slots: Where each tensor is kept. Where kinds differ in shape, it lies there flat.
    """

    of_kind: dict[tuple, Linearized]
    slots: list[tf.TensorSpec]

    # What may be kept of a step: as much again as two states, or little in any case. The
    # activations of a convolutional net are a hundred times its weights.
    STATES, BYTES = 2, 2**20

    @classmethod
    def of(
        cls,
        step: Callable,
        batches: Batches,
        state: Any,
        bars: Any,
        given: Callable[[list[tf.TensorSpec]], Any],
    ) -> Halves | None:
        """The halves of `step(state, given, bars)`; None where keeping them is not worth it.

        Args:
            step: Its `given` has the batch as its field `batch`.
            batches: The batches, to know their shapes.
            state, bars: Specs.
            given: From the specs of a batch's leaves to the spec of `given`, with these as `batch`.
        """

        def flat(state, given, bars):
            return step(state, given._replace(batch=batches.batch_of(given.batch)), bars)

        of_kind: dict[tuple, Linearized] = {}
        allowed = max(cls.STATES * sum(map(_bytes, state)), cls.BYTES)
        for leaves in batches.kinds:
            halves = linearize(flat, state, given(leaves), bars)
            if halves is None or halves.nbytes > allowed:
                return None
            of_kind[_shapes(leaves)] = halves
        kept = [halves.saved for halves in of_kind.values()]
        if not kept or any([s.dtype for s in of] != [s.dtype for s in kept[0]] for of in kept):
            return None
        return cls(of_kind, [_common(specs) for specs in zip(*kept, strict=True)])

    def early(self, state: Tensors, given: Any) -> tuple[Tensors, Tensors]:
        """What is kept of a step, and the state after it."""
        leaves = leaves_of(given.batch)
        saved, after = self.of_kind[_shapes(leaves)].early(state, given._replace(batch=leaves))
        return [_padded(x, s) for x, s in zip(saved, self.slots, strict=True)], after

    def late(self, kept: Tensors, given: Any, bars: Tensors) -> Any:
        """What the step gives back."""
        leaves = leaves_of(given.batch)
        halves = self.of_kind[_shapes(leaves)]
        saved = [_cut(x, spec) for x, spec in zip(kept, halves.saved, strict=True)]
        return halves.late(saved, given._replace(batch=leaves), bars)


def _shapes(leaves: Any) -> tuple:
    return tuple(tuple(leaf.shape) for leaf in leaves)


def _bytes(spec: tf.TensorSpec) -> int:
    return spec.dtype.size * spec.shape.num_elements()


def _common(specs: tuple[tf.TensorSpec, ...]) -> tf.TensorSpec:
    if all(spec.shape == specs[0].shape for spec in specs):
        return specs[0]
    return tf.TensorSpec([max(math.prod(spec.shape) for spec in specs)], specs[0].dtype)


def _padded(x: tf.Tensor, slot: tf.TensorSpec) -> tf.Tensor:
    if x.shape == slot.shape:
        return x
    return tf.pad(tf.reshape(x, [-1]), [[0, slot.shape[0] - x.shape.num_elements()]])


def _cut(x: tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
    if x.shape == spec.shape:
        return x
    return tf.reshape(x[: spec.shape.num_elements()], spec.shape)
