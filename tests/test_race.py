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
