"""The reverse loop: walk back through a training run and collect hypergradients.

At every visited step the cotangents are taken back over it (`steps`), and what the step gives is
added up. The loop is a `tf.while_loop`; which steps it visits, on which batches, along which path,
are tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from keras_drmad.batches import Batches
from keras_drmad.halves import Halves
from keras_drmad.steps import Run, Steps, Tensors, given_spec
from keras_drmad.sums import total
from keras_drmad.trajectories import Anchors, Dense, Path, State, state_at

CEILING = 0.02  # of the limit, above which Gauss-Newton on a reconstructed path adds no more
# Visited steps from one look at the adjoint's norm to the next. On an exact path nothing but
# numbers that are not finite ends a walk, and these stay so.
CHECK_EVERY, CHECK_EXACT_EVERY = 8, 64


class Adjoint(NamedTuple):
    """What the walk carries and collects."""

    weights: Tensors  # cotangents of the weights
    slots: Tensors  # and of the slots, flat, and of moving averages
    values: Tensors  # hypergradients of the rule's values, (blocks, *shape) each
    tuned: Tensors  # hypergradients of tuned variables


class Walked(NamedTuple):
    """Where a walk came."""

    adjoint: Adjoint  # before the visited steps
    steps: int  # that were walked
    norm: float  # of the weights' cotangents
    # How far, as a part of the way, what was recomputed ended from where training had been:
    # stretches between anchors, or single steps where every state is kept.
    missed: float


Signature = Callable[[], tuple]  # made once for each graph


class Anchor(NamedTuple):
    """A step, and the state before it."""

    time: tf.Tensor
    state: State


@dataclass(eq=False)
class ReverseLoop:
    """The loop's graphs, traced once for one model, optimizer, curvature and form of batch.

    Args:
        steps: The steps, as pure functions.
        jit_compile: Whether XLA compiles: the whole walk, or each of its steps where the batches
            come in too many shapes.
        plain: What takes over where XLA can't compile; None is to raise.
    """

    steps: Steps
    jit_compile: bool = False
    plain: ReverseLoop | None = None

    def __post_init__(self) -> None:
        self.traces = 0
        self.refused = ""  # why XLA can't compile
        self._graphs: dict[Any, Callable] = {}
        self._halves: list[Halves] = []  # a Python function in them lives as long as their graphs

    @property
    def halved(self) -> bool:
        """Whether replayed steps were cut in halves."""
        return bool(self._halves)

    def walk(
        self,
        batches: Batches,
        run: Run,
        path: Path | Dense | Anchors,
        visits: tf.Tensor,
        rows: tf.Tensor,
        begin: int,
        end: int,
        adjoint: Adjoint,
        limit: float = math.inf,
        again: tf.Tensor | None = None,
        room: int = 0,
    ) -> Walked:
        """Walk back over the visited steps from the one at `begin` to that before `end`.

        Args:
            batches: How to read `run.batches`.
            run: The recorded run.
            path: States over the visited steps; or the one from which they are recomputed.
            visits: (n,) int64, the steps in the order of the walk, the last first.
            rows: (n,) int64, the index of each visited step's batch.
            begin, end: Which of the visits to make. (XLA compiles for every n, not for these.)
            adjoint: What was carried and collected so far.
            limit: The walk ends when the norm of the weights' cotangents is above this or not
                finite. On a reconstructed path Gauss-Newton takes it to a part of this.
            again: With `Anchors`, (steps,) int64: the index of the batch of each step of the run.
            room: With `Anchors`, how many steps lie between two of them at most.

        Returns:
            Where it came.
        """
        again = tf.zeros([0], tf.int64) if again is None else again

        def signature():
            return (
                _run_spec(run), _path_spec(path), _long(again), _long(visits), _long(rows),
                _COUNT, _COUNT, _fixed(adjoint), tf.TensorSpec([], tf.float64), _ROOM,
            )  # fmt: skip

        adjoint, at, norm, missed = self._call(
            batches, f"walk {type(path).__name__}", signature, run, path, again, visits, rows,
            tf.constant(begin), tf.constant(end), adjoint, tf.constant(limit, tf.float64),
            tf.zeros([room], tf.bool),
        )  # fmt: skip
        return Walked(adjoint, int(at) - begin, float(norm), float(missed))

    def recompute(
        self, batches: Batches, run: Run, first: int, state: State, again: tf.Tensor, steps: int
    ) -> Dense:
        """Recompute the states before some steps and after the last of them.

        Args:
            batches, run, again: As in `walk`.
            first, state: The first step, and the state before it.
            steps: How many steps are made.

        Returns:
            The states before the steps and after the last.
        """
        at = tf.constant(first, tf.int64)

        def signature():
            return (_run_spec(run), _fixed(at), _fixed(state), _long(again), _COUNT, _ROOM)

        arrays = self._call(
            batches, "forward", signature, run, at, state, again, tf.constant(steps),
            tf.zeros([steps], tf.bool),
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
            body: Callable = self._states if name == "forward" else self._walk
            specs = signature()

            # A hundred tensors are passed. Flat, to one trace, they take a fraction of the time.
            def traced(*flat):
                self.traces += name != "forward"
                return body(batches, *tf.nest.pack_sequence_as(specs, flat))

            self._graphs[key] = tf.function(
                traced,
                input_signature=tf.nest.flatten(specs),
                autograph=False,
                jit_compile=self.jit_compile and batches.stacked,
            ).get_concrete_function()
        return self._graphs[key]

    # Inside the graph ----------------------------------------------------------------------------

    def _walk(
        self, batches, run, path, again, visits, rows, begin, end, adjoint, limit, room
    ):  # fmt: skip
        every = CHECK_EVERY if isinstance(path, Path) else CHECK_EXACT_EVERY

        def walk_down(stop, back, i, norm, missed, adjoint):
            """Walk while the visited steps are not before `stop`."""

            def body(i, missed, adjoint):
                t, row = tf.gather(visits, i), tf.gather(rows, i)
                (new, l_bar, h_bar), far = back(t, row, [*adjoint.weights, *adjoint.slots])
                n = len(adjoint.weights)
                collected = [
                    _add_at(so_far, self.steps.block_of(t, so_far.shape[0], run.horizon), part)
                    for so_far, part in zip(adjoint.values, l_bar, strict=True)
                ]
                tuned = [a + b for a, b in zip(adjoint.tuned, h_bar, strict=True)]
                missed = tf.maximum(missed, far)
                return i + 1, missed, Adjoint(new[:n], new[n:], collected, tuned)

            def some(i, norm, missed, adjoint):
                # A norm takes as long as a tenth of a small net's step: not at each of them.
                pause = tf.minimum(end, i + every)
                i, missed, adjoint = tf.while_loop(
                    lambda i, *_: tf.logical_and(i < pause, at_least(i, stop)),
                    body,
                    (i, missed, adjoint),
                    parallel_iterations=1,
                )
                return i, _norm(adjoint.weights), missed, adjoint

            return tf.while_loop(
                lambda i, norm, *_: tf.logical_and(goes_on(i, norm), at_least(i, stop)),
                some,
                (i, norm, missed, adjoint),
                parallel_iterations=1,
            )

        def at_least(i, stop):
            return tf.gather(visits, tf.minimum(i, end - 1)) >= stop

        def goes_on(i, norm):
            return tf.logical_and(i < end, tf.logical_and(norm <= limit, tf.math.is_finite(norm)))

        start = begin, _zero(), _zero(), adjoint
        if not isinstance(path, Anchors):
            # Stable runs hardly ever grow at all (docs/fidelity.md).
            ceiling = CEILING * limit if isinstance(path, Path) else None
            far_of = None
            if isinstance(path, Dense):

                def far_of(t, state, after):
                    return self._missed(state, after, state_at(path, t + 1))

            back = self._back_along(batches, run, lambda t: state_at(path, t), ceiling, far_of)
            i, norm, missed, adjoint = walk_down(tf.constant(0, tf.int64), back, *start)
            return adjoint, i, norm, missed
        replay, back, arrays = self._replaying(
            batches, run, path, again, adjoint, tf.shape(room)[0]
        )

        def segment(i, norm, missed, adjoint, arrays):
            last = tf.gather(visits, i)
            at = tf.searchsorted(path.times, last[None], side="right")[0] - 1
            start, end = (
                Anchor(tf.gather(path.times, k), [tf.gather(x, k) for x in path.arrays])
                for k in (at, at + 1)
            )
            far, arrays = replay(start, last, end, arrays)
            missed = tf.maximum(missed, far)
            walked = walk_down(start.time, back(start, end, arrays), i, norm, missed, adjoint)
            return *walked, arrays

        i, norm, missed, adjoint, _ = tf.while_loop(
            lambda i, norm, *_: goes_on(i, norm),
            segment,
            (*start, arrays),
            parallel_iterations=1,
        )
        return adjoint, i, norm, missed

    def _back_along(self, batches, run, state_of, ceiling=None, far_of=None):
        """One step back from the state at it; and how far it ends from where training was."""

        def back(t, row, bars):
            state = state_of(t)

            def step(batch):
                given = self.steps.given(run, t, row, batch)
                after, found = self._compiled(self.steps.back)(state, given, bars, ceiling)
                return found, _zero() if far_of is None else far_of(t, state, after)

            return batches.apply(run.batches, row, step)

        return back

    def _missed(self, start: State, found: State, true: State) -> tf.Tensor:
        weights = len(self.steps.slots)
        return _missed(start[:weights], found[:weights], true[:weights])

    def _replaying(self, batches, run, path, again, adjoint, room):
        """How to make steps again, how to walk back over them, and what is kept in between."""
        state = [tf.TensorSpec(x.shape[1:], x.dtype) for x in path.arrays]
        bars = _fixed([*adjoint.weights, *adjoint.slots])
        halves = Halves.of(
            self.steps.back, batches, state, bars, lambda leaves: given_spec(run, leaves)
        )
        if halves is None:

            def replay(start, last, end, arrays):
                # The step before an anchor is made on the way back as well, and compared there.
                compared = last == end.time - 1
                stop = tf.where(compared, last, end.time)
                after, arrays = self._forward(
                    batches, run, start.time, start.state, again, stop, arrays
                )
                far = self._missed(start.state, after, end.state)
                return tf.where(compared, _zero(), far), arrays

            def back(start, end, arrays):
                def state_of(t):
                    return [array.read(tf.cast(t - start.time, tf.int32)) for array in arrays]

                def far_of(t, state, after):
                    return tf.cond(
                        t == end.time - 1,
                        lambda: self._missed(start.state, after, end.state),
                        _zero,
                    )

                return self._back_along(batches, run, state_of, None, far_of)

            return replay, back, _room_for(state, room + 1)
        self._halves.append(halves)

        def replay_early(start, last, end, arrays):
            def body(t, state, arrays):
                row, at = tf.gather(again, t), tf.cast(t - start.time, tf.int32)
                saved, state = batches.apply(
                    run.batches,
                    row,
                    lambda batch: halves.early(state, self.steps.given(run, t, row, batch)),
                )
                return t + 1, state, [a.write(at, x) for a, x in zip(arrays, saved, strict=True)]

            _, after, arrays = tf.while_loop(
                lambda t, *_: t < end.time,
                body,
                (start.time, start.state, arrays),
                parallel_iterations=1,
            )
            return self._missed(start.state, after, end.state), arrays

        def back_late(start, end, arrays):
            def back(t, row, bars):
                saved = [array.read(tf.cast(t - start.time, tf.int32)) for array in arrays]
                found = batches.apply(
                    run.batches,
                    row,
                    lambda batch: halves.late(saved, self.steps.given(run, t, row, batch), bars),
                )
                return found, _zero()

            return back

        return replay_early, back_late, _room_for(halves.slots, room)

    def _states(self, batches, run, first, state, again, steps, room):
        arrays = _room_for(_fixed(state), tf.shape(room)[0] + 1)
        last = first + tf.cast(steps, tf.int64)
        _, arrays = self._forward(batches, run, first, state, again, last, arrays)
        return [array.stack() for array in arrays]

    def _forward(self, batches, run, first, state, again, last, arrays):
        """Make the steps from the first to that before `last`, and write down all states."""

        def body(t, state, arrays):
            row, at = tf.gather(again, t), tf.cast(t - first, tf.int32)

            def step(batch):
                return self._compiled(self.steps.forward)(
                    state, self.steps.given(run, t, row, batch)
                )

            state = batches.apply(run.batches, row, step)
            written = [a.write(at + 1, x) for a, x in zip(arrays, state, strict=True)]
            return t + 1, state, written

        arrays = [a.write(0, x) for a, x in zip(arrays, state, strict=True)]
        return tf.while_loop(
            lambda t, *_: t < last, body, (first, state, arrays), parallel_iterations=1
        )[1:]

    def _compiled(self, function: Callable) -> Callable:
        if not self.jit_compile:
            return function
        return tf.function(function, jit_compile=True, autograph=False)


def _add_at(so_far: tf.Tensor, block: tf.Tensor, part: tf.Tensor) -> tf.Tensor:
    if so_far.shape[0] == 1:
        return so_far + part[None]
    return tf.tensor_scatter_nd_add(so_far, block[None, None], part[None])


def _norm(tensors: Tensors) -> tf.Tensor:
    return tf.sqrt(tf.add_n([tf.cast(total(x * x), tf.float64) for x in tensors]))


def _missed(start: Tensors, found: Tensors, true: Tensors) -> tf.Tensor:
    """How far from the true weights those found are, as a part of the way from the start."""
    far = _norm([a - b for a, b in zip(found, true, strict=True)])
    way = _norm([a - b for a, b in zip(true, start, strict=True)])
    # Of weights that hardly move, the way is not much longer than what rounding moves them.
    return tf.math.divide_no_nan(far, tf.maximum(way, 1e-4 * _norm(start)))


def _zero() -> tf.Tensor:
    return tf.zeros([], tf.float64)


_COUNT = tf.TensorSpec([], tf.int32)
_ROOM = tf.TensorSpec([None], tf.bool)  # its length counts: XLA must know how many states to hold


def _fixed(tree: Any) -> Any:
    return tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), tree)


def _long(tree: Any) -> Any:
    """Specs for tensors whose first dimension counts steps, batches or anchors: it may change."""
    return tf.nest.map_structure(lambda x: tf.TensorSpec([None, *x.shape[1:]], x.dtype), tree)


def _room_for(specs: Sequence[tf.TensorSpec], count: tf.Tensor) -> list[tf.TensorArray]:
    return [tf.TensorArray(spec.dtype, count, element_shape=spec.shape) for spec in specs]


def _path_spec(path: Path | Dense | Anchors) -> Path | Dense | Anchors:
    if isinstance(path, Dense):
        return Dense(_fixed(path.first), _long(path.arrays))
    return _long(path)


def _run_spec(run: Run) -> Run:
    return Run(
        _long(run.batches), _long(run.seeds), _long(run.rates), _fixed(run.values),
        _fixed(run.tuned), _fixed(run.iteration), _fixed(run.horizon),
    )  # fmt: skip
