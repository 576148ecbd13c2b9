"""How a hypergradient is estimated: a setting, and which steps of a run it visits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_drmad.trajectories import Anchors, Dense, Path, Trajectory

Amount = int | float | None  # a number of steps, a fraction of them, or all


@dataclass(frozen=True)
class Setting:
    """How a hypergradient is estimated.

    Args:
        trajectory: What is kept of the states.
        curvature: A name of `keras_drmad.curvature`.
        window: How many last steps are walked.
        reverse_steps: How many steps of the window are visited.
        max_batches: How many batches serve, where the path is not exact; None is all.
    """

    trajectory: Trajectory
    curvature: str
    window: Amount = None
    reverse_steps: Amount = None
    max_batches: int | None = None

    def first(self, steps: int | None) -> int:
        """The first step that is walked, of so many; 0 while their number is not known."""
        return 0 if steps is None else steps - amount(self.window, steps)

    def __str__(self) -> str:
        parts = [self.trajectory.name, self.curvature]
        amounts = (("window", self.window), ("visiting", self.reverse_steps))
        parts += [f"{name} {value}" for name, value in amounts if value is not None]
        return ", ".join(parts)


def amount(asked: Amount, total: int) -> int:
    """A number of steps: None is all, a float is a fraction of them."""
    if asked is None:
        return total
    wanted = round(asked * total) if isinstance(asked, float) else asked
    return min(max(1, wanted), total)


def visits(first: int, stop: int, count: int) -> np.ndarray:
    """So many steps of first <= t < stop, evenly spaced, the last first."""
    return np.unique(np.linspace(first, stop - 1, count).round().astype(np.int64))[::-1].copy()


def stretches(path: Path | Dense | Anchors, visited: np.ndarray) -> tuple[np.ndarray, int]:
    """After how many visits a stretch between anchors has been walked, and the longest stretch.

    A walk that pauses within a stretch would have to replay it again. Where nothing is replayed it
    may pause anywhere.
    """
    if not isinstance(path, Anchors):
        return np.arange(1, len(visited)), 0
    times = path.times.numpy()
    return np.sum(visited[:, None] >= times, axis=0)[::-1], int(np.max(np.diff(times)))


def nearest(kept: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Of each step, the index of the kept step that is nearest."""
    after = np.clip(np.searchsorted(kept, steps), 0, len(kept) - 1)
    before = np.maximum(after - 1, 0)
    closer = np.abs(steps - kept[before]) < np.abs(kept[after] - steps)
    return np.where(closer, before, after).astype(np.int64)
