"""Records: one per update, by argument and layer. Nothing here knows how they were estimated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

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
    return {"/".join(path): value for path, value in paths(values).items()}


def paths(values: Nested) -> dict[tuple[str, ...], Any]:
    """A nested record as `(argument, layer[, variable])` -> array."""
    result: dict[tuple[str, ...], Any] = {}
    for argument, layers in values.items():
        for layer, value in layers.items():
            if isinstance(value, dict):
                result.update({(argument, layer, name): v for name, v in value.items()})
            else:
                result[argument, layer] = value
    return result


def entries(record: Record) -> list[Entry]:
    """Every array of a record with its label and hypergradient."""
    known = {_path(label): label for label in record.labels}
    gradients = paths(record.hypergradients)
    result = []
    for path, value in paths(record.hyperparameters).items():
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
