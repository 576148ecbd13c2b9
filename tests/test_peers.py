"""What benchmarks/peers.py compares with, and its bookkeeping; none of the peers is needed."""

import pathlib

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__


@pytest.fixture
def problem(module):
    found = module("peers_problem")
    rng = np.random.default_rng(1)
    return found.Problem(
        rng.normal(size=(4, found.BATCH, 784)).astype("float32"),
        rng.integers(0, 10, (4, found.BATCH)).astype("int32"),
        rng.normal(size=(30, 784)).astype("float32"),
        rng.integers(0, 10, 30).astype("int32"),
        found._initial_weights(rng),
    )


@pytest.mark.parametrize("name", ["RATE", "PENALTY"])
def test_the_exact_hypergradient_agrees_with_finite_differences(module, problem, monkeypatch, name):
    found = module("peers_problem")
    _, by_l2, by_rate = found.exact(problem)
    total = by_rate.sum() if name == "RATE" else by_l2.sum()  # all of them are moved at once
    at, step, losses = getattr(found, name), 1e-6, []
    for value in (at - step, at + step):
        monkeypatch.setattr(found, name, value)
        losses.append(found.exact(problem)[0])
    assert (losses[1] - losses[0]) / (2 * step) == pytest.approx(total, rel=1e-6)


def test_a_problem_is_read_back_as_it_was_saved(problem, tmp_path):
    problem.save(tmp_path / "problem.npz")
    again = type(problem).load(tmp_path / "problem.npz")
    for name in ("x", "y", "hyper_x", "hyper_y"):
        np.testing.assert_array_equal(getattr(again, name), getattr(problem, name))
    for a, b in zip(again.weights, problem.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def measured(first, training, both, **more):
    seconds = {"training": [[first, first]], "both": [[first, first]], **more}
    seconds["training"] += [[t, 2 * t] for t in training]
    seconds["both"] += [[t, 2 * t] for t in both]
    return {
        "seconds": seconds, "peaks": {"training": 1.0, "both": 2.0, "both, first time": 3.0},
        "cosine": {"l2": 1.0, "rates": 1.0}, "norm": {"l2": 1.0, "rates": 1.0}, "loss": 0.5,
        "products": None,
    }  # fmt: skip


def test_medians_leave_the_first_call_of_each_process_out(module):
    results = module("peers_results")
    row = results.summary([measured(9.0, [1.0, 2.0], [4.0]), measured(9.0, [3.0], [6.0])])
    assert row["rounds"] == 2
    assert row["seconds"]["training"] == {
        "cpu": 2.0, "clock": 4.0, "cpu spread": [1.0, 3.0], "first, more": 7.0,
    }  # fmt: skip
    assert results.in_graph(row) == (2.0, 5.0)


def test_ours_is_told_without_keras_by_what_comes_after_the_training(module):
    results = module("peers_results")
    more = {"training, graph": [[5.0, 5.0], [0.5, 0.5]], "after training": [[1.5, 1.5]]}
    row = results.summary([measured(9.0, [3.0], [6.0], **more)])
    assert results.in_graph(row) == (0.5, 2.0)


def test_new_rows_take_the_place_of_old_ones_only(module, tmp_path):
    results = module("peers_results")
    path = tmp_path / "peers.json"
    for steps, name, value in ((200, "a", 1), (200, "b", 2), (1000, "a", 3), (200, "a", 4)):
        results.merge(path, steps, name, {"value": value})
    assert results.load(path) == {
        "200": {"a": {"value": 4}, "b": {"value": 2}},
        "1000": {"a": {"value": 3}},
    }
