"""The scale of the initial weights: its hypergradient, its life in a fit, its refusals."""

import fits
import keras
import numpy as np
import pytest

import keras_drmad as kd

UNITS = 4


def model_of(seed=0, **options):
    """Two dense layers on five inputs, tanh between them."""
    fits.start(seed)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(UNITS, "tanh", name="first", bias_initializer="ones"),
            keras.layers.Dense(fits.CLASSES, name="second"),
        ]
    )
    return fits.compiled(model, **options)


def fitted(spec, restart=True, updates=1, step=0.0, **options):
    x, y = fits.examples(24)
    model = model_of()
    first = [w.copy() for w in model.get_weights()]
    callback = fits.callback(
        fits.examples(9, seed=1),
        restart=restart,
        horizon=2,
        initial_scale=spec,
        outer_optimizer=keras.optimizers.SGD(step),
        **options,
    )
    model.fit(x, y, 6, 2 * updates, shuffle=False, verbose=0, callbacks=[callback])
    return model, callback, first


def outer_loss(first, scales):
    """After a plain training from scaled first weights."""
    x, y = fits.examples(24)
    model = model_of()
    model.set_weights([w * s for w, s in zip(first, scales, strict=True)])
    model.fit(x, y, 6, 2, shuffle=False, verbose=0)
    return fits.evaluated(model, *fits.examples(9, seed=1))


def difference(first, scales, i, step=1e-5):
    """By the scale of both weights of the i-th layer."""
    ends = []
    for sign in (1, -1):
        moved = list(scales)
        for k in (2 * i, 2 * i + 1):
            moved[k] = moved[k] + sign * step
        ends.append(outer_loss(first, moved))
    return (ends[0] - ends[1]) / (2 * step)


def test_by_layer_it_agrees_with_finite_differences(float64):
    spec = kd.Hyperparameter({"first": 0.7, "*": 1.3}, per="layer")
    _, callback, first = fitted(spec)
    record = callback.history[0]
    assert record.hyperparameters["initial_scale"].keys() == {"first", "second"}
    np.testing.assert_allclose(record.hyperparameters["initial_scale"]["first"], 0.7)
    for i, layer in enumerate(("first", "second")):
        expected = difference(first, [0.7, 0.7, 1.3, 1.3], i)
        found = record.hypergradients["initial_scale"][layer]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_by_model_it_is_the_sum_over_layers(float64):
    _, by_model, _ = fitted(kd.Hyperparameter(0.8))
    _, by_layer, _ = fitted(kd.Hyperparameter(0.8, per="layer"))
    _, by_neuron, _ = fitted(kd.Hyperparameter(0.8, per="neuron"))
    one, few, many = (
        c.history[0].hypergradients["initial_scale"] for c in (by_model, by_layer, by_neuron)
    )
    assert many["first"].shape == (UNITS,)
    np.testing.assert_allclose(one["model"], sum(few.values()), rtol=1e-9)
    for layer, value in few.items():
        np.testing.assert_allclose(many[layer].sum(), value, rtol=1e-9)


def test_every_horizon_starts_from_the_first_weights_times_the_present_scale(float64):
    model, callback, first = fitted(kd.Hyperparameter(0.7, per="layer"), updates=3, step=0.5)
    values = [r.hyperparameters["initial_scale"] for r in callback.history]
    assert len(values) == 3
    for before, after, record in zip(values, values[1:], callback.history, strict=False):
        for layer in before:
            # A step of gradient descent on the logarithm.
            slope = record.hypergradients["initial_scale"][layer] * before[layer]
            np.testing.assert_allclose(after[layer], before[layer] * np.exp(-0.5 * slope), 1e-9)
            assert after[layer] != before[layer]
    for record in callback.history:
        scales = np.repeat([float(v) for v in record.hyperparameters["initial_scale"].values()], 2)
        others = {k: v for k, v in record.hyperparameters.items() if k != "initial_scale"}
        if record is callback.history[0]:
            np.testing.assert_allclose(outer_loss(first, scales), record.outer_loss, rtol=1e-12)
        assert others.keys() == {"learning_rate", "l2"}
    callback.restore_first_weights()
    now = [float(v[0]) for v in callback._space.scale.values(model)]
    for weight, start, scale in zip(model.get_weights(), first, np.repeat(now, 2), strict=True):
        np.testing.assert_allclose(weight, scale * start, rtol=1e-12)


