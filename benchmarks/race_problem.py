"""What is raced on: a small net, data, and the compute that is spent on it."""

from __future__ import annotations

import math
import pathlib
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import keras_drmad as kd

HERE = pathlib.Path(__file__).resolve().parent
BATCH = 50
CHANCE = math.log(10)  # what a diverged training counts as

LAYERS = ("hidden", "logits")
# (lowest, highest, start), of 1 - momentum likewise; all are searched on a logarithmic scale.
SPACE = {
    "learning_rate/hidden": (1e-3, 1.0, 0.01),
    "learning_rate/logits": (1e-3, 1.0, 0.01),
    "1 - momentum": (0.01, 0.5, 0.1),
    "l2/hidden": (1e-6, 1e-1, 1e-4),
    "l2/logits": (1e-6, 1e-1, 1e-4),
}
START = {key: first for key, (_, _, first) in SPACE.items()}
DATA = {"mnist": (784, 100, 5), "digits": (64, 50, 10)}  # inputs, hidden units, epochs


def images(name: str, mnist_file: str | None, seed: int):
    """Training, validation and test images and labels; a seed has its own training images."""
    if name == "mnist":
        with np.load(mnist_file) as file:
            x, y = file["x_train"].reshape(-1, 784) / np.float32(255), file["y_train"]
            test = file["x_test"].reshape(-1, 784) / np.float32(255), file["y_test"]
        sizes = 5000, 2000
    else:
        parts = [
            tfds.load("digits", data_dir=HERE.parent / "examples/data", split=split,
                      as_supervised=True, batch_size=-1)
            for split in ("train", "test")
        ]  # fmt: skip
        (x, y), test = [
            (p[0].numpy().reshape(-1, 64) / np.float32(16), p[1].numpy()) for p in parts
        ]
        sizes = 900, 300
    order = np.random.default_rng(seed).permutation(len(x))
    train, val = order[: sizes[0]], order[sizes[0] : sum(sizes)]
    return (x[train], y[train]), (x[val], y[val]), test


class Problem:
    """A net to train again and again from the same weights on the same batches.

    It counts what is spent: training steps, what a walk back costs in training steps, CPU seconds.
    """

    def __init__(self, name: str, seed: int, per: str, mnist_file: str | None):
        inputs, units, self.epochs = DATA[name]
        self.name, self.seed, self.per = name, seed, per
        (x, y), self.validation, self.test = images(name, mnist_file, seed)
        self.per_epoch = len(x) // BATCH
        self.steps = self.epochs * self.per_epoch
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(len(x)) for _ in range(self.epochs)])
        rows = tf.data.Dataset.from_tensor_slices(order.reshape(-1, BATCH)).repeat()
        x, y = tf.constant(x), tf.constant(y)
        self.batches = rows.map(lambda i: (tf.gather(x, i), tf.gather(y, i)))
        keras.utils.set_random_seed(seed)
        dense = keras.layers.Dense
        self.model = keras.Sequential([
            keras.Input((inputs,)),
            dense(units, activation="tanh", name="hidden"),
            dense(10, name="logits"),
        ])  # fmt: skip
        self.compile(kd.optimizers.SGD(
            kd.Hyperparameter({n: START[f"learning_rate/{n}"] for n in LAYERS}, per="layer"),
            momentum=kd.Hyperparameter(1.0 - START["1 - momentum"]),
            l2=kd.Hyperparameter({n: START[f"l2/{n}"] for n in LAYERS}, per=per),
        ))  # fmt: skip

    def compile(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,
        )
        optimizer.build(self.model.trainable_variables)
        self._tuned = {id(v) for v in getattr(optimizer, "raw_variables", ())}
        self._first = [(v, v.numpy()) for v in (*self.model.variables, *optimizer.variables)]
        # Tracing is not part of the race.
        self.begin()
        self.fit(1, [])
        self.loss()
        self.restart()
        self.begin()

    def begin(self) -> None:
        self.trained, self.walked, self.began = 0, 0.0, time.process_time()
        self.trials: list[list[float]] = []  # steps, with walks, CPU seconds, validation loss
        self.best, self.kept = math.inf, None

    def restart(self, tuned: bool = True) -> None:
        """Back to the first weights and an optimizer like new; with what is tuned, or without."""
        for variable, value in self._first:
            if tuned or id(variable) not in self._tuned:
                variable.assign(value)

    def set(self, values: dict[str, float]) -> None:
        """Take the values of a black box, which names them as `SPACE` does."""
        optimizer = self.model.optimizer
        for group, raw in zip(optimizer.groups, optimizer.raw_variables, strict=True):
            if group.argument == "momentum":
                value = 1.0 - values["1 - momentum"]
            else:
                value = values[f"{group.argument}/{group.key}"]
            raw.assign(np.full(raw.shape, group.domain.raw(value)))

    def fit(self, epochs: int, callbacks: list) -> None:
        history = self.model.fit(
            self.batches, epochs=epochs, steps_per_epoch=self.per_epoch, verbose=0,
            callbacks=callbacks, shuffle=False,
        )  # fmt: skip
        self.trained += len(history.epoch) * self.per_epoch

    def loss(self) -> float:
        x, y = self.validation
        loss = self.model.evaluate(x, y, batch_size=2000, verbose=0)[0]
        return min(loss, CHANCE) if math.isfinite(loss) else CHANCE

    def train(self, values: dict[str, float], pruning: Any = None) -> float:
        """A full training from the first weights; counts only if it is not ended earlier."""
        self.restart()
        self.set(values)
        self.fit(self.epochs, [pruning] if pruning else [])
        loss = self.loss()
        return loss if pruning and pruning.stopped else self.note(loss)

    def note(self, loss: float) -> float:
        """The validation loss of a finished training: one more point of the curve."""
        if loss < self.best:
            self.best, self.kept = loss, self.model.get_weights()
        seconds = time.process_time() - self.began
        self.trials.append([self.trained, self.trained + self.walked, seconds, loss])
        return loss

    @property
    def spent(self) -> float:
        return (self.trained + self.walked) / self.steps
