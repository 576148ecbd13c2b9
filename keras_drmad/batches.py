"""The batches of a run, packed into tensors from which a graph takes any one of them.

Batches may differ in size and even in every dimension (a smaller last batch, padded sequences):
each component is kept flat, with the shape of each batch beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf


class Packed(NamedTuple):
    """One component (say, the images) of many batches."""

    flat: tf.Tensor  # (entries of all batches,)
    starts: tf.Tensor  # (batches + 1,) int64
    shapes: tf.Tensor  # (batches, rank) int64


class Batches(NamedTuple):
    """Many batches: tensors to pass to a graph, and the function that reads them in it."""

    components: list[Packed]
    take: Callable[[list[Packed], tf.Tensor], Any]  # (components, index) -> batch
    signature: Any  # equal for batches that one trace can serve


def pack(batches: list[Any]) -> Batches:
    """Pack a list of batches of one structure (nested tuples, dictionaries, None, ragged)."""
    # tf.nest alone takes structures apart and puts them together: others order dictionaries
    # differently.
    structure = tf.nest.map_structure(_placeholder, batches[0])
    leaves = [_leaves(batch) for batch in batches]
    batches.clear()
    statics = []
    components = []
    for i in reversed(range(len(leaves[0]))):
        # Component by component, letting go of what has been copied.
        column = [row.pop(i) for row in leaves]
        statics.append(_common_shape(column))
        shapes = tf.stack([tf.shape(leaf, tf.int64) for leaf in column])
        sizes = tf.reduce_prod(shapes, axis=1)
        starts = tf.concat([[tf.constant(0, tf.int64)], tf.cumsum(sizes)], 0)
        components.append(
            Packed(tf.concat([tf.reshape(x, [-1]) for x in column], 0), starts, shapes)
        )
    statics.reverse()
    components.reverse()
    places = tf.nest.flatten(structure, expand_composites=True)

    def take(components: list[Packed], index: tf.Tensor) -> Any:
        taken = []
        for packed, static in zip(components, statics, strict=True):
            start = packed.starts[index]
            flat = tf.slice(packed.flat, start[None], (packed.starts[index + 1] - start)[None])
            leaf = tf.reshape(flat, packed.shapes[index])
            leaf.set_shape(static)
            taken.append(leaf)
        rest = iter(taken)
        leaves = [None if place is None else next(rest) for place in places]
        return tf.nest.pack_sequence_as(structure, leaves, expand_composites=True)

    dtypes = tuple(packed.flat.dtype for packed in components)
    kinds = repr(tf.nest.map_structure(lambda place: type(place).__name__, structure))
    return Batches(components, take, (kinds, dtypes, tuple(map(tuple, statics))))


def size_of(batches: Batches) -> int:
    """Bytes of packed batches."""
    return sum(nbytes(packed.flat) for packed in batches.components)


def nbytes(batch: Any) -> int:
    """Bytes of a batch or a tensor."""
    return sum(leaf.dtype.size * leaf.shape.num_elements() for leaf in _leaves(batch))


def _leaves(batch: Any) -> list[tf.Tensor]:
    found = tf.nest.flatten(batch, expand_composites=True)
    return [leaf for leaf in found if leaf is not None]


def _placeholder(leaf: Any) -> Any:
    """What stands for a leaf in the structure: nothing, a tensor, or the kind of a composite."""
    if leaf is None or isinstance(leaf, tf.Tensor):
        return None if leaf is None else tf.TensorSpec(None, leaf.dtype)
    spec = tf.type_spec_from_value(leaf)
    # Other batches may have another size.
    open_shape = [None, *leaf.shape[1:]]
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(open_shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensorSpec(open_shape, spec.dtype)
    return spec


def _common_shape(leaves: list[tf.Tensor]) -> list[int | None]:
    first, *others = {tuple(leaf.shape) for leaf in leaves}
    return [
        size if all(other[axis] == size for other in others) else None
        for axis, size in enumerate(first)
    ]
