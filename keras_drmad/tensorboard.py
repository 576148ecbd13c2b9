"""Records as TensorBoard events.

    log_dir/drmad/              one point per update: values, hypergradient norms, outer loss
    log_dir/drmad/update_001/   the schedules that this update's horizon was trained with, against
                                the training step within the horizon; one run each, so they overlay

A writer that fails never stops training: it warns once, and tries a new file at the next update.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import uuid
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_drmad.reports import (
    Entry,
    Record,
    as_image,
    by_argument,
    cosines,
    entries,
    horizon_of,
    norm,
)

FOLDER = "drmad"
# A disk that is full, a folder that is gone, a writer that somebody closed.
_LOST = (OSError, tf.errors.OpError, RuntimeError)
POINTS = 200  # of one curve at most; what lies between is left out

# Dark blue over green to yellow, even in lightness.
_COLOURS = np.array(
    [[54, 20, 88], [52, 76, 134], [32, 128, 140], [68, 178, 112], [168, 214, 60], [252, 232, 64]]
)
# TensorBoard shows one description for all updates.
_SCALE = (
    "Dark is the lowest value of the update and bright the highest (see the curves `min` and "
    "`max`), by logarithm where they are a factor of 10 apart."
)
_UNKNOWN = np.array([128, 128, 128], np.uint8)  # a value that is not finite


class Writer:
    """Writes the records of a `DrMADCallback` for TensorBoard.

    Example:

    >>> writer = kd.tensorboard.Writer("logs", image_shape=(28, 28))
    >>> callback = kd.DrMADCallback(hyper_data, log_dir=writer)

    Args:
        log_dir: The folder that TensorBoard is started on. What is written goes to its subfolder
            `drmad`, beside what `keras.callbacks.TensorBoard` writes.
        image_shape: `(height, width)` or `(height, width, channels)` of the images that the model
            takes, to show per-input hyperparameters as a picture. Defaults to `None`: a square,
            where the first layer's inputs make one.

    Raises:
        TypeError, ValueError: for an argument that is not of this form.
        ImportError: if TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike, image_shape: Sequence[int] | None = None):
        if not isinstance(log_dir, (str, os.PathLike)) or not os.fspath(log_dir):
            raise TypeError(f"`log_dir` is the path of a folder. Received: log_dir={log_dir!r}")
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "`log_dir` needs TensorBoard, which is not installed. Install it by "
                "`pip install 'keras_drmad[tensorboard]'`, or leave `log_dir` out."
            )
        self.folder = os.path.join(os.fspath(log_dir), FOLDER)
        self.image_shape = None if image_shape is None else _checked_shape(image_shape)
        self._writer: Any = None
        self._size = 0  # of the file so far
        self._warned = False

    def write(self, history: Sequence[Record]) -> None:
        """Write the latest record of a history; the others were written before."""
        try:
            self._write(history)
        except _LOST as error:
            self._lost(error)

    def close(self) -> None:
        """Close the files; another `write` opens new ones."""
        if self._writer is not None:
            try:
                self._writer.close()
                _check_whole(self._file)
            except _LOST as error:
                self._lost(error)
            self._writer = None

    def _write(self, history: Sequence[Record]) -> None:
        if self._writer is None:
            self._writer, self._file = _new_file(self.folder)
            self._size = tf.io.gfile.stat(self._file).length
        with self._writer.as_default(), tf.summary.record_if(True):
            self._write_record(history)
        self._writer.flush()
        # Where its file is gone, and sometimes where the disk is full, the writer says nothing.
        size = tf.io.gfile.stat(self._file).length
        if size <= self._size:
            raise OSError(f"nothing was added to {self._file}")
        self._size = size
        schedules = [e for e in entries(history[-1]) if e.label.in_time]
        if schedules:
            self._write_schedules(schedules, len(history), horizon_of(history))

    def _lost(self, error: Exception) -> None:
        self._writer = None  # the next update tries a new file
        if not self._warned:
            self._warned = True
            says = re.sub(r"\{\{.*?\}\} ?", "", str(error) or repr(error)).splitlines()[0]
            warnings.warn(
                f"TensorBoard's files in {self.folder} could not be written, and are not "
                f"complete: {says}. Training goes on.",
                stacklevel=3,
            )

    # One point per update --------------------------------------------------------------------

    def _write_record(self, history: Sequence[Record]) -> None:
        record, number = history[-1], len(history)
        found = entries(record)
        tf.summary.scalar("outer_loss", record.outer_loss, number)
        skipped = sum(not r.accepted for r in history)
        tf.summary.scalar("skipped_updates", skipped, number)
        for argument, cosine in cosines(record).items():
            tf.summary.scalar(f"verified_cosine/{argument}", cosine, number)
        for argument, group in by_argument(found).items():
            tf.summary.scalar(f"hypergradient_norm/{argument}", norm(group), number)
            for entry in group:
                self._write_entry(entry, number, len(group) > 1)
            self._write_pictures(argument, group, number)

    def _write_entry(self, entry: Entry, number: int, one_of_many: bool) -> None:
        value = entry.value
        if one_of_many:
            tf.summary.scalar(f"hypergradient_norm/{entry.name}", norm([entry]), number)
        if value.size == 1:
            tf.summary.scalar(entry.name, value.reshape(()), number)
            return
        for name, function in (("mean", np.mean), ("min", np.min), ("max", np.max)):
            tf.summary.scalar(f"{entry.name}/{name}", function(value), number)
        if entry.in_space.size > 1:
            tf.summary.histogram(entry.name, value[np.isfinite(value)], number)

    def _write_pictures(self, argument: str, group: Sequence[Entry], number: int) -> None:
        schedules = [e for e in group if e.label.in_time]
        if schedules:
            columns = max(len(e.value) for e in schedules)
            rows = np.stack([_resampled(e.over_time, columns) for e in schedules])
            names = ", ".join(e.label.layer for e in schedules)
            text = f"Rows from the top: {names}. Columns: time. {_SCALE}"
            image = heat_map(rows)[None]
            tf.summary.image(f"schedules/{argument}", image, number, description=text)
        inputs = [e for e in group if e.label.per == "input"]
        for entry in inputs:
            shape = self.image_shape
            if shape is None and entry is inputs[0]:
                shape = _square(entry.in_space.size)
            if shape is not None and math.prod(shape) == entry.in_space.size:
                image = picture(entry.in_space, shape)[None]
                tf.summary.image(f"inputs/{entry.name}", image, number, description=_SCALE)

    # One run per update ----------------------------------------------------------------------

    def _write_schedules(self, schedules: Sequence[Entry], number: int, steps: int) -> None:
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        # One event per step for all layers: an event per number would cost a second per update.
        events: dict[int, Any] = {}
        for entry in schedules:
            argument, values = entry.label.argument, entry.over_time
            tag = entry.name.replace(argument, f"{argument}_schedule", 1)
            for t in _curve_steps(len(values), steps):
                point = scalar_pb(tag, values[t * len(values) // steps])
                events.setdefault(t, type(point)()).MergeFrom(point)
        writer, file = _new_file(os.path.join(self.folder, f"update_{number:03d}"))
        with writer.as_default(), tf.summary.record_if(True):
            for t, event in sorted(events.items()):
                tf.summary.experimental.write_raw_pb(event.SerializeToString(), t)
        writer.close()
        _check_whole(file)


def get(log_dir: str | os.PathLike | Writer | None) -> Writer | None:
    """A writer, from the path of a folder or a writer; None is none."""
    return log_dir if log_dir is None or isinstance(log_dir, Writer) else Writer(log_dir)


def _new_file(folder: str) -> tuple[Any, str]:
    """A writer into a folder, and the path of its file."""
    suffix = f".{uuid.uuid4().hex[:8]}"
    writer = tf.summary.create_file_writer(folder, filename_suffix=suffix)
    return writer, tf.io.gfile.glob(os.path.join(folder, f"*{suffix}"))[0]


def _check_whole(file: str) -> None:
    """Raise if an event file ends in the middle of a record."""
    for _ in tf.data.TFRecordDataset(file):
        pass


def _curve_steps(blocks: int, steps: int) -> list[int]:
    """The steps at which a schedule's curve has its points: where blocks begin, and the last."""
    starts = {-(-i * steps // blocks) for i in range(blocks)} | {steps - 1}
    inside = sorted(t for t in starts if 0 <= t < steps)
    if len(inside) > POINTS:
        inside = [inside[i] for i in np.linspace(0, len(inside) - 1, POINTS).round().astype(int)]
    return inside


def _resampled(values: np.ndarray, count: int) -> np.ndarray:
    return values[np.arange(count) * len(values) // count]


def _checked_shape(shape: Any) -> tuple[int, ...]:
    try:
        checked = tuple(int(n) for n in shape)
    except (TypeError, ValueError):
        checked = ()
    if len(checked) not in (2, 3) or min(checked) < 1:
        raise ValueError(
            "`image_shape` is (height, width) or (height, width, channels). Received: "
            f"image_shape={shape!r}"
        )
    return checked


def _square(count: int) -> tuple[int, int] | None:
    side = math.isqrt(count)
    return (side, side) if side >= 4 and side * side == count else None


# Pictures, as (height, width, 3) uint8 arrays -----------------------------------------------------


def heat_map(rows: np.ndarray, width: int = 480, height: int = 24) -> np.ndarray:
    """Rows of numbers as bands of colour."""
    unit = _to_unit(rows)
    columns = np.arange(width) * rows.shape[1] // width
    bands = np.repeat(coloured(unit[:, columns]), height, axis=0)
    bands[height - 1 : -1 : height] = 255  # a line between the layers
    return bands


def picture(values: np.ndarray, shape: Sequence[int], size: int = 224) -> np.ndarray:
    """Numbers as an image, its channels side by side."""
    image = coloured(as_image(_to_unit(values), shape))
    zoom = max(1, size // len(image))
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1)


def coloured(unit: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 as colours; grey where not finite."""
    known = np.isfinite(unit)
    at = np.where(known, unit, 0.0)
    ends = np.linspace(0, 1, len(_COLOURS))
    image = np.stack([np.interp(at, ends, c) for c in _COLOURS.T], axis=-1).round().astype(np.uint8)
    image[~known] = _UNKNOWN
    return image


def _to_unit(values: np.ndarray) -> np.ndarray:
    """Scaled to 0 ... 1: by logarithm where all are positive and far apart."""
    values = np.asarray(values, np.float64)
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    if low > 0 and high > 10 * low:
        values, low, high = np.log(values), math.log(low), math.log(high)
    return (values - low) / (high - low) if high > low else values - low
