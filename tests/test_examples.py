"""Every example runs as its docstring says, on fewer images."""

import json
import runpy
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds

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


def test_nets_of_cifar10():
    """ResNet-20 has 0.27 million weights, as in its paper."""
    example = runpy.run_path(str(EXAMPLES / "cifar10.py"))
    counts = {name: example["compiled_net"](name, 0.1, 0.0, 0).count_params() for name in
              example["NETS"]}  # fmt: skip
    assert counts == {"cnn": 34_170, "vgg": 205_242, "resnet20": 274_042}


def test_cifar10_with_another_net(monkeypatch, capsys, tmp_path):
    results = tmp_path / "results.json"
    results.write_text('{"kept": 1}')
    run(
        monkeypatch, capsys, "cifar10.py", "--data-dir", data_dir("cifar10"), "--model", "vgg",
        "--train", 64, "--hyper", 32, "--test", 64, "--batch-size", 32, "--epochs", 1,
        "--norm-momentum", 0.9, "--out", tmp_path, "--results", results,
    )  # fmt: skip
    results = json.loads(results.read_text())
    assert set(results) == {"kept", "vgg, momentum 0.9, seed 0"}
    found = results["vgg, momentum 0.9, seed 0"]
    assert found["accepted"] == 1
    # 6 convolutions, as many normalizations, 2 dense layers.
    assert len(found["learning_rate"]) == 14
    assert found["tuned by DrMAD"]["images"] == found["untuned"]["images"] == 64
    assert found["untuned, hyper images added"]["images"] == 96


def test_imagenet(monkeypatch, capsys, tmp_path):
    """Random images through the real pipeline; a few layers in the place of ResNet-50."""
    made = []

    def small(weights, input_tensor, classes, classifier_activation):
        made.append((weights, classifier_activation))
        layers = keras.layers
        x = layers.BatchNormalization()(layers.Conv2D(4, 3, strides=2)(input_tensor))
        x = layers.Dense(classes)(layers.GlobalAveragePooling2D()(layers.ReLU()(x)))
        return keras.Model(*keras.utils.get_source_inputs(input_tensor), x)

    monkeypatch.setattr(keras.applications, "ResNet50", small)
    results = tmp_path / "results.json"
    printed = run(
        monkeypatch, capsys, "imagenet.py", "--fake-data", "--image-size", 32, "--batch-size", 4,
        "--steps", 6, "--updates", 2, "--window", 4, "--reverse-steps", 2, "--max-batches", 2,
        "--results", results,
    )  # fmt: skip
    assert made == [(None, None)]
    assert "validation images: accuracy" in printed
    found = json.loads(results.read_text())["tuned, 6 steps"]
    assert found["accepted"] == 2
    assert found["tuned"] == 5  # rates of three layers, L2 of two


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


def test_mnist(monkeypatch, capsys, tmp_path):
    printed = run(
        monkeypatch, capsys, "mnist.py", "--data-dir", data_dir("mnist"), "--train", 1000,
        "--hyper", 300, "--epochs", 3, "--updates", 6, "--outer", "sign:0.3", "--no-jit",
        "--out", tmp_path,
    )  # fmt: skip
    updates = [line for line in printed.splitlines() if "updates: outer loss" in line]
    losses = [float(line.split()[4].strip(",")) for line in updates]
    assert len(losses) == 7  # the start, and after each update
    assert losses[-1] < losses[0]
    assert {path.name for path in tmp_path.iterdir()} == {"mnist_l2.png", "mnist_test_error.png"}


def test_mnist_schedules(monkeypatch, capsys, tmp_path):
    printed = run(
        monkeypatch, capsys, "mnist_schedules.py", "--data-dir", data_dir("mnist"),
        "--train", 1000, "--hyper", 300, "--updates", 8, "--outer-step", 0.3, "--no-jit",
        "--out", tmp_path,
    )  # fmt: skip
    updates = [line for line in printed.splitlines() if "updates: outer loss" in line]
    losses = [float(line.split()[4].strip(",")) for line in updates]
    assert len(losses) == 9
    assert losses[-1] < losses[0]
    assert {path.name for path in tmp_path.iterdir()} == {
        "mnist_schedules.png", "mnist_schedules_test_error.png",
    }  # fmt: skip


OMNIGLOT = DATA.parent / "omniglot_small.npz"
FAST_OMNIGLOT = ("--side", 7, "--units", 8, "--epochs", 3, "--seeds", 1, "--no-jit")


def test_omniglot(monkeypatch, capsys, tmp_path):
    if not OMNIGLOT.is_file():
        pytest.skip("no omniglot_small.npz beside the project")
    results = tmp_path / "results.json"
    printed = run(
        monkeypatch, capsys, "omniglot.py", "--omniglot-file", OMNIGLOT, *FAST_OMNIGLOT,
        "--updates", 3, "--results", results,
    )  # fmt: skip
    found = json.loads(results.read_text())["as drawn"]
    counts = {method: seeds["0"]["tuned"] for method, seeds in found.items()}
    # A rate and an L2 for each of three layers; 28 pairs of 8 alphabets in each of two layers.
    assert list(counts.values()) == [6, 6, 6 + 2, 6 + 56]
    for method, seeds in found.items():
        losses = seeds["0"]["outer_loss"]
        assert min(losses[1:]) < losses[0]
        assert seeds["0"]["skipped"] == 0
        assert f"| {method} | {counts[method]} |" in printed


def test_omniglot_by_tfds(monkeypatch, capsys, tmp_path):
    """The folder is written by TFDS's own builder, from made-up drawings."""
    rng = np.random.default_rng(0)
    names = ["Blots", "Dots", "Lines"]

    def drawings(self, alphabets):
        for alphabet in alphabets:
            for character in range(2):
                for drawing in range(6):
                    ink = rng.uniform(size=(105, 105, 1)) < 0.3 + 0.3 * character
                    yield (
                        f"{alphabet} {character} {drawing}",
                        {
                            "image": np.where(ink, 0, 255).astype("uint8").repeat(3, -1),
                            "alphabet": names[alphabet],
                            "alphabet_char_id": character,
                            "label": 2 * alphabet + character,
                        },
                    )

    def splits(self, manager):
        self.info.features["alphabet"].names = names + [f"{i}" for i in range(47)]
        return {"small1": drawings(self, [0, 1]), "small2": drawings(self, [1, 2])}

    real, parts = tfds.builder_cls("omniglot"), {"_split_generators": splits, "url_infos": {}}
    with tfds.core.registered.skip_registration():
        offline = type("Omniglot", (real,), parts)
    offline(data_dir=tmp_path).download_and_prepare()
    example = runpy.run_path(str(EXAMPLES / "omniglot.py"))
    data = example["from_tfds"](str(tmp_path))
    assert data.names == names
    assert data.images.shape == (36, 28, 28)  # "Dots" is in both sets, and counts once
    assert np.bincount(data.character).tolist() == [6] * 6
    assert sorted(data.drawer) == sorted(list(range(6)) * 6)
    ink = [data.images[data.character % 2 == i].mean() for i in (0, 1)]
    np.testing.assert_allclose(ink, [0.3, 0.6], atol=0.01)
    printed = run(
        monkeypatch, capsys, "omniglot.py", "--data-dir", tmp_path, *FAST_OMNIGLOT,
        "--updates", 1, "--train-drawers", 2, "--hyper-drawers", 2, "--batch-size", 2,
        "--methods", "tied, a strength per layer and pair",
    )  # fmt: skip
    assert "| tied, a strength per layer and pair | 12 |" in printed  # 6 and 2 x 3 pairs
