"""What is tuned, and at which grain. A `Hyperparameter` is a description: it owns no variable."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_drmad import domains

PER = ("model", "layer", "neuron", "input", "weight")
OVER = ("run", "epoch", "step")


@keras.saving.register_keras_serializable(package="keras_drmad")
class Hyperparameter:
    """A hyperparameter that is tuned by gradient while the model trains.

    It stands where a float would stand. One object used in two places is one value.

    Example:

    >>> optimizer = kd.optimizers.SGD(
    ...     learning_rate=kd.Hyperparameter(0.05, per="layer", over="step"),
    ...     l2=kd.Hyperparameter({"head*": 1e-3, "*": 1e-4}, per="neuron"),
    ... )

    Args:
        initial: The value to start from: a float, or a dictionary of layer name or glob to float,
            of which the first that matches a layer holds for it.
        per: The grain in space. `"model"`: one value, shape `()`; `"layer"`: one for a layer's
            variables together, `()` each; `"neuron"`: one per output unit or filter (last axis),
            `(units,)`, which a layer's kernel and bias share; `"input"`: one per input unit
            (second-last axis) of variables of rank 2 or more, `(inputs,)`, and one value for a
            variable of rank 1; `"weight"`: one per scalar weight, of the variable's shape.
            Defaults to `"model"`.
        over: The grain in time. `"run"`: constant; `"epoch"`, `"step"`: one value for each epoch
            or step of the horizon; an int n: n equal blocks of the horizon. Anything but
            `"run"` puts a time axis first. Defaults to `"run"`.
        domain: Where the value lives: `"positive"` (tuned as its logarithm), `"unit"` (as its
            logit), `"real"`, or an interval `(low, high)`. Defaults to the domain of the
            argument that it is given to: rates and penalties positive, momenta and betas unit.
        name: A name of its own for records and logs. Defaults to the argument's name.
        tunable: `False` holds the values still. Defaults to `True`.

    Raises:
        ValueError, TypeError: if an argument is not of the form above.
    """

    def __init__(
        self,
        initial: float | dict[str, float],
        per: str = "model",
        over: str | int = "run",
        domain: str | tuple[float, float] | None = None,
        name: str | None = None,
        tunable: bool = True,
    ):
        if not isinstance(per, str) or per not in PER:
            raise ValueError(f"`per` is one of {PER}. Received: per={per!r}")
        if isinstance(over, Integral) and not isinstance(over, bool) and over >= 1:
            over = int(over)
        elif not isinstance(over, str) or over not in OVER:
            raise ValueError(
                f"`over` is one of {OVER} or a number of blocks >= 1. Received: over={over!r}"
            )
        if name is not None and not (isinstance(name, str) and name):
            raise TypeError(f"`name` is a non-empty string or None. Received: name={name!r}")
        if not isinstance(tunable, bool):
            raise TypeError(f"`tunable` is True or False. Received: tunable={tunable!r}")
        self.initial = _checked_initial(initial)
        if isinstance(self.initial, dict) and per == "model":
            raise ValueError(
                "`initial` as a dictionary of layers needs a grain finer than the model. "
                "Pass per='layer' (or 'neuron', 'input', 'weight')."
            )
        if domain is not None:
            known = domains.get(domain)
            for value in self._initial_values():
                _check_inside(value, known, "initial")
            domain = domain if isinstance(domain, str) else (float(domain[0]), float(domain[1]))
        self.per, self.over, self.domain = per, over, domain
        self.name, self.tunable = name, tunable

    def _initial_values(self) -> list[float]:
        return list(self.initial.values()) if isinstance(self.initial, dict) else [self.initial]

    def initial_for(self, layer: str) -> float:
        """The initial value of a layer (a path such as `"dense_1"` or `"backbone/conv"`).

        Raises:
            ValueError: if `initial` is a dictionary in which nothing matches the layer.
        """
        if not isinstance(self.initial, dict):
            return self.initial
        for pattern, value in self.initial.items():
            if matches(pattern, layer):
                return value
        raise ValueError(
            f"`initial` has no value for layer {layer!r}: it names {sorted(self.initial)}. "
            "Add the layer, or '*' for all the others."
        )

    def blocks(self, epochs: int | None, steps: int | None) -> int:
        """How many values there are in time, for a horizon of so many epochs and steps.

        Before the horizon is known, a schedule over it is one constant.
        """
        known = {"run": 1, "epoch": epochs or 1, "step": steps or 1}
        return known[self.over] if isinstance(self.over, str) else self.over

    def get_config(self) -> dict[str, Any]:
        return {
            "initial": self.initial,
            "per": self.per,
            "over": self.over,
            "domain": list(self.domain) if isinstance(self.domain, tuple) else self.domain,
            "name": self.name,
            "tunable": self.tunable,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Hyperparameter:
        config = dict(config)
        if isinstance(config.get("domain"), list):
            config["domain"] = tuple(config["domain"])
        return cls(**config)

    def __repr__(self) -> str:
        return f"Hyperparameter({self.initial!r}, per={self.per!r}, over={self.over!r})"


def matches(pattern: str, layer: str) -> bool:
    """Whether a layer's name or glob fits its path: the whole of it, or its last part."""
    return fnmatch.fnmatchcase(layer, pattern) or fnmatch.fnmatchcase(
        layer.rsplit("/", 1)[-1], pattern
    )


