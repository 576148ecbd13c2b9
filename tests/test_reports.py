import dataclasses
import functools
import io
import json
import re
import zipfile

import keras
import numpy as np
import pytest
import records

import keras_drmad as kd
from keras_drmad import progress, reports


def same(a, b):
    """Whether two records are equal, bit by bit and with the same kinds of numbers."""
    fields = [f.name for f in dataclasses.fields(kd.Record)]
    arrays = {"hyperparameters", "hypergradients"}
    for name in arrays:
        one, other = reports.flat(getattr(a, name)), reports.flat(getattr(b, name))
        assert list(one) == list(other)
        for key, value in one.items():
            assert value.dtype == other[key].dtype
            np.testing.assert_array_equal(value, other[key])
    weights = "initial_weights_gradient"
    assert (getattr(a, weights) is None) == (getattr(b, weights) is None)
    for one, other in zip(getattr(a, weights) or [], getattr(b, weights) or [], strict=True):
        np.testing.assert_array_equal(one, other)
    for name in set(fields) - arrays - {weights}:
        np.testing.assert_equal(getattr(a, name), getattr(b, name))
    return True


# Records ------------------------------------------------------------------------------------------


def test_a_record_reads_by_argument_layer_and_variable():
    record = records.history()[0]
    assert record.hyperparameters["learning_rate"]["hidden"].shape == (4,)
    assert record.hyperparameters["momentum"]["model"].shape == ()
    assert record.hyperparameters["l1"]["head"]["kernel"].shape == (5, 3)
    assert list(reports.flat(record.hyperparameters))[-2:] == ["l1/head/kernel", "decay/hidden"]


def test_entries_know_their_labels_and_norms_add_up():
    record = records.history()[0]
    found = reports.by_argument(reports.entries(record))
    assert list(found) == ["learning_rate", "momentum", "l2", "l1", "decay"]
    assert [e.label for e in found["l2"]] == list(records.LABELS[3:5])
    decay = found["decay"][0]
    np.testing.assert_allclose(decay.over_time, decay.value.mean(1))
    np.testing.assert_allclose(decay.in_space, decay.value.mean(0))
    gradient = record.hypergradients["l2"]
    whole = np.concatenate([gradient["hidden"], gradient["head"]])
    assert reports.norm(found["l2"]) == pytest.approx(np.linalg.norm(whole), rel=1e-6)


def test_a_record_without_labels_still_has_entries():
    record = dataclasses.replace(records.history()[0], labels=())
    assert [e.name for e in reports.entries(record)] == list(reports.flat(record.hyperparameters))


