"""Whatever interrupts a fit: the model is as Keras would leave it, and nothing tuned is lost."""

import functools

import fits
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_drmad as kd
from keras_drmad import batches, outer
from keras_drmad.objectives import OuterLoss
from keras_drmad.recorder import _StandIn
from keras_drmad.reverse import ReverseLoop

N, BATCH, STEPS = 12, 4, 3
X, Y = fits.examples(N, dtype="float32")
HYPER = fits.examples(7, seed=2, dtype="float32")
STOP = "stopped here"


def net():
    """A net with all that a stray step would move: weights, slots, seeds."""
    fits.start()
    return fits.compiled(
        keras.Sequential(
            [
                keras.Input((5,)),
                layers.Dense(4, "tanh"),
                layers.Dropout(0.2),
                layers.Dense(fits.CLASSES),
            ]
        )
    )


def variables(model):
    return [*model.variables, *model.optimizer.variables]


def values(model):
    return [v.numpy() for v in variables(model)]


def plain_fit(model, epochs=1):
    model.fit(X, Y, BATCH, epochs, shuffle=False, verbose=0)


class Stops(keras.callbacks.Callback):
    """Raises an error at one call of one hook."""

    def __init__(self, hook, at, error=RuntimeError):
        super().__init__()
        self.hook, self.left, self.error = hook, at, error

    def _called(self, hook):
        if hook == self.hook:
            self.left -= 1
            if self.left == 0:
                raise self.error(STOP)

    def on_train_begin(self, logs=None):
        self._called("on_train_begin")

    def on_epoch_begin(self, epoch, logs=None):
        self._called("on_epoch_begin")

    def on_train_batch_begin(self, batch, logs=None):
        self._called("on_train_batch_begin")

    def on_train_batch_end(self, batch, logs=None):
        self._called("on_train_batch_end")

    def on_test_batch_end(self, batch, logs=None):
        self._called("on_test_batch_end")

    def on_epoch_end(self, epoch, logs=None):
        self._called("on_epoch_end")

    def on_train_end(self, logs=None):
        self._called("on_train_end")


class Watch(keras.callbacks.Callback):
    """The weights that each epoch starts from, and what was learned at the end of each."""

    def __init__(self, callback):
        super().__init__()
        self.callback, self.starts = callback, []

    def learned(self):
        optimizer, callback = self.model.optimizer, self.callback
        outer = callback.outer_optimizer
        return (
            list(callback.history),
            # Before the first step there is no value.
            [raw.numpy() for raw in optimizer.raw_variables],
            [v.numpy() for v in outer.variables] if outer.built else [],
        )

    def on_train_begin(self, logs=None):
        self.train_function = self.model.train_function
        self.last = self.learned()

    def on_epoch_begin(self, epoch, logs=None):
        self.starts.append(self.model.get_weights())

    def on_epoch_end(self, epoch, logs=None):
        self.last = self.learned()

    def assert_nothing_lost(self):
        history, *numbers = self.last
        now, *numbers_now = self.learned()
        assert len(now) == len(history) and all(a is b for a, b in zip(now, history, strict=True))
        if numbers[0]:
            fits.assert_near(numbers_now, numbers, 0)


def assert_trains_as_if_never_tuned(model, twin, train=plain_fit):
    """The same as on a model that never saw a callback and is given the same state."""
    for mine, its in zip(variables(model), variables(twin), strict=True):
        its.assign(mine)
    train(model)
    train(twin)
    for mine, its in zip(values(model), values(twin), strict=True):
        np.testing.assert_array_equal(mine, its)


# Data that fails ------------------------------------------------------------------------------

FAILING = 5  # the batch, from 1, in the middle of the second epoch


class Counted:
    """Batches of the training data, of which one can't be read."""

    def __init__(self, looked_at=0):
        self.batches = -looked_at

    def __call__(self, i):
        self.batches += 1
        if self.batches == FAILING:
            raise RuntimeError(STOP)
        at = slice(BATCH * i, BATCH * (i + 1))
        return X[at], Y[at]


def generator():
    batch = Counted()
    while True:
        for i in range(STEPS):
            yield batch(i)


