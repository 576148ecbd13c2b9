"""Runs of six updates, and as a script: the same ones, taken up after the third.

    python stopped_runs.py FOLDER

goes on in each of the ways of `WAYS` from what `train` has left in the folder.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_drmad as kd

WAYS = ("keras", "checkpoint", "backup")
OPTIMIZERS = {
    "sgd": lambda: kd.optimizers.SGD(
        learning_rate=kd.Hyperparameter(0.2, per="layer", over="step"),
        momentum=kd.Hyperparameter(0.5),
        l2=kd.Hyperparameter(0.01, per="neuron"),
    ),
    "adam": lambda: kd.optimizers.Adam(
        learning_rate=kd.Hyperparameter(0.02, per="neuron", over=2),
        beta_1=kd.Hyperparameter(0.8),
        l1=kd.Hyperparameter(0.01),
    ),
}
STOP, EPOCHS = 3, 6  # an update after each epoch


def model_of(optimizer: str) -> keras.Model:
    """A net with dropout, whose seeds are part of what is kept."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, "tanh", name="first"),
            keras.layers.Dropout(0.2, name="dropout"),
            keras.layers.Dense(3, name="second"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[optimizer](), loss, jit_compile=False)
    return model


def fit(model: keras.Model, epochs: int = EPOCHS, callbacks=(), initial_epoch: int = 0):
    """Train, and return the callback that tuned."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(40, 4)).astype("float32"), rng.integers(0, 3, 40)
    tuning = kd.DrMADCallback((x[20:], y[20:]), trajectory="linear", curvature="gauss_newton")
    model.fit(
        x[:20], y[:20], batch_size=5, epochs=epochs, initial_epoch=initial_epoch, shuffle=False,
        verbose=0, callbacks=[tuning, *callbacks],
    )  # fmt: skip
    return tuning


def result(model: keras.Model, tuning: kd.DrMADCallback) -> dict[str, np.ndarray]:
    """Everything that a run ends with."""
    found = {}
    for name, variables in (
        ("model", model.variables),
        ("raw", model.optimizer.raw_variables),
        ("optimizer", model.optimizer.variables),
        ("outer", tuning.outer_optimizer.variables),
    ):
        found.update({f"{name}_{i}": np.array(v) for i, v in enumerate(variables)})
    for i, record in enumerate(tuning.history):
        found[f"outer_loss_{i}"] = np.array(record.outer_loss)
        found[f"step_{i}"] = np.array([record.step, record.epoch])
        for kind in ("hyperparameters", "hypergradients"):
            flat = kd.reports.flat(getattr(record, kind))
            found.update({f"{kind}_{i}/{path}": array for path, array in flat.items()})
    last = tuning.history[-1].initial_weights_gradient
    found.update({f"initial_{i}": array for i, array in enumerate(last)})
    return found


def train(optimizer: str, folder: Path) -> dict[str, np.ndarray]:
    """Train to the end, and on the way leave what a run that is killed after `STOP` has left."""

    class Leave(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == STOP:
                shutil.copytree(folder / "backup", folder / f"{optimizer}_backup")
                self.model.save(folder / f"{optimizer}.keras")
                tf.train.Checkpoint(model=self.model).write(folder / f"{optimizer}_checkpoint")

    model = model_of(optimizer)
    backup = keras.callbacks.BackupAndRestore(folder / "backup")
    return result(model, fit(model, callbacks=[backup, Leave()]))


def resume(optimizer: str, way: str, folder: Path) -> dict[str, np.ndarray]:
    """Train for the other half."""
    callbacks, first = [], STOP
    if way == "keras":
        model = keras.models.load_model(folder / f"{optimizer}.keras")
    else:
        model = model_of(optimizer)
    if way == "checkpoint":
        status = tf.train.Checkpoint(model=model).read(folder / f"{optimizer}_checkpoint")
    if way == "backup":
        callbacks, first = [keras.callbacks.BackupAndRestore(folder / f"{optimizer}_backup")], 0
    tuning = fit(model, callbacks=callbacks, initial_epoch=first)
    if way == "checkpoint":
        status.assert_consumed()
    return result(model, tuning)


def main(folder: Path) -> None:
    tf.config.experimental.enable_op_determinism()
    for optimizer in OPTIMIZERS:
        for way in WAYS:
            keras.backend.clear_session()
            keras.utils.set_random_seed(999)  # not that of the run
            found = resume(optimizer, way, folder)
            # Names of arrays may hold what a file's name may not.
            np.savez(folder / f"{optimizer}_{way}.npz", *found.values(), names=list(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
