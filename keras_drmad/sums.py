"""Sums that XLA does quickly on a CPU: of the derivative by a value that many weights share.

A value broadcasts to its weights, so its derivative is a sum over them. To a single number XLA adds
one after the other, since floating-point addition may not be reordered, and takes as long for the
first layer of a small net as a quarter of a training step. Adding rows, which it does in parallel,
and then the few columns by a matrix product takes half of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

SMALL = 4096  # entries that are not worth the operations


def spread(value: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Broadcast a value to its weights' shape; the derivative is summed quickly under XLA.

    Args:
        value: Of the shape (), (units,), (inputs, 1) or that of the weights.
        shape: The weights' shape.
    """

    @tf.custom_gradient
    def broadcast(value):
        return tf.broadcast_to(value, shape), lambda upstream: _summed(upstream, value.shape)

    return value if value.shape == tf.TensorShape(shape) else broadcast(value)


def total(x: tf.Tensor) -> tf.Tensor:
    """The sum of all entries, quickly under XLA."""
    if x.shape.rank < 2 or x.shape.num_elements() < SMALL:
        return tf.reduce_sum(x)
    columns = tf.reduce_sum(x, axis=list(range(x.shape.rank - 1)))
    return tf.tensordot(columns, tf.ones_like(columns), 1)


def _summed(x: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    if shape.rank == 2:  # (inputs, 1): along the last axis
        rows = tf.matmul(x, tf.ones([x.shape[-1], 1], x.dtype))
        return tf.reduce_sum(rows, axis=list(range(x.shape.rank - 2)))
    if shape.rank == 1:
        return tf.reduce_sum(x, axis=list(range(x.shape.rank - 1)))
    return total(x)
