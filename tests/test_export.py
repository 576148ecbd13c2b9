"""`to_keras` trains on as the tuned optimizer does, or says why no stock optimizer can."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_drmad as kd

STEPS, EPOCHS = 5, 4


def net(optimizer):
    """A net whose gradients differ from step to step, with a constraint."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(
                5, "tanh", kernel_constraint=keras.constraints.MaxNorm(1.2), name="first"
            ),
            keras.layers.Dense(3, name="second"),
        ]
    )
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def trained(model, by_fit=False):
    """Weights after 20 steps."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(20, n)).astype("float32") for n in (6, 3))
    if by_fit:
        model.fit(x, y, batch_size=4, epochs=EPOCHS, shuffle=False, verbose=0)
        return model.get_weights()
    variables = model.trainable_variables
    for step in range(EPOCHS * STEPS):  # the same without a graph, which takes its time to trace
        batch = slice(step % STEPS * 4, step % STEPS * 4 + 4)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[batch]) - y[batch]) ** 2)
        model.optimizer.apply(tape.gradient(loss, variables), variables)
    return model.get_weights()


def tuned(optimizer, horizon=(1, STEPS)):
    """A net whose optimizer has values other than it started from."""
    model = net(optimizer)
    optimizer.build(model.trainable_variables)
    optimizer.set_horizon(*horizon)
    rng = np.random.default_rng(1)
    for raw in optimizer.raw_variables:
        raw.assign_add(rng.normal(0.0, 0.3, raw.shape))
    return model


def value(initial, **grain):
    return kd.Hyperparameter(initial, **grain)


# A factory of ours, and the class that it becomes.
EXPRESSED = {
    "sgd": (
        lambda: kd.optimizers.SGD(value(0.1), weight_decay=value(0.02)),
        keras.optimizers.SGD,
    ),
    "momentum": (
        lambda: kd.optimizers.SGD(value(0.05, over="step"), momentum=value(0.8), clipnorm=0.7),
        keras.optimizers.SGD,
    ),
    "nesterov": (
        lambda: kd.optimizers.SGD(value(0.05, over=2), momentum=value(0.8), nesterov=True),
        keras.optimizers.SGD,
    ),
    "adam": (
        lambda: kd.optimizers.Adam(
            value(0.01, over="epoch"), value(0.8), value(0.95), epsilon=value(1e-4)
        ),
        keras.optimizers.Adam,
    ),
    "amsgrad": (lambda: kd.optimizers.Adam(value(0.01), amsgrad=True), keras.optimizers.Adam),
    "adamw": (
        lambda: kd.optimizers.Adam(value(0.01, over="step"), weight_decay=value(0.05)),
        keras.optimizers.AdamW,
    ),
    "rmsprop": (
        lambda: kd.optimizers.RMSprop(
            value(0.01, over="step"), value(0.8), momentum=value(0.5), centered=True,
            clipvalue=value(0.3),
        ),
        keras.optimizers.RMSprop,
    ),
    "adagrad": (
        lambda: kd.optimizers.Adagrad(value(0.1, over=3), initial_accumulator_value=0.3),
        keras.optimizers.Adagrad,
    ),
    "lion": (
        lambda: kd.optimizers.Lion(
            value(0.01, over="step"), value(0.8), value(0.9), global_clipnorm=value(0.5)
        ),
        keras.optimizers.Lion,
    ),
    "layers that agree": (
        lambda: kd.optimizers.SGD({"first": 0.1, "*": 0.1}, momentum={"*": value(0.5)}),
        keras.optimizers.SGD,
    ),
    "schedule of Keras": (
        lambda: kd.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5), momentum=value(0.5)
        ),
        keras.optimizers.SGD,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSED)
def test_trains_to_the_same_weights(name, tmp_path):
    make, stock = EXPRESSED[name]
    horizon = (2, 2 * STEPS) if name == "adam" else (1, STEPS)  # so that it begins again
    model = tuned(make(), horizon)
    exported = model.optimizer.to_keras()
    assert type(exported) is stock
    start = model.get_weights()
    by_fit = name == "momentum"
    expected = trained(model, by_fit)
    other = net(exported)
    exported.build(other.trainable_variables)
    path = tmp_path / "exported.keras"
    other.save(path)
    found = trained(other, by_fit)
    for a, b, first in zip(found, expected, start, strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)
        assert np.linalg.norm(b - first) > 1e-2
    # A file of it is one of Keras's own.
    loaded = keras.models.load_model(path)
    assert loaded.optimizer.get_config() == exported.get_config()
    if by_fit:
        for a, b in zip(trained(loaded, by_fit), found, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_rate_that_was_set_is_exported():
    model = tuned(kd.optimizers.SGD(0.1, momentum=value(0.5)))
    model.optimizer.learning_rate = 0.03
    assert float(model.optimizer.to_keras().learning_rate) == np.float32(0.03)


def test_variables_that_are_spared_of_decay_still_are():
    ours = kd.optimizers.SGD(value(0.1), weight_decay=value(0.5))
    ours.exclude_from_weight_decay(var_names=["bias"])
    model = tuned(ours)
    exported = ours.to_keras()
    # By name, so that another model's biases are spared as well.
    for a, b in zip(trained(net(exported)), trained(model), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def test_before_the_horizon_is_known_the_first_block_counts():
    model = tuned(kd.optimizers.SGD(value(0.1, over=3)), horizon=(0, 0))
    exported = model.optimizer.to_keras()
    assert isinstance(exported._learning_rate, keras.Variable)
    for a, b in zip(trained(net(exported)), trained(model), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


SGD = kd.optimizers.SGD
REFUSED = {
    "rate of layers": (lambda: SGD(value(0.1, per="layer")), "`learning_rate` differs between"),
    "rate of neurons": (lambda: SGD(value(0.1, per="neuron")), "`learning_rate` differs between"),
    "rates by name": (lambda: SGD({"first": 0.1, "*": 0.2}), "`learning_rate` differs between"),
    "rates in time and space": (
        lambda: SGD({"first": value(0.1, over=2), "*": value(0.1, over=4)}),
        "`learning_rate` differs between",
    ),
    "momentum of layers": (
        lambda: SGD(0.1, value(0.5, per="layer")), "`momentum` differs between.*per='model'"
    ),
    "momentum over time": (
        lambda: SGD(0.1, value(0.5, over="step")), "`momentum` changes over the horizon.*'run'"
    ),
    "beta over time": (
        lambda: kd.optimizers.Adam(beta_1=value(0.9, over=2)), "`beta_1` changes over"
    ),
    "decay over time": (
        lambda: SGD(weight_decay=value(0.1, over=2)), "`weight_decay` changes over"
    ),
    "decay of some": (lambda: SGD(weight_decay={"first": 0.1, "*": 0.0}), "`weight_decay` differs"),
    "clipping over time": (lambda: SGD(clipnorm=value(1.0, over=2)), "`clipnorm` changes over"),
    "l1": (lambda: SGD(l1=value(0.1)), r"`l1`: .*keras.regularizers.L1\(l1\)"),
    "l2": (lambda: SGD(l2=0.1), r"`l2`: .*keras.regularizers.L2\(l2 / 2\)"),
    "dampened": (
        lambda: SGD(0.1, value(0.5), dampened=True), r"`dampened=True`.*\(1 - momentum\), momentum"
    ),
}  # fmt: skip


def test_what_cant_be_said_is_named():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2, name="first"), keras.layers.Dense(2)]
    )
    for make, match in REFUSED.values():  # a test each would take its time to set up
        optimizer = make()
        optimizer.build(model.trainable_variables)
        optimizer.set_horizon(1, 4)
        rng = np.random.default_rng(1)
        for raw in optimizer.raw_variables:
            raw.assign_add(rng.normal(0.0, 0.3, raw.shape))
        with pytest.raises(ValueError, match=match):
            optimizer.to_keras()


def test_everything_that_cant_be_said_is_named_at_once():
    optimizer = SGD(value(0.1), value(0.5, over=2), dampened=True, l1=value(0.1), l2=value(0.1))
    model = tuned(optimizer)
    del model
    with pytest.raises(ValueError) as info:
        optimizer.to_keras()
    message = str(info.value)
    assert message.startswith("keras.optimizers.SGD can't train as this SGD does:\n- ")
    for named in (
        "`dampened=True`",
        "`momentum` changes",
        "`l1`",
        "`l2`",
        "keep training with SGD",
    ):
        assert named in message
    assert "`learning_rate`" not in message and message.count("\n- ") == 4


def test_without_momentum_dampened_is_plain():
    assert tuned(SGD(value(0.1), dampened=True)).optimizer.to_keras().momentum == 0.0


def test_an_optimizer_without_a_namesake_is_refused():
    class Own(kd.optimizers.SGD):
        """Might have any rule."""

    with pytest.raises(ValueError, match="Own has no namesake"):
        Own(value(0.1)).to_keras()
    with pytest.raises(ValueError, match=r"is not built.*optimizer.build\("):
        SGD(value(0.1)).to_keras()


def test_horizon_schedule():
    schedule = kd.schedules.HorizonSchedule([0.3, 0.2, 0.1], steps=7)
    # As the optimizers share out 7 steps among 3 blocks.
    expected = np.float32([0.3, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1])
    found = [float(schedule(step)) for step in range(14)]
    np.testing.assert_array_equal(np.float32(found), np.tile(expected, 2))
    config = keras.saving.serialize_keras_object(schedule)
    assert config["registered_name"] == "keras_drmad>HorizonSchedule"
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == schedule.get_config() == {"values": [0.3, 0.2, 0.1], "steps": 7}
    for values in ([], [np.nan]):
        with pytest.raises(ValueError, match="`values` are finite numbers, one at least"):
            kd.schedules.HorizonSchedule(values, 7)
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="`steps` is a whole number >= 1"):
            kd.schedules.HorizonSchedule([0.1], steps)
