"""The same training and hypergradient in JAX, PyTorch, TorchOpt, higher and keras_drmad.

Each library is imported by the function that needs it, for each runs in a process of its own. What
a function here returns has the data already in the library's own arrays.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from peers_problem import BATCH, MOMENTUM, SIZES, Problem

LAYERS = range(len(SIZES) - 1)


class Found(NamedTuple):
    """What training with a hypergradient gave."""

    loss: float
    by_l2: np.ndarray  # (934,)
    by_rate: np.ndarray  # (4,)
    # Seconds of the process and of the clock after the training, where that can be told apart.
    after_training: tuple[float, float] | None = None


@dataclass
class Way:
    """A library's way to do the work; a call returns when the work is done."""

    train: Callable[[], Any]
    hypergradient: Callable[[], Found]
    # Training as the library does it otherwise, by name.
    other_training: dict[str, Callable[[], Any]] = field(default_factory=dict)
    # Multiplications in matrix products, by hypergradient over by training, where that is known.
    products: float | None = None


class Peer(NamedTuple):
    title: str
    module: str  # without it the peer is skipped
    make: Callable[[Problem], Way]


def missing(peer: Peer) -> bool:
    return importlib.util.find_spec(peer.module) is None


# JAX ---------------------------------------------------------------------------------------------


