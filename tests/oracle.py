"""An independent truth for hypergradients. Nothing here comes from the package.

A net of two tanh-dense layers with softmax cross-entropy, its gradient by hand, gradient descent by
hand, and two ways to differentiate the outer loss through a training run:

- `unroll`: one tape over the whole training, for the true path;
- `walk_back`: the reverse recursion with explicit matrices, on whatever path it is given.

Hyperparameter values are nested as in a record: `values[argument][layer]`, with the time axis first
where they change over time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

ARGUMENTS = ("learning_rate", "momentum", "l1", "l2", "weight_decay")
# What the net's four weights are called, in order: (layer, name).
NAMES = (("first", "kernel"), ("first", "bias"), ("second", "kernel"), ("second", "bias"))


# Data and start ------------------------------------------------------------------------------

FEATURES, HIDDEN, CLASSES = 4, 5, 3
SHAPES = ((FEATURES, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,))
BATCH, EPOCHS, STEPS = 5, 2, 10


def data():
    """23 training examples, so that the last of 5 batches is smaller; and hyper data."""
    rng = np.random.default_rng(1)
    x, hyper_x = rng.normal(size=(23, FEATURES)), rng.normal(size=(7, FEATURES))
    return (x, rng.integers(0, CLASSES, 23)), (hyper_x, rng.integers(0, CLASSES, 7))


def batches_of(x, y):
    """Of every step of the training, its batch."""
    one = [(x[k : k + BATCH], y[k : k + BATCH]) for k in range(0, len(x), BATCH)]
    return one * EPOCHS


def start_weights():
    """Away from zero, where l1 has its kink."""
    rng = np.random.default_rng(2)
    return [rng.uniform(0.3, 0.8, s) * rng.choice([-1, 1], s) for s in SHAPES]


def assert_same(found, expected, tolerance=1e-9):
    """Nested arrays agree entry by entry; entries that nearly cancel, on their array's scale."""
    tf.nest.assert_same_structure(found, expected)
    for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        assert np.shape(a) == np.shape(b)
        assert np.any(np.asarray(b) != 0)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * 1e-2 * np.abs(b).max())


# Hyperparameters ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Grain:
    """How values are laid out over the net and over time."""

    per: str = "model"
    over: str | int = "run"

    def block(self, t: int) -> int | None:
        """The index on the time axis at step t, or None where there is no such axis."""
        if self.over == "run":
            return None
        blocks = {"step": STEPS, "epoch": EPOCHS}.get(self.over, self.over)
        return t * blocks // STEPS

    def value(self, values: dict, i: int, t: int):
        """The value for the i-th weight at step t, broadcastable to it."""
        layer, name = NAMES[i]
        if self.per == "model":
            value = values["model"]
        elif self.per == "weight":
            value = values[layer][name]
        elif self.per == "input" and name == "bias":
            value = values[f"{layer}/{name}"]
        else:
            value = values[layer]
        block = self.block(t)
        value = value if block is None else value[block]
        return value[:, None] if self.per == "input" and name == "kernel" else value


# The net -------------------------------------------------------------------------------------


def logits(weights, x):
    w1, b1, w2, b2 = weights
    return tf.tanh(x @ w1 + b1) @ w2 + b2


def loss(weights, x, y):
    """Mean softmax cross-entropy."""
    z = logits(weights, x)
    right = tf.reduce_sum(z * tf.one_hot(y, z.shape[-1], dtype=z.dtype), -1)
    return tf.reduce_mean(tf.reduce_logsumexp(z, -1) - right)


def gradient(weights, x, y):
    """The gradient of `loss`, by hand."""
    w1, b1, w2, b2 = weights
    hidden = tf.tanh(x @ w1 + b1)
    z = hidden @ w2 + b2
    wrong = tf.nn.softmax(z) - tf.one_hot(y, z.shape[-1], dtype=z.dtype)
    dz = wrong / tf.cast(tf.shape(x)[0], z.dtype)
    dh = (dz @ tf.transpose(w2)) * (1 - hidden**2)
    return [
        tf.transpose(x) @ dh,
        tf.reduce_sum(dh, 0),
        tf.transpose(hidden) @ dz,
        tf.reduce_sum(dz, 0),
    ]


# The full unroll -----------------------------------------------------------------------------


