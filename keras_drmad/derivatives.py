"""The derivatives that `curvature.py` takes, for one function, against finite differences.

A function with kinks (ReLU, max pooling) is right almost everywhere: points are random and steps
small, so that a step rarely crosses a kink, and more than one point is tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from keras_drmad import curvature
from keras_drmad.normalization import exact_moments
from keras_drmad.objectives import Forward, dense

Tensors = list[tf.Tensor]
# Outputs, and the penalty or None, of a list of tensors.
Function = Callable[[Tensors], tuple[Tensors, tf.Tensor | None]]


@dataclass(frozen=True)
class Finding:
    """One derivative, tested."""

    status: str  # "ok", "wrong", "missing" or "not tested"
    error: float | None = None  # relative to finite differences
    message: str = ""  # the error that was raised, or why it was not tested

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def __str__(self) -> str:
        known = self.status == "wrong" and self.error is not None
        return f"wrong ({self.error:.1g})" if known else self.status


@dataclass(frozen=True)
class Findings:
    """The derivatives of one function, tested."""

    gradient: Finding  # the first derivative
    hessian: Finding  # the product with the Hessian, as the reverse loop takes it
    ordinary: Finding  # the same without the correction for normalization layers
    gauss_newton: Finding  # the product with the Gauss-Newton matrix

    @property
    def needed(self) -> tuple[Finding, Finding, Finding]:
        return self.gradient, self.hessian, self.gauss_newton

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.needed)


def untested(why: str) -> Findings:
    """Findings of a layer that could not be examined, and why."""
    return Findings(*(Finding("not tested", message=why) for _ in range(4)))


# Relative step and tolerance of each attempt. The last in double precision is for functions that
# compute in float32 somewhere inside.
_DOUBLE = ((1e-5, 1e-5), (1e-6, 1e-5), (1e-5, 1e-5), (1e-3, 2e-3))
_SINGLE = ((1e-2, 2e-2), (3e-3, 2e-2), (1e-3, 2e-2))
# A part that is this much smaller than the whole is not told from rounding.
_FLOOR = 1e-3


def examine(
    function: Function, point: Callable[[np.random.Generator, int], Tensors], precise: bool = True
) -> Findings:
    """Test the derivatives of a function.

    Args:
        function: What is differentiated.
        point: `point(rng, attempt)` gives a random place to do it at.
        precise: Whether all of it is in float64.

    Returns:
        The best of a few attempts.
    """
    best: Findings | None = None
    for attempt, (step, tolerance) in enumerate(_DOUBLE if precise else _SINGLE):
        rng = np.random.default_rng(attempt)
        found = _Probe(function, point(rng, attempt), rng, step, tolerance).findings()
        best = found if best is None else _better(best, found)
        if all(finding.status in ("ok", "missing") for finding in best.needed):
            break
    assert best is not None
    return best


def _better(a: Findings, b: Findings) -> Findings:
    def rank(finding: Finding) -> tuple[bool, float]:
        return not finding.ok, np.inf if finding.error is None else finding.error

    names = ("gradient", "hessian", "ordinary", "gauss_newton")
    return Findings(*(min(getattr(a, name), getattr(b, name), key=rank) for name in names))


class _Probe:
    """A random smooth loss of the outputs, differentiated at a point along a direction."""

    def __init__(
        self,
        function: Function,
        point: Tensors,
        rng: np.random.Generator,
        step: float,
        tolerance: float,
    ):
        self.function, self.point = function, point
        self.step, self.tolerance = step, tolerance
        # Each part of the point moves in proportion to its size, and counts likewise.
        self.scales = [_size(x) for x in point]
        self.direction = [
            tf.cast(rng.normal(size=x.shape) * scale, x.dtype)
            for x, scale in zip(point, self.scales, strict=True)
        ]
        outputs, _ = function(point)
        self.finite = all(np.all(np.isfinite(z)) for z in outputs)
        self.random = [(rng.normal(size=z.shape), _size(z)) for z in outputs]

    def findings(self) -> Findings:
        if not self.finite:
            return untested("its values are not finite at random points")
        gradient = self._tested(self._slope)
        if gradient.message:  # nothing to compare with
            return Findings(gradient, gradient, gradient, gradient)
        return Findings(
            gradient,
            self._tested(self._curved, exact_moments()),
            self._tested(self._curved, contextlib.nullcontext()),
            self._tested(self._gauss_newton),
        )

    def _tested(self, derivative: Callable, *args) -> Finding:
        """Of what a method returns: the product, what is expected, and how large rounding is."""
        try:
            found, expected, rounding = derivative(*args)
        except Exception as error:  # whatever is raised, this derivative can't be had
            return Finding("missing", message=str(error).strip().split("\n")[0])
        whole = np.sqrt(sum(np.sum(np.square(x)) for x in expected))
        floor = max(_FLOOR * whole, 1e-4 * rounding, 1e-30)
        errors = [
            np.linalg.norm(a - b) / max(np.linalg.norm(b), floor)
            for a, b in zip(found, expected, strict=True)
        ]
        largest = float(max(errors, default=0.0))
        return Finding("ok" if largest < self.tolerance else "wrong", largest)

    # Each derivative, by automatic differentiation and by finite differences ------------------

    def _slope(self):
        gradient = self._gradient(self.point)
        found, expected = [], []
        for i, (g, d) in enumerate(zip(gradient, self.direction, strict=True)):
            ahead, behind = (self._loss(self._moved(sign, i)) for sign in (1.0, -1.0))
            expected.append(np.asarray([float(ahead - behind) / (2.0 * self.step)]))
            found.append(np.asarray([float(tf.reduce_sum(g * d))]))
        return found, expected, np.sqrt(sum(np.sum(x**2) for x in self._scaled(gradient)))

    def _curved(self, moments: contextlib.AbstractContextManager):
        with tf.GradientTape() as tape, moments:
            tape.watch(self.point)
            gradient = self._gradient(self.point)
        product = _filled(tape.gradient(gradient, self.point, self.direction), self.point)
        ahead, behind = (self._gradient(self._moved(sign)) for sign in (1.0, -1.0))
        expected = [(a - b) / (2.0 * self.step) for a, b in zip(ahead, behind, strict=True)]
        size = np.sqrt(sum(np.sum(x**2) for x in self._scaled(gradient)))
        return self._scaled(product), self._scaled(expected), size

    def _gauss_newton(self):
        def forward(point, tuned):
            outputs, _ = self.function(point)
            return Forward(self._loss_of(outputs), outputs, None)

        product, _ = curvature.gauss_newton(forward, self.point, [])[1](self.direction)
        ahead, behind = (self.function(self._moved(sign))[0] for sign in (1.0, -1.0))
        pushed = [(a - b) / (2.0 * self.step) for a, b in zip(ahead, behind, strict=True)]
        with tf.GradientTape() as first:
            first.watch(self.point)
            outputs, _ = self.function(self.point)
        with tf.GradientTape() as outer:
            outer.watch(outputs)
            with tf.GradientTape() as inner:
                inner.watch(outputs)
                loss = self._loss_of(outputs)
            slopes = inner.gradient(loss, outputs)
        bent = outer.gradient(slopes, outputs, pushed)
        expected = _filled(first.gradient(outputs, self.point, bent), self.point)
        return self._scaled(product), self._scaled(expected), 1.0

    def _gradient(self, point: Tensors) -> Tensors:
        with tf.GradientTape() as tape:
            tape.watch(point)
            loss = self._loss(point)
        return _filled(tape.gradient(loss, point), point)

    def _loss(self, point: Tensors) -> tf.Tensor:
        outputs, penalty = self.function(point)
        loss = self._loss_of(outputs)
        return loss if penalty is None else loss + tf.cast(penalty, loss.dtype)

    def _loss_of(self, outputs: Tensors) -> tf.Tensor:
        terms = []
        for z, (slope, size) in zip(outputs, self.random, strict=True):
            z = z / tf.cast(size, z.dtype)
            term = tf.cast(slope, z.dtype) * tf.tanh(z) + 0.5 * tf.square(z)
            terms.append(tf.cast(tf.reduce_sum(term), outputs[0].dtype))
        return tf.add_n(terms)

    def _moved(self, sign: float, only: int | None = None) -> Tensors:
        return [
            x + tf.constant(sign * self.step, x.dtype) * d if only in (None, i) else x
            for i, (x, d) in enumerate(zip(self.point, self.direction, strict=True))
        ]

    def _scaled(self, tensors: Tensors) -> list[np.ndarray]:
        return [np.asarray(x) * scale for x, scale in zip(tensors, self.scales, strict=True)]


def _size(x: tf.Tensor) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if np.size(x) and np.any(x) else 1.0


def _filled(gradients, like: Tensors) -> Tensors:
    """Dense, and zero where a gradient is not connected."""
    return [
        tf.zeros_like(x) if g is None else dense(g) for g, x in zip(gradients, like, strict=True)
    ]
