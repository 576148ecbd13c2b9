"""500 updates in one process: are memory and time per update flat?

    python benchmarks/soak.py

Prints medians of the first and the last 100 updates after a warm-up, and how often the reverse
loop was traced. Linux only: resident memory is read from /proc.
"""

from __future__ import annotations

import argparse
import time

import keras
import numpy as np

import keras_drmad as kd


class Watch(keras.callbacks.Callback):
    """Resident memory (MB) and seconds of each epoch."""

    def __init__(self):
        super().__init__()
        self.memory: list[float] = []
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.started)
        with open("/proc/self/statm") as file:
            self.memory.append(int(file.read().split()[1]) * 4096 / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=50)
    parser.add_argument("--trajectory", default="replay")
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
    drmad = kd.DrMADCallback((x[800:], y[800:]), trajectory=arguments.trajectory)
    watch = Watch()
    model.fit(x[:800], y[:800], 20, arguments.updates, verbose=0, callbacks=[drmad, watch])
    first = slice(arguments.warm_up, arguments.warm_up + 100)
    print(f"{'':<22}{'first 100':>12}{'last 100':>12}{'ratio':>8}")
    for name, values in (("resident memory (MB)", watch.memory), ("seconds", watch.seconds)):
        before, after = np.median(values[first]), np.median(values[-100:])
        print(f"{name:<22}{before:>12.4g}{after:>12.4g}{after / before:>8.3f}")
    print(f"{drmad.traces} trace(s) of the reverse loop in {len(drmad.history)} updates")


if __name__ == "__main__":
    main()