def clipped(gradients, clipping):
    kind, limit = clipping
    if kind == "clipvalue":
        return [tf.minimum(tf.maximum(g, -limit), limit) for g in gradients]
    norms = [tf.norm(g) for g in gradients]
    if kind == "global_clipnorm":
        norms = [tf.norm(tf.stack(norms))] * len(norms)
    return [g * tf.minimum(1.0, limit / n) for g, n in zip(gradients, norms, strict=True)]


def descend(weights, velocities, gradients, at, rule="plain", clipping=None):
    """One step of gradient descent; `at(argument, i)` is a value for the i-th weight."""
    total = []
    for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
        if NAMES[i][1] == "kernel":
            g = g + at("l1", i) * tf.sign(w) + at("l2", i) * w
        total.append(g)
    if clipping is not None:
        total = clipped(total, clipping)
    after, moving = [], []
    for i, (w, v, g) in enumerate(zip(weights, velocities, total, strict=True)):
        rate, keep, decay = at("learning_rate", i), at("momentum", i), at("weight_decay", i)
        w = w * (1 - rate * decay)
        if rule == "dampened":
            v = keep * v - (1 - keep) * g
            w = w + rate * v
        elif rule == "nesterov":
            v = keep * v - rate * g
            w = w + keep * v - rate * g
        else:
            v = keep * v - rate * g
            w = w + v
        after.append(w)
        moving.append(v)
    return after, moving


def unroll(start, batches, hyper, values, grain, rule="plain", clipping=None):
    """The outer loss after training on the batches, and its derivatives.

    Returns:
        The outer loss, the last weights, the derivative by every value (nested as `values`), and
        the derivative by the first weights.
    """
    values = tf.nest.map_structure(tf.constant, values)
    start = [tf.constant(w) for w in start]
    with tf.GradientTape() as tape:
        tape.watch([start, tf.nest.flatten(values)])
        weights, velocities = start, [tf.zeros_like(w) for w in start]
        for t, (x, y) in enumerate(batches):
            weights, velocities = descend(
                weights,
                velocities,
                gradient(weights, x, y),
                lambda argument, i, t=t: grain.value(values[argument], i, t),
                rule,
                clipping,
            )
        outer = loss(weights, *hyper)
    zero = tf.UnconnectedGradients.ZERO
    by_start, by_values = tape.gradient(outer, [start, values], unconnected_gradients=zero)
    return (
        float(outer),
        [w.numpy() for w in weights],
        tf.nest.map_structure(lambda g: g.numpy(), by_values),
        [g.numpy() for g in by_start],
    )


# The reverse recursion on a given path -------------------------------------------------------


def flat(tensors) -> np.ndarray:
    return np.concatenate([np.ravel(t) for t in tensors])


def unflat(vector) -> list:
    sizes = [math.prod(shape) for shape in SHAPES]
    if isinstance(vector, tf.Tensor):
        parts = tf.split(vector, sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, SHAPES, strict=True)]
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


def states(start, batches, values, grain):
    """Of the whole training, every state and the last one: (weights, velocities), flat."""
    w, v = flat(start), np.zeros(flat(start).size)
    found = [(w, v)]
    for t, (x, y) in enumerate(batches):
        after, moving = descend(
            unflat(w),
            unflat(v),
            gradient(unflat(w), x, y),
            lambda argument, i, t=t: grain.value(values[argument], i, t),
        )
        w, v = flat(after), flat(moving)
        found.append((w, v))
    return found


def polyline(found, anchors):
    """The states at the anchors and on straight lines between them, by step."""
    line = {}
    for t in range(anchors[0], anchors[-1] + 1):
        a = max(k for k in anchors if k <= t)
        b = min(k for k in anchors if k >= t)
        part = 0.0 if a == b else (t - a) / (b - a)
        pairs = zip(found[a], found[b], strict=True)
        line[t] = tuple((1 - part) * p + part * q for p, q in pairs)
    return line


def paced_line(found, anchors):
    """The states on a straight line, each as far from the first weights as the run was.

    How far that was is measured at eight steps of a short run, dense at its start, and at its end.
    """
    first, last = anchors
    measured = sorted({first + round((last - first) * (j / 8) ** 2) for j in range(8)} | {last})
    far = [np.linalg.norm(found[t][0] - found[first][0]) for t in measured]
    line = {}
    for t in range(first, last + 1):
        part = np.interp(t, measured, np.minimum(1.0, np.array(far) / far[-1]))
        pairs = zip(found[first], found[last], strict=True)
        line[t] = tuple((1 - part) * p + part * q for p, q in pairs)
    return line


