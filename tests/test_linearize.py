"""A step back in two halves is the step back; what can't be kept is not; quick sums are sums."""

from typing import NamedTuple

import fits
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_drmad import batches as packing
from keras_drmad import halves, sums
from keras_drmad.linearize import linearize
from keras_drmad.sums import spread, total

VECTOR = tf.TensorSpec([3], tf.float64)


def _values(*seeds):
    return [tf.constant(np.random.default_rng(seed).normal(size=3)) for seed in seeds]


def test_the_two_parts_make_the_whole():
    def function(first, given, last):
        hidden = tf.exp(first["a"] * given)
        return [hidden + 1.0], {"u": last * hidden * first["a"], "v": last + given}

    parts = linearize(function, {"a": VECTOR}, VECTOR, VECTOR)
    a, given, last = _values(0, 1, 2)

    @tf.function
    def both():
        saved, now = parts.early({"a": a}, given)
        return now, parts.late(saved, given, last)

    fits.assert_near(both(), function({"a": a}, given, last), 1e-15)


def test_what_is_given_or_cheap_is_not_saved():
    def function(first, given, last):
        sine = tf.sin(first)
        # Of the sine: its square and a difference, which are made again; of `given`, its sine.
        return [first], [last * sine * sine * (1.0 - sine) * tf.sin(given)]

    parts = linearize(function, VECTOR, VECTOR, VECTOR)
    assert [tuple(spec.shape) for spec in parts.saved] == [(3,)]
    assert parts.nbytes == 24


def test_variables_outside_are_read_where_they_are_used():
    scale = tf.Variable(np.ones(3))
    parts = linearize(lambda a, b, c: ([a * scale], [c * scale]), VECTOR, VECTOR, VECTOR)
    assert parts.saved == []
    a, b, c = _values(0, 1, 2)

    @tf.function
    def both():
        return parts.early(a, b)[1], parts.late([], b, c)

    for value in (1.0, 3.0):
        scale.assign(np.full(3, value))
        fits.assert_near(both(), ([a * value], [c * value]), 1e-15)


def test_the_lists_of_a_loop_are_not_kept():
    def function(first, given, last):
        with tf.GradientTape() as tape:
            tape.watch(first)
            _, y = tf.while_loop(
                lambda i, _: i < tf.cast(given[0], tf.int32),
                lambda i, y: (i + 1, tf.sin(y)),
                (tf.constant(0), first),
            )
        return [y], [tape.gradient(y, first, output_gradients=last)]

    assert linearize(function, VECTOR, VECTOR, VECTOR) is None


LAYERS = {
    "dense": (lambda: [keras.layers.Dense(6, "tanh")], True),
    "normalized": (
        lambda: [keras.layers.Dense(6, "gelu"), keras.layers.LayerNormalization()],
        True,
    ),
    "dropout": (lambda: [keras.layers.Dense(6, "tanh"), keras.layers.Dropout(0.3)], True),
    # Its loop keeps lists, which a second derivative goes through.
    "recurrent": (lambda: [keras.layers.Reshape((5, 1)), keras.layers.LSTM(3)], False),
}


@pytest.mark.parametrize(
    ("name", "curvature"),
    [
        ("dense", "hessian"),
        ("dense", "gauss_newton"),
        ("dense", "finite_difference"),
        ("normalized", "hessian"),
        ("dropout", "gauss_newton"),
        ("recurrent", "hessian"),
        ("recurrent", "finite_difference"),
    ],
)
def test_replay_in_halves_is_stored(float64, monkeypatch, name, curvature):
    """With a smaller last batch, so that what is kept comes in two shapes."""
    made, kept = LAYERS[name]
    found: list[halves.Halves | None] = []
    original = halves.Halves.of.__func__
    monkeypatch.setattr(
        halves.Halves, "of", classmethod(lambda *args: found.append(original(*args)) or found[-1])
    )

    def fit(trajectory):
        fits.start()
        net = [*made(), keras.layers.Dense(fits.CLASSES)]
        model = fits.compiled(keras.Sequential([keras.Input((5,)), *net]))
        (x, y), hyper = fits.examples(14), fits.examples(9, seed=1)
        callback = fits.callback(hyper, trajectory=trajectory, curvature=curvature)
        model.fit(x, y, 4, epochs=2, shuffle=False, verbose=0, callbacks=[callback])
        return callback

    replayed = fit("replay")
    of_first_order = curvature == "finite_difference"
    assert found and all((one is not None) == (kept or of_first_order) for one in found)
    # Differences of gradients divide what is rounded by a small step.
    fits.assert_same_updates(replayed, fit("stored"), 1e-6 if of_first_order else 1e-11)


class Given(NamedTuple):
    batch: list


def test_activations_that_dwarf_the_weights_are_not_kept(monkeypatch):
    wide = tf.TensorSpec([100, 3], tf.float64)
    batches = packing.pack([tf.zeros(wide.shape, wide.dtype)])

    def step(state, given, bars):
        return [tf.sin(state[0])], [bars[0] + tf.reduce_sum(tf.sin(given.batch * state[0]), 0)]

    def halved():
        return halves.Halves.of(step, batches, [VECTOR], [VECTOR], Given)

    assert halved().slots == [VECTOR]  # the sum alone
    monkeypatch.setattr(halves.Halves, "BYTES", 0)
    monkeypatch.setattr(halves.Halves, "STATES", 0.5)
    assert halved() is None


@pytest.mark.parametrize("weights", [(4,), (3, 4), (2, 3, 4), (2, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_quick_sums_are_sums(monkeypatch, weights, compiled):
    monkeypatch.setattr(sums, "SMALL", 0)
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=weights))
    shapes = [(), weights[-1:], weights, *([(weights[-2], 1)] if len(weights) > 1 else [])]

    @tf.function(jit_compile=compiled)
    def derivative(value, way):
        with tf.GradientTape() as tape:
            tape.watch(value)
            y = tf.reduce_sum(tf.sin(x * way(value)))
        return y, tape.gradient(y, value)

    assert_near = fits.assert_near
    assert_near(total(x), tf.reduce_sum(x), 1e-14)
    for shape in shapes:
        value = tf.constant(rng.normal(size=shape))
        assert_near(
            derivative(value, lambda v: spread(v, weights)), derivative(value, lambda v: v), 1e-14
        )
