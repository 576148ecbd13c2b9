"""What works together: every pair of settings in one fit, as docs/compatibility.md says.

    python tests/test_compatibility.py

writes that page from what the fits below do, and keeps its last section, "Versions".
"""

from __future__ import annotations

import configparser
import functools
import itertools
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fits
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_drmad as kd
from keras_drmad.recorder import _StandIn

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
VERSIONS = "## Versions"  # the section at the end of the page, written by hand
EPOCHS = 2  # an update after each
Case = dict[str, str]

FACTORS = {
    "data": ("arrays", "tf.data", "endless tf.data", "PyDataset with workers", "generator"),
    "batches": ("even", "ragged last", "of one"),
    "model": ("sequential", "two inputs, two outputs", "subclassed", "shared and frozen layers"),
    "layers": ("BatchNormalization, Dropout", "LSTM", "Conv1D", "Embedding",
               "MultiHeadAttention, LayerNormalization"),
    "run": ("graph", "jit_compile", "jit auto", "run_eagerly"),
    "compiled with": ("nothing else", "weighted metrics", "loss weights", "clipnorm"),
    "dtype": ("float32", "float64", "mixed_bfloat16"),
    "steering": ("none", "EarlyStopping", "ReduceLROnPlateau", "LearningRateScheduler"),
    "writing": ("none", "ModelCheckpoint", "TensorBoard", "BackupAndRestore"),
    "trajectory": ("linear", "stored"),
}  # fmt: skip
PLAIN = {factor: values[0] for factor, values in FACTORS.items()}
REFUSED = (  # one at a time: two refusals would hide each other
    {"dtype": "mixed_float16"},
    {"run": "steps_per_execution=2"},
    {"writing": "SwapEMAWeights"},
    {"writing": "SwapEMAWeights", "compiled with": "use_ema"},
    {"compiled with": "gradient_accumulation_steps"},
    {"compiled with": "a Keras optimizer"},
    {"compiled with": "tuned learning rate", "steering": "ReduceLROnPlateau"},
    {"compiled with": "tuned learning rate", "steering": "LearningRateScheduler"},
    {"data": "tf.data of unknown length", "compiled with": "rate per step"},
    {"model": "a train_step of its own"},
)


def pairwise(factors: dict[str, tuple[str, ...]]) -> list[Case]:
    """Cases in which every two values of two factors stand together at least once.

    Each case begins with the first pair that is missing, and takes of every other factor the value
    that adds the most missing pairs; of equal ones, that which was taken least.
    """
    names = list(factors)
    missing = {  # a dictionary keeps the order, a set does not
        pair: None
        for a, b in itertools.combinations(names, 2)
        for pair in itertools.product([(a, x) for x in factors[a]], [(b, y) for y in factors[b]])
    }
    taken = {(name, value): 0 for name in names for value in factors[name]}
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for name in sorted(set(names) - set(case), key=lambda n: (-len(factors[n]), n)):

            def gain(value: str, name: str = name, case: Case = case) -> tuple[int, int]:
                both = [((other, case[other]), (name, value)) for other in case]
                new = sum(pair in missing or pair[::-1] in missing for pair in both)
                return new, -taken[name, value]

            case[name] = max(factors[name], key=gain)
        case = {name: case[name] for name in names}
        for pair in itertools.combinations(case.items(), 2):
            missing.pop(pair, None)
        for chosen in case.items():
            taken[chosen] += 1
        cases.append(case)
    return cases


WORKING = pairwise(FACTORS)
CASES = WORKING + [{**PLAIN, **case} for case in REFUSED]


# One case ---------------------------------------------------------------------------------------


def inner(kind: str) -> list[keras.layers.Layer]:
    """The layers of a name, from sequences of 4 times 3 numbers (or of 4 words) to vectors."""
    match kind:
        case "BatchNormalization, Dropout":
            dense = layers.Dense(4, "tanh")
            return [layers.Flatten(), dense, layers.BatchNormalization(), layers.Dropout(0.3)]
        case "LSTM":
            return [layers.LSTM(2, unroll=True)]  # XLA takes half a minute for a loop
        case "Conv1D":
            return [layers.Conv1D(2, 2, activation="tanh"), layers.Flatten()]
        case "Embedding":
            return [layers.Embedding(6, 2), layers.Flatten()]
        case "MultiHeadAttention, LayerNormalization":
            return [Attention(), layers.LayerNormalization(), layers.Flatten()]
        case unknown:
            raise KeyError(unknown)


