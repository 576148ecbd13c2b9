"""500 updates in one process: are memory and time per update flat?

    python benchmarks/soak.py

The warm-up lasts for `--warm-up` updates, and until nothing is left to be compiled: by default
XLA is tried once reverse passes have taken some 10 seconds, and what it compiles stays in memory.
That step is printed apart. Then come the first and the last 100 of the updates that are measured,
and how often the reverse loop was traced in them. Linux only: resident memory is read from /proc.
"""

from __future__ import annotations

import argparse
import time

import keras
import numpy as np

import keras_drmad as kd


class Watch(keras.callbacks.Callback):
    """Resident memory (MB) and CPU seconds of each epoch, in the warm-up and after it."""

    def __init__(self, drmad: kd.DrMADCallback, warm_up: int, updates: int):
        super().__init__()
        self.drmad, self.least, self.updates = drmad, warm_up, updates
        self.warm_up: list[tuple[float, float]] = []
        self.measured: list[tuple[float, float]] = []

    def on_epoch_begin(self, epoch, logs=None):
        if not self.measured and self.least <= epoch and self.drmad.settled:
            self.traces = self.drmad.traces
            self.now = self.measured
        elif not self.measured:
            self.now = self.warm_up
        self.started = time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.process_time() - self.started
        with open("/proc/self/statm") as file:
            self.now.append((int(file.read().split()[1]) * 4096 / 1e6, seconds))
        self.model.stop_training = len(self.measured) == self.updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=50)
    parser.add_argument("--trajectory", default="replay")
    parser.add_argument("--plain", action="store_true", help="jit_compile=False in the callback")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1000, 64)).astype("float32"), rng.integers(0, 10, 1000)
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((64,)), dense(50, "tanh"), dense(50, "tanh"), dense(10)])
    model.compile(
        kd.optimizers.SGD(0.01, momentum=0.9, l2=kd.Hyperparameter(1e-3, per="input")),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    drmad = kd.DrMADCallback(
        (x[800:], y[800:]),
        trajectory=arguments.trajectory,
        jit_compile=False if arguments.plain else "auto",
    )
    watch = Watch(drmad, arguments.warm_up, arguments.updates)
    limit = 10**6  # `watch` ends the fit
    model.fit(x[:800], y[:800], 20, limit, verbose=0, callbacks=[drmad, watch])

    def typical(updates: list[tuple[float, float]], column: int) -> float:
        """The median of the memory; of the time the lowest tenth, which other processes disturb
        the least."""
        return float(np.quantile([update[column] for update in updates], (0.5, 0.1)[column]))

    print(f"warm-up: {len(watch.warm_up)} updates")
    # All but the first of them ran before anything but that was compiled.
    begun, ended = watch.warm_up[5:25], watch.measured[:20]
    print(f"{'':<22}{'early in it':>14}{'right after':>14}{'step':>8}")
    for column, name in enumerate(("resident memory (MB)", "CPU seconds")):
        before, after = typical(begun, column), typical(ended, column)
        print(f"{name:<22}{before:>14.4g}{after:>14.4g}{after / before:>8.3f}")
    print(f"measured: {len(watch.measured)} updates")
    print(f"{'':<22}{'first 100':>14}{'last 100':>14}{'ratio':>8}")
    for column, name in enumerate(("resident memory (MB)", "CPU seconds")):
        before, after = (
            typical(watch.measured[:100], column),
            typical(watch.measured[-100:], column),
        )
        print(f"{name:<22}{before:>14.4g}{after:>14.4g}{after / before:>8.3f}")
    print(f"{drmad.traces - watch.traces} trace(s) of the reverse loop in them")


if __name__ == "__main__":
    main()
