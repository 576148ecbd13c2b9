"""CIFAR-10: tune learning-rate schedules per layer and L2 per filter, while a conv net trains once.

    python examples/cifar10.py --data-dir DIR
    python examples/cifar10.py --data-dir DIR --model resnet20 --train 2000 --hyper 500

Training is not repeated here: after every epoch the hyperparameters move and training goes on, so
that a learning rate for each layer and epoch is learned on the way. The last third of each epoch is
walked back, exactly. Then the same net is trained for as many epochs without tuning, from the same
weights, on the same images; and once more with the hyper images, which tuning held out, added
to its training images. Printed is a table of the test accuracies; pictures go to `--out`, and
`--results` collects what several runs found in one JSON file.
"""

from __future__ import annotations

import argparse
import json
import time
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


# Nets -------------------------------------------------------------------------------------------


def convolution(x, filters: int, name: str, size: int = 3, strides: int = 1):
    """A convolution with BatchNormalization."""
    layers = keras.layers
    x = layers.Conv2D(
        filters, size, strides, padding="same", use_bias=False, name=f"conv_{name}"
    )(x)  # fmt: skip
    return layers.BatchNormalization(name=f"norm_{name}")(x)


def plain(x, groups: tuple[tuple[int, ...], ...]):
    """Groups of convolutions; behind each of them the image has half its size."""
    layers, count = keras.layers, 0
    for group in groups:
        for filters in group:
            count += 1
            x = layers.ReLU()(convolution(x, filters, str(count)))
        x = layers.MaxPooling2D()(x)
    return layers.Flatten()(x)


def cnn(x):
    """Three convolutions."""
    return plain(x, ((16,), (32,), (64,)))


def vgg(x):
    """Six convolutions in pairs and a wide layer before the classes, as in VGG."""
    return keras.layers.Dense(128, "relu", name="wide")(plain(x, ((16, 16), (32, 32), (64, 64))))


def resnet20(x):
    """ResNet-20 (He et al., 2016), with a convolution of size 1 where the width changes."""
    layers = keras.layers
    x = layers.ReLU()(convolution(x, 16, "0"))
    for stage, filters in enumerate((16, 32, 64), 1):
        for block in "abc":
            name, strides = f"{stage}{block}", 2 if stage > 1 and block == "a" else 1
            y = layers.ReLU()(convolution(x, filters, f"{name}_1", strides=strides))
            y = convolution(y, filters, f"{name}_2")
            if strides > 1:
                x = convolution(x, filters, f"{name}_skip", size=1, strides=strides)
            x = layers.ReLU()(layers.Add()([x, y]))
    return layers.GlobalAveragePooling2D()(x)


NETS = {"cnn": cnn, "vgg": vgg, "resnet20": resnet20}


