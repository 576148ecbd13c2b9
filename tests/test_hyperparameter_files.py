"""The JSON file of tuned values: what it says, and what is refused without a change."""

import json

import keras
import numpy as np
import pytest

import keras_drmad as kd
from keras_drmad import hyperparameter_files


def built(over=2, horizon=(1, 6), units=3, **arguments):
    """An optimizer with every grain, and values that all differ."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, name="only")])
    tuned = dict(
        learning_rate=kd.Hyperparameter(0.1, over=over),
        momentum=kd.Hyperparameter(0.5, per="neuron"),
        l1=kd.Hyperparameter(0.02, per="weight"),
        l2=kd.Hyperparameter(0.01, per="layer"),
        weight_decay=kd.Hyperparameter(-0.3, domain=(-1.0, 1.0)),
    )
    model.compile(kd.optimizers.SGD(**{**tuned, **arguments}), "mse")
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    optimizer.set_horizon(*horizon)
    rng = np.random.default_rng(0)
    for raw in optimizer.raw_variables:
        raw.assign_add(rng.normal(0.0, 0.5, raw.shape))
    return optimizer


def fresh(**arguments):
    """An optimizer like that of `built`, at its first values and with no horizon."""
    optimizer = built(horizon=(0, 0), **arguments)
    for group, raw in zip(optimizer.groups, optimizer.raw_variables, strict=True):
        raw.assign(np.full(raw.shape, group.domain.raw(group.initial)))
    return optimizer


def values(optimizer):
    return [np.array(v) for v in optimizer.values()]


@pytest.fixture
def path(tmp_path):
    kd.save_hyperparameters(built(), tmp_path / "h.json")
    return tmp_path / "h.json"


def test_what_stands_in_it(path):
    optimizer = built()
    content = json.loads(path.read_text())
    assert list(content) == ["format", "version", "horizon", "grains", "hyperparameters"]
    assert (content["format"], content["version"]) == ("keras_drmad hyperparameters", 1)
    assert content["horizon"] == {"epochs": 1, "steps": 6}
    assert content["grains"]["learning_rate"] == {"model": "model, 2 blocks"}
    assert content["grains"]["momentum"] == {"only": "neuron"}
    found = content["hyperparameters"]
    assert found.keys() == {"learning_rate", "momentum", "l1", "l2", "weight_decay"}
    by_name = dict(zip((g.argument for g in optimizer.groups), values(optimizer), strict=True))
    # Float32 to decimals and back is exact.
    as_written = np.float32(found["learning_rate"]["model"])
    np.testing.assert_array_equal(as_written, by_name["learning_rate"])
    np.testing.assert_array_equal(np.float32(found["l1"]["only"]["kernel"]), by_name["l1"][0])
    assert np.float32(found["l2"]["only"]) == by_name["l2"][0]
    # For people: a line for each array, and no more digits than needed.
    lines = path.read_text().splitlines()
    assert len(lines) < 50
    assert max(len(x) for x in str(found["momentum"]["only"]).strip("[]").split(", ")) <= 12


def test_round_trip(path, tmp_path):
    optimizer = fresh()
    kd.load_hyperparameters(optimizer, path)
    assert optimizer.horizon == (1, 6)
    for a, b in zip(values(optimizer), values(built()), strict=True):
        # The logarithm of a float32, and back.
        np.testing.assert_allclose(a, b, rtol=2e-6)
    kd.save_hyperparameters(optimizer, tmp_path / "again.json")
    kd.load_hyperparameters(built(), str(tmp_path / "again.json"))


def test_values_at_the_ends_of_their_domain_come_back(tmp_path):
    for sign in (-1, 1):
        optimizer = built()
        for raw in optimizer.raw_variables:
            raw.assign(np.full(raw.shape, sign * 1e6))
        kd.save_hyperparameters(optimizer, tmp_path / "h.json")
        expected = values(optimizer)
        kd.load_hyperparameters(optimizer, tmp_path / "h.json")
        for a, b in zip(values(optimizer), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5)  # of logarithms of 1e37, in float32


def test_a_schedule_over_steps_takes_over_the_horizon_of_the_file(tmp_path):
    saved = built(over="step")
    kd.save_hyperparameters(saved, tmp_path / "h.json")
    optimizer = fresh(over="step")
    kd.load_hyperparameters(optimizer, tmp_path / "h.json")
    rates = values(optimizer)[0]
    assert rates.shape == (6,)
    np.testing.assert_allclose(rates, values(saved)[0], rtol=2e-6)
    # And a fit with another number of steps stretches it.
    optimizer.set_horizon(1, 12)
    np.testing.assert_allclose(values(optimizer)[0], np.repeat(rates, 2), rtol=2e-6)


def changed(path, change):
    """Change the file's content."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_to(*where_and_value):
    *where, last, value = where_and_value

    def change(content):
        for key in where:
            content = content[key]
        content[last] = value

    return change


