"""Max pooling in the reverse loop, against TensorFlow's own."""

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_drmad import pooling
from keras_drmad.normalization import exact_moments


def derivatives(pool, x, direction):
    """The values, a gradient through a smooth function of them, and its product with a vector."""
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = pool(x)
            loss = tf.reduce_sum(tf.sin(y) + y**3)
        gradient = inner.gradient(loss, x)
    return y, gradient, outer.gradient(gradient, x, direction)


def assert_same(x, direction, *args):
    expected = derivatives(lambda x: tf.nn.max_pool(x, *args), x, direction)
    found = derivatives(lambda x: pooling.max_pool(x, *args), x, direction)
    np.testing.assert_array_equal(found[0], expected[0])
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    rows=st.integers(3, 9),
    columns=st.integers(3, 9),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from(["VALID", "SAME"]),
    ties=st.booleans(),
    seed=st.integers(0, 999),
)
def test_values_and_derivatives_are_those_of_tensorflow(
    rows, columns, window, strides, padding, ties, seed
):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, rows, columns, 3))
    if ties:
        x = np.round(x)  # equal maxima: which of them has the gradient must be the same
    direction = tf.constant(rng.normal(size=x.shape))
    assert_same(tf.constant(x), direction, window, strides or window, padding)


@pytest.mark.parametrize(
    "shape, window",
    [((2, 6, 4), 2), ((2, 6, 6, 3), [1, 2, 2, 1]), ((2, 6, 6, 3), [2])],
    ids=["series", "four numbers", "one number"],
)
def test_other_forms(shape, window):
    rng = np.random.default_rng(0)
    x, direction = (tf.constant(rng.normal(size=shape)) for _ in range(2))
    assert_same(x, direction, window, window, "VALID")


def test_volumes_are_left_to_tensorflow():
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, 4, 4, 4, 3)), tf.float32)  # it has no float64 here
    assert_same(x, tf.ones_like(x), 2, 2, "VALID", "NDHWC")


def second_derivative_operations(layer):
    def product(x):
        with exact_moments():
            return derivatives(layer, x, tf.ones_like(x))[2]

    spec = tf.TensorSpec([2, 6, 6, 3], tf.float32)
    graph = tf.function(product, autograph=False).get_concrete_function(spec).graph
    return {op.type for op in graph.get_operations()}


def test_the_layer_takes_the_fast_way_in_the_reverse_loop():
    assert "MaxPoolGradGrad" not in second_derivative_operations(keras.layers.MaxPooling2D())
    overlapping = keras.layers.MaxPooling2D(3, strides=2)
    assert "MaxPoolGradGrad" in second_derivative_operations(overlapping)


def test_compiled():
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 6, 6, 3)))
    plain = derivatives(lambda x: pooling.max_pool(x, 2, 2, "VALID"), x, tf.ones_like(x))
    compiled = tf.function(
        lambda x: derivatives(lambda x: pooling.max_pool(x, 2, 2, "VALID"), x, tf.ones_like(x)),
        jit_compile=True,
    )(x)
    for a, b in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
