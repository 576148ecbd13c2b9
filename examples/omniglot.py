"""Omniglot: how strongly the nets of several alphabets are tied, learned on hyper data.

Every alphabet is a task with a net of its own. For each hidden layer and each pair of alphabets the
training loss has a penalty, strength / 2 * |W_a - W_b|^2, and DrMAD tunes the strengths (multi-task
learning as in Maclaurin, Duvenaud and Adams, 2015, section 3.4). It is compared with separate nets,
with one net that all alphabets share up to their last layer, and with one strength for each layer.
In all of them DrMAD tunes learning rates and L2 as well, one for each layer.

    python examples/omniglot.py --data-dir DIR                         # by TFDS
    python examples/omniglot.py --omniglot-file omniglot_small.npz     # split by drawer
    python examples/omniglot.py --omniglot-file omniglot_small.npz --turn

`--turn` turns every second alphabet by 90 degrees, so that it is known which pairs have more in
common. Each horizon is a training from the same first weights. Test drawings are looked at once,
by the nets trained with the hyperparameters of the lowest outer loss. A table is printed at the
end; `--results` merges it into a JSON file and `--tables` prints what such a file holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import ops

import keras_drmad as kd

SIDE = 28
# Rates below 1/4 and strengths below 1 keep `rate * strength * alphabets` below 2: a stiffer tie
# would make gradient descent unstable by itself.
LARGEST_RATE = 0.25
METHODS = {
    "separate nets": None,
    "hidden layers shared": "shared",
    "tied, a strength per layer": "layer",
    "tied, a strength per layer and pair": "pair",
}


# Data --------------------------------------------------------------------------------------------


class Drawings(NamedTuple):
    """Drawings of characters; `drawer` numbers the drawings of a character."""

    images: np.ndarray  # (n, 28, 28), 0 to 1
    alphabet: np.ndarray  # (n,)
    character: np.ndarray  # (n,)
    drawer: np.ndarray  # (n,)
    names: list[str]  # of the alphabets


class Part(NamedTuple):
    """One row holds a drawing of every alphabet. Smaller alphabets come round again, and where that
    would count them twice the weight is 0."""

    x: np.ndarray  # (rows, alphabets, pixels)
    y: np.ndarray  # (rows, alphabets), the character's number in its alphabet
    weight: np.ndarray  # (rows, alphabets); of each alphabet the mean is 1


def from_file(path: str) -> Drawings:
    """Of an .npz file with the arrays images, alphabet, character, drawer and alphabet_names."""
    with np.load(path) as file:
        return Drawings(
            file["images"] / np.float32(255), file["alphabet"], file["character"], file["drawer"],
            [str(name) for name in file["alphabet_names"]],
        )  # fmt: skip


def from_tfds(data_dir: str | None) -> Drawings:
    """The two small sets of TFDS's `omniglot`, in the form of `from_file`.

    TFDS does not keep who made a drawing, so the drawings of a character are numbered as they come.
    """
    names = ["small1", "small2"]
    splits, info = tfds.load("omniglot", split=names, data_dir=data_dir, with_info=True)
    images, labels, alphabets = [], [], []
    for split in splits:
        known = set(alphabets)  # two alphabets are in both
        for example in split:
            if int(example["alphabet"]) not in known:
                ink = 1.0 - tf.cast(example["image"][..., :1], "float32") / 255.0
                images.append(tf.image.resize(ink, (SIDE, SIDE), "area")[..., 0])
                labels.append(int(example["label"]))
                alphabets.append(int(example["alphabet"]))
    kinds, alphabet = np.unique(alphabets, return_inverse=True)
    character = np.unique(labels, return_inverse=True)[1]
    drawer = np.zeros(len(labels), int)
    for each in range(character.max() + 1):
        of_one = np.flatnonzero(character == each)
        drawer[of_one] = np.arange(len(of_one))
    names = [info.features["alphabet"].int2str(int(kind)) for kind in kinds]
    return Drawings(np.stack(images), alphabet, character, drawer, names)


def shrunk(images: np.ndarray, side: int) -> np.ndarray:
    """Square images with so many pixels a side, by the mean of blocks."""
    block = SIDE // side
    return images.reshape(-1, side, block, side, block).mean((2, 4))


def parts(data: Drawings, arguments: argparse.Namespace) -> tuple[list[Part], list[int]]:
    """Training, hyper and test rows, training and hyper together; characters of each alphabet."""
    rng = np.random.default_rng(arguments.seed)
    drawers = rng.permutation(np.unique(data.drawer))
    train, hyper = arguments.train_drawers, arguments.train_drawers + arguments.hyper_drawers
    if hyper >= len(drawers):
        raise SystemExit(f"There are {len(drawers)} drawers: none is left for the test.")
    tasks = range(len(data.names))
    classes = [len(np.unique(data.character[data.alphabet == task])) for task in tasks]
    found = []
    for chosen in (drawers[:train], drawers[train:hyper], drawers[hyper:], drawers[:hyper]):
        of_tasks = []
        for task in tasks:
            at = np.flatnonzero((data.alphabet == task) & np.isin(data.drawer, chosen))
            at = rng.permutation(at)
            x = shrunk(data.images[at], arguments.side)
            if arguments.turn and task % 2:
                x = np.rot90(x, axes=(1, 2))
            first = data.character[data.alphabet == task].min()
            of_tasks.append((x.reshape(len(x), -1), data.character[at].astype(int) - first))
        rows = max(len(y) for _, y in of_tasks)
        round_again = [np.resize(np.arange(len(y)), rows) for _, y in of_tasks]
        weight = [(np.arange(rows) < len(y)) * (rows / len(y)) for _, y in of_tasks]
        found.append(Part(
            np.stack([x[i] for (x, _), i in zip(of_tasks, round_again, strict=True)], 1),
            np.stack([y[i] for (_, y), i in zip(of_tasks, round_again, strict=True)], 1),
            np.stack(weight, 1).astype("float32"),
        ))  # fmt: skip
    return found, classes


# The nets ----------------------------------------------------------------------------------------


class TaskDense(keras.layers.Layer):
    """A dense layer for each task, on inputs of the shape (batch, tasks, features).

    Args:
        units: Output units of each.
        tie: `None`, or `"layer"` for one strength by which every two of them are tied, or `"pair"`
            for one strength per pair. The tasks start from the same kernel.
        strength: Where the strengths start.
    """

    def __init__(self, units: int, tie: str | None = None, strength: float = 0.01, **kwargs):
        super().__init__(**kwargs)
        self.units, self.tie, self.start = units, tie, strength

    def build(self, input_shape):
        _, tasks, features = input_shape
        self.pairs = list(itertools.combinations(range(tasks), 2))

        def same_for_all(shape, dtype=None):
            first = keras.initializers.GlorotUniform()(shape[1:], dtype)
            return ops.repeat(first[None], shape[0], 0)

        self.kernel = self.add_weight((tasks, features, self.units), same_for_all, name="kernel")
        self.bias = self.add_weight((tasks, self.units), "zeros", name="bias")
        if self.tie:
            count = len(self.pairs) if self.tie == "pair" else 1
            initial = keras.initializers.Constant(self.start)
            strength = self.add_weight((count,), initial, trainable=False, name="strength")
            self.strength = kd.tunable(strength, "unit")
            # +1 and -1 where a pair's tasks are, so that signs @ W holds the differences.
            signs = np.zeros((len(self.pairs), tasks), "float32")
            for row, (a, b) in enumerate(self.pairs):
                signs[row, [a, b]] = 1.0, -1.0
            self.signs = signs

    def call(self, inputs):
        if self.tie:
            # sum of strength |W_a - W_b|^2, as a quadratic form in the tasks' weights.
            strengths = ops.broadcast_to(self.strength, (len(self.pairs),))
            form = ops.transpose(self.signs) @ (strengths[:, None] * self.signs)
            for weights in (self.kernel, self.bias):
                flat = ops.reshape(weights, (weights.shape[0], -1))
                self.add_loss(0.5 * ops.sum(flat * (form @ flat)))
        of_tasks = ops.transpose(inputs, (1, 0, 2)) @ self.kernel + self.bias[:, None]
        return ops.transpose(of_tasks, (1, 0, 2))


def compiled_net(method: str, classes: list[int], arguments: argparse.Namespace) -> keras.Model:
    tasks, kind = len(classes), METHODS[method]
    shared = kind == "shared"
    layers = [keras.Input((tasks, arguments.side**2))]
    for name in ("hidden_1", "hidden_2"):
        if shared:
            layers.append(keras.layers.Dense(arguments.units, name=name))
        else:
            layers.append(TaskDense(arguments.units, kind, arguments.strength, name=name))
        layers.append(keras.layers.Activation("tanh", name=f"{name}_tanh"))
    layers.append(TaskDense(max(classes), name="logits"))
    model = keras.Sequential(layers, name=kind or "separate")
    absent = np.where(np.arange(max(classes)) < np.array(classes)[:, None], 0.0, -1e9)

    def loss(y, logits):
        """The sum of the tasks' cross-entropies; Keras takes a mean."""
        logits = logits + ops.cast(absent, logits.dtype)
        return tasks * keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)

    rate = arguments.learning_rate  # the gradient of a shared layer is the sum of all tasks'
    rates = dict.fromkeys(("hidden_1", "hidden_2"), rate / tasks if shared else rate)
    model.compile(
        kd.optimizers.SGD(
            kd.Hyperparameter({**rates, "logits": rate}, per="layer", domain=(0.0, LARGEST_RATE)),
            momentum=0.9,
            l2=kd.Hyperparameter(arguments.l2, per="layer"),
            penalize=lambda variable: variable.name == "kernel",
        ),
        loss,
        jit_compile=arguments.jit,
    )
    return model


