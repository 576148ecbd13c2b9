"""MNIST: an L2 penalty for every input of every layer, from a start that is far too strong.

The experiment of the DrMAD paper, with the settings of its published code: a net of 784-50-50-50-10
units is trained for 2,000 steps, DrMAD walks back through them, and every penalty moves by one step
of the same size; twenty times over, each time from new initial weights.

    python examples/mnist.py --data-dir DIR
    python examples/mnist.py --data-dir DIR --tune scales --outer sign:0.07

The published code tunes the penalties through a scale in front of every input: the weights are
w = scale * z, and the penalty exp(-4) z^2 stays. So the L2 of w is 2 exp(-4) / scale^2; a step of
0.07 in the scale's logarithm is one of 0.14 in that of L2; and a larger scale is also a larger
learning rate of w, by scale^2. `--tune scales` does the same. `--tune l2`, the default, starts from
the same weights, penalties and rates, and tunes the penalties alone. Printed is the test error of
every net that was trained; pictures go to `--out`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from matplotlib.figure import Figure

import keras_drmad as kd

INITIAL = np.exp(-3.0)  # standard deviation of z at first


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


def compiled_net(arguments: argparse.Namespace) -> tuple[keras.Model, list]:
    """The net and the layers to be tuned: the scales, or none where the optimizer has it all."""
    scaled = arguments.tune == "scales"
    rate, l2 = arguments.learning_rate, 2 * np.exp(arguments.log_penalty)  # p z^2 is l2/2 z^2
    scale = float(np.exp(arguments.log_scale))
    initial = INITIAL if scaled else INITIAL * scale
    layers, scales = [keras.Input((784,))], []
    for name, units in (("hidden_1", 50), ("hidden_2", 50), ("hidden_3", 50), ("logits", 10)):
        if scaled:
            scales.append(kd.layers.FeatureWeights(scale, "positive", name=f"{name}_scale"))
            layers.append(scales[-1])
        layers.append(
            keras.layers.Dense(
                units,
                activation=None if name == "logits" else "tanh",
                kernel_initializer=keras.initializers.RandomNormal(stddev=float(initial)),
                name=name,
            )
        )
    model = keras.Sequential(layers, name="net")
    model.compile(
        optimizer=kd.optimizers.SGD(
            learning_rate=rate if scaled else float(rate * scale**2),
            momentum=arguments.momentum,
            dampened=True,
            l2=float(l2) if scaled else kd.Hyperparameter(float(l2 / scale**2), per="input"),
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=arguments.jit,
    )
    return model, scales


class Split(keras.callbacks.Callback):
    """Training and hyper images that are drawn anew from all of them before each training."""

    def __init__(self, train: tuple, hyper: tuple, epochs: int, seed: int):
        super().__init__()
        pairs = zip(train, hyper, strict=True)
        self.data = [tf.constant(np.concatenate(pair)) for pair in pairs]
        self.counts, self.epochs = (len(train[0]), len(hyper[0])), epochs
        self.generator = np.random.default_rng(seed)
        self.order = tf.Variable(np.arange(sum(self.counts)))

    def on_epoch_begin(self, epoch, logs=None):
        if epoch % self.epochs == 0:
            self.order.assign(self.generator.permutation(sum(self.counts)))

    def _at(self, positions: tf.data.Dataset) -> tf.data.Dataset:
        def images(i):
            rows = tf.gather(self.order, i)
            return tuple(tf.gather(array, rows) for array in self.data)

        return positions.map(images)

    def train(self, batch_size: int) -> tf.data.Dataset:
        return self._at(
            tf.data.Dataset.range(self.counts[0]).shuffle(self.counts[0]).batch(batch_size)
        )

    def hyper(self) -> tf.data.Dataset:
        return self._at(tf.data.Dataset.range(self.counts[0], sum(self.counts)).batch(1000))


class Watch(keras.callbacks.Callback):
    """The test error of every trained net, and what updates cost; stands behind DrMADCallback."""

    def __init__(self, drmad: kd.DrMADCallback, epochs: int, test: tuple):
        super().__init__()
        self.drmad, self.epochs, self.test = drmad, epochs, test
        self.errors: list[float] = []
        self.seconds: list[float] = []  # of each epoch, with the update in it

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.began)
        if (epoch + 1) % self.epochs == 0:
            found = self.model.evaluate(*self.test, batch_size=1000, verbose=0, return_dict=True)
            self.errors.append(1.0 - found["accuracy"])
            record = self.drmad.history[-1]
            print(
                f"{len(self.errors) - 1:>6} updates: outer loss {record.outer_loss:.4f}, "
                f"test error {self.errors[-1]:.2%} {record.reason}",
                flush=True,
            )

    def walk_per_training(self) -> float:
        """Seconds of a walk back, as a multiple of those of the training that it walks."""
        if self.epochs < 3:
            return float("nan")
        of_epochs = np.reshape(self.seconds, (-1, self.epochs))
        usual = of_epochs[:, 1:-1].mean(1)  # a horizon's first epoch may hold a compilation
        return float(np.median((of_epochs[:, -1] - usual) / (usual * self.epochs)))


def penalties(record: kd.reports.Record, log_penalty: float) -> np.ndarray:
    """The L2 of the weights of every pixel in the first layer."""
    values = record.hyperparameters
    if "l2" in values:
        return values["l2"]["hidden_1"]
    return (
        2 * np.exp(log_penalty) / np.square(values["net/hidden_1_scale/feature_weights"]["model"])
    )


def image_of(penalties: np.ndarray) -> Figure:
    """The logarithms of the penalties of 784 pixels."""
    figure = Figure(figsize=(4.4, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(np.log(penalties).reshape(28, 28), interpolation="nearest")
    figure.colorbar(drawn, ax=axes, label="log L2 of the first layer")
    axes.set_axis_off()
    return figure


def outer_optimizer(text: str) -> keras.optimizers.Optimizer:
    """An outer optimizer from `sign:0.07` or `adam:0.1`."""
    name, _, step = text.partition(":")
    return {"sign": kd.optimizers.Sign, "adam": keras.optimizers.Adam}[name](float(step))


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
    epochs = arguments.epochs
    model, scales = compiled_net(arguments)
    split = Split(train, hyper, epochs, arguments.seed)
    drmad = kd.DrMADCallback(
        split.hyper() if arguments.redraw else hyper,
        outer_optimizer=outer_optimizer(arguments.outer),
        horizon=epochs,
        restart="fresh",
        trajectory=trajectory(arguments),
        curvature=arguments.curvature,
        reverse_steps=arguments.reverse_steps,
        variables=scales,
        jit_compile=arguments.jit,
    )
    watch = Watch(drmad, epochs, test)
    size, total = arguments.batch_size, (arguments.updates + 1) * epochs
    if arguments.redraw:
        model.fit(split.train(size), epochs=total, verbose=0, shuffle=False,
                  callbacks=[split, drmad, watch])  # fmt: skip
    else:
        model.fit(*train, batch_size=size, epochs=total, verbose=0, callbacks=[drmad, watch])
    return drmad, watch


def draw(drmad: kd.DrMADCallback, watch: Watch, arguments: argparse.Namespace) -> None:
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "l2": image_of(penalties(drmad.history[-1], arguments.log_penalty)),
        "test_error": kd.plots.outer_loss(drmad.history, test_error=watch.errors),
    }
    for name, figure in pictures.items():
        path = out / f"mnist_{name}.png"
        figure.savefig(path)
        print(path)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="where TFDS finds or puts MNIST")
    parser.add_argument("--tune", default="l2", choices=("scales", "l2"))
    parser.add_argument(
        "--log-penalty", type=float, default=-4.0, help="log of p in p z^2, where it starts"
    )
    parser.add_argument("--log-scale", type=float, default=0.17, help="of the scales at first")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10, help="of one training, one horizon")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--train", type=int, default=10000, help="number of training images")
    parser.add_argument("--hyper", type=int, default=3000, help="number of hyper images")
    parser.add_argument(
        "--redraw", action="store_true", help="draw both anew from all before each training"
    )
    parser.add_argument("--learning-rate", type=float, default=0.05, help="of z")
    parser.add_argument("--momentum", type=float, default=0.95, help="dampened")
    parser.add_argument("--outer", default="sign:0.07", help="sign:STEP or adam:STEP")
    parser.add_argument("--trajectory", default="linear")
    parser.add_argument(
        "--pace",
        default=None,
        choices=("distance", "steps"),
        help="of the straight line: as fast as the run went (default), or even, as published",
    )
    parser.add_argument("--curvature", default=None)
    parser.add_argument("--reverse-steps", type=float, default=None, help="part of them visited")
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
    print(f"a walk back takes {watch.walk_per_training():.1f} times the training's seconds")
    draw(drmad, watch, arguments)


if __name__ == "__main__":
    main()
