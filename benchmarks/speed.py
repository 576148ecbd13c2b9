"""What everything costs, in training steps: reverse steps, recording, compiling, memory, scaling.

    python benchmarks/speed.py --part steps       # reverse steps and updates of three nets
    python benchmarks/speed.py --part recording   # what it adds to an epoch of fit
    python benchmarks/speed.py --part scaling     # against T, weights, hyperparameters
    python benchmarks/speed.py --part memory      # peak memory against T, in processes of their own
    python benchmarks/speed.py --tables           # of what was measured
    python benchmarks/speed.py --figure docs/images/performance.png

Unit of time is one training step in a graph, of the same run and in the same process: the faster of
a plain `tf.while_loop` and one compiled by XLA. Time is CPU time of the process with one thread
for the operations, which other work on the machine disturbs least. Everything is measured in turn,
several rounds, in several processes, and medians are given. Results are merged into
docs/results/speed.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf

import keras_drmad as kd
from keras_drmad import trajectories
from keras_drmad.compilation import Compilation
from keras_drmad.estimator import Estimator
from keras_drmad.objectives import OuterLoss
from keras_drmad.settings import Setting

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "docs/results/speed.json"
TRAJECTORIES = ("linear", "piecewise", "stored", "replay")
CURVATURES = ("gauss_newton", "hessian", "finite_difference")
# A whole update by a straight line: packing, the outer loss, the walk.
UPDATES = {
    "update, linear": None,
    "update, linear, reverse_steps=0.5": 0.5,
    "update, linear, reverse_steps=0.2": 0.2,
}
# Where penalties alone are tuned, nothing needs the gradient of a step that is not recomputed.
PENALTIES = [("linear", "gauss_newton"), ("linear", "hessian"), ("replay", "hessian")]
# Compiled by XLA or not. On a CPU convolutions take XLA tens of times as long: said, not measured.
WAYS = {"mlp": (False, True), "tokens": (False, True), "conv": (False,)}


# Nets and data -----------------------------------------------------------------------------------


def net(name: str, width: int = 50) -> tuple[keras.Model, tuple[int, ...], int, int]:
    """A model; the shape of an example; classes; and the size of a batch."""
    layers = keras.layers
    if name == "mlp":
        hidden = [layers.Dense(width, activation="tanh") for _ in range(3)]
        return keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(10)]), (784,), 10, 50
    if name == "conv":
        blocks = []
        for filters in (16, 32, 64):
            blocks += [
                layers.Conv2D(filters, 3, padding="same", use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.MaxPooling2D(),
            ]
        model = keras.Sequential(
            [keras.Input((32, 32, 3)), *blocks, layers.Flatten(), layers.Dense(10)]
        )
        return model, (32, 32, 3), 10, 64
    tokens = keras.Input((32,), dtype="int32")
    x = layers.Embedding(500, 32)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 16)(x, x))
    x = layers.LayerNormalization()(x + layers.Dense(32)(layers.Dense(64, "gelu")(x)))
    x = layers.Dense(4)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(tokens, x), (32,), 4, 32


def grains(name: str) -> dict:
    """Hyperparameters: a few hundred to a thousand; or one, or one for each weight."""
    per = {"mlp": "input", "all": "weight", "one": "model"}.get(name, "neuron")
    return dict(l2=kd.Hyperparameter(1e-4, per=per))


class Case:
    """A compiled model with random data of its shapes, recorded and walked at will."""

    def __init__(
        self, name: str, steps: int, tuned: str | None = None, width: int = 50, rate: bool = True
    ):
        keras.utils.set_random_seed(0)
        self.steps = steps
        self.model, shape, classes, self.size = net(name, width)
        rates = kd.Hyperparameter(0.01, per="layer") if rate else 0.01
        self.model.compile(
            kd.optimizers.SGD(rates, momentum=0.9, **grains(tuned or name)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=False,
        )
        self.model.optimizer.build(self.model.trainable_variables)
        rng = np.random.default_rng(0)
        count = min(steps, 200) * self.size
        if name == "tokens":
            x = rng.integers(0, 500, (count, *shape))
        else:
            x = rng.normal(size=(count, *shape)).astype("float32")
        data = tf.data.Dataset.from_tensor_slices((x, rng.integers(0, classes, count)))
        data = data.batch(self.size, drop_remainder=True).cache()
        self.data = data.repeat().take(steps)
        self.outer = OuterLoss(self.model, list(data.take(8)))
        self.estimator = Estimator(self.model, jit_compile=False)
        self.start = self.model.get_weights(), [v.numpy() for v in self.model.optimizer.variables]

    def fit(self, *callbacks: keras.callbacks.Callback) -> float:
        """Seconds of an epoch, from the same start."""
        self.model.set_weights(self.start[0])
        for variable, value in zip(self.model.optimizer.variables, self.start[1], strict=True):
            variable.assign(value)
        started = time.process_time()
        self.model.fit(self.data, verbose=0, shuffle=False, callbacks=list(callbacks))
        return time.process_time() - started

    def record(self, settings: list[Setting]) -> float:
        """Seconds to pack what an epoch left."""
        self.estimator.begin(self.steps, settings)
        self.fit(Armed(self.estimator))
        started = time.process_time()
        self.estimator.finish(self.outer)
        return time.process_time() - started

    def walk(self, setting: Setting, compiled: bool) -> float:
        """Seconds of a walk."""
        self.estimator._compilation = Compilation(compiled)
        started = time.process_time()
        found = self.estimator.walk(setting)
        seconds = time.process_time() - started
        if found.problem:
            raise RuntimeError(f"{setting}: {found.problem}")
        return seconds

    def train(self, compiled: bool) -> float:
        """Seconds of the recorded run once more, in one graph that keeps no state."""
        estimator = self.estimator
        if not hasattr(self, "_train"):
            loop = estimator._loop("gauss_newton", False)
            apply, steps = estimator._batches.apply, self.steps

            def train(run, state):
                def body(i, state):
                    def step(batch):
                        return loop.steps.forward(
                            state, loop.steps.given(run, tf.cast(i, tf.int64), i, batch)
                        )

                    return i + 1, apply(run.batches, i, step)

                return tf.while_loop(
                    lambda i, _: i < steps, body, (tf.constant(0), state), parallel_iterations=1
                )[1]

            self._train = {
                on: tf.function(train, jit_compile=on, autograph=False) for on in (False, True)
            }
        state = estimator.recorder.snapshot()
        started = time.process_time()
        self._train[compiled](estimator._run, state)[0].numpy()
        return time.process_time() - started


class Armed(keras.callbacks.Callback):
    """Records every step."""

    def __init__(self, estimator: Estimator):
        super().__init__()
        self.estimator = estimator

    def on_train_batch_begin(self, batch, logs=None):
        self.estimator.arm(lambda spec: None)


def settings_of(pairs) -> dict[tuple[str, str, bool], Setting]:
    """A setting, with a trajectory of its own, for each (trajectory, curvature, compiled)."""
    return {pair: Setting(trajectories.get(pair[0]), pair[1]) for pair in pairs}


def way(compiled: bool) -> str:
    return "XLA" if compiled else "plain"


# Parts -------------------------------------------------------------------------------------------


def steps(name: str, count: int, rounds: int, processes: int) -> dict:
    """Reverse steps by every setting, compile times, recording, whole updates.

    By processes of their own, because the same graph is not equally fast in each: of max pooling's
    gradients TensorFlow gives some to oneDNN, others not, by chance. The unit is the fastest.
    """
    runs = []
    for _ in range(processes):
        command = [sys.executable, __file__, "--raw", name, str(count), str(rounds)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs.append(json.loads(out.splitlines()[-1]))
    took = {key: [s for run in runs for s in run["took"][key]] for key in runs[0]["took"]}
    of_each = [{k: statistics.median(s) for k, s in run["took"].items()} for run in runs]
    median = {key: statistics.median(of[key] for of in of_each) for key in took}
    units = [min(of[f"train, {way(on)}"] for on in WAYS[name]) for of in of_each]
    unit = min(units)
    pairs_of_fits = zip(took["fit, recorded"], took["fit"], strict=True)
    first = {key: statistics.median(run["first"][key] for run in runs) for key in runs[0]["first"]}
    return {
        "steps": count,
        "rounds": rounds,
        "processes": processes,
        "weights": runs[0]["weights"],
        "hyperparameters": runs[0]["hyperparameters"],
        "in_training_steps": {key: value / unit for key, value in median.items()},
        "spread": {key: (min(s) / unit, max(s) / unit) for key, s in took.items()},
        "slowest_unit": max(units) / unit,
        "recording_overhead": statistics.median(a / b for a, b in pairs_of_fits) - 1.0,
        "first_seconds": {k: first[k] - median[k] for k in first if k.endswith(("plain", "XLA"))},
        "slower_by_xla": slower_by_xla(name) if True not in WAYS[name] else None,
    }


def raw(name: str, count: int, rounds: int) -> None:
    """Print the seconds of everything in this process."""
    ways = WAYS[name]
    case, penalties = Case(name, count), Case(name, count, rate=False)
    pairs = [
        (t, c, on) for t in TRAJECTORIES for c in CURVATURES for on in ways
        if c != "finite_difference" or t == "linear"
    ]  # fmt: skip
    took: dict[str, list[float]] = {}
    first: dict[str, float] = {}

    def note(key: str, seconds: float) -> None:
        if key in first:
            took.setdefault(key, []).append(seconds)
        else:
            first[key] = seconds

    for _ in range(rounds + 1):
        for pair, setting in settings_of(pairs).items():
            note("pack", case.record([setting]))
            note(f"{pair[0]}, {pair[1]}, {way(pair[2])}", case.walk(setting, pair[2]))
            if pair[0] == "linear" and pair[1] == "gauss_newton":
                note(f"train, {way(pair[2])}", case.train(pair[2]))
        for pair, setting in settings_of(
            [(*pair, on) for pair in PENALTIES for on in ways]
        ).items():
            penalties.record([setting])
            key = f"{pair[0]}, {pair[1]}, penalties alone, {way(pair[2])}"
            note(key, penalties.walk(setting, pair[2]))
        # Adjacent, so that what else the machine does falls on both.
        for on in ways:
            for key, visited in UPDATES.items():
                path = trajectories.get("linear")
                setting = Setting(path, "gauss_newton", reverse_steps=visited, max_batches=50)
                note("fit", case.fit())
                case.estimator.begin(count, [setting])
                note("fit, recorded", case.fit(Armed(case.estimator)))
                packing = _seconds(lambda: case.estimator.finish(case.outer))
                note("pack, 50 batches", packing)
                note(f"{key}, {way(on)}", packing + case.walk(setting, on))
    hyperparameters = sum(int(np.prod(v.shape)) for v in case.model.optimizer.raw_variables)
    found = {"took": took, "first": first, "weights": case.model.count_params()}
    print(json.dumps(found | {"hyperparameters": hyperparameters}))


def slower_by_xla(name: str) -> dict[str, float]:
    """How many times longer XLA takes, over a few steps."""
    case, found = Case(name, 8), {}
    for curvature in ("gauss_newton", "hessian"):
        seconds = {}
        for on in (False, False, True, True):  # the second time without tracing
            setting = Setting(trajectories.get("linear"), curvature)
            case.record([setting])
            seconds[on] = case.walk(setting, on)
        found[f"linear, {curvature}"] = seconds[True] / seconds[False]
    return found


def recording(name: str, count: int, rounds: int) -> dict:
    """What recording for a straight line adds to an epoch of `fit`, pair by pair."""
    case = Case(name, count)
    added = []
    for _ in range(2 * rounds + 1):
        alone = case.fit()
        setting = Setting(trajectories.get("linear"), "gauss_newton", max_batches=50)
        case.estimator.begin(count, [setting])
        added.append(case.fit(Armed(case.estimator)) / alone - 1.0)
        case.estimator.finish(case.outer)
        case.estimator.forget()
    added = sorted(added[1:])  # the first is traced
    return {"median": statistics.median(added), "lowest": added[0], "highest": added[-1]}


def _seconds(function) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def scaling(rounds: int) -> dict:
    """A linear and a replayed walk against steps, weights and hyperparameters, for the MLP."""
    found: dict[str, dict] = {"steps": {}, "weights": {}, "hyperparameters": {}}
    for count in (200, 600, 2000, 6000, 20000):
        found["steps"][count] = _ratios(Case("mlp", count), rounds if count < 5000 else 1)
    for width in (12, 50, 400, 1800):
        case = Case("mlp", 40 if width > 100 else 200, width=width)
        found["weights"][case.model.count_params()] = _ratios(case, rounds)
    for grain in ("one", "mlp", "conv", "all"):
        case = Case("mlp", 200, tuned=grain)
        count = sum(int(np.prod(v.shape)) for v in case.model.optimizer.raw_variables)
        found["hyperparameters"][count] = _ratios(case, rounds)
    return found


def _ratios(case: Case, rounds: int) -> dict[str, float]:
    """In training steps of the same case; compiled."""
    pairs = [("linear", "gauss_newton", True), ("replay", "hessian", True)]
    took: dict[str, list[float]] = {}
    for i in range(rounds + 1):
        for pair, setting in settings_of(pairs).items():
            case.record([setting])
            seconds = {f"{pair[0]}, {pair[1]}": case.walk(setting, True), "train": case.train(True)}
            for key, value in seconds.items():
                took.setdefault(key, []).extend([value] * (i > 0))
    median = {key: statistics.median(seconds) for key, seconds in took.items()}
    return {key: value / median["train"] for key, value in median.items()}


def memory(name: str) -> dict:
    """Peak resident memory over that of the untrained program, in MB, against T."""
    found: dict[str, dict[int, float]] = {}
    for trajectory in ("fit alone", "linear", "replay", "stored"):
        for count in (200, 1000, 5000, 20000):
            if trajectory in ("replay", "stored") and count > 5000:
                continue
            command = [sys.executable, __file__, "--peak", name, trajectory, str(count)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.setdefault(trajectory, {})[count] = json.loads(out.splitlines()[-1])
            print(trajectory, count, found[trajectory][count], flush=True)
    return found


def peak(name: str, trajectory: str, count: int) -> None:
    """Print the peak of one program: two updates of so many steps."""
    case = Case(name, count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    kept = 0.0
    for _ in range(2):
        if trajectory == "fit alone":
            case.fit()
            continue
        curvature = "gauss_newton" if trajectory == "linear" else "hessian"
        bound = 200 if trajectory == "linear" else None
        setting = Setting(trajectories.get(trajectory), curvature, max_batches=bound)
        case.record([setting])
        kept = case.estimator.nbytes(setting) / 2**20
        case.walk(setting, False)
        case.estimator.forget()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"start": before, "peak": after, "kept": kept}))


# Results -----------------------------------------------------------------------------------------


def merge(part: str, found: dict) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[part] = {**results.get(part, {}), **found}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def tables() -> None:
    results = json.loads(RESULTS.read_text())
    for name, row in results.get("steps", {}).items():
        cost = row["in_training_steps"]
        print(f"\n{name}: {row['weights']:,} weights, {row['hyperparameters']:,} hyperparameters, "
              f"T = {row['steps']}, medians of {row['rounds']} rounds in each of "
              f"{row['processes']} processes\n")  # fmt: skip
        print("| trajectory | curvature | plain | XLA | compiling, s (plain, XLA) |")
        print("| --- | --- | --- | --- | --- |")
        for key in cost:
            if not key.endswith(", plain") or key.startswith(("train", "update")):
                continue
            kind = key.removesuffix(", plain")
            names = [f"{kind}, {way(on)}" for on in WAYS[name]]
            costs = [f"{cost[k]:.2f}" for k in names] + ["not measured"] * (2 - len(names))
            compiling = ", ".join(f"{row['first_seconds'][k]:.1f}" for k in names)
            print(f"| {kind.replace(', ', ' | ', 1)} | {' | '.join(costs)} | {compiling} |")
        for key in UPDATES:
            if f"{key}, plain" not in cost:
                continue  # measured before this was
            best = min(cost[f"{key}, {way(on)}"] for on in WAYS[name])
            print(f"{key}: {best / cost['fit']:.0%} of the epoch that it follows")
        for key in ("train, plain", "train, XLA", "fit", "fit, recorded", "pack"):
            if key in cost:
                print(f"{key}: {cost[key]:.2f}")
        for key, ratio in (row.get("slower_by_xla") or {}).items():
            print(f"{key}: XLA takes {ratio:.0f} times as long")
        print(f"a training step of the slowest process: {row['slowest_unit']:.2f}")
        print(f"recording overhead: {row['recording_overhead']:+.1%}")
    for name, row in results.get("recording", {}).items():
        print(f"\n{name}: recording adds {row['median']:+.1%} to an epoch "
              f"({row['lowest']:+.0%} to {row['highest']:+.0%})")  # fmt: skip
    for axis, rows in results.get("scaling", {}).items():
        print(f"\n| {axis} | linear, gauss_newton | replay, hessian |\n| --- | --- | --- |")
        for count in sorted(rows, key=int):
            row = rows[count]
            print(f"| {int(count):,} | {row['linear, gauss_newton']:.2f} | "
                  f"{row['replay, hessian']:.2f} |")  # fmt: skip
    for name, rows in results.get("memory", {}).items():
        print(f"\n{name}\n\n| | T | peak, MB | over the start, MB | kept, MB |")
        print("| --- | --- | --- | --- | --- |")
        for kind, of in rows.items():
            for count in sorted(of, key=int):
                row = of[count]
                print(f"| {kind} | {count} | {row['peak']:.0f} | {row['peak'] - row['start']:.0f} "
                      f"| {row['kept']:.1f} |")  # fmt: skip


def figure(path: pathlib.Path) -> None:
    """Reverse steps of each net, and how they grow, as pictures."""
    import matplotlib.pyplot as plt

    results = json.loads(RESULTS.read_text())
    axes_of = [("steps", "T"), ("weights", "weights"), ("hyperparameters", "hyperparameters")]
    drawing, all_axes = plt.subplots(1, 4, figsize=(15, 3.8), width_ratios=[1.6, 1, 1, 1])
    bars, *curves = all_axes
    kinds = [f"{t}, {c}" for t in TRAJECTORIES for c in ("gauss_newton", "hessian")]
    nets = list(results["steps"])
    for i, name in enumerate(nets):
        cost = results["steps"][name]["in_training_steps"]
        best = [min(cost[f"{kind}, {way(on)}"] for on in WAYS[name]) for kind in kinds]
        places = [k + (i - (len(nets) - 1) / 2) * 0.27 for k in range(len(kinds))]
        bars.barh(places, best, 0.26, label=name)
    bars.set_yticks(range(len(kinds)), [kind.replace("_", "-") for kind in kinds])
    bars.invert_yaxis()
    bars.set_xlabel("training steps for a reverse step")
    bars.set_xlim(0, 1.35 * bars.get_xlim()[1])
    bars.legend(loc="upper right")
    for axes, (axis, label) in zip(curves, axes_of, strict=True):
        rows = results["scaling"][axis]
        counts = sorted(rows, key=int)
        for kind in ("linear, gauss_newton", "replay, hessian"):
            axes.plot(list(map(int, counts)), [rows[n][kind] for n in counts], "o-", label=kind)
        axes.set(xscale="log", ylim=(0, None), xlabel=label)
    curves[0].legend()
    drawing.tight_layout()
    drawing.savefig(path, dpi=110)


def main() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part", choices=("steps", "recording", "scaling", "memory"), action="append"
    )
    parser.add_argument("--nets", nargs="+", default=["mlp", "conv", "tokens"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--figure", type=pathlib.Path)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--raw", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, trajectory, count = arguments.peak
        peak(name, trajectory, int(count))
        return
    if arguments.raw:
        name, *numbers = arguments.raw
        raw(name, *map(int, numbers))
        return
    for part in arguments.part or ():
        if part == "scaling":
            merge(part, scaling(max(1, arguments.rounds // 2)))
        else:
            for name in arguments.nets:
                count = {"mlp": 400, "conv": 60, "tokens": 100}[name]
                if part == "memory":
                    merge(part, {name: memory(name)})
                elif part == "steps":
                    row = steps(name, count, arguments.rounds, arguments.processes)
                    merge(part, {name: row})
                else:
                    merge(part, {name: recording(name, count, arguments.rounds)})
    if arguments.part or arguments.tables:
        tables()
    if arguments.figure:
        figure(arguments.figure)


if __name__ == "__main__":
    main()
