"""What benchmarks/fidelity.py measured: kept as JSON, shown as tables and a figure."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Collection

import numpy as np

import keras_drmad as kd

KINDS = ("l2/weight", "l2/input", "l2/neuron", "l2/layer", "rate/layer", "rate/step", "momentum")
DRAWN = ("l2/weight", "l2/input", "rate/layer", "rate/step")
MEASURES = ("cosine", "signs", "norm")


def load(path: pathlib.Path) -> dict:
    """What was measured so far; kinds are kept as lists, to save room."""
    if not path.exists():
        return {"settings": [], "auto": []}
    known = json.loads(path.read_text())
    for x in known["settings"]:
        x["kinds"] = {k: dict(zip(MEASURES, v, strict=True)) for k, v in x["kinds"].items()}
    return known


def merge(path: pathlib.Path, lines: list[dict], chosen: list[dict]) -> None:
    """Put results into a file, in the place of what was measured there on the same run."""
    known = load(path)
    lines = [dict(x) for x in lines]
    for part, new in (("settings", lines), ("auto", chosen)):
        there = {place(x) for x in new}
        known[part] = [x for x in known[part] if place(x) not in there] + new
    for x in known["settings"]:
        x["kinds"] = {k: [v[name] for name in MEASURES] for k, v in x["kinds"].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(
        f'"{part}": [\n'
        + ",\n".join(json.dumps(rounded(x), separators=(",", ":")) for x in known[part])
        + "\n]"
        for part in known
    )
    path.write_text("{" + body + "}\n")


def place(x: dict) -> tuple:
    return x["row"], x["seed"], x.get("setting")


def rounded(x):
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.3g}") if math.isfinite(x) else None
    return x


def median(values) -> float:
    known = [math.nan if v is None else v for v in values]
    return float(np.median(known)) if known else math.nan


def lost(x: dict) -> bool:
    """Whether a walk ended early, or was repeated with another curvature."""
    return bool(x["problem"] or x["fallback"])


def names(lines: list[dict]) -> list[str]:
    """Settings, the exact one and its parts first."""
    found = dict.fromkeys(x["setting"] for x in lines)
    return sorted(found, key=lambda name: not name.startswith("replay, Hessian"))


def summary(known: dict, kind: str) -> str:
    """Markdown: cosine / norm ratio per setting and row, of one kind of hyperparameter."""
    rows = list(dict.fromkeys(x["row"] for x in known["settings"]))
    text = [f"\n{kind}\n", f"| setting | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    for name in names(known["settings"])[1:]:
        cells = []
        for row in rows:
            here = [x for x in known["settings"] if (x["row"], x["setting"]) == (row, name)]
            good = [x["kinds"][kind] for x in here if not lost(x)]
            cosine, norm = (median(x[k] for x in good) for k in ("cosine", "norm"))
            cell = f"{cosine:.3f} / {norm:.2g}" if good else "stopped" if here else ""
            cells.append(cell + ("*" if good and len(good) < len(here) else ""))
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def tables(known: dict) -> str:
    """Markdown: cosine / norm ratio per setting and kind of hyperparameter, a table a row."""
    text = []
    for row in dict.fromkeys(x["row"] for x in known["settings"]):
        here = [x for x in known["settings"] if x["row"] == row]
        seeds = len({x["seed"] for x in here})
        shown = [k for k in (*KINDS, "initial weights") if k in here[0]["kinds"]]
        text += [f"\n{row}, seeds: {seeds}\n", f"| setting | cost | MB | {' | '.join(shown)} |",
                 "|---" * (len(shown) + 3) + "|"]  # fmt: skip
        for name in names(here):
            same = [x for x in here if x["setting"] == name]
            cells = []
            for kind in shown:
                found = [x["kinds"][kind] for x in same if kind in x["kinds"] and not lost(x)]
                cosine = median(x["cosine"] for x in found)
                norm = median(x["norm"] for x in found)
                cells.append(f"{cosine:.3f} / {norm:.2g}" if found else "")
            cost, size = same[0]["cost"], same[0]["bytes"] / 1e6
            count = sum(map(lost, same))
            remark = f" (stopped in {count} of {seeds})" if count else ""
            bounded = median(x.get("bounded") or 0.0 for x in same)
            remark += f" (bounded on {bounded:.1%} of the steps)" if bounded else ""
            cells = [f"{name}{remark}", f"{cost:.2f}", f"{size:.1f}", *cells]
            text.append("| " + " | ".join(cells) + " |")
        for x in known["auto"]:
            if x["row"] == row:
                text.append(f"\n`auto`, seed {x['seed']}: {x['chosen']}: {x['why']}")
    return "\n".join(text)


def figure(known: dict, row: str, without: Collection[str]) -> object:
    """Cosine against cost and memory on one row, medians of the seeds."""
    here = [x for x in known["settings"] if x["row"] == row and x["setting"] not in without]
    rows = []
    for name in dict.fromkeys(x["setting"] for x in here):
        same = [x for x in here if x["setting"] == name and not lost(x)]
        for kind in DRAWN if same else ():
            cosine = median(x["kinds"][kind]["cosine"] for x in same)
            title = "replay, Hessian, last 1/8 to all" if "replay, Hessian" in name else name
            rows.append({"setting": title, "hyperparameter": kind, "cosine": cosine,
                         "cost": same[0]["cost"], "memory": same[0]["bytes"]})  # fmt: skip
    return kd.plots.fidelity(rows)
