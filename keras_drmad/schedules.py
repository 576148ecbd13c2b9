"""Values over time: equal blocks of a horizon, which begin again after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def block_of(position: tf.Tensor, blocks: int, steps: tf.Tensor) -> tf.Tensor:
    """The block of a schedule of so many blocks in which a step of the horizon lies."""
    at = tf.math.floordiv(position * blocks, tf.maximum(steps, 1))
    return tf.clip_by_value(at, 0, blocks - 1)


def within_horizon(step: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
    """The step of the horizon (int64): beyond its end a schedule begins again."""
    return tf.math.floormod(step, tf.maximum(steps, 1))


def resampled(blocks: np.ndarray, count: int) -> np.ndarray:
    """A schedule with another number of blocks: each takes the value of the one it begins in."""
    return blocks[[i * len(blocks) // count for i in range(count)]]


@keras.saving.register_keras_serializable(package="keras_drmad")
class HorizonSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate for each of equal blocks of a horizon, again and again.

    It is what a tuned learning rate that changes over time becomes in a stock Keras optimizer (see
    `to_keras` of the optimizers).

    Example:

    >>> rate = kd.schedules.HorizonSchedule([0.1, 0.05, 0.01], steps=300)
    >>> model.compile(keras.optimizers.SGD(rate), loss="mse")

    Args:
        values: The learning rates of the blocks.
        steps: Training steps of a horizon. Step 0 and step `steps` take the first value.

    Raises:
        ValueError: if `values` are not finite numbers, or `steps` is not a whole number >= 1.
    """

    def __init__(self, values: Sequence[float], steps: int):
        super().__init__()
        self.values = [float(value) for value in values]
        if not self.values or not all(map(math.isfinite, self.values)):
            raise ValueError(f"`values` are finite numbers, one at least. Received: {values!r}")
        if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
            raise ValueError(f"`steps` is a whole number >= 1. Received: steps={steps!r}")
        self.steps: int = int(steps)

    def __call__(self, step: Any) -> tf.Tensor:
        steps = tf.constant(self.steps, tf.int64)
        position = within_horizon(tf.cast(step, tf.int64), steps)
        values = tf.constant(self.values, keras.config.floatx())
        return tf.gather(values, block_of(position, len(self.values), steps))

    def get_config(self) -> dict[str, Any]:
        return {"values": list(self.values), "steps": self.steps}
