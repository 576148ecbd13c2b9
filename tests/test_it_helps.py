"""On real data, from a poor start, tuning lowers the outer loss and the test error."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import keras_drmad as kd

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent.parent / "examples" / "data"
TRAIN, HYPER, TEST = slice(0, 300), slice(300, 1000), slice(1000, None)
UPDATES = 20


@pytest.fixture(scope="module")
def digits():
    parts = [
        tfds.as_numpy(
            tfds.load("digits", data_dir=DATA, split=split, as_supervised=True, batch_size=-1)
        )
        for split in ("train", "test")
    ]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return x.reshape(-1, 64).astype("float32") / 16, y


def too_low_a_rate():
    # A tenth of what serves this net well.
    return kd.optimizers.SGD(kd.Hyperparameter(0.01, per="layer", over="step"), momentum=0.9)


def no_penalty():
    return kd.optimizers.SGD(0.05, momentum=0.9, l2=kd.Hyperparameter(1e-6, per="neuron"))


# All of range(5) pass, both here and below; some are left out for time.
@pytest.mark.parametrize("seed", range(3))
def test_it_helps_a_rate_that_is_too_low(digits, seed):
    assert_twenty_updates_help(digits, too_low_a_rate, 0.15, 10, 0.1, "auto", seed)


@pytest.mark.parametrize("seed", range(2))
def test_it_helps_where_no_penalty_is(digits, seed):
    # First weights so large that the net memorises unless it is penalised.
    assert_twenty_updates_help(digits, no_penalty, 0.6, 40, 1.0, "linear", seed)


def assert_twenty_updates_help(
    digits, optimizer, first_weights, passes, outer_step, trajectory, seed
):
    x, y = digits
    keras.utils.set_random_seed(seed)

    def dense(units, activation=None):
        first = keras.initializers.RandomNormal(stddev=first_weights)
        return keras.layers.Dense(units, activation, kernel_initializer=first)

    model = keras.Sequential([keras.Input((64,)), dense(50, "tanh"), dense(50, "tanh"), dense(10)])
    model.compile(
        optimizer(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    callback = kd.DrMADCallback(
        (x[HYPER], y[HYPER]),
        outer_optimizer=keras.optimizers.Adam(outer_step),
        restart=True,
        trajectory=trajectory,
    )

    # All passes through the data are one epoch: Keras takes longer to begin an epoch than for ten
    # steps of this net.
    batches = tf.data.Dataset.from_tensor_slices((x[TRAIN], y[TRAIN])).shuffle(300, seed=seed)
    batches = batches.batch(50).repeat(passes)

    def train_and_test(horizons):
        model.fit(batches, epochs=horizons, verbose=0, callbacks=[callback])
        return 1.0 - model.evaluate(x[TEST], y[TEST], 1000, verbose=0)[1]

    # The first horizon is trained with what it starts from, the last with twenty updates.
    untuned = train_and_test(1)
    tuned = train_and_test(UPDATES)
    losses = [record.outer_loss for record in callback.history]
    assert len(losses) == UPDATES + 1
    assert all(record.accepted for record in callback.history)
    assert losses[-1] <= 0.75 * losses[0]
    assert tuned < untuned
