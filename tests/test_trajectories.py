"""The dial from DrMAD to exact: what is kept, what is exact, and that replay is stored."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_drmad as kd
from keras_drmad.trajectories import Linear, Piecewise, Replay, Stored, state_at

EPOCHS, BATCH, EXAMPLES = 2, 10, 45  # a smaller last batch in each epoch


def _run(trajectory, steps, known=True):
    """A path of two tensors whose value at t is known, offered to a trajectory."""
    trajectory.begin(steps if known else None)
    for t in range(steps):
        if trajectory.wants(t):
            trajectory.add(t, _state(t))
    trajectory.finish(steps, _state(steps))


def _state(t):
    curve = np.sin(0.3 * t + np.arange(6.0)).reshape(2, 3)
    return [tf.constant(curve), tf.constant(float(t * t), tf.float64)]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("steps", [1, 2, 7, 40, 101])
@pytest.mark.parametrize(
    "trajectory",
    [
        Linear(),
        Linear("steps"),
        Stored(),
        Piecewise(9),
        Piecewise(9, "even"),
        Piecewise(9, "bend"),
        Piecewise(2),
        Replay(),
        Replay(4),
    ],
    ids=lambda t: f"{t.name}-{getattr(t, 'anchors', '')}-{getattr(t, 'spacing', '')}",
)
def test_the_path_covers_the_run_and_is_exact_at_its_anchors(trajectory, steps, known):
    _run(trajectory, steps, known)
    anchors = list(trajectory.times)
    assert anchors[0] == 0 and anchors[-1] == steps
    assert len(set(anchors)) == len(anchors)
    assert len(anchors) <= max(trajectory.copies(steps), 2)
    path = trajectory.path()
    assert trajectory.times == trajectory.states == []  # nothing is held twice
    if isinstance(path, kd.trajectories.Anchors):
        assert path.times.numpy().tolist() == anchors
        got = {t: [x[i] for x in path.arrays] for i, t in enumerate(anchors)}
    else:
        dense = isinstance(path, kd.trajectories.Dense)
        got = {t: state_at(path, tf.constant(t, tf.int64)) for t in range(steps + (not dense))}
    for t, state in got.items():
        if trajectory.exact or t in anchors:
            for a, b in zip(state, _state(t), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("steps", [40, 1000])
def test_the_line_is_walked_as_fast_as_the_run_went(steps, known):
    """As far from the first weights as the run: exactly where that was measured, nearly between."""

    def state(t):  # it comes back a little at the end, and the slot does not count
        x = t / steps
        return [tf.constant([3.0, 4.0], tf.float64) * np.sqrt(x) * (1.2 - 0.2 * x),
                tf.constant(7.0 * t, tf.float64)]  # fmt: skip

    trajectory = Linear()
    trajectory.begin(steps if known else None)
    measured = 0
    for t in range(steps):
        if trajectory.wants(t):
            trajectory.add(t, state(t), 1)
            measured += 1
    trajectory.finish(steps, state(steps), 1)
    assert len(trajectory.states) == 2 and measured <= 64 + 64 * (not known) * 8
    path = trajectory.path()
    for t in range(0, steps + 1, 7):
        weight, slot = state_at(path, tf.constant(t, tf.int64))
        part = min(1.0, np.linalg.norm(state(t)[0]) / 5.0)
        np.testing.assert_allclose(np.linalg.norm(weight) / 5.0, part, atol=0.02)
        np.testing.assert_allclose(slot / (7.0 * steps), np.linalg.norm(weight) / 5.0, rtol=1e-12)
    trajectory.restore(path)
    again = trajectory.path()
    tf.nest.map_structure(np.testing.assert_array_equal, path, again)


def test_a_run_that_ends_where_it_began_is_a_line_at_an_even_pace():
    trajectory = Linear()
    trajectory.begin(10)
    for t in range(10):
        if trajectory.wants(t):
            trajectory.add(t, [tf.constant([float(t)]), tf.constant([float(t)])], 1)
    trajectory.finish(10, [tf.constant([0.0]), tf.constant([10.0])], 1)
    path = trajectory.path()
    assert state_at(path, tf.constant(3, tf.int64))[1] == 3.0


def test_a_wrong_pace_is_refused():
    with pytest.raises(ValueError, match="`pace` is"):
        Linear("fast")


def test_between_anchors_the_path_is_straight():
    trajectory = Linear("steps")
    _run(trajectory, 10)
    got = state_at(trajectory.path(), tf.constant(3, tf.int64))
    for a, first, last in zip(got, _state(0), _state(10), strict=True):
        np.testing.assert_allclose(a, 0.7 * first + 0.3 * last, rtol=1e-12, atol=1e-12)


def test_anchors_lie_where_the_path_bends():
    trajectory = Piecewise(5, "bend")
    trajectory.begin(100)
    for t in range(100):
        if trajectory.wants(t):
            # Straight, but for a corner at 60.
            trajectory.add(t, [tf.constant([float(t), float(max(t - 60, 0))])])
    assert any(abs(t - 60) <= 4 for t in trajectory.times[1:])
    assert len(trajectory.times) <= 4


def test_a_window_begins_the_path_where_the_walk_ends():
    for trajectory in (Linear(), Piecewise(5), Replay(), Stored()):
        trajectory.begin(50, 30)
        kept = [t for t in range(50) if trajectory.wants(t)]
        assert kept[0] == 30


@pytest.mark.parametrize("steps", [200, 2000, 20000])
def test_replay_keeps_about_two_square_roots(steps):
    copies = Replay().copies(steps)
    assert copies <= 2.1 * np.sqrt(steps) + 2
    if steps >= 2000:
        assert copies <= Stored().copies(steps) / 10


@pytest.mark.parametrize("arguments", [(1,), (2.0,), (True,), (9, "cubic")])
def test_a_wrong_piecewise_is_refused(arguments):
    with pytest.raises(ValueError, match=r"`(anchors|spacing)` is"):
        Piecewise(*arguments)


def test_an_unknown_trajectory_is_refused():
    with pytest.raises(ValueError, match="is one of"):
        kd.trajectories.get("straight")


# With real training ------------------------------------------------------------------------------


def _model():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh", name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.3),
            layers.Dense(3, name="last"),
        ]
    )


def _record(trajectory, known=True, window=None):
    keras.utils.set_random_seed(4)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(EXAMPLES, 6)), rng.integers(0, 3, EXAMPLES)
    hyper = rng.normal(size=(30, 6)), rng.integers(0, 3, 30)
    model = _model()
    optimizer = kd.optimizers.SGD(
        kd.Hyperparameter(0.2, per="layer", over="step" if known else "run"),
        momentum=kd.Hyperparameter(0.8),
        l2=kd.Hyperparameter(1e-2, per="input"),
    )
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callback = kd.DrMADCallback(
        hyper, trajectory=trajectory, curvature="hessian", horizon=EPOCHS, window=window
    )
    data = {"x": x, "y": y, "batch_size": BATCH}
    if not known:

        def batches():
            for _ in range(EPOCHS):
                for start in range(0, EXAMPLES, BATCH):
                    yield x[start : start + BATCH], y[start : start + BATCH]

        whole = tf.data.Dataset.from_generator(
            batches,
            output_signature=(tf.TensorSpec([None, 6], "float64"), tf.TensorSpec([None], "int64")),
        )
        data = {"x": whole.take(5), "shuffle": False}
    model.fit(**data, epochs=EPOCHS, verbose=0, callbacks=[callback])
    return callback.history[0]


def _flat(record):
    return {k: np.ravel(v) for k, v in kd.reports.flat(record.hypergradients).items()}


@pytest.fixture(scope="module")
def stored():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield _record("stored")
    keras.config.set_floatx(before)


@pytest.mark.parametrize(
    "trajectory", ["replay", Replay(2), Replay(100)], ids=["default", "2", "100"]
)
def test_replay_is_stored_to_rounding(float64, stored, trajectory):
    # With dropout, BatchNormalization, a smaller last batch and shuffled data.
    record = _record(trajectory)
    assert record.outer_loss == stored.outer_loss
    expected = _flat(stored)
    for key, value in _flat(record).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-10, atol=1e-13, err_msg=key)
    for a, b in zip(record.initial_weights_gradient, stored.initial_weights_gradient, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # how Keras learns its length
def test_replay_of_a_run_of_unknown_length(float64):
    stored, replay = _record("stored", known=False), _record("replay", known=False)
    expected = _flat(stored)
    for key, value in _flat(replay).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-10, atol=1e-13, err_msg=key)


def test_a_window_of_a_replay_is_that_of_stored(float64):
    stored, replay = _record("stored", window=4), _record("replay", window=4)
    expected = _flat(stored)
    for key, value in _flat(replay).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-10, atol=1e-13, err_msg=key)
    # The walk did not reach the first weights.
    assert replay.initial_weights_gradient is None
    assert np.all(_flat(replay)["learning_rate/first"][:-4] == 0.0)


def test_replay_in_single_precision():
    a = np.concatenate([*_flat(_record("stored")).values()])
    b = np.concatenate([*_flat(_record("replay")).values()])
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9999
