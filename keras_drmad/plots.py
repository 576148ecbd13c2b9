"""Pictures of a callback's history. Needs matplotlib; each function returns a figure.

    kd.plots.outer_loss(callback.history).savefig("outer_loss.png")

A figure belongs to no window: save it, or let a notebook show it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from keras_drmad.reports import Entry, Record, as_history, as_image, cosines, entries, horizon_of

_COLOURS = "viridis_r"  # updates from light to dark


def schedules(history: Any, argument: str | None = None) -> Any:
    """Draw the schedules over the training steps, one panel per layer and one line per update.

    Example:

    >>> kd.plots.schedules(callback.history, "learning_rate").savefig("schedules.png")

    Args:
        history: `DrMADCallback.history`, or the path of a saved one.
        argument: Which hyperparameter. Defaults to `None`: all that have values over time.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if nothing in the history has values over time.
        ImportError: if matplotlib is not installed.
    """
    records = as_history(history)
    _check_name(argument, "argument")
    panels: dict[str, list[tuple[int, int, Entry]]] = {}
    for i, record in enumerate(records):
        steps = horizon_of(records[: i + 1])
        for entry in entries(record):
            if entry.label.in_time and argument in (None, entry.label.argument):
                panels.setdefault(entry.name, []).append((i + 1, steps, entry))
    if not panels:
        which = "Nothing" if argument is None else f"No {argument!r}"
        raise ValueError(
            f"{which} in this history has values over time. Pass "
            "kd.Hyperparameter(..., over='step') to the optimizer to tune a schedule. The history "
            f"holds {_names(records)}."
        )
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(max(4.5, 3.2 * columns), 0.6 + 2.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    colour = _by_update(len(records))
    for ax, (name, lines) in zip(axes.flat, panels.items(), strict=False):
        for number, steps, entry in lines:
            edges = np.linspace(0, steps, len(entry.value) + 1)
            values = entry.over_time
            ax.stairs(values, edges, baseline=None, color=colour.to_rgba(number), linewidth=1.4)
        if all((e.over_time > 0).all() for _, _, e in lines):
            _set_log(ax, np.concatenate([e.over_time for _, _, e in lines]))
        ax.set_title(name, fontsize="medium")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.supxlabel("training step", fontsize="medium")
    _update_bar(figure, colour, len(records), axes)
    return figure


def penalties(
    history: Any,
    layer: str | None = None,
    image_shape: Sequence[int] | None = None,
    argument: str = "l2",
    update: int = -1,
) -> Any:
    """Draw the penalties of a layer's inputs as an image.

    Example:

    >>> kd.plots.penalties(callback.history, "dense", image_shape=(28, 28))

    Args:
        history: `DrMADCallback.history`, or the path of a saved one.
        layer: The layer's name. Defaults to `None`: the first that has `per="input"` or
            `per="weight"` values.
        image_shape: `(height, width)` or `(height, width, channels)` of the images. Defaults to
            `None`: a square.
        argument: Which hyperparameter. Defaults to `"l2"`.
        update: Which record. Defaults to -1, the latest.

    Returns:
        A `matplotlib.figure.Figure`. Values per weight are averaged over the layer's units, and
        values over time over time; channels stand side by side.

    Raises:
        ValueError: if there is no such layer, or its inputs don't make an image of that shape.
        ImportError: if matplotlib is not installed.
    """
    records = as_history(history)
    _check_name(layer, "layer")
    _check_name(argument, "argument")
    count = len(records)
    if isinstance(update, bool) or not isinstance(update, Integral) or not -count <= update < count:
        raise ValueError(
            f"`update` is the index of one of {count} records, from {-count} to {count - 1}. "
            f"Received: update={update!r}"
        )
    found = [e for e in entries(records[update]) if e.label.argument == argument]
    found = [e for e in found if e.in_space.ndim and e.label.per in ("input", "weight", "")]
    known = list(dict.fromkeys(e.label.layer for e in found))
    if not known or layer not in (None, *known):
        wanted = "any layer" if layer is None else f"layer {layer!r}"
        raise ValueError(
            f"{argument!r} has no values per input or per weight of {wanted} in this history. "
            f"It has them of {known}. The history holds {_names(records)}."
        )
    layer = known[0] if layer is None else layer
    values = next(e for e in found if e.label.layer == layer).in_space
    if values.ndim > 1:  # (..., inputs, units)
        values = values.mean(-1)
    side = math.isqrt(values.size)
    try:
        shape = (side, side) if image_shape is None else tuple(int(n) for n in image_shape)
    except (TypeError, ValueError, OverflowError):
        shape = ()
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) != values.size:
        raise ValueError(
            f"The {values.size} inputs of layer {layer!r} don't make an image of shape "
            f"{shape if image_shape is None else image_shape!r}. "
            "Pass `image_shape=(height, width)` or (height, width, channels)."
        )
    image = as_image(values, shape)
    figure = _figure(1.2 + 3.2 * image.shape[1] / image.shape[0], 3.4)
    ax = figure.subplots()
    drawn = ax.imshow(image, cmap="viridis", norm=_norm(image), interpolation="nearest")
    figure.colorbar(drawn, ax=ax, label=argument)
    number = len(records) + update + 1 if update < 0 else update + 1
    ax.set_title(f"{argument} of {layer}, update {number}", fontsize="medium")
    ax.set_axis_off()
    return figure


def outer_loss(history: Any, test_error: Sequence[float] | None = None) -> Any:
    """Draw the outer loss, and if given the test error, after each update.

    Example:

    >>> kd.plots.outer_loss(callback.history, test_error=[0.21, 0.12, 0.09])

    Args:
        history: `DrMADCallback.history`, or the path of a saved one.
        test_error: One number per update. Defaults to `None`.

    Returns:
        A `matplotlib.figure.Figure`; updates that were skipped are marked by a cross.

    Raises:
        ValueError: if `test_error` has another length than the history.
        ImportError: if matplotlib is not installed.
    """
    records = as_history(history)
    numbers = np.arange(1, len(records) + 1)
    losses = np.array([r.outer_loss for r in records])
    if test_error is not None:
        try:
            errors = np.asarray(test_error, np.float64)
        except (TypeError, ValueError, OverflowError):
            errors = np.zeros((0, 0))
        if errors.ndim != 1:
            raise ValueError(
                f"`test_error` is a list of numbers. Received: test_error={test_error!r}"
            )
        if len(errors) != len(records):
            raise ValueError(
                f"`test_error` has {len(errors)} numbers, the history {len(records)} updates. "
                "Pass one per update."
            )
    figure = _figure(4.8, 3.2)
    ax = figure.subplots()
    lines = ax.plot(numbers, losses, "o-", markersize=3.5, color="tab:blue", label="outer loss")
    skipped = np.array([not r.accepted for r in records])
    if skipped.any():
        at = np.nan_to_num(losses[skipped], nan=float(np.nanmax([*losses, 0.0])))
        lines += ax.plot(numbers[skipped], at, "x", color="tab:red", label="skipped update")
    ax.set_xlabel("update")
    ax.set_ylabel("outer loss")
    ax.grid(alpha=0.3)
    ax.xaxis.get_major_locator().set_params(integer=True)
    if test_error is not None:
        other = ax.twinx()
        lines += other.plot(
            numbers, errors, "s--", markersize=3.5, color="tab:orange", label="test error"
        )
        other.set_ylabel("test error")
        other.set_ylim(bottom=0)
    if len(lines) > 1:
        figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), fontsize="small")
    return figure


def fidelity(results: Any) -> Any:
    """Draw how close hypergradients are to the exact ones.

    Example:

    >>> kd.plots.fidelity([
    ...     {"setting": "linear", "hyperparameter": "l2", "cosine": 0.95, "cost": 1.5},
    ...     {"setting": "replay", "hyperparameter": "l2", "cosine": 1.0, "cost": 3.0},
    ... ])

    Args:
        results: What was measured, as a list of dictionaries with `"setting"`,
            `"hyperparameter"`, `"cosine"` and `"cost"` (in training steps per step) or
            `"memory"` (in bytes) or both, or the path of a JSON file of them: cosine against cost
            and memory. Or a callback's history, or the path of a saved one: the verified cosines
            after each update.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        TypeError, ValueError: if `results` is none of these, or holds no cosine.
        ImportError: if matplotlib is not installed.
    """
    if isinstance(results, (str, os.PathLike)) and os.fspath(results).endswith(".json"):
        with open(results, encoding="utf-8") as file:
            results = json.load(file)
    is_list = isinstance(results, (list, tuple)) and len(results) > 0
    if is_list and all(isinstance(row, dict) for row in results):
        return _fidelity_of_settings(results)
    return _fidelity_of_updates(as_history(results))


def _fidelity_of_updates(records: Sequence[Record]) -> Any:
    curves: dict[str, list[tuple[int, float]]] = {}
    for number, record in enumerate(records, 1):
        for argument, cosine in cosines(record).items():
            curves.setdefault(argument, []).append((number, cosine))
    if not curves:
        raise ValueError("No update in this history was verified, so there is no cosine to draw.")
    figure = _figure(4.8, 3.2)
    ax = figure.subplots()
    for argument, points in curves.items():
        ax.plot(*zip(*points, strict=True), "o-", markersize=3.5, label=argument)
    ax.set_xlabel("update")
    ax.set_ylabel("cosine with the exact hypergradient")
    ax.set_ylim(min(0.0, ax.get_ylim()[0]), 1.02)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def _fidelity_of_settings(results: Sequence[dict[str, Any]]) -> Any:
    for row in results:
        missing = {"setting", "hyperparameter", "cosine"} - set(row)
        if missing or not {"cost", "memory"} & set(row):
            raise ValueError(
                "A row of `results` has 'setting', 'hyperparameter', 'cosine', and 'cost' or "
                f"'memory'. Received: {sorted(row)}"
            )
    quantities = {"cost": "training steps per step", "memory": "bytes"}
    drawn = [q for q in quantities if any(q in row for row in results)]
    settings = list(dict.fromkeys(row["setting"] for row in results))
    kinds = list(dict.fromkeys(row["hyperparameter"] for row in results))
    figure = _figure(1.6 + 3.8 * len(drawn), 3.8)
    axes = figure.subplots(1, len(drawn), squeeze=False, sharey=True)[0]
    for ax, quantity in zip(axes, drawn, strict=True):
        for row in results:
            if quantity in row:
                colour = f"C{settings.index(row['setting']) % 10}"
                marker = "osD^vP*X"[kinds.index(row["hyperparameter"]) % 8]
                ax.plot(row[quantity], row["cosine"], marker, color=colour, alpha=0.8)
        ax.set_xlabel(f"{quantity} ({quantities[quantity]})")
        ax.grid(alpha=0.3)
    if "memory" in drawn:
        axes[-1].set_xscale("log")
        axes[-1].tick_params(axis="x", which="minor", labelbottom=False)
    axes[0].set_ylabel("cosine with the exact hypergradient")
    handles = [axes[0].plot([], [], "o", color=f"C{i % 10}", label=s)[0]
               for i, s in enumerate(settings)]  # fmt: skip
    handles += [axes[0].plot([], [], "osD^vP*X"[i % 8], color="0.4", label=k)[0]
                for i, k in enumerate(kinds)]  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    return figure


# Shared -------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`keras_drmad.plots` needs matplotlib, which is not installed. Install it by "
            "`pip install 'keras_drmad[plots]'`."
        ) from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _by_update(count: int) -> Any:
    from matplotlib import cm, colors

    # The lightest tenth can't be seen on white.
    light_to_dark = cm.ScalarMappable(cmap=_COLOURS).get_cmap()(np.linspace(0.1, 1, 256))
    bounds = colors.Normalize(1, max(2, count))
    return cm.ScalarMappable(bounds, colors.ListedColormap(light_to_dark))


def _update_bar(figure: Any, colour: Any, count: int, axes: Any) -> None:
    if count > 1:
        bar = figure.colorbar(colour, ax=axes, label="update")
        bar.locator.set_params(integer=True)
        bar.update_ticks()


def _is_wide(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return bool(known.size and known.min() > 0 and known.max() > 10 * known.min())


def _set_log(ax: Any, values: np.ndarray) -> None:
    if _is_wide(values):
        ax.set_yscale("log")


def _norm(values: np.ndarray) -> Any:
    from matplotlib import colors

    return colors.LogNorm() if _is_wide(values) else colors.Normalize()


def _check_name(value: Any, argument: str) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"`{argument}` is a name. Received: {argument}={value!r}")


def _names(records: Sequence[Record]) -> list[str]:
    return [entry.name for entry in entries(records[-1])]
