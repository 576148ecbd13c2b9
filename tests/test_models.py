"""Whatever models Keras users build: each is followed exactly, and left as `fit` leaves it."""

import fits
import keras
import numpy as np
import pytest
from keras import layers

import keras_drmad as kd

BATCH = 6
# Every model has these two at its end.
HEAD = [layers.Flatten, lambda: layers.Dense(fits.CLASSES)]


class Attention(keras.Model):
    """A little transformer block with a mask, built late."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(7, 4, mask_zero=True)
        self.attention = layers.MultiHeadAttention(2, 3, dropout=0.2)
        self.norm, self.pool = layers.LayerNormalization(), layers.GlobalAveragePooling1D()
        self.head = layers.Dense(fits.CLASSES)

    def call(self, x, training=False):
        x = self.embedding(x)
        x = self.norm(x + self.attention(x, x, training=training))
        return self.head(self.pool(x))


class NoTrainingArgument(keras.Model):
    """A model whose `call` takes nothing but the inputs, with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.inner = keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(fits.CLASSES)])

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.inner.build(shape)

    def call(self, x):
        return self.scale * self.inner(x)


class OwnLoss(keras.Model):
    """A model that computes its loss itself."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(fits.CLASSES)

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        values = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
        return keras.ops.mean(values * keras.ops.cast(1 + y, values.dtype))


class Uneven(layers.Layer):
    """Its output depends on the size of the batch, and it adds a loss."""

    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
        return x + 0.1 * keras.ops.mean(x, axis=0, keepdims=True)


def sequential(*inner, shape=(5,)):
    return lambda: keras.Sequential([keras.Input(shape), *(make() for make in (*inner, *HEAD))])


def shared():
    left, right = keras.Input((2,)), keras.Input((2,))
    tower = keras.Sequential([layers.Dense(3, "tanh"), layers.Dense(3)], name="tower")
    joined = layers.Multiply()([tower(left), tower(right)])
    model = keras.Model([left, right], layers.Dense(fits.CLASSES)(joined))
    inputs = keras.Input((4,))
    return keras.Model(inputs, model([inputs[:, :2], inputs[:, 2:]]))


def frozen():
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(4, "tanh"), layers.BatchNormalization(), layers.Dense(3)]
    )
    model.layers[0].trainable = model.layers[1].trainable = False
    return model


def penalized():
    l2 = keras.regularizers.L2(0.03)
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(4, "tanh", kernel_regularizer=l2, activity_regularizer=l2),
            Uneven(),
            layers.Dense(3, bias_regularizer=keras.regularizers.L1L2(0.01)),
        ]
    )


class Model:
    """A row of the table.

    Args:
        make: Makes the model.
        shape: Of an example.
        tokens: Whether inputs are whole numbers from 0.
        outer: Whether the outer loss is what `evaluate` says: not where a model has penalties.
        step: Of the finite differences.
    """

    def __init__(self, make, shape=(5,), tokens=False, outer=True, step=1e-5):
        self.make, self.shape, self.tokens, self.outer = make, shape, tokens, outer
        self.step = step

    def data(self, count, seed):
        x, y = fits.examples(count, self.shape, seed)
        return (np.abs(x * 3).astype("int64") % 7 if self.tokens else x), y


conv = [
    lambda: layers.Conv2D(3, 3, padding="same", activation="tanh"),
    layers.MaxPooling2D,
    lambda: layers.SeparableConv2D(2, 2),
]
MODELS = {
    "functional": Model(lambda: keras.Model(i := keras.Input((5,)), layers.Dense(3)(i))),
    "no training argument": Model(NoTrainingArgument),
    "a loss of its own": Model(OwnLoss),
    "shared layers": Model(shared, (4,)),
    "frozen layers": Model(frozen),
    "penalties": Model(penalized, outer=False),
    "BatchNormalization": Model(sequential(lambda: layers.Dense(4), layers.BatchNormalization)),
    "noise": Model(
        sequential(
            lambda: layers.GaussianNoise(0.3),
            lambda: layers.Dense(6, "elu"),
            lambda: layers.Dropout(0.4),
            lambda: layers.AlphaDropout(0.1),
        )
    ),
    "convolutions": Model(sequential(*conv, shape=(6, 6, 2)), (6, 6, 2)),
    "augmentation": Model(
        sequential(
            lambda: layers.RandomFlip("horizontal"),
            lambda: layers.RandomTranslation(0.2, 0.2, fill_mode="constant"),
            shape=(4, 4, 1),
        ),
        (4, 4, 1),
    ),
    "recurrent": Model(
        sequential(
            lambda: layers.LSTM(2, dropout=0.2, recurrent_dropout=0.2, unroll=False),
            shape=(3, 2),
        ),
        (3, 2),
    ),
    # Where all is masked, Keras 3.8 adds -1e9 to the scores: 1e-7 of them is lost, even in float64.
    "attention": Model(Attention, (5,), tokens=True, step=3e-4),
}


def compiled(model):
    loss = None if not isinstance(model, OwnLoss) else "mse"
    return fits.compiled(model, loss)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_followed_exactly(float64, name):
    """Recorded states are replayed, and finite differences of the whole training agree."""
    row = MODELS[name]
    (x, y), hyper = row.data(15, seed=0), row.data(9, seed=1)
    model = compiled(row.make())
    callback = fits.callback(hyper, outer_optimizer=keras.optimizers.SGD(0.0), curvature="hessian")
    model(x)  # built, so that it can be trained again from the same start
    model.optimizer.build(model.trainable_variables)
    saved = fits.Saved(model)

    def train(*callbacks):
        model.fit(x, y, BATCH, epochs=1, shuffle=False, verbose=0, callbacks=list(callbacks))

    train(callback)
    record = callback.history[-1]
    assert record.accepted and callback.trajectory.steps_checked == 3
    outer = model.evaluate if row.outer else lambda *_, **__: float(callback._outer_loss()[0])

    def outer_loss():
        found = outer(*hyper, verbose=0, return_dict=True)
        return found["loss"] if row.outer else found

    np.testing.assert_allclose(record.outer_loss, outer_loss(), rtol=1e-12)
    if not row.outer:
        assert model.evaluate(*hyper, verbose=0) > record.outer_loss + 1e-3
    fits.assert_derivative(model, saved, record, train, outer_loss, step=row.step)


class Small(keras.Model):
    """What draws and what keeps statistics, built late."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(6, "tanh"), layers.Dense(fits.CLASSES)
        self.norm, self.drop = layers.BatchNormalization(), layers.Dropout(0.3)

    def call(self, x, training=False):
        x = self.norm(self.first(x), training=training)
        return self.second(self.drop(x, training=training))


