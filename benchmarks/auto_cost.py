"""What `trajectory="auto"` costs over 20 updates, beside the setting that it chose.

    python benchmarks/auto_cost.py --seed 0

Two fits on the digits in one process, each of 20 updates over 500 steps from the same first
weights: one by `auto`, one by the setting that `auto` chose in the end. Printed: the seconds of
their walks without tracing, which is paid once, and the same in training steps by the arithmetic by
which `auto` chooses.
"""

from __future__ import annotations

import argparse
import math
from unittest import mock

import keras
import numpy as np
from fidelity import L2, data, net

import keras_drmad as kd
from keras_drmad.estimator import Estimator
from keras_drmad.fidelity import _cost_per_step
from keras_drmad.settings import Setting, amount

STEPS = 500


def walks(updates: int, seed: int, **setting) -> tuple[list[dict], list[kd.Record]]:
    """The walks of a fit, each with its seconds, and the records of the updates."""
    noted: list[dict] = []
    original = Estimator.walk

    def walk(self, setting: Setting, marks=()):
        path = setting.trajectory
        kept = list(path.times), [list(state) for state in path.states]
        traced = self.traces
        found = original(self, setting, marks)
        if self.traces > traced:  # once more, for the seconds without tracing
            path.times, path.states = kept
            found = original(self, setting, marks)
        visited = amount(setting.reverse_steps, found.steps)
        noted.append({
            "update": len(drmad.history) + 1, "setting": str(setting), "seconds": found.seconds,
            "steps": _cost_per_step(setting) * visited,
        })  # fmt: skip
        return found

    keras.utils.set_random_seed(seed)
    (x, y), hyper = data("digits", None)
    model = net("digits")
    model.compile(
        kd.optimizers.SGD(
            kd.Hyperparameter(0.1, per="layer"), momentum=0.9, dampened=True,
            l2=kd.Hyperparameter(L2, per="input"),
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )  # fmt: skip
    drmad = kd.DrMADCallback(hyper, restart=True, **setting)
    batches = math.ceil(STEPS * 50 / len(x))
    rows = np.concatenate(
        [np.random.default_rng([seed, i]).permutation(len(x)) for i in range(batches)]
    )
    rows = rows[: STEPS * 50]
    with mock.patch.object(Estimator, "walk", walk):
        model.fit(x[rows], y[rows], batch_size=50, epochs=updates, verbose=0, shuffle=False,
                  callbacks=[drmad])  # fmt: skip
    return noted, drmad.history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    updates, seed = arguments.updates, arguments.seed
    auto, history = walks(updates, seed, trajectory="auto")
    for update in range(1, updates + 1):
        here = [x for x in auto if x["update"] == update]
        said = ", ".join(f"{x['setting']} {x['seconds']:.3f} s" for x in here)
        print(f"update {update}: {said}; outer loss {history[update - 1].outer_loss:.4f}")
    chosen = history[-1].setting
    print(f"chosen: {chosen}")
    name, curvature, *rest = chosen.split(", ")
    window = next((int(part.split()[1]) for part in rest if part.startswith("window")), None)
    path = kd.trajectories.get(name)
    if chosen == "piecewise, hessian":
        path = kd.trajectories.Piecewise(33, "even")
    fixed, _ = walks(updates, seed, trajectory=path, curvature=curvature, window=window)
    for unit in ("seconds", "steps"):
        a, b = (sum(x[unit] for x in one) for one in (auto, fixed))
        typical = float(np.median([x[unit] for x in fixed]))
        # At each update, beside a typical walk by the setting that was in force there.
        typical_of = {
            name: float(np.median([x[unit] for x in auto if x["setting"] == name]))
            for name in {x["setting"] for x in auto}
        }
        in_force = sum(typical_of[record.setting] for record in history)
        print(f"{unit}: auto {a:.4g}, chosen {b:.4g} ({typical:.4g} a walk), ratio {a / b:.2f}; "
              f"settings in force {in_force:.4g}, ratio {a / in_force:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