def jax_scan(problem: Problem, checkpoints: bool) -> Way:
    """`grad` of `lax.scan`, its steps kept, or of one over segments that are recomputed."""
    import jax
    from jax import numpy as jnp

    def cross_entropy(weights, x, y):
        for i in LAYERS:
            x = x @ weights[2 * i] + weights[2 * i + 1]
            x = jnp.tanh(x) if i < LAYERS[-1] else x
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1))

    def step(rates, penalties, state, batch):
        weights, velocities = state
        gradients = jax.grad(cross_entropy)(weights, *batch)
        for i in LAYERS:
            gradients[2 * i] += penalties[i][:, None] * weights[2 * i]
        velocities = [
            MOMENTUM * v - rates[i // 2] * g
            for i, (v, g) in enumerate(zip(velocities, gradients, strict=True))
        ]
        return ([w + v for w, v in zip(weights, velocities, strict=True)], velocities), None

    def train(hyper, weights, batches):
        one = partial(step, *hyper)
        state = weights, [jnp.zeros_like(w) for w in weights]
        if not checkpoints:
            return jax.lax.scan(one, state, batches)[0][0]
        segment = segment_length(problem.steps)
        folded = jax.tree.map(lambda a: a.reshape(-1, segment, *a.shape[1:]), batches)

        @jax.checkpoint
        def walk(state, batches):
            return jax.lax.scan(one, state, batches)[0], None

        return jax.lax.scan(walk, state, folded)[0][0]

    def outer(hyper, weights, batches, hyper_data):
        return cross_entropy(train(hyper, weights, batches), *hyper_data)

    hyper = jax.device_put((problem.rates, problem.penalties))
    weights, batches = jax.device_put((problem.weights, (problem.x, problem.y)))
    hyper_data = jax.device_put((problem.hyper_x, problem.hyper_y))
    compiled_train, compiled_grad = jax.jit(train), jax.jit(jax.value_and_grad(outer))

    def hypergradient() -> Found:
        loss, (by_rate, by_l2) = jax.block_until_ready(
            compiled_grad(hyper, weights, batches, hyper_data)
        )
        return Found(float(loss), _joined(by_l2), np.array(by_rate))

    def products() -> float:
        # The gradient on the hyper data is no part of a step.
        whole = jax.make_jaxpr(jax.grad(outer))(hyper, weights, batches, hyper_data)
        end = jax.make_jaxpr(jax.grad(cross_entropy))(weights, *hyper_data)
        steps = jax.make_jaxpr(train)(hyper, weights, batches)
        return (_multiplications(whole.jaxpr) - _multiplications(end.jaxpr)) / _multiplications(
            steps.jaxpr
        )

    return Way(
        lambda: jax.block_until_ready(compiled_train(hyper, weights, batches)),
        hypergradient,
        products=products(),
    )


def segment_length(steps: int) -> int:
    """The divisor that is nearest to the square root."""
    divisors = [n for n in range(1, steps + 1) if steps % n == 0]
    return min(divisors, key=lambda n: abs(n - math.sqrt(steps)))


def _multiplications(jaxpr: Any) -> int:
    """In the matrix products of a JAX program, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[i] for i in contracted)
            total += inner * math.prod(equation.outvars[0].aval.shape)
        inside = [getattr(p, "jaxpr", p) for p in equation.params.values()]
        for part in inside:
            if hasattr(part, "eqns"):
                total += equation.params.get("length", 1) * _multiplications(part)
    return total


# PyTorch -----------------------------------------------------------------------------------------


@dataclass
class _Torch:
    """The problem in PyTorch's tensors, one thread."""

    problem: Problem

    def __post_init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        p = self.problem
        self.x, self.hyper_x = torch.from_numpy(p.x), torch.from_numpy(p.hyper_x)
        self.y, self.hyper_y = (torch.from_numpy(y.astype("int64")) for y in (p.y, p.hyper_y))

    def hyper(self) -> tuple[list[Any], list[Any]]:
        """Fresh rates and penalties that are differentiated."""
        import torch

        p = self.problem
        return tuple(
            [torch.tensor(a, requires_grad=True) for a in arrays]
            for arrays in (p.rates, p.penalties)
        )

    def weights(self) -> list[Any]:
        import torch

        return [torch.tensor(w, requires_grad=True) for w in self.problem.weights]

    def outputs(self, weights: list[Any], x: Any) -> Any:
        import torch

        for i in LAYERS:
            x = torch.addmm(weights[2 * i + 1], x, weights[2 * i])
            x = torch.tanh(x) if i < LAYERS[-1] else x
        return x

    def cross_entropy(self, outputs: Any, y: Any) -> Any:
        import torch

        return torch.nn.functional.cross_entropy(outputs, y)

    def gradients(self, weights: list[Any], t: int, penalties: list[Any], keep: bool) -> list[Any]:
        """Of step t, penalties included; with a graph of their own where they are kept."""
        import torch

        loss = self.cross_entropy(self.outputs(weights, self.x[t]), self.y[t])
        found = list(torch.autograd.grad(loss, weights, create_graph=keep))
        with torch.set_grad_enabled(keep):
            for i in LAYERS:
                found[2 * i] = found[2 * i] + penalties[i][:, None] * weights[2 * i]
        return found

    def differentiate(self, outputs: Any, rates: list[Any], penalties: list[Any]) -> Found:
        """By the graph that training left behind."""
        import torch

        loss = self.cross_entropy(outputs, self.hyper_y)
        found = torch.autograd.grad(loss, [*penalties, *rates])
        by_l2, by_rate = found[: len(penalties)], found[len(penalties) :]
        return Found(float(loss.detach()), _joined(by_l2), np.array([float(g) for g in by_rate]))


def torch_unrolled(problem: Problem) -> Way:
    """By hand: gradients with `create_graph=True`, and one backward pass through all steps."""
    import torch

    ours = _Torch(problem)

    def train(rates, penalties, keep):
        weights = ours.weights()
        velocities = [torch.zeros_like(w) for w in weights]
        for t in range(problem.steps):
            gradients = ours.gradients(weights, t, penalties, keep)
            with torch.set_grad_enabled(keep):
                velocities = [
                    MOMENTUM * v - rates[i // 2] * g
                    for i, (v, g) in enumerate(zip(velocities, gradients, strict=True))
                ]
                weights = [w + v for w, v in zip(weights, velocities, strict=True)]
            if not keep:
                weights = [w.requires_grad_() for w in weights]
        return weights

    def hypergradient() -> Found:
        rates, penalties = ours.hyper()
        weights = train(rates, penalties, True)
        return ours.differentiate(ours.outputs(weights, ours.hyper_x), rates, penalties)

    return Way(lambda: train(*ours.hyper(), False), hypergradient)


def torchopt_functional(problem: Problem) -> Way:
    """`torchopt.sgd`, one for each layer, whose rate may be a tensor.

    `MetaSGD` holds one rate for a whole module, and would take a backward pass of its own for each
    layer; the functional optimizer that it is made of is given gradients, which are taken once.
    """
    import torch
    import torchopt

    ours = _Torch(problem)

    def train(rates, penalties, keep):
        weights = ours.weights()
        optimizers = [torchopt.sgd(rate, momentum=MOMENTUM) for rate in rates]
        states = [o.init(weights[2 * i : 2 * i + 2]) for i, o in enumerate(optimizers)]
        for t in range(problem.steps):
            gradients = ours.gradients(weights, t, penalties, keep)
            with torch.set_grad_enabled(keep):
                for i, optimizer in enumerate(optimizers):
                    pair = slice(2 * i, 2 * i + 2)
                    updates, states[i] = optimizer.update(
                        gradients[pair], states[i], params=weights[pair], inplace=not keep
                    )
                    weights[pair] = torchopt.apply_updates(weights[pair], updates, inplace=not keep)
        return weights

    def hypergradient() -> Found:
        rates, penalties = ours.hyper()
        weights = train(rates, penalties, True)
        return ours.differentiate(ours.outputs(weights, ours.hyper_x), rates, penalties)

    return Way(lambda: train(*ours.hyper(), False), hypergradient)


def higher_innerloop(problem: Problem) -> Way:
    """`higher.innerloop_ctx`, rates by `override`, penalties by `grad_callback`."""
    import higher
    import torch

    ours = _Torch(problem)

    def start():
        layers = []
        for i in LAYERS:
            layer = torch.nn.Linear(*SIZES[i : i + 2])
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(problem.weights[2 * i].T.copy()))
                layer.bias.copy_(torch.from_numpy(problem.weights[2 * i + 1]))
            layers += [layer, torch.nn.Tanh()]
        net = torch.nn.Sequential(*layers[:-1])
        groups = [
            {"params": list(layers[2 * i].parameters()), "lr": float(problem.rates[i])}
            for i in LAYERS
        ]
        return net, torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM)

    def train():
        net, optimizer = start()
        penalties = [p.detach() for p in ours.hyper()[1]]
        kernels = [p for p in net.parameters() if p.ndim == 2]
        for x, y in zip(ours.x, ours.y, strict=True):
            optimizer.zero_grad()
            ours.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                for kernel, penalty in zip(kernels, penalties, strict=True):
                    kernel.grad += penalty * kernel  # a Linear's kernel is (units, inputs)
            optimizer.step()
        return net

    def hypergradient() -> Found:
        rates, penalties = ours.hyper()
        net, optimizer = start()
        with higher.innerloop_ctx(net, optimizer, override={"lr": rates}) as (fast, inner):

            def penalised(gradients):
                gradients = list(gradients)
                for i in LAYERS:
                    gradients[2 * i] = gradients[2 * i] + penalties[i] * fast.fast_params[2 * i]
                return gradients

            for x, y in zip(ours.x, ours.y, strict=True):
                inner.step(ours.cross_entropy(fast(x), y), grad_callback=penalised)
            return ours.differentiate(fast(ours.hyper_x), rates, penalties)

    return Way(train, hypergradient)


