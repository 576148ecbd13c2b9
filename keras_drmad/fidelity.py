"""How well one hypergradient agrees with another, and the cheapest setting that agrees enough.

No estimator between DrMAD and exact is best everywhere (docs/fidelity.md), so `Auto` measures the
candidates against the exact replay on the user's own run: all of them walk the same recorded run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from keras_drmad.estimator import Estimator, Hypergradients
from keras_drmad.settings import Setting, amount
from keras_drmad.trajectories import Linear, Piecewise, Replay


@dataclass(frozen=True)
class Agreement:
    """An estimated hypergradient of one argument beside the exact one, in raw units."""

    cosine: float  # 1 is the same direction; for a single value it is the sign
    signs: float  # the part of the entries whose sign is right
    norm: float  # estimated norm over exact norm


def agreement(
    optimizer: keras.optimizers.Optimizer,
    tuned: Sequence[str],
    estimated: Hypergradients,
    exact: Hypergradients,
) -> dict[str, Agreement]:
    """Compare two hypergradients, argument by argument.

    Args:
        optimizer: An optimizer of `keras_drmad.optimizers`.
        tuned: Names of the tuned variables of the model, if there are any.
        estimated, exact: The two.

    Returns:
        Argument (or variable) name to `Agreement`. Arguments that can't move are left out.
    """
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for group, raw, a, b in zip(
        optimizer.groups, optimizer.raw_variables, estimated.values, exact.values, strict=True
    ):
        if group.spec.tunable:
            slope = group.domain.slope(raw.value)
            pair = (np.ravel(a * slope), np.ravel(b * slope))
            pairs.setdefault(group.argument, []).append(pair)
    for name, a, b in zip(tuned, estimated.tuned, exact.tuned, strict=True):
        pairs.setdefault(name, []).append((np.ravel(a), np.ravel(b)))
    return {name: _agree(of_one) for name, of_one in pairs.items()}


def _agree(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Agreement:
    a, b = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    if norm_a == 0.0 or norm_b == 0.0:
        same = float(norm_a == norm_b)
        return Agreement(same, same, 1.0 if same else float(np.divide(norm_a, norm_b or 1.0)))
    return Agreement(
        float((a / norm_a) @ (b / norm_b)),
        float(np.mean(np.sign(a) == np.sign(b))),
        float(norm_a / norm_b),
    )


class Fixed:
    """One setting for the whole run, verified now and then.

    Args:
        setting: How hypergradients are estimated.
        verify_every: Updates from one verification to the next; None is never.
        exact_curvature: The curvature of the exact walk that it is verified by.
    """

    def __init__(
        self, setting: Setting, verify_every: int | None = None, exact_curvature: str = "hessian"
    ):
        self.chosen, self._every = setting, verify_every
        self._exact = Setting(Replay(), exact_curvature)
        self._updates = 0
        self.why = "as asked"

    @property
    def curvatures(self) -> list[str]:
        """Those that must be right for the model."""
        verified = [] if self._every is None else [self._exact.curvature]
        return [self.chosen.curvature, *verified]

    def settings(self) -> list[Setting]:
        """With what the next run is to be recorded."""
        return [self.chosen, self._exact] if self._due() else [self.chosen]

    def hypergradients(
        self, estimator: Estimator, outer_loss: float, rate: float
    ) -> tuple[Hypergradients, dict[str, Agreement] | None]:
        """Walk the finished run; where it is due, the exact way as well, and compare."""
        due = self._due()
        self._updates += 1
        found = estimator.walk(self.chosen)
        if not due or found.problem:
            return found, None
        exact = estimator.walk(self._exact)
        if exact.problem:
            return found, None
        names = [v.path for v in estimator.tuned]
        return found, agreement(estimator.model.optimizer, names, found, exact)

    def get_state(self) -> dict[str, Any]:
        """What is to be kept where the run is saved, as JSON can hold it."""
        return {"updates": self._updates}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from where `get_state` was called."""
        # Saved by `Auto`, it says nothing about when to verify.
        self._updates = state.get("updates", 0)

    def _due(self) -> bool:
        return self._every is not None and self._updates % self._every == 0


