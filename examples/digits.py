"""Handwritten digits: tune a learning-rate schedule per layer and an L2 penalty per input.

    python examples/digits.py

A small net is trained again and again from the same weights, on 300 images only and from a learning
rate that is much too low. After each training, DrMAD walks back through it and moves 240 learning
rates and 164 penalties at once. Printed: each update, and then the same training without tuning.
Pictures of what was learned go to `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras
import tensorflow_datasets as tfds

import keras_drmad as kd

DATA = Path(__file__).parent / "data"


def images(split: str):
    """Images as rows of 64 numbers between 0 and 1, and their labels."""
    data = tfds.load("digits", data_dir=DATA, split=split, as_supervised=True, batch_size=-1)
    x, y = tfds.as_numpy(data)
    return x.reshape(-1, 64) / 16.0, y


def compiled_net(learning_rate, l2, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(50, activation="tanh", name="hidden_1"),
            layers.Dense(50, activation="tanh", name="hidden_2"),
            layers.Dense(10, name="logits"),
        ]
    )
    model.compile(
        optimizer=kd.optimizers.SGD(learning_rate, momentum=0.9, l2=l2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    return model


class Table(keras.callbacks.Callback):
    """Prints a line an update; stands behind the DrMADCallback."""

    def __init__(self, drmad: kd.DrMADCallback):
        super().__init__()
        self.drmad, self.printed = drmad, 0

    def on_epoch_end(self, epoch, logs=None):
        history = self.drmad.history
        if len(history) == self.printed:
            return
        self.printed = len(history)
        if self.printed == 1:
            print("update  outer loss  validation accuracy  trained with")
        rates, penalties = (history[-1].hyperparameters[name] for name in ("learning_rate", "l2"))
        moved = "  ".join(f"{layer} {rate.mean():.4f}" for layer, rate in rates.items())
        low = min(values.min() for values in penalties.values())
        high = max(values.max() for values in penalties.values())
        print(
            f"{self.printed:>6}  {history[-1].outer_loss:>10.4f}  {logs['val_accuracy']:>19.1%}  "
            f"learning rate: {moved}  l2: {low:.1e} to {high:.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--horizon", type=int, default=8, help="epochs between two updates")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="where it starts")
    parser.add_argument("--l2", type=float, default=1e-4, help="where it starts")
    parser.add_argument("--trajectory", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the pictures go")
    arguments = parser.parse_args()

    x, y = images("train")
    train, hyper, validation = (x[:300], y[:300]), (x[300:800], y[300:800]), (x[800:], y[800:])
    test = images("test")  # seen once, at the end

    model = compiled_net(
        learning_rate=kd.Hyperparameter(arguments.learning_rate, per="layer", over="step"),
        l2=kd.Hyperparameter(arguments.l2, per="input"),
        seed=arguments.seed,
    )
    drmad = kd.DrMADCallback(
        hyper,
        outer_optimizer=keras.optimizers.Adam(0.15),
        horizon=arguments.horizon,
        restart=True,
        trajectory=arguments.trajectory,
    )
    fit = dict(batch_size=30, verbose=0, validation_data=validation)
    epochs = arguments.updates * arguments.horizon
    model.fit(*train, epochs=epochs, callbacks=[drmad, Table(drmad)], **fit)
    print()
    drmad.summary()

    untuned = compiled_net(arguments.learning_rate, arguments.l2, arguments.seed)
    untuned.fit(*train, epochs=arguments.horizon, **fit)
    print(f"\n{arguments.horizon} epochs from the same weights   hyper loss   test error")
    for name, net in (("as it started", untuned), ("tuned by DrMAD", model)):
        loss = net.evaluate(*hyper, verbose=0)[0]
        error = 1.0 - net.evaluate(*test, verbose=0)[1]
        print(f"{name:<32}  {loss:>10.4f}   {error:>10.1%}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "schedules": kd.plots.schedules(drmad.history, "learning_rate"),
        "penalties": kd.plots.penalties(drmad.history, "hidden_1", image_shape=(8, 8)),
        "outer_loss": kd.plots.outer_loss(drmad.history),
    }
    for name, figure in pictures.items():
        path = arguments.out / f"digits_{name}.png"
        figure.savefig(path)
        print(path)


if __name__ == "__main__":
    main()