def state(model):
    """Everything that training changes, except metrics."""
    kept = {v.path: v.numpy() for v in model.variables if "metric" not in v.path}
    kept.update({v.path: v.numpy() for v in model.optimizer.variables})
    # Where in the horizon the optimizer is counts with schedules only.
    return {k: v for k, v in kept.items() if not k.endswith(("/position", "/horizon_steps"))}


@pytest.mark.parametrize("late", [False, True], ids=["built", "built late"])
def test_an_outer_step_of_zero_trains_as_without_the_callback(late):
    """Bit for bit: weights, moving statistics, seeds, slots, and what `fit` reports."""
    x, y = fits.examples(40, dtype="float32")
    hyper = fits.examples(10, seed=1, dtype="float32")
    found = []
    for options in (None, dict(trajectory="linear"), dict(trajectory="replay", horizon=2)):
        fits.start()
        model = fits.compiled(Small(), metrics=["accuracy"])
        if not late:
            model(x)
        callbacks = []
        if options is not None:
            still = keras.optimizers.SGD(0.0)
            callbacks = [kd.DrMADCallback(hyper, outer_optimizer=still, **options)]
        history = model.fit(
            x, y, 16, epochs=3, verbose=0, callbacks=callbacks, validation_data=hyper
        ).history
        extra = {"outer_loss", "update"}
        found.append((state(model), {k: v for k, v in history.items() if k not in extra}))
        assert all(r.accepted for c in callbacks for r in c.history)
    (expected, reported), *others = found
    assert len(expected) == 20
    for values, report in others:
        assert report == reported
        assert values.keys() == expected.keys()
        for path, value in values.items():
            np.testing.assert_array_equal(value, expected[path], err_msg=path)


# How `fit` runs -------------------------------------------------------------------------------


def fit_dense(drop=0.0, **options):
    """Two updates of a small net, checked against a replay."""
    fits.start()
    model = sequential(lambda: layers.Dense(4, "tanh"), lambda: layers.Dropout(drop))()
    fits.compiled(model, **options)
    (x, y), hyper = fits.examples(14), fits.examples(9, seed=1)
    callback = fits.callback(hyper)
    model.fit(x, y, BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[callback])
    return callback


def test_eager_and_compiled_training_make_the_same_updates(float64):
    graph = fit_dense()
    fits.assert_same_updates(fit_dense(run_eagerly=True), graph)
    fits.assert_same_updates(fit_dense(jit_compile=True), graph)


@pytest.mark.slow
def test_dropout_masks_are_those_of_compiled_training(float64):
    """XLA draws other masks from the same seeds: then the reverse loop must use XLA as well."""
    compiled, graph = fit_dense(drop=0.5, jit_compile=True), fit_dense(drop=0.5)
    assert compiled.trajectory.steps_checked == 6
    assert compiled.history[0].outer_loss != graph.history[0].outer_loss
    fits.assert_same_updates(fit_dense(drop=0.5, run_eagerly=True), graph)