def jacobian(function, point):
    """The matrix of derivatives of a vector by a flat vector, row by row."""
    point = tf.constant(point)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(point)
        result = tf.reshape(function(point), [-1])
    return tape.jacobian(result, point, experimental_use_pfor=False).numpy()


def hessian(weights, x, y):
    """The matrix of second derivatives of the loss."""
    return jacobian(
        lambda w: tf.concat([tf.reshape(g, [-1]) for g in gradient(unflat(w), x, y)], 0), weights
    )


def gauss_newton(weights, x, y):
    """J' H J, with J of the logits and H of softmax cross-entropy by hand."""
    j = jacobian(lambda w: logits(unflat(w), x), weights)
    p = tf.nn.softmax(logits(unflat(weights), x)).numpy()
    n, classes = p.shape
    h = np.zeros((n * classes, n * classes))
    for k in range(n):
        here = slice(k * classes, (k + 1) * classes)
        h[here, here] = (np.diag(p[k]) - np.outer(p[k], p[k])) / n
    return j.T @ h @ j


def walk_back(line, batches, hyper, values, grain, curvature, visits):
    """The reverse recursion of momentum descent, with every Jacobian written out.

    The rule acts on each scalar weight on its own, so its Jacobians are diagonal:

        G = g + l1 sign(w) + l2 w,  v' = m v - a G,  w' = w - a d w + v'

    Args:
        line: By step, the state before it, and the last one: flat (weights, velocities).
        batches: Of every step, the batch that its loss is evaluated on.
        hyper: The hyper data.
        values, grain: The hyperparameters.
        curvature: `hessian` or `gauss_newton` of this module.
        visits: The steps in the order of the walk, the last first.

    Returns:
        The derivative by every value (nested as `values`), and by the first weights.
    """
    penalized = flat([np.full(s, float(len(s) == 2)) for s in SHAPES])

    def spread(argument, t):
        if argument in ("l1", "l2"):  # no value for biases
            found = [
                grain.value(values[argument], i, t) if len(s) == 2 else 0.0
                for i, s in enumerate(SHAPES)
            ]
        else:
            found = [grain.value(values[argument], i, t) for i in range(len(SHAPES))]
        return flat([np.broadcast_to(f, s) for f, s in zip(found, SHAPES, strict=True)])

    total = {a: tf.nest.map_structure(np.zeros_like, values[a]) for a in ARGUMENTS}
    w_bar = flat(gradient(unflat(line[STEPS][0]), *hyper))
    v_bar = np.zeros_like(w_bar)
    for t in visits:
        w, v = line[t]
        x, y = batches[t]
        g = flat(gradient(unflat(w), x, y))
        a, m, l1, l2, d = (spread(argument, t) for argument in ARGUMENTS)
        full = g + l1 * np.sign(w) + l2 * w
        both = w_bar + v_bar  # v' enters the new velocity and the new weight
        by_value = {
            "learning_rate": -d * w * w_bar - full * both,
            "momentum": v * both,
            "l1": -a * np.sign(w) * penalized * both,
            "l2": -a * w * penalized * both,
            "weight_decay": -a * w * w_bar,
        }
        for argument, part in by_value.items():
            _gather(total[argument], grain, t, unflat(part), argument)
        g_bar = -a * both
        w_bar = (1 - a * d) * w_bar - a * l2 * both + curvature(w, x, y) @ g_bar
        v_bar = m * both
    return total, unflat(w_bar)


def _gather(total, grain, t, parts, argument):
    """Add up the derivatives of the scalar weights that share a value."""
    block = grain.block(t)
    at = () if block is None else block
    for i, part in enumerate(parts):
        layer, name = NAMES[i]
        if argument in ("l1", "l2") and name == "bias":
            continue
        if grain.per == "weight":
            total[layer][name][at] += part
        elif grain.per == "model":
            total["model"][at] += part.sum()
        elif grain.per == "layer":
            total[layer][at] += part.sum()
        elif grain.per == "neuron":
            total[layer][at] += part.sum(0) if name == "kernel" else part
        elif name == "kernel":
            total[layer][at] += part.sum(1)
        else:
            total[f"{layer}/{name}"][at] += part.sum()
