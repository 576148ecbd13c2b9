"""The reverse loop: walk back through a training run and collect hypergradients.

At every visited step t, with the cotangents (w_bar, s_bar) of the weights and slots after it,

    w_bar', s_bar', g_bar, l_bar = VJP of the update rule at the state before it
    w_bar <- w_bar' + C g_bar                    C: curvature of the step's training loss,
                                                 bounded on a reconstructed path
    s_bar <- s_bar'
    hypergradient of the rule's values += l_bar
    hypergradient of tuned variables   += d <gradient, g_bar> / d tuned

(Maclaurin et al., 2015, algorithm 2; Fu et al., 2016, algorithm 2). The loop is one
`tf.while_loop`; which steps it visits, on which batches, along which path, are tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from keras_drmad import rules
from keras_drmad.batches import Batches, Packed
from keras_drmad.curvature import Curvature, bounded, gauss_newton
from keras_drmad.trajectories import Dense, Path, State, state_at

Tensors = list[tf.Tensor]

CEILING = 0.02  # of the limit, above which Gauss-Newton on a reconstructed path adds no more


class Adjoint(NamedTuple):
    """What the walk carries and collects."""

    weights: Tensors  # cotangents of the weights
    slots: Tensors  # and of the slots, flat
    values: Tensors  # hypergradients of the rule's values, (blocks, *shape) each
    tuned: Tensors  # hypergradients of tuned variables


class Run(NamedTuple):
    """What happened in a training run, as tensors."""

    batches: Packed
    seeds: Tensors  # (batches, *shape) each: seed states before each batch
    rates: tf.Tensor  # (steps,): the scalar learning rate of each step
    values: Tensors  # of each group, (blocks, *shape): the values trained with
    tuned: Tensors  # values of the tuned variables
    iteration: tf.Tensor  # the optimizer's count of updates before the first step (int64)
    horizon: tf.Tensor  # steps that schedules stretch over (int64)


# (weights, slots, gradients, values, learning_rate, t) -> (weights, slots)
Update = Callable[..., tuple[Tensors, list[rules.Slots]]]
Signature = Callable[[], tuple]  # made once for each graph
# (weights, tuned, seeds, batch) -> objectives.Forward
TrainLoss = Callable[[Sequence[tf.Tensor], Sequence[tf.Tensor], Tensors, Any], Any]


@dataclass(eq=False)
class ReverseLoop:
    """The loop's graphs, traced once for one model, optimizer, curvature and form of batch.

    Args:
        loss: The training loss as a pure function.
        update: The update of all variables as a pure function.
        curvature: One of `keras_drmad.curvature`.
        slots: The number of slots of each variable.
        block_of: (position, blocks, horizon) -> the block of a schedule at a step.
        jit_compile: Whether XLA compiles: the whole walk, or each of its steps where the batches
            come in too many shapes.
        plain: What takes over where XLA can't compile; None is to raise.
    """

    loss: TrainLoss
    update: Update
    curvature: Curvature
    slots: Sequence[int]
    block_of: Callable[[tf.Tensor, int, tf.Tensor], tf.Tensor]
    jit_compile: bool = False
    plain: ReverseLoop | None = None

    def __post_init__(self) -> None:
        self.traces = 0
        self.refused = ""  # why XLA can't compile
        self._graphs: dict[Any, Callable] = {}

    def walk(
        self,
        batches: Batches,
        run: Run,
        path: Path | Dense,
        visits: tf.Tensor,
        rows: tf.Tensor,
        begin: int,
        end: int,
        adjoint: Adjoint,
        limit: float = math.inf,
    ) -> tuple[Adjoint, int, float]:
        """Walk back over the visited steps from the one at `begin` to that before `end`.

        Args:
            batches: How to read `run.batches`.
            run: The recorded run.
            path: States over the visited steps.
            visits: (n,) int64, the steps in the order of the walk, the last first.
            rows: (n,) int64, the index of each visited step's batch.
            begin, end: Which of the visits to make. (XLA compiles for every n, not for these.)
            adjoint: What was carried and collected so far.
            limit: The walk ends when the norm of the weights' cotangents is above this or not
                finite. On a reconstructed path Gauss-Newton takes it to a part of this.

        Returns:
            The adjoint before the visited steps, the number of steps walked, and the last norm.
        """

        def signature():
            return (
                _run_spec(run), _path_spec(path), _long(visits), _long(rows), _COUNT, _COUNT,
                _fixed(adjoint), tf.TensorSpec([], tf.float64),
            )  # fmt: skip

        adjoint, at, norm = self._call(
            batches, f"walk {type(path).__name__}", signature, run, path, visits, rows,
            tf.constant(begin), tf.constant(end), adjoint, tf.constant(limit, tf.float64),
        )  # fmt: skip
        return adjoint, int(at) - begin, float(norm)

    def replay(
        self, batches: Batches, run: Run, state: State, first: int, rows: tf.Tensor, steps: int
    ) -> Dense:
        """Recompute the states before some steps and after the last of them.

        Args:
            batches, run: As in `walk`.
            state: The state before step `first`.
            first: The first step to make.
            rows: (n,) int64, the index of the batch of each step from there on.
            steps: How many steps are made, at most n.

        Returns:
            The states: n + 1 of them, those beyond the last step without meaning.
        """
        at = tf.constant(first, tf.int64)

        def signature():
            return (_run_spec(run), _fixed(state), _fixed(at), _long(rows), _COUNT)

        arrays = self._call(
            batches, "forward", signature, run, state, at, rows, tf.constant(steps)
        )  # fmt: skip
        return Dense(at, arrays)

    def _call(self, batches: Batches, name: str, signature: Signature, *args: Any) -> Any:
        if not self.refused:
            try:
                return self._graph(batches, name, signature)(*tf.nest.flatten(args))
            except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
                if not self.jit_compile or "XLA" not in str(error):
                    raise
                if self.plain is None:
                    raise ValueError(
                        "XLA can't compile the reverse pass of this model, as jit_compile=True "
                        "asks. Pass jit_compile='auto' or False. It says: " + str(error)
                    ) from error
                self.refused = str(error)
        assert self.plain is not None
        return self.plain._call(batches, name, signature, *args)

    def _graph(self, batches: Batches, name: str, signature: Signature) -> Callable:
        """The graph of one form of batch; lengths may change from run to run without a trace."""
        key = (name, batches.signature)
        if key not in self._graphs:
            body: Callable = self._forward if name == "forward" else self._walk
            specs = signature()

            # A hundred tensors are passed. Flat, to one trace, they take a fraction of the time.
            def traced(*flat):
                self.traces += name != "forward"
                return body(batches.apply, *tf.nest.pack_sequence_as(specs, flat))

            self._graphs[key] = tf.function(
                traced,
                input_signature=tf.nest.flatten(specs),
                autograph=False,
                jit_compile=self.jit_compile and batches.stacked,
            ).get_concrete_function()
        return self._graphs[key]

    # Inside the graph ----------------------------------------------------------------------------

    def _split(self, state: State) -> tuple[Tensors, list[rules.Slots]]:
        return split(state, self.slots)

    def _at_step(self, run: Run, t: tf.Tensor, row: tf.Tensor):
        """What step t was made with: seeds, values, learning rate, number of the update."""
        seeds = [tf.gather(seed, row) for seed in run.seeds]
        at = [self.block_of(t, array.shape[0], run.horizon) for array in run.values]
        values = [tf.gather(array, i) for array, i in zip(run.values, at, strict=True)]
        return seeds, at, values, tf.gather(run.rates, t), run.iteration + t + 1

    def _walk(self, apply, run, path, visits, rows, begin, end, adjoint, limit):
        # Stable runs hardly ever grow at all (docs/fidelity.md).
        ceiling = CEILING * limit if isinstance(path, Path) else None

        def body(i, norm, adjoint):
            t, row = tf.gather(visits, i), tf.gather(rows, i)
            seeds, at, values, rate, count = self._at_step(run, t, row)
            state = state_at(path, t)

            def step(batch):
                return self._compiled(self._step)(
                    state, adjoint.weights, adjoint.slots, values, run.tuned, seeds, batch, rate,
                    count, ceiling,
                )  # fmt: skip

            new, l_bar, h_bar = apply(run.batches, row, step)
            n = len(adjoint.weights)
            norm = tf.cast(tf.linalg.global_norm(new[:n]), tf.float64)
            collected = [
                _add_at(total, block, part)
                for total, block, part in zip(adjoint.values, at, l_bar, strict=True)
            ]
            tuned = [a + b for a, b in zip(adjoint.tuned, h_bar, strict=True)]
            return i + 1, norm, Adjoint(new[:n], new[n:], collected, tuned)

        at, norm, adjoint = tf.while_loop(
            lambda i, norm, _: tf.logical_and(
                i < end, tf.logical_and(norm <= limit, tf.math.is_finite(norm))
            ),
            body,
            (begin, tf.constant(0.0, tf.float64), adjoint),
            parallel_iterations=1,
        )
        return adjoint, at, norm

    def _compiled(self, function: Callable) -> Callable:
        if not self.jit_compile:
            return function
        return tf.function(function, jit_compile=True, autograph=False)

    def _step(self, state, w_bar, s_bar, values, tuned, seeds, batch, rate, count, ceiling):
        """One step back: the new cotangents of the state, of the values, of tuned variables.

        With a ceiling, the state is a guess, and curvature that no training could have met is cut.
        """
        weights, slots = self._split(state)
        gradient, product = self.curvature(
            lambda w, h: self.loss(w, h, seeds, batch), weights, tuned
        )
        used = [i for i, g in enumerate(gradient) if g is not None]
        given = [gradient[i] for i in used]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([weights, slots, given, values])
            new_weights, new_slots = self.update(weights, slots, gradient, values, rate, count)
            after = [*new_weights, *(s for of_one in new_slots for s in of_one)]
        sources = [*state, *given, *values]
        bars = tape.gradient(after, sources, [*w_bar, *s_bar], unconnected_gradients="zero")
        n, m = len(state), len(state) + len(given)
        new, g_bar, l_bar = bars[:n], bars[n:m], bars[m:]
        direction = [tf.zeros_like(w) for w in weights]
        for i, bar in zip(used, g_bar, strict=True):
            direction[i] = bar
        curved, h_bar = product(direction)
        if ceiling is not None and self.curvature is gauss_newton:
            curved = bounded(new[: len(weights)], curved, ceiling)
        new = [new[i] + curved[i] if i < len(weights) else new[i] for i in range(n)]
        return new, l_bar, h_bar

    def _forward(self, apply, run, state, first, rows, steps):
        arrays = [
            tf.TensorArray(x.dtype, tf.shape(rows)[0] + 1, element_shape=x.shape).write(0, x)
            for x in state
        ]

        def body(i, state, arrays):
            t, row = first + tf.cast(i, tf.int64), tf.gather(rows, i)
            seeds, _, values, rate, count = self._at_step(run, t, row)
            state = apply(
                run.batches,
                row,
                lambda batch: self._compiled(self._training_step)(
                    state, values, run.tuned, seeds, batch, rate, count
                ),
            )
            written = [a.write(i + 1, x) for a, x in zip(arrays, state, strict=True)]
            return i + 1, state, written

        _, _, arrays = tf.while_loop(
            lambda i, *_: i < steps,
            body,
            (tf.constant(0), state, arrays),
            parallel_iterations=1,
        )
        return [array.stack() for array in arrays]

    def _training_step(self, state, values, tuned, seeds, batch, rate, count):
        weights, slots = self._split(state)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            loss = self.loss(weights, tuned, seeds, batch).loss
        gradients = tape.gradient(loss, weights)
        gradients = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        weights, slots = self.update(weights, slots, gradients, values, rate, count)
        return [*weights, *(s for of_one in slots for s in of_one)]


def split(state: State, slots: Sequence[int]) -> tuple[Tensors, list[rules.Slots]]:
    """A flat state as the weights and, of each weight, the slots."""
    weights, rest = list(state[: len(slots)]), list(state[len(slots) :])
    grouped: list[rules.Slots] = []
    for count in slots:
        grouped.append(tuple(rest[:count]))
        del rest[:count]
    return weights, grouped


def _add_at(total: tf.Tensor, block: tf.Tensor, part: tf.Tensor) -> tf.Tensor:
    if total.shape[0] == 1:
        return total + part[None]
    return tf.tensor_scatter_nd_add(total, block[None, None], part[None])


_COUNT = tf.TensorSpec([], tf.int32)


def _fixed(tree: Any) -> Any:
    return tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), tree)


def _long(tree: Any) -> Any:
    """Specs for tensors whose first dimension counts steps, batches or anchors: it may change."""
    return tf.nest.map_structure(lambda x: tf.TensorSpec([None, *x.shape[1:]], x.dtype), tree)


def _path_spec(path: Path | Dense) -> Path | Dense:
    if isinstance(path, Dense):
        return Dense(_fixed(path.first), _long(path.arrays))
    return _long(path)


def _run_spec(run: Run) -> Run:
    return Run(
        _long(run.batches), _long(run.seeds), _long(run.rates), _fixed(run.values),
        _fixed(run.tuned), _fixed(run.iteration), _fixed(run.horizon),
    )  # fmt: skip
