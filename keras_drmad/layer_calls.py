"""What each layer of a model is called on, noted in one trace of the forward pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad import graphs


@dataclass(frozen=True)
class Tensor:
    """A tensor that a layer was called on."""

    shape: tuple[int, ...]  # -1 where it depends on the data
    dtype: tf.DType
    trained: bool  # whether trained weights come before it
    constant: np.ndarray | None = None  # its value, where it is a constant

    @property
    def moves(self) -> bool:
        """Whether derivatives go through it."""
        return self.trained and self.dtype.is_floating


@dataclass(frozen=True)
class Call:
    """A call of a layer, or of an operation of a functional model."""

    layer: Any
    args: tuple  # with a `Tensor` in the place of each tensor
    kwargs: dict[str, Any]
    inner: list[Call] = field(default_factory=list)  # of the layers inside it

    @property
    def leaves(self) -> list[Any]:
        """All that it is called on, flat."""
        return keras.tree.flatten((self.args, self.kwargs))

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in self.leaves if isinstance(x, Tensor)]

    @property
    def weights(self) -> int:
        """How many trained numbers it holds."""
        return sum(math.prod(v.shape) for v in trained_variables(self.layer))

    @property
    def size(self) -> int:
        """How many numbers go in, weights included."""
        return self.weights + sum(abs(math.prod(x.shape)) for x in self.tensors)


def trained_variables(layer: Any) -> list[keras.Variable]:
    """The trainable weights of a layer; operations have none."""
    return list(layer.trainable_variables) if isinstance(layer, keras.layers.Layer) else []


def record(model: keras.Model, inputs: Any) -> Call:
    """Trace a model's forward pass, without computing it, and note every call in it.

    Args:
        model: A built model.
        inputs: Specs of what the model is called on.

    Returns:
        The call of the model itself; the others are inside of it.
    """
    weights = list(model.trainable_variables)
    stack: list[list[Call]] = [[]]
    marked: list[tf.Tensor] = []

    def forward(inputs):
        marked.extend(tf.identity(v.value) for v in weights)
        with keras.StatelessScope(list(zip(weights, marked, strict=True))):
            if getattr(model, "_call_has_training_arg", True):
                return model(inputs, training=True)
            return model(inputs)

    with _noting(_units(model), stack):
        graph = tf.function(forward, autograph=False).get_concrete_function(inputs).graph
    reached = graphs.reached(graph, marked)

    def described(x):
        if not isinstance(x, tf.Tensor):
            return x
        # Inside a loop's body it is not known what comes before.
        trained = x.op in reached if getattr(x, "graph", None) is graph else True
        constant = None if x.dtype.is_floating else tf.get_static_value(x)
        shape = (-1,) if x.shape.rank is None else tuple(-1 if n is None else n for n in x.shape)
        return Tensor(shape, x.dtype, trained, constant)

    def finished(call: Call) -> Call:
        args, kwargs = keras.tree.map_structure(described, (call.args, call.kwargs))
        return Call(call.layer, tuple(args), kwargs, [finished(c) for c in call.inner])

    return finished(stack[0][0])


def _units(model: keras.Model) -> list[Any]:
    layers = model._flatten_layers()
    operations = [op for layer in layers for op in getattr(layer, "operations", ())]
    return list({id(unit): unit for unit in [*layers, *operations]}.values())


@contextlib.contextmanager
def _noting(units: Sequence[Any], stack: list[list[Call]]) -> Iterator[None]:
    """Note each call of these layers; `stack` ends in the list for the calls of the innermost."""

    def stand_in(unit, original):
        def call(*args, **kwargs):
            noted = Call(unit, args, kwargs)
            stack[-1].append(noted)
            stack.append(noted.inner)
            try:
                return original(*args, **kwargs)
            finally:
                stack.pop()

        return call

    # An attribute of the object comes before the method of its class, and past Keras's tracking.
    before = [(unit, vars(unit).get("call")) for unit in units]
    try:
        for unit in units:
            vars(unit)["call"] = stand_in(unit, unit.call)
        yield
    finally:
        for unit, own in before:
            if own is None:
                vars(unit).pop("call", None)
            else:
                vars(unit)["call"] = own
