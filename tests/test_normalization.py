"""Second derivatives through normalization layers, against finite differences of the gradient."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf
from versions import cases

from keras_drmad.normalization import exact_moments, uncorrected_layers

layers = keras.layers
DTYPE = "float64"
BATCH = 5
IMAGE, SERIES, VECTOR = (4, 4, 4), (5, 4), (6,)

# name: the layer, the shape of one example
STOPPED = {  # wrong by default
    "batch_vector": (lambda: layers.BatchNormalization(dtype=DTYPE), VECTOR),
    "batch_image": (lambda: layers.BatchNormalization(dtype=DTYPE), IMAGE),
    "batch_no_scale": (lambda: layers.BatchNormalization(scale=False, dtype=DTYPE), VECTOR),
    "batch_no_center": (lambda: layers.BatchNormalization(center=False, dtype=DTYPE), VECTOR),
    "batch_plain": (
        lambda: layers.BatchNormalization(center=False, scale=False, dtype=DTYPE),
        IMAGE,
    ),
    "batch_axis_1": (lambda: layers.BatchNormalization(axis=1, dtype=DTYPE), IMAGE),
    "layer_last": (lambda: layers.LayerNormalization(dtype=DTYPE), IMAGE),
    "layer_plain": (
        lambda: layers.LayerNormalization(center=False, scale=False, dtype=DTYPE),
        SERIES,
    ),
    "layer_axes": (lambda: layers.LayerNormalization(axis=(1, 2, 3), dtype=DTYPE), IMAGE),
    "group_2": (lambda: layers.GroupNormalization(2, dtype=DTYPE), IMAGE),
    "group_each": (lambda: layers.GroupNormalization(-1, dtype=DTYPE), IMAGE),
    "group_plain": (
        lambda: layers.GroupNormalization(2, center=False, scale=False, dtype=DTYPE),
        VECTOR,
    ),
    "nested": (
        lambda: layers.TimeDistributed(layers.LayerNormalization(dtype=DTYPE), dtype=DTYPE),
        SERIES,
    ),
}
NOT_STOPPED = {  # right by default: computed without tf.nn.moments
    "batch_synchronized": (
        lambda: layers.BatchNormalization(synchronized=True, dtype=DTYPE),
        IMAGE,
    ),
    "batch_frozen": (lambda: layers.BatchNormalization(trainable=False, dtype=DTYPE), IMAGE),
    "rms": (lambda: layers.RMSNormalization(dtype=DTYPE), IMAGE),
    "unit": (lambda: layers.UnitNormalization(dtype=DTYPE), IMAGE),
}
UNCORRECTED = {
    "renorm": (lambda: layers.BatchNormalization(renorm=True, dtype=DTYPE), VECTOR),
    "spectral": (lambda: layers.SpectralNormalization(layers.Dense(4, dtype=DTYPE)), IMAGE),
    "upsampling": (lambda: layers.UpSampling2D(interpolation="bilinear", dtype=DTYPE), IMAGE),
    "resizing": (lambda: layers.Resizing(6, 6, dtype=DTYPE), IMAGE),
    "center_crop": (lambda: layers.CenterCrop(6, 6, dtype=DTYPE), IMAGE),
}


@pytest.fixture(autouse=True)
def moments_left_as_found():
    """No test leaves anything but the very function that it found."""
    before = tf.nn.moments
    yield
    assert tf.nn.moments is before


class Problem:
    """The gradient of a model's training loss, and Hessian-vector products with a fixed vector."""

    def __init__(self, model, inputs=None):
        rng = np.random.default_rng(3)
        self.model = model
        shape = (BATCH, *model.input_shape[1:])
        self.inputs = tf.constant(rng.normal(size=shape) if inputs is None else inputs)
        self.target = tf.constant(rng.normal(size=(BATCH, *model.output_shape[1:])))
        # Away from gamma = 1 and beta = 0, where terms vanish.
        self.weights = [
            tf.constant(v.numpy() + 0.2 * rng.normal(size=v.shape))
            for v in model.trainable_variables
        ]
        self.direction = [tf.constant(rng.normal(size=w.shape)) for w in self.weights]

    def forward(self, weights):
        state = [v.value for v in self.model.non_trainable_variables]
        return self.model.stateless_call(weights, state, self.inputs, training=True)[0]

    def gradient(self, weights):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            z = self.forward(weights)
            loss = tf.reduce_mean(tf.tanh(z) * self.target + tf.square(z))
        return tape.gradient(loss, weights, unconnected_gradients="zero")

    def product(self, exact=True):
        with exact_moments() if exact else contextlib.nullcontext(), tf.GradientTape() as tape:
            tape.watch(self.weights)
            gradient = self.gradient(self.weights)
        return tape.gradient(gradient, self.weights, self.direction, unconnected_gradients="zero")

    def difference(self, step=1e-5):
        ahead, behind = (
            flat(
                self.gradient(
                    [w + h * d for w, d in zip(self.weights, self.direction, strict=True)]
                )
            )
            for h in (step, -step)
        )
        return (ahead - behind) / (2 * step)

    def error(self, product):
        expected = self.difference()
        return np.linalg.norm(flat(product) - expected) / np.linalg.norm(expected)


