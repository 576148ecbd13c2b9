"""Event files are read back as bytes, by nothing that wrote them."""

import importlib.util
import shutil
import signal
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import records
import tensorflow as tf

import keras_drmad as kd
from keras_drmad import reports, tensorboard

resource = pytest.importorskip("resource")  # limits of a process: not on Windows


def events(folder):
    """Tag -> list of (step, array) in a folder's own event files, in the order written."""
    found = {}
    for file in sorted(Path(folder).glob("events*")):
        for raw in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(raw.numpy())
            for value in event.summary.value:
                array = tf.make_ndarray(value.tensor)
                found.setdefault(value.tag, []).append((event.step, array))
    return found


def pictures(found, tag):
    """The pictures of a tag, decoded."""
    return [(step, tf.io.decode_png(array[2]).numpy()) for step, array in found[tag]]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Four updates, written one after another."""
    history, folder = records.history(4), tmp_path_factory.mktemp("log")
    writer = tensorboard.Writer(folder)
    for i in range(len(history)):
        writer.write(history[: i + 1])
    writer.close()
    return history, folder / "drmad"


def scalars(found, tag):
    return [(step, float(array)) for step, array in found[tag]]


def test_what_there_is_one_of_per_update(written):
    history, folder = written
    found = events(folder)
    assert scalars(found, "outer_loss") == [
        (i + 1, pytest.approx(r.outer_loss)) for i, r in enumerate(history)
    ]
    assert scalars(found, "skipped_updates") == [(1, 0), (2, 1), (3, 1), (4, 1)]
    assert scalars(found, "verified_cosine/l2") == [(3, 0.75)]
    assert "verified_cosine/l1" not in found
    for number, record in enumerate(history, 1):
        for argument, group in reports.by_argument(reports.entries(record)).items():
            tag = f"hypergradient_norm/{argument}"
            assert scalars(found, tag)[number - 1] == (number, pytest.approx(reports.norm(group)))


def test_mean_lowest_and_highest_of_every_hyperparameter(written):
    history, folder = written
    found = events(folder)
    for number, record in enumerate(history, 1):
        for entry in reports.entries(record):
            if entry.value.size == 1:
                wanted = {entry.name: entry.value}
            else:
                wanted = {
                    f"{entry.name}/mean": entry.value.mean(),
                    f"{entry.name}/min": entry.value.min(),
                    f"{entry.name}/max": entry.value.max(),
                }
            for tag, value in wanted.items():
                assert scalars(found, tag)[number - 1] == (number, pytest.approx(float(value)))


def test_histograms_of_what_has_many_values_in_space(written):
    history, folder = written
    found = events(folder)
    drawn = {tag for tag, points in found.items() if points[0][1].ndim == 2}
    names = {"l2/hidden", "l2/head", "l1/hidden/kernel", "l1/head/kernel", "decay/hidden"}
    assert drawn == names
    for entry in reports.entries(history[1]):
        if entry.name in names:
            step, buckets = found[entry.name][1]  # rows of left edge, right edge, count
            assert step == 2
            assert buckets[:, 2].sum() == entry.value.size
            assert buckets[0, 0] == pytest.approx(entry.value.min())
            assert buckets[-1, 1] == pytest.approx(entry.value.max())


def test_schedules_are_one_run_per_update_that_overlay(written):
    history, folder = written
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == [
        f"update_{i:03d}" for i in (1, 2, 3, 4)
    ]
    for number, record in enumerate(history, 1):
        found = events(folder / f"update_{number:03d}")
        assert set(found) == {
            "learning_rate_schedule/hidden", "learning_rate_schedule/head", "decay_schedule/hidden"
        }  # fmt: skip
        rates = record.hyperparameters["learning_rate"]["hidden"]
        # Four blocks of three steps, and the last step.
        assert scalars(found, "learning_rate_schedule/hidden") == [
            (t, pytest.approx(float(rates[t // 3]))) for t in (0, 3, 6, 9, 11)
        ]
        assert [step for step, _ in found["decay_schedule/hidden"]] == list(range(records.STEPS))


def test_pictures_of_schedules_and_of_inputs(written):
    history, folder = written
    found = events(folder)
    assert {t for t in found if t.split("/")[0] in ("schedules", "inputs")} == {
        "schedules/learning_rate", "schedules/decay", "inputs/l2/hidden"
    }  # fmt: skip
    for number, record in enumerate(history, 1):
        step, image = pictures(found, "schedules/learning_rate")[number - 1]
        rates = record.hyperparameters["learning_rate"]
        rows = np.stack([rates["hidden"], rates["head"]])
        assert step == number
        assert image.shape == (48, 480, 3)
        # The middle of each cell: the highest value is brightest, the lowest darkest.
        cells = image[12::24, 60::120].astype(int).sum(-1)
        assert cells.argmax() == rows.argmax() and cells.argmin() == rows.argmin()
        _, image = pictures(found, "inputs/l2/hidden")[number - 1]
        values = record.hyperparameters["l2"]["hidden"].reshape(8, 8)
        cells = image[14::28, 14::28].astype(int).sum(-1)
        assert cells.argmax() == values.argmax() and cells.argmin() == values.argmin()


def test_colours_rise_with_the_value_and_grey_is_unknown():
    ramp = tensorboard.coloured(np.linspace(0, 1, 50))
    assert (np.diff(ramp.astype(int) @ [0.299, 0.587, 0.114]) > 0).all()
    values = np.array([[1.0, np.nan], [np.inf, 1.0]])
    image = tensorboard.picture(values, (2, 2), size=2)
    assert (image[values != 1.0] == 128).all()
    assert (image[values == 1.0] == ramp[0]).all()
    assert tensorboard.picture(np.arange(12.0), (2, 2, 3), size=2).shape == (2, 6, 3)


@pytest.mark.parametrize(
    "blocks, steps, points",
    [
        (1, 10, [0, 9]),
        (10, 10, list(range(10))),
        (3, 10, [0, 4, 7, 9]),
        (4, 3, [0, 1, 2]),
        (2, 0, []),
    ],
)
def test_points_of_a_curve(blocks, steps, points):
    assert tensorboard._curve_steps(blocks, steps) == points


def test_a_long_curve_is_thinned():
    points = tensorboard._curve_steps(5000, 5000)
    assert len(points) == tensorboard.POINTS
    assert points[0] == 0 and points[-1] == 4999


def test_values_that_are_not_finite_are_written(tmp_path):
    record = records.history(1)[0]
    record.hyperparameters["l2"]["hidden"][3] = np.nan
    record.hyperparameters["learning_rate"]["head"][:] = np.inf
    writer = tensorboard.Writer(tmp_path)
    writer.write([record])
    writer.close()
    found = events(tmp_path / "drmad")
    assert found["l2/hidden"][0][1][:, 2].sum() == 63
    assert np.isnan(found["l2/hidden/mean"][0][1])


# Arguments ----------------------------------------------------------------------------------------


def test_image_shape(tmp_path):
    history = records.history(1)
    for shape, size in (((4, 16), (224, 896)), ((4, 4, 4), (224, 896)), ((3, 3), None)):
        folder = tmp_path / str(shape)
        writer = tensorboard.Writer(folder, image_shape=shape)
        writer.write(history)
        writer.close()
        found = events(folder / "drmad")
        assert ("inputs/l2/hidden" in found) == (size is not None)
        if size:
            assert pictures(found, "inputs/l2/hidden")[0][1].shape == (*size, 3)


@pytest.mark.parametrize("wrong", ["", 3, b"logs", ["logs"]])
def test_a_log_dir_is_a_path(wrong):
    with pytest.raises(TypeError, match="`log_dir` is the path of a folder"):
        kd.DrMADCallback((np.zeros((2, 1)), np.zeros(2)), log_dir=wrong)


@pytest.mark.parametrize("wrong", [8, (8,), (8, 0), (1, 2, 3, 4), "ab", (None, 8)])
def test_an_image_shape_is_two_or_three_numbers(wrong):
    with pytest.raises(ValueError, match="`image_shape` is"):
        tensorboard.Writer("logs", image_shape=wrong)


def test_without_tensorboard_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"keras_drmad\[tensorboard\]"):
        tensorboard.Writer("logs")


# Faults ---------------------------------------------------------------------------------------


def write_all(writer, history):
    """Write update after update; the messages of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(len(history)):
            writer.write(history[: i + 1])
        writer.close()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("limit", [2_000, 8_000, 12_000])
