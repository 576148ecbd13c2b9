"""What the outer loss is measured on, as batches that can be iterated again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad.objectives import trace
from keras_drmad.tunable import losses_in

BATCH_SIZE = 1024  # of arrays, where none is asked for
LONGEST = 10_000  # batches of a dataset of unknown length, which may have no end

_FORMS = "(x, y), (x, y, sample_weight), a tf.data.Dataset or a keras.utils.PyDataset"


def batches_of(data: Any, batch_size: int | None = None) -> Iterable[Any]:
    """The batches of hyper data.

    Args:
        data: `(x, y[, sample_weight])` of arrays or nested structures of arrays, a
            `tf.data.Dataset` of batches, or a `keras.utils.PyDataset`.
        batch_size: Examples per batch, where arrays are passed; None is `BATCH_SIZE`.

    Raises:
        ValueError, TypeError: if there is no example, arrays differ in length, a number is not
            finite, a dataset never ends or is to be batched again, or the data is of another form.
    """
    if batch_size is not None and isinstance(data, (tf.data.Dataset, keras.utils.PyDataset)):
        raise ValueError(
            "`hyper_batch_size` is for arrays: a dataset gives batches of its own. Received: "
            f"hyper_batch_size={batch_size} with {type(data).__name__}. Batch the dataset as you "
            "want it, and leave the argument out."
        )
    if isinstance(data, tf.data.Dataset):
        cardinality = int(data.cardinality())
        if cardinality == 0:
            raise ValueError("`hyper_data` is empty: the outer loss needs at least one example.")
        if cardinality == tf.data.UNKNOWN_CARDINALITY:
            if next(iter(data), None) is None:
                raise ValueError("`hyper_data` is empty: the dataset gave no batch.")
            return _Bounded(data)
        if cardinality == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "`hyper_data` never ends. Pass a finite dataset, for example data.take(100)."
            )
        return data
    if isinstance(data, keras.utils.PyDataset):
        if not data.num_batches:
            raise ValueError("`hyper_data` is an empty or endless PyDataset: give it a length.")
        return _Indexed(data)
    if isinstance(data, (tuple, list)) and len(data) in (2, 3):
        return _dataset(tuple(data), batch_size or BATCH_SIZE)
    raise TypeError(f"`hyper_data` is {_FORMS}. Received: {_describe(data)}")


def element_spec(batches: Iterable[Any]) -> Any:
    """The form of one batch: nested `tf.TensorSpec` with an open first dimension."""
    if isinstance(batches, (tf.data.Dataset, _Bounded)):
        return batches.element_spec
    return keras.tree.map_structure(
        lambda x: None if x is None else tf.TensorSpec([None, *x.shape[1:]], x.dtype),
        next(iter(batches)),
    )


def check_against(training: Any, hyper: Any, model: keras.Model) -> None:
    """Compare the forms of a training batch and of a batch of hyper data.

    Args:
        training, hyper: Element specs (see `element_spec`).
        model: The model, built. Lengths that differ in the inputs (of sequences, of images) pass
            if it takes both.

    Raises:
        ValueError: if inputs or targets differ in structure or shape.
    """
    pairs = zip(
        ("inputs", "targets"),
        keras.utils.unpack_x_y_sample_weight(training)[:2],
        keras.utils.unpack_x_y_sample_weight(hyper)[:2],
        strict=True,
    )
    lengths_differ = False
    for what, expected, given in pairs:
        expected, given = _specs(expected), _specs(given)
        shapes = [
            (expected[key].shape[1:], given[key].shape[1:])
            for key in expected
            if key in given and None not in (expected[key].shape.rank, given[key].shape.rank)
        ]
        agree = set(expected) == set(given) and all(a.rank == b.rank for a, b in shapes)
        if agree and not all(a.is_compatible_with(b) for a, b in shapes):
            if what == "inputs":
                lengths_differ = _takes(model, hyper)
            agree = lengths_differ
        if not agree:
            raise ValueError(
                f"The {what} of `hyper_data` differ from those that the model trains on. "
                f"Expected {_shapes(expected)}, received {_shapes(given)} (the first dimension is "
                "the batch). Prepare the hyper data as the training data."
            )
        for key in expected:
            if (expected[key].dtype == tf.string) != (given[key].dtype == tf.string):
                raise ValueError(
                    f"The {what} of `hyper_data` differ from those that the model trains on. "
                    f"Expected {expected[key].dtype.name}, received {given[key].dtype.name}. "
                    "Prepare the hyper data as the training data."
                )


def check_labels(batches: Iterable[Any], model: keras.Model, loss: Any) -> None:
    """Refuse class numbers that the model has no output for, where a sparse cross-entropy is taken.

    The data is read once; where the number of outputs is not known, not at all.

    Args:
        batches: The hyper data.
        model: The model, built.
        loss: The loss that is measured on them.

    Raises:
        ValueError: naming the label and the range.
    """
    losses, outputs = keras.tree.flatten(loss), getattr(model, "outputs", None) or []
    if len(losses) != 1 or len(outputs) != 1:
        return
    named = losses[0] if not isinstance(losses[0], str) else keras.losses.get(losses[0])
    sparse = [x for x in (named, *losses_in(named)) if _is_sparse(x)]
    classes = outputs[0].shape[-1]
    if not sparse or classes is None:
        return
    ignored = getattr(sparse[0], "ignore_class", None)
    for batch in batches:
        for y in keras.tree.flatten(keras.utils.unpack_x_y_sample_weight(batch)[1]):
            labels = np.unique(y.numpy()) if isinstance(y, tf.Tensor) else np.zeros(0)
            outside = [v for v in labels if not 0 <= v < classes and v != ignored]
            if outside:
                raise ValueError(
                    f"A label of `hyper_data` is {outside[0]:g}, but the model has {classes} "
                    f"outputs, for labels from 0 to {classes - 1}. Number the classes from 0 as in "
                    "the training data, or give the model an output for each."
                )


def _is_sparse(loss: Any) -> bool:
    function = keras.losses.sparse_categorical_crossentropy
    if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        return getattr(loss, "axis", -1) == -1
    return function in (loss, getattr(loss, "function", None))


def other_kind(training: Any, hyper: Any) -> str:
    """What to warn of where one of training and hyper inputs are whole numbers, the other not.

    Args:
        training, hyper: Element specs that `check_against` has let through.
    """
    expected, given = (
        _specs(keras.utils.unpack_x_y_sample_weight(spec)[0]) for spec in (training, hyper)
    )
    for key in expected:
        if expected[key].dtype.is_integer != given[key].dtype.is_integer:
            return (
                f"The inputs of `hyper_data` are {given[key].dtype.name}, those that the model "
                f"trains on {expected[key].dtype.name}. If one of them was scaled and the other "
                "not, the outer loss is not that of this model: prepare both in the same way."
            )
    return ""


def _takes(model: keras.Model, batch: Any) -> bool:
    try:
        trace(model, batch)
    except Exception:  # whatever a layer raises about a shape
        return False
    return True


def overlap(training: Any, batches: Iterable[Any]) -> float:
    """The part of a training batch's examples that are found in the hyper data, from 0 to 1."""
    rows = _row_hashes(training)
    found = set()
    for batch in batches:
        found |= rows & _row_hashes(batch)
    return len(found) / max(1, len(rows))


