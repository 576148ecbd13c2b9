"""How good is a hypergradient, and what does it cost? The whole dial, measured on recorded runs.

Every row trains one net once, with batches, seeds and states recorded, and then walks that one run
back by every setting. Truth is the exact replay with the Hessian. Printed and written as JSON:
cosine, sign agreement and norm ratio per kind of hyperparameter, seconds and bytes.

    python benchmarks/fidelity.py --rows digits                      # measure, and print tables
    python benchmarks/fidelity.py --only digits-sgd-500 --seeds 1    # one row of them
    python benchmarks/fidelity.py --tables                           # of what was measured
    python benchmarks/fidelity.py --only digits-sgd-2000-0.1 --figure docs/images/fidelity.png

What is measured is merged into docs/results/fidelity.json, by row and seed. MNIST and CIFAR-10 are
read with `tfds.load(..., data_dir=DIR)`; the digits are embedded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
import time
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from fidelity_results import DRAWN, KINDS, figure, load, merge, summary, tables

import keras_drmad as kd
from keras_drmad import curvature
from keras_drmad.estimator import GROWTH_LIMIT, Estimator, Hypergradients
from keras_drmad.fidelity import Auto, _cost_per_step
from keras_drmad.hyper_data import batches_of
from keras_drmad.objectives import OuterLoss
from keras_drmad.settings import Setting, amount
from keras_drmad.trajectories import Linear, Piecewise, Replay, Stored, Trajectory

HERE = pathlib.Path(__file__).resolve().parent
L2 = math.exp(-6.0)

# net, optimizer, steps, learning rate, remark
ROWS = {
    "digits": [
        ("digits", "sgd", 500, 0.1, ""),
        ("digits", "sgd", 2000, 0.1, ""),
        ("digits", "sgd", 1000, 0.3, ""),
        ("digits", "sgd", 5000, 0.1, ""),
        ("digits", "adam", 500, 0.003, ""),
    ],
    "mnist": [
        ("mnist", "sgd", 200, 0.05, ""),
        ("mnist", "sgd", 1000, 0.05, ""),
        ("mnist", "sgd", 2000, 0.05, ""),
        ("pooled", "sgd", 1500, 0.1, "non-zero mean"),
        ("pooled", "sgd", 1500, 0.3, "edge of stability"),
    ],
    "cifar": [
        ("cifar", "sgd", 100, 0.1, "BatchNormalization"),
        ("cifar", "sgd", 200, 0.3, "BatchNormalization, edge of stability"),
    ],
}


def row_name(row) -> str:
    return "-".join(map(str, row[:4]))


@functools.cache
def data(name: str, folder: str | None):
    """Training and hyper images and labels of a net."""
    if name == "digits":
        parts = [
            tfds.load("digits", data_dir=HERE.parent / "examples/data", split=split,
                      as_supervised=True, batch_size=-1)
            for split in ("train", "test")
        ]  # fmt: skip
        x = np.concatenate([p[0].numpy() for p in parts]).reshape(-1, 64) / np.float32(16)
        y = np.concatenate([p[1].numpy() for p in parts])
        return (x[:900], y[:900]), (x[900:1300], y[900:1300])
    source, count = ("cifar10", 8000) if name == "cifar" else ("mnist", 13000)
    x, y = tfds.load(source, data_dir=folder, split=f"train[:{count}]", as_supervised=True,
                     batch_size=-1)  # fmt: skip
    x, y = x.numpy().astype("float32") / 255, y.numpy()
    if name == "mnist":
        x = x.reshape(-1, 784)
    if name == "pooled":
        x = x.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)
    held = count - count // 4
    return (x[:held], y[:held]), (x[held:], y[held:])


def net(name: str) -> keras.Model:
    layers = keras.layers
    if name == "cifar":
        blocks = []
        for filters in (16, 32, 64):
            blocks += [
                layers.Conv2D(filters, 3, padding="same", use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.MaxPooling2D(),
            ]
        return keras.Sequential([keras.Input((32, 32, 3)), *blocks, layers.Flatten(),
                                 layers.Dense(10)])  # fmt: skip
    inputs, widths = {"digits": (64, (50, 50)), "mnist": (784, (50, 50, 50)),
                      "pooled": (196, (40, 40))}[name]  # fmt: skip
    hidden = [layers.Dense(width, activation="tanh") for width in widths]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(10)])


def optimizer(name: str, rate: float, fine: bool):
    """Fine: the finest grain, from which the others are sums. Otherwise what users tune."""
    rate = kd.Hyperparameter(rate, per="layer", over="step" if fine else "run")
    l2 = kd.Hyperparameter(L2, per="weight" if fine else "input")
    if name == "adam":
        momentum = kd.Hyperparameter(0.9) if fine else 0.9
        return kd.optimizers.Adam(rate, beta_1=momentum, l2=l2)
    momentum = kd.Hyperparameter(0.9) if fine else 0.9
    return kd.optimizers.SGD(rate, momentum=momentum, dampened=True, l2=l2)


def recorded(row, seed: int, folder, fine: bool, settings):
    """A trained model, and an estimator with its finished run."""
    name, rule, steps, rate, _ = row
    keras.utils.set_random_seed(seed)
    (x, y), hyper = data(name, folder)
    model = net(name)
    model.compile(
        optimizer(rule, rate, fine),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    estimator = Estimator(model, jit_compile=False)  # walks are too few to pay for compiling

    class Record(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            model.optimizer.build(model.trainable_variables)
            model.optimizer.set_horizon(1, steps)
            estimator.begin(steps, settings)

        def on_train_batch_begin(self, batch, logs=None):
            estimator.arm(lambda spec: None)

    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=seed).repeat()
    started = time.perf_counter()
    model.fit(batches.batch(50), steps_per_epoch=steps, verbose=0, shuffle=False,
              callbacks=[Record()])  # fmt: skip
    seconds = time.perf_counter() - started
    estimator.finish(OuterLoss(model, batches_of(hyper, 2000)))
    return model, estimator, seconds


def kinds(model: keras.Model, found: Hypergradients) -> dict[str, np.ndarray]:
    """The fine hypergradients summed to every grain, in raw units up to one factor a kind."""
    result: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for group, value in zip(model.optimizer.groups, found.values, strict=True):
        value = value.numpy().astype(np.float64)
        if group.argument == "l2":
            value = value[0]
            matrix = value.reshape(-1, *value.shape[-2:])
            for kind, array in (
                ("weight", value),
                ("input", matrix.sum((0, 2))),
                ("neuron", matrix.sum((0, 1))),
                ("layer", value.sum()),
            ):
                result[f"l2/{kind}"].append(np.ravel(array))
        elif group.argument == "learning_rate":
            result["rate/step"].append(value)
            result["rate/layer"].append(value.sum(keepdims=True).reshape(1))
        else:
            result["momentum"].append(np.ravel(value))
    arrays = {kind: np.concatenate(parts) for kind, parts in result.items()}
    if found.weights is not None:
        arrays["initial weights"] = np.concatenate([np.ravel(w) for w in found.weights])
    return arrays


def compare(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    with np.errstate(all="ignore"):
        return {
            "cosine": float(a @ b / (norm_a * norm_b)),
            "signs": float(np.mean(np.sign(a) == np.sign(b))),
            "norm": float(norm_a / norm_b),
        }


EVEN = "linear at an even pace, Gauss-Newton"
UNGUARDED = "linear, Hessian, no limit on growth"


def dial() -> dict[str, Setting]:
    """What is compared with the exact replay."""
    return {
        "linear, Gauss-Newton": Setting(Linear(), "gauss_newton"),
        EVEN: Setting(Linear("steps"), "gauss_newton"),
        UNGUARDED: Setting(Linear("steps"), "hessian"),
        "linear, Hessian, T/10 steps (as published)": Setting(
            Linear("steps"), "hessian", reverse_steps=0.1
        ),
        "9 anchors, Gauss-Newton": Setting(Piecewise(9), "gauss_newton"),
        "33 anchors evenly, Hessian": Setting(Piecewise(33, "even"), "hessian"),
        "129 anchors evenly, Hessian": Setting(Piecewise(129, "even"), "hessian"),
        "replay, Gauss-Newton": Setting(Replay(), "gauss_newton"),
    }


def bound() -> dict[str, Setting]:
    """The settings on which the bound on Gauss-Newton products may act."""
    return {name: s for name, s in dial().items()
            if s.curvature == "gauss_newton" and not s.trajectory.exact}  # fmt: skip


# Ideas that the library does not have ------------------------------------------------------------


def convex_hessian(loss, weights, tuned):
    """The Hessian for directions that it bends upwards, Gauss-Newton for the others."""
    gradient, bent = curvature.hessian(loss, weights, tuned)
    _, bounded = curvature.gauss_newton(loss, weights, tuned)

    def product(v):
        (curved, mixed), (positive, _) = bent(v), bounded(v)
        upwards = tf.add_n([tf.reduce_sum(a * b) for a, b in zip(v, curved, strict=True)]) >= 0
        pairs = zip(curved, positive, strict=True)
        return [tf.where(upwards, a, b) for a, b in pairs], mixed

    return gradient, product


class Tail(Linear):
    """Every state of the last part of the run, a straight line over the rest."""

    name = "tail"
    all_batches = True

    def __init__(self):
        super().__init__("steps")

    def wants(self, t: int) -> bool:
        return t == self.first or t >= self.steps - self.steps // 8

    add = Trajectory.add

    def copies(self, steps: int) -> int:
        return 2 + steps // 8


class Compressed(Stored):
    """Every state, in few bits: weights as residuals to the straight line, slots as they are.

    What is measured is the rounding; the library would keep the integers. Slots don't lie near a
    line, and those of Adam span orders of magnitude: they are kept in bfloat16.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def path(self):
        path = super().path()
        arrays = [self._rounded(x) for x in path.arrays[: self.weights]]
        arrays += [_bfloat16(x) for x in path.arrays[self.weights :]]
        return path._replace(arrays=arrays)

    def add(self, t, state, weights=None):
        super().add(t, state)
        self.weights, self.tensors = weights, len(state)

    def _rounded(self, x: tf.Tensor) -> tf.Tensor:
        part = tf.reshape(tf.linspace(0.0, 1.0, len(x)), [-1] + [1] * (x.shape.rank - 1))
        line = (1.0 - part) * x[:1] + part * x[-1:]
        if self.bits == 16:
            return line + _bfloat16(x - line)
        axes = list(range(1, x.shape.rank))
        unit = tf.reduce_max(tf.abs(x - line), axes, keepdims=True) / (2 ** (self.bits - 1) - 1)
        return line + unit * tf.round(tf.math.divide_no_nan(x - line, unit))

    def copies(self, steps: int) -> int:
        weights = self.weights / self.tensors  # slots are as large
        return math.ceil((steps + 1) * (weights * self.bits + (1 - weights) * 16) / 32)


