"""The graphs are traced once, whatever the number of updates."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_drmad as kd

SMALLER_LAST = 50  # examples in batches of 8
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(50, 4)), rng.integers(0, 3, 50)
HYPER = rng.normal(size=(20, 4)), rng.integers(0, 3, 20)


@pytest.mark.parametrize(
    "arguments, examples, traces",
    [
        (dict(trajectory="linear"), 48, 1),
        (dict(trajectory="linear"), SMALLER_LAST, 1),
        (dict(trajectory="piecewise", window=0.7, reverse_steps=3), SMALLER_LAST, 1),
        (dict(trajectory="replay"), SMALLER_LAST, 1),
        (dict(trajectory="linear", horizon=2, restart=True, hyper_batch_size=8), SMALLER_LAST, 1),
        # Every state with the Hessian; and straight lines, with both curvatures.
        (dict(trajectory="auto"), SMALLER_LAST, 3),
    ],
    ids=["linear, even batches", "linear", "piecewise", "replay", "restart", "auto"],
)
def test_traced_once_for_several_updates_and_fits(arguments, examples, traces):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    rate = kd.Hyperparameter(0.1, per="layer", over="step")
    model.compile(
        kd.optimizers.SGD(rate, momentum=0.9, l2=kd.Hyperparameter(1e-3)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    callback = kd.DrMADCallback(HYPER, **arguments)
    for fits in (1, 2):
        model.fit(X[:examples], Y[:examples], 8, epochs=4, verbose=0, callbacks=[callback])
        assert len(callback.history) == 4 * fits // callback.horizon
        assert all(record.accepted for record in callback.history)
        assert 1 <= callback.traces <= traces
        # Batches of hyper data come in two sizes at most.
        assert 1 <= callback._outer_loss._gradient.experimental_get_tracing_count() <= 2


def test_several_callbacks_are_not_taken_for_retracing():
    """TensorFlow warns of a function that is traced in 5 of 10 calls, and counts by its code."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = tf.get_logger()
    logger.addHandler(handler)
    try:
        for _ in range(6):
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
            rate = kd.Hyperparameter(0.1)
            model.compile(kd.optimizers.SGD(rate), "mse", run_eagerly=True)
            callback = kd.DrMADCallback((HYPER[0], np.eye(3)[HYPER[1]]), trajectory="linear")
            model.fit(X[:8], np.eye(3)[Y[:8]], 8, verbose=0, callbacks=[callback])
            assert len(callback.history) == 1
    finally:
        logger.removeHandler(handler)
    assert not [text for text in said if "retracing" in text]
