"""MNIST: a learning rate and a momentum for every layer and every step of the training.

A net of 784-50-50-50-10 units is trained for 200 steps, each time from new initial weights. DrMAD
walks back through the steps exactly (`--trajectory replay`) and moves 800 learning rates and 800
momenta at once.

    python examples/mnist_schedules.py --data-dir DIR
    python examples/mnist_schedules.py --data-dir DIR --trajectory linear --verify-every 5
    python examples/mnist_schedules.py --data-dir DIR --per model --over run

The second line walks along the straight line instead, and tells how that agrees with the exact
hypergradient; the third tunes one rate and one momentum for the whole training, to compare with.
Printed is the test error of every net that was trained; pictures go to `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras
import numpy as np
import tensorflow_datasets as tfds
from matplotlib.figure import Figure

import keras_drmad as kd


def images(data_dir: str | None, train: int, hyper: int) -> list[tuple]:
    """Training, hyper and test images, less the mean training image, and their labels."""
    parts = []
    for split in (f"train[:{train}]", f"train[{train}:{train + hyper}]", "test"):
        data = tfds.load("mnist", data_dir=data_dir, split=split, as_supervised=True, batch_size=-1)
        x, y = tfds.as_numpy(data)
        parts.append((x.reshape(len(x), 784).astype("float32") / 255.0, y))
    if len(parts[1][0]) < hyper:
        raise SystemExit(f"--train and --hyper ask for {train + hyper} images: too many")
    mean = parts[0][0].mean(0)
    return [(x - mean, y) for x, y in parts]


def compiled_net(arguments: argparse.Namespace) -> keras.Model:
    def tuned(initial: float) -> kd.Hyperparameter:
        return kd.Hyperparameter(initial, per=arguments.per, over=arguments.over)

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(50, activation="tanh", name="hidden_1"),
            layers.Dense(50, activation="tanh", name="hidden_2"),
            layers.Dense(50, activation="tanh", name="hidden_3"),
            layers.Dense(10, name="logits"),
        ]
    )
    model.compile(
        optimizer=kd.optimizers.SGD(
            learning_rate=tuned(arguments.learning_rate),
            momentum=tuned(arguments.momentum),
            dampened=True,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=arguments.jit,
    )
    return model


class Watch(keras.callbacks.Callback):
    """The test error of every trained net; stands behind DrMADCallback."""

    def __init__(self, drmad: kd.DrMADCallback, epochs: int, test: tuple):
        super().__init__()
        self.drmad, self.epochs, self.test = drmad, epochs, test
        self.errors: list[float] = []

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.epochs:
            return
        found = self.model.evaluate(*self.test, batch_size=1000, verbose=0, return_dict=True)
        self.errors.append(1.0 - found["accuracy"])
        record = self.drmad.history[-1]
        line = f"{len(self.errors) - 1:>6} updates: outer loss {record.outer_loss:.4f}, "
        line += f"test error {self.errors[-1]:.2%} {record.reason}"
        for name, agreement in (record.verification or {}).items():
            line += f"  {name}: cosine {agreement['cosine']:.2f}"
        print(line, flush=True)


def trajectory(arguments: argparse.Namespace) -> str | kd.trajectories.Trajectory:
    if arguments.trajectory == "linear":
        return kd.trajectories.Linear(arguments.pace or "distance")
    if arguments.pace:
        raise SystemExit("--pace is that of --trajectory linear.")
    return arguments.trajectory


def run(arguments: argparse.Namespace, data: list[tuple]) -> tuple[kd.DrMADCallback, Watch]:
    """Tune once; one horizon more than updates, since that trains with the result of the last."""
    train, hyper, test = data
    keras.utils.set_random_seed(arguments.seed)
    drmad = kd.DrMADCallback(
        hyper,
        outer_optimizer=keras.optimizers.Adam(arguments.outer_step),
        horizon=arguments.epochs,
        restart="fresh",
        trajectory=trajectory(arguments),
        verify_every=arguments.verify_every,
        jit_compile=arguments.jit,
    )
    watch = Watch(drmad, arguments.epochs, test)
    compiled_net(arguments).fit(
        *train,
        batch_size=arguments.batch_size,
        epochs=(arguments.updates + 1) * arguments.epochs,
        verbose=0,
        callbacks=[drmad, watch],
    )
    return drmad, watch


def schedules(hyperparameters: dict) -> Figure:
    """Learning rates and momenta of each layer over the steps; thick, the mean of ten steps."""
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, argument in zip(panels, ("learning_rate", "momentum"), strict=True):
        for i, (layer, values) in enumerate(hyperparameters[argument].items()):
            values = np.atleast_1d(values)
            count = min(10, len(values))
            mean = np.convolve(values, np.full(count, 1 / count), "valid")
            steps = np.arange(len(values) + 1)
            axes.stairs(values, steps, baseline=None, color=f"C{i}", alpha=0.25)
            axes.plot(np.arange(len(mean)) + count / 2, mean, color=f"C{i}", label=layer)
        axes.set(xlabel="step", title=argument.replace("_", " "))
    panels[0].set_yscale("log")
    panels[0].legend(fontsize="small")
    return figure


def draw(drmad: kd.DrMADCallback, watch: Watch, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "schedules": schedules(drmad.history[-1].hyperparameters),
        "schedules_test_error": kd.plots.outer_loss(drmad.history, test_error=watch.errors),
    }
    for name, figure in pictures.items():
        path = out / f"mnist_{name}.png"
        figure.savefig(path)
        print(path)


def grain(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="where TFDS finds or puts MNIST")
    parser.add_argument("--per", default="layer", help="grain in space of rates and momenta")
    parser.add_argument("--over", default="step", type=grain, help="their grain in time")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=1, help="of one training, one horizon")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--train", type=int, default=10000, help="number of training images")
    parser.add_argument("--hyper", type=int, default=3000, help="number of hyper images")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="where it starts")
    parser.add_argument("--momentum", type=float, default=0.5, help="likewise; dampened")
    parser.add_argument("--outer-step", type=float, default=0.1, help="of the outer Adam")
    parser.add_argument("--trajectory", default="replay")
    parser.add_argument(
        "--pace",
        default=None,
        choices=("distance", "steps"),
        help="of the straight line: as fast as the run went (default), or even, as published",
    )
    parser.add_argument("--verify-every", type=int, default=None, help="updates")
    parser.add_argument(
        "--jit", action=argparse.BooleanOptionalAction, default=True, help="compile by XLA"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the pictures go")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    data = images(arguments.data_dir, arguments.train, arguments.hyper)
    drmad, watch = run(arguments, data)
    drmad.summary()
    print(f"test error: {watch.errors[0]:.2%} at the start, ", end="")
    print(f"{watch.errors[-1]:.2%} after {arguments.updates} updates")
    draw(drmad, watch, arguments.out)


if __name__ == "__main__":
    main()
