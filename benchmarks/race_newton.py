"""DrMAD with BFGS in the place of Adam: for a run whose loss is a function without noise.

An exact hypergradient after a full training says more than a step of Adam makes of it: where two
of them are known, so is the curvature between. This is what a user can do with the public callback:
an outer optimizer that moves nothing, records of hypergradients, and an outer loop of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from race_problem import START, Problem, key_of

import keras_drmad as kd

WALK = 2.0  # training steps that a step of a walk costs: stored states, the Hessian
TRAININGS = 30
SHORT = 6  # so many short trainings, walks included, come first
COARSE = 0.6  # the part of the compute before neurons go their own ways
LONGEST = 1.0  # no logarithm moves farther in one step


class Worse(Exception):
    """A training that is not worth to be walked back."""


class Judge(keras.callbacks.Callback):
    """Stands before DrMADCallback, and ends a fit whose loss is too high before the walk."""

    def __init__(self, problem: Problem, bound: float, epochs: int):
        super().__init__()
        self.problem, self.bound, self.epochs = problem, bound, epochs

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 == self.epochs:
            self.loss = self.problem.loss()
            if not self.loss < self.bound:
                raise Worse


class Hypergradient:
    """Validation loss and its derivative by the logarithms of what is tuned, after a training.

    A point holds a logarithm for each of the five hyperparameters; or, once `fine` is set, one for
    each neuron's L2. What is spent is noted in the problem.
    """

    def __init__(self, problem: Problem):
        self.problem, self.fine = problem, False
        self.callbacks: dict[int, kd.DrMADCallback] = {}
        self.groups = [
            (group.argument, group.key, key_of(group), raw)
            for group, raw in zip(
                problem.model.optimizer.groups, problem.model.optimizer.raw_variables, strict=True
            )
        ]
        for epochs in {problem.epochs // 5, problem.epochs}:  # traces
            self(self.start(), epochs, math.inf)
        problem.begin()

    def start(self) -> np.ndarray:
        return np.log(list(START.values()))

    def fine_names(self) -> list[str]:
        """What each entry of a fine point belongs to."""
        return [key for _, _, key, raw in self.groups for _ in range(_size(raw))]

    def set(self, point: np.ndarray) -> None:
        at = 0
        for argument, _, key, raw in self.groups:
            if self.fine:
                logs, at = point[at : at + _size(raw)], at + _size(raw)
            else:
                logs = np.full(_size(raw), point[list(START).index(key)])
            if argument == "momentum":  # its raw value is the logit, that of the others the log
                logs = np.minimum(logs, math.log(0.99))
                logs = np.log1p(-np.exp(logs)) - logs
            raw.assign(np.reshape(logs, raw.shape))

    def __call__(
        self, point: np.ndarray, epochs: int, bound: float
    ) -> tuple[float, np.ndarray | None]:
        """The loss after so many epochs, and the derivative where it is below the bound."""
        problem = self.problem
        if epochs not in self.callbacks:
            self.callbacks[epochs] = kd.DrMADCallback(
                problem.validation,
                outer_optimizer=keras.optimizers.SGD(0.0),  # moves nothing
                horizon=epochs,
                restart=True,
                trajectory="stored",
                hyper_batch_size=len(problem.validation[0]),
                jit_compile=False,
            )
            problem.restart()
        drmad, judge = self.callbacks[epochs], Judge(problem, bound, epochs)
        problem.restart()
        self.set(point)
        try:
            problem.fit(epochs, [judge, drmad])
        except Worse:
            problem.trained += epochs * problem.per_epoch
        if epochs == problem.epochs:
            problem.note(judge.loss)
        if not judge.loss < bound:
            return judge.loss, None
        problem.walked += WALK * epochs * problem.per_epoch
        record = drmad.history.pop()
        drmad.history.clear()
        slopes = dict.fromkeys(START, 0.0)
        parts = []
        for argument, layer, key, _ in self.groups:
            found = np.ravel(record.hypergradients[argument][layer]).astype(float)
            value = np.ravel(record.hyperparameters[argument][layer]).astype(float)
            # d/d log(1 - momentum) = -(1 - momentum) d/d momentum
            part = found * (value - 1.0 if argument == "momentum" else value)
            slopes[key] += float(np.sum(part))
            parts.append(part)
        gradient = np.concatenate(parts) if self.fine else np.array(list(slopes.values()))
        return judge.loss, gradient if np.all(np.isfinite(gradient)) else None


def _size(raw: Any) -> int:
    return int(np.prod(raw.shape))


def bfgs(
    function: Callable,
    point: np.ndarray,
    afford: Callable[[], bool],
    inverse: np.ndarray | None = None,
    first: float = 0.5,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Minimise a function by BFGS with backtracking, as long as it can be afforded.

    Args:
        function: Of a point and a bound: the value, and the gradient where it is below the bound.
        point: Where to start.
        afford: Whether another value with its gradient can be paid for.
        inverse: Of the Hessian, as it is known so far.
        first: The largest entry of the first step, where nothing is known of the Hessian.

    Returns:
        The last point, and the inverse of the Hessian.
    """
    value, slope = function(point, math.inf)
    while slope is not None and np.any(slope) and afford():
        step = -slope * first / np.abs(slope).max() if inverse is None else -inverse @ slope
        if step @ slope >= 0:
            inverse = None
            continue
        step *= min(1.0, LONGEST / np.abs(step).max())
        length = 1.0
        while True:
            new, bound = point + length * step, value + 1e-4 * length * (step @ slope)
            new_value, new_slope = function(new, bound)
            if new_slope is not None or not afford() or length < 0.02:
                break
            # The minimum of the parabola through both values and the slope.
            fall = length * (step @ slope)
            length *= float(np.clip(-fall / (2 * (new_value - value - fall)), 0.1, 0.5))
        if new_slope is None:
            if inverse is None:
                break
            inverse = None  # once more, along the gradient
            first *= 0.2
            continue
        moved, change = new - point, new_slope - slope
        if moved @ change > 1e-8 * np.linalg.norm(moved) * np.linalg.norm(change):
            if inverse is None:
                inverse = np.eye(len(point)) * (moved @ change) / (change @ change)
            rho = 1.0 / (moved @ change)
            left = np.eye(len(point)) - rho * np.outer(moved, change)
            inverse = left @ inverse @ left.T + rho * np.outer(moved, moved)
        elif inverse is None:
            first *= 2.0  # the loss still falls faster and faster
        point, value, slope = new, new_value, new_slope
    return point, inverse


