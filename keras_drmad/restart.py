"""Where a horizon starts from: a snapshot of the beginning, or newly initialised weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_drmad.objectives import seed_variables


class Start:
    """The model and optimizer as they stood at one moment.

    Seeds of dropout are not part of it: a restarted run draws new masks.
    """

    def __init__(self, model: keras.Model):
        self._saved = [(v, tf.identity(v.value)) for v in _state(model)]
        self.seed = random.randrange(2**31)  # what new weights are drawn from

    def values(self) -> list[tf.Tensor]:
        """What everything is set back to."""
        return [value for _, value in self._saved]

    def set_values(self, values: Sequence[Any]) -> None:
        """Take what `values` gave, of the same model, as that moment.

        Raises:
            ValueError: if the model is another one.
        """
        expected = [tuple(v.shape) for v, _ in self._saved]
        found = [tuple(value.shape) for value in values]
        if found != expected:
            raise ValueError(
                "The first weights in the saved tuning run are not those of this model. Expected "
                f"shapes {expected}, found {found}."
            )
        self._saved = [
            (v, tf.cast(new, v.dtype))  # bfloat16 was saved as float32
            for (v, _), new in zip(self._saved, values, strict=True)
        ]

    def restore(self) -> None:
        """Set everything back to that moment."""
        for variable, value in self._saved:
            variable.assign(value)

    def restore_with_new_weights(self, model: keras.Model, count: int) -> None:
        """Set everything back, except trainable weights: they are newly initialised.

        Frozen weights may have been loaded, and statistics adapted: both stay as they were.

        Args:
            model: The model.
            count: How often it was trained before: each time other weights are drawn, and the
                same in a run that was stopped in between and one that was not.

        Raises:
            ValueError: if the model can't be cloned by `keras.models.clone_model`.
        """
        # Keras's initializers draw their seeds from here, unless they were given one.
        before = random.getstate()
        random.seed(self.seed + count)
        try:
            clone = keras.models.clone_model(model)
            if not clone.built:
                clone.build_from_config(model.get_build_config())
            fresh = clone.weights
        except Exception as error:
            raise ValueError(
                f"restart='fresh' initialises the model anew with keras.models.clone_model, which "
                f"failed for {type(model).__name__}: {error}. Give the model a `get_config`, or "
                "use restart=True."
            ) from error
        finally:
            random.setstate(before)
        if [tuple(v.shape) for v in fresh] != [tuple(v.shape) for v in model.weights]:
            raise ValueError(
                "restart='fresh': a clone of the model has other weights than the model. Use "
                "restart=True."
            )
        trainable = {id(v) for v in model.trainable_variables}
        pairs = [
            (v, new) for v, new in zip(model.weights, fresh, strict=True) if id(v) in trainable
        ]
        first = {id(v): value for v, value in self._saved}
        if all(bool(tf.reduce_all(new.value == first[id(v)])) for v, new in pairs):
            raise ValueError(
                "restart='fresh': a clone of the model has the same weights as at first. Leave the "
                "`seed` out of its initializers, or use restart=True."
            )
        self.restore()
        for variable, new in pairs:
            variable.assign(new)


def _state(model: keras.Model) -> list[keras.Variable]:
    seeds = {id(v) for v in seed_variables(model)}
    optimizer = model.optimizer
    slots = [slot for slots in optimizer.slot_variables for slot in slots]
    return [v for v in model.weights if id(v) not in seeds] + slots + [optimizer.iterations]