class Attention(layers.Layer):
    """A sequence attends to itself."""

    def __init__(self, **options):
        super().__init__(**options)
        self.attention = layers.MultiHeadAttention(1, 2)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


class Subclassed(keras.Model):
    def __init__(self, kind):
        super().__init__()
        self.parts = [*inner(kind), layers.Dense(fits.CLASSES)]

    def call(self, x, training=False):
        for layer in self.parts:
            x = layer(x, training=training) if isinstance(layer, layers.Dropout) else layer(x)
        return x


class Stepping(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def model_of(case: Case) -> keras.Model:
    kind = case["layers"]
    words = kind == "Embedding"

    def new_input():
        return keras.Input((4,), dtype="int32") if words else keras.Input((4, 3))

    def through(x):
        for layer in inner(kind):
            x = layer(x)
        return x

    def head():
        return layers.Dense(fits.CLASSES)

    match case["model"]:
        case "sequential":
            return keras.Sequential([new_input(), *inner(kind), head()])
        case "a train_step of its own":
            return Stepping([new_input(), *inner(kind), head()])
        case "two inputs, two outputs":
            ends = [new_input(), new_input()]
            joined = layers.Concatenate()([through(x) for x in ends])
            return keras.Model(ends, [head()(joined), head()(joined)])
        case "subclassed":
            model = Subclassed(kind)
            if case["writing"] == "BackupAndRestore":  # it wants a model that is built
                model(np.zeros((1, 4), "int32") if words else np.zeros((1, 4, 3)))
            return model
        case "shared and frozen layers":
            x = new_input()
            frozen, shared = layers.Dense(3, trainable=False), layers.Dense(3, "tanh")
            return keras.Model(x, head()(shared(shared(frozen(through(x))))))
        case unknown:
            raise KeyError(unknown)


class Batches(keras.utils.PyDataset):
    def __init__(self, arrays, size):
        super().__init__(workers=2)
        self.arrays, self.size = arrays, size

    def __len__(self):
        return -(-len(keras.tree.flatten(self.arrays)[0]) // self.size)

    def __getitem__(self, i):
        at = slice(i * self.size, (i + 1) * self.size)
        return keras.tree.map_structure(lambda a: a[at], self.arrays)


def examples(case: Case, count: int, seed: int) -> tuple[Any, ...]:
    """Inputs, targets and, where metrics are weighted, weights."""
    rng = np.random.default_rng(seed)
    if case["layers"] == "Embedding":
        x = rng.integers(0, 6, (count, 4)).astype("int32")
    else:
        x = rng.normal(size=(count, 4, 3)).astype(keras.config.floatx())
    y = rng.integers(0, fits.CLASSES, count)
    arrays = (x, y)
    if case["compiled with"] == "weighted metrics":
        arrays += (rng.uniform(0.5, 1.5, count).astype(keras.config.floatx()),)
    if case["model"] == "two inputs, two outputs":
        arrays = tuple((a, a[::-1].copy()) for a in arrays)
    return arrays


def training_data(case: Case) -> dict[str, Any]:
    """The arguments of `fit` that bring data."""
    count, size = {"even": (8, 4), "ragged last": (7, 4), "of one": (2, 1)}[case["batches"]]
    arrays, steps = examples(case, count, 1), -(-count // size)
    dataset = tf.data.Dataset.from_tensor_slices(arrays).batch(size)

    def generator():
        while True:
            yield from map(Batches(arrays, size).__getitem__, range(steps))

    match case["data"]:
        case "arrays":
            x, y, *weights = arrays
            more = {"sample_weight": weights[0]} if weights else {}
            return dict(x=x, y=y, batch_size=size, **more)
        case "tf.data":
            return dict(x=dataset)
        case "endless tf.data":
            return dict(x=dataset.repeat(), steps_per_epoch=steps)
        case "generator":
            return dict(x=generator(), steps_per_epoch=steps)
        case "tf.data of unknown length":
            return dict(x=dataset.filter(lambda *_: True))
    return dict(x=Batches(arrays, size))


def optimizer_of(case: Case) -> keras.optimizers.Optimizer:
    """Momentum descent; its learning rate is not tuned where a callback of Keras sets it."""
    option = case["compiled with"]
    if option == "a Keras optimizer":
        return keras.optimizers.SGD(0.1)
    rate: Any = kd.Hyperparameter(0.1, over="step" if option == "rate per step" else "run")
    if "Rate" in case["steering"] or "LR" in case["steering"]:
        rate = rate if option == "tuned learning rate" else 0.1
    more = {
        "clipnorm": dict(clipnorm=1.0),
        "use_ema": dict(use_ema=True),
        "gradient_accumulation_steps": dict(gradient_accumulation_steps=2),
    }
    return fits.optimizer(learning_rate=rate, **more.get(option, {}))


def compile_model(model: keras.Model, case: Case) -> None:
    outputs = 2 if case["model"] == "two inputs, two outputs" else 1
    option = {
        "weighted metrics": dict(
            weighted_metrics=["accuracy"] if outputs == 1 else [["accuracy"]] * 2
        ),
        "loss weights": dict(loss_weights=[0.7, 0.4][:outputs]),
    }
    run = {
        "graph": dict(jit_compile=False),
        "jit_compile": dict(jit_compile=True),
        "jit auto": dict(jit_compile="auto"),
        "run_eagerly": dict(run_eagerly=True),
        "steps_per_execution=2": dict(jit_compile=False, steps_per_execution=2),
    }[case["run"]]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        optimizer_of(case), [loss] * outputs, **option.get(case["compiled with"], {}), **run
    )


def callbacks_of(case: Case, folder: Path) -> list[keras.callbacks.Callback]:
    of = keras.callbacks
    made = {
        "EarlyStopping": lambda: of.EarlyStopping("loss", patience=2, restore_best_weights=True),
        "ReduceLROnPlateau": lambda: of.ReduceLROnPlateau("loss", patience=1, min_delta=100.0),
        "LearningRateScheduler": lambda: of.LearningRateScheduler(lambda e: 0.1 / (e + 1)),
        "ModelCheckpoint": lambda: of.ModelCheckpoint(folder / "{epoch}.weights.h5",
                                                      save_weights_only=True),
        "TensorBoard": lambda: of.TensorBoard(folder / "logs", write_graph=False),
        "BackupAndRestore": lambda: of.BackupAndRestore(folder / "backup"),
        "SwapEMAWeights": lambda: of.SwapEMAWeights(swap_on_epoch=True),
    }  # fmt: skip
    named = [made[name]() for name in (case["steering"], case["writing"]) if name != "none"]
    if case not in WORKING:
        return named  # CSVLogger would leave its file open
    return [of.TerminateOnNaN(), of.CSVLogger(folder / "log.csv"), *named]


def outcome(case: Case) -> str:
    """What a fit of this case does: "works", or the message that refuses it."""
    fits.start()
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64" if case["dtype"] == "float64" else "float32")
    keras.config.set_dtype_policy(case["dtype"])
    try:
        with tempfile.TemporaryDirectory() as folder:
            fit(case, Path(folder))
    except (TypeError, ValueError) as error:
        if case in WORKING:
            raise
        return f"refused: {error}"
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])
    return "works"