def _checked_initial(initial: Any) -> float | dict[str, float]:
    if isinstance(initial, dict):
        if not initial or not all(isinstance(key, str) for key in initial):
            raise TypeError(
                "`initial` is a number or a non-empty dictionary of layer name or glob to "
                f"number. Received: initial={initial!r}"
            )
        return {key: _number(value, f"initial[{key!r}]") for key, value in initial.items()}
    return _number(initial, "initial")


def _number(value: Any, argument: str) -> float:
    try:
        if isinstance(value, (bool, np.bool_, str, bytes, bytearray)) or np.ndim(value) != 0:
            raise TypeError
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        raise TypeError(
            f"`{argument}` is a number. Received: {argument}={value!r} of {type(value).__name__}"
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"`{argument}` is a finite number. Received: {argument}={value!r}")
    return number


def _check_inside(value: float, domain: domains.Domain, argument: str) -> None:
    if not domain.contains(value):
        raise ValueError(
            f"`{argument}` is {domain.says} in the domain {domain.name!r}. Received: {value!r}. "
            "Start elsewhere (a small value such as 1e-6 stands for none), or pass another "
            "`domain`."
        )


def check_initial(spec: Hyperparameter, domain: str | tuple[float, float], argument: str) -> None:
    """Refuse a `Hyperparameter` with an initial value outside of the domain of an argument.

    Raises:
        ValueError: naming the argument.
    """
    for value in spec._initial_values():
        _check_inside(value, domains.get(domain), argument)


@dataclass(frozen=True)
class Group:
    """Values of one hyperparameter that are tuned as one array: say, a layer's neurons."""

    spec: Hyperparameter
    domain: domains.Domain
    argument: str  # the optimizer argument, or the spec's own name
    key: str  # the layer (or layer/variable) in records
    shape: tuple[int, ...]  # without the time axis
    initial: float
    dtype: str  # of the raw values: float32 also where the weights are coarser
    variable: str | None = None  # per="weight": the variable's own name, for nested records


@dataclass(frozen=True)
class Place:
    """Where one model variable finds its value of one argument."""

    group: int  # index in the list of groups
    shape: tuple[int, ...]  # to which the group's value is reshaped, to broadcast on the variable