def test_a_full_disk_is_one_warning(tmp_path, limit):
    """No file may grow beyond the limit: writing fails in the middle, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    writer = tensorboard.Writer(tmp_path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        messages = write_all(writer, records.history(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(messages) == 1
    assert "could not be written" in messages[0] and "Training goes on" in messages[0]


def test_a_folder_that_disappears_is_one_warning_and_is_written_again(tmp_path):
    history = records.history(4)
    writer = tensorboard.Writer(tmp_path)
    assert write_all(writer, history[:1]) == []
    writer.write(history[:2])
    shutil.rmtree(tmp_path)
    with pytest.warns(UserWarning, match="could not be written"):
        writer.write(history[:3])
    writer.write(history)
    writer.close()
    assert [step for step, _ in events(tmp_path / "drmad")["outer_loss"]] == [4]


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    messages = write_all(tensorboard.Writer(tmp_path / "file"), records.history(3))
    assert len(messages) == 1 and "could not be written" in messages[0]


# In `fit` -------------------------------------------------------------------------------------


def test_beside_the_users_own_tensorboard(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)).astype("float32"), rng.normal(size=(40, 1)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="head")])
    rate = kd.Hyperparameter(0.05, per="layer", over="step")
    model.compile(kd.optimizers.SGD(rate, l2=kd.Hyperparameter(1e-3, per="input")), "mse")
    callback = kd.DrMADCallback((x[30:], y[30:]), trajectory="linear", log_dir=tmp_path)
    board = keras.callbacks.TensorBoard(tmp_path, update_freq=2)
    for _ in range(2):
        model.fit(x[:30], y[:30], 5, 2, verbose=0, callbacks=[board, callback])
    runs = {p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("events*")}
    assert runs == {"train", "drmad", *(f"drmad/update_{i:03d}" for i in (1, 2, 3, 4))}
    # Of two files, one per `fit`.
    found = dict(scalars(events(tmp_path / "drmad"), "outer_loss"))
    assert found == {i: pytest.approx(r.outer_loss) for i, r in enumerate(callback.history, 1)}
    for number, record in enumerate(callback.history, 1):
        curve = scalars(
            events(tmp_path / f"drmad/update_{number:03d}"), "learning_rate_schedule/head"
        )
        rates = record.hyperparameters["learning_rate"]["head"]
        assert curve == [(t, pytest.approx(float(rate))) for t, rate in enumerate(rates)]
