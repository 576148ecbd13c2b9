"""One layer, tested in float64 on random data of the shapes that it is called on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad.derivatives import Finding, Findings, examine, untested
from keras_drmad.layer_calls import Call, Tensor, trained_variables

# How many numbers go in: what is tested as it is, and what is too large, for a model and a layer.
_SMALL, _LARGE_MODEL, _LARGE = 2**13, 2**20, 2**24
_IMAGE, _SEQUENCE = 8, 4  # what larger ones are cut to


def findings_of(call: Call) -> Findings | None:
    """Test the derivatives of a layer, or of an operation.

    Args:
        call: On what it is called. Where that is large, smaller images or shorter sequences are
            tried first; what is not right there is tried as it is.

    Returns:
        The findings; None where there is nothing to differentiate.
    """
    if any(n < 0 for tensor in call.tensors for n in tensor.shape):
        return untested("shapes that depend on the data")
    if any(isinstance(x, (tf.RaggedTensor, tf.SparseTensor)) for x in call.leaves):
        return untested("ragged or sparse inputs")
    is_model = isinstance(call.layer, keras.Model)
    if call.weights > (_LARGE_MODEL if is_model else _LARGE):
        return untested("too many weights")
    found, why = None, ""
    for candidate in [call] if is_model else [*_smaller(call), call]:
        if candidate.size > (_LARGE_MODEL if is_model else _LARGE):
            return found or untested("too large inputs")
        for double in (True, False):  # not all that TensorFlow computes is there in float64
            try:
                found = _Tested(candidate, double).findings()
            except Exception as error:  # of other sizes it may raise anything
                why = str(error).strip().split("\n")[0]
                continue
            if found is None or found.ok:
                return found
            if found.gradient.status != "missing":
                break
    return found or untested(why)


def _smaller(call: Call) -> list[Call]:
    """The call on smaller images or shorter sequences, if it is a large one."""
    loops = any(len(x.shape) == 3 and x.shape[1] > _SEQUENCE for x in call.tensors)
    if call.size - call.weights <= _SMALL and not loops:
        return []

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.constant is not None or len(x.shape) < 3:
            return x
        first, *middle, last = x.shape
        size = _IMAGE if len(middle) > 1 else _SEQUENCE
        return Tensor((first, *(min(n, size) for n in middle), last), x.dtype, x.trained)

    args, kwargs = keras.tree.map_structure(cut, (call.args, call.kwargs))
    return [Call(call.layer, args, kwargs)]


class _Tested:
    """A layer as a function of those inputs that move, and of its weights."""

    def __init__(self, call: Call, double: bool):
        self.call, self.layer, self.double = call, call.layer, double
        self.variables: list[keras.Variable] = []
        if isinstance(self.layer, keras.layers.Layer):
            self.variables = [v for v in self.layer.variables if _is_float(v)]
        self.trained = trained_variables(self.layer)
        self.moving = [i for i, x in enumerate(call.tensors) if x.moves]
        self.overwritten = False

    def findings(self) -> Findings | None:
        with _double_precision(self.layer) if self.double else contextlib.nullcontext():
            point = self.point(np.random.default_rng(0), 0)
            outputs, _ = self(point)
            if not outputs or not point:
                return None
            if self.overwritten:
                wrong = Finding("wrong", message="it overwrites its weights when it is called")
                return Findings(wrong, wrong, wrong, wrong)
            return examine(self, self.point, {x.dtype for x in (*outputs, *point)} == {tf.float64})

    def point(self, rng: np.random.Generator, attempt: int) -> list[tf.Tensor]:
        """Draw what it is called on. The weights are near those that it has."""
        self.values = [self._value(x, rng, attempt) for x in self.call.tensors]
        weights = []
        for v in self.trained:
            value = np.asarray(v.value, np.float64)
            value = value + 0.1 * (np.sqrt(np.mean(value**2)) or 1.0) * rng.normal(size=v.shape)
            weights.append(tf.constant(value, v.dtype))
        return [*(self.values[i] for i in self.moving), *weights]

    def _value(self, x: Tensor, rng: np.random.Generator, attempt: int) -> tf.Tensor:
        if x.constant is not None:
            return tf.constant(x.constant, x.dtype)
        if x.dtype.is_floating:
            value = rng.normal(size=x.shape)
            # Some functions are defined for positive numbers only.
            value = np.abs(value) + 0.1 if attempt % 2 else value
            return tf.constant(value, tf.float64 if self.double else x.dtype)
        if x.dtype == tf.bool:
            return tf.ones(x.shape, tf.bool)
        return tf.cast(rng.integers(0, 2, x.shape), x.dtype)

    def __call__(self, point: list[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor | None]:
        for i, x in zip(self.moving, point, strict=False):
            self.values[i] = x
        rest = list(self.values)
        args, kwargs = keras.tree.map_structure(
            lambda x: rest.pop(0) if isinstance(x, Tensor) else x,
            (self.call.args, self.call.kwargs),
        )
        state = [(v, tf.cast(v.value, v.dtype)) for v in self.variables]
        weights = zip(self.trained, point[len(self.moving) :], strict=True)
        with keras.StatelessScope([*state, *weights], collect_losses=True) as scope:
            before = [scope.get_current_value(v) for v in self.trained]
            outputs = self.layer(*args, **kwargs)
            added = getattr(self.layer, "losses", [])
            after = [scope.get_current_value(v) for v in self.trained]
        self.overwritten = any(a is not b for a, b in zip(before, after, strict=True))
        outputs = [tf.convert_to_tensor(z) for z in keras.tree.flatten(outputs) if z is not None]
        outputs = [z for z in outputs if z.dtype.is_floating]
        return outputs, tf.add_n([tf.reduce_sum(x) for x in added]) if added else None


def _is_float(variable: keras.Variable) -> bool:
    return tf.as_dtype(variable.dtype).is_floating


@contextlib.contextmanager
def _double_precision(layer: Any) -> Iterator[None]:
    """A layer computes in float64. Its variables say so too; their values are to be passed in."""
    inside, variables = [], []
    if isinstance(layer, keras.layers.Layer):
        inside = [(x, x._dtype_policy) for x in layer._flatten_layers()]
        variables = [(v, v._dtype) for v in layer.variables if _is_float(v)]
    floatx = keras.config.floatx()
    try:
        keras.config.set_floatx("float64")
        # Past Keras's tracking of attributes.
        for x, _ in inside:
            vars(x)["_dtype_policy"] = keras.DTypePolicy("float64")
        for v, _ in variables:
            v._dtype = "float64"
        yield
    finally:
        keras.config.set_floatx(floatx)
        for x, policy in inside:
            vars(x)["_dtype_policy"] = policy
        for v, dtype in variables:
            v._dtype = dtype
