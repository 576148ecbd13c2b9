"""The work that benchmarks/peers.py gives to everybody, and its exact hypergradient in float64.

An MLP 784-50-50-50-10 with tanh is trained on MNIST by heavy-ball momentum, each batch of 50 once:

    v <- 0.9 v - rate_l (g + l2 w)        rate_l of a layer, l2 of a row of its kernel
    w <- w + v

Asked for is the derivative of the mean cross-entropy on other images, after the last step, by 934
penalties (one for each input unit of each kernel) and 4 learning rates. It is derived by hand here
and calculated by NumPy, so that it shares nothing with what is compared with it.
"""

from __future__ import annotations

import itertools
import pathlib
from dataclasses import dataclass

import numpy as np

SIZES = (784, 50, 50, 50, 10)
BATCH = 50
MOMENTUM = 0.9
RATE = 0.01
PENALTY = 1e-4
HYPER_IMAGES = 1000

Arrays = list[np.ndarray]


@dataclass
class Problem:
    """One run of training, as arrays; kernel and bias of each layer in turn are the weights."""

    x: np.ndarray  # (steps, 50, 784) float32: of each step its batch
    y: np.ndarray  # (steps, 50) int32
    hyper_x: np.ndarray  # (1000, 784) float32
    hyper_y: np.ndarray  # (1000,) int32
    weights: Arrays  # float32, where training starts

    @property
    def steps(self) -> int:
        return len(self.x)

    @property
    def rates(self) -> Arrays:
        """Of each layer its learning rate, ()."""
        return [np.float32(RATE) for _ in SIZES[1:]]

    @property
    def penalties(self) -> Arrays:
        """Of each layer those of its input units, (inputs,)."""
        return [np.full(inputs, PENALTY, np.float32) for inputs in SIZES[:-1]]

    def save(self, path: pathlib.Path) -> None:
        named = {f"weight_{i}": w for i, w in enumerate(self.weights)}
        np.savez(
            path, x=self.x, y=self.y, hyper_x=self.hyper_x, hyper_y=self.hyper_y, **named
        )  # fmt: skip

    @classmethod
    def load(cls, path: pathlib.Path) -> Problem:
        with np.load(path) as arrays:
            weights = [arrays[f"weight_{i}"] for i in range(2 * len(SIZES) - 2)]
            return cls(arrays["x"], arrays["y"], arrays["hyper_x"], arrays["hyper_y"], weights)


def make(mnist: pathlib.Path, steps: int) -> Problem:
    """The first steps of one pass through MNIST's training images, in a fixed random order."""
    with np.load(mnist) as arrays:
        images, labels = arrays["x_train"], arrays["y_train"]
    count = steps * BATCH
    if count + HYPER_IMAGES > len(images):
        raise ValueError(f"{steps} steps need {count + HYPER_IMAGES} images, not {len(images)}.")
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    mean, std = images.mean(dtype="float64"), images.std(dtype="float64")

    def standardised(chosen: np.ndarray) -> np.ndarray:
        pixels = images[chosen].reshape(len(chosen), -1).astype("float32")
        return (pixels - np.float32(mean)) / np.float32(std)

    train, hyper = order[:count], order[-HYPER_IMAGES:]
    return Problem(
        standardised(train).reshape(steps, BATCH, -1),
        labels[train].reshape(steps, BATCH).astype("int32"),
        standardised(hyper),
        labels[hyper].astype("int32"),
        _initial_weights(rng),
    )


def _initial_weights(rng: np.random.Generator) -> Arrays:
    """Glorot and Bengio's uniform kernels, and zeros."""
    weights = []
    for inputs, units in itertools.pairwise(SIZES):
        limit = np.sqrt(6 / (inputs + units))
        weights.append(rng.uniform(-limit, limit, (inputs, units)).astype("float32"))
        weights.append(np.zeros(units, "float32"))
    return weights


# The exact hypergradient -------------------------------------------------------------------------


