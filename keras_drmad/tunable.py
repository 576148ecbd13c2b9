"""Marks on variables: that a variable of a layer or loss is meant to be tuned, and where it lives.

A mark is a note on the variable, nothing more: `DrMADCallback(variables=...)` is what tunes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras


@dataclass(frozen=True)
class Mark:
    """What is noted on a variable."""

    domain: str | tuple[float, float]
    in_outer_loss: float | None


def tunable(
    variable: keras.Variable,
    domain: str | tuple[float, float] = "real",
    in_outer_loss: float | None = None,
) -> keras.Variable:
    """Mark a variable of a layer or a loss as one to tune.

    `DrMADCallback(variables=[layer])` then finds it in its layer, loss or model, and its domain
    with it.

    Example:

    >>> class Scale(keras.layers.Layer):
    ...     def build(self, input_shape):
    ...         scale = self.add_weight(shape=(), initializer="ones", trainable=False)
    ...         self.scale = kd.tunable(scale, "positive")
    ...     def call(self, inputs):
    ...         return inputs * self.scale

    Args:
        variable: A `keras.Variable` made with `trainable=False`.
        domain: Where its values live: `"positive"`, `"unit"`, `"real"` or `(low, high)`.
            Defaults to `"real"`.
        in_outer_loss: What the variable is taken for in the outer loss: for one that changes what
            the loss means, such as a class weight. Defaults to `None`: its value, and the outer
            loss is differentiated by it too.

    Returns:
        The variable.

    Raises:
        TypeError: for what is no variable, or a trainable one.
    """
    if not isinstance(variable, keras.Variable) or variable.trainable:
        raise TypeError(
            "`variable` is a keras.Variable made with trainable=False: it is tuned on the hyper "
            f"data, not trained. Received: variable={variable!r}"
        )
    variable._drmad_mark = Mark(domain, in_outer_loss)
    return variable


def mark_of(variable: Any) -> Mark:
    """The mark of a variable; of one without, that of a real number."""
    return getattr(variable, "_drmad_mark", None) or Mark("real", None)


def marked_in(owner: Any) -> list[keras.Variable]:
    """The marked variables of a layer, a model, a loss or a structure of these."""
    found: dict[int, keras.Variable] = {}
    for variable in _variables(owner):
        if getattr(variable, "_drmad_mark", None) is not None:
            found.setdefault(id(variable), variable)
    return list(found.values())


def losses_in(loss: Any) -> Iterator[keras.losses.Loss]:
    """The losses of a structure of losses, and those that they wrap."""
    for found in keras.tree.flatten(loss):
        if isinstance(found, keras.losses.Loss):
            yield found
            yield from losses_in(vars(found).get("loss"))


def _variables(owner: Any) -> Iterator[Any]:
    for part in keras.tree.flatten(owner):
        if isinstance(part, keras.layers.Layer):
            yield from part.variables
        if isinstance(part, keras.Model):
            part = getattr(part, "loss", None)
        for loss in losses_in(part):
            # Keras knows no variables of losses.
            yield from (v for v in vars(loss).values() if isinstance(v, keras.Variable))
