"""The tuned values alone as a JSON file: for people, and for the next project.

    {
      "format": "keras_drmad hyperparameters",
      "version": 1,
      "horizon": {"epochs": 1, "steps": 40},
      "grains": {"learning_rate": {"dense": "layer, 2 blocks"}},
      "hyperparameters": {"learning_rate": {"dense": [0.05, 0.01]}}
    }

Values are in the user's units, by argument, layer and (per="weight") variable, with time first.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

import keras
import numpy as np

from keras_drmad.base_optimizer import Optimizer
from keras_drmad.hyperparameters import Group
from keras_drmad.saving import checked_horizon

_FORMAT, _VERSION = "keras_drmad hyperparameters", 1
_KEYS = ("format", "version", "horizon", "grains", "hyperparameters")


def save_hyperparameters(optimizer: Optimizer, path: str | os.PathLike) -> None:
    """Save the tuned values of an optimizer as a JSON file that people can read.

    Values are rounded to the shortest decimals of their dtype. A `.keras` file holds them exactly,
    and all else that a run needs to go on.

    Example:

    >>> kd.save_hyperparameters(model.optimizer, "hyperparameters.json")

    Args:
        optimizer: An optimizer of `kd.optimizers` that is built: after the first training step,
            or `optimizer.build(model.trainable_variables)`.
        path: Where to. A file that is there already is replaced only when the new one is complete.

    Raises:
        TypeError, ValueError: if `optimizer` is another one, tunes nothing, or is not built; or
            if a value is not finite.
    """
    _check_optimizer(optimizer, "save")
    epochs, steps = optimizer.horizon
    values: dict[str, Any] = {}
    grains: dict[str, Any] = {}
    for group, array in zip(optimizer.groups, optimizer.values(), strict=True):
        array = keras.ops.convert_to_numpy(array)
        if not np.all(np.isfinite(array)):
            raise ValueError(
                f"The values of {'/'.join(_place(group))} are not finite, so they were not saved. "
                "Received: " + np.array2string(array, threshold=8)
            )
        _put(values, group, _decimals(array if group.spec.over != "run" else array[0]))
        _put(grains, group, _grain(group, len(array)))
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "horizon": {"epochs": epochs, "steps": steps},
        "grains": grains,
        "hyperparameters": values,
    }
    _write(os.fspath(path), _text(content) + "\n")


def load_hyperparameters(optimizer: Optimizer, path: str | os.PathLike) -> None:
    """Set the tuned values of an optimizer to those of a file.

    The optimizer has the same Hyperparameters (argument, layers, grain) as the one that was saved.
    Nothing is assigned unless everything fits.

    Example:

    >>> model.compile(kd.optimizers.SGD(kd.Hyperparameter(0.05, per="layer")), loss="mse")
    >>> model.optimizer.build(model.trainable_variables)
    >>> kd.load_hyperparameters(model.optimizer, "hyperparameters.json")

    Args:
        optimizer: An optimizer of `kd.optimizers` that is built. Schedules over a horizon take over
            that of the file; a `fit` with another one resamples them.
        path: A file that `save_hyperparameters` wrote, perhaps changed by hand.

    Raises:
        ValueError: saying what was expected and what came, if the optimizer is not built or if
            anything in the file does not fit.
        OSError: if the file can't be read.
    """
    _check_optimizer(optimizer, "load")
    try:
        content = _read(path, optimizer)
        horizon, raw = _fitting(content, optimizer)
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)!r} does not fit as hyperparameters of {optimizer.name}: {error}"
        ) from error
    if horizon is not None:
        optimizer.set_horizon(*horizon)
    for variable, values in zip(optimizer.raw_variables, raw, strict=True):
        variable.assign(values)


def _check_optimizer(optimizer: Any, verb: str) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "`optimizer` is one of keras_drmad.optimizers, such as `model.optimizer` after "
            f"`compile`. Received: {optimizer!r}"
        )
    if not optimizer.hyperparameters:
        raise ValueError(
            f"{optimizer.name} has no Hyperparameter: there is nothing to {verb}. Pass a "
            "keras_drmad.Hyperparameter for an argument."
        )
    if not optimizer.built:
        raise ValueError(
            f"{optimizer.name} is not built, so its layers are not known yet. Call "
            "`model.optimizer.build(model.trainable_variables)` first (and before it `model.build("
            f"input_shape)`, if the model has no Input), then {verb}."
        )


# Writing ---------------------------------------------------------------------------------------


def _place(group: Group) -> tuple[str, ...]:
    names = (group.argument, group.key, group.variable)
    return tuple(name for name in names if name is not None)


def _put(nested: dict[str, Any], group: Group, value: Any) -> None:
    *outer, last = _place(group)
    for name in outer:
        nested = nested.setdefault(name, {})
    nested[last] = value


def _grain(group: Group, blocks: int) -> str:
    """In words, so that no value is taken for one of another axis of the same length."""
    time = "" if group.spec.over == "run" else f", {blocks} block" + "s" * (blocks != 1)
    return group.spec.per + time


def _decimals(array: np.ndarray) -> Any:
    """Nested lists of the shortest decimals that round to these numbers."""
    if array.ndim:
        return [_decimals(part) for part in array]
    return float(np.format_float_scientific(array))


def _text(content: Any, indent: str = "") -> str:
    """JSON with a line for each entry of a dictionary, and lists in one line."""
    if not isinstance(content, dict):
        return json.dumps(content, allow_nan=False)
    inner = indent + "  "
    lines = [
        f"{inner}{json.dumps(key, ensure_ascii=False)}: {_text(value, inner)}"
        for key, value in content.items()
    ]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _write(path: str, text: str) -> None:
    unfinished = f"{path}.unfinished"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


# Reading ---------------------------------------------------------------------------------------


def _read(path: str | os.PathLike, optimizer: Optimizer) -> Any:
    with open(path, "rb") as file:
        limit = _largest_size(optimizer)
        text = file.read(limit + 1)
    if len(text) > limit:
        raise ValueError(f"expected a file of at most {limit:,} bytes, found a larger one")
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refused
        )
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def _largest_size(optimizer: Optimizer) -> int:
    """More bytes than any file for this optimizer has."""
    epochs, steps = (n or 2**17 for n in optimizer.horizon)
    groups = optimizer.groups
    return 2**24 + 64 * sum(g.spec.blocks(epochs, steps) * math.prod(g.shape) for g in groups)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r:.100} stands twice in one place")
        found[key] = value
    return found


def _refused(constant: str) -> None:
    raise ValueError(f"expected finite numbers, found {constant}")


def _fitting(content: Any, optimizer: Optimizer) -> tuple[tuple[int, int] | None, list[np.ndarray]]:
    """The horizon to take over, if any, and the raw values of each group."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(
            f"expected a file that kd.save_hyperparameters wrote, with format={_FORMAT!r}"
        )
    version = content.get("version")
    if type(version) is not int or version != _VERSION:
        raise ValueError(f"expected version {_VERSION}, found {version!r}")
    if set(content) != set(_KEYS):
        raise ValueError(f"expected the keys {list(_KEYS)}, found {list(content)}")
    stretch = content["horizon"]
    if not isinstance(stretch, dict) or set(stretch) != {"epochs", "steps"}:
        raise ValueError(f"expected a horizon of 'epochs' and 'steps', found {stretch!r:.200}")
    horizon: tuple[int, int] | None
    horizon = checked_horizon([stretch["epochs"], stretch["steps"]])
    if optimizer.horizon[1] or optimizer.in_use or not horizon[1]:
        horizon = None  # that of the optimizer stays
    groups = {_place(group): group for group in optimizer.groups}
    grains, found = _flat(content["grains"], "grains"), _flat(content["hyperparameters"], "values")
    for kind, paths in (("grain", grains), ("value", found)):
        _compare_names(kind, groups, paths)
    raw: list[np.ndarray] = []
    for path, group in groups.items():
        where, blocks = "/".join(path), group.spec.blocks(*(horizon or optimizer.horizon))
        if grains[path] != _grain(group, blocks):
            raise ValueError(
                f"{where} is of the grain {_grain(group, blocks)!r}, found {grains[path]!r:.200}. "
                "Load it into a newly compiled model with the Hyperparameters that were saved"
            )
        shape = group.shape if group.spec.over == "run" else (blocks, *group.shape)
        values = _numbers(found[path], shape, group, where)
        raw.append(np.reshape([group.domain.raw(v) for v in values], (blocks, *group.shape)))
    return horizon, raw


