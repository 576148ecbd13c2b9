"""What benchmarks/peers.py measured: kept as JSON, shown as tables and a picture."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]

# Kinds of seconds that have a first run, which compiles, in each process.
WARMED = ("training", "both", "training, graph")


def summary(rounds: Sequence[Row]) -> Row:
    """Medians over what several processes measured."""
    seconds: dict[str, Row] = {}
    for kind in rounds[0]["seconds"]:
        cut = int(kind in WARMED)
        warm = [pair for x in rounds for pair in x["seconds"][kind][cut:]]
        cpu, clock = zip(*warm, strict=True)
        seconds[kind] = {
            "cpu": median(cpu),
            "clock": median(clock),
            "cpu spread": [min(cpu), max(cpu)],
        }
        if cut:
            first = median(x["seconds"][kind][0][0] for x in rounds)
            seconds[kind]["first, more"] = first - median(cpu)
    last = rounds[-1]
    peaks = {kind: median(x["peaks"][kind] for x in rounds) for kind in last["peaks"]}
    kept = {key: last[key] for key in ("cosine", "norm", "loss", "products")}
    return {"rounds": len(rounds), "seconds": seconds, "peaks": peaks, **kept}


def in_graph(row: Row, clock: str = "cpu") -> tuple[float, float]:
    """Seconds of training alone and with the hypergradient, without what Keras puts around."""
    seconds = row["seconds"]
    if "after training" not in seconds:
        return seconds["training"][clock], seconds["both"][clock]
    training = seconds["training, graph"][clock]
    return training, training + seconds["after training"][clock]


def line(row: Row) -> str:
    """How it goes, for those who wait."""
    training, both = in_graph(row)
    return (
        f"{row['title']}: {training:.3f} s, {both:.3f} s with the hypergradient, "
        f"{row['peaks']['both']:.0f} MB"
    )


def load(path: pathlib.Path) -> dict[str, dict[str, Row]]:
    """Number of steps -> peer -> row."""
    return json.loads(path.read_text()) if path.exists() else {}


def merge(path: pathlib.Path, steps: int, name: str, row: Row) -> None:
    found = load(path)
    found.setdefault(str(steps), {})[name] = _rounded(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_rounded(v) for v in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


# Tables ------------------------------------------------------------------------------------------


def tables(path: pathlib.Path) -> None:
    for steps, rows in load(path).items():
        runs = sorted({row["run"] for row in rows.values()})
        rounds = sorted({row["rounds"] for row in rows.values()})
        print(f"\nT = {int(steps):,}; rounds: {_list(rounds)}; run of {_list(runs)}\n")
        _print(
            "peer", "training", "with hypergradient", "ratio", "by the clock", "first call, more",
            "peak, MB: training", "with hypergradient", "(first call)",
            rows=[_row(x) for x in rows.values()],
        )  # fmt: skip
        print()
        _print(
            "peer", "cosine: L2", "rates", "norm: L2", "rates", "products",
            rows=[_exactness(x) for x in rows.values()],
        )  # fmt: skip
        ours = [x for x in rows.values() if "after training" in x["seconds"]]
        print()
        _print(
            "keras_drmad, by `fit`", "`fit`", "recorded, with hypergradient", "ratio",
            "after the training", "part of `fit`",
            rows=[_by_fit(x) for x in ours],
        )  # fmt: skip


def _row(row: Row) -> list[str]:
    (training, both), (_, clock) = in_graph(row), in_graph(row, "clock")
    peaks = row["peaks"]
    first = row["seconds"]["both"]["first, more"]
    return [
        row["title"], f"{training:.3f}", f"{both:.3f}", f"{both / training:.2f}", f"{clock:.3f}",
        f"{first:.1f}", *(f"{peaks[k]:.0f}" for k in ("training", "both", "both, first time")),
    ]  # fmt: skip


def _exactness(row: Row) -> list[str]:
    parts = [row[kind][part] for kind in ("cosine", "norm") for part in ("l2", "rates")]
    products = "" if row["products"] is None else f"{row['products']:.2f}"
    return [row["title"], *(f"{x:.5f}" for x in parts), products]


def _by_fit(row: Row) -> list[str]:
    seconds = row["seconds"]
    fit, both, after = (seconds[k]["cpu"] for k in ("training", "both", "after training"))
    return [
        row["title"], f"{fit:.3f}", f"{both:.3f}", f"{both / fit:.2f}", f"{after:.3f}",
        f"{after / fit:.0%}",
    ]  # fmt: skip


def _print(*heads: str, rows: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


# The picture -------------------------------------------------------------------------------------


def figure(path: pathlib.Path, to: pathlib.Path) -> None:
    """Seconds, training and the rest, and memory, of each peer; a row for each number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = load(path)
    height = 0.8 + 0.3 * max(map(len, found.values()))
    fig, axes = plt.subplots(
        len(found), 2, figsize=(11, height * len(found)), layout="constrained", squeeze=False
    )
    for (steps, rows), (left, right) in zip(found.items(), axes, strict=True):
        titles = [x["title"].removeprefix("keras_drmad, ") for x in rows.values()]
        ours = ["after training" in x["seconds"] for x in rows.values()]
        colours = ["tab:blue" if x else "tab:gray" for x in ours]
        seconds = [in_graph(x) for x in rows.values()]
        _bars(left, titles, [b for _, b in seconds], colours, "{:.2f} s")
        left.barh(titles, [t for t, _ in seconds], color="black", height=0.25)
        left.set_title(f"T = {int(steps):,}: CPU seconds (black: training alone)", fontsize=10)
        peaks = [x["peaks"]["both"] for x in rows.values()]
        _bars(right, titles, peaks, colours, "{:.0f} MB")
        right.set_yticklabels([])
        right.set_title("peak memory over that of the loaded program", fontsize=10)
    fig.suptitle("Training with its hypergradient: keras_drmad in blue, others in gray")
    to.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(to, dpi=110)


def _bars(axis, titles, values, colours, label) -> None:
    bars = axis.barh(titles, values, color=colours, height=0.7, alpha=0.75)
    axis.bar_label(bars, [label.format(v) for v in values], padding=3, fontsize=9)
    axis.set_xlim(0, 1.2 * max(values))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