def compiled_net(name: str, learning_rate, l2, seed: int, momentum: float = 0.99) -> keras.Model:
    """A net; `momentum` is that of the statistics that its normalization keeps for inference."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((32, 32, 3))
    features = NETS[name](keras.layers.Rescaling(1 / 127.5, offset=-1.0)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(10, name="logits")(features))
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = momentum
    model.compile(
        optimizer=kd.optimizers.SGD(learning_rate, momentum=0.9, l2=l2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    return model


# Training ---------------------------------------------------------------------------------------


def batches(data: tuple, batch_size: int, seed: int) -> tf.data.Dataset:
    dataset = tf.data.Dataset.from_tensor_slices(data).shuffle(len(data[0]), seed=seed)
    return dataset.batch(batch_size)


def trained(arguments, data: tuple, tuned: tuple | None = None) -> tuple[keras.Model, float]:
    """A net trained on data, and the seconds of the processors that took.

    `tuned` is what the example tunes with: the hyperparameters and the callback.
    """
    (rate, l2), callbacks = tuned or ((arguments.learning_rate, arguments.l2), [])
    net = compiled_net(arguments.model, rate, l2, arguments.seed, arguments.norm_momentum)
    started = time.process_time()
    net.fit(
        batches(data, arguments.batch_size, arguments.seed),
        epochs=arguments.epochs,
        shuffle=False,
        verbose=2 if callbacks else 0,
        callbacks=callbacks,
    )
    return net, time.process_time() - started


def tuning(arguments, hyper: tuple) -> tuple[tuple, list[kd.DrMADCallback]]:
    """What is tuned, and the callback that does it."""
    rate = kd.Hyperparameter(arguments.learning_rate, per="layer", over=arguments.over)
    l2 = kd.Hyperparameter(arguments.l2, per="neuron")
    callback = kd.DrMADCallback(
        hyper,
        outer_optimizer=keras.optimizers.Adam(arguments.outer_step),
        horizon=arguments.horizon,
        trajectory=arguments.trajectory,
        window=None if arguments.trajectory == "auto" else arguments.window,
    )
    return (rate, l2), [callback]


# What was found ---------------------------------------------------------------------------------


def schedules(drmad: kd.DrMADCallback) -> Figure:
    """The learning rate of each layer over the whole training."""
    rates = drmad.history[0].hyperparameters["learning_rate"]
    figure = Figure(figsize=(6, 4 + len(rates) // 20), layout="constrained")
    axes = figure.subplots()
    for layer in rates:
        values = [np.ravel(r.hyperparameters["learning_rate"][layer]) for r in drmad.history]
        edges = np.linspace(0, drmad.history[-1].epoch + 1, len(values) * len(values[0]) + 1)
        axes.stairs(np.concatenate(values), edges, baseline=None, label=layer)
    axes.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    if len(rates) <= 20:
        axes.legend()
    return figure


def learned(drmad: kd.DrMADCallback) -> dict:
    """How many numbers were tuned, and what became of the hyper loss and of the rates."""
    values = [record.hyperparameters for record in drmad.history]
    return {
        "tuned": sum(np.size(v) for of in values[0].values() for v in of.values()),
        "accepted": sum(record.accepted for record in drmad.history),
        "hyper_loss": [round(record.outer_loss, 4) for record in drmad.history],
        "learning_rate": {
            layer: [round(float(np.mean(v["learning_rate"][layer])), 5) for v in values]
            for layer in values[0]["learning_rate"]
        },
    }


def keep(path: Path, name: str, found: dict) -> None:
    """Put what a run found into a file of results, beside what is there."""
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**results, name: found}, indent=1, sort_keys=True) + "\n")


def grain(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="where TFDS finds or puts the data")
    parser.add_argument("--model", choices=NETS, default="cnn")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--horizon", type=int, default=1, help="epochs between two updates")
    parser.add_argument("--trajectory", default="replay")
    parser.add_argument("--window", type=float, default=0.3, help="part of the horizon walked back")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--train", type=int, default=18000, help="number of training images")
    parser.add_argument("--hyper", type=int, default=2000, help="number of hyper images")
    parser.add_argument("--test", type=int, help="number of test images; all of them if not given")
    parser.add_argument("--learning-rate", type=float, default=0.03, help="where it starts")
    parser.add_argument(
        "--over",
        default="run",
        type=grain,
        help="run, epoch, step or a number: of the rates in a horizon",
    )
    parser.add_argument("--l2", type=float, default=1e-4, help="where it starts")
    parser.add_argument("--norm-momentum", type=float, default=0.99, help="0.9 for short epochs")
    parser.add_argument("--outer-step", type=float, default=0.3, help="of the outer Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the pictures go")
    parser.add_argument("--results", type=Path, help="a JSON file to put what was found into")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    x, y = images(arguments.data_dir, "train")
    held = arguments.train + arguments.hyper
    if held > len(x):
        raise SystemExit(f"--train and --hyper ask for {held} images, there are {len(x)}")
    train = x[: arguments.train], y[: arguments.train]
    hyper = x[arguments.train : held], y[arguments.train : held]
    test = [a[: arguments.test] for a in images(arguments.data_dir, "test")]  # seen at the end

    tuned = tuning(arguments, hyper)
    drmad = tuned[1][0]
    nets = {"tuned by DrMAD": trained(arguments, train, tuned)}
    drmad.summary(by_layer=True)
    nets["untuned"] = trained(arguments, train)
    nets["untuned, hyper images added"] = trained(arguments, (x[:held], y[:held]))

    settings = {k: v for k, v in vars(arguments).items() if k not in ("data_dir", "out", "results")}
    found = {"settings": settings, **learned(drmad)}
    print(f"\nafter {arguments.epochs} epochs              images   test loss   test accuracy")
    for name, (net, seconds) in nets.items():
        count = held if "added" in name else arguments.train
        loss, accuracy = net.evaluate(*test, batch_size=500, verbose=0)
        print(f"{name:<28} {count:>8}   {loss:>9.3f}   {accuracy:>13.1%}")
        found[name] = {
            "images": count,
            "test_loss": round(loss, 4),
            "test_accuracy": round(accuracy, 4),
            "cpu_over_untuned": round(seconds / nets["untuned"][1], 2),
        }
    if arguments.results:
        name = f"{arguments.model}, momentum {arguments.norm_momentum}, seed {arguments.seed}"
        keep(arguments.results, name, found)

    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures = {"schedules": schedules(drmad), "outer_loss": kd.plots.outer_loss(drmad.history)}
    for name, figure in pictures.items():
        path = arguments.out / f"cifar10_{name}.png"
        figure.savefig(path)
        print(path)


if __name__ == "__main__":
    main()
