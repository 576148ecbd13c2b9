"""Disks that are full and writers that are lost: one warning, and the same updates."""

import warnings

import fits
import keras
import pytest

import keras_drmad as kd
from keras_drmad import tensorboard

X, Y = fits.examples(8, dtype="float32")
HYPER = fits.examples(6, seed=2, dtype="float32")
EPOCHS = 3


def fit(callbacks=(), **options):
    fits.start()
    model = fits.compiled(keras.Sequential([keras.Input((5,)), keras.layers.Dense(fits.CLASSES)]))
    tuning = kd.DrMADCallback(HYPER, trajectory="linear", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model.fit(X, Y, 4, EPOCHS, shuffle=False, verbose=0, callbacks=[tuning, *callbacks(tuning)])
    return tuning, [str(w.message) for w in caught if w.category is UserWarning]


class Full:
    """A file writer on a disk that is full."""

    def __init__(self, writer):
        self._writer = writer

    def __getattr__(self, name):
        return getattr(self._writer, name)

    def flush(self):
        raise OSError(28, "No space left on device")


class Loses(keras.callbacks.Callback):
    """Closes the writer behind the back of the one that writes."""

    def __init__(self, tuning):
        super().__init__()
        self.tuning = tuning

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.tuning._writer._writer.close()


@pytest.mark.parametrize("fault", ["full disk", "lost writer"])
def test_training_goes_on(fault, tmp_path, monkeypatch):
    expected, silent = fit(lambda tuning: [])
    assert silent == []
    if fault == "full disk":
        new_file = tensorboard._new_file

        def full(folder):
            writer, file = new_file(folder)
            return Full(writer), file

        monkeypatch.setattr(tensorboard, "_new_file", full)
    lost = [Loses] if fault == "lost writer" else []
    tuning, warned = fit(lambda tuning: [make(tuning) for make in lost], log_dir=tmp_path)
    fits.assert_same_updates(tuning, expected, 0)
    assert len(warned) == 1
    assert "could not be written" in warned[0] and warned[0].endswith("Training goes on.")
    assert ("No space left" in warned[0]) == (fault == "full disk")
