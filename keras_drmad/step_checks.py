"""What a training step does by the side, found in its graph: what the reverse pass can't follow.

The reverse pass makes steps again at weights that it passes in. A step that reads a weight in
another way would be made at the model's present ones, one that assigns would do so once more, and
what stands still in a step by a stopped gradient moves in training. None of this raises an error
by itself, so that hypergradients would be silently wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_drmad import graphs, pooling
from keras_drmad.normalization import exact_moments
from keras_drmad.objectives import TrainingLoss
from keras_drmad.optimizers import Optimizer
from keras_drmad.steps import Given, Steps
from keras_drmad.trajectories import State

_STOPPING = ("StopGradient", "PyFunc", "PyFuncStateless")  # functions of NumPy have no gradient
# Where it would be zero: the largest exponent, taken out of a sum of exponentials, cancels.
_HARMLESS = ("ReduceLogSumExp", pooling.MASK)


@dataclass(frozen=True)
class Step:
    """A training step, traced but not run.

    Args:
        graph: Its graph: weights are its first inputs, and the outputs are the state after it.
        weights: How many weights there are.
        passed: The variables in whose place tensors are passed in.
    """

    graph: tf.Graph
    weights: int
    passed: Sequence[keras.Variable]

    @functools.cached_property
    def _needed(self) -> set[tf.Operation]:
        return graphs.needed(self.graph.outputs)

    @property
    def still(self) -> list[tf.Variable]:
        """Weights that the step leaves as they are: they have no gradient."""
        starts, ends = (x[: self.weights] for x in (self.graph.inputs, self.graph.outputs))
        pairs = zip(self.passed[: self.weights], starts, ends, strict=True)
        return [v._value for v, start, end in pairs if _same(start, end)]

    @property
    def read(self) -> list[tf.Variable]:
        """Variables that the state after the step depends on, beside what is passed in."""
        inner = {id(outer): placeholder for outer, placeholder in self.graph.captures}
        return [
            v for v in self.graph.variables
            if id(v.handle) in inner and inner[id(v.handle)].op in self._needed
        ]  # fmt: skip

    def stopped(self) -> list[str]:
        """Names of operations that stop the gradient of what depends on the weights."""
        between = self._needed & graphs.reached(self.graph, self.graph.inputs[: self.weights])
        return sorted(
            name
            for name, kind in graphs.nodes(self.graph, between)
            if kind in _STOPPING and not any(harmless in name for harmless in _HARMLESS)
        )


def _same(start: tf.Tensor, end: tf.Tensor) -> bool:
    while end is not start and end.op.type == "Identity":
        end = end.op.inputs[0]
    return end is start


def trace(
    loss: TrainingLoss, steps: Steps, optimizer: Optimizer, state: State, batch: Any
) -> Step:  # fmt: skip
    """A training step as the reverse pass makes it again.

    Args:
        loss: The loss of a built model.
        steps: The steps of it.
        optimizer: Its built optimizer.
        state: A state of the run.
        batch: The element spec of a batch.
    """
    given = Given(
        keras.tree.map_structure(lambda x: None if isinstance(x, tf.OptionalSpec) else x, batch),
        [tf.TensorSpec(v.shape[1:], v.dtype) for v in optimizer.values()],
        [tf.TensorSpec(v.shape, v.dtype) for v in loss.tuned],
        [tf.TensorSpec(v.shape, v.dtype) for v in loss.seeds],
        tf.TensorSpec([], optimizer.fixed_learning_rate().dtype),
        tf.TensorSpec([], tf.int64),
    )
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in state]
    with exact_moments():  # TensorFlow's own moments stop a gradient
        traced = tf.function(steps.forward, autograph=False).get_concrete_function(specs, given)
    passed = [*loss.weights, *loss.averages, *loss.tuned, *loss.seeds]
    return Step(traced.graph, len(loss.weights), passed)


def check_reads(step: Step) -> None:
    """Refuse a step that reads a variable past the tensor that is passed in its place.

    Raises:
        ValueError: naming the variable.
    """
    read = {id(outer) for outer, _ in step.graph.captures}  # to no effect even
    for variable in step.passed:
        if id(variable._value.handle) in read:
            raise ValueError(
                f"{variable.path} is read in a way that the reverse pass can't follow, which makes "
                "steps again at other values: by a function that is decorated with tf.function, "
                "by tf.recompute_grad or keras.remat, or (a tuned variable) by the optimizer, in a "
                "constraint. Leave that out: `fit` compiles the whole training step anyway."
            )


def check_assignments(step: Step) -> None:
    """Refuse a step that assigns to a variable of TensorFlow.

    Raises:
        ValueError: naming the operation, in the scope of its layer.
    """
    every = graphs.nodes(step.graph, step.graph.get_operations())
    found = [name for name, kind in every if kind.startswith(("Assign", "ResourceScatter"))]
    if found:
        raise ValueError(
            f"A training step assigns to a tf.Variable ({found[0]}), and so would each step of the "
            "reverse pass. Make it by `self.add_weight(..., trainable=False)` or as a "
            "keras.Variable, which the reverse pass leaves alone."
        )


def check_rate(rate: Callable[[], tf.Tensor], tuned: Sequence[keras.Variable]) -> None:
    """Refuse a tuned variable that a learning-rate schedule reads.

    Raises:
        ValueError: naming the variable.
    """
    if not tuned:
        return
    graph = tf.function(rate, autograph=False).get_concrete_function().graph
    handles = {id(outer) for outer, _ in graph.captures}
    for variable in tuned:
        if id(variable._value.handle) in handles:
            raise ValueError(
                f"{variable.path} in `variables` is read by the optimizer's learning-rate "
                "schedule, through which it is not differentiated. Tune the learning rate itself: "
                "learning_rate=keras_drmad.Hyperparameter(0.01, over='step')."
            )


def doubts(step: Step) -> str:
    """What to warn of; empty if there is nothing."""
    found = step.stopped()
    if not found:
        return ""
    return (
        "The training step stops the gradient of what depends on the weights "
        f"({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}). The reverse pass takes that "
        "for constant, while training moves it, so hypergradients may be off; "
        "keras_drmad.verify_hypergradients compares a few of them with finite differences."
    )


def fingerprints(variables: Sequence[tf.Variable]) -> dict[Any, tf.Tensor]:
    """Of each variable, by its reference, two numbers that tell whether it has changed."""

    def one(variable: tf.Variable) -> tf.Tensor:
        if not (variable.dtype.is_floating or variable.dtype.is_integer):
            return tf.zeros([2], tf.float64)
        x = tf.cast(variable.read_value(), tf.float64)
        return tf.stack([tf.reduce_sum(x), tf.reduce_sum(x * x)])

    return {variable.ref(): one(variable) for variable in variables}