def flat(tensors):
    return np.concatenate([np.ravel(t) for t in tensors])


def dense(units, activation=None):
    return layers.Dense(units, activation=activation, dtype=DTYPE)


def problem(make, shape):
    keras.utils.set_random_seed(0)
    before, after = dense(shape[-1], "tanh"), dense(3)
    return Problem(keras.Sequential([keras.Input(shape, dtype=DTYPE), before, make(), after]))


def transformer():
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input(SERIES, dtype=DTYPE)
    x = layers.Dense(6, dtype=DTYPE)(x)
    attended = layers.MultiHeadAttention(2, 3, dtype=DTYPE)(x, x, use_causal_mask=True)
    x = layers.LayerNormalization(dtype=DTYPE)(layers.Add(dtype=DTYPE)([x, attended]))
    y = dense(6)(dense(8, "gelu")(x))
    x = layers.LayerNormalization(dtype=DTYPE)(layers.Add(dtype=DTYPE)([x, y]))
    return Problem(keras.Model(inputs, dense(2)(x)))


@pytest.mark.parametrize("name", STOPPED)
def test_second_derivatives_are_right_only_inside_the_context(name):
    p = problem(*STOPPED[name])
    assert p.error(p.product(exact=False)) > 1e-3
    assert p.error(p.product()) < 1e-6
    assert p.error(tf.function(p.product)()) < 1e-6


@pytest.mark.parametrize("name", ["batch_image", "layer_last", "group_2"])
def test_second_derivatives_are_right_when_compiled(name):
    p = problem(*STOPPED[name])
    assert p.error(tf.function(p.product, jit_compile=True)()) < 1e-6
    wrong = tf.function(lambda: p.product(exact=False), jit_compile=True)
    assert p.error(wrong()) > 1e-3


def test_second_derivatives_of_a_transformer_block_are_right_only_inside_the_context():
    p = transformer()
    assert p.error(p.product(exact=False)) > 1e-3
    assert p.error(p.product()) < 1e-6
    assert p.error(tf.function(p.product)()) < 1e-6


@pytest.mark.parametrize("name", cases(NOT_STOPPED))
def test_other_normalizations_are_right_anyway(name):
    p = problem(*NOT_STOPPED[name])
    assert p.error(p.product(exact=False)) < 1e-6
    assert p.error(p.product()) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
def test_batch_normalization_with_a_mask_is_right_anyway(masked):
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(BATCH, *SERIES))
    x[0, 3:] = x[2, 1:] = 0.0
    model = keras.Sequential([keras.Input(SERIES, dtype=DTYPE)])
    if masked:
        model.add(layers.Masking(dtype=DTYPE))
    for layer in (dense(4, "tanh"), layers.BatchNormalization(dtype=DTYPE), dense(3)):
        model.add(layer)
    p = Problem(model, x)
    assert (p.error(p.product(exact=False)) < 1e-6) == masked
    assert (p.error(p.product(exact=False)) > 1e-3) == (not masked)
    assert p.error(p.product()) < 1e-6


