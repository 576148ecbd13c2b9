"""Whatever diverges: no hyperparameter leaves its domain, and what was skipped is said once."""

import re
import warnings

import fits
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_drmad as kd
from keras_drmad import domains, outer, reports

N, BATCH, EPOCHS = 12, 4, 4
nan, inf = float("nan"), float("inf")


def data(count, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 5)).astype("float32")
    return x, np.tanh(x[:, :1] - x[:, 1:2]), np.ones(count, "float32")


X, Y, WEIGHTS = data(N, 0)
HYPER = data(8, 1)[:2]


def net(rate=0.1, loss="mse", **arguments):
    """A net with every kind of domain: positive, unit, an interval, and a schedule."""
    fits.start()
    tuned = dict(
        learning_rate=kd.Hyperparameter(rate, per="layer", over="step"),
        momentum=kd.Hyperparameter(0.5),
        l2=kd.Hyperparameter(0.01, per="neuron"),
        weight_decay=kd.Hyperparameter(0.01, domain=(0.0, 0.1)),
    )
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4, "relu"), layers.Dense(1)])
    model.compile(kd.optimizers.SGD(**{**tuned, **arguments}), loss, jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


def inside(domain, values) -> bool:
    """Whether values lie strictly inside a domain."""
    low, high = {"positive": (0.0, inf), "unit": (0.0, 1.0)}.get(domain.name, (0.0, 0.1))
    return bool(np.all((low < values) & (values < high)))


def assert_nothing_lost(model, callback, warned) -> None:
    """What must hold after every fit, however it went."""
    optimizer, history = model.optimizer, callback.history
    for group, raw, values in zip(
        optimizer.groups, optimizer.raw_variables, optimizer.values(), strict=True
    ):
        assert np.all(np.isfinite(raw.numpy()))
        assert inside(group.domain, values.numpy()), (group.argument, values)
    for variable in callback.outer_optimizer.variables:
        assert np.all(np.isfinite(variable.numpy()))
    last = reports.nested(history[-1].labels, [v.numpy() for v in optimizer.values()])
    used = [reports.flat(record.hyperparameters) for record in history]
    for record, now, after in zip(history, used, [*used[1:], reports.flat(last)], strict=True):
        unchanged = all(np.array_equal(after[path], value) for path, value in now.items())
        gradients = reports.flat(record.hypergradients).values()
        if record.accepted:
            assert record.reason == "" and not unchanged and np.isfinite(record.outer_loss)
            assert all(np.all(np.isfinite(g)) for g in gradients)
        else:
            assert record.reason and unchanged
    reasons = {re.sub(r"\d+", "N", record.reason) for record in history if record.reason}
    assert len(warned) == len(reasons)
    for reason in reasons:  # each in one warning, whatever the number of updates
        found = [text for text in warned if reason in re.sub(r"\d+", "N", text)]
        assert len(found) == 1 and "skipped" in found[0] and "`history`" in found[0]


def diverging_fit(model, train=(X, Y, WEIGHTS), hyper=HYPER, **options) -> list[str]:
    """Fit with the callback; the reasons in its history, one per update."""
    callback = kd.DrMADCallback(hyper, **{"trajectory": "linear", **options})
    x, y, weights = train
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model.fit(
            x, y, sample_weight=weights, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0,
            callbacks=[callback],
        )  # fmt: skip
    assert len(callback.history) == EPOCHS
    warned = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert_nothing_lost(model, callback, warned)
    return [record.reason for record in callback.history]


OUTER_LOSS = "the outer loss is not finite"


@pytest.mark.parametrize(
    "rate, trajectory", [(3.0, "linear"), (3.0, "replay"), (3.0, "auto"), (1e10, "linear")]
)
def test_learning_rates_far_above_stability(rate, trajectory):
    reasons = diverging_fit(net(rate), trajectory=trajectory)
    assert reasons[1:] == [OUTER_LOSS] * (EPOCHS - 1)
    if rate > 3.0:
        assert reasons[0] == OUTER_LOSS
    else:  # the loss is 5e6 after three steps: a true one
        assert reasons[0] == ""


def put(array, value):
    array = array.copy()
    array.reshape(len(array), -1)[BATCH + 1, 0] = value  # in the second batch
    return array


@pytest.mark.parametrize("where", ["features", "labels", "sample weights"])
@pytest.mark.parametrize("value", [nan, inf])
def test_training_data_that_is_not_finite(where, value):
    parts = [X, Y, WEIGHTS]
    i = ["features", "labels", "sample weights"].index(where)
    parts[i] = put(parts[i], value)
    assert all(diverging_fit(net(), tuple(parts), trajectory="replay"))  # all of them skipped


@pytest.mark.parametrize("value", [nan, inf, 3e38])
def test_hyper_data_that_is_not_finite(value):
    """A dataset is not looked through, as arrays are."""
    hyper = tf.data.Dataset.from_tensor_slices((put(HYPER[0], value), HYPER[1])).batch(BATCH)
    model = net()
    reasons = diverging_fit(model, hyper=hyper)
    assert all("the outer loss is not finite" in reason or "gradient of the outer loss" in reason
               for reason in reasons)  # fmt: skip
    assert np.isfinite(model.evaluate(X, Y, verbose=0))  # training went on


class Loss(keras.losses.Loss):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, y_true, y_pred):
        return self.function(tf.reduce_mean((y_true - y_pred) ** 2, -1))


