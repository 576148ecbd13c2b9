"""One weight per training example, by the index that travels as `sample_weight`."""

import re
import warnings

import fits
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_drmad as kd

N, BATCH, RATE = 24, 5, 0.2


def ce():
    """Keras's loss, in the precision of now."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def model_of(n=N, loss=None, **options):
    """A linear model whose training examples have weights, and its loss."""
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(fits.CLASSES, name="linear")])
    fits.fixed_weights(model)
    loss = kd.SampleWeights(n, ce() if loss is None else loss)
    rng = np.random.default_rng(4)
    loss.sample_weights.assign(rng.uniform(0.5, 1.5, n))
    options.setdefault("optimizer", kd.optimizers.SGD(RATE))
    return fits.compiled(model, loss, **options), loss


def fit(model, callback, data, **options):
    model.fit(*data, epochs=2, verbose=0, callbacks=[callback], **options)
    return callback.history[-1].hypergradients["sample_weights/sample_weights"]["model"]


class Order(keras.callbacks.Callback):
    """Keeps the indices of every batch, in the order of the training."""

    def __init__(self, callback):
        super().__init__()
        self.callback, self.order = callback, []

    def on_epoch_end(self, epoch, logs=None):
        self.order = [batch[2].numpy() for batch in self.callback._estimator.recorder.batches]


def unrolled(order, weights, train, hyper):
    """The derivative by every weight, by one tape over a training by hand."""
    (x, y), (hyper_x, hyper_y) = train, hyper
    model, _ = model_of()
    w, b = (tf.constant(v) for v in model.get_weights())
    weights = tf.constant(weights)

    def losses(w, b, x, y):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(y, x @ w + b)

    with tf.GradientTape() as tape:
        tape.watch(weights)
        for at in order:
            with tf.GradientTape() as inner:
                inner.watch([w, b])
                weighted = tf.gather(weights, at) * losses(w, b, x[at], y[at])
                loss = tf.reduce_sum(weighted) / len(at)
            dw, db = inner.gradient(loss, [w, b])
            w, b = w - RATE * dw, b - RATE * db
        outer = tf.reduce_mean(losses(w, b, hyper_x, hyper_y))
    return tf.convert_to_tensor(tape.gradient(outer, weights)).numpy(), float(outer)


@pytest.mark.parametrize("source", ["arrays", "tf.data"])
def test_every_weight_agrees_with_an_unroll_of_the_shuffled_training(float64, source):
    train, hyper = fits.examples(N), fits.examples(9, seed=1)
    model, loss = model_of()
    weights = loss.sample_weights.numpy()
    callback = fits.callback(
        hyper, horizon=2, variables=[loss], outer_optimizer=keras.optimizers.SGD(0.0)
    )
    order = Order(callback)
    if source == "arrays":
        data, options = train, dict(sample_weight=np.arange(N), batch_size=BATCH, shuffle=True)
    else:
        data = tf.data.Dataset.from_tensor_slices((*train, np.arange(N, dtype="int32")))
        data, options = (data.shuffle(N, seed=1).batch(BATCH),), {}
    model.fit(*data, epochs=2, verbose=0, callbacks=[order, callback], **options)
    found = callback.history[-1].hypergradients["sample_weights/sample_weights"]["model"]
    # `order` saw all but nothing after: it stands before the callback, whose update forgets.
    assert sorted(np.concatenate(order.order)) == sorted([*range(N), *range(N)])
    assert not np.array_equal(np.concatenate(order.order)[:N], np.arange(N))
    expected, outer = unrolled(order.order, weights, train, hyper)
    assert np.all(expected != 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(callback.history[-1].outer_loss, outer, rtol=1e-12)


def test_it_agrees_with_finite_differences(float64):
    train, hyper = fits.examples(N), fits.examples(9, seed=1)
    options = dict(sample_weight=np.arange(N), batch_size=BATCH, shuffle=False)
    model, loss = model_of()
    saved = fits.Saved(model)
    weights = loss.sample_weights.numpy()
    callback = fits.callback(
        hyper, horizon=2, variables=[loss], outer_optimizer=keras.optimizers.SGD(0.0)
    )
    found = fit(model, callback, train, **options)
    direction, expected, step = np.random.default_rng(6).normal(size=N), 0.0, 1e-5
    for sign in (1, -1):
        saved.restore()
        loss.sample_weights.assign(weights + sign * step * direction)
        model.fit(*train, epochs=2, verbose=0, **options)
        # Without an index, every example weighs 1.
        expected += sign * fits.evaluated(model, *hyper) / (2 * step)
    np.testing.assert_allclose(found @ direction, expected, rtol=1e-6)


def test_losses_are_weighted_as_by_keras():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(4, 6, 3)).astype("float32"), rng.integers(0, 3, (4, 6))
    weights = np.array([0.5, 1.0, 1.5, 0.25, 1.9], "float32")
    loss = kd.SampleWeights(5, ce(), weights)
    index = np.array([4, 0, 0, 3])
    expected = ce()(y, logits, weights[index][:, None])
    np.testing.assert_allclose(loss(y, logits, index), expected, rtol=1e-6)
    np.testing.assert_allclose(loss(y, logits, index[:, None]), expected, rtol=1e-6)
    np.testing.assert_allclose(loss(y, logits), ce()(y, logits), rtol=1e-6)
    one, by = y[:, 0], logits[:, 0]
    expected = ce()(one, by, weights[index])
    np.testing.assert_allclose(loss(one, by, index), expected, rtol=1e-6)


def test_two_outputs_share_the_weights(float64):
    inputs = keras.Input((5,))
    outputs = [keras.layers.Dense(fits.CLASSES, name=name)(inputs) for name in ("a", "b")]
    loss = kd.SampleWeights(N, ce())
    model = fits.compiled(keras.Model(inputs, outputs), [loss, loss])
    x, y = fits.examples(N)
    hyper_x, hyper_y = fits.examples(9, seed=1)
    callback = fits.callback((hyper_x, [hyper_y, hyper_y]), variables=[loss])
    found = fit(model, callback, (x, [y, y]), sample_weight=[np.arange(N)] * 2)
    assert np.all(found != 0.0)


def test_the_weights_are_saved_with_the_model(tmp_path):
    model, loss = model_of(optimizer="sgd", loss="sparse_categorical_crossentropy")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").loss
    assert (loaded.n, loaded.domain) == (N, (0.0, 2.0))
    np.testing.assert_array_equal(loaded.sample_weights.numpy(), loss.sample_weights.numpy())


@pytest.mark.parametrize("n", [5_000, 50_000])
def test_many_weights(n):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 5)).astype("float32")
    y = (x[:, 0] > 0).astype("int64")
    wrong = rng.random(n) < 0.3
    y_train = np.where(wrong, 1 - y, y)
    model, loss = model_of(n, optimizer=kd.optimizers.SGD(0.5))
    loss.sample_weights.assign(np.ones(n))
    callback = kd.DrMADCallback(
        (x[:500], y[:500]),
        variables=[loss],
        trajectory="replay",
        outer_optimizer=kd.optimizers.Sign(0.1),
    )
    model.fit(
        x, y_train, n // 50, 2, sample_weight=np.arange(n), shuffle=True, verbose=0,
        callbacks=[callback],
    )  # fmt: skip
    weights = loss.sample_weights.numpy()
    assert weights.shape == (n,)
    found = callback.history[0].hypergradients["sample_weights/sample_weights"]["model"]
    assert np.mean(found != 0.0) > 0.999
    # Two steps of sign are enough to tell most of the wrong labels from the right ones.
    assert np.mean((weights < 1.0) == wrong) > 0.8


def test_an_index_out_of_range_is_named():
    model, loss = model_of(N - 1)
    with pytest.raises(ValueError, match=r"SampleWeights\(n=23\) expects indices from 0 to 22.*23"):
        fit(
            model,
            fits.callback(fits.examples(9, seed=1), trajectory="stored", variables=[loss]),
            fits.examples(N),
            sample_weight=np.arange(N),
        )
    # It is never taken for another one: not in a graph that XLA compiles either.
    for compiled in (False, True):
        y, p = tf.zeros((1,), "int64"), tf.zeros((1, 3))
        call = tf.function(lambda i, y=y, p=p: loss(y, p, i), jit_compile=compiled)
        assert np.isnan(call(tf.constant([-1])))
        assert np.isnan(call(tf.constant([N - 1])))
        assert np.isfinite(call(tf.constant([N - 2])))


def test_more_weights_than_examples_are_told_once():
    """And nothing is said where other examples may come later."""
    said = r"SampleWeights\(n=30\) received the indices from 0 to 23.*6 weights.*pass n=24"
    for n, index, warned in (
        (N + 6, np.arange(N), 1),
        (N + 6, np.arange(N) + 6, 0),
        (N, np.arange(N), 0),
    ):
        model, loss = model_of(n)
        tuned = fits.callback(fits.examples(9, seed=1), trajectory="linear", variables=[loss])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model.fit(*fits.examples(N), sample_weight=index, verbose=0, callbacks=[tuned])
        assert len(caught) == warned
        assert all(re.search(said, str(w.message)) for w in caught)


def test_weights_in_the_place_of_indices_are_refused():
    model, loss = model_of()
    callback = fits.callback(fits.examples(9, seed=1), trajectory="stored", variables=[loss])
    with pytest.raises(TypeError, match="expects the index of each training example"):
        fit(model, callback, fits.examples(N), sample_weight=np.ones(N))
    x, y = fits.examples(9, seed=1)
    callback = fits.callback((x, y, np.arange(9)), trajectory="stored", variables=[loss])
    with pytest.raises(ValueError, match="`hyper_data` has a third component"):
        fit(model, callback, fits.examples(N), sample_weight=np.arange(N))
    model, loss = model_of(weighted_metrics=["accuracy"])
    callback = fits.callback(fits.examples(9, seed=1), trajectory="stored", variables=[loss])
    with pytest.raises(ValueError, match="`weighted_metrics`"):
        fit(model, callback, fits.examples(N), sample_weight=np.arange(N))


def test_without_indices_training_goes_on_unweighted():
    model, loss = model_of()
    callback = fits.callback(fits.examples(9, seed=1), trajectory="stored", variables=[loss])
    with pytest.warns(UserWarning, match="sample_weights is exactly zero"):
        fit(model, callback, fits.examples(N))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: kd.SampleWeights(0, "mse"), "`n` is a whole number"),
        (lambda: kd.SampleWeights(2.5, "mse"), "`n` is a whole number"),
        (lambda: kd.SampleWeights(3, "mse", [1.0, 1.0]), r"array of shape \(3,\)"),
        (lambda: kd.SampleWeights(3, "mse", 2.0), "strictly between 0"),
        (lambda: kd.SampleWeights(3, ce())([0], [[0.0] * 3], np.zeros((1, 2), int)), "one index"),
    ],
)
def test_what_it_refuses(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make()