def _bfloat16(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.cast(x, tf.bfloat16), x.dtype)


class TailLoop:
    """The Hessian in the tail, Gauss-Newton before it."""

    refused = ""

    def __init__(self, estimator: Estimator, steps: int):
        self.tail, self.head = (
            estimator._loop(name, False) for name in ("hessian", "gauss_newton")
        )
        self.start = steps - steps // 8

    def walk(self, batches, run, path, visits, rows, begin, *rest):
        loop = self.tail if int(visits[begin]) >= self.start else self.head
        return loop.walk(batches, run, path, visits, rows, begin, *rest)


def ideas() -> dict[str, Setting]:
    return {
        "linear, Hessian if convex": Setting(Linear("steps"), "convex_hessian"),
        "9 anchors, Hessian if convex": Setting(Piecewise(9), "convex_hessian"),
        TAIL: Setting(Tail(), "hessian"),
        "stored in bfloat16, Hessian": Setting(Compressed(16), "hessian"),
        "stored in 8 bits, Hessian": Setting(Compressed(8), "hessian"),
        "stored in 4 bits, Hessian": Setting(Compressed(4), "hessian"),
    }


TAIL = "last 1/8 replayed with Hessian, then linear, Gauss-Newton"
curvature._NAMED["convex_hessian"] = convex_hessian


