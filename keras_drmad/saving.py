"""What a tuning run needs to go on as if it had never stopped, beside what Keras saves itself.

The optimizer carries it through `.keras` files, weight files and checkpoints.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

State = dict[str, np.ndarray]
Variables = Mapping[str, keras.Variable]


class TuningState(tf.train.experimental.PythonState):
    """What an optimizer saves beside its slots: the tuned values, their horizon, and the run.

    Keras's files and TensorFlow's checkpoints both get it from here. What is loaded before the
    optimizer is built waits until then.

    A run is an object with `get_state() -> dict` of names to arrays, and `set_state(dict)`. Loaded
    state of a run waits until one attaches itself, and is saved again if none does.

    Args:
        optimizer: The optimizer of `keras_drmad.optimizers` that it belongs to.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.in_use = False  # whether graphs may hold on to the optimizer's variables
        self._run: Any = None
        self._active = False  # between `attach` and `detach`
        self._loaded = b""
        self._until_built: State | None = None

    # The run ---------------------------------------------------------------------------------

    def attach(self, run: Any) -> None:
        if self._loaded and run is not self._run:
            _give(run, self._loaded)
        self._loaded = b""
        self._run, self._active = run, True

    def detach(self) -> None:
        self._active, self._loaded = False, b""

    def forget_run(self) -> None:
        if self._until_built is not None:
            self._until_built = {**self._until_built, "run": np.zeros(0, "uint8")}
        self._take_run(b"")

    def _take_run(self, packed: bytes) -> None:
        self._loaded = packed
        if not self._active:
            # What the last run knows is out of date now.
            self._run = None
        elif packed:
            _give(self._run, packed)

    # A TensorFlow checkpoint -------------------------------------------------------------------

    def serialize(self) -> bytes:
        if not tf.executing_eagerly():
            return b""  # a SavedModel, from which TensorFlow never restores Python state
        return pack(self.saved(self._own_variables()))

    def deserialize(self, string_value: bytes) -> None:
        self.load(unpack(string_value))

    def _own_variables(self) -> Variables:
        """What no checkpoint sees: a horizon of another length replaces these variables."""
        raw = self.optimizer.raw_variables
        named = {f"raw_{i}": variable for i, variable in enumerate(raw)}
        return {**named, "position": self.optimizer.position} if raw else {}

    # Both ------------------------------------------------------------------------------------

    def saved(self, variables: Variables) -> State:
        """Variables by name, and what belongs beside them."""
        if self._until_built is not None:
            return self._until_built  # on its way from one file to another
        return {
            **{name: keras.ops.convert_to_numpy(v) for name, v in variables.items()},
            "horizon": np.asarray(self.optimizer.horizon, "int64"),
            "tuned": _as_bytes(_descriptions(self.optimizer) if self.optimizer.built else None),
            "run": np.frombuffer(
                self._loaded if self._run is None else pack(self._run.get_state()), "uint8"
            ),
        }

    def load(self, saved: State) -> None:
        """Take over what `saved` gave, at once or as soon as the optimizer is built.

        Raises:
            ValueError: if it does not fit the optimizer, and nothing is assigned then; or if the
                run that is under way refuses its part.
        """
        optimizer = self.optimizer
        if not {"horizon", "tuned", "run"} <= set(saved):
            raise ValueError(
                "The file does not hold the state of a keras_drmad optimizer, but "
                f"{optimizer.name} is one. To take over the model's weights only, load them before "
                "`compile`."
            )
        if not optimizer.built:
            self._until_built = saved
            return
        if _from_bytes(saved["tuned"]) is None:  # there was nothing yet
            self._take_run(saved["run"].tobytes())
            return

        def variables() -> Variables:
            numbered = {str(i): variable for i, variable in enumerate(optimizer.variables)}
            return numbered if "0" in saved else self._own_variables()

        optimizer.set_horizon(*self._checked(saved, variables()))  # it may replace some of them
        for name, variable in variables().items():
            variable.assign(saved[name])
        self._take_run(saved["run"].tobytes())

    def after_build(self) -> None:
        """Take over what was loaded before."""
        if self._until_built is None:
            return
        saved, self._until_built = self._until_built, None
        horizon = self.optimizer.horizon
        self.load(saved)
        if horizon != (0, 0):  # that of the `fit` which builds it
            self.optimizer.set_horizon(*horizon)

    def _checked(self, saved: State, variables: Variables) -> tuple[int, int]:
        """The horizon of a state that fits this optimizer, or a ValueError."""
        optimizer = self.optimizer
        found, expected = _from_bytes(saved["tuned"]), _descriptions(optimizer)
        if found != expected:
            raise ValueError(
                f"The file was saved with other Hyperparameters than {optimizer.name} has. "
                f"Expected {_differing(expected, found)}, found {_differing(found, expected)}. "
                "Compile with those that it was saved with."
            )
        epochs, steps = checked_horizon(saved["horizon"].tolist())
        blocks = [group.spec.blocks(epochs, steps) for group in optimizer.groups]
        raw = optimizer.raw_variables
        if self.in_use and blocks != [variable.shape[0] for variable in raw]:
            raise ValueError(
                f"The file was saved with a horizon of {epochs} epochs and {steps} steps, here it "
                f"is {optimizer.horizon[0]} and {optimizer.horizon[1]}. Load it into a newly "
                "compiled model."
            )
        resized = {id(v): (n, *v.shape[1:]) for v, n in zip(raw, blocks, strict=True)}
        wrong = []
        for name, variable in variables.items():
            wanted = resized.get(id(variable), tuple(variable.shape))
            shape = saved[name].shape if name in saved else None
            if shape != wanted:
                wrong.append(f"{variable.path}: expected {wanted}, found {shape}")
        if str(len(variables)) in saved:
            wrong.append(f"expected {len(variables)} variables, found more")
        if wrong:
            raise ValueError(
                f"The file holds other optimizer variables than {optimizer.name} has. It was saved "
                "with other arguments, or another model. " + "; ".join(wrong[:5])
            )
        return epochs, steps