def test_coarse_numbers():
    """Replayed bit by bit; hyperparameters are kept in float32."""
    found = []
    for name in ("float32", "mixed_bfloat16", "bfloat16"):
        fits.start()
        keras.config.set_dtype_policy(name)
        try:
            model = sequential(lambda: layers.Dense(4, "tanh"))()
        finally:
            keras.config.set_dtype_policy("float32")
        fits.compiled(model)
        (x, y), hyper = fits.examples(14, dtype="float32"), fits.examples(9, seed=1)
        callback = fits.callback(hyper, trajectory=fits.Checked(1e-6 if name == "float32" else 0))
        model.fit(x, y, BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[callback])
        assert {v.dtype for v in model.optimizer.raw_variables} == {"float32"}
        found.append(callback)
        assert all(record.accepted for record in callback.history)
    # Weights are float32 here: what differs is rounding in the layers.
    fits.assert_same_updates(found[1], found[0], 0.1)


# Several calls of `fit` -----------------------------------------------------------------------


def dense():
    fits.start()
    return sequential(lambda: layers.Dense(4, "tanh"))()


def test_several_fits_are_one_long_fit(float64):
    (x, y), hyper = fits.examples(14), fits.examples(9, seed=1)
    found = []
    for calls in ([4], [2, 4], [1, 2, 4]):
        model, callback, done = fits.compiled(dense()), fits.callback(hyper), 0
        for epochs in calls:
            model.fit(
                x, y, BATCH, epochs, shuffle=False, verbose=0, callbacks=[callback],
                initial_epoch=done,
            )  # fmt: skip
            done = epochs
        assert int(callback.outer_optimizer.iterations) == 4
        assert [(r.epoch, r.step) for r in callback.history] == [(i, 3 * i + 3) for i in range(4)]
        assert callback.traces == 1
        found.append((callback, model.get_weights()))
    for callback, weights in found[1:]:
        fits.assert_same_updates(callback, found[0][0])
        fits.assert_near(weights, found[0][1])


def test_another_length_of_the_horizon_resamples_a_schedule(float64):
    (x, y), hyper = fits.examples(24), fits.examples(9, seed=1)
    schedule = kd.Hyperparameter(0.1, over="step")
    model = fits.compiled(dense(), optimizer=fits.optimizer(learning_rate=schedule))
    callback = fits.callback(hyper)
    for count in (24, 12, 24):  # 4, 2 and 4 steps
        model.fit(x[:count], y[:count], BATCH, 1, verbose=0, callbacks=[callback])
    first, second, third = (r.hyperparameters["learning_rate"]["model"] for r in callback.history)
    slopes = [r.hypergradients["learning_rate"]["model"] for r in callback.history]
    assert [len(v) for v in (first, second, third)] == [len(s) for s in slopes] == [4, 2, 4]
    np.testing.assert_allclose(first, 0.1, rtol=1e-7)
    slope = slopes[0] * first  # of the logarithm
    moved = first * np.exp(-0.1 * slope / (np.abs(slope) + 1e-7 / 0.001**0.5))  # Adam's first step
    np.testing.assert_allclose(second, moved[[0, 2]], rtol=1e-6)
    np.testing.assert_array_equal(third[0], third[1])
    np.testing.assert_array_equal(third[2], third[3])
    assert third[0] != second[0]
    assert int(callback.outer_optimizer.iterations) == 3


