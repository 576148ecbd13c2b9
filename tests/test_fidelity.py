"""Choosing by measurement, verification, and the guards around a walk."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_drmad as kd
from keras_drmad import estimator as estimation
from keras_drmad import fidelity
from keras_drmad.estimator import Hypergradients
from keras_drmad.settings import Setting
from keras_drmad.trajectories import Linear


def _data(seed=0, examples=60):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(examples, 6)).astype("float32"), rng.integers(0, 3, examples)


def _model(rate=0.2, per="layer", **arguments):
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)]
    )
    arguments = {"l2": kd.Hyperparameter(1e-2, per="input"), **arguments}
    model.compile(
        kd.optimizers.SGD(kd.Hyperparameter(rate, per=per), momentum=0.5, **arguments),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return model


def _fit(model, epochs=1, **arguments):
    callback = kd.DrMADCallback(_data(1, 30), **arguments)
    model.fit(*_data(), batch_size=10, epochs=epochs, verbose=0, callbacks=[callback])
    return callback


# Agreement ---------------------------------------------------------------------------------------


def _found(*values):
    return Hypergradients(1.0, [tf.constant(v) for v in values], [], None, 1, 1.0)


def test_agreement_of_known_vectors():
    model = _model()
    model.optimizer.build(model.trainable_variables)
    groups = model.optimizer.groups
    exact = [np.ones((1, *g.shape), "float32") for g in groups]
    half = [0.5 * e for e in exact]
    half[0] = -half[0]  # the first layer's learning rate
    found = fidelity.agreement(model.optimizer, [], _found(*half), _found(*exact))
    assert found["l2"] == fidelity.Agreement(pytest.approx(1.0), 1.0, pytest.approx(0.5))
    assert found["learning_rate"].cosine == pytest.approx(0.0, abs=1e-6)
    assert found["learning_rate"].signs == 0.5
    nothing = [np.zeros_like(e) for e in exact]
    lost = fidelity.agreement(model.optimizer, [], _found(*nothing), _found(*exact))
    assert lost["l2"].cosine == 0.0 and lost["l2"].norm == 0.0


def test_what_is_held_still_does_not_count():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = kd.optimizers.SGD(
        kd.Hyperparameter(0.1), momentum=kd.Hyperparameter(0.5, tunable=False)
    )
    optimizer.build(model.trainable_variables)
    values = [np.ones((1,), "float32")] * 2
    found = fidelity.agreement(optimizer, [], _found(*values), _found(*values))
    assert set(found) == {"learning_rate"}


# Auto --------------------------------------------------------------------------------------------


def test_auto_measures_first_then_uses_what_it_chose(capsys):
    model = _model()
    callback = kd.DrMADCallback(_data(1, 30))
    model.fit(*_data(), batch_size=10, epochs=3, verbose=2, callbacks=[callback])
    first, *others = callback.history
    assert set(first.verification) == {"learning_rate", "l2"}
    assert min(a["cosine"] for a in first.verification.values()) >= 0.9
    assert all(record.verification is None for record in others)
    assert len({record.setting for record in callback.history}) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DrMAD:")]
    assert len(said) == 1 and re.search(r"cosine [01]\.\d+ with the exact", said[0])


def test_auto_uses_the_exact_hypergradient_of_the_run_that_it_measures(float64):
    keras.utils.set_random_seed(1)
    auto = _fit(_model()).history[0]
    keras.utils.set_random_seed(1)
    exact = _fit(_model(), trajectory="stored").history[0]
    for key, value in kd.reports.flat(auto.hypergradients).items():
        layer = key.split("/")[0]
        expected = kd.reports.flat(exact.hypergradients)
        matching = [
            v for k, v in expected.items() if k.startswith(layer) and v.shape == value.shape
        ]
        assert any(np.allclose(value, v, rtol=1e-9) for v in matching), key


def test_auto_measures_again_after_some_updates(monkeypatch):
    monkeypatch.setattr(fidelity.Auto, "EVERY", 2)
    monkeypatch.setattr(fidelity.Auto, "SHARE", np.inf)
    callback = _fit(_model(), epochs=7)
    measured = [record.verification is not None for record in callback.history]
    # Doubled where the choice stands; at once where it does not.
    assert measured[:4] == [True, False, False, True]


class Walks:
    """Stands in for an estimator of a run of 500 steps."""

    steps, halved = 500, False

    def walk(self, setting, marks=()):
        return Hypergradients(1.0, [], [], None, setting.window or self.steps, 0.0)


def _auto_that_chooses(monkeypatch, window, cost):
    """An `Auto` that always finds this window of the exact walk good enough."""
    auto = fidelity.Auto()

    def choose(estimator, exact, marks):
        auto.chosen = Setting(auto._exact.trajectory, "hessian", window)
        auto._note_costs(cost * window, cost * Walks.steps)
        return {}

    monkeypatch.setattr(auto, "_choose", choose)
    return auto


@pytest.mark.parametrize("window", [62, 250])
def test_measuring_adds_at_most_half_to_what_was_chosen(monkeypatch, window):
    steps, cost, measured = Walks.steps, 3.0, []
    auto = _auto_that_chooses(monkeypatch, window, cost)
    for update in range(1, 101):
        assert len(auto.settings()) == (4 if auto._due() else 1)
        # A fresh object goes on from what was kept.
        other = fidelity.Auto()
        other.set_state(auto.get_state())
        assert other._due() == auto._due()
        found = auto.hypergradients(Walks(), 1.0, 0.1)[1]
        if found is not None:
            measured.append(update)
        total = cost * (steps * len(measured) + window * (update - len(measured)))
        if update >= 20:
            assert total <= 1.5 * cost * window * update
    assert len(measured) >= 3
    # Where the run has moved it is measured at once, as long as there is budget for it.
    monkeypatch.setattr(auto, "SOONEST", 1)
    monkeypatch.setattr(auto, "_measuring", 0.0)
    auto.hypergradients(Walks(), 10.0, 0.1)
    assert auto._due()


@pytest.mark.parametrize("window", [62, 125, 250])
@pytest.mark.parametrize("every", [2, 7, 12])
def test_measuring_adds_at_most_half_however_often_the_run_moves(monkeypatch, window, every):
    steps, cost, walked, measured = Walks.steps, 3.0, [], 0
    auto = _auto_that_chooses(monkeypatch, window, cost)
    for update in range(1, 61):
        loss = 10.0 ** (update // every)
        used, found = auto.chosen, auto.hypergradients(Walks(), loss, 0.1)[1]
        measured += found is not None
        walked.append(cost * (window if found is not None else used.window))
        # What measuring cost: the exact walks, without what the chosen ones would have cost.
        added = measured * cost * (steps - window)
        if update >= 20:
            assert added <= 0.5 * sum(walked) + 1e-9
    assert measured >= 3
    if window == 62:  # not to be paid for before update 20: the window is doubled meanwhile
        assert 2 * cost * window in walked[:20]


def test_auto_measures_again_when_the_learning_rate_has_moved_much(monkeypatch):
    monkeypatch.setattr(fidelity.Auto, "SOONEST", 1)
    model = _model(per="model")
    callback = _fit(model, epochs=4, outer_optimizer=kd.optimizers.Sign(1.0))
    rates = [record.hyperparameters["learning_rate"]["model"] for record in callback.history]
    assert max(rates) / min(rates) > 2.0
    assert sum(record.verification is not None for record in callback.history) >= 2


def test_auto_takes_the_best_within_the_memory_limit():
    model = _model()
    callback = _fit(model, memory_limit=9_000)
    chosen = callback.history[0].setting
    assert chosen.startswith(("linear", "piecewise")) or "window" in chosen
    with pytest.raises(ValueError, match="memory_limit"):
        _fit(_model(), memory_limit=10)


def test_a_bad_estimator_is_never_chosen(monkeypatch):
    real = estimation.Estimator.walk

    def spoiled(self, setting, marks=()):
        found = real(self, setting, marks)
        if not setting.trajectory.exact:
            found.values[:] = [-v for v in found.values]
        return found

    monkeypatch.setattr(estimation.Estimator, "walk", spoiled)
    assert _fit(_model()).history[0].setting.startswith("replay")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 10}, "chosen by trajectory='auto'"),
        ({"curvature": "gauss_newton"}, "Name a trajectory"),
        ({"fidelity": 1.5}, "`fidelity` is a number"),
        ({"verify_every": 0}, "`verify_every` is a whole number"),
    ],
)
def test_what_auto_can_not_take_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kd.DrMADCallback(_data(), **arguments)


# Verification ------------------------------------------------------------------------------------


def test_verify_every_compares_with_the_exact_walk():
    callback = _fit(_model(), epochs=4, trajectory="linear", verify_every=2)
    measured = [record.verification is not None for record in callback.history]
    assert measured == [True, False, True, False]
    assert 0.5 < callback.history[0].verification["l2"]["cosine"] <= 1.0 + 1e-6


def test_verify_hypergradients_agrees_with_finite_differences(float64):
    model = _model()
    before = model.get_weights()
    x, y = _data()
    found = kd.verify_hypergradients(
        model, x.astype("float64"), y, hyper_data=_data(1, 30), batch_size=10, epochs=2
    )
    assert found.steps == 12
    assert {p.argument for p in found.probes} == {"learning_rate", "l2"}
    for probe in found.probes:
        assert probe.hypergradient == pytest.approx(probe.difference, rel=1e-4), probe
    assert "cosine" in str(found) and "difference" in str(found)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(model.optimizer.iterations) == 0


def test_hypergradients_moves_nothing():
    model = _model()
    before = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
    x, y = _data()
    record = kd.hypergradients(model, x, y, hyper_data=_data(1, 30), batch_size=10, epochs=2)
    assert record.setting == "replay, hessian" and record.step == 12
    assert np.isfinite(record.hypergradients["learning_rate"]["dense"])
    for old, variable in zip(before, model.variables, strict=False):
        if "seed" not in variable.path:
            np.testing.assert_array_equal(old, variable.numpy())


# Guards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [kd.hypergradients, kd.verify_hypergradients])
def test_a_measurement_leaves_schedules_and_seeds_as_they_were(measure):
    """It has another horizon than the tuning, to which schedules are resampled meanwhile."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dropout(0.5), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    rate = kd.Hyperparameter(0.05, over="epoch")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(kd.optimizers.SGD(rate), loss, jit_compile=False)
    x, y = np.random.default_rng(0).normal(size=(12, 4)), np.arange(12) % 3
    hyper = np.random.default_rng(1).normal(size=(6, 4)), np.arange(6) % 3
    callback = kd.DrMADCallback(hyper, horizon=3, trajectory="linear")
    model.fit(x, y, 4, epochs=3, verbose=0, callbacks=[callback])
    optimizer = model.optimizer
    before = [v.numpy() for v in (*model.variables, *optimizer.variables)]
    assert optimizer.horizon == (3, 9) and np.ptp(optimizer.values()[0].numpy()) > 0
    measure(model, x, y, hyper_data=hyper, batch_size=4)
    assert optimizer.horizon == (3, 9)
    for old, variable in zip(before, (*model.variables, *optimizer.variables), strict=True):
        np.testing.assert_array_equal(old, variable.numpy())
    model.fit(x, y, 4, verbose=0)  # with the variables that there are now


