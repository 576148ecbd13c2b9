"""Every example runs as its docstring says, on fewer images."""

import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "tfds"


def run(monkeypatch, capsys, name, *arguments) -> str:
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def data_dir(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"no prepared TFDS folder of {name} beside the project")
    return DATA


def test_digits(monkeypatch, capsys, tmp_path):
    printed = run(
        monkeypatch, capsys, "digits.py", "--updates", 3, "--horizon", 4, "--out", tmp_path
    )
    lines = printed.splitlines()
    # A header, one line an update, then the comparison.
    losses = [float(line.split()[1]) for line in lines[1:4]]
    assert losses[2] < losses[0]
    untuned, tuned = (
        next(line for line in lines if line.startswith(name)).split()
        for name in ("as it started", "tuned by DrMAD")
    )
    assert float(tuned[-2]) < float(untuned[-2])
    assert {path.name for path in tmp_path.iterdir()} == {
        "digits_schedules.png", "digits_penalties.png", "digits_outer_loss.png",
    }  # fmt: skip


def test_cifar10(monkeypatch, capsys, tmp_path):
    printed = run(
        monkeypatch, capsys, "cifar10.py", "--data-dir", data_dir("cifar10"), "--train", 640,
        "--hyper", 200, "--epochs", 2, "--out", tmp_path,
    )  # fmt: skip
    accuracies = {
        line[:28].strip(): float(line.split()[-1].strip("%"))
        for line in printed.splitlines()
        if line.startswith(("tuned", "untuned"))
    }
    assert set(accuracies) == {"tuned by DrMAD", "untuned", "untuned, hyper images added"}
    assert min(accuracies.values()) >= 8.0  # a tenth is chance
    assert (tmp_path / "cifar10_schedules.png").stat().st_size > 1000


def row(printed: str, name: str) -> list[float]:
    """The numbers at the end of the table's line that begins with a name."""
    line = next(line for line in printed.splitlines() if line.startswith(name))
    return [float(word) for word in line[len(name) :].split()]


def test_hyper_cleaning(monkeypatch, capsys):
    printed = run(
        monkeypatch, capsys, "hyper_cleaning.py", "--data-dir", data_dir("mnist"),
        "--examples", 1000, "--batch-size", 100, "--epochs", 5, "--updates", 8, "--step", 0.6,
    )  # fmt: skip
    f1 = float(next(x for x in printed.splitlines() if x.startswith("wrong labels")).split()[-1])
    assert f1 >= 0.85
    equal, learned = (
        row(printed, f"all, with {weights}")[-1]
        for weights in ("equal weights", "the learned weights")
    )
    assert learned > equal + 0.04


def test_feature_selection(monkeypatch, capsys):
    printed = run(
        monkeypatch, capsys, "feature_selection.py", "--data-dir", EXAMPLES / "data",
        "--updates", 10, "--epochs", 8,
    )  # fmt: skip
    assert row(printed, "learned ")[-1] > row(printed, "all 1 ")[-1]


def test_fine_tuning(monkeypatch, capsys):
    printed = run(
        monkeypatch, capsys, "fine_tuning.py", "--data-dir", data_dir("mnist"),
        "--pretraining-examples", 1000, "--updates", 4, "--epochs", 3,
    )  # fmt: skip
    start, tuned = row(printed, "as they start"), row(printed, "tuned ")
    assert tuned[0] < start[0]
    assert tuned[1] > start[1]
