"""`Hyperparameter` and its domains: whatever is passed, it works or is refused by name."""

import decimal
import fractions
import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_drmad as kd
from keras_drmad import domains
from keras_drmad.hyperparameters import matches

# Domains ------------------------------------------------------------------------------------

DTYPES = {tf.float32: 3e-7, tf.float64: 4e-16}  # dtype: its precision
quick = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def intervals(draw):
    low = draw(st.floats(-1e6, 1e6))
    return low, low + draw(st.floats(1e-3 * max(1.0, abs(low)), 1e6))


any_domain = st.one_of(st.sampled_from(["real", "positive", "unit"]), intervals())
# Parts of the way from one end of a domain to the other, the ends included.
parts = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))


def inside(domain, part):
    """A value of the domain, and the size of the numbers that it is computed from."""
    if domain == "real":
        return (2 * part - 1) * domains.LARGEST, domains.LARGEST
    if domain == "positive":
        low, high = math.log(domains.SMALLEST), math.log(domains.LARGEST)
        value = math.exp(low + (high - low) * part)
        return min(max(value, domains.SMALLEST), domains.LARGEST), 0.0
    if domain == "unit":
        return min(max(part**8, domains.SMALLEST), 1 - domains.MARGIN), 0.0
    low, high = domain
    margin = 2 * domains.MARGIN
    part = min(max(part, margin), 1 - margin)
    return low + (high - low) * part, max(abs(low), abs(high))


@given(any_domain, parts)
@quick
def test_value_is_the_inverse_of_raw(name, part):
    domain = domains.get(name)
    value, size = inside(name, part)
    assert domain.contains(value)
    raw = domain.raw(value)
    assert math.isfinite(raw)
    for dtype, precision in DTYPES.items():
        found = domain.value(tf.constant(raw, dtype)).numpy()
        # A logarithm rounded to the precision is an error of its size in the value.
        tolerance = precision * (2 * abs(raw) if name in ("positive", "unit") else 20)
        np.testing.assert_allclose(
            found, value, rtol=max(tolerance, 4 * precision), atol=4 * precision * size
        )


@given(any_domain, st.floats(width=32, allow_nan=False, allow_infinity=False))
@quick
def test_values_stay_inside_wherever_the_raw_number_goes(name, raw):
    domain = domains.get(name)
    low, high = {"real": (-np.inf, np.inf), "positive": (0, np.inf), "unit": (0, 1)}.get(
        name if isinstance(name, str) else None, name
    )
    for dtype in DTYPES:
        value = float(domain.value(tf.constant(raw, dtype)))
        slope = float(domain.slope(tf.constant(raw, dtype)))
        assert low < value < high
        assert 0 < slope < np.inf


@given(any_domain, st.floats(-12.0, 12.0))
@quick
def test_slope_is_the_derivative(name, at):
    domain, step = domains.get(name), 1e-4
    raw = tf.constant([at - step, at, at + step], tf.float64)
    below, _, above = domain.value(raw).numpy()
    size = max(abs(below), abs(above))
    expected = (above - below) / (2 * step)
    found = domain.slope(raw).numpy()[1]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-11 * size)


@pytest.mark.parametrize(
    "domain",
    ["log", "", None, 3, (1.0, 0.0), (1, 1), (0, math.inf), (0, math.nan), (False, True), (0, 1, 2),
     (1.0, 1.0 + 1e-9), (0.0, 1e-40), (0, 10**400), ("0", "1"), np.zeros(2), {0: 1}],
)  # fmt: skip
def test_what_is_no_domain_is_refused(domain):
    with pytest.raises(ValueError, match=r"`domain` is one of .*Received: domain="):
        domains.get(domain)


# Hyperparameter -----------------------------------------------------------------------------

