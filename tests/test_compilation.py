"""XLA compiles the reverse pass where asked or where it is faster, and changes no number."""

import gc

import fits
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_drmad as kd
from keras_drmad.compilation import Compilation
from keras_drmad.estimator import Estimator
from keras_drmad.reverse import ReverseLoop

BATCH = 4
EXAMPLES = 14  # a smaller last batch in each epoch


def fit(examples=EXAMPLES, layer=None, callbacks=(), **arguments):
    """Two updates of a small net."""
    fits.start()
    inner = [] if layer is None else [layer]
    net = [keras.layers.Dense(4, "tanh"), *inner, keras.layers.Dense(fits.CLASSES)]
    model = keras.Sequential([keras.Input((5,)), *net])
    fits.compiled(model)
    (x, y), hyper = fits.examples(examples), fits.examples(9, seed=1)
    callback = fits.callback(hyper, **arguments)
    every = [callback, *callbacks]
    model.fit(x, y, BATCH, epochs=2, shuffle=False, verbose=0, callbacks=every)
    return callback


@pytest.mark.parametrize(
    "arguments",
    [
        dict(trajectory="replay", curvature="hessian"),
        dict(trajectory=kd.trajectories.Piecewise(3), curvature="gauss_newton", reverse_steps=3),
    ],
    ids=["replay", "piecewise"],
)
def test_a_compiled_walk_collects_the_same(float64, arguments):
    plain, compiled = fit(jit_compile=False, **arguments), fit(jit_compile=True, **arguments)
    fits.assert_same_updates(compiled, plain, 1e-10)
    loops = compiled._estimator._loops
    assert all(on for _, on in loops) and len(loops) == 1


def test_auto_stays_plain_in_a_short_run():
    callback = fit(trajectory="linear")
    assert not any(on for _, on in callback._estimator._loops)
    assert not callback.settled
    assert fit(trajectory="linear", jit_compile=False).settled


def test_auto_compiles_once_plain_walks_have_taken_long(monkeypatch, float64):
    monkeypatch.setattr(Compilation, "WORTH", 0.0)
    callback = fit(trajectory="linear")
    assert any(on for _, on in callback._estimator._loops)
    monkeypatch.undo()
    fits.assert_same_updates(callback, fit(trajectory="linear", jit_compile=False), 1e-10)


class Foreign(keras.layers.Layer):
    """Does nothing, by an operation that XLA does not have."""

    def call(self, x):
        zero = tf.numpy_function(lambda a: 0.0 * a, [tf.stop_gradient(x)], x.dtype)
        return x + tf.ensure_shape(zero, x.shape)


# It is warned of: what the function does could depend on the weights.
FOREIGN = pytest.mark.filterwarnings("ignore:The training step stops the gradient")


@FOREIGN
def test_what_xla_cannot_compile_is_walked_plainly(monkeypatch, float64):
    monkeypatch.setattr(Compilation, "WORTH", 0.0)
    callback = fit(layer=Foreign(), trajectory="linear", curvature="gauss_newton")
    assert callback._estimator._loops["gauss_newton", True].refused
    assert not callback._estimator._compilation.possible
    monkeypatch.undo()
    fits.assert_same_updates(callback, fit(trajectory="linear", curvature="gauss_newton"), 1e-9)


@FOREIGN
def test_a_python_function_inside_the_model_outlives_the_cut_of_its_graph(float64):
    collect = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: gc.collect())
    options = dict(layer=Foreign(), curvature="gauss_newton", jit_compile=False)
    options["callbacks"] = [collect]
    fits.assert_same_updates(
        fit(trajectory="replay", **options), fit(trajectory="stored", **options), 1e-11
    )


@FOREIGN
def test_what_xla_cannot_compile_is_refused_where_xla_is_asked_for():
    with pytest.raises(ValueError, match="jit_compile='auto' or False"):
        fit(layer=Foreign(), trajectory="linear", jit_compile=True)


def test_masks_that_would_differ_are_refused():
    with pytest.raises(ValueError, match="other dropout masks"):
        fit(layer=keras.layers.Dropout(0.5), trajectory="linear", jit_compile=True)
    fits.start()
    dropout, dense = keras.layers.Dropout(0.5), keras.layers.Dense(fits.CLASSES)
    model = fits.compiled(keras.Sequential([keras.Input((5,)), dropout, dense]), jit_compile=True)
    callback = kd.DrMADCallback(fits.examples(9, seed=1), jit_compile=False)
    with pytest.raises(
        ValueError, match="`jit_compile=False` of the reverse pass would draw other"
    ):
        model.fit(*fits.examples(8), verbose=0, callbacks=[callback])


