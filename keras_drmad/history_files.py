"""A history as a file: one NumPy archive, from which no code is run."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_drmad.records import Label, Nested, Record, nested, paths

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
        return [[list(path), *put(kind, path, a)] for path, a in paths(values).items()]

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
    shapes, others = ({k: v.shape for k, v in paths(n).items()}
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
