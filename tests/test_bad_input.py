"""Whatever is passed: a working object, or a refusal that names the argument and what came.

Every property draws one bad or good value for one argument of a public constructor or function.
`Hyperparameter` has its own in test_hyperparameters.py, its files in test_hyperparameter_files.py.
"""

import decimal
import fractions
import inspect
import io
import math

import keras
import numpy as np
import pytest
import records
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_drmad as kd

checked = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def many(count):
    return settings(checked, max_examples=count)


class Odd:
    """An object that is nothing else."""

    def __repr__(self):
        return "Odd()"


class Hostile:
    """An object that raises where it is asked for anything."""

    def __repr__(self):
        return "Hostile()"

    def __float__(self):
        raise TypeError("no number")

    def __bool__(self):
        raise TypeError("no truth")

    def __len__(self):
        raise TypeError("no length")

    def __eq__(self, other):
        raise TypeError("no equality")

    __hash__ = None


ODD = [
    None, True, False, Odd, Odd(), Hostile(), object, print, ..., 1j, b"linear", bytearray(b"a"),
    decimal.Decimal("0.5"), decimal.Decimal("NaN"), fractions.Fraction(1, 3), range(3), 10**400,
    -(10**400), np.float32(0.5), np.float64("nan"), np.int64(3), np.bool_(True), np.str_("adam"),
    np.zeros(()), np.zeros(3), np.zeros((2, 0)), np.array(["a"]), np.array([None]),
    np.array(0.5), tf.constant(0.5), tf.constant([1, 2]), tf.constant("a"),
    tf.RaggedTensor.from_row_lengths([1.0], [1]), tf.TensorSpec((2,)), tf.float32,
    keras.Variable(0.5), keras.Variable([1, 2], dtype="int32", trainable=False),
    keras.KerasTensor((None, 3)), keras.optimizers.SGD, keras.losses.MeanSquaredError,
    kd.trajectories.Linear, kd.Hyperparameter, kd.Hyperparameter(0.1), slice(1), "", "adam",
    "mse", "linear", "fresh", "\N{GREEK SMALL LETTER LAMDA}", "a\0b", "{}", "%s",
]  # fmt: skip
odd = st.sampled_from(ODD)
numbers = st.one_of(st.floats(), st.integers(), st.integers(-3, 3), st.floats(0, 1))
leaves = st.one_of(odd, numbers, st.text(max_size=5))
anything = st.one_of(
    leaves,
    st.lists(leaves, max_size=3),
    st.lists(leaves, max_size=3).map(tuple),
    st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 2)), leaves, max_size=2),
)

TRACEBACKS = ("tensorflow", "Traceback", "Tensor(", "__inference", "node ", "object has no attr",
              "unsupported operand", "unhashable", "not subscriptable", "not iterable",
              "positional argument", "ambiguous")  # fmt: skip