def refused(optimizer, path, match):
    before = [np.array(v) for v in optimizer.variables]
    horizon = optimizer.horizon
    with pytest.raises(ValueError, match=match) as info:
        kd.load_hyperparameters(optimizer, path)
    assert path.name in str(info.value) and len(str(info.value)) < 2000
    assert [a.shape for a in before] == [tuple(v.shape) for v in optimizer.variables]
    for a, b in zip(before, optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, np.array(b))
    assert optimizer.horizon == horizon


TUNED = "hyperparameters"
CHANGES = {
    "format": (set_to("format", "other"), "format='keras_drmad hyperparameters'"),
    "newer": (set_to("version", 2), "expected version 1, found 2"),
    "version true": (set_to("version", True), "expected version 1, found True"),
    "missing key": (lambda c: c.pop("grains"), r"expected the keys \['format'"),
    "unknown key": (set_to("more", 1), "'more'"),
    "horizon": (set_to("horizon", "steps", -1), r"whole numbers.* Received: \[1, -1\]"),
    "horizon keys": (set_to("horizon", {"steps": 4}), "a horizon of 'epochs' and 'steps'"),
    "huge horizon": (set_to("horizon", "steps", 2**40), "whole numbers"),
    "unknown argument": (set_to(TUNED, "l3", {"only": 1.0}), "unknown are l3/only"),
    "empty argument": (set_to(TUNED, "l3", {}), "unknown are l3"),
    "unknown layer": (set_to(TUNED, "l2", "other", 1.0), "unknown are l2/other"),
    "missing layer": (lambda c: c[TUNED]["l2"].clear(), "missing are l2/only"),
    "missing argument": (lambda c: c[TUNED].pop("l2"), "missing are l2/only"),
    "missing variable": (set_to(TUNED, "l1", "only", 0.1), "missing are l1/only/kernel"),
    "grain": (set_to("grains", "momentum", "only", "layer"), "'neuron', found 'layer'"),
    "blocks": (set_to("grains", "learning_rate", "model", "model, 6 blocks"), "2 blocks"),
    "too few": (set_to(TUNED, "momentum", "only", [0.5, 0.5]), "a list of 3, found a list of 2"),
    "not a list": (set_to(TUNED, "momentum", "only", 0.5), "a list of 3, found 0.5"),
    "a list": (set_to(TUNED, "l2", "only", [0.5]), r"expected a number, found \[0.5\]"),
    "nested": (set_to(TUNED, "momentum", "only", [0.5, [0.5], 0.5]), "a number, found"),
    "string": (set_to(TUNED, "l2", "only", "0.1"), "expected a number, found '0.1'"),
    "bool": (set_to(TUNED, "l2", "only", True), "expected a number, found True"),
    "null": (set_to(TUNED, "l2", "only", None), "expected a number, found None"),
    "negative": (set_to(TUNED, "l2", "only", -0.1), "l2/only: expected a number above 0"),
    "zero": (set_to(TUNED, "l2", "only", 0.0), "expected a number above 0"),
    "one": (set_to(TUNED, "momentum", "only", [0.5, 1.0, 0.5]), "strictly between 0 and 1"),
    "interval": (set_to(TUNED, "weight_decay", "model", 1.5), "strictly between -1.0 and 1.0"),
    "large int": (set_to(TUNED, "l2", "only", 10**400), "l2/only: expected a number above 0"),
    "not nested": (set_to(TUNED, [1.0]), "values by argument and layer"),
    "a layer's list": (set_to(TUNED, "l2", 0.1), "values by argument and layer"),
}