class Late(keras.Model):
    """Has no layers, and so no seeds, before it is built."""

    def build(self, shape):
        self.dropout, self.dense = keras.layers.Dropout(0.5), keras.layers.Dense(fits.CLASSES)
        self.dense.build(shape)
        super().build(shape)

    def call(self, x, training=False):
        return self.dense(self.dropout(x, training=training))


@pytest.mark.parametrize("built", [False, True])
def test_layers_made_late_are_walked_as_fit_goes(built):
    fits.start()
    model = Late()
    if built:
        model.build((None, 5))
    fits.compiled(model, jit_compile=True)
    callback = kd.DrMADCallback(fits.examples(9, seed=1), trajectory="replay")
    model.fit(*fits.examples(8), BATCH, shuffle=False, verbose=0, callbacks=[callback])
    assert callback.history[-1].accepted
    assert [on for _, on in callback._estimator._loops] == [True]


def test_the_faster_way_is_taken():
    for seconds, faster in ((5.0, True), (20.0, False)):
        choice = Compilation("auto")
        used = []
        for i in range(5):
            assert choice.settled("linear") == (i > 2)
            compiled = choice.use("linear")
            used.append(compiled)
            # The first compiled walk takes time to compile.
            took = seconds + 30.0 * (used.count(True) == 1) if compiled else 11.0
            choice.note("linear", compiled, took, 1000)
        assert used == [False, True, True, faster, faster]
        assert not choice.use("replay")
    assert Compilation(True).use("linear") and not Compilation(False).use("linear")
    assert not Compilation("auto", possible=False).use("linear")


def test_a_hopeless_walk_is_not_tried_again():
    choice = Compilation("auto")
    choice.note("linear", False, 20.0, 1000)
    assert choice.use("linear")
    assert not choice.hopeless("linear", 0.3, 10)  # no slower than that: it is measured
    assert choice.use("linear") and not choice.settled("linear")
    assert choice.hopeless("linear", 2.0, 10)
    assert choice.settled("linear") and not choice.use("linear")
    assert not Compilation(True).hopeless("linear", 1e6, 1)


@pytest.mark.parametrize("trajectory", ["linear", "replay"])
def test_a_hopeless_walk_ends_plainly(monkeypatch, float64, trajectory):
    monkeypatch.setattr(Compilation, "WORTH", 0.0)
    monkeypatch.setattr(Compilation, "hopeless", lambda *args: True)
    monkeypatch.setattr(Estimator, "_portions", lambda *args: iter([(0, 2), (2, 3), (3, 4)]))
    used = []
    walk = ReverseLoop.walk
    monkeypatch.setattr(
        ReverseLoop, "walk", lambda loop, *args: used.append(loop.jit_compile) or walk(loop, *args)
    )
    ended = fit(trajectory=trajectory)
    assert used[:3] == [True, True, False]
    monkeypatch.undo()
    fits.assert_same_updates(ended, fit(trajectory=trajectory, jit_compile=False), 1e-10)


@pytest.mark.parametrize("trajectory", ["linear", "replay"])
def test_a_walk_on_trial_begins_with_single_steps(monkeypatch, float64, trajectory):
    monkeypatch.setattr(Compilation, "WORTH", 0.0)
    parts = []
    walk = ReverseLoop.walk

    def noted(loop, *args):
        parts.append((loop.jit_compile, *args[5:7]))
        return walk(loop, *args)

    monkeypatch.setattr(ReverseLoop, "walk", noted)
    fit(trajectory=trajectory)
    assert parts[:3] == [(True, 0, 1), (True, 1, 2), (True, 2, 4)]  # compile, look, go on
    assert (True, 0, 4) in parts or (True, 0, 2) in parts  # the second time as any other


def test_under_determinism_the_clock_decides_nothing(determinism):
    choice = Compilation("auto")
    choice.note("linear", False, 100.0, 1000)
    assert not choice.use("linear")
    assert np.isinf(choice._pace("linear").compiled)
