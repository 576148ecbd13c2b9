"""The bookkeeping of benchmarks/race.py: what was reached at what cost, and what is kept."""

import math
import pathlib

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import race_results

    return race_results


def raced(method, seed, losses, walks=0.0, l2="layer"):
    """Trainings of 100 steps and 2 CPU seconds, with the validation losses."""
    trials = [
        [100 * i, 100 * i * (1 + walks), 2.0 * i, loss] for i, loss in enumerate(losses, start=1)
    ]
    return {
        "data": "toy", "seed": seed, "l2": l2, "method": method, "steps": 100, "seconds": 2.0,
        "best": min(losses), "test_error": 0.1, "trials": trials,
    }  # fmt: skip


def test_a_loss_is_reached_at_the_first_training_that_is_as_good(results):
    one = raced("DrMAD", 0, [0.5, 0.3, 0.4, 0.2], walks=3.0)
    assert results.needed(one, 0.3, "training steps run") == 2
    assert results.needed(one, 0.3, "steps with walks back") == 8
    assert results.needed(one, 0.25, "CPU seconds") == 4
    assert math.isinf(results.needed(one, 0.1, "CPU seconds"))


def test_the_curve_never_rises_and_is_nan_before_the_first_training(results):
    one = raced("Optuna", 0, [0.5, 0.3, 0.4, 0.2])
    curve = results.best_so_far(one, "CPU seconds", np.array([0.5, 1.0, 2.5, 3.0, 9.0]))
    np.testing.assert_array_equal(curve, [np.nan, 0.5, 0.3, 0.3, 0.2])


def test_the_table_compares_seed_by_seed(results):
    known = [raced("Optuna", seed, [0.5, 0.2 + seed]) for seed in range(3)]
    known += [raced("DrMAD", seed, [0.3, 0.25]) for seed in range(3)]
    row = results.how_soon(results.of_data(known, "toy")).splitlines()[-1]
    # Never on seed 0, at once on the others: the median is one training of the thirty.
    assert row == "| DrMAD | Optuna | 2 of 3 | 0.03 | 0.03 | 0.03 |"


def test_a_new_measurement_takes_the_place_of_the_old_one(results, tmp_path):
    path = tmp_path / "race.json"
    results.merge(path, [raced("DrMAD", 0, [0.5]), raced("DrMAD", 0, [0.6], l2="neuron")])
    results.merge(path, [raced("DrMAD", 0, [0.4])])
    assert [(x["l2"], x["best"]) for x in results.load(path)] == [("layer", 0.4), ("neuron", 0.6)]


@pytest.fixture
def newton(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import race_newton

    return race_newton


def test_bfgs_follows_a_curved_valley(newton):
    calls = []

    def valley(x, bound):
        calls.append(x)
        value = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        slope = np.array([
            -400 * x[0] * (x[1] - x[0] ** 2) - 2 * (1 - x[0]), 200 * (x[1] - x[0] ** 2)
        ])  # fmt: skip
        return value, slope if value < bound else None

    end, inverse = newton.bfgs(valley, np.array([-1.2, 1.0]), lambda: len(calls) < 80)
    np.testing.assert_allclose(end, 1.0, atol=1e-4)
    hessian = np.array([[802.0, -400.0], [-400.0, 200.0]])
    np.testing.assert_allclose(inverse @ hessian, np.eye(2), atol=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("per", ["layer", "neuron"])
def test_the_hypergradient_of_a_race_agrees_with_differences(newton, per):
    import race_problem

    problem = race_problem.Problem("digits", 100, per, None)
    one = newton.Hypergradient(problem)
    assert problem.spent == 0
    point = one.start() + np.array([0.5, 0.2, 0.3, 4.0, 4.0])
    _, slope = one(point, 2, math.inf)
    assert problem.spent == pytest.approx(0.2 * (1 + newton.WALK))
    for i in range(5):
        step = np.eye(5)[i] * 0.02
        losses = [one(point + sign * step, 2, -math.inf)[0] for sign in (1, -1)]
        difference = (losses[0] - losses[1]) / 0.04
        assert slope[i] == pytest.approx(difference, rel=0.02, abs=2e-5)
    if per == "neuron":
        one.fine = True
        layer = [list(race_problem.START).index(name) for name in one.fine_names()]
        assert len(layer) == 3 + 50 + 10
        _, parts = one(point[layer], 2, math.inf)
        sums = [parts[np.array(layer) == i].sum() for i in range(5)]
        np.testing.assert_allclose(sums, slope, rtol=1e-4)


@pytest.mark.slow
def test_a_convolutional_net_has_the_same_five(newton):
    import race_problem

    folder = BENCHMARKS.parent.parent / "shared" / "data" / "tfds"
    if not (folder / "cifar10").is_dir():
        pytest.skip("no prepared TFDS folder of cifar10 beside the project")
    problem = race_problem.Problem("cifar10", 100, "layer", str(folder))
    optimizer = problem.model.optimizer
    assert [race_problem.key_of(group) for group in optimizer.groups] == list(race_problem.START)
    problem.set({**race_problem.START, "l2/hidden": 0.02, "1 - momentum": 0.3})
    found = dict(zip(race_problem.START, optimizer.values(), strict=True))
    assert float(found["l2/hidden"][0]) == pytest.approx(0.02)
    assert float(found["1 - momentum"][0]) == pytest.approx(0.7)
    assert len(problem.validation[0]) == 1000
    assert abs(problem.validation[0]).max() <= 0.5
