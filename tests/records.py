"""Records made by hand, of every grain, for the tests of reports, TensorBoard and plots."""

from __future__ import annotations

import numpy as np

from keras_drmad.reports import Label, Record, nested

STEPS = 12
LABELS = (
    Label("learning_rate", "hidden", None, True, "layer"),
    Label("learning_rate", "head", None, True, "layer"),
    Label("momentum", "model", None, False, "model"),
    Label("l2", "hidden", None, False, "input"),
    Label("l2", "head", None, False, "input"),
    Label("l1", "hidden", "kernel", False, "weight"),
    Label("l1", "head", "kernel", False, "weight"),
    Label("decay", "hidden", None, True, "neuron"),
)
SHAPES = ((4,), (4,), (1,), (1, 64), (1, 5), (1, 64, 5), (1, 5, 3), (STEPS, 5))


def history(updates: int = 3, dtype=np.float32) -> list[Record]:
    """So many updates of eight groups; the second was skipped, and the third verified."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(updates):
        arrays = [np.exp(rng.normal(-3.0, 1.0, shape)).astype(dtype) for shape in SHAPES]
        gradients = [rng.normal(0.0, 1.0, shape).astype(dtype) for shape in SHAPES]
        last = i == updates - 1
        records.append(
            Record(
                outer_loss=1.0 / (i + 1),
                hyperparameters=nested(LABELS, arrays),
                hypergradients=nested(LABELS, gradients),
                initial_weights_gradient=[np.ones((2, 3), dtype)] if last else None,
                epoch=2 * i + 1,
                step=STEPS * (i + 1),
                accepted=i != 1,
                reason="the adjoint exploded" if i == 1 else "",
                setting="linear, gauss_newton",
                labels=LABELS,
                verification={"l2": {"cosine": 0.75, "signs": 0.9, "norm": 1.1}}
                if i == 2
                else None,
            )
        )
    return records