class Acting:
    """Counts the steps on which the bound on Gauss-Newton products acts."""

    def __init__(self) -> None:
        self.count = tf.Variable(0, trainable=False)

    def __call__(self, passed, curved, ceiling):
        scaled = curvature.bounded(passed, curved, ceiling)
        same = [tf.reduce_all(a == b) for a, b in zip(curved, scaled, strict=True)]
        self.count.assign_add(1 - tf.cast(tf.reduce_all(same), tf.int32))
        return scaled

    def share(self, steps: int) -> float:
        share = int(self.count) / steps
        self.count.assign(0)
        return share


def measure(row, seed: int, folder, settings: dict[str, Setting]) -> list[dict]:
    """Every setting on one run, beside the exact way."""
    exact = Setting(Replay(), "hessian")
    model, estimator, _ = recorded(row, seed, folder, True, [exact, *settings.values()])
    steps = row[2]
    truth = estimator.walk(exact, [steps // 8, steps // 4, steps // 2])
    reference = kinds(model, truth)
    lines: list[dict] = []
    acting = Acting()

    def line(name: str, found: Hypergradients, setting: Setting) -> None:
        arrays = kinds(model, found)
        visited = amount(setting.reverse_steps, found.steps)
        window = None if found.steps == steps else found.steps
        lines.append({
            "row": row_name(row), "seed": seed, "setting": name, "problem": found.problem,
            "fallback": found.fallback, "bounded": acting.share(visited),
            # In training steps per step of the run, by the arithmetic that `auto` uses.
            "cost": cost_per_step(setting) * visited / steps,
            "bytes": estimator.nbytes(dataclasses.replace(setting, window=window)),
            "kinds": {k: compare(arrays[k], b) for k, b in reference.items() if k in arrays},
        })  # fmt: skip

    line("replay, Hessian", truth, exact)
    for mark in truth.marks:
        line(f"replay, Hessian, last 1/{round(steps / mark.steps)}", mark, exact)
    for name, setting in settings.items():
        limit = math.inf if name == UNGUARDED else GROWTH_LIMIT
        with (
            mock.patch("keras_drmad.estimator.GROWTH_LIMIT", limit),
            mock.patch("keras_drmad.steps.bounded", acting),
        ):
            if name == TAIL:
                estimator._loops["tail", False] = TailLoop(estimator, steps)
                setting = dataclasses.replace(setting, curvature="tail")
            found = estimator.walk(setting, [steps // 8] if name == TAIL else ())
        line(name, found, setting)
    estimator.forget()
    return lines


def cost_per_step(setting: Setting) -> float:
    """In training steps."""
    own = {"tail": 0.125 * 3.0 + 0.875 * 1.6, "convex_hessian": 2.0 + 1.6}
    return own.get(setting.curvature) or _cost_per_step(setting)


def measure_auto(row, seed: int, folder) -> dict:
    """What "auto" chooses for L2 per input unit and learning rates per layer."""
    auto = Auto(fidelity=0.9)
    _, estimator, _ = recorded(row, seed, folder, False, auto.settings())
    exact, found = auto.hypergradients(estimator, 1.0, 1.0)
    estimator.forget()
    return {
        "row": row_name(row), "seed": seed, "chosen": str(auto.chosen), "why": auto.why,
        "cost": amount(auto.chosen.window, row[2]) / row[2] * auto._cost(auto.chosen),
        "outer_loss": exact.outer_loss, "problem": exact.problem,
        "cosines": {} if found is None else {k: a.cosine for k, a in found.items()},
    }  # fmt: skip


def compressed() -> dict[str, Setting]:
    """The last three of the ideas."""
    return {name: s for name, s in ideas().items() if isinstance(s.trajectory, Compressed)}


# "auto" is measured with the dial as well.
CHOICES = {"dial": dial, "ideas": ideas, "bound": bound, "compressed": compressed, "auto": dict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="digits", help="digits, mnist, cifar, or several: a,b")
    parser.add_argument("--only", default="", help="the start of a row's name: digits-sgd-500")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--settings", choices=CHOICES, default="dial",
                        help="ideas: those that the library has not; bound: straight lines with "
                        "Gauss-Newton alone; auto: only what it chooses")  # fmt: skip
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", default=str(HERE.parent / "docs/results/fidelity.json"))
    parser.add_argument("--tables", action="store_true", help="only print what was measured")
    parser.add_argument("--figure", default=None, help="only draw one row, into this file")
    arguments = parser.parse_args()
    path = pathlib.Path(arguments.out)
    if arguments.tables:
        known = load(path)
        print(*(summary(known, kind) for kind in DRAWN), tables(known), sep="\n")
        return
    if arguments.figure:
        figure(load(path), arguments.only, ideas()).savefig(arguments.figure)
        return
    asked = [row for part in arguments.rows.split(",") for row in ROWS[part]]
    if arguments.only:
        every = [row for rows in ROWS.values() for row in rows]
        asked = [row for row in every if f"{row_name(row)}-".startswith(f"{arguments.only}-")]
    for row in asked:
        lines, chosen = [], []
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            started = time.perf_counter()
            tried = CHOICES[arguments.settings]()
            if tried:
                lines += measure(row, seed, arguments.data_dir, tried)
            if arguments.settings in ("dial", "auto"):
                chosen.append(measure_auto(row, seed, arguments.data_dir))
            merge(path, lines, chosen)
            keras.backend.clear_session()
            print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
        known = load(path)
        print(tables({k: [x for x in v if x["row"] == row_name(row)] for k, v in known.items()}),
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
