"""Small fits with the callback, and what two of them are compared by."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

import keras_drmad as kd

CLASSES = 3


class Checking(kd.DrMADCallback):
    """Hands its estimator to `Checked`."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.trajectory.estimator = self._estimator


class Checked(kd.trajectories.Stored):
    """Every state, and the same states recomputed from what was recorded: they must agree.

    So the recorded batches, seeds and learning rates are those of the training, and the reverse
    loop's training loss and update are those of `fit`.
    """

    def __init__(self, tolerance: float = 1e-9):
        super().__init__()
        self.tolerance, self.steps_checked = tolerance, 0

    def path(self):
        states, first, last = list(map(list, self.states)), self.times[0], self.times[-1]
        again = self.estimator.recompute(list(states[0]), first, last - first)
        moved = False
        for i, replayed in enumerate(again.arrays):
            stored = np.stack([state[i] for state in states])
            moved = moved or np.any(stored[0] != stored[-1])
            assert_near(replayed.numpy(), stored, self.tolerance)
        assert moved
        self.steps_checked += last - first
        return super().path()


def assert_near(found, expected, tolerance=1e-9) -> None:
    """Nested arrays agree, to a part of the largest entry of each."""
    tf.nest.assert_same_structure(found, expected)
    for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        assert np.shape(a) == np.shape(b)
        a, b = np.asarray(a, "float64"), np.asarray(b, "float64")  # older numpy: no bfloat16
        # What is zero but for rounding: sums of terms of about 1 differ by some 1e-16.
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b)), 1e-6))


def assert_same_updates(callback, other, tolerance=1e-9) -> None:
    """Two fits made the same updates, and some."""
    assert len(callback.history) == len(other.history) > 0
    for a, b in zip(callback.history, other.history, strict=True):
        assert a.accepted and b.accepted
        assert np.isfinite(a.outer_loss)
        assert_near(a.outer_loss, b.outer_loss, tolerance)
        for x, y in ((a.hyperparameters, b.hyperparameters), (a.hypergradients, b.hypergradients)):
            assert_near(x, y, tolerance)
        assert all(np.any(h != 0) for h in tf.nest.flatten(a.hypergradients))
        if a.initial_weights_gradient is not None:
            assert_near(a.initial_weights_gradient, b.initial_weights_gradient, tolerance)


def start(seed=0) -> None:
    """Seeds and names of layers as at the start of a test: for a second model that is the same."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed)


def optimizer(**arguments):
    """Momentum descent with a tuned learning rate and penalty."""
    tuned = dict(learning_rate=kd.Hyperparameter(0.1), l2=kd.Hyperparameter(0.01, per="layer"))
    return kd.optimizers.SGD(**{**tuned, "momentum": 0.5, **arguments})


def compiled(model, loss=None, **options):
    """The model, compiled; by default a plain graph, without XLA."""
    if loss is None:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"jit_compile": False, **options}
    options.setdefault("optimizer", optimizer())
    model.compile(loss=loss, **options)
    return model


def callback(hyper, **options):
    """An exact callback that also checks the recording."""
    trajectory = options.setdefault("trajectory", Checked())
    made = Checking if isinstance(trajectory, Checked) else kd.DrMADCallback
    return made(hyper, **options)


def examples(count, shape=(5,), seed=0, dtype="float64"):
    """Gaussian inputs and labels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *shape)).astype(dtype)
    return x, rng.integers(0, CLASSES, count)


def fixed_weights(model) -> None:
    """Weights that do not depend on what else was built before."""
    rng = np.random.default_rng(7)
    model.set_weights([rng.normal(0.0, 0.5, w.shape).astype(w.dtype) for w in model.get_weights()])


def evaluated(model, *data, **options) -> float:
    """What `model.evaluate` says the loss is."""
    return model.evaluate(*data, verbose=0, return_dict=True, **options)["loss"]


class Saved:
    """A model and its optimizer as they are now."""

    def __init__(self, model):
        self.values = [(v, v.numpy()) for v in (*model.variables, *model.optimizer.variables)]

    def restore(self) -> None:
        for variable, value in self.values:
            variable.assign(value)


def assert_derivative(model, saved, record, train, outer, tolerance=1e-6, step=1e-5) -> None:
    """The record agrees with central differences of the whole training along one direction.

    Args:
        model: A model whose tuned values are all positive and of per="model" or "layer".
        saved: Model and optimizer as they were before the horizon of the record.
        record: The record.
        train: Trains through that horizon without the callback.
        outer: The outer loss now.
        tolerance: Relative.
        step: Of the differences, in raw values.
    """
    optimizer = model.optimizer
    rng = np.random.default_rng(5)
    directions = [rng.normal(size=raw.shape) for raw in optimizer.raw_variables]
    expected = 0.0
    for sign in (1, -1):
        saved.restore()
        for raw, direction in zip(optimizer.raw_variables, directions, strict=True):
            raw.assign_add(sign * step * direction)
        train()
        expected += sign * outer() / (2 * step)
    found = 0.0
    for group, direction in zip(optimizer.groups, directions, strict=True):
        value = record.hyperparameters[group.argument][group.key]
        slope = record.hypergradients[group.argument][group.key]
        found += np.sum(slope * value * direction)  # values are tuned as logarithms
    np.testing.assert_allclose(found, expected, rtol=tolerance)
