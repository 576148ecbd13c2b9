"""`check_model` on layers of which it is known what TensorFlow makes of them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from versions import cases

import keras_drmad as kd
from keras_drmad.checks import check_curvature

layers = keras.layers
IMAGE = (4, 4, 4)
OK, WRONG, MISSING = "ok", "wrong", "missing"


class NoSecondDerivative(layers.Layer):
    """Its custom gradient raises when it is differentiated."""

    def call(self, x):
        @tf.custom_gradient
        def softsign(x):
            return tf.nn.softsign(x), lambda g: tf.raw_ops.SoftsignGrad(gradients=g, features=x)

        return softsign(x)


class SilentlyConstant(layers.Layer):
    """Its custom gradient counts as a constant."""

    def call(self, x):
        @tf.custom_gradient
        def tanh(x):
            y = tf.tanh(x)

            def gradient(g):
                outside = tf.numpy_function(lambda g, y: g * (1 - y * y), [g, y], y.dtype)
                return tf.ensure_shape(outside, y.shape)

            return y, gradient

        return tanh(x)


class StraightThrough(layers.Layer):
    """Rounds, with the gradient of the identity."""

    def call(self, x):
        return x + tf.stop_gradient(tf.round(x) - x)


class Recomputed(layers.Layer):
    """Its weight gets no gradient in a `keras.StatelessScope`."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        return keras.remat(lambda x: keras.ops.tanh(x @ self.kernel))(x)


