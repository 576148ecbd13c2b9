"""With the same seeds, two runs are the same bit by bit."""

import keras
import numpy as np
import tensorflow as tf

import keras_drmad as kd


def run():
    """Weights, values and hypergradients after three updates."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 6)).astype("float32"), rng.integers(0, 3, 60)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(3),
        ]
    )
    rate, l2 = kd.Hyperparameter(0.1, per="layer", over="step"), kd.Hyperparameter(0.01)
    model.compile(
        kd.optimizers.SGD(rate, momentum=0.9, l2=l2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    callback = kd.DrMADCallback((x[40:], y[40:]))
    model.fit(x[:40], y[:40], 8, epochs=3, verbose=0, callbacks=[callback])
    assert all(record.accepted for record in callback.history)
    records = [(r.outer_loss, r.hyperparameters, r.hypergradients) for r in callback.history]
    return [np.asarray(a) for a in (*model.get_weights(), *tf.nest.flatten(records))]


def test_two_runs_are_the_same(determinism):
    first, second = run(), run()
    assert len(first) == len(second) > 20
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