def fit(case: Case, folder: Path) -> None:
    """Train, and look at everything that must hold afterwards."""
    model = model_of(case)
    compile_model(model, case)
    hyper = examples(case, 5, 2)
    callback = kd.DrMADCallback(hyper, trajectory=case["trajectory"])
    callbacks = [callback, *callbacks_of(case, folder)]
    history = model.fit(
        **training_data(case), epochs=EPOCHS, verbose=0, shuffle=False, callbacks=callbacks,
    ).history  # fmt: skip
    assert len(history["loss"]) == EPOCHS and np.all(np.isfinite(history["loss"]))
    assert [record.accepted for record in callback.history] == [True] * EPOCHS
    assert np.all(np.isfinite([record.outer_loss for record in callback.history]))
    started, later = (kd.reports.flat(r.hyperparameters) for r in callback.history)
    assert {path.split("/")[0] for path in started} >= {"l2"}
    for path, value in started.items():
        assert np.all(np.isfinite(later[path])) and np.any(later[path] != value), path
    assert not isinstance(model.train_function, _StandIn)
    assert "train_step" not in vars(model)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    expected = {
        "ModelCheckpoint": ["1.weights.h5", "2.weights.h5"],
        "TensorBoard": ["logs"],
    }.get(case["writing"], [])
    assert all((folder / name).exists() for name in expected)
    assert "outer_loss" in (folder / "log.csv").read_text().splitlines()[0]
    if case["steering"] in ("ReduceLROnPlateau", "LearningRateScheduler"):
        assert float(model.optimizer.learning_rate) < 0.09


