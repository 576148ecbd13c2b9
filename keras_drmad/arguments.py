"""Arguments of an optimizer: a number, a `Hyperparameter`, or a dictionary of layers to these."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import keras

from keras_drmad.hyperparameters import (
    Hyperparameter,
    check_initial,
    check_layer_names,
    matches,
)

Value = float | Hyperparameter
Argument = Value | dict[str, Value]
Domain = str | tuple[float, float]

_ENDS = {"positive": (0.0, math.inf), "unit": (0.0, 1.0), "real": (-math.inf, math.inf)}
_REFUSED = {
    "use_ema": "Average the weights with keras.callbacks.SwapEMAWeights after tuning instead.",
    "gradient_accumulation_steps": "Use a larger batch instead.",
    "loss_scale_factor": "Train in float32 or mixed_bfloat16 instead.",
    "ema_overwrite_frequency": "It belongs to use_ema, which is not supported.",
}
_SPEC = "$hyperparameter"


def checked(name: str, value: Any, domain: Domain) -> Any:
    """An argument as it was passed, with its numbers as floats.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if isinstance(value, dict):
        if not value or not all(isinstance(key, str) for key in value):
            raise TypeError(
                f"`{name}` as a dictionary holds layer names or globs, with a float or a "
                f"Hyperparameter each. Received: {name}={value!r}"
            )
        return {key: _number(f"{name}[{key!r}]", part, domain) for key, part in value.items()}
    is_schedule = isinstance(value, keras.optimizers.schedules.LearningRateSchedule)
    if name == "learning_rate" and is_schedule:
        return value
    return _number(name, value, domain)


def _number(name: str, value: Any, domain: Domain) -> Value:
    if isinstance(value, Hyperparameter):
        if value.domain is None:
            check_initial(value, domain, name)
        return value
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        if not (hasattr(value, "dtype") and getattr(value, "shape", None) == ()):
            raise TypeError(
                f"`{name}` is a float or a keras_drmad.Hyperparameter. Received: {name}={value!r}"
            )
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # a string in an array, or 10**400
        number = math.nan
    # A number that stands still may lie at the end of the domain: no momentum, no penalty.
    low, high = _ENDS[domain] if isinstance(domain, str) else domain
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(
            f"`{name}` is a finite number from {low} to {high}. Received: {name}={value!r}"
        )
    return number


def is_nonzero(value: Argument) -> bool:
    """Whether an argument may be other than zero, now or later."""
    parts = value.values() if isinstance(value, dict) else [value]
    # What is no number is refused later.
    return any(not (isinstance(part, Real) and part == 0.0) for part in parts)


def hyperparameters(arguments: dict[str, Any]) -> list[tuple[str, Hyperparameter]]:
    """Every `Hyperparameter` among arguments, with the argument's name."""
    return [
        (name, part)
        for name, value in arguments.items()
        for part in (value.values() if isinstance(value, dict) else [value])
        if isinstance(part, Hyperparameter)
    ]


def at_layers(name: str, value: Any, layers: list[str]) -> list[tuple[str, Any]]:
    """Of each layer, the pattern that it matches (`"model"` where there are none) and its value.

    Raises:
        ValueError: for a pattern that is of no effect, or a layer that no pattern matches.
    """
    if not isinstance(value, dict):
        return [("model", value)] * len(layers)
    check_layer_names(value, layers, f"`{name}`")
    found = []
    for layer in layers:
        pattern = next((p for p in value if matches(p, layer)), None)
        if pattern is None:
            raise ValueError(
                f"`{name}` has no value for layer {layer!r}: it names {list(value)}. Add the "
                "layer, or '*' for all the others."
            )
        found.append((pattern, value[pattern]))
    behind = set(value) - {pattern for pattern, _ in found}
    if behind:
        raise ValueError(
            f"`{name}` names {sorted(behind)} behind a pattern that matches all of these layers, "
            "and the first that matches counts. Put them in front of it."
        )
    return found


# In a config -----------------------------------------------------------------------------------


def encode(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as a config. An object that stands in two places is written once."""
    specs: list[Hyperparameter] = []

    def encoded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: encoded(part) for key, part in value.items()}
        if not isinstance(value, Hyperparameter):
            return keras.saving.serialize_keras_object(value)
        if value not in specs:
            specs.append(value)
        return {_SPEC: specs.index(value)}

    config = {name: encoded(value) for name, value in arguments.items()}
    return {**config, "hyperparameters": [keras.saving.serialize_keras_object(s) for s in specs]}


def decode(config: dict[str, Any], custom_objects: Any = None) -> dict[str, Any]:
    """The arguments of a config that `encode` wrote, and whatever else stands in it."""
    config = dict(config)

    def revived(value: Any) -> Any:
        return keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)

    specs = [revived(spec) for spec in config.pop("hyperparameters", [])]

    def decoded(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if _SPEC in value:
            return specs[value[_SPEC]]
        if "class_name" in value:
            return revived(value)
        return {key: decoded(part) for key, part in value.items()}

    return {name: decoded(value) for name, value in config.items()}


def refuse(kwargs: dict[str, Any], optimizer: str, signature: Callable) -> None:
    """Refuse by name what Keras optimizers take and these don't, and what is not known.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    kwargs.pop("ema_momentum", None)  # of no effect without use_ema
    for key, value in kwargs.items():
        if key not in _REFUSED:
            known = [k for k in inspect.signature(signature).parameters if k != "self"]
            raise TypeError(f"{optimizer} has no argument {key!r}. It takes {known}")
        if value is not None and value is not False:
            raise ValueError(
                f"`{key}` is not supported by keras_drmad.optimizers.{optimizer}. {_REFUSED[key]}"
            )