class Batches(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()
        self.batch = Counted(looked_at=2)  # by Keras, for their shapes

    def __len__(self):
        return STEPS

    def __getitem__(self, i):
        return self.batch(i)


def mapped():
    batch = Counted()

    def load(i):
        x, y = tf.py_function(lambda i: batch(int(i)), [i], [tf.float32, tf.int64])
        return tf.ensure_shape(x, (BATCH, 5)), tf.ensure_shape(y, (BATCH,))

    return tf.data.Dataset.range(STEPS).map(load)


DATA = {
    "generator": lambda: dict(x=generator(), steps_per_epoch=STEPS),
    "PyDataset": lambda: dict(x=Batches()),
    "py_function": lambda: dict(x=mapped()),
}
ARRAYS = dict(x=X, y=Y, batch_size=BATCH)


# Walking back fails ---------------------------------------------------------------------------


def fails_at(call, function, error):
    """The function, which raises at that call."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            raise error(STOP)
        return function(*args, **kwargs)

    return wrapped


WALKS = {  # at the second update
    "outer loss": (OuterLoss, "__call__", 2, KeyboardInterrupt),
    "reverse loop": (ReverseLoop, "walk", 2, RuntimeError),
    "reverse loop, by the user": (ReverseLoop, "walk", 2, KeyboardInterrupt),
    "packing": (batches, "pack", 2, MemoryError),
    "outer step": (outer, "update", 2, RuntimeError),
}


# ------------------------------------------------------------------------------------------------

HOOKS = {  # and whether the callback that raises stands in front of ours
    "train begin": ("on_train_begin", 1, False),
    "epoch begin": ("on_epoch_begin", 2, False),
    "batch begin": ("on_train_batch_begin", FAILING, False),
    "batch begin, in front": ("on_train_batch_begin", FAILING, True),
    "batch end": ("on_train_batch_end", FAILING, False),
    "validation": ("on_test_batch_end", 2, False),
    "epoch end": ("on_epoch_end", 2, False),
    "epoch end, in front": ("on_epoch_end", 2, True),
    "train end": ("on_train_end", 1, False),
}
MADE = {"train begin": 0, "epoch end": 2, "train end": 2}  # updates until then, where not 1
RESTARTED = ("batch end", "epoch end", "PyDataset", "reverse loop")
CASES = [(name, False) for name in (*HOOKS, *DATA, *WALKS)] + [(name, True) for name in RESTARTED]


@functools.cache
def used(restart):
    """One model and callback for all cases: what one leaves behind, the next would stumble on."""
    model = net()
    callback = kd.DrMADCallback(HYPER, trajectory="replay", restart=restart)
    first = model.get_weights()
    model.fit(X, Y, BATCH, 1, shuffle=False, verbose=0, callbacks=[callback])
    twin = net()
    twin.optimizer.build(twin.trainable_variables)
    return model, callback, first, twin


@pytest.mark.parametrize("name, restart", CASES)
def test_after_an_interruption(name, restart, monkeypatch):
    model, callback, first, twin = used(restart)
    error, data, watch = RuntimeError, ARRAYS, Watch(callback)
    callbacks = [callback, watch]
    if name in HOOKS:
        hook, at, in_front = HOOKS[name]
        error = KeyboardInterrupt if "batch" in name else RuntimeError
        callbacks.insert(0 if in_front else 2, Stops(hook, at, error))
    elif name in DATA:
        error, data = (tf.errors.OpError, RuntimeError), DATA[name]()
    else:
        holder, function, call, error = WALKS[name]
        monkeypatch.setattr(holder, function, fails_at(call, getattr(holder, function), error))
    before = list(callback.history)

    with pytest.raises(error, match=STOP):
        model.fit(**data, epochs=2, shuffle=False, verbose=0, callbacks=callbacks,
                  validation_data=HYPER, validation_batch_size=7)  # fmt: skip

    monkeypatch.undo()
    watch.assert_nothing_lost()
    assert len(callback.history) == len(before) + MADE.get(name, 1)
    assert "train_step" not in vars(model)

    assert_trains_as_if_never_tuned(model, twin)
    assert model.train_function is watch.train_function
    assert not isinstance(model.train_function, _StandIn)

    watch = Watch(callback)
    model.fit(X, Y, BATCH, shuffle=False, verbose=0, callbacks=[callback, watch])
    assert len(callback.history) == len(before) + MADE.get(name, 1) + 1
    assert all(a.outer_loss == b.outer_loss for a, b in zip(before, callback.history, strict=False))
    assert all(record.accepted for record in callback.history)
    assert [r.step for r in callback.history] == [
        STEPS * (i + 1) for i in range(len(callback.history))
    ]
    if restart:
        fits.assert_near(watch.starts, [first], 0)


# What else may come after an interruption ------------------------------------------------------


def test_interrupted_before_the_first_step():
    """Nothing was built yet: the fit that comes next builds it."""
    for hook in ("on_train_batch_begin", "on_train_batch_end"):
        fits.start()
        model = fits.compiled(keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(3)]))
        callback = kd.DrMADCallback(HYPER, trajectory="linear", restart=True)
        with pytest.raises(KeyboardInterrupt, match=STOP):
            stops = Stops(hook, 1, KeyboardInterrupt)
            model.fit(X, Y, BATCH, verbose=0, callbacks=[callback, stops])
        assert callback.history == []
        plain_fit(model)
        model.fit(X, Y, BATCH, 2, verbose=0, callbacks=[callback])
        assert [record.accepted for record in callback.history] == [True, True]


def test_training_by_hand_after_an_interruption():
    """`train_on_batch`, `evaluate` and a new `compile` find the model as if never tuned."""
    model, callback, _, twin = used(False)
    for train in (
        lambda model: model.train_on_batch(X, Y),
        lambda model: model.evaluate(X, Y, verbose=0),
        lambda model: model.compile(model.optimizer, model.loss, jit_compile=False),
    ):
        with pytest.raises(KeyboardInterrupt, match=STOP):
            stops = Stops("on_train_batch_begin", 2, KeyboardInterrupt)
            model.fit(X, Y, BATCH, verbose=0, callbacks=[callback, stops])
        assert isinstance(model.train_function, _StandIn)  # the hardest moment: armed, not called
        assert_trains_as_if_never_tuned(model, twin, train)
        assert_trains_as_if_never_tuned(model, twin)
        assert not isinstance(model.train_function, _StandIn)
    used.cache_clear()  # it is compiled anew


def test_another_callback_takes_over_after_an_interruption():
    """Tuned values stay with the model; the new callback begins a history of its own."""
    model = net()
    callback = kd.DrMADCallback(HYPER, trajectory="linear")
    with pytest.raises(RuntimeError, match=STOP):
        stops = Stops("on_train_batch_end", FAILING)
        model.fit(X, Y, BATCH, 2, verbose=0, callbacks=[callback, stops])
    tuned = [value.numpy() for value in model.optimizer.values()]
    assert all(np.any(a != b) for a, b in zip(tuned, first_values(callback), strict=True))
    other = kd.DrMADCallback(HYPER, trajectory="linear")
    model.fit(X, Y, BATCH, 1, verbose=0, callbacks=[other])
    assert len(callback.history) == len(other.history) == 1
    fits.assert_near(first_values(other), tuned, 0)


def first_values(callback):
    """What the first horizon was trained with, in the order of the optimizer's groups."""
    record = callback.history[0]
    return [
        np.asarray(record.hyperparameters[label.argument][label.layer])[None]
        for label in record.labels
    ]


def test_a_schedule_keeps_its_shape_after_an_interruption():
    """In the middle of a horizon: a plain fit goes on there, a tuned one begins anew."""
    fits.start()
    rate = kd.Hyperparameter(0.1, over="step")
    model = fits.compiled(
        keras.Sequential([keras.Input((5,)), layers.Dense(3)]),
        optimizer=fits.optimizer(learning_rate=rate),
    )
    callback = kd.DrMADCallback(HYPER, trajectory="replay")
    with pytest.raises(KeyboardInterrupt, match=STOP):
        stops = Stops("on_train_batch_end", FAILING, KeyboardInterrupt)
        model.fit(X, Y, BATCH, 2, verbose=0, callbacks=[callback, stops])
    assert int(model.optimizer.position) == FAILING - STEPS
    raw = model.optimizer.raw_variables[0].numpy()
    assert raw.shape == (STEPS,) and len(set(raw)) == STEPS
    plain_fit(model)
    np.testing.assert_array_equal(model.optimizer.raw_variables[0].numpy(), raw)
    model.fit(X, Y, BATCH, 1, verbose=0, callbacks=[callback])
    fits.assert_near(
        callback.history[1].hyperparameters["learning_rate"]["model"],
        model.optimizer.groups[0].domain.value(tf.constant(raw)).numpy(),
        0,
    )
    assert int(model.optimizer.position) == 0


@pytest.mark.parametrize("function", [kd.hypergradients, kd.verify_hypergradients])
def test_a_measurement_that_is_interrupted_moves_nothing(function):
    model = net()
    model.optimizer.build(model.trainable_variables)
    before = model.get_weights(), [v.numpy() for v in model.optimizer.raw_variables]
    for hook in ("on_train_batch_end", "on_epoch_end"):
        with pytest.raises(RuntimeError, match=STOP):
            function(model, X, Y, hyper_data=HYPER, batch_size=BATCH, callbacks=[Stops(hook, 1)])
        after = model.get_weights(), [v.numpy() for v in model.optimizer.raw_variables]
        fits.assert_near(after, before, 0)
        assert int(model.optimizer.iterations) == 0
