"""The three curvature products against matrices that are built entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_drmad import curvature
from keras_drmad.objectives import TrainingLoss

N, FEATURES, HIDDEN, UNITS = 6, 3, 4, 3
KINDS = ("hessian", "gauss_newton", "finite_difference")
SPARSE_NAME = "sparse_categorical_crossentropy"
REGULARIZER, EPSILON = 0.25, 0.01  # Keras keeps the first in float32


# Losses by hand, of outputs (N, UNITS) -------------------------------------------------------


def softmax_cross_entropy(z, y):
    right = tf.reduce_sum(z * tf.one_hot(y, UNITS, dtype=z.dtype), -1)
    return tf.reduce_mean(tf.reduce_logsumexp(z, -1) - right)


def binary_cross_entropy(z, y):
    y = tf.one_hot(y, UNITS, dtype=z.dtype)
    return tf.reduce_mean(tf.math.log(1 + tf.exp(z)) - y * z)


def squared_error(z, y):
    return tf.reduce_mean((z - tf.one_hot(y, UNITS, dtype=z.dtype)) ** 2)


def activity_penalty(z):
    """Newer Keras averages it over the batch, older Keras adds it up: of N ones it makes 1 or N."""
    layer = keras.layers.ActivityRegularization(l2=1.0)
    layer(np.ones((N, 1)))
    return REGULARIZER * float(layer.losses[0]) / N * tf.reduce_sum(z**2)


def dense_net(weights, x):
    w1, b1, w2, b2 = weights
    return tf.tanh(x @ w1 + b1) @ w2 + b2


# The table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A Keras model with its loss, and the same by hand, cut at the outputs."""

    model: Callable  # () -> compiled model, variables that are tuned
    targets: Callable  # labels -> what the model is trained on
    outputs: Callable  # (weights, tuned, x) -> the outputs at which Gauss-Newton cuts
    loss: Callable  # (outputs, tuned, labels) -> the loss
    penalty: Callable = lambda weights, tuned: 0.0  # what layers add to it


def net(loss, activation=None, last=None, **options):
    """A model of two dense layers."""

    def build():
        layers = [
            keras.Input((FEATURES,)),
            keras.layers.Dense(HIDDEN, "tanh", **options),
            keras.layers.Dense(UNITS, activation),
        ]
        if last is not None:
            layers.append(last())
        return compiled(keras.Sequential(layers), loss), []

    return build


def from_logits():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(model, loss, **options):
    model.compile("sgd", loss() if callable(loss) else loss, **options)
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(5).normal(0.0, 0.7, variable.shape))
    return model


def sparse(y):
    return y


def one_hot(y):
    return np.eye(UNITS)[y]


def plain(weights, tuned, x):
    return dense_net(weights, x)


def untuned(loss):
    return lambda z, tuned, y: loss(z, y)


def two_outputs():
    x = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(HIDDEN, "tanh")(x)
    classes = keras.layers.Dense(UNITS, "softmax", name="classes")(hidden)
    numbers = keras.layers.Dense(UNITS, name="numbers")(hidden)
    model = keras.Model(x, {"classes": classes, "numbers": numbers})
    losses = {"classes": SPARSE_NAME, "numbers": "mse"}
    return compiled(model, losses, loss_weights={"classes": 0.7, "numbers": 1.3}), []


def two_outputs_by_hand(weights, tuned, x):
    w1, b1, w2, b2, w3, b3 = weights
    hidden = tf.tanh(x @ w1 + b1)
    return tf.concat([hidden @ w2 + b2, hidden @ w3 + b3], 1)


def features_and_classes():
    """The first output has no loss of its own, but the second depends on it."""
    x = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(HIDDEN, "tanh", name="features")(x)
    classes = keras.layers.Dense(UNITS, "softmax", name="classes")(hidden)
    model = keras.Model(x, {"features": hidden, "classes": classes})
    losses = {"features": None, "classes": SPARSE_NAME}
    return compiled(model, losses), []