def test_another_model_starts_from_its_own_weights(float64):
    (x, y), hyper = fits.examples(14), fits.examples(9, seed=1)
    callback = fits.callback(hyper, restart=True)
    for units in (4, 3):
        fits.start()
        model = fits.compiled(sequential(lambda units=units: layers.Dense(units, "tanh"))())
        model.fit(x, y, BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[callback])
    other = fits.callback(hyper, restart=True)
    fits.start()
    model = fits.compiled(sequential(lambda: layers.Dense(3, "tanh"))())
    model.fit(x, y, BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[other])
    assert [record.step for record in callback.history] == [3, 6, 9, 12]
    fits.assert_near(callback.history[2].hypergradients, other.history[0].hypergradients)
    weights = model.get_weights()
    callback.restore_first_weights()
    other.restore_first_weights()
    assert not any(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


# Where a horizon starts -----------------------------------------------------------------------


class Starts(keras.callbacks.Callback):
    """Everything as it is at the start and at the end of each horizon."""

    def __init__(self):
        super().__init__()
        self.found, self.left = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.found.append(state(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.left.append(state(self.model))


def restarted(restart, model, **options):
    """Three horizons of one epoch on data with a shifted mean."""
    x, y = fits.examples(14, dtype="float32")
    model = fits.compiled(model)
    model(x)
    model.optimizer.build(model.trainable_variables)
    callback = kd.DrMADCallback(fits.examples(9, seed=1), restart=restart, trajectory="linear")
    starts = Starts()
    model.fit(x + 1, y, BATCH, epochs=3, verbose=0, callbacks=[callback, starts])
    assert all(record.accepted for record in callback.history)
    return starts, callback


def same(a, b, path):
    return np.array_equal(a[path], b[path])


def test_restart_starts_from_the_first_weights_exactly():
    model = Small()
    starts, _ = restarted(True, model)
    first = starts.found[0]
    tuned = {v.path for v in model.optimizer.raw_variables}
    seeds = {path for path in first if "seed" in path}
    assert len(tuned) == 3 and len(seeds) == 1
    for later in starts.found[1:]:
        for path in first:
            # What is tuned has moved, dropout draws on; all the rest is as at first.
            assert same(first, later, path) == (path not in tuned | seeds), path
    # The last horizon's weights stay.
    for path, value in state(model).items():
        np.testing.assert_array_equal(value, starts.left[-1][path])
        assert not same(first, starts.left[-1], path) or path.endswith("learning_rate")


def test_without_restart_training_goes_on():
    starts, _ = restarted(False, Small())
    for left, found in zip(starts.left, starts.found[1:], strict=False):
        assert all(same(left, found, path) for path in left)


def test_fresh_weights_and_nothing_else():
    """Frozen layers, adapted statistics and moving statistics are not initialised anew."""
    normalization = layers.Normalization()
    normalization.adapt(fits.examples(14, dtype="float32")[0] * 3)
    loaded = layers.Dense(4, "tanh", name="loaded")
    model = keras.Sequential(
        [keras.Input((5,)), normalization, loaded, layers.Dense(4, name="new"),
         layers.BatchNormalization(name="batch"), layers.Dropout(0.1), layers.Dense(3, name="head")]
    )  # fmt: skip
    loaded.trainable = False
    starts, _ = restarted("fresh", model)
    first = starts.found[0]
    for later in starts.found[1:]:
        for path in first:
            drawn = path.endswith(("new/kernel", "head/kernel"))
            moved = path in {v.path for v in model.optimizer.raw_variables} or "seed" in path
            assert same(first, later, path) == (not drawn and not moved), path
    for kind, ends in (("head/kernel", starts.found[1:]), ("moving_mean", [first, starts.left[0]])):
        a, b = ([v for path, v in end.items() if path.endswith(kind)] for end in ends)
        assert len(a) == 1 and not np.array_equal(a, b)


def test_fresh_weights_need_a_clone():
    class NoConfig(keras.Model):
        def __init__(self, units):
            super().__init__()
            self.dense = layers.Dense(units)

        def call(self, x):
            return self.dense(x)

    with pytest.raises(ValueError, match=r"(?s)restart='fresh'.*clone_model.*use restart=True"):
        restarted("fresh", NoConfig(3))


def test_fresh_weights_need_initializers_that_draw():
    drawn_once = keras.initializers.GlorotUniform(seed=1)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3, kernel_initializer=drawn_once)])
    with pytest.raises(ValueError, match=r"restart='fresh'.*same weights.*`seed`"):
        restarted("fresh", model)


class Aside(layers.Layer):
    """Normalizes in inference alone: training only makes the moving averages."""

    def __init__(self, **options):
        super().__init__()
        self.normalization = layers.BatchNormalization(**options)

    def call(self, x, training=False):
        normalized = self.normalization(x, training=training)
        return x if training else normalized


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "finite_difference"])
@pytest.mark.parametrize("trajectory", ["replay", "stored"])
def test_moving_averages_are_differentiated(float64, curvature, trajectory):
    """The outer loss reads them, and they were made of what the weights gave at every step.

    Training is linear up to the loss, so that Gauss-Newton is exact.
    """
    fits.start()
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(fits.CLASSES),
            Aside(momentum=0.8, center=False, scale=False),
        ]
    )
    fits.compiled(model)
    fits.fixed_weights(model)
    model.optimizer.build(model.trainable_variables)
    (x, y), hyper = fits.examples(14), fits.examples(9, seed=1)  # a smaller last batch
    still = keras.optimizers.SGD(0.0)
    callback = fits.callback(
        hyper, trajectory=trajectory, curvature=curvature, outer_optimizer=still, horizon=2
    )
    saved = fits.Saved(model)

    def train(*callbacks):
        model.fit(x, y, 4, epochs=2, shuffle=False, verbose=0, callbacks=list(callbacks))

    train(callback)
    fits.assert_derivative(
        model, saved, callback.history[-1], train, lambda: fits.evaluated(model, *hyper),
        tolerance=1e-4 if curvature == "finite_difference" else 1e-6,
    )  # fmt: skip
