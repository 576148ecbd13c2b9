"""The paper's experiments with several settings and seeds, written as JSON and printed as tables.

    python benchmarks/experiments.py --data-dir DIR                       # all that is missing
    python benchmarks/experiments.py --data-dir DIR --only "linear"       # one setting
    python benchmarks/experiments.py --tables                             # of what was measured
    python benchmarks/experiments.py --figures docs/images                # likewise

Each setting is a line of options of an example, `examples/mnist.py` or
`examples/mnist_schedules.py`. A run that docs/results/experiments_mnist.json holds already is not
run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "experiments_mnist.json"
sys.path.insert(0, str(ROOT / "examples"))

# name -> options of examples/mnist.py
L2 = {
    "scale, steps of 0.07: linear, Gauss-Newton": "--tune scales",
    "scale, steps of 0.07: linear at an even pace, Gauss-Newton": "--tune scales --pace steps",
    "scale, steps of 0.07: linear at an even pace, Hessian, T/10 steps (as published)": (
        "--tune scales --curvature hessian --reverse-steps 0.1 --pace steps"
    ),
    "scale, steps of 0.07: replay, Hessian (exact)": "--tune scales --trajectory replay",
    "scale, steps of 0.07, images redrawn: linear, Gauss-Newton": "--tune scales --redraw",
    "scale, steps of 0.07, images redrawn: linear at an even pace, Gauss-Newton": (
        "--tune scales --redraw --pace steps"
    ),
    "scale, Adam 0.15: linear, Gauss-Newton": "--tune scales --outer adam:0.15",
    "scale, Adam 0.15: linear at an even pace, Gauss-Newton": (
        "--tune scales --outer adam:0.15 --pace steps"
    ),
    "L2, steps of 0.14: linear, Gauss-Newton": "--outer sign:0.14",
    "L2, steps of 0.14: linear at an even pace, Gauss-Newton": "--outer sign:0.14 --pace steps",
    "L2, Adam 0.3: linear, Gauss-Newton": "--outer adam:0.3",
    "L2, Adam 0.3: linear at an even pace, Gauss-Newton": "--outer adam:0.3 --pace steps",
    "no tuning, scales of exp(0.2)": "--tune scales --updates 0 --log-scale 0.2",
    "no tuning, L2 lower by a factor of exp(8)": "--updates 0 --log-penalty -12",
}
# name -> options of examples/mnist_schedules.py
SCHEDULES = {
    "per layer and step, replay (exact)": "",
    "per layer and step, linear": "--trajectory linear --verify-every 10",
    "per layer and step, linear at an even pace": (
        "--trajectory linear --verify-every 10 --pace steps"
    ),
    "one for the run, replay": "--per model --over run",
    "per layer and step, auto": "--trajectory auto",
}


def load() -> dict:
    empty: dict = {"l2": {}, "schedules": {}}
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else empty


def rounded(values: Iterable[float], digits: int = 4) -> list[float]:
    return [float(f"{v:.{digits}g}") for v in values]


def run_l2(options: list[str], data: list) -> dict:
    import mnist

    arguments = mnist.parser().parse_args(options)
    drmad, watch = mnist.run(arguments, data)
    result = _common(drmad, watch)
    if arguments.updates > 1:  # the first walk is traced
        result["walk_per_training"] = round(watch.walk_per_training(), 2)
    if arguments.seed == 0:
        result["l2_of_pixels"] = rounded(
            mnist.penalties(drmad.history[-1], arguments.log_penalty), 3
        )
    return result


def run_schedules(options: list[str], data: list) -> dict:
    import mnist_schedules

    arguments = mnist_schedules.parser().parse_args(options)
    drmad, watch = mnist_schedules.run(arguments, data)
    result = _common(drmad, watch)
    verified = [r.verification for r in drmad.history if r.verification]
    if verified:
        result["cosines"] = {k: rounded(v[k]["cosine"] for v in verified) for k in verified[0]}
    result["settings"] = sorted({r.setting for r in drmad.history})
    if arguments.seed == 0:
        result["schedules"] = {
            argument: {layer: rounded(np.ravel(v), 3) for layer, v in of_layers.items()}
            for argument, of_layers in drmad.history[-1].hyperparameters.items()
        }
    return result


def _common(drmad: Any, watch: Any) -> dict:
    return {
        "test_error": rounded(watch.errors),
        "outer_loss": rounded(r.outer_loss for r in drmad.history),
        "skipped": sum(not r.accepted for r in drmad.history),
    }


def measure(part: str, settings: dict, run: Callable, data: list, seeds: int, only: str) -> None:
    """Run what is missing of one experiment, and write the JSON after each run."""
    for seed in range(seeds):
        for setting, options in settings.items():
            results = load()
            known = results[part].setdefault(setting, {"options": options, "seeds": {}})
            if only not in ("", setting) or str(seed) in known["seeds"]:
                continue
            print(f"{setting}, seed {seed}", flush=True)
            found = run([*options.split(), "--seed", str(seed)], data)
            results = load()
            results[part].setdefault(setting, known)["seeds"][str(seed)] = found
            RESULTS.write_text(json.dumps(results) + "\n")


def table(results: dict, settings: dict, last: tuple[str, Callable]) -> str:
    """One row for each setting that was measured; the last column is of one kind of experiment."""
    head = ["setting", "test error at the start", "after the updates", "mean of seeds",
            "last five nets", "outer loss", "skipped updates", last[0]]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for setting in settings:
        runs = list(results.get(setting, {"seeds": {}})["seeds"].values())
        if not runs:
            continue
        first, after = (np.array([r["test_error"][i] for r in runs]) for i in (0, -1))
        five = np.mean([r["test_error"][-5:] for r in runs if len(r["test_error"]) > 5] or np.nan)
        losses = [np.mean([r["outer_loss"][i] for r in runs]) for i in (0, -1)]
        rows.append(
            [
                setting,
                ", ".join(f"{100 * e:.1f}" for e in first),
                ", ".join(f"{100 * e:.2f}" for e in after),
                f"{first.mean():.1%} → **{after.mean():.2%}**".replace("%", " %"),
                "" if np.isnan(five) else f"{five:.2%}".replace("%", " %"),
                f"{losses[0]:.3f} → {losses[1]:.3f}",
                str(sum(r["skipped"] for r in runs)),
                last[1](runs),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def seconds(runs: list[dict]) -> str:
    found = [r["walk_per_training"] for r in runs if "walk_per_training" in r]
    return f"{np.median(found):.2f}" if found else ""


def cosines(runs: list[dict]) -> str:
    found = [r["cosines"] for r in runs if "cosines" in r]
    names = found[0] if found else ()
    medians = {k: np.median([c for f in found for c in f[k]]) for k in names}
    return ", ".join(f"{k}: {v:.2f}" for k, v in medians.items()).replace("_", " ")


def tables(results: dict) -> str:
    columns = ("seconds of a walk / of its training", seconds), ("median cosine", cosines)
    return "\n\n".join(
        table(results[part], settings, column)
        for (part, settings), column in zip(
            (("l2", L2), ("schedules", SCHEDULES)), columns, strict=True
        )
    )


def error_figure(results: dict, settings: dict) -> Figure:
    """The test error after each update, the mean of the seeds, one line for each setting."""
    figure = Figure(figsize=(9, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    colours: dict[str, str] = {}
    for setting in settings:
        runs = [r["test_error"] for r in results.get(setting, {"seeds": {}})["seeds"].values()]
        if runs and len(runs[0]) > 1:
            plain = setting.replace(" at an even pace", "")  # the two of a pair have one colour
            style = "o-" if plain == setting else "o:"
            colour = colours.setdefault(plain, f"C{len(colours)}")
            mean = 100 * np.mean(runs, 0)
            axes.plot(mean, style, color=colour, markersize=3, label=setting)
    axes.set(xlabel="updates", ylabel="test error (%)", ylim=(0, None))
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="x-small", loc="outside right upper")
    return figure


def figures(results: dict, folder: Path) -> None:
    import mnist
    import mnist_schedules

    folder.mkdir(parents=True, exist_ok=True)
    redrawn = "scale, steps of 0.07, images redrawn: linear, Gauss-Newton"
    pixels = results["l2"][redrawn]["seeds"]["0"]["l2_of_pixels"]
    of_steps = results["schedules"]["per layer and step, replay (exact)"]["seeds"]["0"]
    for name, figure in (
        ("l2", mnist.image_of(np.array(pixels))),
        ("l2_test_error", error_figure(results["l2"], L2)),
        ("schedules", mnist_schedules.schedules(of_steps["schedules"])),
        ("schedules_test_error", error_figure(results["schedules"], SCHEDULES)),
    ):
        figure.savefig(folder / f"mnist_{name}.png")
        print(folder / f"mnist_{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="where TFDS finds or puts MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="one setting, by its name in the tables")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--figures", type=Path, help="a folder for pictures")
    arguments = parser.parse_args()
    if arguments.figures:
        figures(load(), arguments.figures)
    elif not arguments.tables:
        import mnist

        data = mnist.images(arguments.data_dir, 10000, 3000)
        for part, settings, run in (
            ("l2", L2, run_l2),
            ("schedules", SCHEDULES, run_schedules),
        ):
            measure(part, settings, run, data, arguments.seeds, arguments.only)
    print(tables(load()))


if __name__ == "__main__":
    main()