# keras_drmad -------------------------------------------------------------------------------------


def keras_drmad(problem: Problem, trajectory: str, curvature: str, compiled: bool) -> Way:
    """`fit` with the recorder, then a walk back; `fit` and the walk by XLA, or neither."""
    import keras
    import tensorflow as tf

    import keras_drmad as kd
    from keras_drmad import trajectories
    from keras_drmad.estimator import Estimator
    from keras_drmad.objectives import OuterLoss
    from keras_drmad.settings import Setting

    hidden = [keras.layers.Dense(units, activation="tanh") for units in SIZES[1:-1]]
    model = keras.Sequential([keras.Input(SIZES[:1]), *hidden, keras.layers.Dense(SIZES[-1])])
    rate = kd.Hyperparameter(float(problem.rates[0]), per="layer")
    penalty = kd.Hyperparameter(float(problem.penalties[0][0]), per="input")
    model.compile(
        kd.optimizers.SGD(rate, momentum=MOMENTUM, l2=penalty),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=compiled,
    )
    model.optimizer.build(model.trainable_variables)
    x, y = tf.constant(problem.x), tf.constant(problem.y)
    data = tf.data.Dataset.from_tensor_slices((x, y))
    outer = OuterLoss(model, [(tf.constant(problem.hyper_x), tf.constant(problem.hyper_y))])
    estimator = Estimator(model, jit_compile=compiled)
    slots = [v.numpy() for v in model.optimizer.variables]

    class Armed(keras.callbacks.Callback):
        """Records every step."""

        def on_train_batch_begin(self, batch, logs=None):
            estimator.arm(lambda spec: None)

    def fit(*callbacks):
        model.set_weights(problem.weights)
        for variable, value in zip(model.optimizer.variables, slots, strict=True):
            variable.assign(value)
        model.fit(data, verbose=0, shuffle=False, callbacks=list(callbacks))

    def hypergradient() -> Found:
        setting = Setting(trajectories.get(trajectory), curvature)
        estimator.begin(problem.steps, [setting])
        fit(Armed())
        started = time.process_time(), time.perf_counter()
        estimator.finish(outer)
        found = estimator.walk(setting)
        took = time.process_time() - started[0], time.perf_counter() - started[1]
        if found.problem:
            raise RuntimeError(found.problem)
        estimator.forget()
        values = [np.ravel(v) for v in found.values]
        by_rate = np.concatenate([v for v in values if v.size == 1])
        return Found(found.outer_loss, _joined(v for v in values if v.size > 1), by_rate, took)

    return Way(fit, hypergradient, {"graph": _train_in_graph(problem, x, y, compiled)})