def exact(problem: Problem) -> tuple[float, np.ndarray, np.ndarray]:
    """The outer loss, and its derivatives by all penalties and by all rates, in float64."""
    layers = range(len(SIZES) - 1)
    w = [a.astype("float64") for a in problem.weights]
    v = [np.zeros_like(a) for a in w]
    rates = [RATE] * len(w)
    # Broadcasts to each weight; biases have no penalty.
    l2 = [np.float64(PENALTY) if a.ndim == 2 else np.float64(0) for a in w]
    states = []
    for x, y in zip(problem.x, problem.y, strict=True):
        states.append(w)
        _, g = _gradient(w, x.astype("float64"), y)
        v = [MOMENTUM * b - r * (d + p * a)
             for a, b, d, r, p in zip(w, v, g, rates, l2, strict=True)]  # fmt: skip
        w = [a + b for a, b in zip(w, v, strict=True)]
    loss, w_bar = _gradient(w, problem.hyper_x.astype("float64"), problem.hyper_y)
    v_bar = [np.zeros_like(a) for a in w]
    by_l2 = [np.zeros(n) for n in SIZES[:-1]]
    by_rate = np.zeros(len(SIZES) - 1)
    for x, y, w in zip(problem.x[::-1], problem.y[::-1], states[::-1], strict=True):
        x = x.astype("float64")
        _, g = _gradient(w, x, y)
        v_bar = [a + b for a, b in zip(v_bar, w_bar, strict=True)]
        g_bar = [-r * a for r, a in zip(rates, v_bar, strict=True)]
        for i in layers:
            by_l2[i] += np.sum(g_bar[2 * i] * w[2 * i], axis=1)
            for j in (2 * i, 2 * i + 1):
                by_rate[i] -= np.sum(v_bar[j] * (g[j] + l2[j] * w[j]))
        product = _hessian_product(w, x, y, g_bar)
        w_bar = [a + b + p * c for a, b, p, c in zip(w_bar, product, l2, g_bar, strict=True)]
        v_bar = [MOMENTUM * a for a in v_bar]
    return float(loss), np.concatenate(by_l2), by_rate


def _forward(w: Arrays, x: np.ndarray) -> tuple[Arrays, np.ndarray]:
    """What goes into each layer, and the probabilities that come out."""
    inputs = [x]
    for kernel, bias in zip(w[:-2:2], w[1:-2:2], strict=True):
        inputs.append(np.tanh(inputs[-1] @ kernel + bias))
    z = inputs[-1] @ w[-2] + w[-1]
    p = np.exp(z - z.max(1, keepdims=True))
    return inputs, p / p.sum(1, keepdims=True)


def _gradient(w: Arrays, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, Arrays]:
    """The mean cross-entropy and its derivatives by the weights."""
    inputs, p = _forward(w, x)
    loss = -np.mean(np.log(p[np.arange(len(y)), y]))
    delta = (p - np.eye(SIZES[-1])[y]) / len(y)
    found: Arrays = []
    for a, kernel in zip(inputs[::-1], w[-2::-2], strict=True):
        found = [a.T @ delta, delta.sum(0), *found]
        delta = delta @ kernel.T * (1 - a * a)  # of no use at the images, which are no tanh
    return loss, found


def _hessian_product(w: Arrays, x: np.ndarray, y: np.ndarray, along: Arrays) -> Arrays:
    """The Hessian of the mean cross-entropy times a vector: `_gradient`, differentiated."""
    inputs, p = _forward(w, x)
    moved = [np.zeros_like(x)]  # how each layer's inputs change along the vector
    for i, (a, after) in enumerate(itertools.pairwise(inputs)):
        z = moved[-1] @ w[2 * i] + a @ along[2 * i] + along[2 * i + 1]
        moved.append((1 - after * after) * z)
    z = moved[-1] @ w[-2] + inputs[-1] @ along[-2] + along[-1]
    delta = (p - np.eye(SIZES[-1])[y]) / len(y)
    d_delta = p * (z - np.sum(p * z, axis=1, keepdims=True)) / len(y)
    found: Arrays = []
    for a, d_a, kernel, d_kernel in zip(
        inputs[::-1], moved[::-1], w[-2::-2], along[-2::-2], strict=True
    ):
        found = [d_a.T @ delta + a.T @ d_delta, d_delta.sum(0), *found]
        back, slope = delta @ kernel.T, 1 - a * a
        d_back = d_delta @ kernel.T + delta @ d_kernel.T
        delta, d_delta = back * slope, d_back * slope - 2 * back * a * d_a
    return found
