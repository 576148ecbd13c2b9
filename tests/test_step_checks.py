"""What a training step does by the side is refused, or warned of, before numbers are wrong."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from versions import cases

import keras_drmad as kd

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 5)).astype("float32")
Y = RNG.integers(0, 3, 24)
HYPER = RNG.normal(size=(12, 5)).astype("float32"), RNG.integers(0, 3, 12)


def fit(
    *inner, loss=None, model=keras.Sequential, variables=(), optimizer=None, callbacks=(), **to
):
    """A short `fit` with a callback, whose only record is returned."""
    keras.utils.set_random_seed(0)
    model = model(
        [
            keras.Input((5,)),
            layers.Dense(4, "tanh", name="first"),
            *inner,
            layers.Dense(3, name="last"),
        ]
    )
    model.compile(
        optimizer or kd.optimizers.SGD(0.1, momentum=0.5, l2=kd.Hyperparameter(1e-3)),
        loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    callback = kd.DrMADCallback(HYPER, variables=variables, **{"trajectory": "linear", **to})
    model.fit(
        X, Y, batch_size=6, epochs=1, shuffle=False, verbose=0, callbacks=[callback, *callbacks]
    )
    return callback.history[-1]


class Helper(layers.Layer):
    """Its own method is a function of TensorFlow."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    @tf.function
    def scaled(self, x):
        return x * self.scale

    def call(self, x):
        return self.scaled(x)


def test_a_weight_that_a_function_reads_is_refused():
    with pytest.raises(ValueError, match=r"helper/scale is read in a way .* tf.function"):
        fit(Helper())


class Counting(layers.Layer):
    """Counts its calls in a variable of TensorFlow."""

    def __init__(self):
        super().__init__()
        self.count = tf.Variable(0.0, trainable=False)

    def call(self, x):
        self.count.assign_add(1.0)
        return x


def test_an_assignment_is_refused_by_its_layer():
    layer = Counting()
    with pytest.raises(ValueError, match=r"assigns to a tf.Variable .*counting.*add_weight"):
        fit(layer)
    assert float(layer.count) == 0.0  # not even once


class CountingInKeras(layers.Layer):
    """Counts its calls, and does nothing with it."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, x):
        self.count.assign_add(1.0)
        return x


@pytest.mark.parametrize("trajectory", ["linear", "replay", "auto"])
def test_a_count_in_keras_goes_on_as_without_us(trajectory):
    layer = CountingInKeras()
    assert fit(layer, trajectory=trajectory).accepted
    assert float(layer.count) == 4.0  # steps; walks leave it alone


class Fading(CountingInKeras):
    """Uses its count."""

    def call(self, x):
        self.count.assign_add(1.0)
        return x / (1.0 + self.count)


def test_state_that_changes_while_it_is_read_is_warned_of():
    with pytest.warns(UserWarning, match=r"count.* changed while it was recorded"):
        fit(Fading())


class Frozen(layers.Layer):
    """Reads what stands still."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", trainable=False, name="scale")

    def call(self, x):
        return x * self.scale


def test_what_stands_still_may_be_read():
    assert fit(Frozen()).accepted  # warnings are errors


class Again(layers.Layer):
    """A part of it is computed again for its gradient."""

    def __init__(self, how):
        super().__init__()
        self.how, self.dense = how, layers.Dense(4, "tanh")

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x):
        return self.how(lambda z: self.dense(z))(x)


AGAIN = {"tensorflow": tf.recompute_grad, "remat": getattr(keras, "remat", None)}


@pytest.mark.parametrize("how", cases(AGAIN))
def test_a_part_that_is_computed_again_is_refused(how):
    with pytest.raises(ValueError, match=r"kernel is read in a way .* keras.remat"):
        fit(Again(AGAIN[how]))


@pytest.mark.parametrize("how", cases(AGAIN))
def test_it_ends_the_walk_where_nothing_is_trained_before_it(how):
    def without_first(parts):
        return keras.Sequential([parts[0], *parts[2:]])

    with pytest.warns(UserWarning, match=r"skipped: .*kernel.* has no gradient"):
        record = fit(Again(AGAIN[how]), model=without_first)
    assert not record.accepted


