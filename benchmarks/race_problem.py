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

LAYERS = ("hidden", "logits")  # of a convolutional net, all hidden layers are taken as one
# (lowest, highest, start), of 1 - momentum likewise; all are searched on a logarithmic scale.
SPACE = {
    "learning_rate/hidden": (1e-3, 1.0, 0.01),
    "learning_rate/logits": (1e-3, 1.0, 0.01),
    "1 - momentum": (0.01, 0.5, 0.1),
    "l2/hidden": (1e-6, 1e-1, 1e-4),
    "l2/logits": (1e-6, 1e-1, 1e-4),
}
START = {key: first for key, (_, _, first) in SPACE.items()}
# shape of an image, hidden units or filters, epochs, training and validation images
DATA = {
    "mnist": ((784,), (100,), 5, 5000, 2000),
    "digits": ((64,), (50,), 10, 900, 300),
    "cifar10": ((32, 32, 3), (16, 32), 5, 2000, 1000),
}


def images(name: str, source: str | None, seed: int):
    """Training, validation and test images and labels; a seed has its own training images.

    Args:
        name: Of the data.
        source: The file mnist.npz, or the folder where TFDS finds or puts CIFAR-10.
        seed: Draws training and validation images.
    """
    if name == "mnist":
        with np.load(source) as file:
            x, y = file["x_train"].reshape(-1, 784) / np.float32(255), file["y_train"]
            test = file["x_test"].reshape(-1, 784) / np.float32(255), file["y_test"]
    else:
        folder = HERE.parent / "examples/data" if name == "digits" else source
        parts = [
            tfds.load(name, data_dir=folder, split=split, as_supervised=True, batch_size=-1)
            for split in ("train", "test")
        ]
        shape, largest = (-1, *DATA[name][0]), np.float32(16 if name == "digits" else 255)
        (x, y), test = [(p[0].numpy().reshape(shape) / largest, p[1].numpy()) for p in parts]
        if name == "cifar10":
            x, test = x - np.float32(0.5), (test[0] - np.float32(0.5), test[1])
    sizes = DATA[name][3:]
    order = np.random.default_rng(seed).permutation(len(x))
    train, val = order[: sizes[0]], order[sizes[0] : sum(sizes)]
    return (x[train], y[train]), (x[val], y[val]), test


def layers(name: str) -> list[keras.layers.Layer]:
    """The layers of a net; their names begin with one of `LAYERS`."""
    shape, units = DATA[name][:2]
    if len(shape) == 1:
        hidden = [keras.layers.Dense(units[0], activation="tanh", name="hidden")]
    else:
        hidden = [
            keras.layers.Conv2D(filters, 3, 2, "same", activation="relu", name=f"hidden_{i}")
            for i, filters in enumerate(units, start=1)
        ] + [keras.layers.Flatten()]
    return [keras.Input(shape), *hidden, keras.layers.Dense(10, name="logits")]


def key_of(group: Any) -> str:
    """What `SPACE` calls a group of tuned values of the optimizer."""
    if group.argument == "momentum":
        return "1 - momentum"
    layer = next(layer for layer in LAYERS if group.key.startswith(layer))
    return f"{group.argument}/{layer}"


class Problem:
    """A net to train again and again from the same weights on the same batches.

    It counts what is spent: training steps, what a walk back costs in training steps, CPU seconds.
    """

    def __init__(self, name: str, seed: int, per: str, source: str | None):
        self.epochs = DATA[name][2]
        self.name, self.seed, self.per = name, seed, per
        (x, y), self.validation, self.test = images(name, source, seed)
        self.per_epoch = len(x) // BATCH
        self.steps = self.epochs * self.per_epoch
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(len(x)) for _ in range(self.epochs)])
        rows = tf.data.Dataset.from_tensor_slices(order.reshape(-1, BATCH)).repeat()
        x, y = tf.constant(x), tf.constant(y)
        self.batches = rows.map(lambda i: (tf.gather(x, i), tf.gather(y, i)))
        keras.utils.set_random_seed(seed)
        self.model = keras.Sequential(layers(name))
        of_layers = {f"{layer}*": layer for layer in LAYERS}

        def one_a_layer(argument: str) -> dict[str, kd.Hyperparameter]:
            return {
                pattern: kd.Hyperparameter(START[f"{argument}/{layer}"])
                for pattern, layer in of_layers.items()
            }

        per_neuron = {pattern: START[f"l2/{layer}"] for pattern, layer in of_layers.items()}
        self.compile(kd.optimizers.SGD(
            one_a_layer("learning_rate"),
            momentum=kd.Hyperparameter(1.0 - START["1 - momentum"]),
            l2=kd.Hyperparameter(per_neuron, per=per) if per == "neuron" else one_a_layer("l2"),
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
            value = values[key_of(group)]
            value = 1.0 - value if group.argument == "momentum" else value
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