def _give(run: Any, packed: bytes) -> None:
    try:
        run.set_state(unpack(packed))
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"The saved state of the tuning run is damaged: {error!r}") from error


def _descriptions(optimizer: Any) -> list[list[Any]]:
    """Of every array of tuned values, what it is."""
    return [
        [g.argument, g.key, g.variable, g.spec.per, g.spec.over, g.domain.name]
        for g in optimizer.groups
    ]


def _differing(these: list[Any], others: list[Any]) -> str:
    """The first of these that are not among the others."""
    return str([d for d in these if d not in others][:3] or f"{len(these)} of them")


def checked_horizon(found: Any) -> tuple[int, int]:
    """Epochs and steps.

    Raises:
        ValueError: if they are not two whole numbers of a size that makes sense.
    """
    if (
        not isinstance(found, (list, tuple))
        or len(found) != 2
        or not all(type(n) is int and 0 <= n < 2**31 for n in found)
    ):
        raise ValueError(
            f"A horizon is two whole numbers, of epochs and of steps. Received: {found!r}"
        )
    return found[0], found[1]


# States ----------------------------------------------------------------------------------------


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
    except Exception as error:  # damaged archives raise many kinds
        raise ValueError(f"The saved state of the tuning run is damaged: {error!r}") from error


def _native(array: Any) -> np.ndarray:
    array = np.asarray(array)
    # NumPy's format has no bfloat16; float32 holds each of its values.
    return array.astype("float32") if array.dtype.name == "bfloat16" else array


def _as_bytes(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), "uint8")


def _from_bytes(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())


def bytes_of(write: Callable[[io.BytesIO], None]) -> np.ndarray:
    """What a function writes into a file, as an entry of a state."""
    buffer = io.BytesIO()
    write(buffer)
    return np.frombuffer(buffer.getvalue(), "uint8")


def with_notes(state: State, **notes: Any) -> State:
    """A state, and beside its arrays what JSON can hold."""
    return {**state, "notes": _as_bytes(notes)}


def notes_of(state: State) -> dict[str, Any]:
    """What `with_notes` put beside the arrays."""
    return _from_bytes(state["notes"])


def values_of(variables: Sequence[Any], prefix: str) -> State:
    """The values of variables, or tensors, as entries of a state."""
    return {f"{prefix}{i}": keras.ops.convert_to_numpy(v) for i, v in enumerate(variables)}


def entries(state: State, prefix: str) -> list[np.ndarray]:
    """The arrays that `values_of` made of a list."""
    count = sum(key.startswith(prefix) for key in state)
    return [state[f"{prefix}{i}"] for i in range(count)]


def check(variables: Sequence[keras.Variable], state: State, prefix: str) -> None:
    """Refuse a state that holds other values than `values_of` takes of these variables.

    Raises:
        ValueError: if it does.
    """
    shapes = [array.shape for array in entries(state, prefix)]
    wanted = [tuple(v.shape) for v in variables]
    if shapes != wanted:
        raise ValueError(
            f"The saved tuning run does not fit: of {prefix.strip('_')!r}, expected shapes "
            f"{wanted}, found {shapes}. Continue it with the model and the arguments that it was "
            "saved with, or call `model.optimizer.forget_run()` to begin a new one."
        )


def assign(variables: Sequence[keras.Variable], state: State, prefix: str) -> None:
    """Give variables the values that `values_of` took."""
    for variable, array in zip(variables, entries(state, prefix), strict=True):
        variable.assign(array)