ARGUMENTS = ("initial", "per", "over", "domain", "name", "tunable")
numbers = st.one_of(
    st.integers(), st.floats(), st.just(10**400), st.fractions(), st.decimals(allow_nan=False)
)
anything = st.recursive(
    st.one_of(
        st.none(), st.booleans(), numbers, st.text(max_size=5), st.binary(max_size=3),
        st.complex_numbers(), st.dates(), st.sampled_from([np.float32(0.5), np.int64(3)]),
        st.sampled_from([np.zeros(0), np.ones((2, 2)), np.array("a"), np.array([0.1]), object()]),
        st.sampled_from([tf.constant([1.0, 2.0]), decimal.Decimal("sNaN"), len]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
VALID = {
    "initial": st.one_of(
        st.floats(1e-6, 0.9),
        st.dictionaries(st.sampled_from(["*", "a", "dense_*"]), st.floats(1e-6, 0.9), min_size=1),
    ),
    "per": st.sampled_from(["model", "layer", "neuron", "input", "weight"]),
    "over": st.one_of(st.sampled_from(["run", "epoch", "step"]), st.integers(1, 50)),
    "domain": st.one_of(st.none(), any_domain),
    "name": st.one_of(st.none(), st.text(min_size=1, max_size=5)),
    "tunable": st.booleans(),
}
# Mostly one bad argument among good ones, so that each is reached.
arguments = st.fixed_dictionaries(VALID).flatmap(
    lambda good: st.dictionaries(st.sampled_from(ARGUMENTS), anything, max_size=2).map(
        lambda bad: {**good, **bad}
    )
)


@given(arguments)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_whatever_is_passed_works_or_is_refused_by_name(arguments):
    try:
        made = kd.Hyperparameter(**arguments)
    except (ValueError, TypeError) as error:
        message = str(error)
        assert any(re.search(rf"`{name}[`\[]", message) for name in ARGUMENTS), message
        assert "Received" in message or "Pass" in message, message
        return
    assert made.blocks(2, 10) >= 1
    values = made.initial.values() if isinstance(made.initial, dict) else [made.initial]
    assert all(type(value) is float and math.isfinite(value) for value in values)
    if made.domain is not None:
        assert all(domains.get(made.domain).contains(value) for value in values)
    again = kd.Hyperparameter.from_config(made.get_config())
    assert again.get_config() == made.get_config()
    repr(made)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(initial="0.1"), TypeError, r"`initial` is a number. Received: initial='0.1' of str"),
        (dict(initial=True), TypeError, "`initial` is a number"),
        (dict(initial=[0.1]), TypeError, "`initial` is a number"),
        (dict(initial=math.nan), ValueError, "`initial` is a finite number. Received: initial=nan"),
        (dict(initial={}), TypeError, "non-empty dictionary of layer name"),
        (dict(initial={3: 0.1}), TypeError, "non-empty dictionary of layer name"),
        (dict(initial={"a": None}, per="layer"), TypeError, r"`initial\['a'\]` is a number"),
        (dict(initial={"a": 0.1}), ValueError, "finer than the model. Pass per='layer'"),
        (dict(initial=0.1, per="filter"), ValueError, r"`per` is one of .*Received: per='filter'"),
        (dict(initial=0.1, per=np.zeros(3)), ValueError, "`per` is one of"),
        (dict(initial=0.1, over="batch"), ValueError, "`over` is one of .*number of blocks >= 1"),
        (dict(initial=0.1, over=0), ValueError, "`over` is one of .*Received: over=0"),
        (dict(initial=0.1, over=True), ValueError, "`over` is one of"),
        (dict(initial=0.1, over=2.0), ValueError, "`over` is one of"),
        (dict(initial=0.1, name=""), TypeError, "`name` is a non-empty string or None"),
        (dict(initial=0.1, tunable=1), TypeError, "`tunable` is True or False. Received: "),
        (dict(initial=0.0, domain="positive"), ValueError, "`initial` is a number above 0.*1e-6"),
        (dict(initial=1.0, domain="unit"), ValueError, "is a number strictly between 0 and 1"),
        (dict(initial=3, domain=(0, 2)), ValueError, r"between 0.0 and 2.0.*Received: 3.0"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected_and_what_came(arguments, error, message):
    with pytest.raises(error, match=message):
        kd.Hyperparameter(**arguments)


def test_numbers_of_other_types_are_taken():
    for number in (np.float32(0.5), np.float64(0.5), fractions.Fraction(1, 2), np.array(0.5)):
        made = kd.Hyperparameter(number, over=np.int64(3), domain=(np.float32(0), np.int32(1)))
        assert (made.initial, made.over, made.domain) == (0.5, 3, (0.0, 1.0))
        assert type(made.over) is int


def test_globs_fit_the_whole_path_or_its_last_part_and_the_first_counts():
    made = kd.Hyperparameter({"backbone/conv": 1.0, "conv*": 2.0, "*": 3.0}, per="layer")
    found = [made.initial_for(name) for name in ("backbone/conv", "head/conv_1", "conv", "dense")]
    assert found == [1.0, 2.0, 2.0, 3.0]
    assert not matches("Conv", "conv")
    with pytest.raises(ValueError, match=r"no value for layer 'b': it names \['a'\].*'\*' for all"):
        kd.Hyperparameter({"a": 1.0}, per="layer").initial_for("b")


def test_survives_saving():
    made = kd.Hyperparameter(
        {"a": 0.1}, per="layer", over=3, domain=(0, 1), name="n", tunable=False
    )
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(made))
    assert again.get_config() == made.get_config()
    assert isinstance(again.domain, tuple)
