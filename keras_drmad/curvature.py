"""Curvature: the training loss's gradient, and a product with its second derivative.

Each function takes the loss as a function of (weights, inputs) that returns a `Forward`, and
returns the gradient and a function `product(v, bars)` that gives, for a direction v in weight space
and cotangents of the moving averages that the forward pass leaves,

    C v                      + bars' d averages / d weights    C: the curvature of that name
    d <gradient, v> / d inputs + bars' d averages / d inputs

The forward pass is shared between the gradient and the product, and the last backward pass between
C v and the moving averages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_drmad.normalization import exact_moments
from keras_drmad.objectives import Forward, dense
from keras_drmad.sums import total

Tensors = list[tf.Tensor]
Loss = Callable[[Sequence[tf.Tensor], Sequence[tf.Tensor]], Forward]
Product = Callable[..., tuple[Tensors, Tensors]]
Curvature = Callable[[Loss, Tensors, Tensors], tuple[list[tf.Tensor | None], Product]]


def hessian(loss: Loss, weights: Tensors, inputs: Tensors):
    """The exact Hessian, reverse over reverse (Pearlmutter, 1994)."""
    with tf.GradientTape(watch_accessed_variables=False) as outer, exact_moments():
        outer.watch([weights, inputs])
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(weights)
            forward = loss(weights, inputs)
        gradient = _gradient(inner, forward.loss, weights)

    def product(v: Tensors, bars: Sequence[tf.Tensor] = ()) -> tuple[Tensors, Tensors]:
        targets, directions = _connected([*gradient, *forward.averages], [*v, *bars])
        both = _filled(outer, targets, weights + inputs, directions)
        return both[: len(weights)], both[len(weights) :]

    return gradient, product


def gauss_newton(loss: Loss, weights: Tensors, inputs: Tensors):
    """Generalized Gauss-Newton J' H J, H the loss's Hessian in the outputs (Schraudolph, 2002).

    Positive semi-definite for losses convex in the outputs. Penalties of layers enter with their
    exact Hessian.
    """
    tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
    with tape as second, exact_moments():  # penalties and the mixed derivative are of second order
        second.watch([weights, inputs])
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as first:
            first.watch(weights)
            forward = loss(weights, inputs)
        gradient = _gradient(first, forward.loss, weights)
        outputs, slopes = _cut(first, forward)
        penalty = None if forward.penalty is None else _gradient(first, forward.penalty, weights)
    # J v by transposing twice: J' u is linear in u, and its derivative in u is J. This way the
    # forward pass above serves; a forward-mode product would need one of its own.
    zeros = [tf.zeros_like(z) for z in outputs]
    with tf.GradientTape(watch_accessed_variables=False) as transposed:
        transposed.watch(zeros)
        pulled = _gradient(first, outputs, weights, zeros)

    def product(v: Tensors, bars: Sequence[tf.Tensor] = ()) -> tuple[Tensors, Tensors]:
        targets, directions = _connected(pulled, v)
        pushed = _filled(transposed, targets, zeros, directions)
        bent = _filled(second, slopes, outputs, pushed)
        curved = _filled(first, [*outputs, *forward.averages], weights, [*bent, *bars])
        if penalty is not None:
            targets, directions = _connected(penalty, v)
            own = _filled(second, targets, weights, directions)
            curved = [a + b for a, b in zip(curved, own, strict=True)]
        targets, directions = _connected([*gradient, *forward.averages], [*v, *bars])
        mixed = _filled(second, targets, inputs, directions) if inputs else []
        return curved, mixed

    return gradient, product


def finite_difference(loss: Loss, weights: Tensors, inputs: Tensors):
    """The Hessian by central differences of two gradients; for layers with no second derivative.

    The step is the cube root of the precision, relative to the weights' norm (Nocedal and Wright,
    2006, section 8.1).
    """

    def slope(at: Tensors) -> tuple[list[tf.Tensor | None], Tensors]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([at, inputs])
            value = loss(at, inputs).loss
        both = _gradient(tape, value, at + inputs)
        ends = both[len(at) :]
        return both[: len(at)], [
            tf.zeros_like(x) if g is None else g for x, g in zip(inputs, ends, strict=True)
        ]

    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as centre:
        centre.watch([weights, inputs])
        forward = loss(weights, inputs)
    gradient = _gradient(centre, forward.loss, weights)

    def product(v: Tensors, bars: Sequence[tf.Tensor] = ()) -> tuple[Tensors, Tensors]:
        relative = 6e-6 if all(w.dtype == tf.float64 for w in weights) else 5e-3
        length = tf.linalg.global_norm(v)
        step = relative * (1.0 + tf.linalg.global_norm(weights)) / tf.maximum(length, 1e-30)
        ahead = slope([w + tf.cast(step, w.dtype) * d for w, d in zip(weights, v, strict=True)])
        behind = slope([w - tf.cast(step, w.dtype) * d for w, d in zip(weights, v, strict=True)])

        def difference(a, b, like):
            if a is None or b is None:
                return tf.zeros_like(like)
            # A zero direction has a zero product, however the division rounds.
            d = (a - b) / tf.cast(2.0 * step, like.dtype)
            return tf.where(length > 0, d, tf.zeros_like(d))

        both = [
            *map(difference, ahead[0], behind[0], weights),
            *map(difference, ahead[1], behind[1], inputs),
        ]
        averaged = _filled(centre, list(forward.averages), weights + inputs, list(bars))
        both = [a + b for a, b in zip(both, averaged, strict=True)]
        return both[: len(weights)], both[len(weights) :]

    return gradient, product


def bounded(passed: Tensors, curved: Tensors, ceiling: tf.Tensor) -> Tensors:
    """A curvature product C g, scaled down where no stable training can have met it.

    A mode of the reverse recursion is multiplied by some mu at each step. Where training is stable
    |mu| <= 1, so the product, which moves it by mu - 1, is at most twice as long as the mode. At a
    guessed state it may be far longer: a straight line dwells where training jumped. So where

        |C g| > 2 |w|    or    |w + C g| > max(|w|, ceiling)      w: what the rule passes on

    C g is scaled by the theta in [0, 1] at which |w + theta C g| is least, which takes out what
    has exploded and adds nothing.

    What moving averages add to C g counts as a part of it: it is a part of w at most.

    Args:
        passed: w, of each weight.
        curved: C g, of each weight.
        ceiling: How far cotangents may grow before they don't grow any more.
    """
    wide = max((c.dtype for c in curved), key=lambda dtype: dtype.size)
    pairs = [(tf.cast(a, wide), tf.cast(b, wide)) for a, b in zip(passed, curved, strict=True)]
    own = tf.add_n([total(a * a) for a, _ in pairs])
    bent = tf.add_n([total(b * b) for _, b in pairs])
    both = tf.add_n([total(a * b) for a, b in pairs])
    top = tf.cast(ceiling, wide) ** 2
    risen = own + 2.0 * both + bent > tf.maximum(own, top)
    least = tf.clip_by_value(tf.math.divide_no_nan(-both, bent), 0.0, 1.0)
    scale = tf.where(tf.logical_or(bent > 4.0 * own, risen), least, tf.ones_like(least))
    return [tf.cast(scale, c.dtype) * c for c in curved]


def _cut(tape, forward: Forward) -> tuple[Tensors, Tensors]:
    """The outputs that the loss depends on, and its slopes there.

    Where the loss passes by a softmax or sigmoid, its logits stand in the output's place.
    """
    outputs, slopes = [], []
    logits = forward.logits or [None] * len(forward.outputs)
    for ends in zip(forward.outputs, logits, strict=True):
        for z in ends:
            differentiable = z is not None and z.dtype.is_floating
            slope = tape.gradient(forward.loss, z) if differentiable else None
            if slope is not None:
                outputs.append(z)
                slopes.append(slope)
                break
    if not outputs and forward.penalty is None:
        raise ValueError(
            "curvature='gauss_newton' needs a loss of the model's outputs, and this model's loss "
            "does not depend on them (does its `compute_loss` call layers by itself?). Pass "
            "curvature='hessian' to DrMADCallback."
        )
    return outputs, slopes


def _gradient(tape, target, sources, direction=None) -> list[tf.Tensor | None]:
    gradients = tape.gradient(target, sources, output_gradients=direction)
    return [None if g is None else dense(g) for g in gradients]


def _connected(targets: Sequence[tf.Tensor | None], directions: Tensors) -> tuple[Tensors, Tensors]:
    pairs = [(t, d) for t, d in zip(targets, directions, strict=True) if t is not None]
    return [t for t, _ in pairs], [d for _, d in pairs]


def _filled(tape, targets: Tensors, sources: Tensors, directions: Tensors) -> Tensors:
    """The vector-Jacobian product, with zeros where a source does not matter."""
    if not targets:
        return [tf.zeros_like(s) for s in sources]
    gradients = tape.gradient(targets, sources, output_gradients=directions)
    return [
        tf.zeros_like(s) if g is None else dense(g) for s, g in zip(sources, gradients, strict=True)
    ]


_NAMED: dict[str, Curvature] = {
    "gauss_newton": gauss_newton,
    "hessian": hessian,
    "finite_difference": finite_difference,
}


def get(name: str) -> Curvature:
    """The curvature of a name.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(name, str) and name in _NAMED:
        return _NAMED[name]
    raise ValueError(f"`curvature` is one of {sorted(_NAMED)}. Received: curvature={name!r}")
