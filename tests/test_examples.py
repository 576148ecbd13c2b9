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
