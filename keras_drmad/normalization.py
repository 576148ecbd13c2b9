"""Second derivatives through normalization layers: right ones, or the layers that have none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_drmad import pooling


class _Active(threading.local):
    depth = 0  # how many contexts this thread is inside of


_active = _Active()
_lock = threading.Lock()
_entered = 0  # contexts that are open, in all threads
_ordinary: dict[str, Callable[..., Any]] = {}  # what is replaced in `tf.nn` meanwhile


@contextlib.contextmanager
def exact_moments() -> Iterator[None]:
    """Make derivatives of every order right through normalization layers, in this thread.

    Keras's `BatchNormalization`, `LayerNormalization` and `GroupNormalization`, and whatever else
    calls `keras.ops.moments`, reach `tf.nn.moments`. It stops the gradient of the mean inside the
    variance. The first derivative does not notice, because that gradient is zero; the second
    derivative is silently wrong. Inside this context nothing is stopped. Values and first
    derivatives stay the same, to rounding.

    The same holds for `tf.nn.softmax_cross_entropy_with_logits`, whose gradient TensorFlow takes
    for constant in the labels: a label smoothing that is tuned would have a hypergradient of 0.
    `tf.nn.max_pool` is right, and made faster (see `pooling`).

    Contexts may be nested. Other threads keep the ordinary function, and when the last context is
    left, everybody has it again. A `tf.function` keeps what it was first traced with, inside or
    outside of the context.

    Example:

    >>> layer = keras.layers.LayerNormalization()
    >>> x = tf.constant([[0.0, 1.0, 3.0]])
    >>> with tf.GradientTape() as outer, exact_moments():
    ...     outer.watch(x)
    ...     with tf.GradientTape() as inner:
    ...         inner.watch(x)
    ...         loss = tf.reduce_sum(layer(x) ** 3)
    ...     gradient = inner.gradient(loss, x)
    >>> product = outer.gradient(gradient, x, output_gradients=tf.ones_like(x))
    """
    global _entered
    with _lock:
        if not _entered:
            for name, exact in _EXACT.items():
                _ordinary[name] = getattr(tf.nn, name)
                setattr(tf.nn, name, _dispatcher(_ordinary[name], exact))
        _entered += 1
    _active.depth += 1
    try:
        yield
    finally:
        _active.depth -= 1
        with _lock:
            _entered -= 1
            if not _entered:
                for name in _EXACT:
                    setattr(tf.nn, name, _ordinary.pop(name))


def _dispatcher(ordinary: Callable[..., Any], exact: Callable[..., Any]) -> Callable[..., Any]:
    def either(*args, **kwargs):
        return (exact if _active.depth else ordinary)(*args, **kwargs)

    return either


def _exact_moments(x, axes, shift=None, keepdims=False, name=None):
    """`tf.nn.moments`, but for the stopped gradient."""
    del shift  # not used by TensorFlow either
    with tf.name_scope(name or "moments"):
        x = tf.convert_to_tensor(x)
        y = tf.cast(x, tf.float32) if x.dtype == tf.float16 else x  # float16 would overflow
        mean, variance = _about(y, _mean(y, axes), axes)
        if not keepdims:
            mean, variance = tf.squeeze(mean, axes), tf.squeeze(variance, axes)
        return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)


# The derivatives of the moments are written out: what TensorFlow makes of them goes three times as
# often over all of x, and in second order still oftener.


def _mean(x, axes):
    @tf.custom_gradient
    def mean(x):
        found = tf.reduce_mean(x, axes, keepdims=True)
        return found, lambda bar: tf.broadcast_to(bar / _count(x, found), tf.shape(x))

    return mean(x)


def _about(x, mean, axes):
    """The mean of x, which is passed, and its variance, as one function of x."""

    @tf.custom_gradient
    def moments(x, mean):
        variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)

        def gradient(mean_bar, variance_bar):
            count = _count(x, mean)
            # By way of the mean nothing comes: deviations from it add up to zero.
            return (x - mean) * (2.0 * variance_bar / count) + mean_bar / count, tf.zeros_like(mean)

        return (tf.identity(mean), variance), gradient

    return moments(x, mean)


def _count(x, mean):
    """How many entries of x each mean is of."""
    sizes = x.shape.num_elements(), mean.shape.num_elements()
    if all(sizes):
        return tf.constant(sizes[0] / sizes[1], x.dtype)
    return tf.cast(tf.size(x) / tf.size(mean), x.dtype)


def _exact_cross_entropy(labels, logits, axis=-1, name=None):
    """`tf.nn.softmax_cross_entropy_with_logits`, whose gradient depends on the labels."""
    with tf.name_scope(name or "softmax_cross_entropy_with_logits"):
        log_p = tf.nn.log_softmax(logits, axis)
        # A class that is masked out by a logit of -inf counts for nothing, as in TensorFlow.
        terms = tf.math.multiply_no_nan(log_p, tf.cast(labels, log_p.dtype))
        return -tf.reduce_sum(terms, axis)


_EXACT: dict[str, Callable[..., Any]] = {
    "moments": _exact_moments,
    "softmax_cross_entropy_with_logits": _exact_cross_entropy,
    "max_pool": pooling.max_pool,
}


def uncorrected_layers(model: keras.Model) -> list[str]:
    """Name the layers whose second derivative is wrong or missing even under `exact_moments()`.

    These are Keras layers known by type; what a custom layer computes is not looked into. A layer
    that resizes images before any trained layer, as preprocessing does, is right and not named.

    Example:

    >>> up = keras.layers.UpSampling2D(interpolation="bilinear", name="up")
    >>> model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 3), up])
    >>> uncorrected_layers(model)
    ['up']

    Args:
        model: A built model.

    Returns:
        Names of layers, of those inside other layers too, each once.
    """
    return list(dict.fromkeys(x.name for x, after in _inner(model, False) if _wrong(x, after)))


def _inner(parent: keras.layers.Layer, after: bool) -> Iterator[tuple[keras.layers.Layer, bool]]:
    """Each layer inside `parent`, and whether trained weights may come before it."""
    chain = isinstance(parent, keras.Sequential)
    graph = hasattr(parent, "operations")  # a functional model; it lists layers from the inputs on
    if isinstance(parent, keras.Model):
        layers = parent.layers
    else:
        layers = parent._flatten_layers(include_self=False, recursive=False)
    if not (chain or graph):  # in which order it calls them is not known
        after = after or bool(parent.trainable_variables)
    for layer in layers:
        # A layer that a graph uses more than once is listed where it comes first.
        reused = graph and len(layer._inbound_nodes) > 1
        yield layer, after or reused
        yield from _inner(layer, after or reused)
        after = after or bool(layer.trainable_variables)


_RESIZING = (keras.layers.Resizing, keras.layers.CenterCrop, keras.layers.RandomCrop)


def _wrong(layer: keras.layers.Layer, after: bool) -> bool:
    if isinstance(layer, keras.layers.BatchNormalization):
        # Its corrections depend on the weights, but count as constants in the gradient.
        return layer.trainable and getattr(layer, "renorm", False)
    if isinstance(layer, keras.layers.SpectralNormalization):
        return bool(layer.trainable_variables)  # its singular vectors count as constants
    if isinstance(layer, _RESIZING):  # the croppings resize images that are too small
        return after  # TensorFlow drops the derivative of a bilinear resize's gradient
    if isinstance(layer, keras.layers.UpSampling2D):
        return after and layer.interpolation != "nearest"
    activations = [getattr(layer, a, None) for a in ("activation", "recurrent_activation")]
    return keras.activations.softsign in activations  # its gradient has none of its own
