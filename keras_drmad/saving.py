"""What is kept of a tuning run, in two forms.

`RunState` is what a run needs to go on as if it had never stopped, beside what Keras saves itself.
The optimizer carries it through `.keras` files, weight files and checkpoints. The JSON file of
`save_hyperparameters` is for people, and for the next project: the tuned values alone.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

State = dict[str, np.ndarray]


class RunState(tf.train.experimental.PythonState):
    """The state of the run that an optimizer belongs to, as one string.

    A run is an object with `get_state() -> dict` of names to arrays, and `set_state(dict)`. Loaded
    state waits here until a run attaches itself, and is saved again if none does.
    """

    def __init__(self) -> None:
        self._run: Any = None
        self._active = False  # between `attach` and `detach`
        self._loaded = b""
        self.in_use = False  # whether graphs may hold on to the optimizer's variables
        self.until_built: State | None = None  # variables loaded before the optimizer was built

    def attach(self, run: Any) -> None:
        if self._loaded and run is not self._run:
            run.set_state(unpack(self._loaded))
        self._loaded = b""
        self._run, self._active = run, True

    def detach(self) -> None:
        self._active, self._loaded = False, b""

    def serialize(self) -> bytes:
        return self._loaded if self._run is None else pack(self._run.get_state())

    def deserialize(self, string_value: bytes) -> None:
        self._loaded = string_value
        if not self._active:
            # What the last run knows is out of date now.
            self._run = None
        elif string_value:
            self._run.set_state(unpack(string_value))


def pack(state: State) -> bytes:
    """Arrays as the bytes of a NumPy archive."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: _native(array) for name, array in state.items()}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack(packed: bytes) -> State:
    """What `pack` made into bytes.

    Raises:
        ValueError: if the bytes are damaged.
    """
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"The saved state of the tuning run is damaged: {error}") from error


def _native(array: Any) -> np.ndarray:
    array = np.asarray(array)
    # NumPy's format has no bfloat16; float32 holds each of its values.
    return array.astype("float32") if array.dtype.name == "bfloat16" else array


def bytes_of(write: Callable[[io.BytesIO], None]) -> np.ndarray:
    """What a function writes into a file, as an entry of a state."""
    buffer = io.BytesIO()
    write(buffer)
    return np.frombuffer(buffer.getvalue(), "uint8")


def with_notes(state: State, **notes: Any) -> State:
    """A state, and beside its arrays what JSON can hold."""
    return {**state, "notes": np.frombuffer(json.dumps(notes).encode(), "uint8")}


def notes_of(state: State) -> dict[str, Any]:
    """What `with_notes` put beside the arrays."""
    return json.loads(state["notes"].tobytes())


def values_of(variables: Sequence[Any], prefix: str) -> State:
    """The values of variables, or tensors, as entries of a state."""
    return {f"{prefix}{i}": keras.ops.convert_to_numpy(v) for i, v in enumerate(variables)}


def entries(state: State, prefix: str) -> list[np.ndarray]:
    """The arrays that `values_of` made of a list."""
    count = sum(key.startswith(prefix) for key in state)
    return [state[f"{prefix}{i}"] for i in range(count)]


def assign(variables: Sequence[keras.Variable], state: State, prefix: str) -> None:
    """Give variables the values that `values_of` took.

    Raises:
        ValueError: if they are others; nothing is assigned then.
    """
    found = entries(state, prefix)
    shapes, wanted = [a.shape for a in found], [tuple(v.shape) for v in variables]
    if shapes != wanted:
        raise ValueError(
            f"The saved tuning run does not fit: of {prefix.strip('_')!r}, expected shapes "
            f"{wanted}, found {shapes}. Continue it with the model and the arguments that it was "
            "saved with, or call `model.optimizer.forget_run()` to begin a new one."
        )
    for variable, array in zip(variables, found, strict=True):
        variable.assign(array)