def test_fresh_weights_are_scaled_as_well(float64):
    _, callback, _ = fitted(kd.Hyperparameter(0.7), restart="fresh", updates=3, step=0.1)
    gradients = [r.hypergradients["initial_scale"]["model"] for r in callback.history]
    assert len(set(map(float, gradients))) == 3
    assert all(r.accepted for r in callback.history)


def test_it_is_in_the_summary_and_the_logs(capsys, tmp_path):
    _, callback, _ = fitted(
        kd.Hyperparameter(0.7, per="layer"), trajectory="replay", updates=2, log_dir=tmp_path
    )
    callback.summary()
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("initial_scale"))
    assert row.split()[1:3] == ["layer", "2"]
    assert list((tmp_path / "drmad").iterdir())
    path = tmp_path / "history.npz"
    kd.reports.save_history(callback.history, path)
    loaded = kd.reports.load_history(path)
    assert "initial_scale" in loaded[-1].hypergradients


def test_auto_walks_to_the_first_step():
    _, callback, _ = fitted(kd.Hyperparameter(0.7), trajectory="auto", updates=4)
    for record in callback.history:
        assert record.accepted
        assert "window" not in record.setting
        assert np.isfinite(record.hypergradients["initial_scale"]["model"])


def test_it_can_be_all_that_is_tuned():
    model = model_of(optimizer=kd.optimizers.SGD(0.1))
    callback = fits.callback(
        fits.examples(9, seed=1),
        restart=True,
        initial_scale=kd.Hyperparameter(1.0),
        trajectory="stored",
    )
    model.fit(*fits.examples(24), epochs=3, verbose=0, callbacks=[callback])
    values = [float(r.hyperparameters["initial_scale"]["model"]) for r in callback.history]
    assert values[0] == 1.0
    assert len(set(values)) == 3


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(), "restart=False"),
        (dict(restart=True, window=0.5, trajectory="replay"), "whole horizon"),
        (dict(restart=True, initial_scale=kd.Hyperparameter(1.0, over="epoch")), "no schedule"),
        (dict(restart=True, initial_scale=1.0), "is a Hyperparameter"),
    ],
)
def test_what_it_refuses(options, says):
    options.setdefault("initial_scale", kd.Hyperparameter(1.0))
    with pytest.raises((ValueError, TypeError), match=says) as error:
        kd.DrMADCallback(fits.examples(9), **options)
    assert "`initial_scale`" in str(error.value)


def test_a_saved_run_goes_on_with_its_scales(tmp_path, float64):
    def callback():
        return fits.callback(
            fits.examples(9, seed=1),
            restart=True,
            trajectory="stored",
            initial_scale=kd.Hyperparameter(0.7, per="layer"),
        )

    def fit(model, callback, first, epochs):
        options = dict(batch_size=6, shuffle=False, verbose=0, initial_epoch=first, epochs=epochs)
        model.fit(*fits.examples(24), callbacks=[callback], **options)

    first, model = callback(), model_of()
    fit(model, first, 0, 2)
    model.save(tmp_path / "model.keras")
    fit(model, first, 2, 3)
    loaded, second = keras.saving.load_model(tmp_path / "model.keras"), callback()
    fit(loaded, second, 2, 3)
    for a, b in zip(first.history, second.history, strict=True):
        fits.assert_near(a.hyperparameters["initial_scale"], b.hyperparameters["initial_scale"])
    assert len(first.history) == 3
    assert first.history[2].outer_loss == second.history[2].outer_loss
    now = [c._space.scale.values(m) for c, m in ((first, model), (second, loaded))]
    fits.assert_near(*now)