class Block(layers.Layer):
    """Layers in a layer; it can't be made again from its configuration."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner = layers.Dense(4, "relu"), inner
        self.dropout = layers.Dropout(0.3)

    def call(self, x, training=None):
        return x + self.dropout(self.inner(self.first(x)), training=training)

    def get_config(self):
        raise NotImplementedError


def recurrent(make):
    return lambda: keras.Sequential([layers.Reshape((16, 4)), make()])


def gradient_of(x):
    return keras.ops.softmax(x, axis=1) * keras.ops.sin(x)


# name: a layer, and what is found of its Hessian, of that without the correction, of Gauss-Newton
KNOWN = {
    "conv_relu": (lambda: layers.Conv2D(3, 3, activation="relu"), OK, OK, OK),
    "separable": (lambda: layers.SeparableConv2D(3, 3), OK, OK, OK),
    "transposed": (lambda: layers.Conv2DTranspose(3, 3), OK, OK, OK),
    "regularized": (lambda: layers.Dense(3, "gelu", kernel_regularizer="l2"), OK, OK, OK),
    "max_pooling": (lambda: layers.MaxPooling2D(), OK, OK, OK),
    "dropout": (lambda: layers.Dropout(0.3), OK, OK, OK),
    "attention": (lambda: layers.Attention(), OK, OK, OK),
    "lstm": (recurrent(lambda: layers.LSTM(3)), OK, OK, OK),
    "lambda": (lambda: layers.Lambda(gradient_of), OK, OK, OK),
    "nearest": (lambda: layers.UpSampling2D(), OK, OK, OK),
    "frozen": (lambda: layers.BatchNormalization(trainable=False), OK, OK, OK),
    "batch": (lambda: layers.BatchNormalization(), OK, WRONG, OK),
    "layer": (lambda: layers.LayerNormalization(), OK, WRONG, OK),
    "group": (lambda: layers.GroupNormalization(2), OK, WRONG, OK),
    "block": (lambda: Block(layers.LayerNormalization()), OK, WRONG, OK),
    "resizing": (lambda: layers.Resizing(6, 6), WRONG, WRONG, WRONG),
    "upsampling": (lambda: layers.UpSampling2D(interpolation="bilinear"), WRONG, WRONG, WRONG),
    "cropping": (lambda: layers.CenterCrop(6, 6), WRONG, WRONG, WRONG),
    "constant": (lambda: SilentlyConstant(), WRONG, WRONG, WRONG),
    "softsign": (lambda: layers.Activation("softsign"), MISSING, MISSING, MISSING),
    "dense_softsign": (lambda: layers.Dense(3, "softsign"), MISSING, MISSING, MISSING),
    "bicubic": (lambda: layers.Resizing(6, 6, "bicubic"), MISSING, MISSING, MISSING),
    "lanczos": (lambda: layers.Resizing(6, 6, "lanczos3"), MISSING, MISSING, MISSING),
    "custom": (lambda: NoSecondDerivative(), MISSING, MISSING, MISSING),
}
# Of which the gradient itself is not that of the value, or is missing.
NO_GRADIENT = {
    "straight_through": StraightThrough,
    "recomputed": Recomputed,
    "renorm": lambda: layers.BatchNormalization(renorm=True),
    "spectral": lambda: layers.SpectralNormalization(layers.Dense(3)),
    "area": lambda: layers.Resizing(2, 2, "area"),
}


def model_with(make, shape=IMAGE):
    x = inputs = keras.Input(shape)
    x = layers.Dense(4, "tanh", name="before")(x)
    layer = make()
    if isinstance(layer, layers.Attention):
        x = [layers.Reshape((16, 4))(x)] * 2
    return keras.Model(inputs, layer(x))


def checked(*args, **kwargs):
    """The report of what comes after the first layer, whose report must be right."""
    report = kd.check_model(*args, **kwargs)
    assert report.layers[0].layers == ("before",) and report.layers[0].ok
    return report, report.layers[1:]


def accepted(model, curvature):
    try:
        check_curvature(model, curvature)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_found_is_what_is_known(name):
    make, *known = KNOWN[name]
    model = model_with(make)
    report, after = checked(model)
    found = after[-1] if known[0] == OK else after[0]
    assert found.findings.gradient.ok
    tested = (found.findings.hessian, found.findings.ordinary, found.findings.gauss_newton)
    assert [finding.status for finding in tested] == known
    for finding in tested:
        assert (finding.error is None) == (finding.status == MISSING)
        if finding.status == OK:
            assert finding.error < 1e-6
        if finding.status == WRONG:
            assert finding.error > 1e-3
        if finding.status == MISSING:
            assert "gradient registry has no entry" in finding.message
    assert found.corrected == (known[:2] == [OK, WRONG])
    right = known[0] == OK
    assert bool(report.problems) == (not right)
    assert report.exact_curvature == ("hessian" if right else "finite_difference")
    assert report.reconstructed_curvature == ("gauss_newton" if right else "finite_difference")
    # What is known by type agrees. It can't know of custom layers.
    if name not in ("constant", "custom"):
        for curvature, finding in (("hessian", tested[0]), ("gauss_newton", tested[2])):
            assert accepted(model, curvature) == finding.ok
    assert accepted(model, "finite_difference")


@pytest.mark.parametrize("name", cases(NO_GRADIENT))
def test_without_a_right_gradient_no_curvature_suits(name):
    report, after = checked(model_with(NO_GRADIENT[name]))
    assert not after[0].findings.gradient.ok
    assert report.exact_curvature is report.reconstructed_curvature is None
    for against in report.objections.values():
        assert after[0].layers[0] in against
    assert "no curvature suits" in str(report)


def test_the_culprit_inside_a_layer_is_named():
    _, (block, dense, softsign, dropout) = checked(
        model_with(lambda: Block(layers.Activation("softsign", name="culprit")))
    )
    assert block.kind == "Block" and not block.ok
    assert softsign.layers == ("culprit",) and not softsign.ok
    assert dense.ok and dropout.ok


def test_a_layer_before_all_weights_need_not_be_right():
    x = inputs = keras.Input(IMAGE)
    for layer in (layers.Resizing(6, 6), layers.Dense(3, "tanh"), layers.Resizing(5, 5)):
        x = layer(x)
    report = kd.check_model(keras.Model(inputs, x))
    assert [kind.kind for kind in report.layers] == ["Dense tanh", "Resizing"]
    assert report.problems == [report.layers[1]]
    assert report.problems[0].layers == (layer.name,)


@pytest.mark.parametrize(
    "make, right",
    [
        (lambda: layers.CenterCrop(20, 20), True),  # which resizes what is smaller
        (lambda: layers.Resizing(20, 20), False),
        (lambda: layers.AveragePooling2D(16), True),  # of nothing, were it smaller
    ],
)
def test_large_images_are_made_smaller_only_where_that_changes_nothing(make, right):
    _, (found,) = checked(model_with(make, (40, 40, 2)))
    assert found.ok == right


def test_layers_of_one_kind_are_tested_once():
    model = keras.Sequential([keras.Input((6,))])
    for units in (5, 5, 7):
        model.add(layers.Dense(units, "tanh"))
        model.add(layers.BatchNormalization())
    report = kd.check_model(model)
    # The inputs of the first are constants: it is tested apart.
    assert [len(kind.layers) for kind in report.layers] == [1, 3, 2]
    lines = [line.split() for line in str(report).split("\n")]
    assert ["Dense", "tanh", "3", "ok", "ok", "ok", "ok"] in lines
    assert ["BatchNormalization", "3", "ok", "ok", "wrong,"] in [line[:5] for line in lines]


def test_operations_of_a_functional_model_are_tested():
    inputs = keras.Input((5,))
    x = layers.Dense(4)(inputs)
    y = keras.ops.softsign(x) * x
    report = kd.check_model(keras.Model(inputs, y))
    assert [(kind.kind, kind.ok) for kind in report.layers] == [
        ("Dense", True),
        ("Softsign", False),
        ("Multiply", True),
    ]


def test_integers_masks_and_several_inputs():
    words, numbers = (
        keras.Input((6,), dtype="int32", name="words"),
        keras.Input((3,), name="numbers"),
    )
    x = layers.GRU(4)(layers.Embedding(9, 3, mask_zero=True)(words))
    x = layers.Concatenate()([x, layers.Dense(2)(numbers)])
    model = keras.Model({"words": words, "numbers": numbers}, x)
    batch = {"words": np.ones((8, 6), "int32"), "numbers": np.ones((8, 3))}
    for report in (kd.check_model(model), kd.check_model(model, batch=(batch, np.ones(8)))):
        kinds = {kind.kind: kind.ok for kind in report.layers}
        assert kinds.pop("GRU tanh")
        assert kinds == {"Embedding": True, "Dense": True, "Concatenate": True}


class Subclassed(keras.Model):
    def __init__(self, between):
        super().__init__()
        self.between = between
        self.a, self.b = layers.Dense(4, "tanh", name="a"), layers.Dense(3, name="b")

    def call(self, x, training=None):
        return self.b(self.between(self.a(x)))


@pytest.mark.parametrize("between, right", [(keras.ops.square, True), (tf.nn.softsign, False)])
def test_a_subclassed_model_is_tested_with_what_it_does_between_its_layers(between, right):
    model = Subclassed(between)
    with pytest.raises(ValueError, match="`batch`"):
        kd.check_model(model)
    batch = (np.ones((9, 5), "float32"), np.ones((9, 3), "float32"))
    report = kd.check_model(model, batch=batch)
    assert [(kind.layers, kind.ok) for kind in report.layers] == [
        ((model.name,), right),
        (("a",), True),
        (("b",), True),
    ]
    assert kd.check_model(model).objections == report.objections  # now that it is built


def test_the_model_is_left_as_it_was():
    class Raises(layers.Layer):
        def call(self, x):
            if x.dtype == tf.float64:
                raise ZeroDivisionError
            return x

    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = model_with(lambda: keras.Sequential([layers.BatchNormalization(), Raises()]))
    finally:
        keras.config.set_dtype_policy("float32")
    inside = model._flatten_layers()

    def state():
        return [
            *([x.dtype_policy.name, sorted(vars(x)), x.call] for x in inside),
            *([v.dtype, v.numpy().tolist()] for v in model.variables),
            keras.config.floatx(),
            keras.config.dtype_policy().name,
            model.losses,
        ]

    before = state()
    moments = tf.nn.moments
    assert kd.check_model(model).layers[1].corrected
    assert state() == before
    assert tf.nn.moments is moments


def test_the_model_is_left_as_it_was_if_it_raises():
    class Raises(layers.Layer):
        def call(self, x):
            if broken:
                raise ZeroDivisionError
            return x

    broken = False
    model = model_with(Raises)
    before = [layer.call for layer in model.layers]
    broken = True
    with pytest.raises(ZeroDivisionError):
        kd.check_model(model)
    assert [layer.call for layer in model.layers] == before


# Memory ----------------------------------------------------------------------------------------

WEIGHTS = 4 * (6 * 5 + 5)
COPIES = {"linear": 2, "piecewise": 9, "replay": 11 + 10, "stored": 101}


@pytest.mark.parametrize(
    "optimizer, slots",
    [
        (None, 0),
        (lambda: kd.optimizers.SGD(momentum=0.9), 1),
        (lambda: kd.optimizers.Adam(), 2),
        (lambda: keras.optimizers.Adam(), 2),
    ],
)
@pytest.mark.parametrize("built", [False, True])
def test_memory_is_that_of_the_state_and_the_batches(optimizer, slots, built):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5)])
    if optimizer is not None:
        model.compile(optimizer(), "mse")
        if built:
            model.optimizer.build(model.trainable_variables)
        elif not isinstance(model.optimizer, kd.optimizers.SGD | kd.optimizers.Adam):
            slots = 0  # those of Keras's optimizers are known when they are built
    state = WEIGHTS * (1 + slots)
    report = kd.check_model(model, steps=100)
    assert (report.state_bytes, report.batch_bytes) == (state, 0)
    assert report.memory == {name: n * state for name, n in COPIES.items()}
    # float64 from numpy is trained on as float32.
    batch = (np.ones((8, 6)), np.ones((8, 5), "float32"), np.ones(8, "uint8"))
    report = kd.check_model(model, steps=100, batch=batch)
    size = 8 * (6 * 4 + 5 * 4 + 1)
    assert report.batch_bytes == size
    assert report.memory == {name: n * state + 100 * size for name, n in COPIES.items()}
    assert f"{report.memory['stored'] / 1e3:.3g} kB" in str(report)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": layers.Dense(3)}, TypeError, "`model` is a keras.Model"),
        ({"steps": 0}, ValueError, "`steps`"),
        ({"batch": 3.0}, ValueError, "`batch`"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5)])
    with pytest.raises(error, match=message):
        kd.check_model(**{"model": model, **arguments})


# By type -----------------------------------------------------------------------------------------


def remat(mode, **options):
    def make():
        with keras.RematScope(mode=mode, **options):
            return layers.Dense(3, "tanh", name="named")

    return make


EVERY = ("hessian", "gauss_newton", "finite_difference")
SECOND = EVERY[:2]
REFUSED = {  # name: a layer, the curvatures that are refused
    "dense": (lambda: layers.Dense(3, name="named"), ()),
    "batch": (lambda: layers.BatchNormalization(name="named"), ()),
    "softsign": (lambda: layers.Dense(3, "softsign", name="named"), SECOND),
    "resizing": (lambda: layers.Resizing(6, 6, name="named"), SECOND),
    "renorm": (lambda: layers.BatchNormalization(renorm=True, name="named"), EVERY),
    "spectral": (lambda: layers.SpectralNormalization(layers.Dense(3), name="named"), EVERY),
    "remat": (remat("full"), EVERY),
    "remat_named": (remat("list_of_layers", layer_names=["named"]), EVERY),
    "remat_others": (remat("list_of_layers", layer_names=["other"]), ()),
    "remat_activations": (remat("activations"), SECOND),
    "remat_off": (remat(None), ()),
    "nested": (lambda: Block(layers.Resizing(4, 4, name="named")), SECOND),
}


@pytest.mark.parametrize("name", cases(REFUSED))
def test_what_is_known_to_be_wrong_is_refused_by_name(name):
    make, refused = REFUSED[name]
    model = model_with(make)
    for curvature in EVERY:
        if curvature in refused:
            with pytest.raises(ValueError, match="named"):
                check_curvature(model, curvature)
        else:
            check_curvature(model, curvature)


@pytest.mark.parametrize(
    "loss, right",
    [
        (keras.losses.CTC(), False),
        ("ctc", False),
        ({"a": "mse", "b": keras.losses.CTC()}, False),
        ({"a": "mse", "b": None}, True),
        (["mse", "mse"], True),
        (None, True),
    ],
)
def test_a_loss_with_no_second_derivative_is_refused(loss, right):
    x = keras.Input((6, 3))
    model = keras.Model(x, {"a": layers.Dense(2)(x), "b": layers.Dense(2)(x)})
    model.compile("sgd", loss)
    assert [accepted(model, curvature) for curvature in EVERY] == [right, right, True]


def test_the_second_derivative_of_ctc_is_not_a_number():
    z = tf.constant(np.random.default_rng(0).normal(size=(2, 10, 5)), "float32")
    with tf.GradientTape() as outer:
        outer.watch(z)
        with tf.GradientTape() as inner:
            inner.watch(z)
            loss = keras.losses.CTC()(np.array([[1, 2, 3], [3, 1, 2]]), z)
        gradient = inner.gradient(loss, z)
    assert np.all(np.isfinite(gradient))
    assert not np.all(np.isfinite(outer.gradient(gradient, z, tf.ones_like(z))))