def test_an_exploding_hessian_falls_back_to_gauss_newton(monkeypatch):
    monkeypatch.setattr(estimation, "GROWTH_LIMIT", 1e-6)
    model = _model()
    real = estimation.curvatures.get

    def only_hessian_explodes(name):
        limit = 1e-6 if name == "hessian" else 1e6
        monkeypatch.setattr(estimation, "GROWTH_LIMIT", limit)
        return real(name)

    monkeypatch.setattr(estimation.curvatures, "get", only_hessian_explodes)
    with pytest.warns(UserWarning, match="walked with Gauss-Newton instead"):
        callback = _fit(model, trajectory="linear", curvature="hessian")
    fallen = callback.history[0]
    assert fallen.accepted
    assert all(np.all(np.isfinite(v)) for v in kd.reports.flat(fallen.hypergradients).values())


def test_an_exploding_adjoint_moves_nothing(monkeypatch):
    monkeypatch.setattr(estimation, "GROWTH_LIMIT", 1e-6)
    model = _model()
    with pytest.warns(UserWarning, match="skipped: the adjoint exploded"):
        callback = _fit(model, trajectory="linear")
    record = callback.history[0]
    assert not record.accepted and "exploded" in record.reason
    assert model.optimizer.values()[0].numpy() == pytest.approx(0.2)


def test_a_diverged_training_moves_nothing():
    model = _model(rate=1e30)
    before = [raw.numpy() for raw in model.optimizer.raw_variables]
    with pytest.warns(UserWarning, match="outer loss is not finite"):
        callback = _fit(model, epochs=2)
    assert [r.accepted for r in callback.history] == [False, False]
    for raw, old in zip(model.optimizer.raw_variables, before, strict=False):
        np.testing.assert_array_equal(raw, old)


def test_the_raw_step_is_bounded():
    model = _model()
    _fit(model, trajectory="linear", outer_optimizer=keras.optimizers.SGD(1e20), max_step=0.25)
    start = {"learning_rate": np.log(0.2), "l2": np.log(1e-2)}
    for group, raw in zip(model.optimizer.groups, model.optimizer.raw_variables, strict=True):
        moved = np.abs(raw.numpy() - start[group.argument])
        assert np.all(moved <= 0.25 + 1e-5) and np.any(moved > 0.2)


def test_setting_reads_well():
    assert str(Setting(Linear(), "gauss_newton", 100, 0.5)) == (
        "linear, gauss_newton, window 100, visiting 0.5"
    )
