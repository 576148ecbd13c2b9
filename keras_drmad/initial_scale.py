"""The scale of the initial weights as a hyperparameter.

A horizon that starts from the first weights w starts from `scale * w` instead, and

    d F / d scale = sum over the weights that share it of (d F / d initial weight) * w

where the reverse loop's last adjoint is the derivative by the initial weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad.hyperparameters import Group, Hyperparameter, Place
from keras_drmad.places import lay_out

ARGUMENT = "initial_scale"


class InitialScale:
    """The tuned scales of a model's initial weights.

    Args:
        spec: At which grain, and where they start.
    """

    def __init__(self, spec: Hyperparameter):
        self.spec = spec
        self._weights: list[keras.Variable] = []
        self._groups: list[Group] = []
        self._places: list[Place] = []
        self._raw: list[keras.Variable] = []
        self._unscaled: list[tf.Tensor] = []

    def groups(self, model: keras.Model) -> list[Group]:
        """The arrays of scales."""
        return self._for(model)._groups

    def raw(self, model: keras.Model) -> list[keras.Variable]:
        """Of each group the variable of raw values, `(1, *shape)`."""
        return self._for(model)._raw

    def values(self, model: keras.Model) -> list[tf.Tensor]:
        """Of each group the scales, `(1, *shape)`."""
        pairs = zip(self.groups(model), self.raw(model), strict=True)
        return [group.domain.value(tf.convert_to_tensor(raw.value)) for group, raw in pairs]

    def apply(self, model: keras.Model) -> None:
        """Multiply the weights of a model, which stands at its unscaled start."""
        values = self.values(model)
        self._unscaled = [tf.identity(v.value) for v in self._weights]
        for variable, weight in zip(self._weights, self._scaled(values), strict=True):
            variable.assign(weight)

    def hypergradients(
        self, model: keras.Model, by_weights: Sequence[tf.Tensor] | None
    ) -> list[tf.Tensor]:
        """Of each group the derivative of the outer loss by the scales.

        Args:
            model: The model, of which `apply` started the run.
            by_weights: The derivative by the initial weights; None where it is not known, and
                then nothing here is.
        """
        values = self.values(model)
        if by_weights is None:
            return [tf.fill(tf.shape(v), tf.constant(np.nan, v.dtype)) for v in values]
        with tf.GradientTape() as tape:
            tape.watch(values)
            scaled = self._scaled(values)
        return tape.gradient(scaled, values, by_weights, unconnected_gradients="zero")

    def _scaled(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [
            weight * tf.cast(tf.reshape(values[place.group], place.shape), weight.dtype)
            for weight, place in zip(self._unscaled, self._places, strict=True)
        ]

    def _for(self, model: keras.Model) -> InitialScale:
        """Itself, laid out over the model's trainable variables."""
        weights = list(model.trainable_variables)
        if [id(v) for v in weights] != [id(v) for v in self._weights]:
            argument = {ARGUMENT: self.spec}
            groups, places, _ = lay_out(argument, {}, weights, None, lambda weight: True)
            self._weights, self._groups = weights, list(groups)
            self._places = [place[ARGUMENT] for place in places]
            self._raw = [
                keras.Variable(
                    np.full((1, *g.shape), g.domain.raw(g.initial)),
                    dtype=g.dtype,
                    trainable=False,
                    name=f"{g.argument}_{g.key}".replace("/", "_"),
                )
                for g in groups
            ]
        return self


def checked(spec: Any, restart: bool | str, window: Any) -> InitialScale | None:
    """What was passed as `initial_scale`, or a readable refusal.

    Args:
        spec: A `Hyperparameter` or None.
        restart, window: As in `DrMADCallback`.

    Raises:
        TypeError, ValueError: for anything else, and where the start of a horizon is not the
            initial weights or the walk does not reach it.
    """
    if spec is None:
        return None
    if not isinstance(spec, Hyperparameter):
        raise TypeError(
            "`initial_scale` is a Hyperparameter, such as kd.Hyperparameter(1.0, per='layer'), or "
            f"None. Received: initial_scale={spec!r}"
        )
    if not restart:
        raise ValueError(
            "`initial_scale` multiplies the weights that a horizon starts from, and with "
            f"restart={restart!r} only the first one starts from initial weights. Pass "
            "restart=True or restart='fresh'."
        )
    if spec.over != "run":
        raise ValueError(
            "`initial_scale` is one value a horizon: it has no schedule. Received: "
            f"over={spec.over!r}. Leave `over` out."
        )
    if window is not None:
        raise ValueError(
            "`initial_scale` needs the whole horizon walked back, to the initial weights. "
            f"Received: window={window!r}. Leave `window` out."
        )
    return InitialScale(spec)