def works_or_refuses(make, argument, value=None):
    """The object, or None where it was refused as it should be."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        message = str(error)
        names = (argument,) if isinstance(argument, str) else argument
        assert any(name in message for name in names), message
        assert len(message) > 30, message
        assert not any(part in message for part in TRACEBACKS if part not in repr(value)), message
        # It was refused on purpose, by a line of this package (or by Keras, which names it too).
        at = inspect.getinnerframes(error.__traceback__)[-1].filename
        assert "keras_drmad" in at or argument == "name", (at, message)
        return None


# The callback -------------------------------------------------------------------------------------

HYPER = (np.zeros((2, 3), "float32"), np.zeros(2, "float32"))
CALLBACK = sorted(set(inspect.signature(kd.DrMADCallback).parameters) - {"hyper_data"})
# What an argument is named by where it is a part of another that is refused.
ALSO = {
    "variables": ("variables", "domain", "Received"),
    "log_dir": ("log_dir",),
}


@given(st.sampled_from(CALLBACK), anything)
@many(900)
def test_arguments_of_the_callback(argument, value):
    if argument == "restart" and value == "fresh":
        return
    options = {argument: value}
    if argument in ("window", "reverse_steps", "verify_every"):
        options["trajectory"] = "linear"
    if argument == "initial_scale":
        options["restart"] = True
    made = works_or_refuses(
        lambda: kd.DrMADCallback(HYPER, **options), ALSO.get(argument, argument), value
    )
    if made is not None:
        assert made.history == [] and made.traces == 0
        assert made.horizon >= 1 and 0.0 < made.fidelity < 1.0
        assert math.isfinite(made.max_step) and made.max_step > 0.0


arrays = st.builds(
    lambda shape, dtype: np.zeros(shape, dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["float32", "float64", "int64", "uint8", "bool", "U2", "O", "complex64"]),
)
parts = st.one_of(leaves, arrays, st.lists(arrays, max_size=2),
                  st.dictionaries(st.sampled_from("ab"), arrays, max_size=2))  # fmt: skip


@given(st.one_of(anything, st.tuples(parts, parts), st.tuples(parts, parts, parts)))
@many(400)
def test_hyper_data(value):
    made = works_or_refuses(lambda: kd.DrMADCallback(value), "hyper_data", value)
    if made is not None:
        for batch in made.hyper_data:
            lengths = {len(a) for a in keras.tree.flatten(batch) if a is not None}
            assert len(lengths) == 1 and 0 not in lengths


# Optimizers, trajectories -------------------------------------------------------------------------

OPTIMIZERS = ("SGD", "Adam", "RMSprop", "Adagrad", "Lion")
ARGUMENTS = [
    (name, argument)
    for name in OPTIMIZERS
    for argument in (
        *inspect.signature(getattr(kd.optimizers, name)).parameters,
        "penalize", "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor",
        "gradient_accumulation_steps", "ema_overwrite_frequency", "decay",
    )
    if argument != "kwargs"
]  # fmt: skip


@given(st.sampled_from(ARGUMENTS), anything)
@many(900)
def test_arguments_of_optimizers(which, value):
    name, argument = which
    made = works_or_refuses(
        lambda: getattr(kd.optimizers, name)(**{argument: value}), argument, value
    )
    if made is not None:
        if argument != "penalize":  # any callable will do, whether or not it can be written down
            assert isinstance(made.get_config(), dict)
        for key, number in made.arguments.items():
            if isinstance(number, float):
                assert math.isfinite(number), key


@given(anything)
@many(150)
def test_the_step_of_sign(value):
    made = works_or_refuses(lambda: kd.optimizers.Sign(value), "step", value)
    if made is not None:
        assert float(made.learning_rate) >= 0.0


@given(st.sampled_from(["anchors", "spacing", "replay"]), anything)
@many(250)
def test_arguments_of_trajectories(argument, value):
    if argument == "replay":
        make, argument = lambda: kd.trajectories.Replay(value), "anchors"
    else:
        make = lambda: kd.trajectories.Piecewise(**{argument: value})  # noqa: E731
    made = works_or_refuses(make, argument, value)
    if made is not None:
        made.begin(10)
        assert made.wants(0) and made.copies(10) >= 2


# check_model --------------------------------------------------------------------------------------

MODEL = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


@given(st.sampled_from(["model", "steps"]), anything)
@many(200)
def test_arguments_of_check_model(argument, value):
    if argument == "steps" and isinstance(value, int) and not isinstance(value, bool):
        value = min(value, 0)  # the others work, and take a second
    if argument == "steps" and isinstance(value, np.integer):
        return
    options = {"model": MODEL, argument: value}
    assert works_or_refuses(lambda: kd.check_model(**options), argument, value) is None


# Histories, their files and pictures --------------------------------------------------------------

HISTORY = records.history(3)
DRAWN = {
    "schedules": ("history", "argument"),
    "penalties": ("history", "layer", "image_shape", "argument", "update"),
    "outer_loss": ("history", "test_error"),
    "fidelity": ("results",),
}


@given(st.sampled_from([(f, a) for f, arguments in DRAWN.items() for a in arguments]), anything)
@many(250)
def test_arguments_of_plots(which, value):
    pytest.importorskip("matplotlib")
    function, argument = which
    options = {DRAWN[function][0]: HISTORY, argument: value}
    if (function, argument) == ("penalties", "layer"):
        options["image_shape"] = (8, 8)
    is_path = argument in ("history", "results") and isinstance(value, str)
    try:
        works_or_refuses(
            lambda: getattr(kd.plots, function)(**options), (argument, "history"), value
        )
    except OSError:
        assert is_path
    except AssertionError:
        if not (is_path and "\0" in value):  # no path at all, says Python
            raise


@given(anything)
@many(100)
def test_what_is_no_history_is_not_saved(value):
    file = io.BytesIO()
    if isinstance(value, (list, tuple)) and not value:
        return  # an empty history is one
    assert works_or_refuses(lambda: kd.reports.save_history(value, file), "history", value) is None
    assert file.getvalue() == b""


def saved() -> bytes:
    file = io.BytesIO()
    kd.reports.save_history(HISTORY, file)
    return file.getvalue()


SAVED = saved()


def assert_loads_or_refuses(content):
    try:
        loaded = kd.reports.load_history(io.BytesIO(content))
    except ValueError as error:
        assert "Not a history saved by `kd.reports.save_history`" in str(error)
        return
    assert all(isinstance(record, kd.Record) for record in loaded)


@given(st.data())
@many(400)
def test_damaged_files_of_a_history(data):
    content = bytearray(SAVED)
    kind = data.draw(st.sampled_from(["cut", "byte", "bytes", "noise", "inserted"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        content = content[:at]
    elif kind == "byte":
        content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "bytes":
        noise = data.draw(st.binary(min_size=1, max_size=20))
        content[at : at + len(noise)] = noise
    elif kind == "noise":
        content = data.draw(st.binary(max_size=200))
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    assert_loads_or_refuses(bytes(content))
