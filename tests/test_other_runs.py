"""A replay that is not the run that happened is told apart, and moves nothing."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_drmad as kd
from keras_drmad.reverse import ReverseLoop

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6)).astype("float32")
Y = RNG.integers(0, 3, 48)
HYPER = RNG.normal(size=(16, 6)).astype("float32"), RNG.integers(0, 3, 16)
MISSED = "replayed training missed where training went"


class Unseeded(layers.Layer):
    """Multiplies by noise that no seed generator knows of."""

    def call(self, x):
        return x * (1.0 + tf.random.normal(tf.shape(x)))


class Sets(keras.callbacks.Callback):
    """Sets the weights in the middle of an epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            self.model.set_weights([w + 0.5 for w in self.model.get_weights()])


def fit(
    *inner,
    trajectory="replay",
    callbacks=(),
    policy="float32",
    compiled=False,
    fit_compiled=False,
    **options,
):
    """The record of one update."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, "tanh", dtype=policy),
            *inner,
            layers.Dense(3, dtype=policy),
        ]
    )
    model.compile(
        kd.optimizers.SGD(0.1, momentum=0.9, l2=kd.Hyperparameter(1e-3)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=fit_compiled,
    )
    callback = kd.DrMADCallback(HYPER, trajectory=trajectory, jit_compile=compiled, **options)
    model.fit(X, Y, batch_size=6, epochs=1, verbose=0, callbacks=[callback, *callbacks])
    return callback.history[-1]


@pytest.mark.parametrize(
    "arguments",
    [dict(inner=[Unseeded()]), dict(callbacks=[Sets()])],
    ids=["unseeded noise", "a callback that sets weights"],
)
@pytest.mark.parametrize("trajectory", ["replay", "auto", "stored"])
def test_is_skipped_with_the_reason(arguments, trajectory):
    inner = arguments.get("inner", ())
    with pytest.warns(UserWarning, match=MISSED):
        record = fit(*inner, trajectory=trajectory, callbacks=arguments.get("callbacks", ()))
    assert not record.accepted and MISSED in record.reason
    assert "SeedGenerator" in record.reason and "trajectory='linear'" in record.reason


@pytest.mark.parametrize("reverse_steps", [2, 3])
def test_also_where_few_steps_are_visited(reverse_steps):
    with pytest.warns(UserWarning, match=MISSED):
        assert not fit(Unseeded(), reverse_steps=reverse_steps).accepted


def test_what_replays_nothing_goes_on():
    assert fit(callbacks=[Sets()], trajectory="linear").accepted
    assert fit(Unseeded(), trajectory="linear").accepted


@pytest.mark.parametrize("compiled", [False, True])
def test_rounding_is_no_other_run(compiled):
    assert fit(layers.BatchNormalization(), compiled=compiled).accepted


@pytest.mark.parametrize("fit_compiled", [False, True])
def test_half_precision_is_walked_as_it_was_trained(fit_compiled, monkeypatch):
    found = []
    walk = ReverseLoop.walk

    def spy(self, *args):
        found.append((self.jit_compile, walk(self, *args)))
        return found[-1][1]

    monkeypatch.setattr(ReverseLoop, "walk", spy)
    assert fit(policy="mixed_bfloat16", compiled="auto", fit_compiled=fit_compiled).accepted
    assert {compiled for compiled, _ in found} == {fit_compiled}
    assert max(walked.missed for _, walked in found) < 1e-4


def test_seeded_noise_is_replayed():
    assert fit(layers.GaussianNoise(1.0), layers.Dropout(0.5)).accepted
