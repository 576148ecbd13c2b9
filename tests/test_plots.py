import json
import sys

import matplotlib
import numpy as np
import pytest
import records

import keras_drmad as kd
from keras_drmad import reports

HISTORY = records.history()


@pytest.fixture(params=["history", "saved"])
def given(request, tmp_path):
    """A callback's history, or the path of the same one saved."""
    if request.param == "history":
        return HISTORY
    reports.save_history(HISTORY, tmp_path / "history.npz")
    return tmp_path / "history.npz"


def drawn(figure, tmp_path):
    """A figure that can be saved; its axes."""
    assert isinstance(figure, matplotlib.figure.Figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    return figure.axes


def test_schedules_have_a_panel_per_layer_and_a_line_per_update(given, tmp_path):
    axes = drawn(kd.plots.schedules(given, "learning_rate"), tmp_path)
    panels = [ax for ax in axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["learning_rate/hidden", "learning_rate/head"]
    for ax, layer in zip(panels, ("hidden", "head"), strict=True):
        assert len(ax.patches) == len(HISTORY)
        for line, record in zip(ax.patches, HISTORY, strict=True):
            values, edges, _ = line.get_data()
            np.testing.assert_array_equal(values, record.hyperparameters["learning_rate"][layer])
            np.testing.assert_array_equal(edges, [0, 3, 6, 9, 12])
    # Later updates are darker.
    lightness = [sum(line.get_edgecolor()[:3]) for line in panels[0].patches]
    assert lightness == sorted(lightness, reverse=True)


def test_schedules_of_everything_over_time(tmp_path):
    axes = drawn(kd.plots.schedules(HISTORY), tmp_path)
    titles = [ax.get_title() for ax in axes if ax.get_title()]
    assert titles == ["learning_rate/hidden", "learning_rate/head", "decay/hidden"]
    neurons = next(ax for ax in axes if ax.get_title() == "decay/hidden").patches[0].get_data()
    np.testing.assert_allclose(
        neurons.values, HISTORY[0].hyperparameters["decay"]["hidden"].mean(1), rtol=1e-6
    )
    drawn(kd.plots.schedules(HISTORY[:1]), tmp_path)


def test_schedules_that_are_not_there():
    with pytest.raises(
        ValueError, match=r"No 'l2' in this history has values over time.*'l2/head'"
    ):
        kd.plots.schedules(HISTORY, "l2")


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, lambda r: r["l2"]["hidden"].reshape(8, 8)),
        (
            {"layer": "hidden", "image_shape": (4, 16)},
            lambda r: r["l2"]["hidden"].reshape(4, 16),
        ),
        (
            {"layer": "hidden", "image_shape": (4, 8, 2)},
            lambda r: np.hstack(np.moveaxis(r["l2"]["hidden"].reshape(4, 8, 2), 2, 0)),
        ),
        (
            {"layer": "hidden", "argument": "l1"},
            lambda r: r["l1"]["hidden"]["kernel"].mean(1).reshape(8, 8),
        ),
        ({"layer": "head", "image_shape": (1, 5)}, lambda r: r["l2"]["head"][None]),
    ],
)
def test_penalties_as_an_image(given, tmp_path, options, wanted):
    for update in (-1, 0):
        axes = drawn(kd.plots.penalties(given, update=update, **options), tmp_path)
        image = axes[0].images[0].get_array()
        np.testing.assert_array_equal(image, wanted(HISTORY[update].hyperparameters))
        assert axes[0].get_title().endswith("update 3" if update else "update 1")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"layer": "nowhere"}, r"of layer 'nowhere'.*It has them of \['hidden', 'head'\]"),
        ({"argument": "momentum"}, "no values per input or per weight of any layer"),
        ({"argument": "decay"}, "no values per input or per weight of any layer"),
        ({"layer": "head"}, r"5 inputs of layer 'head' don't make an image of shape \(2, 2\)"),
        ({"image_shape": (28, 28)}, "64 inputs"),
        ({"image_shape": (64,)}, "64 inputs"),
    ],
)
def test_penalties_that_are_not_there(options, says):
    with pytest.raises(ValueError, match=says):
        kd.plots.penalties(HISTORY, **options)


def test_outer_loss_with_skipped_updates_and_test_error(given, tmp_path):
    axes = drawn(kd.plots.outer_loss(given, test_error=[0.3, 0.2, 0.1]), tmp_path)
    loss, skipped = axes[0].lines
    np.testing.assert_array_equal(loss.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(loss.get_ydata(), [r.outer_loss for r in HISTORY])
    np.testing.assert_array_equal(skipped.get_xdata(), [2])
    np.testing.assert_array_equal(axes[1].lines[0].get_ydata(), [0.3, 0.2, 0.1])
    alone = drawn(kd.plots.outer_loss(HISTORY[:1]), tmp_path)
    assert len(alone) == 1 and len(alone[0].lines) == 1
    with pytest.raises(ValueError, match="`test_error` has 2 numbers, the history 3 updates"):
        kd.plots.outer_loss(HISTORY, test_error=[0.1, 0.2])


ROWS = [
    {"setting": s, "hyperparameter": h, "cosine": c, "cost": k, "memory": m}
    for s, k, m in (("linear", 1.5, 2e5), ("replay", 3.0, 8e6))
    for h, c in (("l2", 0.9), ("learning_rate", 0.8))
]


def test_fidelity_of_settings(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    for rows in (ROWS, tmp_path / "rows.json"):
        axes = drawn(kd.plots.fidelity(rows), tmp_path)
        assert [ax.get_xlabel().split()[0] for ax in axes] == ["cost", "memory"]
        for ax, quantity in zip(axes, ("cost", "memory"), strict=True):
            points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines[: len(ROWS)]]
            assert points == [(row[quantity], row["cosine"]) for row in ROWS]
    assert len(kd.plots.fidelity([{k: v for k, v in ROWS[0].items() if k != "memory"}]).axes) == 1


def test_fidelity_of_updates(given, tmp_path):
    axes = drawn(kd.plots.fidelity(given), tmp_path)
    (line,) = axes[0].lines
    assert (line.get_label(), *line.get_xydata()[0]) == ("l2", 3.0, 0.75)


def test_fidelity_that_was_not_measured():
    with pytest.raises(ValueError, match="No update in this history was verified"):
        kd.plots.fidelity(HISTORY[:2])
    with pytest.raises(ValueError, match=r"Received: \['cosine', 'setting'\]"):
        kd.plots.fidelity([{"setting": "linear", "cosine": 1.0}])


DRAW = (kd.plots.schedules, kd.plots.penalties, kd.plots.outer_loss, kd.plots.fidelity)


@pytest.mark.parametrize("draw", DRAW)
def test_what_is_no_history_is_refused(draw, tmp_path):
    for wrong in (None, 3, [1, 2]):
        with pytest.raises(TypeError, match=r"DrMADCallback\.history"):
            draw(wrong)
    with pytest.raises(ValueError, match="empty"):
        draw([])
    with pytest.raises(FileNotFoundError):
        draw(str(tmp_path / "nothing.npz"))


@pytest.mark.parametrize("draw", DRAW)
def test_without_matplotlib_the_error_says_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"keras_drmad\[plots\]"):
        draw(HISTORY)
