"""Against peers: the same training and the same hypergradient, in one run.

    python -m venv .venv-peers
    .venv-peers/bin/pip install . -r benchmarks/requirements-peers.txt

    .venv-peers/bin/python benchmarks/peers.py --rounds 3 --steps 200 1000    # measures
    .venv-peers/bin/python benchmarks/peers.py --peers jax drmad --rounds 3   # some of them again
    .venv-peers/bin/python benchmarks/peers.py --tables                       # of what was measured
    .venv-peers/bin/python benchmarks/peers.py --figure docs/images/peers.png

What is to be done is described in peers_problem.py, and how each library does it in
peers_libraries.py. All have the same batches and first weights. In every round each peer in turn
gets a process of its own, with one thread, so that what else the machine does falls on all and
peaks of memory are each one's own. There it trains, and trains with the hypergradient, once to warm
up and then several times; medians over all rounds are given, and what the first call took longer.
Results are merged into docs/results/peers.json, where a peer's new rows replace its old ones.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peers_results as results
from peers_libraries import NOT_MEASURED, PEERS, Found, missing
from peers_problem import Problem, exact, make

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPEATS = 3  # runs in a process after the first
# One thread for everybody; TensorFlow says only what went wrong.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NPROC": "1",  # of JAX
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


# One peer, in a process of its own ---------------------------------------------------------------


class Memory:
    """Peak resident memory over what is resident now, in MB."""

    def __init__(self) -> None:
        gc.collect()
        self.restart()
        self._start = _resident("VmRSS")

    def restart(self) -> None:
        """Forget the peak. It would otherwise be that of loading, or even of the parent process."""
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # no Linux: peaks count from the start of the process

    def peak(self) -> float:
        return _resident("VmHWM") - self._start


def _resident(kind: str) -> float:
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(rf"{kind}:\s+(\d+)", status)[1]) / 1024
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def timed(function: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What it returns; and its seconds, of the process and of the clock."""
    gc.collect()
    started = time.process_time(), time.perf_counter()
    found = function()
    return found, (time.process_time() - started[0], time.perf_counter() - started[1])


def several(function: Callable[[], Any]) -> tuple[list[Any], list[tuple[float, float]]]:
    """What all calls after the first return, and the seconds of each of these and of the first."""
    _, first = timed(function)
    runs = [timed(function) for _ in range(REPEATS)]
    return [found for found, _ in runs], [first] + [seconds for _, seconds in runs]


