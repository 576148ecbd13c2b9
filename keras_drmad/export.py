"""The stock Keras optimizer that trains as a tuned one does, where there is one."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np

from keras_drmad.schedules import HorizonSchedule

_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
_PENALTIES = {
    "l1": "keras.regularizers.L1(l1) as `kernel_regularizer` of the layers",
    "l2": "keras.regularizers.L2(l2 / 2) as `kernel_regularizer` of the layers",
}


def to_keras(optimizer: Any) -> keras.optimizers.Optimizer:
    """A stock Keras optimizer with the values of now (see `Optimizer.to_keras`).

    Args:
        optimizer: An optimizer of `keras_drmad.optimizers`.

    Raises:
        ValueError: naming everything that can't be said, and what to do instead.
    """
    namesake = vars(type(optimizer)).get("namesake")
    name = type(optimizer).__name__
    if namesake is None:
        raise ValueError(
            f"{name} has no namesake among the optimizers of Keras. Train on with {name} itself: "
            "without the callback, it trains with the tuned values."
        )
    if not optimizer.built:
        raise ValueError(
            f"{name} is not built, so its values are not known yet. Call "
            "`optimizer.build(model.trainable_variables)` first."
        )
    problems: list[str] = []
    settings = _settings(optimizer, namesake, problems)
    for argument in optimizer.arguments:
        value = _value(optimizer, argument, problems)
        if argument == "weight_decay":
            settings[argument] = value or None  # as in Keras, None is none
        elif argument not in _PENALTIES:
            settings[argument] = value
    if problems:
        raise ValueError(
            f"keras.optimizers.{namesake.__name__} can't train as this {name} does:\n- "
            + "\n- ".join(problems)
            + f"\nOr keep training with {name} itself: without the callback, it trains with the "
            "tuned values."
        )
    if namesake is keras.optimizers.Adam and settings["weight_decay"]:
        namesake = keras.optimizers.AdamW
    exported = namesake(**settings, name=optimizer.name)
    spared = [v for v in optimizer.trained_variables if not optimizer._use_weight_decay(v)]
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    if spared:
        exported.exclude_from_weight_decay(spared, None if pattern is None else [pattern.pattern])
    return exported


def _settings(optimizer: Any, namesake: type, problems: list[str]) -> dict[str, Any]:
    """What is neither a number nor tuned: forms of the rule, such as `nesterov`."""
    if getattr(optimizer, "dampened", False) and "momentum" in optimizer.rule.arguments:
        problems.append(
            "`dampened=True`: Keras has no dampened momentum. With a constant learning rate and "
            "momentum, keras.optimizers.SGD(learning_rate * (1 - momentum), momentum) is the same "
            "(with weight_decay / (1 - momentum))."
        )
    known = inspect.signature(namesake).parameters
    return {
        key: getattr(optimizer, key)
        for key in ("nesterov", "amsgrad", "centered", "initial_accumulator_value")
        if key in known
    }


def _value(optimizer: Any, argument: str, problems: list[str]) -> Any:
    """The number, or for the learning rate the schedule, that an argument is everywhere."""
    if argument == "learning_rate" and not optimizer._rate_is_ours:
        rate = optimizer._learning_rate
        return float(rate) if isinstance(rate, keras.Variable) else rate
    found = _everywhere(optimizer, argument)
    if argument in _PENALTIES:
        if any(np.any(array != 0.0) for array in found):
            problems.append(
                f"`{argument}`: Keras optimizers have no penalties. Pass it as a float of 0, and "
                f"{_PENALTIES[argument]}."
            )
        return None
    if not found:  # weight decay, of which every variable is spared
        return 0.0
    first = found[0][:, :1]
    if any(len(array) != len(first) or np.any(array != first) for array in found):
        problems.append(
            f"`{argument}` differs between layers, neurons or weights; in Keras it is one number. "
            "Tune it with per='model'."
        )
        return None
    over_time = first[:, 0].astype(np.float64).tolist()
    if len(over_time) == 1:
        return over_time[0]
    if argument == "learning_rate":
        return HorizonSchedule(over_time, optimizer.horizon[1])
    problems.append(
        f"`{argument}` changes over the horizon; in Keras only the learning rate does. Tune it "
        "with over='run'."
    )
    return None


def _everywhere(optimizer: Any, argument: str) -> list[np.ndarray]:
    """Of each variable that an argument acts on, its values: (blocks, count).

    One block where they stand still.
    """
    of_groups = [keras.ops.convert_to_numpy(values) for values in optimizer.values()]
    found = []
    for places, constants in zip(optimizer._places, optimizer._constants, strict=True):
        if argument in places:
            values = of_groups[places[argument].group]
            values = values.reshape(len(values), -1)
            # While the horizon is not known, the first block is all that there is.
            still = np.all(values == values[:1]) or not optimizer.horizon[1]
            found.append(values[:1] if still else values)
        elif argument in constants:
            found.append(np.full((1, 1), constants[argument]))
    return found
