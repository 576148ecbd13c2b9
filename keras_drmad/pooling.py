"""Max pooling whose derivatives of every order are as fast as the first.

TensorFlow's second derivative of max pooling looks for the maxima again, one by one: a fifth of a
reverse step of a small convolutional net on a CPU. Where windows don't overlap, the derivative is a
product with a mask of the maxima, between averages; both are as fast as pooling itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def max_pool(
    input: tf.Tensor,
    ksize: Any,
    strides: Any,
    padding: Any,
    data_format: str | None = None,
    name: str | None = None,
) -> tf.Tensor:
    """`tf.nn.max_pool`: the same values and, to rounding, the same derivatives."""
    input = tf.convert_to_tensor(input)
    window = _window(ksize)
    if (
        not (input.shape.rank == 4 and input.dtype.is_floating)
        or data_format not in (None, "NHWC")
        or window is None
        or window != _window(strides)
        or not (padding == "VALID" or (padding == "SAME" and _fits(input, window)))
    ):
        return _ordinary(input, ksize, strides, padding, data_format, name)
    windows = dict(ksize=[1, *window, 1], strides=[1, *window, 1], padding="VALID")

    masks: dict[Any, tf.Tensor] = {}  # one in each graph that takes a derivative

    @tf.custom_gradient
    def pool(x):
        y = _ordinary(x, window, window, "VALID")

        def mask():
            # As `fit` chooses among equal maxima: the gradient of ones is where they are.
            area = tf.fill(tf.shape(y), tf.cast(window[0] * window[1], y.dtype))
            found = tf.raw_ops.MaxPoolGrad(orig_input=x, orig_output=y, grad=area, **windows)
            return tf.stop_gradient(found, name=MASK)

        def gradient(bar):
            here = tf.compat.v1.get_default_graph()
            if here not in masks:
                masks[here] = mask()
            spread = tf.raw_ops.AvgPoolGrad(orig_input_shape=tf.shape(x), grad=bar, **windows)
            return masks[here] * spread

        return y, gradient

    with tf.name_scope(name or "max_pool"):
        return pool(input)


# What stops a gradient here, by its name: a mask has none, but where two maxima are equal.
MASK = "mask_of_maxima"
_ordinary = tf.nn.max_pool  # what stands there later may lead here


def _window(size: Any) -> list[int] | None:
    """Rows and columns, of what TensorFlow takes for them; None for anything unusual."""
    if isinstance(size, int):
        return [size, size]
    if not isinstance(size, Sequence) or not all(isinstance(n, int) for n in size):
        return None
    sizes = list(size)
    if len(sizes) == 4 and sizes[0] == sizes[3] == 1:
        sizes = sizes[1:3]
    return {1: sizes * 2, 2: sizes}.get(len(sizes))


def _fits(images: tf.Tensor, window: list[int]) -> bool:
    return all(n is not None and n % w == 0 for n, w in zip(images.shape[1:3], window, strict=True))