def worker(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """Measure one peer on the problem that lies in a folder."""
    way = PEERS[name].make(Problem.load(folder / "problem.npz"))
    memory = Memory()
    seconds, peaks = {}, {}
    _, seconds["training"] = several(way.train)
    peaks["training"] = memory.peak()
    _, first = timed(way.hypergradient)  # alone, for what it takes to compile is told apart
    peaks["both, first time"] = memory.peak()
    memory.restart()
    runs = [timed(way.hypergradient) for _ in range(REPEATS)]
    peaks["both"] = memory.peak()
    found = [x for x, _ in runs]
    seconds["both"] = [first] + [s for _, s in runs]
    for kind, train in way.other_training.items():
        _, seconds[f"training, {kind}"] = several(train)
    if found[0].after_training:
        seconds["after training"] = [x.after_training for x in found]
    with np.load(folder / "exact.npz") as truth:
        against = agreement(found[-1], truth)
    return {"seconds": seconds, "peaks": peaks, "products": way.products, **against}


def agreement(found: Found, truth: Any) -> dict[str, Any]:
    """Cosine, and norm as a ratio, with the exact hypergradient; the outer loss."""
    pairs = {"l2": (found.by_l2, truth["l2"]), "rates": (found.by_rate, truth["rates"])}
    rows: dict[str, Any] = {"cosine": {}, "norm": {}, "loss": found.loss}
    for part, (ours, exactly) in pairs.items():
        ours = ours.astype("float64")
        norms = np.linalg.norm(ours), np.linalg.norm(exactly)
        rows["cosine"][part] = float(ours @ exactly / (norms[0] * norms[1]))
        rows["norm"][part] = float(norms[0] / norms[1])
    return rows


# All peers, in turn ------------------------------------------------------------------------------


def prepare(mnist: pathlib.Path, steps: int, folder: pathlib.Path) -> None:
    """Lay down the data, the first weights, and what is exact."""
    folder.mkdir()
    problem = make(mnist, steps)
    problem.save(folder / "problem.npz")
    loss, by_l2, by_rate = exact(problem)
    np.savez(folder / "exact.npz", loss=loss, l2=by_l2, rates=by_rate)


def itself(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this program in a process of its own, with one thread."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def ask(name: str, folder: pathlib.Path) -> dict[str, Any] | None:
    """What a process measured, or None and a line about why there is nothing."""
    done = itself("--worker", name, str(folder))
    if done.returncode:
        print(f"{name} failed ({done.returncode}): {_last_line(done.stderr)}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def run(arguments: argparse.Namespace) -> None:
    """Measure: every round each peer once, for each number of steps."""
    chosen = choose(arguments.peers)
    started = datetime.datetime.now().isoformat(timespec="minutes")
    rounds: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = {steps: pathlib.Path(folder) / str(steps) for steps in arguments.steps}
        for steps, place in folders.items():
            done = itself("--prepare", str(arguments.mnist_file), str(steps), str(place))
            if done.returncode:
                raise SystemExit(_last_line(done.stderr))
        for i in range(arguments.rounds):
            for steps, place in folders.items():
                for name in chosen:
                    measured = ask(name, place)
                    if measured is None:
                        continue
                    rounds.setdefault((steps, name), []).append(measured)
                    row = results.summary(rounds[steps, name])
                    row |= {"run": started, "title": PEERS[name].title, "version": version(name)}
                    results.merge(arguments.results, steps, name, row)
                    print(f"round {i + 1}, T = {steps}: {results.line(row)}", flush=True)


def choose(asked: Sequence[str] | None) -> list[str]:
    """The names of peers, or of beginnings of names, less those that are not installed."""
    known = [*PEERS, *NOT_MEASURED]
    asked = asked or known
    for beginning in asked:
        if not any(name.startswith(beginning) for name in known):
            raise SystemExit(f"No peer is named {beginning!r}. There are {', '.join(known)}.")
    chosen = [name for name in known if name.startswith(tuple(asked))]
    for name in chosen:
        if name in NOT_MEASURED:
            print(f"{name} is left out: {NOT_MEASURED[name]}.")
        elif missing(PEERS[name]):
            print(f"{name} is left out: {PEERS[name].module} is not installed.")
    return [name for name in chosen if name in PEERS and not missing(PEERS[name])]


def version(name: str) -> str:
    return f"{PEERS[name].module} {importlib.metadata.version(PEERS[name].module)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--peers", nargs="+", metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--mnist-file", type=pathlib.Path,
                        default=ROOT.parent / "shared/data/mnist.npz")  # fmt: skip
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "docs/results/peers.json")
    parser.add_argument("--tables", action="store_true", help="print them and measure nothing")
    parser.add_argument("--figure", type=pathlib.Path, help="draw it and measure nothing")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, folder = arguments.worker
        print(json.dumps(worker(name, pathlib.Path(folder))))
        return
    if arguments.prepare:
        mnist, steps, folder = arguments.prepare
        prepare(pathlib.Path(mnist), int(steps), pathlib.Path(folder))
        return
    if not (arguments.tables or arguments.figure):
        if not arguments.mnist_file.exists():
            parser.error("no MNIST there: pass --mnist-file, an .npz as Keras distributes it")
        run(arguments)
    if arguments.figure:
        results.figure(arguments.results, arguments.figure)
    else:
        results.tables(arguments.results)


if __name__ == "__main__":
    main()