# A saved history ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_saved_history_comes_back_bit_by_bit(tmp_path, dtype):
    history = records.history(dtype=dtype)
    history[0] = dataclasses.replace(history[0], outer_loss=float("nan"), labels=())
    path = tmp_path / "history.npz"
    for _ in range(2):  # a file that is there is replaced
        reports.save_history(history, path)
    loaded = reports.load_history(path)
    assert len(loaded) == len(history)
    assert all(same(a, b) for a, b in zip(history, loaded, strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["history.npz"]


def test_a_history_goes_through_an_open_file_and_may_be_empty_or_change_in_shape():
    changed = kd.Record(
        0.5, {"l2": {"a": np.zeros(3)}}, {"l2": {"a": np.ones(3)}}, None, 0, 1, True, ""
    )
    for history in ([], [*records.history(2), changed, *records.history(1)]):
        file = io.BytesIO()
        reports.save_history(history, file)
        file.seek(0)
        loaded = reports.load_history(file)
        assert len(loaded) == len(history)
        assert all(same(a, b) for a, b in zip(history, loaded, strict=True))


def test_a_long_history_has_no_more_members_than_a_short_one(tmp_path):
    members = []
    for updates in (2, 50):
        reports.save_history(records.history(updates), tmp_path / "history.npz")
        members.append(len(zipfile.ZipFile(tmp_path / "history.npz").namelist()))
    assert members[0] == members[1]


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "history.npz"
    reports.save_history(records.history(2), path)

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        reports.save_history(records.history(3), path)
    assert len(reports.load_history(path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["history.npz"]


def saved(change=lambda content: None):
    """The bytes of a saved history whose text was changed, in place or for another text."""
    file = io.BytesIO()
    reports.save_history(records.history(), file)
    file.seek(0)
    arrays = dict(np.load(file))
    content = json.loads(arrays["history"].tobytes())
    text = change(content)
    text = text if isinstance(text, str) else json.dumps(content)
    arrays["history"] = np.frombuffer(text.encode(), np.uint8)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def with_code():
    file = io.BytesIO()
    np.savez(file, history=np.array([print], object))
    return file.getvalue()


def row_of(record, row):
    record["hyperparameters"][0][2] = row


# What is in the file, and what the error says.
DAMAGED_FILES = {
    "empty": (lambda: b"", ""),
    "no archive": (lambda: b"not an archive", ""),
    "truncated": (lambda: saved()[:-200], ""),
    "changed": (lambda: saved().replace(b'"head"', b'"haed"', 1), "CRC"),
    "code": (with_code, "pickle"),
}
# How the text in the file is changed, and what the error says.
DAMAGED_TEXTS = {
    "another version": (lambda c: c.update(version=99), "version is 99"),
    "another format": (lambda c: c.update(format="?"), "format is"),
    "no JSON": (lambda c: "{", "JSON"),
    "deep JSON": (lambda c: "[" * 100_000, "Recursion"),
    "a list": (lambda c: "[]", "TypeError"),
    "no records": (lambda c: c.pop("records"), "records"),
    "a text for a number": (lambda c: c["records"][0].update(outer_loss="0"), "outer_loss"),
    "a number for a bool": (lambda c: c["records"][0].update(accepted=1), "accepted"),
    "a row that is not there": (lambda c: row_of(c["records"][0], 99), "IndexError"),
    "a negative row": (lambda c: row_of(c["records"][0], -1), "row -1"),
    "shapes that differ": (lambda c: c["records"][0]["hypergradients"].pop(), "differ"),
    "a damaged label": (lambda c: c["records"][0].update(labels=[[1, 2, 3, 4, 5]]), "label"),
}
DAMAGED = DAMAGED_FILES | {
    name: (lambda change=change: saved(change), says)
    for name, (change, says) in DAMAGED_TEXTS.items()
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(tmp_path, name):
    content, says = DAMAGED[name]
    path = tmp_path / "history.npz"
    path.write_bytes(content())
    with pytest.raises(ValueError, match=f"Not a history .*{says}"):
        reports.load_history(path)


def test_what_is_no_history_is_refused(tmp_path):
    for wrong in (None, 3, {"a": 1}, [1], keras.callbacks.History()):
        with pytest.raises(TypeError, match="list of records"):
            reports.save_history(wrong, tmp_path / "history.npz")
    with pytest.raises(ValueError, match="empty"):
        reports.as_history([])
    with pytest.raises(FileNotFoundError):
        reports.as_history(tmp_path / "nothing.npz")
    assert not list(tmp_path.iterdir())


# The table ------------------------------------------------------------------------------------


def test_the_table_says_start_now_and_what_was_verified():
    history = records.history()
    now = [np.full(shape, 0.5, np.float32) for shape in records.SHAPES]
    lines = reports.table(records.LABELS, now, history).splitlines()
    cells = [re.split(r"\s{2,}", line) for line in lines]
    assert cells[0] == [
        "hyperparameter", "grain", "count", "start", "now", "hypergradient norm", "verified cosine"
    ]  # fmt: skip
    rows = {row[0]: row for row in cells[2:]}
    start = float(history[0].hyperparameters["momentum"]["model"])
    norm = abs(float(history[-1].hypergradients["momentum"]["model"]))
    assert rows["momentum"][1:] == ["model", "1", f"{start:.3g}", "0.5", f"{norm:.3g}", "—"]
    assert rows["l2"][1:3] == ["input", "69"] and rows["l2"][6] == "0.750"
    assert rows["learning_rate"][1:3] == ["layer, 4 in time", "8"]
    assert rows["decay"][1:3] == ["neuron, 12 in time", "60"]
    rates = history[0].hyperparameters["learning_rate"]
    both = np.concatenate([rates["hidden"], rates["head"]])
    wanted = f"{both.mean():.3g} ({both.min():.3g} to {both.max():.3g})"
    assert rows["learning_rate"][3] == wanted


def test_the_table_by_layer_and_before_the_first_update():
    now = [np.full(shape, 0.5, np.float32) for shape in records.SHAPES]
    lines = reports.table(records.LABELS, now, [], by_layer=True).splitlines()
    assert len(lines) == 2 + len(records.LABELS)
    assert [line.split()[0] for line in lines[-2:]] == ["l1/head/kernel", "decay/hidden"]
    assert all(line.endswith("—") for line in lines[2:])


# Progress -----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def walked(clock, verbose, seconds):
    walk = reports.Progress("Walking back", verbose)
    for done, at in enumerate(seconds):
        clock[0] = 100.0 + at
        walk(done, len(seconds) - 1)


@pytest.mark.parametrize("verbose", [1, 2, "auto"])
def test_a_short_walk_says_nothing(clock, capsys, verbose):
    walked(clock, verbose, [0.0, 1.0, 2.9])
    assert capsys.readouterr().out == ""


def test_a_long_walk_is_a_bar(clock, capsys):
    walked(clock, 1, [0.0, 1.0, 4.0, 8.0])
    out = capsys.readouterr().out
    assert out.startswith("\nWalking back\n")
    assert out.count("Walking back") == 1
    assert "reverse step" in out and "3/3" in out and out.endswith("\n")


def test_a_long_walk_is_a_line_now_and_then(clock, capsys):
    walked(clock, 2, [0.0, 1.0, 4.0, 8.0, 14.5, 15.0])
    assert capsys.readouterr().out.splitlines() == [
        "Walking back: 2/5 steps, 4s",
        "Walking back: 4/5 steps, 14s",
    ]


def test_verbose_0_is_silent(clock, capsys):
    walked(clock, 0, [0.0, 10.0, 100.0])
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_where_keras_does_not_print_it_logs(clock, capsys, caplog):
    keras.config.disable_interactive_logging()
    try:
        with caplog.at_level("INFO", "keras_drmad"):
            walked(clock, 2, [0.0, 10.0])
    finally:
        keras.config.enable_interactive_logging()
    assert capsys.readouterr().out == ""
    assert caplog.messages == ["Walking back: 1/1 steps, 10s"]


# In `fit` -------------------------------------------------------------------------------------


def test_fit_shows_updates_and_progress_and_sums_up(monkeypatch, capsys):
    monkeypatch.setattr(kd.callback, "Progress", functools.partial(reports.Progress, after=0.0))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)).astype("float32"), rng.normal(size=(40, 1)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="head")])
    rate = kd.Hyperparameter(0.05, per="layer", over="step")
    model.compile(kd.optimizers.SGD(rate, l2=kd.Hyperparameter(1e-3, per="input")), "mse")
    callback = kd.DrMADCallback((x[30:], y[30:]), trajectory="linear", verify_every=1)
    with pytest.raises(RuntimeError, match="first `fit`"):
        callback.summary()
    shown = []
    for verbose in (0, 1, 2):
        past = model.fit(x[:30], y[:30], 5, 2, verbose=verbose, callbacks=[callback])
        shown.append(capsys.readouterr().out)
        assert past.history["outer_loss"] == [r.outer_loss for r in callback.history[-2:]]
    assert past.history["update"] == [5, 6]
    assert shown[0] == ""
    for out in shown[1:]:
        assert "outer_loss: " in out and "update: " in out and "walking back" in out
    assert "reverse step" in shown[1]
    assert "steps, 0s" in shown[2]
    callback.summary()
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("learning_rate   layer, 6 in time  6      0.05 ")
    assert rows[3].startswith("l2              input             3      0.001 ")
    assert not any(row.endswith("—") for row in rows[2:])
