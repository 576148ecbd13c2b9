"""The outer update: from hypergradients to new hyperparameters, with the guards around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad import domains
from keras_drmad.tunable import mark_of, marked_in

# What an optimizer that is given by name steps by, in raw units: about 10 % of a positive value.
NAMED_LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Tuned:
    """A raw variable that the outer optimizer moves, and the domain of its value."""

    raw: keras.Variable
    domain: domains.Domain
    target: keras.Variable | None = None  # the variable that holds the value itself, if any does


def tuned_variables(variables: Sequence[Any]) -> list[Tuned]:
    """Variables of a model or a loss, each with a raw variable beside it.

    Args:
        variables: `keras.Variable`s, or pairs of one and its domain; or layers, losses and models,
            for the variables in them that are marked by `tunable`.

    Raises:
        TypeError, ValueError: for what is no floating variable, appears twice, or holds a value
            outside of its domain.
    """
    if not isinstance(variables, Sequence) or isinstance(variables, str):
        raise TypeError(
            "`variables` is a list of keras.Variables or pairs (keras.Variable, domain), or of "
            f"layers and losses of keras_drmad. Received: variables={variables!r}"
        )
    result: list[Tuned] = []
    for variable, domain in (pair for entry in variables for pair in _pairs(entry)):
        if not isinstance(variable, keras.Variable):
            raise TypeError(
                "`variables` holds keras.Variables or pairs (keras.Variable, domain), or layers "
                f"and losses of keras_drmad. Received: {variable!r}"
            )
        if not keras.backend.is_float_dtype(variable.dtype):
            raise TypeError(
                f"{variable.path} is of dtype {variable.dtype}: no gradient reaches it."
            )
        if any(t.target is variable for t in result):
            raise ValueError(f"{variable.path} stands in `variables` twice.")
        if any(t.target is not None and t.target.path == variable.path for t in result):
            raise ValueError(
                f"Two of the `variables` are called {variable.path!r}, and records name them by "
                "that. Give one of them, or its layer or loss, another `name`."
            )
        known = domains.get(domain)
        values = keras.ops.convert_to_numpy(variable)
        outside = [v for v in np.ravel(values).tolist() if not known.contains(v)]
        if outside:
            raise ValueError(
                f"{variable.path} holds {outside[0]}, but its domain {known.name!r} is "
                f"{known.says}. Start elsewhere or pass another domain."
            )
        raw = keras.Variable(np.zeros(values.shape), dtype=variable.dtype, trainable=False,
                             name=f"{variable.name}_raw")  # fmt: skip
        result.append(Tuned(raw, known, variable))
    return result


def _pairs(entry: Any) -> list[tuple[Any, Any]]:
    """An entry of `variables` as pairs of variable and domain."""
    if isinstance(entry, (tuple, list)) and len(entry) == 2:
        return [(entry[0], entry[1])]
    if not isinstance(entry, (keras.layers.Layer, keras.losses.Loss)):
        return [(entry, mark_of(entry).domain)]
    found = marked_in(entry)
    if not found:
        raise ValueError(
            f"{type(entry).__name__} {entry.name!r} in `variables` has no variable to tune: none "
            "is marked by keras_drmad.tunable, or the layer is not built yet (give the model an "
            "Input). Pass the variable itself, or a pair (variable, domain)."
        )
    return [(variable, mark_of(variable).domain) for variable in found]


def _set_raw(tuned: Tuned) -> None:
    """Take the raw value from the variable, which may have been assigned to meanwhile."""
    values = keras.ops.convert_to_numpy(tuned.target)
    flat = [tuned.domain.raw(v) for v in np.ravel(values).tolist()]
    tuned.raw.assign(np.reshape(np.asarray(flat, values.dtype), values.shape))


def get(optimizer: str | keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The outer optimizer of a name, with `NAMED_LEARNING_RATE`; or the object itself.

    Raises:
        TypeError, ValueError: for an unknown name or another object, and for settings of an
            optimizer that have no meaning here.
    """
    if isinstance(optimizer, keras.optimizers.Optimizer):
        if getattr(optimizer, "hyperparameters", ()):
            raise ValueError(
                "`outer_optimizer` moves the hyperparameters, and nothing tunes its own. Received: "
                f"{type(optimizer).__name__} with a Hyperparameter. Pass 'adam' or a Keras "
                "optimizer; the model's optimizer stays in `compile`."
            )
        for setting in ("use_ema", "loss_scale_factor"):
            if getattr(optimizer, setting, None):
                raise ValueError(
                    f"`{setting}` of the `outer_optimizer` would be of no use to hyperparameters. "
                    f"Received: {setting}={getattr(optimizer, setting)!r}. Leave it out."
                )
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "`outer_optimizer` gets hypergradients that no loss scale was applied to. "
                "Received: LossScaleOptimizer. Pass its inner optimizer."
            )
        return optimizer
    if isinstance(optimizer, str):
        try:
            found = keras.optimizers.get(optimizer)
        except ValueError:
            raise ValueError(
                "`outer_optimizer` is not the name of a Keras optimizer, such as 'adam'. Received: "
                f"outer_optimizer={optimizer!r}"
            ) from None
        found.learning_rate = NAMED_LEARNING_RATE
        return found
    raise TypeError(
        "`outer_optimizer` is a Keras optimizer or its name, or keras_drmad.optimizers.Sign(step). "
        f"Received: outer_optimizer={optimizer!r}"
    )


