"""What depends on what in a graph of TensorFlow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf


def reached(graph: tf.Graph, tensors: Iterable[tf.Tensor]) -> set[tf.Operation]:
    """The operations on which some tensors have an influence."""
    found = {t.op for t in tensors}
    for op in graph.get_operations():  # in the order of their making: inputs come first
        if any(t.op in found for t in op.inputs):
            found.add(op)
    return found


def needed(tensors: Iterable[tf.Tensor]) -> set[tf.Operation]:
    """The operations that some tensors are computed from, their own included."""
    found: set[tf.Operation] = set()
    waiting = [t.op for t in tensors]
    while waiting:
        op = waiting.pop()
        if op not in found:
            found.add(op)
            waiting += [t.op for t in op.inputs]
    return found


def nodes(graph: tf.Graph, ops: Iterable[tf.Operation]) -> Iterator[tuple[str, str]]:
    """Name and type of some operations, and of those in the functions that they call."""
    library = {f.signature.name: f for f in graph.as_graph_def().library.function}
    waiting: list[str] = []
    for op in ops:
        yield op.name, op.type
        waiting += _called(op.node_def)
    done: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in done or name not in library:
            continue
        done.add(name)
        for node in library[name].node_def:
            yield node.name, node.op
            waiting += _called(node)


def _called(node: Any) -> list[str]:
    return [
        function.name
        for attribute in node.attr.values()
        for function in [attribute.func, *attribute.list.func]
        if function.name
    ]
