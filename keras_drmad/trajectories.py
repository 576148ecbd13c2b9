"""Trajectories: what is kept of a training run, and the state at every step rebuilt from it.

A state is the flat list of the weights and of the optimizer's slots. While training goes forward a
trajectory is offered states and keeps those it `wants`; afterwards it hands out a `Path`, on which
`state_at` gives the state at any step: a polyline through anchors. Two of them are DrMAD, one per
step (`Dense`) is exact. Or it hands out `Anchors` alone, from which the reverse loop recomputes the
states between them.
"""

from __future__ import annotations

import abc
import math
from typing import NamedTuple

import tensorflow as tf

State = list[tf.Tensor]


class Path(NamedTuple):
    """States with straight lines between them, and where on them the run was at some steps."""

    times: tf.Tensor  # (times,) int64: increasing steps
    places: tf.Tensor  # (times,) float64: how many anchors from the first on the run had come
    arrays: list[tf.Tensor]  # of each tensor of the state, (anchors, *shape)


class Dense(NamedTuple):
    """The state at every step."""

    first: tf.Tensor  # int64: the step of the first state
    arrays: list[tf.Tensor]  # of each tensor of the state, (steps or more, *shape)


class Anchors(NamedTuple):
    """States at increasing steps, from which the reverse loop recomputes those after them.

    The last is the state after the last step: only what is recomputed is compared with it.
    """

    times: tf.Tensor  # (anchors,) int64
    arrays: list[tf.Tensor]  # of each tensor of the state, (anchors, *shape)


def state_at(path: Path | Dense, t: tf.Tensor) -> State:
    """The state at step t, a scalar int64 within the path; exact at an anchor."""
    if isinstance(path, Dense):
        return [tf.gather(array, t - path.first) for array in path.arrays]
    last = tf.shape(path.times, tf.int64)[0] - 1
    before = tf.reduce_sum(tf.cast(path.times <= t, tf.int64)) - 1
    before = tf.clip_by_value(before, 0, tf.maximum(last - 1, 0))
    after = tf.minimum(before + 1, last)
    start, stop = tf.gather(path.times, before), tf.gather(path.times, after)
    part = tf.cast(t - start, tf.float64) / tf.cast(tf.maximum(stop - start, 1), tf.float64)
    place = (1 - part) * tf.gather(path.places, before) + part * tf.gather(path.places, after)
    end = tf.shape(path.arrays[0], tf.int64)[0] - 1
    left = tf.clip_by_value(tf.cast(tf.floor(place), tf.int64), 0, tf.maximum(end - 1, 0))
    right = tf.minimum(left + 1, end)
    part = place - tf.cast(left, tf.float64)
    state = []
    for array in path.arrays:
        share = tf.cast(part, array.dtype)
        state.append((1 - share) * tf.gather(array, left) + share * tf.gather(array, right))
    return state