class Scaled(keras.layers.Layer):
    """A dense layer with two variables to tune: its slope, and the strength of its penalty."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], HIDDEN), name="kernel")
        self.slope = self.add_weight(initializer="ones", trainable=False, name="slope")
        self.strength = self.add_weight(initializer="ones", trainable=False, name="strength")

    def call(self, x):
        self.add_loss(self.strength * keras.ops.sum(self.kernel**4))
        return keras.ops.tanh(self.slope * (x @ self.kernel))


class Smoothed(keras.losses.Loss):
    """Softmax cross-entropy with a label smoothing to tune."""

    def __init__(self):
        super().__init__()
        self.smoothing = keras.Variable(0.2, dtype=keras.config.floatx(), name="smoothing")

    def call(self, y, z):
        smoothed = y * (1 - self.smoothing) + self.smoothing / UNITS
        return keras.ops.categorical_crossentropy(smoothed, z, from_logits=True)


def tuned_net():
    layer, loss = Scaled(), Smoothed()
    normalization = keras.layers.LayerNormalization(epsilon=EPSILON)
    layers = [keras.Input((FEATURES,)), layer, normalization, keras.layers.Dense(UNITS)]
    model = keras.Sequential(layers)
    model = compiled(model, lambda: loss)
    layer.slope.assign(1.4)
    layer.strength.assign(0.05)
    return model, [layer.slope, layer.strength, loss.smoothing]


def tuned_net_by_hand(weights, tuned, x):
    w1, gamma, beta, w2, b2 = weights
    hidden = tf.tanh(tuned[0] * (x @ w1))
    centred = hidden - tf.reduce_mean(hidden, -1, keepdims=True)
    spread = tf.sqrt(tf.reduce_mean(centred**2, -1, keepdims=True) + EPSILON)
    return (gamma * centred / spread + beta) @ w2 + b2


def smoothed_by_hand(z, tuned, y):
    wanted = tf.one_hot(y, UNITS, dtype=z.dtype) * (1 - tuned[2]) + tuned[2] / UNITS
    return tf.reduce_mean(tf.reduce_logsumexp(z, -1) - tf.reduce_sum(wanted * z, -1))


CROSS_ENTROPY = untuned(softmax_cross_entropy)
CASES = {
    "cross-entropy from logits": Case(net(from_logits), sparse, plain, CROSS_ENTROPY),
    # Where the loss goes back from probabilities to logits, logits are what counts.
    "softmax": Case(net(SPARSE_NAME, "softmax"), sparse, plain, CROSS_ENTROPY),
    "softmax layer": Case(
        net("categorical_crossentropy", last=keras.layers.Softmax), one_hot, plain, CROSS_ENTROPY
    ),
    "sigmoid": Case(
        net("binary_crossentropy", "sigmoid"), one_hot, plain, untuned(binary_cross_entropy)
    ),
    "squared error": Case(net("mse"), one_hot, plain, untuned(squared_error)),
    # Where it does not, outputs are: in logits this loss is not convex.
    "squared error of a sigmoid": Case(
        net("mse", "sigmoid"),
        one_hot,
        lambda weights, tuned, x: tf.sigmoid(dense_net(weights, x)),
        untuned(squared_error),
    ),
    "two outputs": Case(
        two_outputs,
        lambda y: {"classes": y, "numbers": one_hot(y)},
        two_outputs_by_hand,
        lambda z, tuned, y: (
            0.7 * softmax_cross_entropy(z[:, :UNITS], y) + 1.3 * squared_error(z[:, UNITS:], y)
        ),
    ),
    "an output without a loss": Case(
        features_and_classes, lambda y: {"features": y, "classes": y}, plain, CROSS_ENTROPY
    ),
    # Activity of the outputs belongs to the penalties, once.
    "activity_regularizer": Case(
        net("mse", last=lambda: keras.layers.ActivityRegularization(l2=REGULARIZER)),
        one_hot,
        plain,
        untuned(squared_error),
        lambda weights, tuned: activity_penalty(dense_net(weights, example()[0])),
    ),
    "kernel_regularizer": Case(
        net(from_logits, kernel_regularizer=keras.regularizers.L2(REGULARIZER)),
        sparse,
        plain,
        CROSS_ENTROPY,
        lambda weights, tuned: REGULARIZER * tf.reduce_sum(weights[0] ** 2),
    ),
    "tuned variables": Case(
        tuned_net,
        one_hot,
        tuned_net_by_hand,
        smoothed_by_hand,
        lambda weights, tuned: tuned[1] * tf.reduce_sum(weights[0] ** 4),
    ),
}


# The truth -----------------------------------------------------------------------------------


def pack(tensors):
    return tf.concat([tf.reshape(t, [-1]) for t in tensors], 0)


def unpack(vector, like):
    parts = tf.split(vector, [tf.size(t) for t in like])
    return [tf.reshape(p, t.shape) for p, t in zip(parts, like, strict=True)]


def jacobian(function, point):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(point)
        result = tf.reshape(function(point), [-1])
    return tape.jacobian(
        result,
        point,
        experimental_use_pfor=False,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    ).numpy()


def slope(function, point):
    with tf.GradientTape() as tape:
        tape.watch(point)
        value = function(point)
    return tape.gradient(value, point, unconnected_gradients="zero")


def truth(case, weights, tuned, x, y):
    """Gradient, Hessian, Gauss-Newton matrix, and the gradient's derivative by what is tuned."""
    w, h = pack(weights), tf.stack(tuned) if tuned else tf.zeros(1, tf.float64)

    def outputs(w):
        return case.outputs(unpack(w, weights), h, x)

    def gradient(w, h):
        def loss(w):
            split = unpack(w, weights)
            return case.loss(case.outputs(split, h, x), h, y) + case.penalty(split, h)

        return slope(loss, w)

    z = outputs(w)
    j = jacobian(outputs, w)
    of_loss = jacobian(lambda z: slope(lambda z: case.loss(z, h, y), z), z)
    of_loss = of_loss.reshape(tf.size(z), tf.size(z))
    own = jacobian(lambda w: slope(lambda w: case.penalty(unpack(w, weights), h) + 0 * w[0], w), w)
    hessian = jacobian(lambda w: gradient(w, h), w)
    mixed = jacobian(lambda h: gradient(w, h), h)
    return gradient(w, h).numpy(), hessian, j.T @ of_loss @ j + own, mixed