def drmad_bfgs(problem: Problem) -> None:
    """BFGS through short trainings, then through full ones with the Hessian found so far.

    Where there is an L2 for each neuron: one for each layer first, until 60 % of the compute are
    spent; then each neuron's own from there, which share what is known of the curvature.
    """
    one = Hypergradient(problem)
    short, full = problem.epochs // 5, problem.epochs

    def below(trainings: float, epochs: int) -> Callable[[], bool]:
        cost = (1 + WALK) * epochs / full
        return lambda: problem.spent + cost <= trainings + 1e-6

    budget = SHORT * (1 + WALK) * short / full
    point, inverse = bfgs(
        lambda x, b: one(x, short, b), one.start(), below(budget, short), first=1.0
    )
    if problem.per != "neuron":
        bfgs(lambda x, b: one(x, full, b), point, below(TRAININGS, full), inverse)
        return
    budget = COARSE * TRAININGS
    point, inverse = bfgs(lambda x, b: one(x, full, b), point, below(budget, full), inverse)
    names = one.fine_names()
    of_layer = [list(START).index(name) for name in names]
    one.fine = True
    if inverse is not None:
        # So that n equal parts of a slope move n neurons as the whole moved the layer.
        inverse = np.diag([inverse[i, i] * of_layer.count(i) for i in of_layer])
    bfgs(lambda x, b: one(x, full, b), point[of_layer], below(TRAININGS, full), inverse)