def built_for(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> keras.optimizers.Optimizer:
    """The outer optimizer, or where it was built for other variables, one like it for these.

    A schedule over a horizon that has another length now has another number of blocks: each takes
    over the state of the old block in which it begins.
    """
    if not optimizer.built:
        return optimizer
    before = optimizer._trainable_variables
    if [id(v) for v in before] == [id(v) for v in variables]:
        return optimizer
    new = type(optimizer).from_config(optimizer.get_config())
    new.build(variables)
    if [v.shape[1:] for v in before] == [v.shape[1:] for v in variables]:
        for old, variable in zip(optimizer.variables, new.variables, strict=True):
            value = keras.ops.convert_to_numpy(old)
            if value.shape != tuple(variable.shape):
                count = variable.shape[0]
                value = value[[i * len(value) // count for i in range(count)]]
            variable.assign(value)
    return new


def update(
    optimizer: keras.optimizers.Optimizer,
    tuned: Sequence[Tuned],
    hypergradients: Sequence[tf.Tensor],
    max_step: float,
) -> str:
    """Move the raw variables against their hypergradients, if they can be trusted.

    Args:
        optimizer: A Keras optimizer.
        tuned: What is moved.
        hypergradients: Of each, the derivative of the outer loss by the value (not the raw one).
        max_step: No raw value moves farther than this.

    Returns:
        An empty string, or the reason why nothing was moved.
    """
    if not all(bool(tf.reduce_all(tf.math.is_finite(h))) for h in hypergradients):
        return "a hypergradient is not finite"
    for t in tuned:
        if t.target is not None:
            _set_raw(t)
    before = [tf.identity(t.raw.value) for t in tuned]
    gradients = [
        tf.cast(h, raw.dtype) * t.domain.slope(raw)
        for h, t, raw in zip(hypergradients, tuned, before, strict=True)
    ]
    if not optimizer.built:
        optimizer.build([t.raw for t in tuned])
    variables = [*optimizer.variables, *(t.raw for t in tuned)]
    state = [(v, tf.identity(v.value)) for v in variables]
    optimizer.apply(gradients, [t.raw for t in tuned])
    steps = [
        tf.clip_by_value(t.raw.value - old, -max_step, max_step)
        for t, old in zip(tuned, before, strict=True)
    ]
    floating = [v.value for v in optimizer.variables if keras.backend.is_float_dtype(v.dtype)]
    if not all(bool(tf.reduce_all(tf.math.is_finite(x))) for x in (*floating, *steps)):
        # A moment that is infinite once is so for good, and nothing would move any more.
        for variable, value in state:
            variable.assign(value)
        return "the outer optimizer's moments overflowed"
    for t, old, step in zip(tuned, before, steps, strict=True):
        t.raw.assign(old + step)
        if t.target is not None:
            t.target.assign(t.domain.value(tf.convert_to_tensor(t.raw.value)))
    return ""
