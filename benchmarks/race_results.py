"""What benchmarks/race.py measured: kept as JSON, shown as tables and a picture."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np

# In which compute is counted; the place in a trial, and what one full training costs in it.
COUNTS = {
    "training steps run": (0, "steps"),
    "steps with walks back": (1, "steps"),
    "CPU seconds": (2, "seconds"),
}
LOSS = 3  # the place of the validation loss in a trial
_PLACE = ("data", "l2", "method", "seed")
_STYLES = {
    "defaults": ("0.6", ":"),
    "random search": ("tab:gray", "-"),
    "KerasTuner": ("tab:orange", "-"),
    "Optuna": ("tab:green", "-"),
    "Baydin": ("tab:purple", "-"),
    "DrMAD": ("tab:blue", "-"),
    "DrMAD, per neuron": ("tab:blue", "--"),
    "DrMAD, BFGS": ("tab:pink", "-"),
    "DrMAD, BFGS, per neuron": ("tab:pink", "--"),
    "DrMAD, full trainings": ("tab:cyan", "-"),
    "DrMAD, linear": ("tab:red", "-"),
}


def load(path: pathlib.Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def merge(path: pathlib.Path, new: Sequence[dict]) -> None:
    """Put results into a file, in the place of what was measured there of the same race."""
    places = {tuple(x[k] for k in _PLACE) for x in new}
    known = [x for x in load(path) if tuple(x[k] for k in _PLACE) not in places]
    known = sorted([*known, *new], key=lambda x: tuple(str(x[k]) for k in _PLACE))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_rounded(x), separators=(",", ":")) for x in known)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def _rounded(x):
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_rounded(v) for v in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def name(result: dict) -> str:
    return result["method"] + (", per neuron" if result["l2"] == "neuron" else "")


def of_data(results: Sequence[dict], data: str) -> dict[str, dict[int, dict]]:
    """Method -> seed -> result, in the order in which tables show them."""
    found: dict[str, dict[int, dict]] = {method: {} for method in _STYLES}
    for x in results:
        if x["data"] == data:
            found.setdefault(name(x), {})[x["seed"]] = x
    return {method: seeds for method, seeds in found.items() if seeds}


def needed(result: dict, loss: float, count: str) -> float:
    """The compute, in full trainings, in which a validation loss was reached; inf if never."""
    place, unit = COUNTS[count]
    costs = [t[place] for t in result["trials"] if t[LOSS] <= loss]
    return min(costs, default=math.inf) / result[unit]


def best_so_far(result: dict, count: str, grid: np.ndarray) -> np.ndarray:
    """The best validation loss up to each amount of compute, in full trainings; nan before any."""
    return np.array([
        min((t[LOSS] for t in result["trials"] if needed_cost(result, t, count) <= c),
            default=math.nan)
        for c in grid
    ])  # fmt: skip


def needed_cost(result: dict, trial: Sequence[float], count: str) -> float:
    place, unit = COUNTS[count]
    return trial[place] / result[unit]


def tables(results: Sequence[dict]) -> str:
    """Two tables for each data set: how it ended, and how soon DrMAD got where others ended."""
    parts = []
    for data in dict.fromkeys(x["data"] for x in results):
        found = of_data(results, data)
        parts += [f"### {data}: the end", ending(found), f"### {data}: how soon", how_soon(found)]
    return "\n\n".join(parts)


def ending(found: dict[str, dict[int, dict]]) -> str:
    rows = [
        ["method", "validation loss: median (lowest to highest)", "test error", "seeds",
         *(f"{count} / 30 trainings" for count in COUNTS)],
    ]  # fmt: skip
    for method, seeds in found.items():
        of = list(seeds.values())
        best = [x["best"] for x in of]
        rows.append([
            method,
            f"{np.median(best):.4f} ({min(best):.4f} to {max(best):.4f})",
            f"{np.median([x['test_error'] for x in of]):.2%}",
            str(len(of)),
            *(f"{np.median([needed_cost(x, x['trials'][-1], c) for x in of]) / 30:.2f}"
              for c in COUNTS),
        ])  # fmt: skip
    return markdown(rows)


def how_soon(found: dict[str, dict[int, dict]]) -> str:
    """Of each rival, the part of 30 trainings in which DrMAD reached what it reached with all."""
    rows = [["", "to reach the best of", "seeds", *COUNTS]]
    for method in (m for m in found if m.startswith("DrMAD")):
        for rival in (m for m in found if m != method):
            both = sorted(set(found[method]) & set(found[rival]))
            if not both or rival.startswith("DrMAD"):
                continue
            cells = []
            for count in COUNTS:
                costs = [needed(found[method][s], found[rival][s]["best"], count) for s in both]
                median = float(np.median(costs))
                cells.append("never" if math.isinf(median) else f"{median / 30:.2f}")
            reached = sum(found[method][s]["best"] <= found[rival][s]["best"] for s in both)
            rows.append([method, rival, f"{reached} of {len(both)}", *cells])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def figure(results: Sequence[dict]):
    """Best validation loss against compute: medians of the seeds."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(x["data"] for x in results))[::-1]
    counts = ("steps with walks back", "CPU seconds")
    drawing = Figure(figsize=(5.2 * len(sets), 7), layout="constrained")
    axes = drawing.subplots(len(counts), len(sets), squeeze=False)
    grid = np.linspace(0, 36, 289)
    for column, data in enumerate(sets):
        found = of_data(results, data)
        for row, count in enumerate(counts):
            ax = axes[row][column]
            for method, seeds in found.items():
                curves = np.array([best_so_far(x, count, grid) for x in seeds.values()])
                ended = np.median([needed_cost(x, x["trials"][-1], count) for x in seeds.values()])
                shown = (grid <= ended + 0.125) | (method == "defaults")
                color, line = _STYLES.get(method, (None, "-"))
                ax.plot(grid[shown], np.median(curves, 0)[shown], line, color=color, label=method)
            ends = [x["best"] for s in found.values() for x in s.values()]
            starts = [x["best"] for x in found.get("defaults", {}).values()] or ends
            ax.set(ylim=(0.95 * min(ends), 1.05 * max(np.median(starts), min(ends))))
            ax.axvline(6, color="0.8", lw=1)
            ax.set_xlabel(f"{count}, in full trainings")
            ax.set_ylabel("best validation loss so far")
            ax.set_title(data)
    handles: dict[str, object] = {}
    for ax in axes.flat:  # not every method ran on every data set
        handles.update(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    drawing.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize=8)
    return drawing
