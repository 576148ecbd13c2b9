"""`check_model`: which layers have a wrong or missing second derivative, found by testing each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad import batches as packing
from keras_drmad import checks, layer_calls, trajectories
from keras_drmad.derivatives import Finding, Findings
from keras_drmad.layer_calls import Call
from keras_drmad.layer_tests import findings_of
from keras_drmad.optimizers import Optimizer

CURVATURES = ("hessian", "gauss_newton", "finite_difference")
TRAJECTORIES = ("linear", "piecewise", "replay", "stored")
EXAMPLES = 5  # in a batch; of fewer, batch statistics leave next to no derivative


@dataclass(frozen=True)
class LayerReport:
    """Layers of one kind, tested: same class, same settings but for sizes."""

    kind: str  # the class, and the activation if there is one
    layers: tuple[str, ...]  # names
    findings: Findings

    @property
    def ok(self) -> bool:
        return self.findings.ok

    @property
    def corrected(self) -> bool:
        """Whether the Hessian is right only with the correction for normalization layers."""
        return self.findings.hessian.ok and not self.findings.ordinary.ok


@dataclass(frozen=True)
class ModelReport:
    """What `check_model` found. As a string it is a table.

    Args:
        model: The model's name.
        layers: One report for each kind of layer.
        objections: Curvature name to what speaks against it; an empty list where it is right.
        steps: Of the run for which memory is given.
        state_bytes: Of one copy of the weights and the optimizer's slots.
        batch_bytes: Of one batch; 0 where none was passed.
        memory: Trajectory name to the bytes that it keeps of such a run, batches included.
    """

    model: str
    layers: tuple[LayerReport, ...]
    objections: dict[str, list[str]]
    steps: int
    state_bytes: int
    batch_bytes: int
    memory: dict[str, int]

    @property
    def problems(self) -> list[LayerReport]:
        """The kinds with a derivative that is wrong, missing, or was not tested."""
        return [report for report in self.layers if not report.ok]

    @property
    def exact_curvature(self) -> str | None:
        """For an exact path, `replay` or `stored`; None if there is none."""
        return self._first("hessian", "finite_difference")

    @property
    def reconstructed_curvature(self) -> str | None:
        """For a reconstructed path, `linear` or `piecewise`; None if there is none."""
        return self._first("gauss_newton", "finite_difference")

    def _first(self, *names: str) -> str | None:
        return next((name for name in names if not self.objections[name]), None)

    def __str__(self) -> str:
        return "\n".join([*_layer_lines(self), "", *_curvature_lines(self), "", *_memory(self)])


def check_model(model: keras.Model, steps: int = 1000, batch: Any = None) -> ModelReport:
    """Test the derivatives of each kind of layer in a model, and say which settings suit it.

    Each layer is called in float64 on random data (small images where it is called on large ones)
    with weights near its own, and the curvature products that the reverse pass would take are
    compared with finite differences. Afterwards the model is as it was; only, it is built, if it
    was not and a batch was passed.

    Example:

    >>> print(kd.check_model(model, steps=2000, batch=(x[:50], y[:50])))

    Args:
        model: A built model, or any model where `batch` is passed.
        steps: Training steps of a horizon, for the memory. Defaults to 1000.
        batch: A batch as `fit` would train on, `(x, y[, sample_weight])` or `x`: its shapes count.
            Defaults to `None`: shapes are those that the model was built for, and memory is given
            without that for batches.

    Returns:
        A `ModelReport`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` is a keras.Model. Received: model={model!r}")
    checks.positive_int(steps, "steps")
    inputs = _input_specs(model, batch)
    if not model.built:
        model(keras.tree.map_structure(lambda s: keras.KerasTensor(s.shape, s.dtype), inputs))
    reports = _reports(layer_calls.record(model, inputs), set())
    state_bytes = _state_bytes(model)
    batch_bytes = 0 if batch is None else _nbytes(batch)
    return ModelReport(
        model.name,
        tuple(reports),
        _objections(model, reports),
        steps,
        state_bytes,
        batch_bytes,
        {
            name: trajectories.get(name).copies(steps) * state_bytes + steps * batch_bytes
            for name in TRAJECTORIES
        },
    )


def _objections(model: keras.Model, reports: list[LayerReport]) -> dict[str, list[str]]:
    against: dict[str, list[str]] = {name: [] for name in CURVATURES}
    for report in reports:
        found = report.findings
        tested = {"hessian": found.hessian, "gauss_newton": found.gauss_newton}
        for name in CURVATURES:
            of_this = tested.get(name, found.gradient)
            if {"wrong", "missing"} & {found.gradient.status, of_this.status}:
                against[name] += report.layers
    for name in CURVATURES:
        try:
            checks.check_curvature(model, name)
        except ValueError as error:
            if not against[name]:
                against[name].append(str(error))
    return against


# What it is called on ----------------------------------------------------------------------------


def _input_specs(model: keras.Model, batch: Any) -> Any:
    """Specs of a few examples, in the structure that the model is called on."""
    if batch is not None:
        x = keras.utils.unpack_x_y_sample_weight(batch)[0]
        return keras.tree.map_structure(
            lambda a: tf.TensorSpec(_few(a.shape), a.dtype), keras.tree.map_structure(_tensor, x)
        )
    if getattr(model, "inputs", None):
        functional = getattr(model, "_functional", None) or model  # what a Sequential holds
        return keras.tree.map_structure(
            lambda t: tf.TensorSpec(_few(t.shape), t.dtype),
            getattr(functional, "_inputs_struct", model.inputs),
        )
    shapes = model.get_build_config() if model.built else None
    if not shapes or "input_shape" not in shapes:
        raise ValueError(
            f"It is not known what {model.name} is called on. Pass `batch`, one that it would be "
            "trained on."
        )
    return keras.tree.map_shape_structure(
        lambda shape: tf.TensorSpec(_few(shape), keras.config.floatx()), shapes["input_shape"]
    )


def _tensor(x: Any) -> Any:
    """An array as `fit` passes it on, which turns numpy's floats into its own."""
    if x is None or tf.is_tensor(x):
        return x
    x = np.asarray(x)
    if not x.shape:
        raise ValueError(f"`batch` holds arrays, examples first. Received in it: {x!r}")
    return tf.convert_to_tensor(x.astype(keras.config.floatx()) if x.dtype.kind == "f" else x)


def _few(shape: Any) -> tuple[int, ...]:
    """A shape with few examples, and with small sizes where it leaves them open."""
    open_size = 32 if len(shape) >= 4 else 8
    first = min(shape[0] or EXAMPLES, EXAMPLES)
    return (first, *(open_size if size is None else int(size) for size in shape[1:]))


# One test for each kind --------------------------------------------------------------------------


def _reports(root: Call, seen: set[str]) -> list[LayerReport]:
    kinds: dict[str, list[Call]] = {}
    for call in _outermost(root):
        kinds.setdefault(_kind(call), []).append(call)
    reports = []
    for kind, calls in kinds.items():
        smallest = min(calls, key=lambda call: call.size)
        findings = None if kind in seen else findings_of(smallest)
        seen.add(kind)
        if findings is None:
            continue
        names = tuple(dict.fromkeys(call.layer.name for call in calls))
        reports.append(LayerReport(_title(smallest.layer), names, findings))
        if not findings.ok and not isinstance(smallest.layer, keras.Model):
            # Which of the layers inside it is at fault?
            for inner in smallest.inner:
                reports += _reports(inner, seen)
    return reports


def _outermost(call: Call) -> Iterator[Call]:
    """The calls that are tested: of layers, and of models for what they do between layers."""
    is_model = isinstance(call.layer, keras.Model)
    # A model of Keras's own (functional, sequential) does nothing between its layers.
    if not (is_model and type(call.layer).__module__.startswith("keras.")):
        moves = any(tensor.moves for tensor in call.tensors)
        if moves or layer_calls.trained_variables(call.layer):
            yield call
    if is_model:
        for inner in call.inner:
            yield from _outermost(inner)


_SIZES = ("name", "dtype", "filters", "units", "batch_shape", "build_config", "seed", "rate")


def _kind(call: Call) -> str:
    """Equal for calls of which one stands for all."""
    layer = call.layer
    try:
        config = json.dumps(_settings(layer.get_config()), default=repr, sort_keys=True)
    except Exception:  # whatever a custom layer raises there
        config = str(id(layer))
    if not type(layer).__module__.startswith("keras."):  # its configuration may not say all
        config += repr([(k, v) for k, v in vars(layer).items() if _simple(k, v)])
    # What resizes or crops depends on sizes, and has no weights.
    weightless = not layer_calls.trained_variables(layer)
    tensors = [
        (x.shape[1:-1] if weightless else len(x.shape), x.dtype.name, x.moves) for x in call.tensors
    ]
    return repr((type(layer).__module__, type(layer).__qualname__, config, tensors))


def _simple(name: str, value: Any) -> bool:
    return not name.startswith("_") and isinstance(value, (bool, int, float, str))


def _settings(config: Any) -> Any:
    if isinstance(config, (list, tuple)):
        return [_settings(x) for x in config]
    if not isinstance(config, dict):
        return config
    kept = {
        key: _settings(value)
        for key, value in config.items()
        if key not in _SIZES and not key.endswith(("_initializer", "_constraint"))
    }
    return {**kept, "random": bool(config.get("rate"))}


def _title(layer: Any) -> str:
    activation = getattr(getattr(layer, "activation", None), "__name__", "linear")
    return type(layer).__name__ + ("" if activation == "linear" else f" {activation}")


# Memory ------------------------------------------------------------------------------------------


def _state_bytes(model: keras.Model) -> int:
    """Bytes of the weights and of the optimizer's slots, which need not have been made yet."""
    weights = sum(_size_of(v) for v in model.trainable_variables)
    optimizer = getattr(model, "optimizer", None)  # there is none before `compile`
    if isinstance(optimizer, Optimizer) and not optimizer.built:
        return weights * (1 + len(optimizer.rule.slots))
    if isinstance(optimizer, Optimizer):
        return weights + sum(_size_of(s) for slots in optimizer.slot_variables for s in slots)
    if optimizer is not None:  # one of Keras; scalars are counters and rates
        return weights + sum(_size_of(v) for v in optimizer.variables if len(v.shape))
    return weights


def _size_of(variable: keras.Variable) -> int:
    return int(np.prod(variable.shape)) * tf.as_dtype(variable.dtype).size


def _nbytes(batch: Any) -> int:
    return packing.nbytes(keras.tree.map_structure(_tensor, batch))


# The table ---------------------------------------------------------------------------------------


def _layer_lines(report: ModelReport) -> list[str]:
    rows: dict[tuple[str, ...], set[str]] = {}
    remarks: dict[tuple[str, ...], list[str]] = {}
    for one in report.layers:
        found = one.findings
        # One row for layers of a class of which the same is found.
        cells = map(_short, (found.gradient, found.hessian, found.ordinary, found.gauss_newton))
        row = (one.kind, *cells)
        rows.setdefault(row, set()).update(one.layers)
        remarks.setdefault(row, []).extend(_remarks(one))
    lines = [
        f"{report.model}: derivatives against finite differences",
        _line("layers", "count", "gradient", "hessian", "uncorrected", "gauss_newton"),
    ]
    for row, names in rows.items():
        lines.append(_line(row[0], len(names), *row[1:]))
        lines += [f"    {remark}" for remark in dict.fromkeys(remarks[row])]
    return lines


def _line(kind: str, count: Any, *cells: str) -> str:
    return f"{kind:<34}{count:>6}  {''.join(f'{cell:<13}' for cell in cells)}".rstrip()


def _short(finding: Finding) -> str:
    if finding.status == "wrong" and finding.error is not None:
        return f"wrong, {finding.error:.1g}"
    return finding.status


def _remarks(report: LayerReport) -> list[str]:
    if report.ok:
        return []
    messages = [finding.message for finding in report.findings.needed if finding.message]
    if report.findings.gradient.status == "wrong":
        messages.append(
            "its gradient is not the derivative of its value: stopped, made up, or lost"
        )
    return list(dict.fromkeys([", ".join(report.layers), *messages]))


def _curvature_lines(report: ModelReport) -> list[str]:
    lines = []
    for path, names, curvature in (
        ("an exact path", "replay, stored", report.exact_curvature),
        ("a reconstructed path", "linear, piecewise", report.reconstructed_curvature),
    ):
        suits = "no curvature suits" if curvature is None else f"curvature={curvature!r}"
        lines.append(f"on {path} ({names}): {suits}")
    for name, against in report.objections.items():
        if against:
            lines.append(f"not {name!r}: {', '.join(against)}")
    unknown = [r for r in report.problems if r.findings.hessian.status == "not tested"]
    if unknown:
        names = ", ".join(layer for one in unknown for layer in one.layers)
        lines.append(f"this holds as far as layers were tested; these were not: {names}")
    return lines


def _memory(report: ModelReport) -> list[str]:
    per_batch = f", {_bytes(report.batch_bytes)} a batch" if report.batch_bytes else ", no batches"
    return [
        f"memory over {report.steps} steps ({_bytes(report.state_bytes)} a state{per_batch})",
        *(f"{name:<12}{_bytes(size):>12}" for name, size in report.memory.items()),
    ]


def _bytes(size: float) -> str:
    unit = 0
    while size >= 1000 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
