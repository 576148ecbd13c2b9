"""Records: one per update, by argument and layer. Nothing here knows how they were estimated."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np

log = logging.getLogger("keras_drmad")

Nested = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Label:
    """Where an array stands in a record."""

    argument: str
    layer: str
    variable: str | None  # per="weight": one array per variable of a layer
    in_time: bool  # whether the first axis is time
    per: str = ""  # the grain in space, as in Hyperparameter


@dataclass(frozen=True)
class Record:
    """One update of the hyperparameters."""

    outer_loss: float  # at the end of the horizon, before the update
    hyperparameters: Nested  # argument -> layer -> values that this horizon was trained with
    hypergradients: Nested  # the same shape: derivative of the outer loss by the value
    # Like model.trainable_variables. Of the latest record only, and only if the walk reached the
    # first step; otherwise None.
    initial_weights_gradient: list[np.ndarray] | None
    epoch: int  # the epoch after which the update was made, from 0
    step: int  # training steps since the first fit with this callback
    accepted: bool  # whether the hyperparameters were moved
    reason: str  # why not, or an empty string
    setting: str = ""  # how the hypergradients were estimated
    labels: tuple[Label, ...] = ()  # what the arrays are
    # argument -> how the estimate agrees with the exact hypergradient, where it was verified:
    # "cosine", "signs" (part of the entries whose sign is right), "norm" (ratio to the exact one)
    verification: dict[str, dict[str, float]] | None = None


class Entry(NamedTuple):
    """One array of a record."""

    label: Label
    value: np.ndarray
    hypergradient: np.ndarray | None

    @property
    def name(self) -> str:
        parts = (self.label.argument, self.label.layer, self.label.variable)
        return "/".join(part for part in parts if part)

    @property
    def over_time(self) -> np.ndarray:
        """The mean over everything but time, (blocks,)."""
        return self.value.reshape(len(self.value), -1).mean(1)

    @property
    def in_space(self) -> np.ndarray:
        """The mean over time, of the shape without it."""
        return self.value.mean(0) if self.label.in_time else self.value


def nested(labels: Sequence[Label], arrays: Sequence[Any]) -> Nested:
    """Arrays, `(blocks, *shape)` each, as argument -> layer -> array."""
    result: Nested = {}
    for label, array in zip(labels, arrays, strict=True):
        array = np.asarray(array)
        value = array if label.in_time else array[0]
        of_argument = result.setdefault(label.argument, {})
        if label.variable is None:
            of_argument[label.layer] = value
        else:
            of_argument.setdefault(label.layer, {})[label.variable] = value
    return result


def flat(values: Nested) -> dict[str, np.ndarray]:
    """A nested record as `"argument/layer[/variable]"` -> array."""
    return {"/".join(path): value for path, value in _paths(values).items()}


def entries(record: Record) -> list[Entry]:
    """Every array of a record with its label and hypergradient."""
    known = {_path(label): label for label in record.labels}
    gradients = _paths(record.hypergradients)
    result = []
    for path, value in _paths(record.hyperparameters).items():
        variable = path[2] if len(path) > 2 else None
        label = known.get(path) or Label(path[0], path[1], variable, in_time=False)
        result.append(Entry(label, np.asarray(value), gradients.get(path)))
    return result


def by_argument(found: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries, grouped by their argument."""
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(entry.label.argument, []).append(entry)
    return groups


def norm(found: Sequence[Entry]) -> float:
    """The norm of the hypergradient by all these arrays together."""
    parts = [e.hypergradient for e in found if e.hypergradient is not None]
    return math.sqrt(sum(float(np.sum(np.square(p, dtype=np.float64))) for p in parts))


def cosines(record: Record) -> dict[str, float]:
    """Of every argument that was verified, the cosine with the exact hypergradient."""
    return {name: found["cosine"] for name, found in (record.verification or {}).items()}


