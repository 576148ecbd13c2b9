"""Update rules: the only place where an update is written.

A rule is one pure function of one variable; `update` puts around it what Keras puts around
`update_step`, for all variables. The forward optimizer and the reverse loop both call `update`:
the loop differentiates it (its vector-Jacobian product), so no derivative is written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tensorflow as tf

Slots = tuple[tf.Tensor, ...]
Values = dict[str, Any]  # by name: a tensor, or a Python float where it stands still


@dataclass(frozen=True)
class Rule:
    """An update rule for one variable.

    Args:
        step: `step(weight, slots, gradient, values, t)` returns the new weight and the new slots.
            `values` holds the hyperparameters by name, each a Python float or a tensor that
            broadcasts to the weight; `t` counts updates from 1, in the weight's dtype.
        slots: The names of the slots, which have the weight's shape.
        arguments: The hyperparameters that `step` reads: name to the domain in which each is
            tuned (see `Hyperparameter`).
        initial_slot: Where slots start. Defaults to 0.0.
    """

    step: Callable[[tf.Tensor, Slots, tf.Tensor, Values, tf.Tensor], tuple[tf.Tensor, Slots]]
    slots: tuple[str, ...]
    arguments: Mapping[str, str | tuple[float, float]]
    initial_slot: float = 0.0


def update(
    rule: Rule,
    weights: Sequence[tf.Tensor],
    slots: Sequence[Slots],
    gradients: Sequence[tf.Tensor | None],
    values: Sequence[Values],
    t: tf.Tensor,
    constraints: Sequence[Callable | None] | None = None,
) -> tuple[list[tf.Tensor], list[Slots]]:
    """One training step of all variables: penalties, clipping, decay, rule, constraint.

        g <- g + l1 sign(w) + l2 w
        g <- clip(g)
        w <- w - learning_rate weight_decay w
        w, s <- rule(w, s, g)

    Args:
        rule: The rule.
        weights, slots, gradients: Of each variable. A variable whose gradient is None is left
            as it is, as Keras does.
        values: Of each variable, its hyperparameters by name, each broadcastable to it. `l1`,
            `l2`, `weight_decay`, and `clipnorm`, `clipvalue` or `global_clipnorm`, are applied
            where they are present.
        t: The number of this update, from 1 (int).
        constraints: Of each variable, the projection after the step, or None.

    Returns:
        The new weights and the new slots.
    """
    moved = [i for i, gradient in enumerate(gradients) if gradient is not None]
    total = _clip(
        [_penalized(weights[i], gradients[i], values[i]) for i in moved],
        [values[i] for i in moved],
    )
    new_weights, new_slots = list(weights), [tuple(s) for s in slots]
    for i, gradient in zip(moved, total, strict=True):
        weight, at = weights[i], values[i]
        if "weight_decay" in at:
            weight = weight - weight * at["weight_decay"] * at["learning_rate"]
        weight, new_slots[i] = rule.step(
            weight, tuple(slots[i]), gradient, at, tf.cast(t, weight.dtype)
        )
        constraint = None if constraints is None else constraints[i]
        if constraint is not None:
            weight = tf.convert_to_tensor(constraint(weight))
        new_weights[i] = weight
    return new_weights, new_slots


def _penalized(weight: tf.Tensor, gradient: tf.Tensor, values: Values) -> tf.Tensor:
    if "l1" in values:
        gradient = gradient + values["l1"] * tf.sign(weight)
    if "l2" in values:
        gradient = gradient + values["l2"] * weight
    return gradient


def _clip(gradients: list[tf.Tensor], values: list[Values]) -> list[tf.Tensor]:
    """At most one of the three clippings of Keras: by norms, by one norm over all, or by entry."""
    if values and "global_clipnorm" in values[0]:
        square = tf.add_n([tf.cast(tf.reduce_sum(g * g), gradients[0].dtype) for g in gradients])
        return [
            _scale_to(g, square, at["global_clipnorm"])
            for g, at in zip(gradients, values, strict=True)
        ]
    clipped = []
    for gradient, at in zip(gradients, values, strict=True):
        if "clipnorm" in at:
            gradient = _scale_to(gradient, tf.reduce_sum(gradient * gradient), at["clipnorm"])
        if "clipvalue" in at:
            gradient = tf.maximum(tf.minimum(gradient, at["clipvalue"]), -at["clipvalue"])
        clipped.append(gradient)
    return clipped


def _scale_to(gradient: tf.Tensor, square: tf.Tensor, limit: Any) -> tf.Tensor:
    square = tf.cast(square, gradient.dtype)
    limit = tf.convert_to_tensor(limit, gradient.dtype)
    # Both branches of a `where` are differentiated: below the limit the root is taken of the
    # limit instead, so that a zero gradient has a finite derivative.
    above = square > limit * limit
    norm = tf.sqrt(tf.where(above, square, limit * limit))
    return gradient * tf.where(above, limit / norm, tf.ones_like(norm))


# The rules -----------------------------------------------------------------------------------


def _sgd(weight, slots, gradient, values, t):
    return weight - values["learning_rate"] * gradient, slots


def _momentum(weight, slots, gradient, values, t):
    (velocity,) = slots
    velocity = values["momentum"] * velocity - values["learning_rate"] * gradient
    return weight + velocity, (velocity,)


def _nesterov(weight, slots, gradient, values, t):
    (velocity,) = slots
    push = values["learning_rate"] * gradient
    velocity = values["momentum"] * velocity - push
    return weight + (values["momentum"] * velocity - push), (velocity,)


def _dampened(weight, slots, gradient, values, t):
    (velocity,) = slots
    velocity = values["momentum"] * velocity - (1.0 - values["momentum"]) * gradient
    return weight + values["learning_rate"] * velocity, (velocity,)


def _adam(weight, slots, gradient, values, t):
    mean, square, *largest = slots
    mean = mean + (gradient - mean) * (1.0 - values["beta_1"])
    square = square + (gradient * gradient - square) * (1.0 - values["beta_2"])
    largest = [tf.maximum(before, square) for before in largest]  # AMSGrad
    unbiased = tf.sqrt(1.0 - values["beta_2"] ** t) / (1.0 - values["beta_1"] ** t)
    scale = root(largest[0] if largest else square) + values["epsilon"]
    return weight - values["learning_rate"] * unbiased * mean / scale, (mean, square, *largest)


def _rmsprop(weight, slots, gradient, values, t, centered, with_momentum):
    (square, *rest) = slots
    square = values["rho"] * square + (1.0 - values["rho"]) * gradient * gradient
    new, variance = [square], square
    if centered:
        mean = values["rho"] * rest.pop(0) + (1.0 - values["rho"]) * gradient
        new.append(mean)
        variance = square - mean * mean
    step = values["learning_rate"] * gradient / root(variance + values["epsilon"])
    if with_momentum:
        step = values["momentum"] * rest.pop(0) + step
        new.append(step)
    return weight - step, tuple(new)


def _adagrad(weight, slots, gradient, values, t):
    (total,) = slots
    total = total + gradient * gradient
    return weight - values["learning_rate"] * gradient / root(total + values["epsilon"]), (total,)


def _lion(weight, slots, gradient, values, t):
    (mean,) = slots
    direction = tf.sign(mean * values["beta_1"] + gradient * (1.0 - values["beta_1"]))
    mean = mean * values["beta_2"] + gradient * (1.0 - values["beta_2"])
    return weight - values["learning_rate"] * direction, (mean,)


def root(x: tf.Tensor) -> tf.Tensor:
    """The square root, with derivative 0 at 0.

    A second-moment estimate is 0 where every gradient so far was 0. The root of a sum of squares
    of gradients has its minimum there, so 0 is the right derivative (that of its two sides, on
    average); the chain rule alone would multiply an infinite slope by zero.
    """
    zero = tf.equal(x, 0)
    return tf.where(zero, tf.zeros_like(x), tf.sqrt(tf.where(zero, tf.ones_like(x), x)))


_RATE = {"learning_rate": "positive"}
_MOMENTUM = {**_RATE, "momentum": "unit"}
_BETAS = {**_RATE, "beta_1": "unit", "beta_2": "unit"}

SGD = Rule(_sgd, (), _RATE)
MOMENTUM = Rule(_momentum, ("velocity",), _MOMENTUM)
NESTEROV = Rule(_nesterov, ("velocity",), _MOMENTUM)
DAMPENED = Rule(_dampened, ("velocity",), _MOMENTUM)
ADAM = Rule(_adam, ("momentum", "velocity"), {**_BETAS, "epsilon": "positive"})
AMSGRAD = replace(ADAM, slots=("momentum", "velocity", "velocity_hat"))
ADAGRAD = Rule(_adagrad, ("accumulator",), {**_RATE, "epsilon": "positive"}, initial_slot=0.1)
LION = Rule(_lion, ("momentum",), _BETAS)


def rmsprop(centered: bool = False, with_momentum: bool = False) -> Rule:
    """RMSprop with the slots that its form needs."""
    arguments = {**_RATE, "rho": "unit", "epsilon": "positive"}
    return Rule(
        partial(_rmsprop, centered=centered, with_momentum=with_momentum),
        ("velocity", *["average_gradient"] * centered, *["momentum"] * with_momentum),
        {**arguments, "momentum": "unit"} if with_momentum else arguments,
    )
