"""DrMAD itself: hypergradients on a straight line or a polyline, against explicit matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import oracle
import pytest
import small_net

import keras_drmad as kd

ALL = tuple(range(oracle.STEPS))
EVEN = kd.trajectories.Linear("steps")


@dataclass(frozen=True)
class Case:
    """Arguments of the callback, and what they mean step by step."""

    arguments: dict
    grain: oracle.Grain
    anchors: tuple = (0, oracle.STEPS)
    line: Callable = oracle.polyline
    visits: tuple = ALL  # the steps that are walked
    batches: tuple = ALL  # of every step, the step whose batch it is evaluated on

    @property
    def curvature(self) -> str:
        # No path here is exact, so this is the default.
        return self.arguments.get("curvature", "gauss_newton")


def every_batch(**arguments):
    return dict(max_batches=oracle.STEPS, **arguments)


def piecewise(anchors, spacing):
    return kd.trajectories.Piecewise(anchors, spacing)


CASES = {
    "linear-hessian": Case(
        every_batch(trajectory=EVEN, curvature="hessian"), oracle.Grain("neuron", "step")
    ),
    "linear-gauss_newton": Case(
        every_batch(trajectory=EVEN, curvature="gauss_newton"), oracle.Grain("weight", 3)
    ),
    "linear at the run's pace": Case(
        every_batch(trajectory="linear"), oracle.Grain("neuron", "step"), line=oracle.paced_line
    ),
    "linear at the run's pace in a window": Case(
        every_batch(trajectory="linear", window=6, curvature="hessian"),
        oracle.Grain("neuron", "step"),
        anchors=(4, 10),
        visits=(4, 5, 6, 7, 8, 9),
        line=oracle.paced_line,
    ),
    "even-hessian": Case(
        every_batch(trajectory=piecewise(4, "even"), curvature="hessian"),
        oracle.Grain("layer", "step"),
        anchors=(0, 3, 7, 10),
    ),
    "quadratic-gauss_newton": Case(
        every_batch(trajectory=piecewise(4, "quadratic"), curvature="gauss_newton"),
        oracle.Grain("input", "run"),
        anchors=(0, 1, 4, 10),
    ),
    "window": Case(
        every_batch(trajectory=EVEN, window=6, curvature="hessian"),
        oracle.Grain("neuron", "step"),
        anchors=(4, 10),
        visits=(4, 5, 6, 7, 8, 9),
    ),
    "window as a fraction": Case(
        every_batch(trajectory=EVEN, window=0.3),
        oracle.Grain("layer", "epoch"),
        anchors=(7, 10),
        visits=(7, 8, 9),
    ),
    "reverse_steps": Case(
        every_batch(trajectory=EVEN, reverse_steps=4),
        oracle.Grain("model", "step"),
        visits=(0, 3, 6, 9),
    ),
    "reverse_steps within a window": Case(
        every_batch(trajectory=EVEN, window=0.5, reverse_steps=3, curvature="hessian"),
        oracle.Grain("neuron", "run"),
        anchors=(5, 10),
        visits=(5, 7, 9),
    ),
    # One epoch's worth of batches is kept: every second one of the two epochs. A step between two
    # of them takes the later one.
    "batches kept by default": Case(
        dict(trajectory=EVEN),
        oracle.Grain("neuron", "step"),
        batches=(0, 2, 2, 4, 4, 6, 6, 8, 8, 8),
    ),
    "batches kept in a window": Case(
        dict(trajectory=EVEN, window=6, max_batches=3),
        oracle.Grain("weight", "step"),
        anchors=(4, 10),
        visits=(4, 5, 6, 7, 8, 9),
        batches=(4, 4, 4, 4, 4, 6, 6, 8, 8, 8),
    ),
}


def test_the_oracles_agree_with_each_other(float64):
    grain = oracle.Grain("neuron", 3)
    values = small_net.fit(grain, trajectory=EVEN).record.hyperparameters
    train, hyper = oracle.data()
    start, batches = oracle.start_weights(), oracle.batches_of(*train)
    _, _, by_values, by_start = oracle.unroll(start, batches, hyper, values, grain)
    path = oracle.states(start, batches, values, grain)
    walked = oracle.walk_back(path, batches, hyper, values, grain, oracle.hessian, ALL[::-1])
    oracle.assert_same(walked, (by_values, by_start))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_explicit_matrices_on_the_same_path(float64, name):
    case = CASES[name]
    record = small_net.fit(case.grain, **case.arguments).record
    train, hyper = oracle.data()
    batches = oracle.batches_of(*train)
    states = oracle.states(oracle.start_weights(), batches, record.hyperparameters, case.grain)
    by_values, by_start = oracle.walk_back(
        case.line(states, case.anchors),
        [batches[t] for t in case.batches],
        hyper,
        record.hyperparameters,
        case.grain,
        getattr(oracle, case.curvature),
        visits=case.visits[::-1],
    )
    oracle.assert_same(record.hypergradients, by_values)
    if case.visits[0] == 0:
        oracle.assert_same(record.initial_weights_gradient, by_start)
    else:
        assert record.initial_weights_gradient is None
