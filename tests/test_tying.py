"""One value in several places, values that stand still, and values layer by layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_drmad as kd

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 3)), RNG.normal(size=(12, 2))
HYPER = RNG.normal(size=(6, 3)), RNG.normal(size=(6, 2))


def net(optimizer, frozen=()):
    model = keras.Sequential([keras.Input((3,))])
    for name, units in (("backbone_a", 4), ("backbone_b", 4), ("head", 2)):
        model.add(keras.layers.Dense(units, "tanh", name=name))
        model.layers[-1].trainable = name not in frozen
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    return model


def fit(model, callback=None, epochs=1):
    callbacks = [] if callback is None else [callback]
    model.fit(X, Y, 4, epochs, shuffle=False, verbose=0, callbacks=callbacks)


def callback(**options):
    return kd.DrMADCallback(HYPER, "sgd", trajectory="stored", curvature="hessian", **options)


def differences(model, i, start):
    """By central differences of a real fit: the outer loss by the i-th raw variable, one value."""
    losses = []
    for shift in (1e-5, -1e-5):
        for variable, value in start:
            variable.assign(value)
        model.optimizer.raw_variables[i].assign_add([shift])
        fit(model)
        losses.append(float(np.mean((model(HYPER[0]) - HYPER[1]) ** 2)))
    return (losses[0] - losses[1]) / 2e-5


def _two_arguments():
    shared = kd.Hyperparameter(0.9, name="betas")
    return kd.optimizers.Adam(0.05, beta_1=shared, beta_2=shared, epsilon=0.01)


def _two_layers():
    shared = kd.Hyperparameter(0.2)
    rates = {"backbone_a": shared, "head": shared, "*": 0.05}
    return kd.optimizers.SGD(rates, momentum=0.9)


def _both():
    shared = kd.Hyperparameter(0.05)
    decay = {"head": shared, "*": 0.0}
    return kd.optimizers.SGD(0.2, l2={"*_a": shared, "*": 0.01}, weight_decay=decay)


@pytest.mark.parametrize("make", [_two_arguments, _two_layers, _both])
def test_one_object_is_one_value_with_the_summed_hypergradient(float64, make):
    model = net(make())
    optimizer = model.optimizer
    assert len(optimizer.groups) == len(optimizer.raw_variables) == 1
    start = [(v, v.numpy()) for v in [*model.variables, *optimizer.variables]]
    tuning = callback()
    fit(model, tuning)
    ((_, layers),) = tuning.history[0].hypergradients.items()
    ((_, found),) = layers.items()
    group = optimizer.groups[0]
    raw = tf.constant(group.domain.raw(group.initial), "float64")
    expected = differences(model, 0, start)
    assert abs(found * float(group.domain.slope(raw)) - expected) <= 1e-6 * abs(expected)
    # And it stays one through a config.
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is type(optimizer) and again.get_config() == optimizer.get_config()
    again.build(model.trainable_variables)
    assert len(again.groups) == 1


def test_what_is_not_tunable_stands_still():
    optimizer = kd.optimizers.SGD(
        kd.Hyperparameter(0.1, per="layer", tunable=False), momentum=kd.Hyperparameter(0.9)
    )
    model, tuning = net(optimizer), callback()
    fit(model, tuning, epochs=3)
    first, *_, last = tuning.history
    assert np.any(first.hypergradients["learning_rate"]["head"])
    assert last.hyperparameters["learning_rate"] == first.hyperparameters["learning_rate"]
    assert last.hyperparameters["momentum"] != first.hyperparameters["momentum"]
    with pytest.raises(ValueError, match="There is nothing to tune"):
        fit(net(kd.optimizers.SGD(kd.Hyperparameter(0.1, tunable=False))), callback())


def test_rates_layer_by_layer_with_a_frozen_backbone():
    rates = kd.Hyperparameter({"backbone*": 0.01, "head": 0.3}, per="layer")
    model = net(kd.optimizers.SGD(rates), frozen=["backbone_a"])
    frozen = model.layers[0].get_weights()
    tuning = callback()
    fit(model, tuning, epochs=2)
    first, last = tuning.history
    assert {k: round(float(v), 6) for k, v in first.hyperparameters["learning_rate"].items()} == {
        "backbone_b": 0.01,
        "head": 0.3,
    }
    assert all(last.hyperparameters["learning_rate"][k] != v
               for k, v in first.hyperparameters["learning_rate"].items())  # fmt: skip
    for before, after in zip(frozen, model.layers[0].get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_numbers_layer_by_layer_need_no_tuning():
    rates = {"backbone*": 0.01, "head": 0.3}
    model = net(kd.optimizers.SGD(rates))
    start = model.get_weights()
    fit(model)
    ends = []
    for rate in rates.values():
        other = net(kd.optimizers.SGD({"*": rate}))
        other.set_weights(start)
        other.fit(X[:4], Y[:4], 4, shuffle=False, verbose=0)
        ends.append(other.get_weights())
    model.set_weights(start)
    model.fit(X[:4], Y[:4], 4, shuffle=False, verbose=0)
    for slow, fast in zip(*ends, strict=True):
        assert not np.array_equal(slow, fast)
    np.testing.assert_array_equal(model.get_weights()[0], ends[0][0])
    np.testing.assert_array_equal(model.get_weights()[-2], ends[1][-2])
    np.testing.assert_allclose(model.optimizer.learning_rate, (4 * 0.01 + 2 * 0.3) / 6, rtol=1e-6)
    with pytest.raises(ValueError, match="differs from layer to layer"):
        model.optimizer.learning_rate = 0.1


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(learning_rate={"body": 0.1, "*": 1.0}), ValueError, "names 'body', which no layer"),
        (dict(l2={"head": 0.1}), ValueError, "no value for layer 'backbone_a'.*'\\*' for all"),
        (dict(l2={}), TypeError, "holds layer names or globs"),
        (dict(l2={"*": "much"}), TypeError, r"`l2\['\*'\]` is a float"),
        (dict(momentum={"*": 1.5}), ValueError, r"`momentum\['\*'\]` is a finite number from 0.0"),
        (
            dict(l2={"*": kd.Hyperparameter(0.1), "head": kd.Hyperparameter(0.1)}),
            ValueError,
            "names \\['head'\\] behind a pattern",
        ),
        (
            dict(
                l1={"head": kd.Hyperparameter(0.1, name="a"), "*": 0.0},
                l2={"head": kd.Hyperparameter(0.1, name="a"), "*": 0.0},
            ),
            ValueError,
            "Two Hyperparameters would be recorded as 'a' of 'head'",
        ),
        (
            dict(
                l2={"head": kd.Hyperparameter(0.1), "*": kd.Hyperparameter(0.1)},
                penalize=lambda variable: "head" not in variable.path,
            ),
            ValueError,
            "'l2' acts on no variable",
        ),
        (
            dict.fromkeys(("momentum", "l2"), kd.Hyperparameter(0.5)),
            ValueError,
            "shared by arguments of different domains.*'l2'",
        ),
        (
            dict(global_clipnorm=kd.Hyperparameter(1.0, per="layer")),
            ValueError,
            "`global_clipnorm` is one value",
        ),
        (dict(clipnorm=1.0, clipvalue=1.0), ValueError, "At most one gradient clipping"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        net(kd.optimizers.SGD(**arguments))