class Trajectory(abc.ABC):
    """What is kept of the states of a training run."""

    name: str
    exact: bool  # whether `state_at` is the true state at every step
    all_batches = False  # whether every batch must be kept, not only a sample of them

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, steps: int | None, first: int = 0) -> None:
        """Forget the last run and cover the steps from `first` of the next.

        Args:
            steps: How many steps the run will have, or None if that is not known.
            first: The first step that will be walked.
        """
        self.steps, self.first = steps, first
        self.times: list[int] = []
        self.states: list[State] = []

    @abc.abstractmethod
    def wants(self, t: int) -> bool:
        """Whether the state before step t is to be kept."""

    def add(self, t: int, state: State, weights: int | None = None) -> None:
        """Keep the state before step t, of which so many tensors are weights."""
        self.times.append(t)
        self.states.append(state)

    def finish(self, t: int, state: State, weights: int | None = None) -> None:
        """Keep the state after the last step, of which there were t."""
        self.times.append(t)
        self.states.append(state)

    def path(self) -> Path | Dense | Anchors:
        """Where the states at every step come from. What is handed out is forgotten."""
        times, arrays = self._take()
        return Path(*self._pace(times), arrays)

    def _pace(self, times: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """At which steps which place on the path was reached."""
        return times, tf.range(len(times), dtype=tf.float64)

    def _take(self) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The times, and of each tensor of the state those kept; all is forgotten."""
        times, self.times = self.times, []
        states, self.states = self.states, []
        # Tensor by tensor, letting go of what has been copied.
        tensors = range(len(states[0]))[::-1]
        arrays = [tf.stack([state.pop(i) for state in states]) for i in tensors][::-1]
        return tf.constant(times, tf.int64), arrays

    @abc.abstractmethod
    def copies(self, steps: int) -> int:
        """How many copies of the state a run of so many steps needs, the walk included."""

    def restore(self, path: Path | Dense | Anchors) -> None:
        """Take back a path, to walk it again."""
        assert isinstance(path, Path)
        anchors = range(path.arrays[0].shape[0])
        places = path.places.numpy().tolist()
        self.times = [int(path.times[places.index(i)]) for i in anchors]
        self.states = [[array[i] for array in path.arrays] for i in anchors]

    def nbytes(self) -> int:
        """Bytes of the states that are kept now."""
        return sum(t.dtype.size * math.prod(t.shape) for state in self.states for t in state)


class Linear(Trajectory):
    """The straight line from the first state to the last: DrMAD (Fu et al., 2016, eq. 10).

    Keeps two copies of the state, whatever the number of steps, and a number at some steps: how far
    from the first weights the run had come.

    Args:
        pace: How fast the line is walked. `"distance"`: the state at a step is where the line is
            as far from the first weights, as a part of the whole way, as the run was. A run goes
            far in its first steps, and the line at an even pace dwells where it hardly was.
            `"steps"`: at an even pace, as published. Defaults to `"distance"`.
    """

    name = "linear"
    exact = False
    KNOTS = 64  # at so many steps the distance is measured; twice that where their number is open
    SPARE = 16  # or at one in so many, where there are few: it takes a third of a small net's step

    def __init__(self, pace: str = "distance"):
        if pace not in ("distance", "steps"):
            raise ValueError(f"`pace` is 'distance' or 'steps'. Received: pace={pace!r}")
        self.pace = pace
        super().__init__()

    def begin(self, steps: int | None, first: int = 0) -> None:
        super().begin(steps, first)
        self._stride = 1
        self._knots: list[int] = []
        self._distances: list[tf.Tensor] = []
        length = 0 if steps is None else steps - first
        knots = min(self.KNOTS, max(8, length // self.SPARE))
        self._chosen = {first + round(length * (j / knots) ** 2) for j in range(knots)}

    def wants(self, t: int) -> bool:
        if self.pace == "steps" or t <= self.first:
            return t == self.first
        return t in self._chosen if self.steps is not None else t % self._stride == 0

    def add(self, t: int, state: State, weights: int | None = None) -> None:
        if not self.states:
            super().add(t, state)
            return
        self._measure(t, state, weights)
        if self.steps is None and len(self._knots) > 2 * self.KNOTS:
            self._stride *= 2
            kept = [i for i, at in enumerate(self._knots) if at % self._stride == 0]
            self._knots = [self._knots[i] for i in kept]
            self._distances = [self._distances[i] for i in kept]

    def finish(self, t: int, state: State, weights: int | None = None) -> None:
        if self.pace == "distance" and self.states:
            self._measure(t, state, weights)
        super().finish(t, state)

    def _measure(self, t: int, state: State, weights: int | None) -> None:
        self._knots.append(t)
        pairs = list(zip(state, self.states[0], strict=True))[:weights]
        self._distances.append(tf.linalg.global_norm([a - b for a, b in pairs]))

    def _pace(self, times: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        distances = [float(d) for d in self._distances]
        if not distances or not 0.0 < distances[-1] < math.inf:  # it came back to where it was
            return super()._pace(times)
        places = [0.0, *(min(1.0, d / distances[-1]) for d in distances)]
        return tf.constant([int(times[0]), *self._knots], tf.int64), tf.constant(places, tf.float64)

    def restore(self, path: Path | Dense | Anchors) -> None:
        super().restore(path)
        assert isinstance(path, Path)
        self.times = [int(path.times[0]), int(path.times[-1])]

    def copies(self, steps: int) -> int:
        return 2


class Stored(Trajectory):
    """Every state: exact, the oracle. Keeps as many copies of the state as there are steps."""

    name = "stored"
    exact = True
    all_batches = True

    def wants(self, t: int) -> bool:
        return t >= self.first

    def copies(self, steps: int) -> int:
        return steps + 1

    def path(self) -> Dense:
        times, arrays = self._take()
        return Dense(times[0], arrays)


class Piecewise(Trajectory):
    """Straight lines between anchors: the dial between DrMAD (2 anchors) and exact.

    Args:
        anchors: How many states are kept at most, the first and the last included. Defaults to 9.
        spacing: `"quadratic"`: dense at the start, where weights move most, t = T (j/J)^2;
            `"even"`; or `"bend"`: of about 8 times as many candidates those are kept whose loss
            would bend the path most. Where the number of steps is not known in advance the first
            two are even: every state, then every second, fourth ... is kept. Defaults to
            `"quadratic"`.
    """

    name = "piecewise"
    exact = False

    def __init__(self, anchors: int = 9, spacing: str = "quadratic"):
        if isinstance(anchors, bool) or not isinstance(anchors, int) or anchors < 2:
            raise ValueError(f"`anchors` is an int of at least 2. Received: anchors={anchors!r}")
        if spacing not in ("quadratic", "even", "bend"):
            raise ValueError(
                f"`spacing` is 'quadratic', 'even' or 'bend'. Received: spacing={spacing!r}"
            )
        self.anchors, self.spacing = anchors, spacing
        super().__init__()

    def begin(self, steps: int | None, first: int = 0) -> None:
        super().begin(steps, first)
        self._stride = 1
        self._bends: list[float] = []
        if self.spacing == "bend":
            return
        if steps is not None:
            power = 2 if self.spacing == "quadratic" else 1
            last = self.anchors - 1
            length = steps - first
            if last >= length:  # room for every state
                self._chosen = set(range(first, steps))
            else:
                self._chosen = {first + round(length * (j / last) ** power) for j in range(last)}

    def wants(self, t: int) -> bool:
        if self.spacing == "bend":
            if not self.times:
                return t >= self.first
            length = self.steps - self.first if self.steps else self.times[-1] - self.first
            return t >= self.times[-1] + max(1, length // (8 * self.anchors))
        if self.steps is not None:
            return t in self._chosen
        return t % self._stride == 0

    def copies(self, steps: int) -> int:
        return min(self.anchors, steps + 1)

    def add(self, t: int, state: State, weights: int | None = None) -> None:
        super().add(t, state)
        if self.spacing == "bend":
            self._drop_the_straightest()
            return
        # Room is kept for the last state. Thinned, the rest lie on multiples of twice the stride.
        if self.steps is None and len(self.times) > self.anchors - 1 and self.wants(t):
            self._stride *= 2
            kept = [i for i, at in enumerate(self.times) if at % self._stride == 0]
            self.times = [self.times[i] for i in kept]
            self.states = [self.states[i] for i in kept]

    def _drop_the_straightest(self) -> None:
        """Keep the number of anchors, without the inner one that the path misses least."""
        if len(self.times) >= 3:
            self._bends.append(self._bend(len(self.times) - 2))
        if len(self.times) > self.anchors - 1 and self._bends:
            i = min(range(len(self._bends)), key=self._bends.__getitem__) + 1
            del self.times[i], self.states[i], self._bends[i - 1]
            for j in (i - 1, i):
                if 0 < j < len(self.times) - 1:
                    self._bends[j - 1] = self._bend(j)

    def _bend(self, i: int) -> float:
        """How far anchor i is from the line between its neighbours, times the line's length."""
        start, at, stop = self.times[i - 1 : i + 2]
        part = (at - start) / (stop - start)
        rows = zip(*self.states[i - 1 : i + 2], strict=True)
        miss = tf.linalg.global_norm([(1 - part) * a + part * c - b for a, b, c in rows])
        return float(miss) * (stop - start)


class Replay(Piecewise):
    """Anchors, and the steps between them recomputed from the recorded batches: exact.

    The steps after one anchor at a time are held, so about 2 sqrt(T) copies of the state at the
    default.

    Args:
        anchors: How many states are kept at most. Defaults to about the square root of the number
            of steps.
    """

    name = "replay"
    exact = True
    all_batches = True

    def __init__(self, anchors: int | None = None):
        self._default = anchors is None
        super().__init__(anchors if anchors is not None else 32, "even")

    def begin(self, steps: int | None, first: int = 0) -> None:
        if self._default and steps is not None:
            self.anchors = max(2, math.isqrt(steps - first) + 1)
        super().begin(steps, first)
        if steps is not None:
            # Segments of one length, but for the last: graphs for XLA are compiled for a length.
            stride = max(1, math.ceil((steps - first) / (self.anchors - 1)))
            self._chosen = set(range(first, steps, stride))

    def copies(self, steps: int) -> int:
        anchors = max(2, math.isqrt(steps) + 1) if self._default else self.anchors
        return anchors + math.ceil(steps / (anchors - 1))

    def path(self) -> Anchors:
        return Anchors(*self._take())


_NAMED: dict[str, type[Trajectory]] = {c.name: c for c in (Linear, Piecewise, Replay, Stored)}


def get(trajectory: str | Trajectory) -> Trajectory:
    """The trajectory of a name, or the object itself.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(trajectory, Trajectory):
        return trajectory
    if isinstance(trajectory, str) and trajectory in _NAMED:
        return _NAMED[trajectory]()
    raise ValueError(
        f"`trajectory` is one of {sorted(_NAMED)} or a keras_drmad.trajectories.Trajectory. "
        f"Received: trajectory={trajectory!r}"
    )
