"""Every rule and every argument: forward against Keras, backward against an unrolled tape.

A rule is one row of `TABLE`. The independent truth is the stock Keras optimizer itself, run on
tensors so that a tape sees through it; where there is none, a function that is written here.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf

import keras_drmad as kd

DOC = Path(__file__).parents[1] / "docs" / "new_rule.md"


@dataclass(frozen=True)
class Row:
    """A rule: what it is called here and there, and where its arguments start."""

    ours: type[kd.optimizers.Optimizer]
    tuned: dict[str, float]
    # A stock optimizer; or (weight, slot, gradient, values, t) -> (weight, slot).
    theirs: type[keras.optimizers.Optimizer] | Callable
    fixed: dict = field(default_factory=dict)  # flags

    @property
    def common(self) -> dict[str, float]:
        """What stands around the rule; the last two act through the gradient alone."""
        around = {"weight_decay": 0.03, "l1": 0.01, "l2": 0.02}
        return around if self.ours is not kd.optimizers.Lion else {"weight_decay": 0.03}


def example_of_the_docs() -> dict:
    """What the code of docs/new_rule.md defines."""
    namespace: dict = {}
    for code in re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL):
        exec(compile(code, str(DOC), "exec"), namespace)
    return namespace


def dampened(w, v, g, at, t):
    v = at["momentum"] * v - g + at["momentum"] * g
    return w + at["learning_rate"] * v, v


_k, _ours = keras.optimizers, kd.optimizers
_momentum = {"learning_rate": 0.2, "momentum": 0.8}
_betas = {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.95}
_adam = {**_betas, "epsilon": 0.01}
_rms = {"learning_rate": 0.03, "rho": 0.8, "epsilon": 0.01}
TABLE = {
    "momentum": Row(_ours.SGD, _momentum, _k.SGD),
    "nesterov": Row(_ours.SGD, _momentum, _k.SGD, {"nesterov": True}),
    "dampened": Row(_ours.SGD, _momentum, dampened, {"dampened": True}),
    "adam": Row(_ours.Adam, _adam, _k.Adam),
    "amsgrad": Row(_ours.Adam, _adam, _k.Adam, {"amsgrad": True}),
    "rmsprop": Row(_ours.RMSprop, _rms, _k.RMSprop),
    "rmsprop-both": Row(_ours.RMSprop, {**_rms, "momentum": 0.7}, _k.RMSprop, {"centered": True}),
    "adagrad": Row(_ours.Adagrad, {"learning_rate": 0.2, "epsilon": 0.01}, _k.Adagrad),
    "lion": Row(_ours.Lion, {"learning_rate": 0.02}, _k.Lion, {"beta_1": 0.8, "beta_2": 0.9}),
    "adam-clipnorm": Row(_ours.Adam, {**_adam, "clipnorm": 0.05}, _k.Adam),
    "sgd-clipvalue": Row(_ours.SGD, {**_momentum, "clipvalue": 0.03}, _k.SGD),
    "sgd-global_clipnorm": Row(_ours.SGD, {**_momentum, "global_clipnorm": 0.2}, _k.SGD),
    "docs": Row(**example_of_the_docs()["row"]),
}


# Forward ---------------------------------------------------------------------------------------

FORWARD = [
    ("Adam", dict(amsgrad=[False, True], weight_decay=[None, 0.02], clipnorm=[None, 1.0])),
    ("RMSprop", dict(momentum=[0.0, 0.9], centered=[False, True], weight_decay=[None, 0.02])),
    ("Adagrad", dict(initial_accumulator_value=[0.1, 0.0], global_clipnorm=[None, 1.0])),
    ("Lion", dict(beta_1=[0.9, 0.5], weight_decay=[None, 0.02], clipvalue=[None, 0.3])),
]


def _combinations(choices):
    return [
        dict(zip(choices, chosen, strict=True)) for chosen in itertools.product(*choices.values())
    ]


@pytest.mark.parametrize("name, choices", FORWARD, ids=[name for name, _ in FORWARD])
def test_follows_its_namesake_over_100_steps(name, choices):
    rng = np.random.default_rng(0)
    shapes = [(4, 3), (3,)]
    start = [rng.normal(size=shape).astype("float32") for shape in shapes]
    scales = rng.choice([0.02, 0.2, 2.0], 100)
    gradients = [
        tf.constant([rng.normal(0.0, scale, shape) for scale in scales], "float32")
        for shape in shapes
    ]

    def train(optimizer):
        variables = [keras.Variable(w) for w in start]
        optimizer.build(variables)

        @tf.function
        def hundred():
            for t in tf.range(100):
                optimizer.apply([g[t] for g in gradients], variables)

        hundred()
        return [np.asarray(v) for v in variables]

    for arguments in _combinations(choices):
        ours = train(getattr(kd.optimizers, name)(learning_rate=0.01, **arguments))
        theirs = train(getattr(keras.optimizers, name)(learning_rate=0.01, **arguments))
        for a, b in zip(ours, theirs, strict=True):
            assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b), arguments
            assert not np.array_equal(b, start[0 if b.ndim == 2 else 1])


def test_signatures_and_defaults_are_those_of_the_namesakes():

    for name in ("SGD", "Adam", "RMSprop", "Adagrad", "Lion"):
        ours = list(inspect.signature(getattr(kd.optimizers, name)).parameters.values())
        theirs = list(inspect.signature(getattr(keras.optimizers, name)).parameters.values())
        positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
        for a, b in zip(positional, theirs, strict=False):
            assert (a.name, a.default or None) == (b.name, b.default or None)


# The oracle --------------------------------------------------------------------------------------


def on_tensors(row: Row):
    """The first slots of each weight, and the row's update as a function of tensors."""
    if not isinstance(row.theirs, type):
        first = [[tf.zeros(shape, "float64")] for shape in oracle.SHAPES]

        def written(i, weight, slots, gradient, at, t):
            weight, slot = row.theirs(weight, *slots, gradient, at, t)
            return weight, [slot]

        return first, written

    class Stock(row.theirs):
        # Keras's variables hold tensors within a StatelessScope; what goes past it is led back.
        def assign(self, variable, value):
            variable.assign(value)

        def assign_add(self, variable, value):
            variable.assign(variable + value)

        def assign_sub(self, variable, value):
            variable.assign(variable - value)

        def _var_key(self, variable):
            return id(variable)

    tuned = [key for key in row.tuned if key in inspect.signature(row.theirs).parameters]
    stock = Stock(**{key: row.tuned[key] for key in tuned}, **row.fixed)
    variables = [keras.Variable(np.zeros(shape)) for shape in oracle.SHAPES]
    stock.build(variables)
    # Slots of one kind are lists like that of the variables.
    kinds = [
        found
        for name, found in vars(stock).items()
        if isinstance(found, list) and len(found) == len(variables) and "variables" not in name
    ]
    first = [[tf.constant(kind[i].numpy()) for kind in kinds] for i in range(len(variables))]

    def step(i, weight, slots, gradient, at, t):
        for name in set(tuned) - {"learning_rate"}:
            setattr(stock, name, at[name])
        own = [kind[i] for kind in kinds]
        mapping = [(variables[i], weight), (stock._iterations, tf.constant(t - 1, tf.int64))]
        mapping += zip(own, slots, strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            stock.update_step(gradient, variables[i], at["learning_rate"])
        return scope.get_current_value(variables[i]), [scope.get_current_value(s) for s in own]

    return first, step


def grain(argument: str) -> oracle.Grain:
    return oracle.Grain("model" if argument == "global_clipnorm" else "layer", 2)


def update(step, weights, slots, gradients, values, t):
    """Step t of the whole training, from 0: penalties, clipping, decay, and the rule."""
    at = [
        {
            argument: grain(argument).value(nested, i, t)
            for argument, nested in values.items()
            if name == "kernel" or argument not in ("l1", "l2")
        }
        for i, (_, name) in enumerate(oracle.NAMES)
    ]
    gradients = [
        g + here["l1"] * tf.sign(w) + here["l2"] * w if "l1" in here else g
        for w, g, here in zip(weights, gradients, at, strict=True)
    ]
    if "global_clipnorm" in values:
        norm = tf.norm(tf.concat([tf.reshape(g, [-1]) for g in gradients], 0))
        gradients = [g * tf.minimum(1.0, at[0]["global_clipnorm"] / norm) for g in gradients]
    if "clipnorm" in values:
        gradients = [
            g * tf.minimum(1.0, here["clipnorm"] / tf.norm(g))
            for g, here in zip(gradients, at, strict=True)
        ]
    if "clipvalue" in values:
        gradients = [
            tf.where(tf.abs(g) > here["clipvalue"], tf.sign(g) * here["clipvalue"], g)
            for g, here in zip(gradients, at, strict=True)
        ]
    after = [
        step(i, w * (1 - here["learning_rate"] * here["weight_decay"]), s, g, here, t + 1)
        for i, (w, s, g, here) in enumerate(zip(weights, slots, gradients, at, strict=True))
    ]
    return [w for w, _ in after], [s for _, s in after]


def unroll(row: Row, values):
    """The outer loss after training, its derivative by every value and by the first weights."""
    (x, y), hyper = oracle.data()
    slots, step = on_tensors(row)
    weights = start = [tf.constant(w) for w in oracle.start_weights()]
    values = tf.nest.map_structure(tf.constant, values)
    with tf.GradientTape() as tape:
        tape.watch([start, tf.nest.flatten(values)])
        for t, batch in enumerate(oracle.batches_of(x, y)):
            gradients = oracle.gradient(weights, *batch)
            weights, slots = update(step, weights, slots, gradients, values, t)
        outer = oracle.loss(weights, *hyper)
    zero = tf.UnconnectedGradients.ZERO
    by_values, by_start = tape.gradient(outer, [values, start], unconnected_gradients=zero)
    return float(outer), tf.nest.map_structure(np.asarray, by_values), [g.numpy() for g in by_start]


def walk_the_line(row: Row, values, curvature):
    """The reverse recursion on the straight line between the ends of the training."""
    (x, y), hyper = oracle.data()
    batches = oracle.batches_of(x, y)
    slots, step = on_tensors(row)
    weights = [tf.constant(w) for w in oracle.start_weights()]
    values = tf.nest.map_structure(tf.constant, values)
    first = tf.nest.flatten([weights, slots])
    for t, batch in enumerate(batches):
        weights, slots = update(step, weights, slots, oracle.gradient(weights, *batch), values, t)
    last = tf.nest.flatten([weights, slots])
    bars = oracle.gradient(weights, *hyper) + [tf.zeros_like(s) for s in tf.nest.flatten(slots)]
    total = tf.nest.map_structure(np.zeros_like, values)
    zero = tf.UnconnectedGradients.ZERO
    for t in reversed(range(len(batches))):
        part = t / len(batches)
        state = [(1 - part) * a + part * b for a, b in zip(first, last, strict=True)]
        w, s = tf.nest.pack_sequence_as([weights, slots], state)
        g = oracle.gradient(w, *batches[t])
        with tf.GradientTape() as tape:
            tape.watch([state, g, tf.nest.flatten(values)])
            after = tf.nest.flatten(
                update(step, *tf.nest.pack_sequence_as([w, s], state), g, values, t)
            )
        bars, g_bar, l_bar = tape.gradient(after, [state, g, values], bars, zero)
        curved = oracle.unflat(curvature(oracle.flat(w), *batches[t]) @ oracle.flat(g_bar))
        bars = [b + c for b, c in zip(bars[:4], curved, strict=True)] + bars[4:]
        total = tf.nest.map_structure(lambda a, b: a + np.asarray(b), total, l_bar)
    return total


# Backward --------------------------------------------------------------------------------------


@dataclass
class Fitted:
    """A real fit with every argument of a row tuned."""

    model: keras.Model
    callback: kd.DrMADCallback
    start: list  # (variable, value) before the fit

    def train(self, *callbacks) -> None:
        (x, y), _ = oracle.data()
        options = dict(shuffle=False, verbose=0, callbacks=list(callbacks))
        self.model.fit(x, y, oracle.BATCH, oracle.EPOCHS, **options)


def fit(row: Row, **options) -> Fitted:
    model = keras.Sequential(
        [
            keras.Input((oracle.FEATURES,)),
            keras.layers.Dense(oracle.HIDDEN, "tanh", name="first"),
            keras.layers.Dense(oracle.CLASSES, name="second"),
        ]
    )
    model.set_weights(oracle.start_weights())
    tuned = {
        key: kd.Hyperparameter(value, per=grain(key).per, over=grain(key).over)
        for key, value in {**row.tuned, **row.common}.items()
    }
    optimizer = row.ours(**tuned, **row.fixed)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    optimizer.build(model.trainable_variables)
    optimizer.set_horizon(oracle.EPOCHS, oracle.STEPS)
    rng = np.random.default_rng(3)
    for raw in optimizer.raw_variables:
        raw.assign_add(rng.normal(0.0, 0.2, raw.shape))
    start = [(v, v.numpy()) for v in [*model.variables, *optimizer.variables]]
    _, hyper = oracle.data()
    callback = kd.DrMADCallback(hyper, "sgd", horizon=oracle.EPOCHS, **options)
    fitted = Fitted(model, callback, start)
    fitted.train(callback)
    return fitted


@pytest.mark.parametrize("name", TABLE)
def test_hypergradients_agree_with_a_full_unroll_and_with_finite_differences(float64, name):
    row = TABLE[name]
    fitted = fit(row, trajectory="stored", curvature="hessian")
    record = fitted.callback.history[-1]
    outer, by_values, by_start = unroll(row, record.hyperparameters)
    assert record.accepted
    assert abs(record.outer_loss - outer) <= 1e-12
    oracle.assert_same(record.hypergradients, by_values, 1e-8)
    oracle.assert_same(record.initial_weights_gradient, by_start, 1e-8)

    groups = {group.argument: i for i, group in enumerate(fitted.model.optimizer.groups)}
    assert set(groups) == {*row.tuned, *row.common}
    for argument, i in groups.items():
        found, expected = by_raw(fitted, i, block=1)
        assert abs(found - expected) <= 1e-6 * abs(expected) + 1e-10, argument


def by_raw(fitted: Fitted, i: int, block: int) -> tuple[float, float]:
    """The derivative by one raw value: from the record, and from central differences of `fit`."""
    optimizer, size = fitted.model.optimizer, 1e-5
    group, raw = optimizer.groups[i], optimizer.raw_variables[i]
    start = next(value for variable, value in fitted.start if variable is raw)
    losses = []
    for shift in (size, -size):
        for variable, value in fitted.start:
            variable.assign(value)
        moved = start.copy()
        moved[block] += shift
        raw.assign(moved)
        fitted.train()
        losses.append(float(oracle.loss(fitted.model.get_weights(), *oracle.data()[1])))
    by_value = fitted.callback.history[-1].hypergradients[group.argument][group.key]
    slope = group.domain.slope(tf.constant(start)).numpy()
    return (by_value * slope)[block], (losses[0] - losses[1]) / (2 * size)


@pytest.mark.parametrize("name, curvature", [("adam", "gauss_newton"), ("rmsprop", "hessian")])
def test_linear_agrees_with_the_recursion_on_the_same_line(float64, name, curvature):
    row = TABLE[name]
    even = kd.trajectories.Linear("steps")
    fitted = fit(row, trajectory=even, curvature=curvature, max_batches=oracle.STEPS)
    record = fitted.callback.history[-1]
    assert record.accepted and curvature in record.setting
    expected = walk_the_line(row, record.hyperparameters, getattr(oracle, curvature))
    oracle.assert_same(record.hypergradients, expected, 1e-8)


def test_lion_has_no_hypergradient_through_the_sign(float64):
    betas = {"beta_1": 0.8, "beta_2": 0.9}
    fitted = fit(Row(kd.optimizers.Lion, betas, None), trajectory="stored", curvature="hessian")
    found = fitted.callback.history[-1].hypergradients
    assert set(found) == {"beta_1", "beta_2", "weight_decay"}
    assert not any(np.any(found[beta][layer]) for beta in betas for layer in ("first", "second"))
    assert np.any(found["weight_decay"]["first"])


# Where a second moment is zero -----------------------------------------------------------------


def test_the_root_has_derivative_zero_at_zero():
    x = tf.constant([0.0, 4.0, -1.0, np.nan])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = kd.rules.root(x)
    np.testing.assert_array_equal(y, [0.0, 2.0, np.nan, np.nan])
    np.testing.assert_array_equal(tape.gradient(y, x), [0.0, 0.25, np.nan, np.nan])


SPARSE = {
    "adam": (kd.optimizers.Adam, {"learning_rate": 0.1, "epsilon": 0.1}, {}),
    "adam-jit": (kd.optimizers.Adam, {"learning_rate": 0.1, "beta_1": 0.9}, {}),
    "amsgrad": (kd.optimizers.Adam, {"learning_rate": 0.1, "beta_2": 0.9}, {"amsgrad": True}),
    "rmsprop": (
        kd.optimizers.RMSprop,
        {"learning_rate": 0.1, "rho": 0.9, "epsilon": 0.1},
        {"centered": True, "momentum": 0.5},
    ),
    "adagrad": (
        kd.optimizers.Adagrad,
        {"learning_rate": 0.1, "epsilon": 0.1},
        {"initial_accumulator_value": 0.0},
    ),
    "clipnorm": (kd.optimizers.SGD, {"learning_rate": 0.1, "clipnorm": 0.05}, {}),
}


@pytest.mark.parametrize("name", SPARSE)
def test_hypergradients_are_right_where_gradients_are_zero(float64, name):
    """Words that never come, or come late; features that are zero at first; a dead unit."""
    ours, tuned, fixed = SPARSE[name]
    words, features = keras.Input((2,), dtype="int32"), keras.Input((3,))
    embedded = keras.layers.Flatten()(keras.layers.Embedding(5, 2, name="words")(words))
    both = keras.layers.Concatenate()([embedded, features])
    hidden = keras.layers.Dense(4, "relu", name="hidden")(both)
    model = keras.Model([words, features], keras.layers.Dense(1, name="out")(hidden))
    bias = np.array([-1e3, 0.5, 0.5, 0.5])  # the first unit is dead
    model.get_layer("hidden").bias.assign(bias)
    rng = np.random.default_rng(0)
    first, later = np.array([[0, 1]] * 4), np.array([[1, 2]] * 8)  # 3 and 4 never come
    x = [np.concatenate([first, later]), rng.normal(size=(12, 3))]
    x[1][:4, 0] = 0.0
    x[1][:, 1] = 0.0
    y = rng.normal(size=(12, 1))
    hyper = ([np.array([[0, 3], [2, 1]]), rng.normal(size=(2, 3))], rng.normal(size=(2, 1)))
    model.compile(
        ours(**{k: kd.Hyperparameter(v, per="layer") for k, v in tuned.items()}, **fixed), "mse"
    )
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    start = [(v, v.numpy()) for v in [*model.variables, *optimizer.variables]]
    compiled = "jit" in name  # XLA divides zero by zero where TensorFlow's own kernels look first
    callback = kd.DrMADCallback(
        hyper, "sgd", trajectory="stored", curvature="hessian", jit_compile=compiled
    )
    options = dict(batch_size=4, shuffle=False, verbose=0)
    model.fit(x, y, callbacks=[callback], **options)
    record = callback.history[-1]
    assert record.accepted and np.isfinite(record.outer_loss)
    assert all(np.isfinite(g).all() for g in record.initial_weights_gradient)
    words = model.get_layer("words").get_weights()[0]
    assert np.array_equal(words[3:], start[0][1][3:]) and not np.array_equal(words, start[0][1])
    for argument in tuned:
        for i, group in enumerate(optimizer.groups):
            if group.argument != argument:
                continue
            losses = []
            for shift in (1e-5, -1e-5):
                for variable, value in start:
                    variable.assign(value)
                optimizer.raw_variables[i].assign_add([shift])
                model.fit(x, y, **options)
                losses.append(float(np.mean((model(hyper[0]) - hyper[1]) ** 2)))
            value = group.initial
            found = record.hypergradients[argument][group.key]
            found = found * float(
                group.domain.slope(tf.constant(group.domain.raw(value), "float64"))
            )
            expected = (losses[0] - losses[1]) / 2e-5
            assert abs(found - expected) <= 1e-5 * abs(expected) + 1e-9, (argument, group.key)
