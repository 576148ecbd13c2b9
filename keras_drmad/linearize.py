"""Partial evaluation: what a function needs of its later arguments, and what can be done before.

Walking back over a replayed step needs what recomputing that step has worked out already: its
activations, its gradient. `linearize` traces the whole step back, with the cotangents as its later
arguments, and cuts the graph in two: what no cotangent reaches is computed while going forward,
and the tensors that cross the cut are saved. (JAX calls this linearization by partial evaluation.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_drmad import graphs

Tensors = list[tf.Tensor]

# What is worked out again from what is saved, rather than saved as well: one cheap pass each,
# which XLA fuses into the operation that reads it.
_CHEAP = frozenset(
    "Add AddV2 Sub Mul Neg Square Cast Reshape Squeeze ExpandDims Transpose Identity BroadcastTo "
    "ZerosLike OnesLike Greater GreaterEqual Less LessEqual Equal Select SelectV2 Relu Maximum "
    "Minimum Sign StopGradient PreventGradient Fill TanhGrad SigmoidGrad ReluGrad "
    "MatrixTranspose RealDiv Shape".split()
)


class Linearized(NamedTuple):
    """A function in two parts.

    `early(first, given)` returns (saved, now); `late(saved, given, last)` returns what is left.
    """

    saved: list[tf.TensorSpec]
    early: Callable[[Any, Any], tuple[Tensors, Any]]
    late: Callable[[Tensors, Any, Any], Any]

    @property
    def nbytes(self) -> int:
        """Bytes of what is saved."""
        return sum(spec.dtype.size * spec.shape.num_elements() for spec in self.saved)


def linearize(function: Callable, first: Any, given: Any, last: Any) -> Linearized | None:
    """Cut `function(first, given, last) -> (now, later)` where `last` comes in.

    Args:
        function: A function of tensors in nested structures, without side effects. `now` does not
            depend on `last`.
        first, given, last: Specs of its arguments, all shapes known. `given` is at hand in both
            parts.

    Returns:
        The two parts; None where what crosses the cut can't be kept (the lists of a loop, an
        unknown shape).
    """
    structure: list[Any] = []
    specs = tf.nest.flatten([first, given, last])

    def flat(*args):
        now, later = function(*tf.nest.pack_sequence_as([first, given, last], args))
        structure[:] = [now, later]
        return [tf.identity(x) for x in tf.nest.flatten([now, later])]

    graph = tf.function(flat, autograph=False).get_concrete_function(*specs).graph
    now, later = structure
    outputs = [t.op.inputs[0] for t in graph.outputs]
    counts = [len(tf.nest.flatten(part)) for part in (first, given, last)]
    inputs = list(graph.inputs)
    starts, givens = inputs[: counts[0]], inputs[counts[0] : counts[0] + counts[1]]
    lasts = inputs[sum(counts[:2]) : sum(counts)]
    split = len(tf.nest.flatten(now))
    at_once, at_last = outputs[:split], outputs[split:]
    saved = _Cut(graph, starts, lasts, at_last).saved
    if not all(_keepable(t) for t in saved):
        return None
    # What the function reads of the model (moving statistics, say) is read where it is used.
    outside = {inner.name: outer for outer, inner in graph.captures}

    def early(first: Any, given: Any) -> tuple[Tensors, Any]:
        known = outside | _named(starts, first) | _named(givens, given)
        found = _evaluate(graph, known, [*saved, *at_once])
        return found[: len(saved)], tf.nest.pack_sequence_as(now, found[len(saved) :])

    def late(kept: Tensors, given: Any, last: Any) -> Any:
        known = outside | _named(givens, given) | _named(lasts, last) | _named(saved, kept)
        return tf.nest.pack_sequence_as(later, _evaluate(graph, known, at_last))

    return Linearized([tf.TensorSpec(t.shape, t.dtype) for t in saved], early, late)


class _Cut:
    """Which tensors cross from the early part to the late one, as few as will do."""

    def __init__(self, graph, starts: Tensors, lasts: Tensors, outputs: Tensors):
        self._after_start = graphs.reached(graph, starts)
        after_last = graphs.reached(graph, lasts)
        between = after_last & graphs.needed(outputs)
        late = [op for op in graph.get_operations() if op in between]
        crossing: dict[str, tf.Tensor] = {}
        for tensor in (*outputs, *(t for op in late for t in op.inputs)):
            if tensor.op not in after_last and tensor.op in self._after_start:
                crossing.setdefault(tensor.name, tensor)
        # The widest are most worth going without.
        for name in sorted(crossing, key=lambda name: _size(crossing[name]), reverse=True):
            others = crossing.keys() - {name}
            if self._derivable(crossing[name], others, 8):
                del crossing[name]
        self.saved = list(crossing.values())

    def _derivable(self, tensor: tf.Tensor, saved: Iterable[str], depth: int) -> bool:
        op = tensor.op
        if op not in self._after_start:
            return True
        if op.type not in _CHEAP or depth == 0:
            return False
        return all(t.name in saved or self._derivable(t, saved, depth - 1) for t in op.inputs)


def _size(tensor: tf.Tensor) -> int:
    return (tensor.shape.num_elements() or 0) * tensor.dtype.size


def _keepable(tensor: tf.Tensor) -> bool:
    plain = tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool
    return plain and tensor.shape.is_fully_defined()


def _named(tensors: Tensors, values: Any) -> dict[str, tf.Tensor]:
    return {t.name: x for t, x in zip(tensors, tf.nest.flatten(values), strict=True)}


def _evaluate(graph, known: dict[str, tf.Tensor], wanted: Tensors) -> Tensors:
    """Build in the present graph what is wanted of another one, from what is known of it."""
    here = tf.compat.v1.get_default_graph()
    nodes: set[str] = set()
    used: dict[str, tf.Tensor] = {}  # what the nodes read
    waiting = [t for t in wanted if t.name not in known]
    asked = [t.name for t in waiting]
    while waiting:
        op = waiting.pop().op
        if op.name in nodes:
            continue
        nodes.add(op.name)
        for tensor in op.inputs:
            if tensor.name in known:
                used[tensor.name] = here.capture(known[tensor.name])
            else:
                waiting.append(tensor)
    whole = graph.as_graph_def()
    part = tf.compat.v1.GraphDef(versions=whole.versions, library=whole.library)
    for node in whole.node:
        if node.name in nodes:
            part.node.add().CopyFrom(node)
            kept = [name for name in node.input if not name.startswith("^")]
            part.node[-1].ClearField("input")
            part.node[-1].input.extend(kept)
            part.node[-1].attr.pop("_class", None)  # it may name what is left out
    found = iter(
        tf.import_graph_def(part, input_map=used, return_elements=asked, name="") if asked else ()
    )
    return [known[t.name] if t.name in known else next(found) for t in wanted]
