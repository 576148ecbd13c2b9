"""What is saved in the middle of a tuning run goes on as if nothing had happened."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import stopped_runs
import tensorflow as tf

import keras_drmad as kd
from keras_drmad import saving

# The steps of an epoch of `fit` in `stopped_runs`.
STEPS = 4


@pytest.mark.slow
def test_a_new_process_goes_on_bit_by_bit(tmp_path, determinism):
    expected = {}
    for optimizer in stopped_runs.OPTIMIZERS:
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        expected[optimizer] = stopped_runs.train(optimizer, tmp_path)
    subprocess.run(
        [sys.executable, stopped_runs.__file__, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    for optimizer, whole in expected.items():
        assert any(key.startswith(f"hypergradients_{stopped_runs.EPOCHS - 1}/") for key in whole)
        for way in stopped_runs.WAYS:
            with np.load(tmp_path / f"{optimizer}_{way}.npz") as file:
                found = {name: file[f"arr_{i}"] for i, name in enumerate(file["names"])}
            assert found.keys() == whole.keys()
            for name, array in whole.items():
                np.testing.assert_array_equal(found[name], array, f"{optimizer} {way} {name}")


# One process ---------------------------------------------------------------------------------


def data():
    rng = np.random.default_rng(1)
    return rng.normal(size=(20, 4)).astype("float32"), rng.normal(size=(20, 3)).astype("float32")


def net(over="step", build=False, **arguments):
    """A net whose optimizer has schedules, neurons and one value to save."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="only")])
    tuned = dict(
        learning_rate=kd.Hyperparameter(0.1, over=over),
        momentum=kd.Hyperparameter(0.5, per="neuron"),
        l2=kd.Hyperparameter(0.01),
    )
    model.compile(kd.optimizers.SGD(**{**tuned, **arguments}), loss="mse", jit_compile=False)
    if build:
        model.optimizer.build(model.trainable_variables)
    return model