def _train_in_graph(problem: Problem, x: Any, y: Any, compiled: bool) -> Callable[[], Any]:
    """The training alone as one TensorFlow graph, without Keras."""
    import tensorflow as tf

    def step(rates, penalties, weights, velocities, t):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            z = x[t]
            for i in LAYERS:
                z = z @ weights[2 * i] + weights[2 * i + 1]
                z = tf.tanh(z) if i < LAYERS[-1] else z
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y[t], z)
            loss = tf.reduce_sum(losses) / BATCH
        gradients = tape.gradient(loss, weights)
        for i in LAYERS:
            gradients[2 * i] += penalties[i][:, None] * weights[2 * i]
        velocities = [
            MOMENTUM * v - rates[i // 2] * g
            for i, (v, g) in enumerate(zip(velocities, gradients, strict=True))
        ]
        return [w + v for w, v in zip(weights, velocities, strict=True)], velocities

    @tf.function(jit_compile=compiled, autograph=False)
    def train(rates, penalties, weights):
        velocities = [tf.zeros_like(w) for w in weights]
        return tf.while_loop(
            lambda t, *_: t < problem.steps,
            lambda t, w, v: (t + 1, *step(rates, penalties, w, v, t)),
            (tf.constant(0), weights, velocities),
            parallel_iterations=1,
        )[1]

    arguments = [
        [tf.constant(a) for a in arrays]
        for arrays in (problem.rates, problem.penalties, problem.weights)
    ]
    return lambda: train(*arguments)[0].numpy()


# All of them -------------------------------------------------------------------------------------


def _joined(arrays: Any) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in arrays])


def _ours() -> dict[str, Peer]:
    ways = (("linear", "gauss_newton"), ("replay", "hessian"), ("stored", "hessian"))
    return {
        f"drmad-{trajectory}-{'xla' if compiled else 'plain'}": Peer(
            f"keras_drmad, {trajectory}, {curvature}{', XLA' if compiled else ''}",
            "tensorflow",
            partial(keras_drmad, trajectory=trajectory, curvature=curvature, compiled=compiled),
        )
        for trajectory, curvature in ways
        for compiled in (False, True)
    }


PEERS = {
    "jax-scan": Peer("JAX, scan", "jax", partial(jax_scan, checkpoints=False)),
    "jax-checkpoint": Peer("JAX, scan, √T checkpoints", "jax", partial(jax_scan, checkpoints=True)),
    "torch": Peer("PyTorch, unrolled", "torch", torch_unrolled),
    "torchopt": Peer("TorchOpt", "torchopt", torchopt_functional),
    "higher": Peer("higher", "higher", higher_innerloop),
    **_ours(),
}

NOT_MEASURED = {
    "hypertorch": "its `hypergrad` package is not on PyPI; hypertorch there is a library for "
    "hypergraphs, and hypergrad another author's, for implicit differentiation only",
}