def strengths(model: keras.Model) -> dict[str, keras.Variable]:
    return {n: model.get_layer(n).strength for n in ("hidden_1", "hidden_2")
            if getattr(model.get_layer(n), "tie", None)}  # fmt: skip


def accuracy(model: keras.Model, part: Part, classes: list[int]) -> float:
    """The mean over the alphabets."""
    logits = model.predict(part.x, batch_size=512, verbose=0)
    logits[:, np.arange(logits.shape[2]) >= np.array(classes)[:, None]] = -np.inf
    return float(np.mean(part.weight * (logits.argmax(-1) == part.y)))


# Tuning ------------------------------------------------------------------------------------------


class Best(keras.callbacks.Callback):
    """Remembers what was trained with when the outer loss was lowest; stands behind DrMAD."""

    def __init__(self, drmad: kd.DrMADCallback, tied: dict[str, keras.Variable], tasks: int):
        super().__init__()
        self.drmad, self.tied, self.tasks = drmad, tied, tasks
        self.loss, self.losses = np.inf, []

    def values(self) -> list:
        return [*self.model.optimizer.raw_variables, *self.tied.values()]

    def on_epoch_begin(self, epoch, logs=None):
        if epoch % self.drmad.horizon == 0:
            self.now = [v.numpy() for v in self.values()] if self.model.optimizer.built else None

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.drmad.horizon == 0:
            record = self.drmad.history[-1]
            self.losses.append(record.outer_loss / self.tasks)
            if record.outer_loss < self.loss:
                self.loss, self.best, self.record = record.outer_loss, self.now, record
            if len(self.losses) % 5 == 1:
                print(f"{len(self.losses) - 1:>6} updates: outer loss {self.losses[-1]:.4f} "
                      f"{record.reason}", flush=True)  # fmt: skip


