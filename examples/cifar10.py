"""CIFAR-10: tune learning-rate schedules per layer and L2 per filter, while a conv net trains once.

    python examples/cifar10.py --data-dir DIR

Training is not repeated here: after every epoch the hyperparameters move and training goes on, so
that a learning rate for each layer and epoch is learned on the way. The last third of each epoch is
walked back, exactly. Then the same net is trained for as many epochs without tuning, from the same
weights, on the same images; and once more with the hyper images, which tuning held out, added
to its training images. Printed is a table of the test accuracies; pictures go to `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from matplotlib.figure import Figure

import keras_drmad as kd


def images(data_dir: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images as they are stored (uint8), and their labels."""
    data = tfds.load("cifar10", data_dir=data_dir, split=split, as_supervised=True, batch_size=-1)
    return tfds.as_numpy(data)


def compiled_net(learning_rate, l2, seed: int) -> keras.Model:
    """Three convolutions with BatchNormalization."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    blocks = []
    for i, filters in enumerate((16, 32, 64), 1):
        blocks += [
            layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv_{i}"),
            layers.BatchNormalization(name=f"norm_{i}"),
            layers.ReLU(),
            layers.MaxPooling2D(),
        ]
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Rescaling(1 / 127.5, offset=-1.0),
            *blocks,
            layers.Flatten(),
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


def batches(data: tuple, batch_size: int, seed: int) -> tf.data.Dataset:
    dataset = tf.data.Dataset.from_tensor_slices(data).shuffle(len(data[0]), seed=seed)
    return dataset.batch(batch_size)


def grain(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def schedules(drmad: kd.DrMADCallback) -> Figure:
    """The learning rate of each layer over the whole training."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for layer in drmad.history[0].hyperparameters["learning_rate"]:
        values = [np.ravel(r.hyperparameters["learning_rate"][layer]) for r in drmad.history]
        edges = np.linspace(0, drmad.history[-1].epoch + 1, len(values) * len(values[0]) + 1)
        axes.stairs(np.concatenate(values), edges, baseline=None, label=layer)
    axes.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="where TFDS finds or puts the data")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--horizon", type=int, default=1, help="epochs between two updates")
    parser.add_argument("--trajectory", default="replay")
    parser.add_argument("--window", type=float, default=0.3, help="part of the horizon walked back")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--train", type=int, default=18000, help="number of training images")
    parser.add_argument("--hyper", type=int, default=2000, help="number of hyper images")
    parser.add_argument("--learning-rate", type=float, default=0.03, help="where it starts")
    parser.add_argument(
        "--over",
        default="run",
        type=grain,
        help="run, epoch, step or a number: of the rates in a horizon",
    )
    parser.add_argument("--l2", type=float, default=1e-4, help="where it starts")
    parser.add_argument("--outer-step", type=float, default=0.3, help="of the outer Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the pictures go")
    arguments = parser.parse_args()
    seed, size = arguments.seed, arguments.batch_size

    x, y = images(arguments.data_dir, "train")
    held = arguments.train + arguments.hyper
    if held > len(x):
        parser.error(f"--train and --hyper ask for {held} images, there are {len(x)}")
    train = x[: arguments.train], y[: arguments.train]
    hyper = x[arguments.train : held], y[arguments.train : held]
    everything = x[:held], y[:held]
    test = images(arguments.data_dir, "test")  # seen once, at the end

    model = compiled_net(
        learning_rate=kd.Hyperparameter(arguments.learning_rate, per="layer", over=arguments.over),
        l2=kd.Hyperparameter(arguments.l2, per="neuron"),
        seed=seed,
    )
    drmad = kd.DrMADCallback(
        hyper,
        outer_optimizer=keras.optimizers.Adam(arguments.outer_step),
        horizon=arguments.horizon,
        trajectory=arguments.trajectory,
        window=None if arguments.trajectory == "auto" else arguments.window,
    )
    model.fit(
        batches(train, size, seed),
        epochs=arguments.epochs,
        shuffle=False,
        verbose=2,
        callbacks=[drmad],
    )
    drmad.summary(by_layer=True)

    rows = [("tuned by DrMAD", len(train[0]), model)]
    for name, data in (("untuned", train), ("untuned, hyper images added", everything)):
        net = compiled_net(arguments.learning_rate, arguments.l2, seed)
        net.fit(batches(data, size, seed), epochs=arguments.epochs, shuffle=False, verbose=0)
        rows.append((name, len(data[0]), net))
    print(f"\nafter {arguments.epochs} epochs              images   test loss   test accuracy")
    for name, count, net in rows:
        loss, accuracy = net.evaluate(*test, batch_size=500, verbose=0)
        print(f"{name:<28} {count:>8}   {loss:>9.3f}   {accuracy:>13.1%}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures = {"schedules": schedules(drmad), "outer_loss": kd.plots.outer_loss(drmad.history)}
    for name, figure in pictures.items():
        path = arguments.out / f"cifar10_{name}.png"
        figure.savefig(path)
        print(path)


if __name__ == "__main__":
    main()
