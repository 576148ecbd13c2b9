"""Hypergradients: from a recorded run and the outer loss to the derivative by everything tuned.

The callback, `hypergradients` and the verification all come here. One recorded run can be walked
several times, by different settings, which is how settings are compared on the same footing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad import batches as packing
from keras_drmad import curvature as curvatures
from keras_drmad import step_checks
from keras_drmad.compilation import Compilation, wanted
from keras_drmad.objectives import OuterLoss, TrainingLoss
from keras_drmad.optimizers import block_of
from keras_drmad.recorder import Recorder
from keras_drmad.reverse import Adjoint, ReverseLoop
from keras_drmad.settings import Setting, amount, nearest, stretches, visits
from keras_drmad.steps import Run, Steps, split
from keras_drmad.trajectories import Anchors, Dense, State

# On a reconstructed path an adjoint that has grown this much over where it started is no estimate
# any more: the path leads over points of negative curvature on which training never was.
GROWTH_LIMIT = 100.0
# A stretch that is replayed must end where training was, to this part of the way that it went.
# Rounding makes 1e-6 to 0.02 in float32, and up to 0.08 in bfloat16 (docs/decisions.md).
MISS_LIMIT = 0.2


@dataclass(frozen=True)
class Hypergradients:
    """Derivatives of the outer loss after a run."""

    outer_loss: float
    values: list[tf.Tensor]  # by each group's values, (blocks, *shape)
    tuned: list[tf.Tensor]  # by each tuned variable
    weights: list[tf.Tensor] | None  # by the first weights, if the walk reached them
    steps: int  # how many last steps of the run were walked over
    seconds: float  # what the walk took
    problem: str = ""  # why they can't be trusted
    marks: list[Hypergradients] = field(default_factory=list)  # what shorter windows give
    fallback: str = ""  # the curvature that exploded, where Gauss-Newton took its place


class Estimator:
    """Records the runs of a model and differentiates the outer loss through them.

    Args:
        model: A compiled model with an optimizer of `keras_drmad.optimizers`.
        tuned: Variables of the model or its loss that are tuned.
        jit_compile: Whether walks are compiled by XLA; `"auto"` is whichever is faster.

    Raises:
        ValueError: if XLA is asked for, or refused, where it would draw other random numbers than
            `fit` did.
    """

    def __init__(
        self,
        model: keras.Model,
        tuned: Sequence[keras.Variable] = (),
        jit_compile: bool | str = "auto",
    ):
        self.model, self.tuned = model, list(tuned)
        self._asked = jit_compile
        self._compilation = Compilation(wanted(model, jit_compile))
        self.recorder = Recorder(model)
        # Called with the number of steps visited so far and of all, now and then in a walk.
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self._portion = 8
        self._loops: dict[tuple[str, bool], ReverseLoop] = {}
        # Variables that a training step reads beside the state, and weights that it leaves alone.
        self._read: list[tf.Variable] = []
        self._still: list[tf.Variable] = []
        self._looked = False

    @property
    def traces(self) -> int:
        """How often a reverse loop was traced."""
        return sum(loop.traces for loop in self._loops.values())

    def settled(self, setting: Setting) -> bool:
        """Whether it is decided whether XLA compiles walks by a setting."""
        return self._compilation.settled(str(setting))

    @property
    def halved(self) -> bool:
        """Whether what a replayed step works out is kept for the walk, and not worked out twice."""
        return any(loop.halved for loop in self._loops.values())

    # Forward -----------------------------------------------------------------------------------

    def begin(self, steps: int | None, settings: Sequence[Setting]) -> None:
        """Start to record a run.

        Args:
            steps: How many steps it will have, or None if that is not known.
            settings: With which it is to be walked afterwards.
        """
        self._planned = steps  # training may stop earlier
        bounds = [s.max_batches for s in settings if not s.trajectory.all_batches]
        known = [bound for bound in bounds if bound is not None]
        everything = len(known) < len(settings)
        self.recorder.begin(
            steps,
            [(s.trajectory, s.first(steps)) for s in settings],
            None if everything else max(known),
        )

    def arm(self, before: Callable[[Any], None]) -> None:
        """Record the next training step (see `Recorder.arm`)."""

        def first(spec: Any) -> None:
            before(spec)
            # Only now are all layers built, and those known that draw random numbers.
            compiled = wanted(self.model, self._asked)
            if compiled != self._compilation.asked:
                self._compilation = Compilation(compiled)
            self._iteration = tf.identity(self.model.optimizer.iterations.value)
            self._before = step_checks.fingerprints([*self._read, *self._still])

        self.recorder.arm(first)

    def look_at_step(self, spec: Any) -> str:
        """Refuse a training step that can't be followed, the first time that this is called.

        All layers are built, and the optimizer.

        Args:
            spec: The element spec of a batch.

        Returns:
            What to warn of.

        Raises:
            ValueError: naming what it is.
        """
        if self._looked:
            return ""
        optimizer = self.model.optimizer
        loss, steps = TrainingLoss(self.model, self.tuned), self._steps("gauss_newton", False)
        step = step_checks.trace(loss, steps, optimizer, self.recorder.snapshot(), spec)
        step_checks.check_reads(step)
        step_checks.check_assignments(step)
        step_checks.check_rate(optimizer.fixed_learning_rate, self.tuned)
        self._read, self._still, self._looked = step.read, step.still, True
        return step_checks.doubts(step)

    @property
    def moved(self) -> list[str]:
        """Names of variables that steps read, and that have changed since the first of them."""
        return self._changed(self._read)

    def _changed(self, variables: Sequence[tf.Variable]) -> list[str]:
        after = step_checks.fingerprints(variables)
        return [
            v.name
            for v in variables
            if not bool(tf.reduce_all(after[v.ref()] == self._before[v.ref()]))
        ]

    # Backward ----------------------------------------------------------------------------------

    def finish(self, outer: OuterLoss) -> None:
        """End the run: pack what was recorded, and differentiate the outer loss at its end."""
        recorder, optimizer = self.recorder, self.model.optimizer
        recorder.finish()
        self.outer = outer()
        self.steps = recorder.steps
        self._updates = int(optimizer.iterations) - int(self._iteration)
        self._kept = np.asarray(recorder.kept)
        self._batches = packing.pack(recorder.batches)
        self._run = Run(
            self._batches.packed,
            [tf.stack(column) for column in zip(*recorder.seeds, strict=True)],
            recorder.take_rates(),
            optimizer.values(),
            [tf.convert_to_tensor(v.value) for v in self.tuned],
            self._iteration,
            tf.convert_to_tensor(optimizer.horizon[1], tf.int64),
        )
        recorder.seeds.clear()

    def rerun(self, first: State, values: Sequence[Any]) -> list[tf.Tensor]:
        """Where the finished run would have ended, had it been trained with other values.

        Args:
            first: The state before the first step.
            values: Of each group, (blocks, *shape).

        Returns:
            Weights and moving averages.
        """
        run = self._run._replace(values=[tf.convert_to_tensor(v) for v in values])
        chunk = math.isqrt(self.steps) + 1  # so many states are held
        state = first
        for start in range(0, self.steps, chunk):
            steps = min(chunk, self.steps - start)
            state = [array[steps] for array in self.recompute(state, start, steps, run).arrays]
        weights, _, averages = split(state, self._slots)
        return weights + averages

    def recompute(self, state: State, start: int, steps: int, run: Run | None = None) -> Dense:
        """Make some recorded steps again.

        Args:
            state: The state before step `start`.
            start, steps: The first step, and how many are made.
            run: The run, with other values perhaps. Defaults to the finished one.

        Returns:
            The states before the steps and after the last.
        """
        loop = self._loop("gauss_newton", self._compilation.use("recompute"))
        return loop.recompute(
            self._batches, run or self._run, start, state, self._every_row(), steps
        )

    @property
    def _slots(self) -> list[int]:
        """The number of slots of each weight."""
        return [len(slots) for slots in self.model.optimizer.slot_variables]

    def _every_row(self) -> tf.Tensor:
        """The batch of each step of the run."""
        return tf.constant(nearest(self._kept, np.arange(self.steps)))

    def nbytes(self, setting: Setting) -> int:
        """Bytes that a setting keeps of a run like the finished one, batches and states."""
        state = sum(packing.nbytes(x) for x in self.recorder.snapshot())
        batch = packing.size_of(self._batches) / max(1, len(self._kept))
        window = self.steps - setting.first(self.steps)
        batches = window
        if not setting.trajectory.all_batches and setting.max_batches is not None:
            batches = min(batches, setting.max_batches)
        return round(state * setting.trajectory.copies(window) + batch * batches)

    def forget(self) -> None:
        """Let go of the run."""
        self.recorder.begin(None, ())
        for name in ("_run", "_batches", "outer"):
            vars(self).pop(name, None)

    def walk(self, setting: Setting, marks: Sequence[int] = ()) -> Hypergradients:
        """Differentiate the outer loss through the finished run; the setting's states are let go.

        Args:
            setting: One of those that the run was begun with.
            marks: Numbers of last steps after which to note what has been collected.
        """
        started = time.perf_counter()
        compiled = self._compilation.use(str(setting))
        first = setting.first(self._planned or self.steps)
        noted: list[Hypergradients] = []
        adjoint = self._at_the_end()

        def result(at: int, problem: str = "") -> Hypergradients:
            return Hypergradients(
                float(self.outer[0]),
                adjoint.values,
                adjoint.tuned,
                adjoint.weights if at == 0 and not problem else None,
                self.steps - at,
                time.perf_counter() - started,
                problem,
                noted,
            )

        problem = self._problem(first)
        if problem:
            return result(self.steps, problem)
        loop = self._loop(setting.curvature, compiled)
        exact = setting.trajectory.exact
        limit = math.inf if exact else GROWTH_LIMIT * float(tf.linalg.global_norm(self.outer[1]))
        visited = visits(first, self.steps, amount(setting.reverse_steps, self.steps - first))
        steps, rows = tf.constant(visited), tf.constant(self._rows(setting, visited))
        path = setting.trajectory.path()
        joints, room = stretches(path, visited)
        again = self._every_row() if isinstance(path, Anchors) else None
        notes = {int(np.sum(visited >= self.steps - mark)): self.steps - mark for mark in marks}
        self.progress(0, len(visited))
        trial = compiled and self._compilation.untried(str(setting))
        for begin, end in self._portions(len(visited), sorted(notes), joints, trial):
            begun = time.perf_counter()
            adjoint, walked, norm, missed = loop.walk(
                self._batches, self._run, path, steps, rows, begin, end, adjoint, limit, again, room
            )
            if walked < end - begin or not norm <= limit or not math.isfinite(norm):
                if setting.curvature != "gauss_newton" and not exact:
                    # On a reconstructed path it is the negative curvature that explodes.
                    setting.trajectory.restore(path)
                    other = dataclasses.replace(setting, curvature="gauss_newton")
                    try:
                        found = self.walk(other, marks)
                        return dataclasses.replace(found, fallback=setting.curvature)
                    except LookupError:
                        pass  # TensorFlow has no second derivative of a layer
                lost = int(visited[begin + walked - 1])
                what = "is not a number" if math.isnan(norm) else "exploded"
                return result(lost, f"the adjoint {what} {self.steps - lost} steps before the end")
            if missed > MISS_LIMIT:
                return result(self.steps, _other_run(missed))
            # The first part may have been compiled in that time.
            took = time.perf_counter() - begun
            if compiled and begin and self._compilation.hopeless(str(setting), took, walked):
                compiled, loop = False, self._loop(setting.curvature, False)
            self.progress(end, len(visited))
            if end in notes and notes[end] > first:
                noted.append(result(notes[end]))
        found = result(first)
        self._compilation.note(str(setting), compiled, found.seconds, len(visited))
        if loop.refused:
            self._compilation.possible = False
        return found

    def _at_the_end(self) -> Adjoint:
        """Where a walk starts from."""
        _, weights_bar, averages_bar, tuned_bar = self.outer
        slots = [s for of_one in self.model.optimizer.slot_variables for s in of_one]
        return Adjoint(
            weights_bar,
            [tf.zeros(s.shape, s.dtype) for s in slots] + averages_bar,
            [tf.zeros_like(v) for v in self._run.values],
            tuned_bar,
        )

    def _problem(self, first: int) -> str:
        """Why the finished run can't be walked back to a step; empty if it can."""
        if not math.isfinite(float(self.outer[0])):
            return "the outer loss is not finite"
        if not all(bool(tf.reduce_all(tf.math.is_finite(w))) for w in self.outer[1]):
            return "the gradient of the outer loss is not finite"
        if self._updates != self.steps:
            return (
                f"the optimizer made {self._updates} updates in {self.steps} recorded steps. Leave "
                "out `train_on_batch` and `fit` inside of callbacks"
            )
        if still := self._changed(self._still):
            return (
                f"{still[0]} has no gradient where the reverse pass makes a step again, and yet it "
                "has changed: by a callback that sets it, or within tf.recompute_grad or "
                "keras.remat, which are not supported"
            )
        if first >= self.steps:
            return (
                f"training stopped after {self.steps} of {self._planned} steps, before the window"
            )
        return ""

    def _portions(
        self, count: int, marks: Sequence[int], joints: np.ndarray, trial: bool
    ) -> Iterator[tuple[int, int]]:
        """The visits in parts that take about a second each, to tell progress in between.

        Args:
            count: How many visits there are.
            marks: Where a part must end.
            joints: Where a part had better end.
            trial: Whether to begin with two single visits: to compile, and to see how fast it is.
        """
        begin = 0
        while trial and begin < min(2, count):
            yield begin, begin + 1
            begin += 1
        while begin < count:
            stop = min([mark for mark in marks if mark > begin] + [count])
            wanted = min(stop, begin + self._portion)
            ahead = joints[(joints > begin) & (joints < stop)]
            if wanted < stop:
                reached = ahead[ahead <= wanted]
                wanted = int(reached[-1] if len(reached) else ahead[0] if len(ahead) else stop)
            started = time.perf_counter()
            yield begin, wanted
            pace = (wanted - begin) / max(time.perf_counter() - started, 1e-3)
            self._portion = int(np.clip(pace, max(1, self._portion // 2), 2 * self._portion))
            begin = wanted

    def _loop(self, curvature: str, compiled: bool) -> ReverseLoop:
        """The graphs for a curvature."""
        key = curvature, compiled
        if key not in self._loops:
            auto = self._compilation.asked == "auto"
            plain = self._loop(curvature, False) if compiled and auto else None
            self._loops[key] = ReverseLoop(self._steps(curvature, compiled), compiled, plain)
        return self._loops[key]

    def _steps(self, curvature: str, compiled: bool) -> Steps:
        return Steps(
            TrainingLoss(self.model, self.tuned),
            functools.partial(self.model.optimizer.pure_update, spread=compiled),
            curvatures.get(curvature),
            self._slots,
            block_of,
        )

    def _rows(self, setting: Setting, visits: np.ndarray) -> np.ndarray:
        """Of each visited step, which of the batches that are kept serves a setting."""
        rows = np.arange(len(self._kept))
        if not setting.trajectory.all_batches and setting.max_batches is not None:
            rows = rows[self._kept >= setting.first(self._planned or self.steps)]
            rows = rows[:: max(1, math.ceil(len(rows) / setting.max_batches))]
        return rows[nearest(self._kept[rows], visits)]


def _other_run(missed: float) -> str:
    return (
        f"the replayed training missed where training went by {missed:.0%} of the way, so it is "
        "another run that would be differentiated. Something but the optimizer moves the weights "
        "between steps (a callback that sets them), or a layer draws random numbers from no "
        "keras.random.SeedGenerator. trajectory='linear' replays nothing"
    )