def run(method: str, data: Drawings, arguments: argparse.Namespace) -> dict:
    """Tune one kind of net, then train it with the best hyperparameters, and test it once."""
    (train, hyper, test, both), classes = parts(data, arguments)
    keras.utils.set_random_seed(arguments.seed)
    tasks = len(classes)
    model = compiled_net(method, classes, arguments)
    model.optimizer.build(model.trainable_variables)
    tied = strengths(model)
    drmad = kd.DrMADCallback(
        tuple(hyper),
        outer_optimizer=keras.optimizers.Adam(arguments.step),
        horizon=arguments.epochs,
        restart=True,
        trajectory=arguments.trajectory,
        variables=[model.get_layer(name) for name in tied],
        hyper_batch_size=len(hyper.x),
        jit_compile=arguments.jit,
    )
    best = Best(drmad, tied, tasks)
    began = time.process_time()
    size, epochs = arguments.batch_size, arguments.epochs
    model.fit(train.x, train.y, size, (arguments.updates + 1) * epochs, verbose=0,
              callbacks=[drmad, best])  # fmt: skip
    seconds = time.process_time() - began
    found = {"outer_loss": [round(loss, 4) for loss in best.losses], "CPU seconds": round(seconds)}
    found["skipped"] = sum(not record.accepted for record in drmad.history)
    for name, part in (("test accuracy", train), ("hyper drawings added", both)):
        drmad.restore_first_weights()
        for variable, value in zip(best.values(), best.best, strict=True):
            variable.assign(value)
        model.fit(part.x, part.y, size, epochs, verbose=0)
        found[name] = round(accuracy(model, test, classes), 4)
    for argument in ("learning_rate", "l2"):
        of_layers = best.record.hyperparameters[argument]
        found[argument] = {layer: float(f"{v:.3g}") for layer, v in of_layers.items()}
    found["strength"] = {n: [float(f"{x:.3g}") for x in v.numpy()] for n, v in tied.items()}
    found["tuned"] = sum(int(np.size(v)) for v in best.values())
    return found


# Tables ------------------------------------------------------------------------------------------


