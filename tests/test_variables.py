"""`variables=`: variables of custom layers, losses and `add_loss`, and the ready-made ones.

Every hypergradient is compared with finite differences of the whole float64 training.
"""

import pathlib
import re

import fits
import keras
import numpy as np
import pytest
from keras import ops

import keras_drmad as kd

BATCH, EPOCHS = 6, 2


def ce():
    """Keras's loss, in the precision of now."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def net(*layers, head=None):
    """The layers, then a tanh layer and a linear one."""
    return keras.Sequential(
        [
            keras.Input((5,)),
            *layers,
            keras.layers.Dense(4, "tanh", name="first"),
            *([] if head is None else [head]),
            keras.layers.Dense(fits.CLASSES, name="second"),
        ]
    )


# What is tuned -------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Bend(keras.layers.Layer):
    """A custom layer with a tuned vector that the model's output depends on."""

    def build(self, input_shape):
        self.bend = self.add_weight(
            shape=input_shape[1:], initializer="ones", trainable=False, name="bend"
        )

    def call(self, inputs):
        return ops.tanh(inputs * self.bend)


class Penalty(keras.layers.Layer):
    """A custom layer that adds a penalty on its input, at a tuned strength."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        strength = self.add_weight(
            shape=(), initializer=keras.initializers.Constant(0.3), trainable=False, name="strength"
        )
        self.strength = kd.tunable(strength, "positive")

    def call(self, inputs):
        self.add_loss(self.strength * ops.mean(inputs**4))
        return inputs


class Focal(keras.losses.Loss):
    """A custom loss with a tuned exponent, which the outer loss depends on as well."""

    def __init__(self):
        super().__init__(name="focal")
        self.gamma = keras.Variable(1.5, dtype=self.dtype, trainable=False, name="gamma")

    def call(self, y_true, y_pred):
        p = ops.softmax(y_pred)
        right = ops.sum(p * ops.one_hot(ops.cast(y_true, "int32"), p.shape[-1], dtype=p.dtype), -1)
        return -((1.0 - right) ** self.gamma) * ops.log(right)


def custom_layer():
    layer = Bend()
    model = fits.compiled(net(layer))
    return model, [layer.bend], None


def added_loss():
    layer = Penalty()
    return fits.compiled(net(head=layer)), [layer], None


def custom_loss():
    loss = Focal()

    def outer(logits, y):
        right = softmax(logits)[np.arange(len(y)), y]
        return np.mean(-((1.0 - right) ** float(loss.gamma)) * np.log(right))

    return fits.compiled(net(), loss), [(loss.gamma, "positive")], outer


def gaussian_noise():
    layer = kd.layers.GaussianNoise(0.3)
    return fits.compiled(net(layer)), [layer], None


def gaussian_dropout():
    layer = kd.layers.GaussianDropout(0.3)
    return fits.compiled(net(head=layer)), [layer], None


def relaxed_dropout():
    layer = kd.layers.RelaxedDropout(0.3, temperature=0.5)
    return fits.compiled(net(head=layer)), [layer], None


def feature_weights():
    layer = kd.layers.FeatureWeights()
    return fits.compiled(net(layer)), [layer], None


def label_smoothing():
    loss = kd.losses.LabelSmoothing(0.2, from_logits=True)
    return fits.compiled(net(), loss), [loss], None


def class_weights():
    loss = kd.losses.ClassWeights(fits.CLASSES, ce(), [0.5, 1.0, 2.0])
    return fits.compiled(net(), loss), [loss], None


def two_outputs():
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(4, "tanh", name="first")(inputs)
    outputs = {
        "kind": keras.layers.Dense(fits.CLASSES, name="kind")(hidden),
        "size": keras.layers.Dense(1, name="size")(hidden),
    }
    losses = {"kind": kd.losses.LossWeight(ce(), 0.5), "size": kd.losses.LossWeight("mse", 2.0)}

    def outer(predicted, y):
        error = np.mean((predicted["size"][:, 0] - y["size"]) ** 2)
        return 0.5 * cross_entropy(predicted["kind"], y["kind"]) + 2.0 * error

    model = fits.compiled(keras.Model(inputs, outputs), losses)
    return model, list(losses.values()), outer


CASES = [
    custom_layer,
    added_loss,
    custom_loss,
    gaussian_noise,
    gaussian_dropout,
    relaxed_dropout,
    feature_weights,
    label_smoothing,
    class_weights,
    two_outputs,
]


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(logits, y):
    return np.mean(-np.log(softmax(logits)[np.arange(len(y)), y]))


def data(model, count, seed):
    x, y = fits.examples(count, seed=seed)
    return x, {"kind": y, "size": x[:, 0]} if model.layers[-1].name == "size" else y


def fit(model, callbacks=()):
    model.fit(
        *data(model, 24, 0), BATCH, EPOCHS, shuffle=False, verbose=0, callbacks=list(callbacks)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_it_agrees_with_finite_differences(float64, case):
    fits.start()
    model, variables, outer = case()
    model.optimizer.build(model.trainable_variables)
    saved = fits.Saved(model)
    callback = fits.callback(
        data(model, 9, 1),
        horizon=EPOCHS,
        variables=variables,
        outer_optimizer=keras.optimizers.SGD(0.0),
    )
    fit(model, [callback])
    record = callback.history[0]
    targets = [tuned.target for tuned in callback.variables]
    before = [v.numpy() for v in targets]
    rng = np.random.default_rng(3)
    directions = [rng.normal(size=v.shape) for v in targets]
    found, expected, step = 0.0, 0.0, 1e-5
    for v, direction in zip(targets, directions, strict=True):
        slope = record.hypergradients[v.path]["model"]
        assert slope.shape == tuple(v.shape)
        assert np.all(slope != 0.0)
        found += np.sum(slope * direction)
    x, y = data(model, 9, 1)
    for sign in (1, -1):
        saved.restore()
        for v, value, direction in zip(targets, before, directions, strict=True):
            v.assign(value + sign * step * direction)
        fit(model)
        loss = (outer or cross_entropy)(model.predict(x, verbose=0), y)
        expected += sign * loss / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for v, value in zip(targets, before, strict=True):
        v.assign(value)
    np.testing.assert_allclose(record.outer_loss, loss, rtol=1e-3)


# The ready-made ones: what they compute, and that they are saved --------------------------------


def test_noise_has_the_standard_deviation_of_the_variable():
    layer = kd.layers.GaussianNoise(0.5, seed=1)
    layer.stddev.assign(2.0)
    found = layer(np.zeros((20000,), "float32"), training=True).numpy()
    np.testing.assert_allclose([found.mean(), found.std()], [0.0, 2.0], atol=0.05)  # 3 sigma: 0.04
    assert not np.any(layer(np.zeros((5,), "float32"), training=False))


@pytest.mark.parametrize("kind", [kd.layers.GaussianDropout, kd.layers.RelaxedDropout])
def test_dropout_keeps_the_mean_and_has_the_variance_of_dropout(kind):
    options = {"temperature": 0.02} if kind is kd.layers.RelaxedDropout else {}
    layer = kind(0.5, seed=1, **options)
    layer.rate.assign(0.2)
    found = layer(np.ones((40000,), "float32"), training=True).numpy()
    # The standard errors of mean and variance are 0.0025 and 0.002; the relaxation costs 0.01.
    np.testing.assert_allclose([found.mean(), found.var()], [1.0, 0.25], atol=0.015)
    assert np.all(layer(np.ones((5,), "float32"), training=False) == 1.0)


@pytest.mark.parametrize("sparse", ["numbers", "column", "one-hot"])
def test_label_smoothing_is_that_of_keras(sparse):
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(8, 3)).astype("float32"), rng.integers(0, 3, 8)
    one_hot = np.eye(3, dtype="float32")[y]
    targets = {"numbers": y, "column": y[:, None], "one-hot": one_hot}[sparse]
    expected = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3)
    loss = kd.losses.LabelSmoothing(0.3, from_logits=True)
    np.testing.assert_allclose(loss(targets, logits), expected(one_hot, logits), rtol=1e-6)


@pytest.mark.parametrize("sparse", ["numbers", "column", "one-hot"])
def test_class_weights_are_sample_weights_by_class(sparse):
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(8, 3)).astype("float32"), rng.integers(0, 3, 8)
    given = rng.uniform(size=8).astype("float32")
    weights = np.array([0.5, 1.0, 3.0], "float32")
    if sparse == "one-hot":
        targets, inner = np.eye(3, dtype="float32")[y], "CategoricalCrossentropy"
    else:
        targets, inner = (y if sparse == "numbers" else y[:, None]), "SparseCategoricalCrossentropy"
    inner = getattr(keras.losses, inner)(from_logits=True)
    loss = kd.losses.ClassWeights(3, inner, weights)
    np.testing.assert_allclose(loss(targets, logits), inner(targets, logits, weights[y]), 1e-6)
    expected = inner(targets, logits, weights[y] * given)
    np.testing.assert_allclose(loss(targets, logits, given), expected, rtol=1e-6)


def test_class_weights_of_tokens_and_of_two_classes():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(4, 6, 3)).astype("float32"), rng.integers(0, 3, (4, 6))
    weights, given = np.array([0.5, 1.0, 3.0], "float32"), np.arange(4, dtype="float32")
    loss = kd.losses.ClassWeights(3, ce(), weights)
    expected = ce()(y, logits, weights[y] * given[:, None])
    np.testing.assert_allclose(loss(y, logits, given), expected, rtol=1e-6)
    binary = keras.losses.BinaryCrossentropy(from_logits=True)
    loss = kd.losses.ClassWeights(2, "BinaryCrossentropy", [1.0, 2.0])
    p, y = ops.sigmoid(logits[0, :, :1]), rng.integers(0, 2, 6)
    expected = binary(y[:, None], logits[0, :, :1], np.array([1.0, 2.0])[y])
    np.testing.assert_allclose(loss(y, p), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="3 classes, the model's output has 4"):
        kd.losses.ClassWeights(3, ce())(y[:4], np.zeros((4, 4), "float32"))


def test_a_loss_by_name_does_not_broadcast_a_column():
    y, p = np.arange(4.0, dtype="float32"), np.arange(4.0, dtype="float32")[:, None]
    for name in ("mse", "mae", "binary_crossentropy", "huber"):
        loss, plain = kd.losses.LossWeight(name, 2.0), keras.losses.get(name)
        np.testing.assert_allclose(loss(y, p), 2.0 * np.mean(plain(y[:, None], p)), rtol=1e-6)


def test_all_are_saved_and_loaded(tmp_path):
    inputs = keras.Input((5,))
    x = kd.layers.FeatureWeights(1.0, (0.0, 2.0), name="mask")(inputs)
    x = kd.layers.GaussianNoise(0.1, name="noise")(x)
    x = kd.layers.GaussianDropout(0.1, name="dropout")(x)
    x = kd.layers.RelaxedDropout(0.2, 0.3, name="relaxed")(x)
    outputs = [keras.layers.Dense(fits.CLASSES, name=name)(x) for name in ("a", "b")]
    losses = [
        kd.losses.LabelSmoothing(0.1, from_logits=True),
        kd.losses.LossWeight(kd.losses.ClassWeights(fits.CLASSES, ce()), 3.0),
    ]
    model = fits.compiled(keras.Model(inputs, outputs), losses)
    tuned = kd.DrMADCallback(fits.examples(4), variables=[model]).variables
    assert [t.target.path for t in tuned] == [
        "mask/feature_weights",
        "noise/stddev",
        "dropout/rate",
        "relaxed/rate",
        "label_smoothing/smoothing",
        "loss_weight/loss_weight",
        "class_weights/class_weights",
    ]
    for k, t in enumerate(tuned):
        t.target.assign(np.full(t.target.shape, 0.3 + 0.05 * k))
    x, y = fits.examples(4, dtype="float32")
    expected = model.evaluate(x, [y, y], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = kd.DrMADCallback(fits.examples(4), variables=[loaded]).variables
    for a, b in zip(tuned, again, strict=True):
        assert (a.target.path, a.domain.name) == (b.target.path, b.domain.name)
        np.testing.assert_array_equal(a.target.numpy(), b.target.numpy())
    np.testing.assert_allclose(loaded.evaluate(x, [y, y], verbose=0), expected, rtol=1e-6)
    assert loaded.loss[1].in_outer_loss == 3.0
    assert loaded.get_layer("relaxed").temperature == 0.3


def test_what_is_tuned_survives_a_restart():
    layer, loss = kd.layers.GaussianNoise(0.3), kd.losses.LabelSmoothing(0.2, from_logits=True)
    model = fits.compiled(net(layer), loss)
    callback = fits.callback(
        fits.examples(9, seed=1), restart=True, trajectory="stored", variables=[layer, loss]
    )
    model.fit(*fits.examples(24), BATCH, 4, verbose=0, callbacks=[callback])
    for path, first in (("gaussian_noise/stddev", 0.3), ("label_smoothing/smoothing", 0.2)):
        values = [float(r.hyperparameters[path]["model"]) for r in callback.history]
        np.testing.assert_allclose(values[0], first, rtol=1e-6)
        assert len(set(values)) == 4
    last = float(layer.stddev)
    callback.restore_first_weights()
    assert float(layer.stddev) == last


# What `variables` takes -----------------------------------------------------------------------


def test_a_marked_variable_brings_its_domain_and_a_pair_has_its_own():
    layer = kd.layers.GaussianNoise(0.3)
    names = [
        kd.DrMADCallback(fits.examples(4), variables=[entry]).variables[0].domain.name
        for entry in (layer, layer.stddev, (layer.stddev, "real"), [layer.stddev, "unit"])
    ]
    assert names == ["positive", "positive", "real", "unit"]


@pytest.mark.parametrize(
    "variables, says",
    [
        (lambda: [keras.layers.Dense(3)], "none is marked"),
        (lambda: [kd.layers.FeatureWeights()], "not built yet"),
        (lambda: [keras.losses.MeanSquaredError()], "no variable to tune"),
        (lambda: [np.zeros(3)], "holds keras.Variables"),
        (lambda: kd.layers.GaussianNoise(0.1), "is a list"),
        (lambda: [layer := kd.layers.GaussianNoise(0.1), layer.stddev], "twice"),
        (lambda: [keras.Variable(1.0, name="a"), keras.Variable(1.0, name="a")], "are called 'a'"),
        (lambda: [(keras.Variable(0.0), "positive")], "Start elsewhere"),
        (lambda: [keras.Variable(0, dtype="int32")], "no gradient"),
    ],
)
def test_what_variables_refuses(variables, says):
    with pytest.raises((TypeError, ValueError), match=says):
        kd.DrMADCallback(fits.examples(4), variables=variables())


def test_a_variable_that_nothing_depends_on_is_named():
    stray = keras.Variable(1.0, trainable=False, name="stray")
    callback = fits.callback(fits.examples(9, seed=1), trajectory="stored", variables=[stray])
    with pytest.warns(UserWarning, match="hypergradient of stray is exactly zero"):
        fits.compiled(net()).fit(*fits.examples(24), verbose=0, callbacks=[callback])


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: kd.layers.GaussianNoise(0.0), "`stddev` is a number above 0"),
        (lambda: kd.layers.GaussianDropout(1.0), "`rate` is a number strictly between 0 and 1"),
        (lambda: kd.layers.RelaxedDropout(0.5, 0.0), "`temperature` is a number above 0"),
        (lambda: kd.layers.FeatureWeights("a"), "`initial` is"),
        (lambda: kd.losses.LabelSmoothing(0.0), "`initial` is"),
        (lambda: kd.losses.ClassWeights(0, "mse"), "`classes` is a whole number"),
        (lambda: kd.losses.ClassWeights(3, "mse", [1.0, 2.0]), r"array of shape \(3,\)"),
        (lambda: kd.losses.LossWeight("nonsense"), "`loss` is a keras.losses.Loss"),
        (lambda: kd.losses.LossWeight(None), "`loss` is a keras.losses.Loss"),
        (lambda: kd.tunable(keras.Variable(1.0)), "trainable=False"),
    ],
)
def test_what_layers_and_losses_refuse(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make()


def test_a_wrapped_loss_is_looked_into():
    model = keras.Sequential([keras.Input((6, 5)), keras.layers.Dense(4)])
    for loss in (keras.losses.CTC(), "ctc"):
        model.compile(kd.optimizers.SGD(0.1), kd.losses.LossWeight(loss))
        callback = kd.DrMADCallback(
            (np.zeros((4, 6, 5), "float32"), np.ones((4, 2), "int32")),
            variables=[model],
            trajectory="stored",
        )
        with pytest.raises(ValueError, match=r"keras\.losses\.CTC is not a number"):
            model.fit(
                np.zeros((4, 6, 5)), np.ones((4, 2), "int32"), verbose=0, callbacks=[callback]
            )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the random data of a snippet makes it warn of
def test_the_snippets_of_the_page_run(capsys):
    page = pathlib.Path(__file__).parents[1] / "docs" / "hyperparameters.md"
    names = {"__name__": "page"}
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(snippet, names)
    assert names["examples"].sample_weights.shape == (200,)
    assert "feature_weights" in capsys.readouterr().out