class Use(NamedTuple):
    """A `Hyperparameter` where it stands for an argument of some of the variables."""

    argument: str
    spec: Hyperparameter
    domain: str | tuple[float, float]  # where the spec names none
    acts: list[bool]  # on each trainable variable (penalties spare biases)
    label: str = "model"  # the key in records of what is one value, per="model"


def layout(
    uses: Sequence[Use],
    layers: list[str],
    names: list[str],
    shapes: list[tuple[int, ...]],
    dtypes: list[str],
) -> tuple[list[Group], list[dict[str, Place]]]:
    """Lay out the groups of every tuned argument over the model's variables.

    Args:
        uses: Every use of a `Hyperparameter`.
        layers, names, shapes, dtypes: Of each trainable variable: the path of its layer, its own
            name, its shape, its dtype.

    Returns:
        The groups, and for each variable a dictionary of argument to `Place`.

    Raises:
        ValueError: for an initial value outside of its domain, or a layer name that no layer has.
    """
    groups: list[Group] = []
    index: dict[tuple[int, str], int] = {}
    places: list[dict[str, Place]] = [{} for _ in layers]
    for argument, spec, default_domain, acts, label in uses:
        check_layer_names(spec.initial, layers, f"`initial` of {argument!r}")
        if not any(acts):
            raise ValueError(
                f"The Hyperparameter of {argument!r} acts on no variable: no layer is left for it, "
                "or (l1, l2) no variable is penalized. Leave it out, or see `penalize`."
            )
        domain = domains.get(spec.domain if spec.domain is not None else default_domain)
        for i, (layer, name, shape) in enumerate(zip(layers, names, shapes, strict=True)):
            if not acts[i]:
                continue
            key, grain, broadcast = _grain(spec.per, layer, name, shape)
            known = index.get((id(spec), key))
            if known is not None and groups[known].shape != grain:
                # Two variables of a layer that differ along this axis: each has its own values.
                key = f"{layer}/{name}"
                known = index.get((id(spec), key))
            if known is None:
                initial = spec.initial_for(layer)
                _check_inside(initial, domain, argument)
                known = index[id(spec), key] = len(groups)
                shown = {"weight": layer, "model": label}.get(spec.per, key)
                groups.append(
                    Group(
                        spec,
                        domain,
                        spec.name or argument,
                        shown,
                        grain,
                        initial,
                        "float64" if dtypes[i] == "float64" else "float32",
                        name if spec.per == "weight" else None,
                    )
                )
            elif groups[known].domain.name != domain.name:
                raise ValueError(
                    f"One Hyperparameter is shared by arguments of different domains, among them "
                    f"{argument!r}. Pass `domain` to say which holds."
                )
            places[i][argument] = Place(known, broadcast)
    paths = [(group.argument, group.key, group.variable) for group in groups]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(
                f"Two Hyperparameters would be recorded as {path[0]!r} of {path[1]!r}. Give one of "
                "them another `name`."
            )
    return groups, places


def _grain(
    per: str, layer: str, name: str, shape: tuple[int, ...]
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The key of a variable's group, the group's shape, and the shape that broadcasts."""
    if per == "model":
        return "model", (), ()
    if per == "weight":
        return f"{layer}/{name}", shape, shape
    if per == "neuron" and len(shape) >= 1:
        return layer, shape[-1:], shape[-1:]
    if per == "input" and len(shape) >= 2:
        return layer, shape[-2:-1], (shape[-2], 1)
    if per == "input":
        return f"{layer}/{name}", (), ()
    return layer, (), ()


def check_layer_names(patterns: Any, layers: list[str], what: str) -> None:
    """Refuse names and globs of layers that no layer has; what is no dictionary has none.

    Raises:
        ValueError: naming the layers that there are.
    """
    for pattern in patterns if isinstance(patterns, dict) else ():
        if not any(matches(pattern, layer) for layer in layers):
            raise ValueError(
                f"{what} names {pattern!r}, which no layer with trainable variables matches. The "
                f"layers are: {sorted(set(layers))}"
            )