def tables(results: dict) -> str:
    """One for each set of options: methods as rows, means of seeds and each seed."""
    lines = []
    for title, known in results.items():
        lines += [f"#### {title}", ""]
        lines.append("| nets | tuned | lowest outer loss | test accuracy | of each seed | "
                     "hyper drawings added | CPU seconds |")  # fmt: skip
        lines.append("|" + " --- |" * 7)
        for method in (m for m in METHODS if m in known):
            runs = list(known[method].values())
            accuracies = [r["test accuracy"] for r in runs]
            lines.append(
                f"| {method} | {runs[0]['tuned']} | "
                f"{np.mean([min(r['outer_loss']) for r in runs]):.3f} | "
                f"**{np.mean(accuracies):.1%}** | {', '.join(f'{a:.1%}' for a in accuracies)} | "
                f"{np.mean([r['hyper drawings added'] for r in runs]):.1%} | "
                f"{np.mean([r['CPU seconds'] for r in runs if 'CPU seconds' in r]):.0f} |"
            )
        lines += ["", *of_pairs(known, "turned" in title), ""]
    return "\n".join(lines).replace("%", " %").rstrip()


def of_pairs(known: dict, turned: bool) -> list[str]:
    """The strengths that were learned: all, and of pairs turned alike and not alike."""
    rows = []
    for method in (m for m in METHODS if m in known):
        for layer in ("hidden_1", "hidden_2"):
            runs = known[method].values()
            found = [r["strength"][layer] for r in runs if layer in r["strength"]]
            if not found:
                continue
            logs = np.log(found)
            groups = [slice(None)]
            if turned:
                tasks = next(n for n in itertools.count(2) if n * (n - 1) // 2 == logs.shape[1])
                pairs = itertools.combinations(range(tasks), 2)
                alike = np.array([(b - a) % 2 == 0 for a, b in pairs])
                groups += [alike, ~alike]
            medians = [f"{np.exp(np.median(logs[:, which])):.2g}" for which in groups]
            ends = f"{np.min(found):.2g} to {np.max(found):.2g}"
            agree = ""
            if len(logs) > 1 and logs.shape[1] > 1:
                of_two = np.corrcoef(logs)[np.triu_indices(len(logs), 1)]
                agree = " to ".join(f"{c:.2f}" for c in sorted({of_two.min(), of_two.max()}))
            rows.append(f"| {' | '.join([method, layer, ends, agree, *medians])} |")
    head = ["nets", "layer", "strengths", "correlation of logs between seeds", "median"]
    head += ["of pairs turned alike", "of other pairs"] if turned else []
    return [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *rows] if rows else []


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="where TFDS finds or puts Omniglot")
    parser.add_argument("--omniglot-file", default=None, help="an .npz file instead")
    parser.add_argument("--turn", action="store_true", help="every second alphabet by 90 degrees")
    parser.add_argument("--methods", default=";".join(METHODS), help="some of them: a;b")
    parser.add_argument("--train-drawers", type=int, default=4)
    parser.add_argument("--hyper-drawers", type=int, default=4, help="the others are for the test")
    parser.add_argument("--side", type=int, default=14, choices=(28, 14, 7), help="in pixels")
    parser.add_argument("--units", type=int, default=50, help="of each hidden layer of a net")
    parser.add_argument("--epochs", type=int, default=12, help="of one training, one horizon")
    parser.add_argument("--batch-size", type=int, default=15, help="drawings of each alphabet")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of each at first")
    parser.add_argument("--l2", type=float, default=1e-3, help="of each layer at first")
    parser.add_argument("--strength", type=float, default=0.003, help="of each tie at first")
    parser.add_argument("--step", type=float, default=0.3, help="of Adam on the raw values")
    parser.add_argument("--trajectory", default="replay")
    parser.add_argument("--jit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=3, help="draws drawers and first weights")
    parser.add_argument("--results", type=Path, default=None, help="a JSON file to merge into")
    parser.add_argument("--tables", type=Path, default=None, help="only print what is in this one")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    if arguments.tables:
        print(tables(json.loads(arguments.tables.read_text())))
        return
    file = arguments.omniglot_file
    data = from_file(file) if file else from_tfds(arguments.data_dir)
    title = "every second alphabet turned" if arguments.turn else "as drawn"
    path, results = arguments.results, {}
    if path and path.exists():
        results = json.loads(path.read_text())
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    for arguments.seed in seeds:
        for method in arguments.methods.split(";"):
            print(f"{title}, {method}, seed {arguments.seed}", flush=True)
            found = run(method, data, arguments)
            print(f"test accuracy {found['test accuracy']:.1%}", flush=True)
            results.setdefault(title, {}).setdefault(method, {})[str(arguments.seed)] = found
            if path:
                path.write_text(json.dumps(results, indent=1) + "\n")
            keras.backend.clear_session()
    print(tables({title: results[title]}))


if __name__ == "__main__":
    main()