class Auto:
    """Chooses how hypergradients are estimated by measuring on the run itself.

    At the first update, and again every now and then, the run is walked exactly (`replay`, Hessian)
    and by the candidates. Chosen is the cheapest whose worst cosine over the arguments reaches
    `fidelity`, with a quarter of the way to 1 to spare. Another measurement is made only where all
    of them together add no more than half to what the walks by what they chose cost. Where the run
    has moved, those to come until update 20 count as well; and where even they do not pay for it,
    twice the window is walked until they do.

    Args:
        fidelity: The cosine with the exact hypergradient that is aimed at.
        memory_limit: Bytes that what is kept of a run may take, or None.
        max_batches: How many batches are kept where the path is not exact.
        exact_curvature: The curvature of the exact walk.
        whole: Whether every walk must reach the first step.
    """

    WINDOWS = (0.125, 0.25, 0.5)
    EVERY = 10  # updates between two measurements, doubled each time the choice stands
    LONGEST = 40
    MOVED = 2.0  # the loss or a learning rate by this factor: time to measure again
    SOONEST = 5
    SHARE = 0.5  # what measuring may add to the cost of the walks by what was chosen
    SOON = 20  # updates within which it must have paid

    def __init__(
        self,
        fidelity: float = 0.9,
        memory_limit: int | None = None,
        max_batches: int | None = None,
        exact_curvature: str = "hessian",
        whole: bool = False,
    ):
        self.fidelity, self.memory_limit = fidelity, memory_limit
        self._windows = () if whole else self.WINDOWS
        self.wanted = fidelity + 0.25 * (1.0 - fidelity)
        self._max_batches = max_batches
        self._exact = Setting(Replay(), exact_curvature)
        self._candidates = [
            Setting(Linear(), "gauss_newton", max_batches=max_batches),
            Setting(Piecewise(9), "gauss_newton", max_batches=max_batches),
            Setting(Piecewise(33, "even"), exact_curvature, max_batches=max_batches),
        ]
        self.chosen: Setting | None = None
        self.why = ""
        self._since = 0
        self._moved = False
        self._interval = self.EVERY
        self._measured_at: tuple[float, float] | None = None
        # In training steps: walks by what was chosen, all measuring beyond them, the last of it.
        self._walked = self._measuring = self._last = 0.0
        # And of the exact walk, of the cheapest that may be chosen.
        self._full = self._least = 0.0
        self._updates = 0
        self._wider = False
        self._halved = False  # whether replayed steps are not worked out twice

    def _cost(self, setting: Setting) -> float:
        """Of a walk, in training steps a step."""
        return _cost_per_step(setting, self._halved)

    # What the callback asks ----------------------------------------------------------------------

    @property
    def curvatures(self) -> list[str]:
        """Those that must be right for the model: what is measured against it need not be."""
        return [self._exact.curvature]

    def settings(self) -> list[Setting]:
        """With what the next run is to be recorded."""
        if self.chosen is None or self._due():
            return [self._exact, *self._candidates]
        return [self.chosen]

    def hypergradients(
        self, estimator: Estimator, outer_loss: float, rate: float
    ) -> tuple[Hypergradients, dict[str, Agreement] | None]:
        """Walk the finished run; where it was due, measure and choose.

        Args:
            estimator: With a finished run that was begun with `settings()`.
            outer_loss, rate: The outer loss and the learning rate now, to see them move.

        Returns:
            The hypergradients; and how the setting in use agrees with the exact ones, if that
            was measured.
        """
        now = (math.log(max(outer_loss, 1e-30)), math.log(max(rate, 1e-30)))
        if self.chosen is not None and not self._due():
            self._since += 1
            if self._measured_at is not None and self._since >= self.SOONEST:
                moved = max(abs(a - b) for a, b in zip(now, self._measured_at, strict=True))
                self._moved = self._moved or moved > math.log(self.MOVED)
            found = estimator.walk(self.chosen)
            self._walked += self._cost(self.chosen) * found.steps
            self._updates += 1
            if self._moved and not self._due():
                self._widen(estimator)
            return found, None
        marks = sorted({round(window * estimator.steps) for window in self._windows} - {0})
        exact = estimator.walk(self._exact, marks)
        self._halved = estimator.halved
        if exact.problem:
            # Nothing to measure against: the update is refused, and the next run is measured.
            return exact, None
        before = self.chosen
        self._full = self._cost(self._exact) * exact.steps
        cheapest = min(map(self._cost, self._candidates)) * exact.steps
        self._least = self._cost(self._exact) * marks[0] if marks else cheapest
        measured = self._choose(estimator, exact, marks)
        self._updates += 1
        self._since, self._moved, self._measured_at, self._wider = 0, False, now, False
        stands = before is not None and str(before) == str(self.chosen)
        self._interval = min(2 * self._interval, self.LONGEST) if stands else self.EVERY
        return exact, measured

    def get_state(self) -> dict[str, Any]:
        """What is to be kept where the run is saved, as JSON can hold it."""
        state: dict[str, Any] = {"why": self.why, "since": self._since, "interval": self._interval}
        state["moved"], state["halved"] = self._moved, self._halved
        state["costs"] = [self._walked, self._measuring, self._last, self._full, self._least]
        state["updates"], state["wider"] = self._updates, self._wider
        if self.chosen is not None:
            known = [setting.trajectory for setting in (self._exact, *self._candidates)]
            state["chosen"] = known.index(self.chosen.trajectory)
            state["window"], state["measured_at"] = self.chosen.window, self._measured_at
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from where `get_state` was called."""
        if "chosen" not in state:
            return  # nothing was chosen yet, or it was saved by `Fixed`
        chosen = [self._exact, *self._candidates][state["chosen"]]
        self.chosen = replace(chosen, window=state["window"])
        self.why, self._since, self._interval = state["why"], state["since"], state["interval"]
        self._measured_at = tuple(state["measured_at"])
        self._moved, self._halved = state.get("moved", False), state.get("halved", False)
        costs = [*state.get("costs", ()), *[0.0] * 5]
        self._walked, self._measuring, self._last, self._full, self._least = costs[:5]
        self._updates, self._wider = state.get("updates", 0), state.get("wider", False)

    # Choosing ------------------------------------------------------------------------------------

    def _due(self) -> bool:
        if self.chosen is None:
            return True
        if self._moved and self._affords(self._full):
            return True
        affordable = self._measuring + self._last <= self.SHARE * self._walked
        return self._since >= self._interval and affordable

    def _affords(self, spent: float) -> bool:
        """Whether so many training steps for one measurement are within the budget of update 20.

        What is chosen then is walked either way; it costs as much as the cheapest at least.
        """
        to_come = self._least * max(0, self.SOON - self._updates)
        return self._measuring + spent - self._least <= self.SHARE * (self._walked + to_come)

    def _widen(self, estimator: Estimator) -> None:
        """Walk twice the window: a choice that may not hold any more, and can't be measured yet."""
        assert self.chosen is not None
        if self.chosen.window is None or self._wider:
            return
        wider = replace(self.chosen, window=2 * amount(self.chosen.window, estimator.steps))
        if self._fits(estimator, wider):
            self.chosen, self._wider = wider, True
            self.why = "twice the window: the run has moved, and to measure it is too dear by now"

    def _choose(
        self, estimator: Estimator, exact: Hypergradients, marks: Sequence[int]
    ) -> dict[str, Agreement]:
        optimizer = estimator.model.optimizer
        names = [v.path for v in estimator.tuned]
        best: tuple[float, Setting, dict[str, Agreement]] | None = None
        nearest: tuple[float, Setting, dict[str, Agreement]] | None = None
        full_cost = spent = self._cost(self._exact) * exact.steps
        first = self.chosen is None
        for setting in [self._exact, *self._candidates]:
            more = 0.0 if setting is self._exact else self._cost(setting) * exact.steps
            if not first and more and nearest is not None and not self._affords(spent + more):
                continue
            try:
                walked = exact if setting is self._exact else estimator.walk(setting)
            except LookupError:
                continue  # TensorFlow has no second derivative of a layer
            if setting is not self._exact:
                spent += self._cost(setting) * walked.steps
            # A shorter window is an option where the path is exact; a straight line over it would
            # be another line than the one measured.
            for result in [*(walked.marks if setting is self._exact else ()), walked]:
                if result.problem:
                    continue
                whole = result.steps == estimator.steps
                option = replace(setting, window=None if whole else result.steps)
                if not self._fits(estimator, option):
                    continue
                found = agreement(optimizer, names, result, exact)
                worst = min(a.cosine for a in found.values())
                cost = self._cost(setting) * result.steps
                if worst >= self.wanted and (best is None or cost < best[0]):
                    best = (cost, option, found)
                if nearest is None or worst > nearest[0]:
                    nearest = (worst, option, found)
            if best is not None and best[0] < 0.5 * full_cost:
                # Another walk would cost more than it could save.
                break
        if best is not None:
            cost, self.chosen, found = best
            self._note_costs(cost, spent)
            worst = min(a.cosine for a in found.values())
            self.why = (
                f"cosine {worst:.3f} with the exact hypergradient at {cost / full_cost:.2f} of its "
                f"cost ({self.fidelity} asked)"
            )
            return found
        if nearest is None:
            raise ValueError(
                f"No way to estimate hypergradients fits `memory_limit`={self.memory_limit} bytes. "
                "Raise it, or choose a trajectory by name."
            )
        worst, self.chosen, found = nearest
        self._note_costs(self._cost(self.chosen) * (self.chosen.window or exact.steps), spent)
        self.why = (
            f"cosine {worst:.3f} with the exact hypergradient, the best within the memory limit "
            f"({self.fidelity} asked)"
        )
        return found

    def _note_costs(self, chosen: float, spent: float) -> None:
        self._last = max(0.0, spent - chosen)
        self._measuring += self._last
        self._walked += chosen

    def _fits(self, estimator: Estimator, setting: Setting) -> bool:
        if self.memory_limit is None:
            return True
        return estimator.nbytes(setting) <= self.memory_limit


def _cost_per_step(setting: Setting, halved: bool = False) -> float:
    """Of a walk, in training steps, by the arithmetic of docs/performance.md.

    Not by the clock: the choice would then differ from run to run, and results with it.

    Args:
        setting: With what is walked.
        halved: Whether what a replayed step works out is kept for the walk (`keras_drmad.halves`).
    """
    replaying = 0.5 if halved else 1.0
    return _CURVATURE_COST[setting.curvature] + (
        replaying if isinstance(setting.trajectory, Replay) else 0.0
    )


_CURVATURE_COST = {"gauss_newton": 1.6, "hessian": 2.0, "finite_difference": 2.0}