def test_what_does_not_fit_changes_nothing(path):
    optimizers, text = (built(), fresh()), path.read_text()
    for change, match in CHANGES.values():  # a test each would take its time to set up
        path.write_text(text)
        changed(path, change)
        for optimizer in optimizers:
            refused(optimizer, path, match)


def infinite(text, value):
    return text.replace('"l2": {\n      "only": ', f'"l2": {{\n      "only": {value}, "x": ')


TEXTS = {
    "empty": (lambda text: "", "Expecting value"),
    "truncated": (lambda text: text[: len(text) // 2], "does not fit"),
    "a number": (lambda text: "1", "kd.save_hyperparameters wrote"),
    "not a number": (lambda text: infinite(text, "NaN"), "finite numbers, found NaN"),
    "infinite": (lambda text: infinite(text, "-Infinity"), "finite numbers, found -Infinity"),
    "overflow": (lambda text: text.replace('"only": 0.0', '"only": 1e999, "x": 0.0'), "x|above 0"),
    "twice": (
        lambda text: text.replace('"l2": {', '"l2": {}, "l2": {'),
        "'l2' stands twice in one place",
    ),
    "deep": (lambda text: "[" * 200_000, "too deeply"),
    "deep dictionaries": (lambda text: '{"a":' * 200_000, "too deeply"),
    "long number": (lambda text: "9" * 100_000, "does not fit"),
    "large": (lambda text: " " * (2**24 + 10_000), "at most 16,[0-9,]+ bytes"),
    "binary": (lambda text: "\udcff\udcfe\x00", "utf-8"),
}


def test_damaged_and_hostile_files(path):
    optimizer, text = built(), path.read_text()
    for change, match in TEXTS.values():
        assert change(text) != text
        path.write_text(change(text), errors="surrogateescape")
        refused(optimizer, path, match)


def test_where_graphs_hold_on_to_the_variables_their_number_stays(path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="only")])
    model.compile(kd.optimizers.SGD(kd.Hyperparameter(0.1, over="step")), "mse")
    model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)
    kd.save_hyperparameters(
        built(over="step", momentum=0.0, l1=0.0, l2=0.0, weight_decay=0.0), path
    )
    refused(model.optimizer, path, "'model, 1 block', found 'model, 6 blocks'. Load it into a new")


def test_the_way_out_where_the_optimizer_is_not_ready(tmp_path, path):
    unbuilt = kd.optimizers.SGD(kd.Hyperparameter(0.1))
    for function in (kd.save_hyperparameters, kd.load_hyperparameters):
        with pytest.raises(ValueError, match=r"optimizer.build\(model.trainable_variables\)"):
            function(unbuilt, path)
        with pytest.raises(ValueError, match="has no Hyperparameter"):
            function(kd.optimizers.SGD(0.1), path)
        with pytest.raises(TypeError, match=r"one of keras_drmad.optimizers.*Received: <keras"):
            function(keras.optimizers.SGD(), path)
    with pytest.raises(FileNotFoundError):
        kd.load_hyperparameters(built(), tmp_path / "none.json")


def test_a_crash_overwrites_nothing(path, monkeypatch):
    before = path.read_bytes()

    def crash(*args):
        raise OSError("the disk is full")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(hyperparameter_files.os, function, crash)
            with pytest.raises(OSError, match="disk is full"):
                kd.save_hyperparameters(built(), path)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_values_that_are_not_finite_are_not_saved(path):
    before = path.read_bytes()
    optimizer = built()
    optimizer.raw_variables[0].assign(np.full(2, np.nan))
    with pytest.raises(ValueError, match=r"learning_rate/model are not finite.*Received: \[nan"):
        kd.save_hyperparameters(optimizer, path)
    assert path.read_bytes() == before
