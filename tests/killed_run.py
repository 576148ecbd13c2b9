"""A tuning run that is killed at random moments, started again each time, and compared to the end.

    python killed_run.py FOLDER          one run, from where FOLDER was left to the end
    KILLS=20 pytest test_killed.py       kills that many times (3 by default)

A run is one of `stopped_runs`, with a `BackupAndRestore` after every epoch. Keras's own writes its
two files in place: killed in between it leaves half a file, or the weights of one epoch beside the
number of another. Here each backup is written aside and renamed when it is whole.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

RESULT, PROGRESS, BACKUPS = "result.npz", "progress", "backups"


def run(folder: Path) -> None:
    """Train to the end with whatever an earlier, killed run has left."""
    import keras
    import stopped_runs
    import tensorflow as tf

    class Progress(keras.callbacks.Callback):
        """A byte per step and per epoch, for whoever waits to kill."""

        def mark(self):
            with open(folder / PROGRESS, "ab") as file:
                file.write(b".")

        def on_train_batch_end(self, batch, logs=None):
            self.mark()

        def on_epoch_end(self, epoch, logs=None):
            self.mark()

    class Backup(keras.callbacks.BackupAndRestore):
        """Each backup in a folder of its own, named by its epoch once it is whole."""

        def use(self, backup: Path):
            self._weights_path = str(backup / "latest.weights.h5")
            self._training_metadata_path = str(backup / "training_metadata.json")

        def on_train_begin(self, logs=None):
            if whole(folder):
                self.use(whole(folder)[-1])
            super().on_train_begin(logs)

        def _save_model(self):
            aside = folder / BACKUPS / "unfinished"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            self.use(aside)
            super()._save_model()
            backup = folder / BACKUPS / str(self._current_epoch)
            if not backup.exists():  # or this epoch was begun again from an older one
                aside.rename(backup)

    tf.config.experimental.enable_op_determinism()
    # What goes on from a backup owes nothing to the seed.
    keras.utils.set_random_seed(999 if whole(folder) else 0)
    model = stopped_runs.model_of("adam")
    backup = Backup(folder / BACKUPS)
    tuning = stopped_runs.fit(model, callbacks=[Progress(), backup, Progress()])
    found = stopped_runs.result(model, tuning)
    # Names of arrays may hold what a file's name may not.
    np.savez(folder / RESULT, *found.values(), names=list(found))


def whole(folder: Path) -> list[Path]:
    """The backups that are whole, the last one last."""
    found = [path for path in (folder / BACKUPS).glob("*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def start(folder: Path, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen([sys.executable, __file__, str(folder)], env=env, **options)


def marks(folder: Path) -> int:
    """How far all runs in the folder came, together."""
    file = folder / PROGRESS
    return file.stat().st_size if file.exists() else 0


def kill_after(folder: Path, count: int, delay: float) -> bool:
    """Start a run and kill it `delay` seconds after so many marks; whether it was still alive."""
    before = marks(folder)
    process = start(folder)
    while process.poll() is None and marks(folder) < before + count:
        pass_time(process, 0.002)
    pass_time(process, delay)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def pass_time(process: subprocess.Popen, seconds: float) -> None:
    """Wait, but not for longer than the process lives."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def to_the_end(folder: Path) -> dict[str, np.ndarray]:
    """Run to the end; what it ended with."""
    if start(folder).wait() != 0:
        raise RuntimeError(f"The run in {folder} failed.")
    with np.load(folder / RESULT) as file:
        return {str(name): file[f"arr_{i}"] for i, name in enumerate(file["names"])}


if __name__ == "__main__":
    run(Path(sys.argv[1]))
