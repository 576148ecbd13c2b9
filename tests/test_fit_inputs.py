"""Whatever `fit` takes: each kind of input makes the updates that the same arrays make."""

import collections
import functools
import itertools

import fits
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_drmad as kd
from keras_drmad import batches as packing

pytestmark = pytest.mark.usefixtures("float64")

N, BATCH, EPOCHS = 22, 8, 2  # the last of 3 batches is smaller
X, Y = fits.examples(N)
WEIGHT = np.random.default_rng(1).uniform(0.5, 2.0, N)
HYPER_X, HYPER_Y = fits.examples(11, seed=2)
HYPER_WEIGHT = np.random.default_rng(3).uniform(0.5, 2.0, 11)


class Batches(keras.utils.PyDataset):
    """Arrays as a PyDataset."""

    def __init__(self, *arrays, size=BATCH, **options):
        super().__init__(**options)
        self.arrays, self.size = arrays, size

    def __len__(self):
        return -(-len(self.arrays[0]) // self.size)

    def __getitem__(self, i):
        return tuple(a[i * self.size : (i + 1) * self.size] for a in self.arrays)


def slices(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays)


def forever(*arrays):
    while True:
        for i in range(0, len(arrays[0]), BATCH):
            yield tuple(a[i : i + BATCH] for a in arrays)


def net(inputs=None):
    """One net of two inputs' worth of features, however they come in."""
    if inputs is None:
        inputs = keras.Input((5,))
        joined = inputs
    else:
        joined = layers.Concatenate()(list(inputs.values() if isinstance(inputs, dict) else inputs))
    hidden = layers.Dense(4, "tanh", name="hidden")(joined)
    return keras.Model(inputs, layers.Dense(fits.CLASSES, name="head")(hidden))


def named_inputs(*names):
    # Two and three features, in the order of the names.
    return {n: keras.Input((size,), name=n) for n, size in zip(names, (2, 3), strict=True)}


def fit(hyper=(HYPER_X, HYPER_Y), model=None, options=None, **data):
    """The callback after a fit on the data, and the model."""
    model = fits.compiled(model or net())
    fits.fixed_weights(model)
    callback = fits.callback(hyper, **(options or {}))
    data = {"epochs": EPOCHS, "shuffle": False, "verbose": 0, **data}
    model.fit(callbacks=[callback], **data)
    return callback, model


@functools.cache
def of_arrays(kind="plain"):
    """The updates that arrays make."""
    data = {
        "plain": dict(x=X, y=Y, batch_size=BATCH),
        "weighted": dict(x=X, y=Y, batch_size=BATCH, sample_weight=WEIGHT),
        "full batches": dict(x=X[:16], y=Y[:16], batch_size=BATCH),
        "by class": dict(x=X, y=Y, batch_size=BATCH, sample_weight=np.array([1.0, 3.0, 0.2])[Y]),
    }[kind]
    callback, _ = fit(**data)
    return callback


A, B = X[:, :2], X[:, 2:]
HYPER_A, HYPER_B = HYPER_X[:, :2], HYPER_X[:, 2:]
INPUTS = {
    "tensors": lambda: dict(x=tf.constant(X), y=tf.constant(Y), batch_size=BATCH),
    "labels as a column": lambda: dict(
        x=X, y=Y[:, None], batch_size=BATCH, hyper=(HYPER_X, HYPER_Y[:, None])
    ),
    "dataset": lambda: dict(x=slices(X, Y).batch(BATCH)),
    "dataset of unknown length": lambda: dict(
        x=slices(X, Y).filter(lambda *_: True).batch(BATCH)
    ),
    "dataset without an end": lambda: dict(x=slices(X, Y).batch(BATCH).repeat(), steps_per_epoch=3),
    "PyDataset": lambda: dict(x=Batches(X, Y)),
    "PyDataset with workers": lambda: dict(x=Batches(X, Y, workers=2)),
    "generator": lambda: dict(x=forever(X, Y), steps_per_epoch=3),
    "validation_split": lambda: dict(
        x=np.concatenate([X, X]), y=np.concatenate([Y, Y]), validation_split=0.5, batch_size=BATCH
    ),
    "dictionary": lambda: dict(
        x={"z": A, "a": B}, y=Y, batch_size=BATCH, model=net(inputs=named_inputs("z", "a")),
        hyper=({"z": HYPER_A, "a": HYPER_B}, HYPER_Y),
    ),
    "dictionaries in another order, by dataset": lambda: dict(
        x=slices({"a": B, "z": A}, Y).batch(BATCH), model=net(inputs=named_inputs("z", "a")),
        hyper=slices(collections.OrderedDict(a=HYPER_B, z=HYPER_A), HYPER_Y).batch(4),
    ),
    "list of inputs": lambda: dict(
        x=[A, B], y=Y, batch_size=BATCH, model=net(inputs=[keras.Input((2,)), keras.Input((3,))]),
        hyper=([HYPER_A, HYPER_B], HYPER_Y),
    ),
    "tuple of inputs, by dataset": lambda: dict(
        x=slices((A, B), Y).batch(BATCH), model=net(inputs=[keras.Input((2,)), keras.Input((3,))]),
        hyper=slices((HYPER_A, HYPER_B), HYPER_Y).batch(5),
    ),
}  # fmt: skip
WEIGHTED = {
    "dataset": lambda: dict(x=slices(X, Y, WEIGHT).batch(BATCH)),
    "PyDataset": lambda: dict(x=Batches(X, Y, WEIGHT)),
    "generator": lambda: dict(x=forever(X, Y, WEIGHT), steps_per_epoch=3),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # so Keras, of unknown lengths
def test_any_input_makes_the_updates_of_arrays(kind):
    callback, _ = fit(**INPUTS[kind]())
    assert callback.trajectory.steps_checked == callback.history[-1].step == 3 * EPOCHS
    assert callback.traces == 1
    fits.assert_same_updates(callback, of_arrays())


@pytest.mark.parametrize("kind", WEIGHTED)
def test_sample_weights_count_wherever_they_come_from(kind):
    callback, _ = fit(**WEIGHTED[kind]())
    fits.assert_same_updates(callback, of_arrays("weighted"))


def test_class_weights_are_sample_weights():
    callback, _ = fit(x=X, y=Y, batch_size=BATCH, class_weight={0: 1.0, 1: 3.0, 2: 0.2})
    fits.assert_same_updates(callback, of_arrays("by class"))


def test_weights_matter():
    found = [of_arrays(kind).history[-1].outer_loss for kind in ("plain", "weighted", "by class")]
    assert min(abs(a - b) for a, b in itertools.pairwise(found)) > 1e-4


def test_dropped_remainder():
    callback, _ = fit(x=slices(X, Y).batch(BATCH, drop_remainder=True))
    fits.assert_same_updates(callback, of_arrays("full batches"))


def test_batches_of_one():
    callback, _ = fit(x=X[:4], y=Y[:4], batch_size=1)
    other, _ = fit(x=slices(X[:4], Y[:4]).batch(1))
    assert callback.trajectory.steps_checked == 4 * EPOCHS
    fits.assert_same_updates(callback, other)


def test_shuffled_arrays_are_recorded_in_the_order_of_training():
    callback, _ = fit(x=X, y=Y, batch_size=BATCH, shuffle=True)  # `Checked` would notice
    assert callback.history[0].outer_loss != of_arrays().history[0].outer_loss


def test_two_outputs_with_loss_weights():
    def model():
        fits.start()
        inputs = keras.Input((5,))
        hidden = layers.Dense(4, "tanh")(inputs)
        outputs = {
            "z": layers.Dense(fits.CLASSES, name="z")(hidden),
            "a": layers.Dense(1, name="a")(hidden),
        }
        return keras.Model(inputs, outputs)

    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    results = {}
    for weights in ({"z": 1.0, "a": 0.3}, {"z": 1.0, "a": 2.0}):
        for kind in ("arrays", "dataset"):
            target, hyper_target = {"z": Y, "a": X[:, :1]}, {"a": HYPER_X[:, :1], "z": HYPER_Y}
            built = model()
            built.compile(
                fits.optimizer(), {"z": crossentropy, "a": "mse"}, loss_weights=weights,
                metrics={"z": "accuracy"}, jit_compile=False,
            )  # fmt: skip
            fits.fixed_weights(built)
            callback = fits.callback((HYPER_X, hyper_target), hyper_batch_size=4)
            data = dict(x=X, y=target, batch_size=BATCH)
            if kind == "dataset":
                data = dict(x=slices(X, target).batch(BATCH))
            built.fit(**data, shuffle=False, epochs=EPOCHS, verbose=0, callbacks=[callback])
            results[kind, weights["a"]] = callback
            expected = fits.evaluated(built, HYPER_X, hyper_target)
            fits.assert_near(callback.history[-1].outer_loss, expected)
    for weight in (0.3, 2.0):
        fits.assert_same_updates(results["arrays", weight], results["dataset", weight])
    losses = [results["arrays", weight].history[-1].outer_loss for weight in (0.3, 2.0)]
    assert abs(losses[0] - losses[1]) > 1e-2


# Inputs that are not plain arrays of numbers --------------------------------------------------


def test_images_of_uint8_are_kept_as_they_are(monkeypatch):
    kept, pack = [], packing.pack
    monkeypatch.setattr(
        packing, "pack", lambda found: kept.append([b[0].dtype for b in found]) or pack(found)
    )
    images = np.random.default_rng(0).integers(0, 256, (N + 9, 4, 4, 1), dtype=np.uint8)

    def run(scale, x):
        fits.start()
        inner = [layers.Rescaling(1 / 255)] if scale else []
        model = keras.Sequential(
            [keras.Input((4, 4, 1)), *inner, layers.Flatten(), layers.Dense(fits.CLASSES)]
        )
        hyper = (x[N:], HYPER_Y[:9])
        return fit(hyper, model, x=x[:N], y=Y, batch_size=BATCH)[0]

    callback = run(True, images)
    assert kept == [[tf.uint8] * 3] * EPOCHS
    fits.assert_same_updates(callback, run(False, images / 255.0), tolerance=2e-6)


def sequences(count, seed):
    """Sequences of tokens of more and more length; and padded by 0."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 9, 2 + i // 5) for i in range(count)]
    padded = np.zeros((count, max(map(len, rows))), np.int64)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return rows, padded


def reader():
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int64"),
            layers.Embedding(9, 3, mask_zero=True),
            layers.LSTM(4),
            layers.Dense(fits.CLASSES),
        ]
    )


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_padded_batches_of_any_length():
    rows, padded = sequences(N, seed=0)
    _, hyper = sequences(11, seed=1)
    dataset = tf.data.Dataset.from_generator(
        lambda: zip(rows, Y, strict=True),
        output_signature=(tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int64)),
    ).padded_batch(BATCH)
    assert [x.shape[1] for x, _ in dataset] == [3, 5, 6]
    callback, _ = fit((hyper, HYPER_Y), reader(), x=dataset)
    fits.start()
    other, _ = fit((hyper, HYPER_Y), reader(), x=padded, y=Y, batch_size=BATCH)
    assert callback.traces == 1
    fits.assert_same_updates(callback, other)


class Bag(keras.Model):
    """The mean of the embeddings of a ragged or padded row of tokens; built late."""

    def __init__(self, ragged):
        super().__init__()
        self.embedding, self.head = layers.Embedding(9, 3), layers.Dense(fits.CLASSES)
        self.ragged = ragged

    def call(self, x):
        x = x.to_tensor() if self.ragged else x
        there = keras.ops.cast(x != 0, "float64")[..., None]
        total = keras.ops.sum(self.embedding(x) * there, axis=1)
        return self.head(total / keras.ops.sum(there, axis=1))


def test_ragged_inputs():
    rows, padded = sequences(N, seed=0)
    hyper_rows, hyper = sequences(11, seed=1)
    found = []
    for ragged in (True, False):
        fits.start()
        model = fits.compiled(Bag(ragged))
        x, hyper_x = padded, hyper
        if ragged:
            x = tf.ragged.constant([row.tolist() for row in rows], dtype=tf.int64)
            hyper_x = tf.ragged.constant([row.tolist() for row in hyper_rows], dtype=tf.int64)
        callback = fits.callback(slices(hyper_x, HYPER_Y).batch(4))
        model.fit(slices(x, Y).batch(BATCH), epochs=EPOCHS, verbose=0, callbacks=[callback])
        found.append(callback)
    fits.assert_same_updates(*found)


def test_sparse_inputs():
    dense = np.where(np.random.default_rng(0).random(X.shape) < 0.5, X, 0.0)
    found = []
    for x in (tf.sparse.from_dense(dense), dense):
        fits.start()
        model = keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(fits.CLASSES)])
        model = fits.compiled(model)
        callback = fits.callback((HYPER_X, HYPER_Y))
        model.fit(slices(x, Y).batch(BATCH), epochs=EPOCHS, verbose=0, callbacks=[callback])
        found.append(callback)
    fits.assert_same_updates(*found)


class Autoencoder(keras.Model):
    """No targets: the loss is added in `call`; built late."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.widen = layers.Dense(2, "tanh"), layers.Dense(5)

    def call(self, x):
        y = self.widen(self.squeeze(x))
        self.add_loss(keras.ops.mean(keras.ops.square(x - y)))
        return y


def test_no_targets():
    found = []
    for data, hyper in (
        (dict(x=X, batch_size=BATCH), (HYPER_X, None)),
        (dict(x=tf.data.Dataset.from_tensor_slices(X).batch(BATCH)),
         tf.data.Dataset.from_tensor_slices(HYPER_X).batch(4)),
        (dict(x=Batches(X)), Batches(HYPER_X, size=4)),
    ):  # fmt: skip
        fits.start()
        model = Autoencoder()
        model.compile(fits.optimizer(), jit_compile=False)
        callback = fits.callback(hyper)
        model.fit(**data, shuffle=False, epochs=EPOCHS, verbose=0, callbacks=[callback])
        expected = np.mean(np.square(HYPER_X - model.predict(HYPER_X, verbose=0)))
        fits.assert_near(callback.history[-1].outer_loss, expected)
        found.append(callback)
    fits.assert_same_updates(found[0], found[1])
    fits.assert_same_updates(found[0], found[2])


# Hyper data ---------------------------------------------------------------------------------

HYPER = {
    "arrays in small batches": ((HYPER_X, HYPER_Y), dict(hyper_batch_size=4)),
    "batches of one": ((HYPER_X, HYPER_Y), dict(hyper_batch_size=1)),
    "a list": ([HYPER_X, HYPER_Y], {}),
    "weights of None": ((HYPER_X, HYPER_Y, None), {}),
    "tensors": ((tf.constant(HYPER_X), tf.constant(HYPER_Y)), {}),
    "dataset": (slices(HYPER_X, HYPER_Y).batch(4), {}),
    "dataset of unknown length": (slices(HYPER_X, HYPER_Y).filter(lambda *_: True).batch(4), {}),
    "PyDataset": (Batches(HYPER_X, HYPER_Y, size=4), {}),
}
WEIGHTED_HYPER = {
    "arrays": ((HYPER_X, HYPER_Y, HYPER_WEIGHT), dict(hyper_batch_size=4)),
    "dataset": (slices(HYPER_X, HYPER_Y, HYPER_WEIGHT).batch(4), {}),
    "PyDataset": (Batches(HYPER_X, HYPER_Y, HYPER_WEIGHT, size=4), {}),
}


@pytest.mark.parametrize("kind", HYPER)
def test_any_hyper_data(kind):
    hyper, options = HYPER[kind]
    callback, model = fit(hyper, options=options, x=X, y=Y, batch_size=BATCH)
    fits.assert_same_updates(callback, of_arrays())
    expected = fits.evaluated(model, HYPER_X, HYPER_Y, batch_size=3)
    fits.assert_near(callback.history[-1].outer_loss, expected)


@functools.cache
def weighted_hyper():
    callback, _ = fit((HYPER_X, HYPER_Y, HYPER_WEIGHT), x=X, y=Y, batch_size=BATCH)
    return callback


@pytest.mark.parametrize("kind", WEIGHTED_HYPER)
def test_weighted_hyper_data(kind):
    hyper, options = WEIGHTED_HYPER[kind]
    callback, model = fit(hyper, options=options, x=X, y=Y, batch_size=BATCH)
    expected = fits.evaluated(model, HYPER_X, HYPER_Y, sample_weight=HYPER_WEIGHT, batch_size=3)
    fits.assert_near(callback.history[-1].outer_loss, expected)
    assert abs(expected - of_arrays().history[-1].outer_loss) > 1e-4
    fits.assert_same_updates(callback, weighted_hyper())


def test_another_outer_loss():
    """Measured by absolute error while trained by squared error, also by its name."""
    found = []
    for loss in ("mae", keras.losses.MeanAbsoluteError()):
        fits.start()
        model = keras.Sequential([keras.Input((5,)), layers.Dense(4, "tanh"), layers.Dense(1)])
        model.compile(fits.optimizer(), "mse", jit_compile=False)
        fits.fixed_weights(model)
        callback = fits.callback((HYPER_X, HYPER_X[:, :1]), outer_loss=loss, hyper_batch_size=4)
        model.fit(X, X[:, :1], BATCH, EPOCHS, shuffle=False, verbose=0, callbacks=[callback])
        expected = np.mean(np.abs(HYPER_X[:, :1] - model.predict(HYPER_X, verbose=0)))
        fits.assert_near(callback.history[-1].outer_loss, expected)
        found.append(callback)
    fits.assert_same_updates(*found)


def test_training_data_as_hyper_data_is_warned_of():
    with pytest.warns(UserWarning, match="looks like the training data.*hold some data out"):
        fit((X, Y), x=X, y=Y, batch_size=BATCH)


def test_without_a_named_length_a_schedule_is_refused():
    model = fits.compiled(
        net(), optimizer=fits.optimizer(learning_rate=kd.Hyperparameter(0.1, over="step"))
    )
    dataset = INPUTS["dataset of unknown length"]()["x"]
    with pytest.raises(ValueError, match=r"`learning_rate` has a schedule.*Pass `steps_per_epoch`"):
        model.fit(dataset, verbose=0, callbacks=[fits.callback((HYPER_X, HYPER_Y))])