def _flat(nested: Any, what: str) -> dict[tuple[str, ...], Any]:
    """Entries by (argument, layer) or (argument, layer, variable)."""
    if not isinstance(nested, dict) or not all(isinstance(v, dict) for v in nested.values()):
        raise ValueError(f"expected {what} by argument and layer, found {nested!r:.200}")
    result: dict[tuple[str, ...], Any] = {}
    for argument, layers in nested.items():
        result.update({(argument,): layers} if not layers else {})
        for layer, value in layers.items():
            # What is empty stays, to be refused.
            inner = value if isinstance(value, dict) and value else None
            result.update(
                {(argument, layer): value}
                if inner is None
                else {(argument, layer, name): entry for name, entry in inner.items()}
            )
    return result


def _compare_names(
    kind: str, expected: dict[tuple[str, ...], Group], found: dict[tuple[str, ...], Any]
) -> None:
    missing = ["/".join(path) for path in expected if path not in found]
    unknown = ["/".join(path) for path in found if path not in expected]
    if missing or unknown:
        raise ValueError(
            f"expected one {kind} for each of {_some(['/'.join(path) for path in expected])}; "
            f"missing are {_some(missing)}, unknown are {_some(unknown)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(f"{name:.100}" for name in names[:8]) or "none") + more


def _numbers(found: Any, shape: tuple[int, ...], group: Group, where: str) -> list[float]:
    """The numbers of nested lists of this shape, in order."""
    if shape:
        if not isinstance(found, list) or len(found) != shape[0]:
            came = f"a list of {len(found)}" if isinstance(found, list) else f"{found!r:.100}"
            raise ValueError(f"{where}: expected a list of {shape[0]}, found {came}")
        return [x for part in found for x in _numbers(part, shape[1:], group, where)]
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise ValueError(f"{where}: expected a number, found {found!r:.100}")
    if not _inside(group, found):
        raise ValueError(f"{where}: expected {group.domain.says}, found {found!r:.100}")
    return [float(found)]


def _inside(group: Group, value: float) -> bool:
    domain = group.domain
    if abs(value) > sys.float_info.max or domain.contains(value):
        return abs(value) <= sys.float_info.max
    # Where the outer optimizer has gone far, values stand nearer to an end than they may start.
    try:
        raw = keras.ops.convert_to_tensor(domain.raw(value), group.dtype)
    except (ValueError, OverflowError):
        return False
    return abs(float(domain.value(raw)) - value) <= 3e-7 * abs(value)  # the rounding of float32
