"""How far a long walk is, said in Keras's own output."""

from __future__ import annotations

import logging
import math
import time

import keras

log = logging.getLogger("keras_drmad")


class Progress:
    """Says in Keras's own output how far a long walk is.

    Args:
        what: What is under way, in words.
        verbose: As in `fit`: 0 is silent, 1 a bar, 2 a line now and then.
        after: Seconds before the first sign. Defaults to 3.
        every: Seconds between two lines under `verbose=2`. Defaults to 10.
    """

    def __init__(self, what: str, verbose: int | str, after: float = 3.0, every: float = 10.0):
        self.what, self.after, self.every = what, after, every
        self.verbose = 1 if verbose == "auto" else int(verbose)

    def __call__(self, done: int, total: int) -> None:
        """Say that so many steps of all are done; 0 begins a walk."""
        now = time.monotonic()
        if done == 0:
            self._bar = keras.utils.Progbar(total, unit_name="reverse step")
            self._began, self._said = now, -math.inf
        first = math.isinf(self._said)
        if not self.verbose or now - self._began < self.after:
            return
        if self.verbose == 1:
            if first:
                # On a line of its own: `fit` has left its own bar open.
                _print(f"\n{self.what}\n")
            self._bar.update(done)
        elif first or now - self._said >= self.every:
            _print(f"{self.what}: {done}/{total} steps, {now - self._began:.0f}s\n")
        else:
            return
        self._said = now


def _print(text: str) -> None:
    """Print where Keras prints."""
    if keras.config.is_interactive_logging_enabled():
        print(text, end="", flush=True)
    else:
        log.info(text.strip())
