"""The batches of a run, packed into tensors from which a graph takes any one of them.

Batches of the same shapes are stacked. Most runs have one or two kinds (a smaller last batch); a
graph then holds the step once for each kind, with all shapes known, as XLA needs them. Where there
are more (sentences padded batch by batch) each component is kept flat, with the shape of each
batch beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

KINDS = 3  # more kinds of shapes than these are kept flat


class Stacked(NamedTuple):
    """Batches of one kind: of each component, (batches, *shape)."""

    components: list[tf.Tensor]


class Flat(NamedTuple):
    """One component (say, the images) of many batches."""

    flat: tf.Tensor  # (entries of all batches,)
    starts: tf.Tensor  # (batches + 1,) int64
    shapes: tf.Tensor  # (batches, rank) int64


class Packed(NamedTuple):
    """Batches, as tensors to pass to a graph."""

    kinds: list[Stacked]
    kind: tf.Tensor  # (batches,) int32: of which kind each is,
    place: tf.Tensor  # (batches,) int32: and where it lies among those
    flat: list[Flat]  # of each component, where there are too many kinds


class Batches(NamedTuple):
    """Batches, and how a graph reads them."""

    packed: Packed
    # (packed, index, function of a batch) -> what the function returns, tensors.
    apply: Callable[[Packed, tf.Tensor, Callable[[Any], Any]], Any]
    signature: Any  # equal for batches that one trace can serve
    kinds: list[list[tf.TensorSpec]]  # of each kind the leaves of a batch; none where kept flat
    batch_of: Callable[[Sequence[tf.Tensor]], Any]  # the batch of its leaves

    @property
    def stacked(self) -> bool:
        """Whether all shapes are known in the graph."""
        return bool(self.kinds)


def pack(batches: list[Any]) -> Batches:
    """Pack a list of batches of one structure (nested tuples, dictionaries, None, ragged).

    The list is emptied: nothing is held twice.
    """
    # tf.nest alone takes structures apart and puts them together: others order dictionaries
    # differently.
    structure = tf.nest.map_structure(_placeholder, batches[0])
    places = tf.nest.flatten(structure, expand_composites=True)
    leaves = [leaves_of(batch) for batch in batches]
    batches.clear()

    def batch_of(taken: Sequence[tf.Tensor]) -> Any:
        rest = iter(taken)
        filled = [None if place is None else next(rest) for place in places]
        return tf.nest.pack_sequence_as(structure, filled, expand_composites=True)

    dtypes = tuple(leaf.dtype for leaf in leaves[0])
    names = repr(tf.nest.map_structure(lambda place: type(place).__name__, structure))
    shapes = [tuple(tuple(leaf.shape) for leaf in row) for row in leaves]
    kinds = sorted(set(shapes))
    if len(kinds) > KINDS:
        packed, apply, form = _flat(leaves, batch_of)
        return Batches(packed, apply, (names, dtypes, form), [], batch_of)
    packed, apply, form = _stacked(leaves, shapes, kinds, batch_of)
    specs = [[tf.TensorSpec(*leaf) for leaf in zip(kind, dtypes, strict=True)] for kind in kinds]
    return Batches(packed, apply, (names, dtypes, form), specs, batch_of)


def _stacked(leaves, shapes, kinds, batch_of):
    rows: list[list] = [[] for _ in kinds]
    kind, place = [], []
    for row, shape in zip(leaves, shapes, strict=True):
        kind.append(kinds.index(shape))
        place.append(len(rows[kind[-1]]))
        rows[kind[-1]].append(row)
    last_first = range(len(kinds[0]))[::-1]
    stacks = [Stacked([tf.stack(_column(of, i)) for i in last_first][::-1]) for of in rows]
    packed = Packed(stacks, tf.constant(kind), tf.constant(place), [])

    def apply(packed: Packed, index: tf.Tensor, function: Callable[[Any], Any]) -> Any:
        # Gathered, not sliced: XLA would compile for every value that an index is sliced from.
        place = tf.gather(packed.place, index)

        def of(stack: Stacked) -> Callable[[], Any]:
            return lambda: function(batch_of([tf.gather(x, place) for x in stack.components]))

        branches = [of(stack) for stack in packed.kinds]
        if len(branches) == 1:
            return branches[0]()
        return tf.switch_case(tf.gather(packed.kind, index), branches)

    return packed, apply, tuple(kinds)


def _flat(leaves, batch_of):
    statics, components = [], []
    for i in reversed(range(len(leaves[0]))):
        column = _column(leaves, i)
        statics.append(_common_shape(column))
        shapes = tf.stack([tf.shape(leaf, tf.int64) for leaf in column])
        sizes = tf.reduce_prod(shapes, axis=1)
        starts = tf.concat([[tf.constant(0, tf.int64)], tf.cumsum(sizes)], 0)
        components.append(Flat(tf.concat([tf.reshape(x, [-1]) for x in column], 0), starts, shapes))
    statics.reverse()
    none = tf.zeros([0], tf.int32)
    packed = Packed([], none, none, components[::-1])

    def apply(packed: Packed, index: tf.Tensor, function: Callable[[Any], Any]) -> Any:
        taken = []
        for part, static in zip(packed.flat, statics, strict=True):
            start = part.starts[index]
            flat = tf.slice(part.flat, start[None], (part.starts[index + 1] - start)[None])
            leaf = tf.reshape(flat, part.shapes[index])
            leaf.set_shape(static)
            taken.append(leaf)
        return function(batch_of(taken))

    return packed, apply, ("flat", *map(tuple, statics))


def _column(rows: list[list[tf.Tensor]], i: int) -> list[tf.Tensor]:
    """One component of all batches, which is let go of where it was: ask for the last first."""
    return [row.pop(i) for row in rows]


def size_of(batches: Batches) -> int:
    """Bytes of packed batches."""
    return sum(nbytes(x) for x in tf.nest.flatten(batches.packed))


def nbytes(batch: Any) -> int:
    """Bytes of a batch or a tensor."""
    return sum(leaf.dtype.size * leaf.shape.num_elements() for leaf in leaves_of(batch))


def leaves_of(batch: Any) -> list[tf.Tensor]:
    """The tensors of a batch, without what is None."""
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
