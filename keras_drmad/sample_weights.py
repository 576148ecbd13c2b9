"""One weight per training example, found by the index that travels with it through `fit`.

Keras hands a loss the targets, the predictions and the `sample_weight` of a batch. Of these only
the last goes untouched through shuffling and batching, and can be left out of the hyper data
without changing any shape. So the index of an example stands in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad.losses import Domain, Wrapped, count
from keras_drmad.tunable import losses_in


@keras.saving.register_keras_serializable(package="keras_drmad")
class SampleWeights(Wrapped):
    """A loss in which every training example has a weight that can be tuned.

    `fit` is given the index of each example, an integer, as its `sample_weight`. Where no index
    comes (in the hyper data, the validation data, `evaluate`), all examples weigh 1.

    Example:

    >>> loss = kd.SampleWeights(len(x), "sparse_categorical_crossentropy")
    >>> model.compile(kd.optimizers.SGD(0.1), loss)
    >>> callback = kd.DrMADCallback((x_hyper, y_hyper), variables=[loss])
    >>> model.fit(x, y, sample_weight=np.arange(len(x)), epochs=10, callbacks=[callback])
    >>> loss.sample_weights.numpy()  # (n,)

    With `tf.data` the index is the third component of an element, before the examples are
    shuffled: `tf.data.Dataset.from_tensor_slices((x, y, np.arange(n))).shuffle(n).batch(50)`.

    Args:
        n: The number of training examples; indices go from 0 to n - 1.
        loss: The loss that is weighted: a `keras.losses.Loss` or its name. With the reduction
            `"mean_with_sample_weight"` the weights of a batch are divided by their sum.
        initial: What the weights start from: one number or one of each example. The variable
            `loss.sample_weights`, `(n,)`, holds them. Defaults to 1.0, the weight in plain
            training.
        domain: Where the weights live. Defaults to `(0.0, 2.0)`: from nothing to twice, so that a
            tuned weight can't run away with the learning rate.
        name: Defaults to `"sample_weights"`.
        dtype: As in Keras. Defaults to `None`.

    Raises:
        ValueError, TypeError: for what is no number of examples, no loss, or no weight; in
            training, for a `sample_weight` that is no integer or out of range.
    """

    def __init__(
        self,
        n: int,
        loss: Any,
        initial: float | Sequence[float] = 1.0,
        domain: Domain = (0.0, 2.0),
        name: str | None = None,
        dtype: Any = None,
    ):
        self.n = count(n, "n")
        super().__init__(loss, "sample_weights", initial, (self.n,), domain, None, name, dtype)

    def __call__(self, y_true, y_pred, sample_weight=None):
        if sample_weight is None:
            return self.loss(y_true, y_pred)
        index = tf.convert_to_tensor(sample_weight)
        if not index.dtype.is_integer:
            raise TypeError(
                "SampleWeights expects the index of each training example, an integer, as "
                f"`sample_weight`. Received: {index.dtype.name}. Pass "
                "sample_weight=np.arange(n) to `fit`; examples that are not trained on have no "
                "index, so leave their `sample_weight` out."
            )
        if index.shape.rank not in (1, 2) or index.shape[1:] not in ([], [1]):
            raise ValueError(
                "SampleWeights expects one index for each example, of shape (batch,). Received "
                f"`sample_weight` of shape {index.shape}."
            )
        index = tf.cast(tf.reshape(index, [-1]), tf.int64)
        # Compiled by XLA and on a GPU an index out of range takes some other number. It must not:
        # not a number is seen at once.
        inside = tf.logical_and(index >= 0, index < self.n)
        found = tf.gather(tf.convert_to_tensor(self.sample_weights), tf.where(inside, index, 0))
        weight = tf.where(inside, found, np.nan)
        return self.loss(
            y_true, y_pred, tf.reshape(weight, [-1] + [1] * max(0, len(y_pred.shape) - 2))
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "n": self.n}


def check_use(model: keras.Model, hyper: Any) -> None:
    """Refuse what would take the indices of examples for weights, or weights for indices.

    Args:
        model: A compiled model.
        hyper: The form of a batch of hyper data.

    Raises:
        ValueError: naming what it is and the way out.
    """
    if not _used_by(model):
        return
    if keras.utils.unpack_x_y_sample_weight(hyper)[2] is not None:
        raise ValueError(
            "The loss is SampleWeights, which takes `sample_weight` for the index of a training "
            "example, and `hyper_data` has a third component. Its examples have no index: pass "
            "(x, y) alone."
        )
    metrics = getattr(model, "_compile_metrics", None)
    if getattr(metrics, "_user_weighted_metrics", None):
        raise ValueError(
            "The loss is SampleWeights, whose `sample_weight` are indices, and `weighted_metrics` "
            "would take them for weights. Compile with `metrics`."
        )


def check_indices(model: keras.Model, batches: Sequence[Any]) -> None:
    """Refuse indices of training examples that are out of range.

    Args:
        model: A compiled model.
        batches: Training batches.

    Raises:
        ValueError: naming the index and what was expected.
    """
    used = _used_by(model)
    if not used:
        return
    n = min(loss.n for loss in used)
    for index in _indices(batches):
        low, high = int(tf.reduce_min(index)), int(tf.reduce_max(index))
        if low < 0 or high >= n:
            raise ValueError(
                f"SampleWeights(n={n}) expects indices from 0 to {n - 1} as `sample_weight`. "
                f"Received: {low if low < 0 else high}. `n` is the number of training examples."
            )


def too_many(model: keras.Model, batches: Sequence[Any]) -> str:
    """What to warn of where all the indices that came are the first ones, and not all of `n`.

    Args:
        model: A compiled model.
        batches: Every training batch of a horizon.
    """
    used = _used_by(model)
    if not used or not (indices := _indices(batches)):
        return ""
    n = max(loss.n for loss in used)
    came = np.unique(np.concatenate([np.ravel(index) for index in indices]))
    if len(came) == n or came[-1] != len(came) - 1:  # others may come in the next horizon
        return ""
    return (
        f"SampleWeights(n={n}) received the indices from 0 to {came[-1]} in the first horizon, and "
        f"no other: {n - len(came)} weights belong to no example. `n` is the number of training "
        f"examples; pass n={len(came)} if that is all of them."
    )


def _indices(batches: Sequence[Any]) -> list[Any]:
    found = [keras.utils.unpack_x_y_sample_weight(batch)[2] for batch in batches]
    return [index for index in keras.tree.flatten(found) if index is not None]


def _used_by(model: keras.Model) -> list[SampleWeights]:
    losses = losses_in(getattr(model, "loss", None))
    return [loss for loss in losses if isinstance(loss, SampleWeights)]