def as_image(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A value per input as a `(height, width)` image, its channels side by side."""
    planes = values.reshape([*shape, 1][:3])
    return np.concatenate(np.moveaxis(planes, 2, 0), axis=1)


def horizon_of(history: Sequence[Record]) -> int:
    """The number of training steps behind the latest record."""
    return history[-1].step - (history[-2].step if len(history) > 1 else 0)


def _path(label: Label) -> tuple[str, ...]:
    return tuple(p for p in (label.argument, label.layer, label.variable) if p is not None)


def _paths(values: Nested) -> dict[tuple[str, ...], Any]:
    result: dict[tuple[str, ...], Any] = {}
    for argument, layers in values.items():
        for layer, value in layers.items():
            if isinstance(value, dict):
                result.update({(argument, layer, name): v for name, v in value.items()})
            else:
                result[argument, layer] = value
    return result


# A table --------------------------------------------------------------------------------------


def table(
    labels: Sequence[Label],
    arrays: Sequence[Any],
    history: Sequence[Record],
    by_layer: bool = False,
) -> str:
    """What was tuned, as a table.

    Args:
        labels, arrays: The current values, as for `nested`.
        history: The records so far.
        by_layer: Whether each layer has a row of its own. Defaults to `False`.

    Returns:
        The table, a string of several lines.
    """
    rows: list[tuple[str, ...]] = [
        ("hyperparameter", "grain", "count", "start", "now", "hypergradient norm")
    ]
    if not by_layer:
        rows[0] += ("verified cosine",)  # it is of all layers together
    now = Record(math.nan, nested(labels, arrays), {}, None, 0, 0, True, "", labels=tuple(labels))
    first = entries(history[0] if history else now)
    last = entries(history[-1]) if history else []
    verified = cosines(next((r for r in reversed(history) if r.verification), now))
    name = (lambda e: e.name) if by_layer else (lambda e: e.label.argument)
    for key in dict.fromkeys(name(e) for e in entries(now)):
        here, begun, ended = (
            [e for e in es if name(e) == key] for es in (entries(now), first, last)
        )
        cosine = verified.get(here[0].label.argument)
        row = (
            key,
            grain(here),
            f"{sum(e.value.size for e in here):,}",
            _range(begun),
            _range(here),
            f"{norm(ended):.3g}" if ended else "—",
            "—" if cosine is None else f"{cosine:.3f}",
        )
        rows.append(row[: len(rows[0])])
    return aligned(rows)


def grain(found: Sequence[Entry]) -> str:
    """The grain in space and time in words, such as "layer, 40 in time"."""
    label, value = found[0].label, found[0].value
    words = label.per or "—"
    return f"{words}, {len(value)} in time" if label.in_time else words


def _range(found: Sequence[Entry]) -> str:
    if not found:
        return "—"
    values = np.concatenate([np.ravel(e.value).astype(np.float64) for e in found])
    low, mean, high = (f"{x:.3g}" for x in (values.min(), values.mean(), values.max()))
    return low if low == high else f"{mean} ({low} to {high})"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table with a line under the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "─" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


# Progress -------------------------------------------------------------------------------------


class Progress:
    """Says in Keras's own output how far a long walk is.

    Args:
        what: What is under way, in words.
        verbose: As in `fit`: 0 is silent, 1 a bar, 2 a line now and then.
        after: Seconds before the first sign. Defaults to 3.
        every: Seconds between two lines under `verbose=2`. Defaults to 10.
    """

    def __init__(self, what: str, verbose: int | str, after: float = 3.0, every: float = 10.0):
        self.what, self.after, self.every = what, after, every
        self.verbose = 1 if verbose == "auto" else int(verbose)

    def __call__(self, done: int, total: int) -> None:
        """Say that so many steps of all are done; 0 begins a walk."""
        now = time.monotonic()
        if done == 0:
            self._bar = keras.utils.Progbar(total, unit_name="reverse step")
            self._began, self._said = now, -math.inf
        first = math.isinf(self._said)
        if not self.verbose or now - self._began < self.after:
            return
        if self.verbose == 1:
            if first:
                # On a line of its own: `fit` has left its own bar open.
                _print(f"\n{self.what}\n")
            self._bar.update(done)
        elif first or now - self._said >= self.every:
            _print(f"{self.what}: {done}/{total} steps, {now - self._began:.0f}s\n")
        else:
            return
        self._said = now


def _print(text: str) -> None:
    """Print where Keras prints."""
    if keras.config.is_interactive_logging_enabled():
        print(text, end="", flush=True)
    else:
        log.info(text.strip())


# A file ---------------------------------------------------------------------------------------

_FORMAT, _VERSION = "keras_drmad history", 1


def save_history(history: Sequence[Record], path: Any) -> None:
    """Save a callback's history.

    Example:

    >>> kd.reports.save_history(callback.history, "history.npz")

    Args:
        history: A list of `Record`.
        path: A path, or a binary file that is open for writing. A file that is there already is
            replaced only when the new one is complete.

    Raises:
        TypeError: if `history` is not a list of records.
    """
    _check_records(history)
    # Arrays of one place and shape are one member of the file, whatever the number of records.
    columns: dict[tuple, tuple[int, list[np.ndarray]]] = {}

    def put(kind: str, where: tuple, array: Any) -> list[int]:
        array = np.asarray(array)
        if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
            array = array.astype(np.float32)  # NumPy's format has no bfloat16
        key = (kind, where, array.shape, array.dtype.str)
        index, column = columns.setdefault(key, (len(columns), []))
        column.append(array)
        return [index, len(column) - 1]

    def put_all(kind: str, values: Nested) -> list[Any]:
        return [[list(path), *put(kind, path, a)] for path, a in _paths(values).items()]

    records = [
        {
            "outer_loss": float(r.outer_loss),
            "epoch": int(r.epoch),
            "step": int(r.step),
            "accepted": bool(r.accepted),
            "reason": r.reason,
            "verification": r.verification,
            "setting": r.setting,
            "labels": [[x.argument, x.layer, x.variable, x.in_time, x.per] for x in r.labels],
            "hyperparameters": put_all("value", r.hyperparameters),
            "hypergradients": put_all("hypergradient", r.hypergradients),
            "initial_weights_gradient": None
            if r.initial_weights_gradient is None
            else [put("weight", (i,), a) for i, a in enumerate(r.initial_weights_gradient)],
        }
        for r in history
    ]
    text = json.dumps({"format": _FORMAT, "version": _VERSION, "records": records})
    arrays = {f"column_{i}": np.stack(column) for i, column in columns.values()}
    arrays["history"] = np.frombuffer(text.encode(), np.uint8)
    if hasattr(path, "write"):
        np.savez(path, **arrays)
        return
    path = os.fspath(path)
    unfinished = f"{path}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def load_history(path: Any) -> list[Record]:
    """Load a history that `save_history` wrote. No code is run from the file.

    Example:

    >>> history = kd.reports.load_history("history.npz")
    >>> kd.plots.outer_loss(history).savefig("outer_loss.png")

    Args:
        path: A path, or a binary file that is open for reading.

    Returns:
        A list of `Record`.

    Raises:
        ValueError: if the file is not a history, is damaged, or of another version.
        OSError: if it can't be read.
    """
    if isinstance(path, (str, os.PathLike)):
        with open(path, "rb") as opened:
            return load_history(opened)
    try:
        with np.load(path, allow_pickle=False) as file:
            content = json.loads(file["history"].tobytes())
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            if content["version"] != _VERSION:
                raise ValueError(
                    f"its version is {content['version']!r}, this package reads {_VERSION}"
                )
            columns = {name: file[name] for name in file.files if name != "history"}
        return [_record(r, columns) for r in content["records"]]
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError,
        TypeError, ValueError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise ValueError(
            f"Not a history saved by `kd.reports.save_history`, or a damaged one: "
            f"{getattr(path, 'name', path)}. "
            f"{type(error).__name__}: {error}"
        ) from error


def as_history(history: Any) -> list[Record]:
    """A list of records, from a callback's history or the path of a saved one.

    Raises:
        TypeError, ValueError: if it is neither, or empty.
    """
    if isinstance(history, (str, os.PathLike)):
        history = load_history(history)
    _check_records(history)
    if not history:
        raise ValueError(
            "The history is empty: no update was made yet. Train for `horizon` epochs or more."
        )
    return list(history)


def _check_records(history: Any) -> None:
    if not isinstance(history, (list, tuple)) or not all(isinstance(r, Record) for r in history):
        raise TypeError(
            "Expected `DrMADCallback.history`, a list of records, or the path of a saved one. "
            f"Received: {type(history).__name__}"
        )


def _record(found: dict[str, Any], columns: dict[str, np.ndarray]) -> Record:
    """A record from its form in the file; raises where that is not as it is written."""

    def checked(name: str, *kinds: type) -> Any:
        if not isinstance(found[name], kinds) or isinstance(found[name], bool) != (bool in kinds):
            raise TypeError(f"{name!r} is {found[name]!r}")
        return found[name]

    def array(column: int, row: int) -> np.ndarray:
        if type(row) is not int or row < 0:
            raise TypeError(f"row {row!r} of column {column}")
        value = columns[f"column_{column}"][row]
        if value.dtype.kind != "f":
            raise TypeError(f"column {column} holds {value.dtype}")
        return value

    def values(name: str) -> Nested:
        labels, arrays = [], []
        for path, column, row in checked(name, list):
            argument, layer, variable = [*path, None][:3]
            if not all(isinstance(p, str) for p in path) or len(path) not in (2, 3):
                raise TypeError(f"{path!r} is not argument, layer and variable")
            labels.append(Label(argument, layer, variable, in_time=True))
            arrays.append(array(column, row))
        return nested(labels, arrays)

    verification = found["verification"]
    if verification is not None:
        verification = {
            str(argument): {str(k): float(v) for k, v in figures.items()}
            for argument, figures in verification.items()
        }
    labels = []
    for argument, layer, variable, in_time, per in checked("labels", list):
        texts = [argument, layer, per] + ([] if variable is None else [variable])
        if not all(isinstance(x, str) for x in texts) or not isinstance(in_time, bool):
            raise TypeError(f"a label of {argument!r} is damaged")
        labels.append(Label(argument, layer, variable, in_time, per))
    hyperparameters, hypergradients = values("hyperparameters"), values("hypergradients")
    shapes, others = ({k: v.shape for k, v in _paths(n).items()}
                      for n in (hyperparameters, hypergradients))  # fmt: skip
    if shapes != others:
        raise ValueError("hyperparameters and hypergradients differ in shape")
    weights = found["initial_weights_gradient"]
    return Record(
        float(checked("outer_loss", int, float)),
        hyperparameters,
        hypergradients,
        None if weights is None else [array(column, row) for column, row in weights],
        checked("epoch", int),
        checked("step", int),
        checked("accepted", bool),
        checked("reason", str),
        checked("setting", str),
        tuple(labels),
        verification,
    )