# The page ---------------------------------------------------------------------------------------

HEAD = """\
# What works together

Written by `python tests/test_compatibility.py`; the tests compare this page with what they find.

Each row of the first table is a fit of two epochs with an update of the hyperparameters after each.
Together they hold every pair of two settings at least once. A row "works" if both updates were
made, every tuned value moved and stayed finite, and the model was left as Keras would leave it.

`jit auto` is `jit_compile="auto"`. In every row `l2` is tuned, and the learning rate where neither
ReduceLROnPlateau nor LearningRateScheduler sets it; TerminateOnNaN and CSVLogger are there as well.
BackupAndRestore wants a subclassed model that is built already (Keras says so). It writes its files
in place: a process that is killed in that very moment leaves a backup that can't be read.
"""
MIDDLE = """\
## What is refused

By a message that says what to do instead, before the first training step; but ReduceLROnPlateau
when it first acts, since Keras shows a callback nothing of the others in its list. All that is not
named in a row is as in the first row above.
"""


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head_of(columns: list[str]) -> list[str]:
    return [row(columns), row(["---"] * len(columns))]


def line(case: Case, found: str) -> str:
    """The row of a case in the page."""
    if case in WORKING:
        return row([*case.values(), found])
    differs = [f"{k}: {v}" for k, v in case.items() if v != PLAIN[k]]
    return row([", ".join(differs), found.removeprefix("refused: ").replace("|", "\\|")])


def page(found: list[str]) -> str:
    """The whole page, from what was found of each of `CASES`."""
    rows = [line(case, text) for case, text in zip(CASES, found, strict=True)]
    cut = len(WORKING)
    return "\n".join(
        [HEAD, *head_of([*FACTORS, "found"]), *rows[:cut], "", MIDDLE,
         *head_of(["setting", "message"]), *rows[cut:], "", ""]
    )  # fmt: skip


@functools.cache
def written() -> tuple[list[str], str]:
    """The lines of the page as it is, and its section on versions."""
    found, title, versions = PAGE.read_text(encoding="utf-8").partition(VERSIONS)
    return found.splitlines(), title + versions


def test_every_pair_is_there():
    for a, b in itertools.combinations(FACTORS, 2):
        together = {(case[a], case[b]) for case in WORKING}
        assert together == set(itertools.product(FACTORS[a], FACTORS[b]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_the_page_says_what_happens(case):
    found = outcome(case)
    assert (found == "works") == (case in WORKING)
    assert line(case, found) in written()[0]


def test_the_page_says_nothing_else():
    """Around the rows stands what `page` writes there, and there are as many rows as cases."""
    expected = page(["works"] * len(CASES)).splitlines()
    assert len(written()[0]) == len(expected)
    for found, wanted in zip(written()[0], expected, strict=True):
        assert found == wanted or found.startswith(wanted.removesuffix("works |"))


def test_the_oldest_versions_are_those_that_are_admitted():
    """`make test-oldest` tests what setup.cfg promises, and the page says so."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lowest = dict(x.split(">=") for x in setup["options"]["install_requires"].split())
    constraints = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", constraints, re.MULTILINE))
    for package, version in lowest.items():
        assert pinned[package].startswith(f"{version}.")
        assert f" {pinned[package]} " in written()[1]


def write() -> None:
    found = []
    for case in CASES:
        found.append(outcome(case))
        print(line(case, found[-1]), flush=True)
    PAGE.write_text(page(found) + written()[1], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write())
