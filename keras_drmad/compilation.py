"""Whether reverse walks are compiled by XLA: as the user asks, or whichever is measured faster.

XLA halves the time of a walk through a small dense net, and lengthens that through a small
convolutional net on a CPU. Compiling takes seconds, which a short run never gets back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import keras
from tensorflow.python.framework.config import is_op_determinism_enabled

from keras_drmad.objectives import seed_variables


@dataclass
class _Pace:
    """Seconds per step of walks of one kind."""

    plain: float = math.inf
    compiled: float = math.inf
    spent: float = 0.0  # seconds in plain walks
    tried: bool = False  # whether a walk was compiled, which took its time


class Compilation:
    """Decides before each walk.

    With `"auto"` walks are plain graphs until these have taken as long as a compilation may. Then
    the next two walks of that kind are compiled, the first to compile and the second to measure,
    and all later ones go the faster way. A walk that turns out `hopeless` is ended plainly. The
    clock decides, so two runs may differ in their last digits; with
    `tf.config.experimental.enable_op_determinism` walks stay plain.

    Args:
        asked: True, False or `"auto"`.
        possible: Whether `"auto"` may choose XLA.
    """

    WORTH = 10.0  # seconds in plain walks before XLA is tried

    def __init__(self, asked: bool | str, possible: bool = True):
        self.asked, self.possible = asked, possible
        self._paces: dict[str, _Pace] = {}

    def use(self, kind: str) -> bool:
        """Whether the next walk of a kind is to be compiled."""
        if self.asked != "auto":
            return bool(self.asked)
        if not self.possible or is_op_determinism_enabled():
            return False
        pace = self._pace(kind)
        if pace.spent < self.WORTH:
            return False
        return math.isinf(pace.compiled) or pace.compiled < pace.plain

    def untried(self, kind: str) -> bool:
        """Whether no walk of a kind has been compiled, to see whether that is faster."""
        return self.asked == "auto" and not self._pace(kind).tried

    def settled(self, kind: str) -> bool:
        """Whether every later walk of a kind goes the same way."""
        if self.asked != "auto" or not self.possible or is_op_determinism_enabled():
            return True
        return not math.isinf(self._pace(kind).compiled)

    def note(self, kind: str, compiled: bool, seconds: float, steps: int) -> None:
        """What a walk took."""
        pace = self._pace(kind)
        if not compiled:
            pace.spent += seconds
            pace.plain = min(pace.plain, seconds / steps)
        elif pace.tried:
            pace.compiled = min(pace.compiled, seconds / steps)
        else:
            pace.tried = True

    def hopeless(self, kind: str, seconds: float, steps: int) -> bool:
        """Whether a part of a compiled walk was so slow that the rest is better walked plainly.

        XLA has no fast form of some second derivatives of convolutions on a CPU, and takes tens of
        times as long for them. It is not tried again.
        """
        pace = self._pace(kind)
        if self.asked != "auto" or seconds / steps <= 2.0 * pace.plain:
            return False
        pace.tried, pace.compiled = True, seconds / steps
        return True

    def _pace(self, kind: str) -> _Pace:
        return self._paces.setdefault(kind, _Pace())


def wanted(model: keras.Model, asked: bool | str) -> bool | str:
    """Whether XLA compiles walks.

    It draws other random numbers from a seed than plain graphs, and in half precision it rounds so
    much less that a replay ends elsewhere: there a walk goes as `fit` went.
    """
    like_fit = bool(model.jit_compile and not model.run_eagerly)
    if not seed_variables(model):
        half = any(layer.compute_dtype == "bfloat16" for layer in model._flatten_layers())
        return like_fit if half and asked == "auto" else asked
    if like_fit:
        if asked is False:
            raise ValueError(
                "`jit_compile=False` of the reverse pass would draw other dropout masks (or noise) "
                "than the training, which is compiled by XLA. Compile the model with "
                "jit_compile=False as well, or leave the reverse pass to jit_compile='auto'."
            )
        return True
    if asked is True:
        raise ValueError(
            "`jit_compile=True` of the reverse pass would draw other dropout masks (or noise) than "
            "the training, which is not compiled by XLA. Compile the model with jit_compile=True "
            "as well, or leave the reverse pass to jit_compile='auto'."
        )
    return False