LOSSES = {
    "NaN from some step on": lambda error: tf.sqrt(error - 0.1),
    "infinite": lambda error: tf.math.log(error * 0.0),
    "a gradient that is NaN": lambda error: tf.sqrt(error * 0.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_not_finite(name):
    assert all(diverging_fit(net(loss=Loss(LOSSES[name]))))


def test_an_outer_loss_whose_gradient_is_not_finite():
    """The loss itself is: it is its slope that no update is made from."""
    model = net()
    reasons = diverging_fit(model, outer_loss=Loss(lambda error: tf.sqrt(error * 0.0)))
    assert reasons == ["the gradient of the outer loss is not finite"] * EPOCHS
    assert np.isfinite(model.evaluate(X, Y, verbose=0))


def test_hypergradients_whose_squares_overflow():
    """Adam's moments would be infinite from then on, and nothing would ever move again."""
    raw = keras.Variable([1.0, 2.0], trainable=False)
    tuned = [outer.Tuned(raw, domains.REAL)]
    adam = keras.optimizers.Adam(0.1)
    for huge in ([1e25, 0.1], [0.1, -1e38]):
        reason = outer.update(adam, tuned, [tf.constant(huge)], 1.0)
        assert reason == "the outer optimizer's moments overflowed"
        assert int(adam.iterations) == 0 and raw.numpy().tolist() == [1.0, 2.0]
        assert all(np.all(np.isfinite(v.numpy())) for v in adam.variables)
    assert outer.update(adam, tuned, [tf.constant([0.1, -0.1])], 1.0) == ""
    np.testing.assert_allclose(raw.numpy(), [0.9, 2.1], rtol=1e-5)


def test_an_interval_that_ends_at_zero_is_open():
    """Numbers next to 0 are taken for 0 by processors: the first that counts is larger."""
    for low, high in ((0.0, 0.1), (-0.1, 0.0), (0.0, 1e-20)):
        domain = domains.get((low, high))
        for raw in (-1e30, -358.0, -80.0, 0.0, 80.0, 1e30):
            value = domain.value(tf.constant(raw)).numpy()
            assert low < value < high and domain.value(tf.constant(raw)) * 1.0 != 0.0


OUTER = {
    "SGD": lambda: keras.optimizers.SGD(100.0, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(100.0),
    "Sign": lambda: kd.optimizers.Sign(100.0),
    "SGD, 1e38": lambda: keras.optimizers.SGD(1e38),
}


@pytest.mark.parametrize("max_step", [1.0, 1e30])
@pytest.mark.parametrize("name", OUTER)
def test_outer_steps_that_are_far_too_large(name, max_step):
    reasons = diverging_fit(
        net(), outer_optimizer=OUTER[name](), max_step=max_step, trajectory="replay"
    )
    assert reasons[0] == ""  # it is bounded, not refused
    if max_step == 1.0:
        assert reasons == [""] * EPOCHS
