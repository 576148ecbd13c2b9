"""`check_model` on architectures of keras.applications: the table of docs/fidelity.md.

python benchmarks/check_models.py                   # all, one after the other
python benchmarks/check_models.py --full VGG16      # the whole report of one
"""

from __future__ import annotations

import argparse
import gc
import time

import keras
import numpy as np

import keras_drmad as kd

# The smallest images that each takes, but no smaller than 32 x 32.
SIZES = {
    "VGG16": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "DenseNet121": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "NASNetMobile": 32,
    "Xception": 71,
    "InceptionV3": 75,
    "ConvNeXtTiny": 32,
}
BATCH, STEPS = 32, 1000


def check(name: str) -> tuple[kd.ModelReport, keras.Model, float]:
    """Build one architecture, check it, and say how long the check took."""
    keras.utils.set_random_seed(0)
    size = SIZES[name]
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    model.compile(kd.optimizers.SGD(momentum=0.9), "sparse_categorical_crossentropy")
    batch = (np.zeros((BATCH, size, size, 3), "uint8"), np.zeros(BATCH, "uint8"))
    started = time.perf_counter()
    report = kd.check_model(model, STEPS, batch)
    return report, model, time.perf_counter() - started


def row(name: str, report: kd.ModelReport, model: keras.Model, seconds: float) -> str:
    """One line of the table."""
    layers = [layer for kind in report.layers for layer in kind.layers]
    tested = [kind for kind in report.layers if kind.findings.hessian.status != "not tested"]
    corrected = [layer for kind in report.layers if kind.corrected for layer in kind.layers]
    worst = max(
        (kind.findings.ordinary.error for kind in report.layers if kind.corrected), default=0
    )
    right = max(kind.findings.hessian.error or 0 for kind in report.layers if kind.ok)
    problems = ", ".join(f"{kind.kind} ({kind.findings.hessian})" for kind in report.problems)
    cells = [
        name,
        f"{SIZES[name]}",
        f"{model.count_params() / 1e6:.1f} M",
        f"{len(set(layers))}",
        f"{len(tested)} of {len(report.layers)}",
        f"{len(set(corrected))}" + (f" (up to {worst:.0%})" if corrected else ""),
        f"{right:.0e}",
        problems or "none",
        str(report.exact_curvature),
        str(report.reconstructed_curvature),
        *(f"{report.memory[t] / 1e9:.2f}" for t in ("linear", "replay", "stored")),
        f"{seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "architecture", "image", "weights", "layers", "kinds tested",
    "wrong without the correction", "largest error with it", "problems",
    "exact path", "reconstructed path", "linear, GB", "replay, GB", "stored, GB", "seconds",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=list(SIZES), help="names")
    parser.add_argument("--full", action="store_true", help="print the whole reports")
    arguments = parser.parse_args()
    if not arguments.full:
        print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for name in arguments.architectures:
        report, model, seconds = check(name)
        print(report if arguments.full else row(name, report, model, seconds), flush=True)
        del model
        keras.backend.clear_session()
        gc.collect()


if __name__ == "__main__":
    main()
