"""Losses with a tunable variable: label smoothing, class weights, weights of several outputs.

Each wraps a loss, holds a variable that is marked for `DrMADCallback(variables=[loss])`, and keeps
its values when the model is saved. A weight of the loss must not lower the outer loss by shrinking
it, so there the variables stand for fixed values, which each loss names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drmad import domains
from keras_drmad.objectives import get_loss
from keras_drmad.tunable import tunable

Domain = str | tuple[float, float]


class Wrapped(keras.losses.Loss):
    """Base of the losses here: a loss around another one, with one tuned variable.

    Args:
        loss: A `keras.losses.Loss`, its name, or a registered function of targets and predictions.
        variable: The name of the variable, and of the attribute that holds it.
        initial: What its values start from.
        shape: Its shape.
        domain: Where its values live.
        in_outer_loss: What it stands for in the outer loss.
        name: Of the loss; the variable's path begins with it.
        dtype: As in Keras.
    """

    def __init__(
        self,
        loss: Any,
        variable: str,
        initial: float | Sequence[float],
        shape: tuple[int, ...],
        domain: Domain,
        in_outer_loss: float | None,
        name: str | None,
        dtype: Any = None,
    ):
        super().__init__(name=name, dtype=dtype)
        self.loss: Any = get_loss(loss, "loss")
        if self.loss is None:
            raise ValueError("`loss` is a keras.losses.Loss or its name. Received: loss=None")
        self.domain: Domain = domain if isinstance(domain, str) else (domain[0], domain[1])
        values = _checked(initial, shape, domain)
        with keras.name_scope(self.name):
            held = keras.Variable(values, dtype=self.dtype, trainable=False, name=variable)
        self._held = variable
        setattr(self, variable, tunable(held, domain, in_outer_loss))

    def __call__(self, y_true, y_pred, sample_weight=None):
        raise NotImplementedError

    def call(self, y_true, y_pred):
        return self(y_true, y_pred)

    def values(self) -> Any:
        """The values of now: a number, or a list of them."""
        return keras.ops.convert_to_numpy(getattr(self, self._held)).tolist()

    def get_config(self) -> dict[str, Any]:
        # The values themselves: Keras saves no variables of losses.
        return {
            "loss": keras.saving.serialize_keras_object(self.loss),
            "initial": self.values(),
            "domain": self.domain,
            "name": self.name,
            "dtype": self.dtype,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Wrapped:
        config = dict(config)
        config["loss"] = keras.saving.deserialize_keras_object(config["loss"])
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_drmad")
class LabelSmoothing(Wrapped):
    """Cross-entropy of classes with label smoothing that can be tuned.

    The target of the right class is `1 - s + s / classes`, of the others `s / classes`; it equals
    `keras.losses.CategoricalCrossentropy(label_smoothing=s)`. In the outer loss s is 0.

    Example:

    >>> loss = kd.losses.LabelSmoothing(0.1, from_logits=True)
    >>> model.compile(kd.optimizers.SGD(0.1), loss)
    >>> callback = kd.DrMADCallback(hyper_data, variables=[loss])

    Args:
        initial: The smoothing to start from, strictly between 0 and 1. The variable
            `loss.smoothing` holds it. Defaults to 0.1.
        from_logits: Whether the model's outputs are logits. Defaults to `False`.
        name: Defaults to `"label_smoothing"`.
        domain: Where the smoothing lives. Defaults to `"unit"`.
        dtype: As in Keras. Defaults to `None`.

    Targets are class numbers, `(batch, ...)` or `(batch, ..., 1)`, or one-hot of the shape of the
    predictions.

    Raises:
        ValueError: for a smoothing that is not in its domain.
    """

    def __init__(
        self,
        initial: float = 0.1,
        from_logits: bool = False,
        name: str | None = None,
        domain: Domain = "unit",
        dtype: Any = None,
    ):
        self.from_logits = bool(from_logits)
        inner = keras.losses.CategoricalCrossentropy(from_logits=self.from_logits, dtype=dtype)
        super().__init__(inner, "smoothing", initial, (), domain, 0.0, name, dtype)

    def __call__(self, y_true, y_pred, sample_weight=None):
        classes = y_pred.shape[-1]
        y = _one_hot_or_class(y_true, y_pred)
        if len(y.shape) < len(y_pred.shape):
            y = ops.one_hot(ops.cast(y, "int32"), classes)
        s = ops.cast(self.smoothing, self.dtype)
        return self.loss(ops.cast(y, self.dtype) * (1.0 - s) + s / classes, y_pred, sample_weight)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["loss"]
        return {**config, "from_logits": self.from_logits}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LabelSmoothing:
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_drmad")
class ClassWeights(Wrapped):
    """A loss in which every class has a weight that can be tuned.

    The loss of an example is multiplied by the weight of its class. In the outer loss all classes
    weigh 1; to measure something else there, pass `outer_loss` to the callback.

    Example:

    >>> loss = kd.losses.ClassWeights(10, "sparse_categorical_crossentropy")
    >>> model.compile(kd.optimizers.SGD(0.1), loss)
    >>> callback = kd.DrMADCallback(hyper_data, variables=[loss])

    Args:
        classes: The number of classes.
        loss: The loss that is weighted: a `keras.losses.Loss` or its name.
        initial: What the weights start from: one number or one of each class. The variable
            `loss.class_weights`, `(classes,)`, holds them. Defaults to 1.0.
        domain: Where the weights live. Defaults to `"positive"`.
        name: Defaults to `"class_weights"`.
        dtype: As in Keras. Defaults to `None`.

    Targets are class numbers or one-hot.

    Raises:
        ValueError, TypeError: for what is no number of classes, no loss, or no weight.
    """

    def __init__(
        self,
        classes: int,
        loss: Any,
        initial: float | Sequence[float] = 1.0,
        domain: Domain = "positive",
        name: str | None = None,
        dtype: Any = None,
    ):
        self.classes = count(classes, "classes")
        super().__init__(loss, "class_weights", initial, (self.classes,), domain, 1.0, name, dtype)

    def __call__(self, y_true, y_pred, sample_weight=None):
        outputs = y_pred.shape[-1]
        if outputs != self.classes and (outputs, self.classes) != (1, 2):
            raise ValueError(
                f"ClassWeights has {self.classes} classes, the model's output has {outputs}. Make "
                "it with the number of classes of the output."
            )
        weights = ops.cast(self.class_weights, self.dtype)
        y = _one_hot_or_class(y_true, y_pred)
        if len(y.shape) == len(y_pred.shape):
            weight = ops.matmul(ops.cast(y, self.dtype), weights[:, None])[..., 0]
        else:
            weight = ops.take(weights, ops.cast(y, "int32"), axis=0)
        if sample_weight is not None:
            given = ops.cast(sample_weight, self.dtype)
            if len(given.shape) == len(weight.shape) + 1:  # (batch, 1)
                given = given[..., 0]
            while len(given.shape) < len(weight.shape):  # one of each sequence
                given = given[..., None]
            weight = weight * given
        return self.loss(y_true, y_pred, weight)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "classes": self.classes}


@keras.saving.register_keras_serializable(package="keras_drmad")
class LossWeight(Wrapped):
    """A loss times a weight that can be tuned: one for each output of a model of several.

    In the outer loss the weight is what it was at first, so the initial weights say what the
    outputs are worth, and the tuned ones how to train for it.

    Example:

    >>> losses = {"depth": kd.losses.LossWeight("mse"), "kind": kd.losses.LossWeight(
    ...     "sparse_categorical_crossentropy", 2.0)}
    >>> model.compile(kd.optimizers.SGD(0.1), losses)
    >>> callback = kd.DrMADCallback(hyper_data, variables=list(losses.values()))

    Args:
        loss: The loss of the output: a `keras.losses.Loss` or its name.
        initial: The weight to start from. The variable `loss.loss_weight` holds it. Defaults to
            1.0.
        domain: Where the weight lives. Defaults to `"positive"`.
        in_outer_loss: The weight in the outer loss. Defaults to `None`: `initial`.
        name: Defaults to `"loss_weight"`.
        dtype: As in Keras. Defaults to `None`.

    Raises:
        ValueError, TypeError: for what is no loss or no weight.
    """

    def __init__(
        self,
        loss: Any,
        initial: float = 1.0,
        domain: Domain = "positive",
        in_outer_loss: float | None = None,
        name: str | None = None,
        dtype: Any = None,
    ):
        self.in_outer_loss = float(initial if in_outer_loss is None else in_outer_loss)
        super().__init__(loss, "loss_weight", initial, (), domain, self.in_outer_loss, name, dtype)

    def __call__(self, y_true, y_pred, sample_weight=None):
        value = self.loss(y_true, y_pred, sample_weight)
        return value * ops.cast(self.loss_weight, value.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "in_outer_loss": self.in_outer_loss}


def count(value: Any, argument: str) -> int:
    """A whole number of at least 1, or a readable refusal."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"`{argument}` is a whole number >= 1. Received: {argument}={value!r}")
    return int(value)


