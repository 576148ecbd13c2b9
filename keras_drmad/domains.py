"""Domains: the map from an unbounded raw number to a hyperparameter's value, beside its inverse.

The outer optimizer walks freely in raw space; the domain keeps the value where it makes sense.
Hypergradients are computed with respect to the value and carried to raw space by `slope`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import tensorflow as tf

# What float32 holds with room to spare: nothing tuned is smaller or larger than these.
SMALLEST, LARGEST = 1e-37, 1e37
# No value comes nearer to the end of an interval than this part of its width.
MARGIN = 1e-6


@dataclass(frozen=True)
class Domain:
    """A set of values and the smooth map onto it from the real line.

    Wherever the raw number goes, the value stays inside: far out it stands still.
    """

    name: str
    value: Callable[[tf.Tensor], tf.Tensor]  # raw -> value
    raw: Callable[[float], float]  # value -> raw, the inverse of `value`
    slope: Callable[[tf.Tensor], tf.Tensor]  # raw -> d value / d raw
    contains: Callable[[float], bool]
    says: str  # what is inside, for error messages


def _logit(value: float) -> float:
    # Rounding must not bring a value of the inside to an end, where the logarithm is infinite.
    value = min(max(value, 1e-300), 1.0 - 1e-16)
    return math.log(value) - math.log1p(-value)


def _exp(raw: tf.Tensor) -> tf.Tensor:
    return tf.exp(tf.clip_by_value(raw, math.log(SMALLEST), math.log(LARGEST)))


def _sigmoid(raw: tf.Tensor) -> tf.Tensor:
    # Not symmetric: below 1 floating numbers are coarse, above 0 they are not.
    return tf.sigmoid(tf.clip_by_value(raw, math.log(SMALLEST), -_logit(MARGIN)))


def _bell(raw: tf.Tensor) -> tf.Tensor:
    """The slope of `_sigmoid`."""
    return _sigmoid(raw) * (1.0 - _sigmoid(raw))


REAL = Domain(
    "real",
    value=tf.identity,
    raw=float,
    slope=tf.ones_like,
    contains=lambda value: abs(value) <= LARGEST,
    says=f"a finite number of at most {LARGEST:g} in size",
)
POSITIVE = Domain(
    "positive",
    value=_exp,
    raw=math.log,
    slope=_exp,
    contains=lambda value: SMALLEST <= value <= LARGEST,
    says=f"a number above 0 (from {SMALLEST:g} to {LARGEST:g})",
)
UNIT = Domain(
    "unit",
    value=_sigmoid,
    raw=_logit,
    slope=_bell,
    contains=lambda value: SMALLEST <= value <= 1.0 - MARGIN,
    says=f"a number strictly between 0 and 1 (from {SMALLEST:g} to {1 - MARGIN:g})",
)


def interval(low: float, high: float) -> Domain:
    """The open interval (low, high), by a scaled sigmoid."""
    width = high - low
    margin = MARGIN * width

    def value(raw: tf.Tensor) -> tf.Tensor:
        # Far from 0 the sum may round to an end; the last numbers before the ends are inside. Next
        # to an end at 0 these would be numbers so small that processors take them for 0.
        dtype = raw.dtype.as_numpy_dtype
        first = np.nextafter(dtype(low), dtype(high)) if low else dtype(SMALLEST)
        last = np.nextafter(dtype(high), dtype(low)) if high else dtype(-SMALLEST)
        return tf.clip_by_value(low + width * _sigmoid(raw), first, last)

    return Domain(
        f"({low}, {high})",
        value=value,
        raw=lambda value: _logit((value - low) / width),
        slope=lambda raw: width * _bell(raw),
        contains=lambda value: low + margin <= value <= high - margin,
        says=f"a number strictly between {low} and {high} (by {margin:.1g} at least)",
    )


_NAMED = {domain.name: domain for domain in (REAL, POSITIVE, UNIT)}


def get(domain: str | tuple[float, float]) -> Domain:
    """The domain of a name or of an interval's two ends.

    Args:
        domain: `"positive"`, `"unit"`, `"real"` or a pair `(low, high)` of finite numbers.

    Raises:
        ValueError: for any other name, or a pair that is no interval.
    """
    if isinstance(domain, str) and domain in _NAMED:
        return _NAMED[domain]
    if isinstance(domain, (tuple, list)) and len(domain) == 2 and all(map(_is_end, domain)):
        low, high = float(domain[0]), float(domain[1])
        # In float32 a narrower one holds hardly any number.
        if high - low >= max(1e-4 * max(abs(low), abs(high)), 1e-30):
            return interval(low, high)
    raise ValueError(
        f"`domain` is one of {sorted(_NAMED)} or a pair (low, high) of finite numbers with "
        f"low < high (by 1e-4 of their size at least). Received: domain={domain!r}"
    )


def _is_end(end: Any) -> bool:
    if not isinstance(end, Real) or isinstance(end, bool):
        return False
    size: Any = abs(end)  # not converted: an int may be too large for a float
    return bool(size <= LARGEST)
