"""Tests of what the installed Keras does not have yet are skipped, and say so."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import keras
import pytest

_NORMALIZATION = inspect.signature(keras.layers.BatchNormalization.__init__).parameters
_HAS = {
    "RMSNormalization": hasattr(keras.layers, "RMSNormalization"),
    "BatchNormalization(renorm=True)": "renorm" in _NORMALIZATION,
    "remat": hasattr(keras, "remat"),
}
_NEEDS = {"rms": "RMSNormalization", "renorm": "BatchNormalization(renorm=True)"}
_NEEDS.update(dict.fromkeys(("recomputed", "remat"), "remat"))


def cases(names: Iterable[str]) -> list:
    """The names of a table of cases; those that this Keras can't make are skipped."""
    return [_case(name) for name in names]


def _case(name: str):
    needed = _NEEDS.get(name.split("_")[0])
    if _HAS.get(needed, True):
        return name
    reason = f"Keras {keras.__version__} has no {needed}"
    return pytest.param(name, marks=pytest.mark.skip(reason=reason))