def _checked(initial: Any, shape: tuple[int, ...], domain: Domain) -> np.ndarray:
    """The initial values as an array of the shape, all inside of their domain."""
    known = domains.get(domain)
    try:
        values = np.asarray(initial, "float64")
    except (TypeError, ValueError):
        values = np.asarray(math.nan)
    if values.shape not in ((), shape):
        raise ValueError(
            f"`initial` is one number or an array of shape {shape}. Received an array of shape "
            f"{values.shape}."
        )
    outside = [v for v in values.ravel().tolist() if not known.contains(v)]
    if outside:
        raise ValueError(
            f"`initial` is {known.says}, in the domain {known.name!r}. Received: "
            f"{initial if values.ndim == 0 else outside[0]!r}"
        )
    return np.broadcast_to(values, shape)


def _one_hot_or_class(y_true: Any, y_pred: Any) -> Any:
    """Targets as one-hot, of the rank of the predictions, or as class numbers, of one rank less."""
    y_true = ops.convert_to_tensor(y_true)
    rank, outputs = len(y_pred.shape), y_pred.shape[-1]
    if len(y_true.shape) == rank and y_true.shape[-1] == outputs != 1:
        return y_true
    if len(y_true.shape) == rank and y_true.shape[-1] == 1:
        return ops.squeeze(y_true, -1)
    if len(y_true.shape) == rank - 1:
        return y_true
    raise ValueError(
        f"Targets are class numbers or one-hot. Received targets of shape {y_true.shape} for "
        f"predictions of shape {y_pred.shape}."
    )