def plain_fit(model):
    """Train without the callback; the weights afterwards."""
    model.fit(*data(), batch_size=5, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


def tuned_net(**arguments):
    """A net as a callback leaves it: with a horizon, and values other than at first."""
    model = net(build=True, **arguments)
    model.optimizer.set_horizon(1, STEPS)
    rng = np.random.default_rng(2)
    for raw in model.optimizer.raw_variables:
        raw.assign_add(rng.normal(0.0, 0.5, raw.shape))
    return model


def raw_of(model):
    return [np.array(raw) for raw in model.optimizer.raw_variables]


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


class Run:
    """Stands for a callback."""

    def __init__(self, content=0.0):
        self.content = np.array(content)

    def get_state(self):
        return {"content": self.content}

    def set_state(self, state):
        self.content = state["content"]


def save(model, way, folder):
    if way == "keras":
        model.save(folder / "model.keras")
    elif way == "weights":
        model.save_weights(folder / "model.weights.h5")
    else:
        tf.train.Checkpoint(model=model).write(folder / "checkpoint")


def load(way, folder, build=False):
    """A new model with what was saved."""
    if way == "keras":
        return keras.models.load_model(folder / "model.keras")
    model = net(build=build)
    if way == "weights":
        model.load_weights(folder / "model.weights.h5")
    else:
        tf.train.Checkpoint(model=model).read(
            folder / "checkpoint"
        ).assert_existing_objects_matched()
    return model


WAYS = [("keras", True), ("weights", True), ("weights", False), ("checkpoint", True),
        ("checkpoint", False)]  # fmt: skip


@pytest.mark.parametrize("way, build", WAYS)
def test_without_the_callback_it_trains_with_the_tuned_values(way, build, tmp_path):
    model = tuned_net()
    raw = raw_of(model)
    save(model, way, tmp_path)
    start = model.get_weights()
    expected = plain_fit(model)
    loaded = load(way, tmp_path, build)
    assert_equal(plain_fit(loaded), expected)
    assert_equal(raw_of(loaded), raw)
    assert loaded.optimizer.horizon == (1, STEPS)
    if way == "keras":  # It is the values that do it: with those at first it goes elsewhere.
        untuned = net()
        untuned.set_weights(start)
        assert np.abs(plain_fit(untuned)[0] - expected[0]).max() > 1e-3


@pytest.mark.parametrize("way, build", WAYS)
def test_a_run_is_kept_through_two_files(way, build, tmp_path):
    model = tuned_net()
    model.optimizer.attach(Run(3.0))
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        save(model, way, folder)
        model = load(way, folder, build)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    run = Run()
    model.optimizer.attach(run)
    assert run.content == 3.0
    another = Run()
    model.optimizer.attach(another)
    assert another.content == 0.0  # a second run on the same model is a new one


@pytest.mark.parametrize("build", [True, False])
def test_a_run_can_be_forgotten(build, tmp_path):
    model = tuned_net()
    model.optimizer.attach(Run(3.0))
    raw = raw_of(model)
    save(model, "weights", tmp_path)
    loaded = load("weights", tmp_path, build)
    loaded.optimizer.forget_run()
    loaded.optimizer.build(loaded.trainable_variables)
    run = Run()
    loaded.optimizer.attach(run)
    assert run.content == 0.0
    assert_equal(raw_of(loaded), raw)


def test_what_waits_for_the_optimizer_is_stretched_over_the_new_horizon(tmp_path):
    model = tuned_net()
    rates = raw_of(model)[0]
    assert rates.shape == (STEPS,)
    save(model, "weights", tmp_path)
    loaded = load("weights", tmp_path)
    loaded.optimizer.set_horizon(1, 2 * STEPS)  # as the callback does before the first step
    loaded.optimizer.build(loaded.trainable_variables)
    assert loaded.optimizer.horizon == (1, 2 * STEPS)
    np.testing.assert_array_equal(raw_of(loaded)[0], np.repeat(rates, 2))


def test_a_file_from_before_the_first_step_changes_nothing(tmp_path):
    net().save(tmp_path / "model.keras")
    loaded = load("keras", tmp_path)
    assert_equal(raw_of(loaded), raw_of(net(build=True)))


def test_an_optimizer_that_is_built_in_a_graph_loads_once(tmp_path):
    model = tuned_net()
    raw = raw_of(model)
    save(model, "weights", tmp_path)
    loaded = load("weights", tmp_path)
    optimizer, variables = loaded.optimizer, loaded.trainable_variables

    @tf.function(autograph=False)
    def step():
        optimizer.apply([tf.ones_like(v) for v in variables], variables)

    step()
    assert_equal(raw_of(loaded), raw)
    before = int(optimizer.iterations)
    step()
    assert int(optimizer.iterations) == before + 1


def test_a_checkpoint_is_written_after_the_horizon_has_changed(tmp_path):
    model = tuned_net()  # was built with one block and has now STEPS of them
    model.optimizer.set_horizon(1, 2 * STEPS)
    raw = raw_of(model)
    save(model, "checkpoint", tmp_path)
    assert_equal(raw_of(load("checkpoint", tmp_path, build=True)), raw)


def test_a_saved_model_is_written(tmp_path):
    tf.saved_model.save(tuned_net(), tmp_path / "saved")
    assert (tmp_path / "saved" / "saved_model.pb").exists()


def test_bfloat16(tmp_path):
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = tuned_net()
        plain_fit(model)
        expected = [np.array(v).astype("float32") for v in model.optimizer.variables]
        for way in ("weights", "checkpoint"):
            save(model, way, tmp_path)
            loaded = load(way, tmp_path, build=True)
            found = [np.array(v).astype("float32") for v in loaded.optimizer.variables]
            assert_equal(found, expected)
    finally:
        keras.config.set_dtype_policy("float32")


# What does not fit -----------------------------------------------------------------------------


def refused(model, path, match):
    """Loading raises, and changes neither values nor slots."""
    before = [np.array(v) for v in model.optimizer.variables]
    with pytest.raises(ValueError, match=match):
        model.load_weights(path)
    assert_equal([np.array(v) for v in model.optimizer.variables], before)


def test_files_of_other_optimizers_are_refused(tmp_path):
    path = tmp_path / "model.weights.h5"
    tuned_net().save_weights(path)
    refused(net(build=True, l2=0.01), path, "other Hyperparameters than SGD has")
    # The same shapes, of another argument.
    other = dict(l2=0.0, l1=kd.Hyperparameter(0.01))
    refused(net(build=True, **other), path, r"Expected \[\['l1'.* found \[\['l2'")
    refused(net(build=True, over="epoch"), path, "other Hyperparameters")
    stock = net()
    stock.compile("sgd", "mse")
    stock.optimizer.build(stock.trainable_variables)
    stock.save_weights(path)
    refused(net(build=True), path, "does not hold the state of a keras_drmad optimizer")


def test_a_file_with_another_horizon_is_refused_where_graphs_hold_on_to_the_variables(tmp_path):
    path = tmp_path / "model.weights.h5"
    tuned_net().save_weights(path)
    model = net()
    plain_fit(model)
    refused(model, path, "horizon of 1 epochs and 4 steps, here it is 0 and 0")


def test_slots_of_another_rule_are_refused(tmp_path):
    path = tmp_path / "model.weights.h5"
    model = net(build=True, momentum=0.5)
    model.save_weights(path)
    refused(net(build=True, momentum=0.0), path, "other optimizer variables than SGD has")


def test_a_damaged_state_is_refused():
    state = tuned_net().optimizer._tuning_state
    packed = state.serialize()
    for damaged in (packed[: len(packed) // 2], b"nonsense", packed[:-30] + bytes(30)):
        with pytest.raises(ValueError, match="is damaged"):
            saving.unpack(damaged)

    class Picky(Run):
        def set_state(self, state):
            state["missing"]

    model = net(build=True)
    model.optimizer.attach(Picky())
    with pytest.raises(ValueError, match=r"is damaged: KeyError\('missing'\)"):
        model.optimizer._tuning_state.load({**saving.unpack(packed), "run": _packed_run()})


def _packed_run():
    return np.frombuffer(saving.pack({"content": np.ones(1)}), "uint8")


# The callback ----------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="test_saving")
class Weighted(keras.losses.Loss):
    """A loss with a weight for each output, which no model saves."""

    def __init__(self, name="weighted", **kwargs):
        super().__init__(name=name, **kwargs)
        self.weights = keras.Variable(np.ones(3), trainable=False, name="of_outputs")

    def call(self, y_true, y_pred):
        return keras.ops.sum(self.weights * (y_true - y_pred) ** 2, axis=-1)


def with_callback(initial_epoch=0, epochs=2, path=None, **options):
    """A run with everything that a callback itself keeps; taken up from a file if there is one."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0 if path is None else 8)
    loss = Weighted()
    model = net(over=2)
    model.compile(model.optimizer, loss, jit_compile=False)
    if path is not None:
        model.load_weights(path)
    options = {
        "trajectory": "linear",
        "variables": [(loss.weights, "positive")],
        "outer_loss": "mse",
        "initial_scale": kd.Hyperparameter(1.0),
        "restart": True,
        **options,
    }
    tuning = kd.DrMADCallback(data(), **options)
    model.fit(*data(), batch_size=5, initial_epoch=initial_epoch, epochs=epochs, shuffle=False,
              verbose=0, callbacks=[tuning])  # fmt: skip
    return model, loss, tuning


@pytest.mark.filterwarnings("ignore:Most of a training batch")
@pytest.mark.parametrize("restart", [True, "fresh"])
def test_what_the_callback_keeps_itself(restart, tmp_path):
    path = tmp_path / "model.weights.h5"
    whole, loss, tuning = with_callback(epochs=4, restart=restart)
    model, *_ = with_callback(epochs=2, restart=restart)
    model.save_weights(path)
    found, found_loss, found_tuning = with_callback(2, 4, path, restart=restart)
    assert_equal(raw_of(found), raw_of(whole))
    assert_equal(found.get_weights(), whole.get_weights())
    assert np.any(np.array(loss.weights) != 1.0)
    assert_equal([np.array(found_loss.weights)], [np.array(loss.weights)])
    assert [r.outer_loss for r in found_tuning.history] == [r.outer_loss for r in tuning.history]
    scales = [r.hyperparameters["initial_scale"]["model"] for r in tuning.history]
    assert scales[-1] != 1.0
    assert [r.hyperparameters["initial_scale"]["model"] for r in found_tuning.history] == scales

    match = "has the outer optimizer Adam, this callback has Sign"
    with pytest.raises(ValueError, match=match):
        with_callback(2, 4, path, outer_optimizer=kd.optimizers.Sign(0.1))
    with pytest.raises(ValueError, match=r"of 'variable', expected shapes \[\], found \[\(3,\)\]"):
        with_callback(2, 4, path, variables=())


@pytest.mark.filterwarnings("ignore:Most of a training batch")
def test_steps_that_count_for_no_update_are_named(tmp_path):
    path = tmp_path / "model.weights.h5"

    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.model.save_weights(path)

    model = net()
    options = dict(trajectory="linear")
    saving_now = Save()
    tuning = kd.DrMADCallback(data(), **options)
    model.fit(*data(), batch_size=5, verbose=0, callbacks=[tuning, saving_now])
    again = net()
    again.load_weights(path)
    with pytest.warns(UserWarning, match="saved 2 steps after the last update"):
        again.fit(*data(), batch_size=5, verbose=0, callbacks=[kd.DrMADCallback(data(), **options)])