class _Bounded:
    """A dataset of unknown length, up to a length at which it is taken for one without end."""

    def __init__(self, data: tf.data.Dataset):
        self._data, self.element_spec = data, data.element_spec

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self._data):
            if i == LONGEST:
                raise ValueError(
                    f"`hyper_data`, a dataset of unknown length, has given {LONGEST} batches and "
                    "is not at its end. Pass a finite one, for example data.take(100); or tell its "
                    "length by data.apply(tf.data.experimental.assert_cardinality(n))."
                )
            yield batch


class _Indexed:
    """A PyDataset from its first to its last batch."""

    def __init__(self, data: keras.utils.PyDataset):
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        for i in range(self._data.num_batches):
            batch = keras.tree.map_structure(
                lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), self._data[i]
            )
            arrays = [leaf for leaf in keras.tree.flatten(batch) if leaf is not None]
            lengths = {len(array) for array in arrays if array.shape.rank}
            if len(lengths) > 1:
                raise ValueError(
                    f"The arrays in batch {i} of the `hyper_data` have different numbers of "
                    f"examples: {sorted(lengths)}. Return as many targets as inputs."
                )
            yield batch


def _dataset(data: tuple, batch_size: int) -> tf.data.Dataset:
    arrays = keras.tree.map_structure(_array, data)
    if arrays[0] is None:
        raise TypeError(f"`hyper_data` is {_FORMS}. Received: None for x")
    lengths = {len(array) for array in keras.tree.flatten(arrays) if array is not None}
    if len(lengths) != 1:
        raise ValueError(
            f"The arrays of `hyper_data` have different numbers of examples: {sorted(lengths)}. "
            "Pass as many targets (and weights) as inputs."
        )
    if lengths == {0}:
        raise ValueError("`hyper_data` is empty: the outer loss needs at least one example.")
    if len(arrays) == 3 and arrays[2] is None:
        arrays = arrays[:2]
    # As `fit` does: for tf.data a list is one tensor.
    arrays = keras.tree.lists_to_tuples(arrays)
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size)


def _array(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, tf.RaggedTensor):
        return leaf
    try:
        array = leaf if isinstance(leaf, tf.Tensor) else np.asarray(leaf)
        if len(array.shape) == 0 or array.dtype == np.dtype(object):
            raise TypeError
    except (TypeError, ValueError):
        raise TypeError(f"`hyper_data` is {_FORMS}. Received: {_describe(leaf)}") from None
    is_tensor = isinstance(array, tf.Tensor)
    floating = array.dtype.is_floating if is_tensor else array.dtype.kind == "f"
    if floating and not bool(tf.reduce_all(tf.math.is_finite(array))):
        raise ValueError(
            "`hyper_data` holds NaN or infinite numbers. Clean it first: no hyperparameter can be "
            "tuned on a loss that is not finite."
        )
    if not is_tensor and array.dtype == np.float64:
        # As `fit` does with its arrays.
        array = array.astype(keras.config.floatx())
    return array


def _specs(structure: Any) -> dict[str, Any]:
    flat = keras.tree.flatten_with_path(structure) if structure is not None else []
    return {"/".join(map(str, path)): spec for path, spec in flat if hasattr(spec, "shape")}


def _shapes(specs: dict[str, Any]) -> str:
    return ", ".join(f"{key or 'array'}: {spec.shape}" for key, spec in specs.items()) or "none"


def _row_hashes(batch: Any) -> set[bytes]:
    x = keras.utils.unpack_x_y_sample_weight(batch)[0]
    leaves = [leaf for leaf in keras.tree.flatten(x) if isinstance(leaf, tf.Tensor)]
    if not leaves or leaves[0].dtype == tf.string:
        return set()
    return {row.tobytes() for row in leaves[0].numpy()}


def _describe(data: Any) -> str:
    shape = getattr(data, "shape", None)
    if shape is not None:
        return f"{type(data).__name__} of shape {tuple(shape)}"
    if isinstance(data, (tuple, list)):
        return f"{type(data).__name__} of length {len(data)}"
    return f"{data!r}" if isinstance(data, (int, float, str, type(None))) else type(data).__name__