class Sets(keras.callbacks.Callback):
    """Sets a weight that no gradient reaches."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.get_layer("unused").weight.assign(float(batch))


NO_GRADIENT = pytest.mark.filterwarnings("ignore:Gradients do not exist")  # Keras's own


@NO_GRADIENT
@pytest.mark.parametrize("trajectory", ["linear", "stored"])
def test_a_weight_that_moves_without_a_gradient_ends_the_walk(trajectory):
    with pytest.warns(UserWarning, match=r"skipped: .*unused/weight.* has no gradient"):
        record = fit(Unused(name="unused"), trajectory=trajectory, callbacks=[Sets()])
    assert not record.accepted


class Unused(layers.Layer):
    """Has a weight without an effect."""

    def build(self, shape):
        self.weight = self.add_weight(shape=(), initializer="ones", name="weight")

    def call(self, x):
        return x


@NO_GRADIENT
def test_a_weight_without_a_gradient_that_stands_still_is_no_matter():
    assert fit(Unused()).accepted


class Gate(layers.Layer):
    """A gate without a gradient."""

    def call(self, x):
        return x * ops.stop_gradient(ops.sigmoid(x))


class InNumPy(layers.Layer):
    """A gate made by NumPy."""

    def call(self, x):
        return x * tf.ensure_shape(tf.numpy_function(np.tanh, [x], x.dtype), x.shape)


def focal(labels, logits):
    likely = ops.take_along_axis(ops.softmax(logits), ops.reshape(labels, (-1, 1)), -1)[:, 0]
    return -ops.stop_gradient((1 - likely) ** 2) * ops.log(likely)


@pytest.mark.parametrize(
    "inner, loss, name",
    [([Gate()], None, "gate"), ([InNumPy()], None, "PyFunc"), ([], focal, "focal")],
    ids=["layer", "numpy", "loss"],
)
def test_a_stopped_gradient_is_warned_of(inner, loss, name):
    with pytest.warns(UserWarning, match=f"stops the gradient .*{name}.*verify_hypergradients"):
        fit(
            *inner,
            loss=loss,
            trajectory="replay",
            outer_loss=loss and "sparse_categorical_crossentropy",
        )


class InAFunction(layers.Layer):
    """Stops a gradient in a function of TensorFlow without weights."""

    @tf.function
    def gated(self, x):
        return x * tf.stop_gradient(tf.sigmoid(x))

    def call(self, x):
        return self.gated(x)


def test_a_stopped_gradient_inside_a_function_is_found():
    with pytest.warns(UserWarning, match="stops the gradient"):
        fit(InAFunction())


def log_sum(labels, logits):
    chosen = ops.take_along_axis(logits, ops.reshape(labels, (-1, 1)), -1)[:, 0]
    return ops.logsumexp(logits, -1) - chosen


@pytest.mark.parametrize(
    "inner, loss",
    [
        ([], log_sum),
        ([layers.BatchNormalization()], None),
        ([layers.LayerNormalization()], None),
        ([layers.Dropout(0.2)], None),
        ([layers.Dense(4, "silu")], None),
        ([], "sparse_categorical_crossentropy"),
    ],
    ids=["logsumexp", "batch", "layer", "dropout", "silu", "probabilities"],
)
def test_what_only_seems_stopped_is_no_matter(inner, loss):
    tail = [layers.Dense(3, "softmax")] if loss == "sparse_categorical_crossentropy" else []
    assert fit(*inner, *tail, loss=loss).accepted  # warnings are errors


class Radius(keras.constraints.Constraint):
    """A constraint of a radius that could be tuned."""

    def __init__(self):
        self.radius = keras.Variable(0.5, trainable=False, name="radius")

    def __call__(self, w):
        return w * ops.minimum(1.0, self.radius / (1e-7 + ops.sqrt(ops.sum(w * w))))


def test_a_tuned_variable_of_a_constraint_is_refused():
    constraint = Radius()
    with pytest.raises(ValueError, match=r"radius is read .* in a constraint"):
        fit(
            layers.Dense(4, kernel_constraint=constraint), variables=[constraint.radius]
        )  # fmt: skip


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule of a rate that could be tuned."""

    def __init__(self):
        self.rate = keras.Variable(0.1, trainable=False, name="rate")

    def __call__(self, step):
        return ops.convert_to_tensor(self.rate) / (1 + ops.cast(step, "float32"))


def test_a_tuned_variable_of_a_schedule_is_refused():
    schedule = Schedule()
    with pytest.raises(ValueError, match=r"rate in `variables` is read .* schedule"):
        fit(optimizer=kd.optimizers.SGD(schedule), variables=[schedule.rate])


def test_a_refusal_leaves_the_model_as_it_was():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), Counting(), layers.Dense(3)])
    model.compile(kd.optimizers.SGD(kd.Hyperparameter(0.1)), "mse", jit_compile=False)
    before = model.get_weights()
    with pytest.raises(ValueError, match="assigns"):
        model.fit(
            X, RNG.normal(size=(24, 3)), verbose=0, callbacks=[kd.DrMADCallback((X, X[:, :3]))]
        )
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    model.fit(X, RNG.normal(size=(24, 3)), verbose=0)  # as if nothing had been