@pytest.mark.parametrize("name", cases([*STOPPED, *NOT_STOPPED]))
def test_values_and_first_derivatives_stay_the_same(name):
    p = problem(*{**STOPPED, **NOT_STOPPED}[name])
    value, gradient = p.forward(p.weights), flat(p.gradient(p.weights))
    with exact_moments():
        np.testing.assert_allclose(p.forward(p.weights), value, rtol=1e-12, atol=1e-12)
        inside = flat(p.gradient(p.weights))
    np.testing.assert_allclose(inside, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axes", [[0], [0, -1], (1, 2)])
@pytest.mark.parametrize("module", [keras.ops, tf.nn])
def test_moments_keep_value_shape_and_dtype(module, axes, keepdims, dtype):
    # Large enough that the squares overflow in float16.
    x = tf.cast(np.random.default_rng(0).normal(size=(3, 4, 5)) * 30 + 400, dtype)
    ordinary = module.moments(x, axes=axes, keepdims=keepdims)
    with exact_moments():
        exact = module.moments(x, axes=axes, keepdims=keepdims)
    for a, b in zip(exact, ordinary, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)


# Where the derivative of the variance's gradient says whether the context is active: the Hessian
# of mean((x - mean(x))^2) is 2/n (I - 1/n); with the mean's gradient stopped it is 2/n I.
EXACT, ORDINARY = [0.375, -0.125, -0.125, -0.125], [0.5, 0.0, 0.0, 0.0]


def hessian_row():
    x = tf.constant([1.0, 2.0, 4.0, 8.0], DTYPE)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            variance = keras.ops.moments(x, axes=[0])[1]
        slope = inner.gradient(variance, x)[0]
    return outer.gradient(slope, x).numpy().tolist()


def test_nested_and_left_in_order():
    before = tf.nn.moments
    assert hessian_row() == ORDINARY
    with exact_moments():
        with exact_moments():
            assert hessian_row() == EXACT
        assert hessian_row() == EXACT
    assert hessian_row() == ORDINARY
    assert tf.nn.moments is before


def test_restored_after_an_exception():
    before = tf.nn.moments
    with pytest.raises(ZeroDivisionError), exact_moments(), exact_moments():
        assert tf.nn.moments is not before
        raise ZeroDivisionError
    assert tf.nn.moments is before
    assert hessian_row() == ORDINARY
    with exact_moments():
        assert hessian_row() == EXACT


def test_restored_after_a_trace_that_fails():
    before = tf.nn.moments

    @tf.function
    def fails():
        with exact_moments():
            return keras.ops.moments(tf.zeros([2, 3]), axes=[7])

    with pytest.raises(ValueError):
        fails()
    assert tf.nn.moments is before


def test_other_threads_keep_the_ordinary_moments():
    before = tf.nn.moments
    with ThreadPoolExecutor(1) as other, exact_moments():
        assert other.submit(hessian_row).result() == ORDINARY
        assert other.submit(tf.function(lambda: tf.nn.moments(tf.ones(3), [0])[0])).result() == 1.0
        assert hessian_row() == EXACT
    assert tf.nn.moments is before


def test_threads_whose_contexts_overlap():
    before = tf.nn.moments
    inside, leave = threading.Event(), threading.Event()

    def other():
        seen = [hessian_row()]
        with exact_moments():
            inside.set()
            assert leave.wait(60)
            seen.append(hessian_row())
        return [*seen, hessian_row()]

    with ThreadPoolExecutor(1) as pool:
        with exact_moments():
            answer = pool.submit(other)
            assert inside.wait(60)
            assert hessian_row() == EXACT
        try:
            assert hessian_row() == ORDINARY  # left here, while the other thread is still inside
            assert tf.nn.moments is not before
        finally:
            leave.set()
        assert answer.result() == [ORDINARY, EXACT, ORDINARY]
    assert tf.nn.moments is before


@pytest.mark.parametrize("name", cases(UNCORRECTED))
def test_uncorrected_layers_are_wrong_and_named(name):
    p = problem(*UNCORRECTED[name])
    assert p.error(p.product()) > 1e-2
    assert uncorrected_layers(p.model) == [p.model.layers[1].name]


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_resizing_without_a_second_derivative_is_named(interpolation):
    p = problem(lambda: layers.Resizing(6, 6, interpolation, dtype=DTYPE), IMAGE)
    with pytest.raises(LookupError):
        p.product()
    assert uncorrected_layers(p.model) == [p.model.layers[1].name]


def test_softsign_is_named():
    p = problem(lambda: layers.Activation("softsign", dtype=DTYPE), VECTOR)
    with pytest.raises(LookupError):
        p.product()
    assert uncorrected_layers(p.model) == [p.model.layers[1].name]
    assert uncorrected_layers(keras.Sequential([layers.LSTM(2, "softsign", name="r")]))[0] == "r"


@pytest.mark.parametrize("name", cases([*STOPPED, *NOT_STOPPED]))
def test_corrected_layers_are_not_named(name):
    assert uncorrected_layers(problem(*{**STOPPED, **NOT_STOPPED}[name]).model) == []


def test_nearest_upsampling_is_right_and_not_named():
    p = problem(lambda: layers.UpSampling2D(dtype=DTYPE), IMAGE)
    assert p.error(p.product()) < 1e-6
    assert uncorrected_layers(p.model) == []


def test_resizing_before_all_weights_is_right_and_not_named():
    keras.utils.set_random_seed(0)
    preprocessing = keras.Sequential([layers.Resizing(3, 3, dtype=DTYPE), layers.Rescaling(2.0)])
    batch = layers.BatchNormalization(dtype=DTYPE)
    inputs = keras.Input(IMAGE, dtype=DTYPE)
    x = batch(dense(3, "tanh")(preprocessing(inputs)))
    p = Problem(keras.Model(inputs, dense(2)(x)))
    assert p.error(p.product()) < 1e-6
    assert uncorrected_layers(p.model) == []


def test_resizing_that_may_come_after_weights_is_named():
    resize = layers.Resizing(4, 4, name="resize")
    inputs = keras.Input(IMAGE)
    twice = keras.Model(inputs, resize(layers.Dense(4)(resize(inputs))))
    assert uncorrected_layers(twice) == ["resize"]

    inner = keras.Sequential([keras.Input(IMAGE), layers.Resizing(5, 5, name="inside")])
    nested = keras.Model(inputs, layers.Dense(2)(inner(layers.Dense(4)(inputs))))
    assert uncorrected_layers(nested) == ["inside"]

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.resize = layers.Resizing(5, 5, name="first")
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.resize(self.dense(x))

    subclassed = Subclassed()
    subclassed(np.zeros((1, *IMAGE)))
    assert uncorrected_layers(subclassed) == ["first"]
