"""The bound on Gauss-Newton products along a straight line: what explodes is held, the rest is not.

The net that explodes starts with small weights before BatchNormalization, which makes the loss's
curvature large there. Training leaves that place within a few steps; the line dwells on it.
"""

from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_drmad as kd
from keras_drmad import curvature

STEPS = 60
EVEN = kd.trajectories.Linear("steps")


def data(seed):
    x = np.random.default_rng(seed).normal(size=(24, 4))
    return x, (x @ [1.0, -1.0, 0.5, 0.2] > 0).astype("float64")[:, None]


def optimizer(name):
    tuned = dict(l2=kd.Hyperparameter(1e-4, per="input"))
    if name == "rmsprop":
        return kd.optimizers.RMSprop(kd.Hyperparameter(0.03), **tuned)
    if name == "adam":
        return kd.optimizers.Adam(kd.Hyperparameter(0.05), **tuned)
    rate = 0.5 if name in ("plain", "dampened") else 0.1
    if name != "plain":
        tuned.update(momentum=0.8, dampened=name == "dampened", nesterov=name == "nesterov")
    return kd.optimizers.SGD(kd.Hyperparameter(rate), **tuned)


def record(name, scale, trajectory, bounded=True):
    """One run of 60 steps from first weights that are scaled, and its hypergradients."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([
        keras.Input((4,)), layers.Dense(6, use_bias=False, name="first"),
        layers.BatchNormalization(), layers.Activation("tanh"), layers.Dense(1, name="second"),
    ])  # fmt: skip
    model.compile(optimizer(name), "mse", jit_compile=False)
    kernel = model.layers[0].kernel
    kernel.assign(scale * kernel)
    # Every batch, so that nothing but the path and the curvature is not exact.
    every = dict(max_batches=STEPS) if trajectory == "linear" else {}
    callback = kd.DrMADCallback(data(1), trajectory=trajectory, horizon=STEPS // 2, **every)
    free = mock.patch("keras_drmad.steps.bounded", lambda passed, curved, ceiling: curved)
    unguarded = mock.patch("keras_drmad.estimator.GROWTH_LIMIT", np.inf)
    if bounded:
        model.fit(*data(0), 12, STEPS // 2, shuffle=False, verbose=0, callbacks=[callback])
    else:
        with free, unguarded:
            model.fit(*data(0), 12, STEPS // 2, shuffle=False, verbose=0, callbacks=[callback])
    return callback.history[-1]


def norm(nested):
    return float(np.sqrt(sum(np.sum(np.square(x)) for x in tf.nest.flatten(nested))))


@pytest.mark.parametrize("scale", [0.3, 0.1])
def test_what_explodes_is_held(float64, scale):
    exact, line, free = (
        record("plain", scale, "replay"),
        record("plain", scale, EVEN),
        record("plain", scale, EVEN, bounded=False),
    )
    assert line.reason == "" and line.accepted
    for name in ("l2", "learning_rate"):
        truth = norm(exact.hypergradients[name])
        assert norm(free.hypergradients[name]) > 1e4 * truth
        assert 0.1 < norm(line.hypergradients[name]) / truth < 10.0


@pytest.mark.parametrize("name", ["momentum", "nesterov", "dampened", "adam", "rmsprop"])
def test_nothing_is_refused_by_any_rule(float64, name):
    found = record(name, 0.1, EVEN)
    assert found.reason == "" and np.isfinite(norm(found.hypergradients))


@pytest.mark.parametrize("name", ["plain", "momentum", "nesterov", "dampened", "adam"])
def test_a_run_that_does_not_explode_is_left_alone(float64, name):
    bounded, free = record(name, 1.0, EVEN), record(name, 1.0, EVEN, bounded=False)
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9),
        bounded.hypergradients, free.hypergradients,
    )  # fmt: skip


def test_never_on_an_exact_path(float64):
    refuse = mock.patch("keras_drmad.steps.bounded", side_effect=AssertionError)
    with refuse:
        for trajectory in ("replay", "stored"):
            record("plain", 0.3, trajectory)
        with pytest.raises(AssertionError):
            record("plain", 0.3, EVEN)


def scaled(passed, curved, ceiling=np.inf):
    """By how much the bound scales a product."""
    curved = tf.constant(curved, tf.float64)
    (found,) = curvature.bounded([tf.constant(passed, tf.float64)], [curved], ceiling)
    return (found / curved).numpy()


def test_the_formula():
    w = [3.0, 4.0]
    np.testing.assert_array_equal(scaled(w, [-6.0, -8.0]), 1.0)  # mu = -1: just stable
    np.testing.assert_allclose(scaled(w, [-9.0, -12.0]), 1 / 3)  # mu = -2: taken out
    np.testing.assert_array_equal(scaled(w, [4.0, -3.0]), 1.0)  # turning, as momentum does
    np.testing.assert_array_equal(scaled(w, [40.0, -30.0]), 0.0)
    np.testing.assert_array_equal(scaled(w, [3.0, 4.0], ceiling=11.0), 1.0)
    np.testing.assert_array_equal(scaled(w, [3.0, 4.0], ceiling=9.0), 0.0)  # 10 is too far up
    np.testing.assert_array_equal(scaled(w, [-3.0, -4.0], ceiling=1.0), 1.0)  # and down is not


def test_products_of_several_dtypes_and_of_zero():
    parts = [tf.zeros([2], tf.float32), tf.zeros([3], tf.float16)]
    for part, found in zip(parts, curvature.bounded(parts, parts, np.inf), strict=True):
        assert found.dtype == part.dtype and not np.any(found.numpy())
