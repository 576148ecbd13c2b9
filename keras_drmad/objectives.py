"""A compiled Keras model as pure functions of its weights: the training loss, the outer loss.

Everything runs in a `keras.StatelessScope`: variables are read from what is passed in, and what the
model would assign (seeds, metrics) is dropped, but for moving averages, which are handed out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_drmad.tunable import mark_of


@dataclass(frozen=True)
class Forward:
    """One forward pass of the training loss."""

    loss: tf.Tensor  # the whole loss, penalties of layers included
    outputs: list[tf.Tensor]  # what the loss sees of the model: where Gauss-Newton cuts
    penalty: tf.Tensor | None  # what layers add (add_loss, regularizers), or None
    logits: list[tf.Tensor | None] | None = None  # of each output, what a loss may use instead
    averages: Sequence[tf.Tensor] = ()  # the moving averages after the step


def averages(model: keras.Model) -> list[keras.Variable]:
    """Moving averages that training makes of what its weights give, and inference reads.

    Those of BatchNormalization, in pairs of mean and variance; but not of a frozen layer, which
    only reads them.
    """
    found: list[keras.Variable] = []
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built and layer.trainable:
            found += [layer.moving_mean, layer.moving_variance]
    return found


class TrainingLoss:
    """The loss that `fit` minimises on a batch, as a function of weights, tuned variables, seeds.

    Other state (frozen weights, say) is read from the model as it stands.

    Args:
        model: A built and compiled model.
        tuned: Variables of the model or its loss that are tuned.
    """

    def __init__(self, model: keras.Model, tuned: Sequence[keras.Variable] = ()):
        self.model = model
        self.weights = list(model.trainable_variables)
        self.tuned = list(tuned)
        self.seeds = seed_variables(model)
        self.averages = averages(model)

    def __call__(
        self,
        weights: Sequence[tf.Tensor],
        tuned: Sequence[tf.Tensor],
        averages: Sequence[tf.Tensor],
        seeds: Sequence[tf.Tensor],
        data: Any,
    ) -> Forward:
        mapping = [
            *zip(self.weights, weights, strict=True),
            *zip(self.tuned, tuned, strict=True),
            *zip(self.averages, averages, strict=True),
            *zip(self.seeds, seeds, strict=True),
        ]
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        # Losses that layers add are collected, as `fit` does; a scope drops them by default.
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            predicted = tf.nest.map_structure(_fresh, _call(self.model, x, training=True))
            loss = _compute_loss(self.model, x, y, predicted, sample_weight, training=True)
            added = [tf.reduce_sum(term) for term in self.model.losses]
        outputs = [z for z in tf.nest.flatten(predicted) if tf.is_tensor(z)]
        penalty = tf.add_n(added) if added else None
        moved = [tf.convert_to_tensor(scope.get_current_value(v)) for v in self.averages]
        return Forward(loss, outputs, penalty, [_logits(z) for z in outputs], moved)


class OuterLoss:
    """The outer loss: mean compiled loss on the hyper data, in inference mode, without penalties.

    Args:
        model: A built and compiled model.
        data: Batches, iterated anew at every call.
        tuned: Variables of the model or its loss that are tuned.
        loss: A loss that is measured instead of the compiled one, or None.
    """

    def __init__(
        self,
        model: keras.Model,
        data: Iterable[Any],
        tuned: Sequence[keras.Variable] = (),
        loss: keras.losses.Loss | None = None,
    ):
        self.model, self.data, self.loss = model, data, loss
        self.tuned = list(tuned)
        # TensorFlow counts the traces of a function by its code, and warns of many. A partial is
        # counted by itself, or one trace of each of several callbacks would be taken for retracing.
        gradient = functools.partial(self._batch_gradient)
        self._gradient = tf.function(gradient, reduce_retracing=True, autograph=False)

    @property
    def weights(self) -> list[keras.Variable]:
        """The variables that it is differentiated by; a model may be built late."""
        return list(self.model.trainable_variables)

    @property
    def _variables(self) -> list[keras.Variable]:
        return self.weights + averages(self.model) + self.tuned

    def __call__(
        self, state: Sequence[tf.Tensor] | None = None
    ) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
        """The loss, its gradient for the weights, for moving averages, and for `tuned`.

        Args:
            state: Weights and moving averages where it is taken. Defaults to the model's present
                ones.
        """
        values = [tf.convert_to_tensor(v.value) for v in self._variables]
        if state is not None:
            values[: len(state)] = state
        total: list[tf.Tensor] | None = None
        count = tf.zeros((), tf.int64)
        for data in self.data:
            try:
                terms, size = self._gradient(values, _without_optionals(data))
            except tf.errors.InvalidArgumentError as error:
                raise ValueError(
                    "The model or its loss can't take a batch of `hyper_data`; a label or an index "
                    "may be out of range, or a shape another one. Prepare the hyper data as the "
                    f"training data. TensorFlow says: {_said(error)}"
                ) from error
            total = terms if total is None else [a + b for a, b in zip(total, terms, strict=True)]
            count += size
        if total is None:
            raise ValueError(
                "`hyper_data` gave no batch any more. It is read at every update: pass a dataset "
                "that can be iterated again and again, for example data.cache()."
            )
        mean = [term / tf.cast(count, term.dtype) for term in total]
        n, m = 1 + len(self.weights), 1 + len(mean[1:]) - len(self.tuned)
        return mean[0], mean[1:n], mean[n:m], mean[m:]

    def check(self) -> None:
        """Refuse, before anything is trained, a loss that is not for the model, where it shows.

        Raises:
            ValueError: for a loss of one output and a model of several.
        """
        outputs = getattr(self.model, "outputs", None) or ()  # a subclassed model has no list
        if self.loss is not None and len(outputs) > 1:
            self._check_one(outputs)

    def _check_one(self, outputs: Any) -> None:
        if keras.tree.is_nested(outputs):
            raise ValueError(
                "`outer_loss` is for models of one output. Leave it out: the outer loss is then "
                "the compiled loss, or what the model's `compute_loss` returns."
            )

    def _batch_gradient(
        self, values: list[tf.Tensor], data: Any
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Sum over the batch, so that a smaller last batch counts for what it holds."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        size = tf.shape(keras.tree.flatten(x)[0], tf.int64)[0]
        variables = self._variables
        with tf.GradientTape() as tape:
            tape.watch(values)
            mapping = [
                (v, _in_outer_loss(v, value)) for v, value in zip(variables, values, strict=True)
            ]
            with keras.StatelessScope(state_mapping=mapping, collect_losses=True):
                predicted = _call(self.model, x, training=False)
                loss = self._loss_of(x, y, predicted, sample_weight)
        gradients = tape.gradient(loss, values, unconnected_gradients="zero")
        return [t * tf.cast(size, t.dtype) for t in map(dense, [loss, *gradients])], size

    def _loss_of(self, x, y, predicted, sample_weight):
        if self.loss is not None:
            self._check_one(predicted)
            return self.loss(y, predicted, sample_weight)
        compiled = getattr(self.model, "_compile_loss", None)
        method = getattr(self.model.compute_loss, "__func__", None)
        if compiled is not None and method is keras.Model.compute_loss:
            return compiled(y, predicted, sample_weight)
        # A model that computes its loss itself: there is no way to leave its penalties out.
        return _compute_loss(self.model, x, y, predicted, sample_weight, training=False)


def _said(error: tf.errors.OpError) -> str:
    """The sentence of an error, without the graph that stands around it."""
    lines = [line for line in error.message.split("[[")[0].splitlines() if line.strip()]
    return lines[-1].strip() if lines else error.message


def _in_outer_loss(variable: keras.Variable, value: tf.Tensor) -> tf.Tensor:
    """What a variable is taken for: its value, or what it is marked with (a weight of the loss)."""
    fixed = mark_of(variable).in_outer_loss
    return value if fixed is None else tf.cast(tf.fill(tf.shape(value), fixed), value.dtype)


@keras.saving.register_keras_serializable(package="keras_drmad")
class _OfFunction(keras.losses.Loss):
    """The mean of a function of targets and predictions, such as Keras has for a loss's name."""

    def __init__(self, function: Any):
        super().__init__(name=getattr(function, "__name__", None))
        self.function = function

    def call(self, y_true, y_pred):
        if y_pred.shape[-1] == 1 and len(y_true.shape) == len(y_pred.shape) - 1:
            y_true = y_true[..., None]  # as in Keras's own losses; it would broadcast otherwise
        return self.function(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        return {"function": keras.saving.serialize_keras_object(self.function)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _OfFunction:
        return cls(keras.saving.deserialize_keras_object(config["function"]))


def get_loss(loss: Any, argument: str = "outer_loss") -> keras.losses.Loss | None:
    """A loss from itself, its name, or a function of targets and predictions; None is none.

    Args:
        loss: What was passed.
        argument: As what it was passed, for error messages.

    Raises:
        ValueError: for anything else.
    """
    try:
        if isinstance(loss, type):  # Keras lets a class pass for a function
            raise TypeError
        found = keras.losses.get(loss)
    except (TypeError, ValueError):
        raise ValueError(
            f"`{argument}` is a keras.losses.Loss or its name. Received: {argument}={loss!r}"
        ) from None
    return found if found is None or isinstance(found, keras.losses.Loss) else _OfFunction(found)


def seed_variables(model: keras.Model) -> list[keras.Variable]:
    """The states of the model's seed generators, which decide the dropout masks of a step."""
    known = {id(v) for v in (*model.weights, *model.metrics_variables)}
    return [v for v in model.non_trainable_variables if id(v) not in known]


def trace(model: keras.Model, batch: Any) -> None:
    """Trace a forward pass, which builds the model, as Keras does in the first training step.

    Args:
        model: A model.
        batch: The element spec of a batch.
    """
    x = keras.utils.unpack_x_y_sample_weight(batch)[0]
    x = keras.tree.map_structure(
        lambda spec: None if isinstance(spec, tf.OptionalSpec) else spec, x
    )
    tf.function(lambda x: _call(model, x, training=True), autograph=False).get_concrete_function(x)


def dense(tensor: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    """Embedding gradients come as slices; what is added up here is dense."""
    return tf.convert_to_tensor(tensor)


_ACTIVATIONS = ("Softmax", "Sigmoid")


def _fresh(output: Any) -> Any:
    """A copy of an output on which nothing depends but the loss: no other output, no penalty."""
    if not tf.is_tensor(output):
        return output
    logits = getattr(output, "_keras_logits", None)
    if logits is None and _logits(output) is not None:
        return output  # The loss looks for the operation that the output comes from.
    fresh = tf.identity(output)
    if logits is not None:
        fresh._keras_logits = tf.identity(logits)
    if getattr(output, "_keras_mask", None) is not None:
        fresh._keras_mask = output._keras_mask
    return fresh


def _logits(output: tf.Tensor) -> tf.Tensor | None:
    """What Keras's cross-entropies use instead of a softmax or sigmoid, as they find it."""
    logits = getattr(output, "_keras_logits", None)
    if logits is None and getattr(getattr(output, "op", None), "type", "") in _ACTIVATIONS:
        logits = output.op.inputs[0]
    return logits


def _call(model: keras.Model, x: Any, training: bool) -> Any:
    if getattr(model, "_call_has_training_arg", True):
        return model(x, training=training)
    return model(x)


def _compute_loss(model, x, y, predicted, sample_weight, training):
    arguments = dict(x=x, y=y, y_pred=predicted, sample_weight=sample_weight)
    if "training" in inspect.signature(model.compute_loss).parameters:
        arguments["training"] = training
    return model.compute_loss(**arguments)


def _without_optionals(data: Any) -> Any:
    """Datasets of Keras wrap a missing entry in an Optional."""
    return keras.tree.map_structure(
        lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data
    )