def assert_close(found, expected, tolerance):
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(
        found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


def example():
    rng = np.random.default_rng(6)
    return tf.constant(rng.normal(size=(N, FEATURES))), rng.integers(0, UNITS, N)


def random_like(weights):
    rng = np.random.default_rng(7)
    return [tf.constant(rng.normal(size=w.shape)) for w in weights]


def parts_of(model, tuned):
    weights = [tf.constant(v.numpy()) for v in model.trainable_variables]
    loss = TrainingLoss(model, tuned)
    averages, seeds = ([tf.constant(v.numpy()) for v in of] for of in (loss.averages, loss.seeds))
    tuned = [tf.constant(v.numpy()) for v in tuned]
    return weights, tuned, lambda data: lambda w, h: loss(w, h, averages, seeds, data)


# The tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_explicit_matrices(float64, name):
    check(CASES[name])


@pytest.mark.parametrize(
    "case",
    [
        CASES["softmax"],
        CASES["sigmoid"],
        # Past Keras's own activation, which remembers its logits.
        Case(net(SPARSE_NAME, tf.nn.softmax), sparse, plain, CROSS_ENTROPY),
    ],
    ids=["softmax", "sigmoid", "softmax of TensorFlow"],
)
def test_logits_are_found_in_a_graph_as_well(float64, case):
    check(case, tf.function)


def check(case, wrap=lambda function: function):
    model, variables = case.model()
    weights, tuned, loss_on = parts_of(model, variables)
    x, y = example()
    gradient, hessian, gauss_newton, mixed = truth(case, weights, tuned, x, y)
    loss = loss_on((x, case.targets(y)))
    v = random_like(weights)
    flat = pack(v).numpy()
    truths = (hessian, 1e-10), (gauss_newton, 1e-10), (hessian, 1e-6)
    for kind, (matrix, tolerance) in zip(KINDS, truths, strict=True):

        @wrap
        def both(weights, tuned, v, kind=kind):
            gradient, product = curvature.get(kind)(loss, weights, tuned)
            return gradient, *product(v)

        found, curved, by_tuned = both(weights, tuned, v)
        assert_close(pack(found), gradient, 1e-10)
        assert_close(pack(curved), matrix @ flat, tolerance)
        assert len(by_tuned) == len(tuned)
        if tuned:
            assert_close(tf.stack(by_tuned), flat @ mixed, tolerance)
    assert np.abs(hessian - gauss_newton).max() > 1e-3  # they are two different things


def embedding_model():
    x = keras.Input((4,), dtype="int32")
    y = keras.layers.Embedding(5, 3)(x)
    return keras.Model(x, keras.layers.Dense(UNITS)(keras.layers.Flatten()(y)))


def lstm_model():
    x = keras.Input((4, 2))
    return keras.Model(x, keras.layers.Dense(UNITS)(keras.layers.LSTM(3)(x)))


RECURRENT_X = np.random.default_rng(8).normal(size=(N, 4, 2))
# A token that repeats, so that slices of the embedding's gradient add up.
TOKENS = np.array([[0, 1, 1, 4], [2, 0, 1, 1], [4, 4, 4, 3], [0, 2, 3, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    "build, x",
    [(embedding_model, TOKENS), (lstm_model, RECURRENT_X)],
    ids=["embedding", "lstm"],
)
def test_products_by_independent_routes(float64, build, x):
    """The Hessian by finite differences; J' H J v with J v in forward mode, H v by hand."""
    model = compiled(build(), from_logits)
    weights, _, loss_on = parts_of(model, [])
    y = np.arange(len(x)) % UNITS
    v = random_like(weights)

    @tf.function  # the reverse loop is a graph, where an LSTM is a loop as well
    def products(weights, v):
        loss = loss_on((tf.constant(x), y))
        return [curvature.get(kind)(loss, weights, [])[1](v)[0] for kind in KINDS]

    hessian, gauss_newton, finite = products(weights, v)
    assert_close(pack(hessian), pack(finite), 1e-6)

    forward = tf.autodiff.ForwardAccumulator(weights, v)
    with tf.GradientTape() as tape, forward:
        tape.watch(weights)
        z, _ = model.stateless_call(weights, model.non_trainable_variables, x)
    pushed = forward.jvp(z)
    p = tf.nn.softmax(z)
    bent = p * (pushed - tf.reduce_sum(p * pushed, -1, keepdims=True)) / len(x)
    pulled = [tf.convert_to_tensor(g) for g in tape.gradient(z, weights, output_gradients=bent)]
    assert_close(pack(gauss_newton), pack(pulled), 1e-10)


class OwnLoss(keras.Model):
    """A loss that does not look at the model's outputs."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(UNITS)

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean((self.dense(x) - y) ** 2)


def test_gauss_newton_refuses_a_loss_that_passes_the_outputs_by(float64):
    model = OwnLoss()
    x, y = example()
    model(x)
    model.compile("sgd")
    weights, _, loss_on = parts_of(model, [])
    with pytest.raises(ValueError, match="curvature='hessian'"):
        curvature.gauss_newton(loss_on((x, one_hot(y))), weights, [])


def test_finite_difference_of_no_direction_is_zero(float64):
    model, _ = net("mse")()
    weights, _, loss_on = parts_of(model, [])
    x, y = example()
    _, product = curvature.finite_difference(loss_on((x, one_hot(y))), weights, [])
    curved, _ = product([tf.zeros_like(w) for w in weights])
    assert not np.any(pack(curved))


def test_unknown_curvature_is_refused():
    with pytest.raises(ValueError, match=r"gauss_newton.*'fisher'"):
        curvature.get("fisher")
