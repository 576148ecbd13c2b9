"""A race: the same net, data and compute for DrMAD and for black-box tuning.

    pip install -r benchmarks/requirements-race.txt
    python benchmarks/race.py --data mnist --mnist-file mnist.npz --seeds 5   # measures
    python benchmarks/race.py --tables                                        # prints the tables
    python benchmarks/race.py --figure docs/images/race.png                   # draws them

Every method gets the compute of 30 full trainings of a net, counted in training steps, and wants
the lowest validation loss after a full training. Within a seed all full trainings have the same
first weights and the same batches, so that the loss is a function of the hyperparameters alone.
What is measured is merged into docs/results/race.json, by data, seed, grain of L2 and method.
"""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
import tempfile
import time

import keras
import keras_tuner
import numpy as np
import optuna
import tensorflow as tf
from race_newton import TRAININGS, drmad_bfgs
from race_problem import LAYERS, SPACE, START, Problem
from race_results import figure, load, merge, tables

import keras_drmad as kd
from keras_drmad import trajectories
from keras_drmad.fidelity import _cost_per_step
from keras_drmad.settings import Setting

HERE = pathlib.Path(__file__).resolve().parent


# The methods ---------------------------------------------------------------------------------


def start(problem: Problem) -> None:
    """One training with the values that all start from."""
    problem.train(START)


def random_search(problem: Problem) -> None:
    start(problem)
    rng = np.random.default_rng(problem.seed)
    while problem.spent < TRAININGS:
        problem.train({
            key: math.exp(rng.uniform(math.log(low), math.log(high)))
            for key, (low, high, _) in SPACE.items()
        })  # fmt: skip


class FromStart(keras_tuner.oracles.BayesianOptimizationOracle):
    """KerasTuner's oracle, which is given the values that all start from as the first of its
    random points."""

    def populate_space(self, trial_id):
        if self.trials:
            return super().populate_space(trial_id)
        values = {hp.name: hp.default for hp in self.hyperparameters.space}
        return {"status": "RUNNING", "values": values}


def kerastuner(problem: Problem) -> None:
    hyperparameters = keras_tuner.HyperParameters()
    for key, (low, high, first) in SPACE.items():
        hyperparameters.Float(key, low, high, sampling="log", default=first)

    class Trainings(keras_tuner.Tuner):
        def run_trial(self, trial, **_):
            return problem.train(trial.hyperparameters.values)

    with tempfile.TemporaryDirectory() as folder:
        oracle = FromStart(
            keras_tuner.Objective("default_objective", "min"),
            max_trials=TRAININGS,
            hyperparameters=hyperparameters,
            seed=problem.seed,
        )
        Trainings(oracle, directory=folder).search(verbose=0)


class Pruning(keras.callbacks.Callback):
    """Tells Optuna the loss after every epoch but the last, and stops when it says so."""

    def __init__(self, problem: Problem, trial: optuna.Trial):
        super().__init__()
        self.problem, self.trial, self.stopped = problem, trial, False

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 < self.problem.epochs:
            self.trial.report(self.problem.loss(), epoch)
            if self.trial.should_prune():
                self.stopped = self.model.stop_training = True


def optuna_tpe(problem: Problem) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=problem.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    )
    study.enqueue_trial(START)

    def objective(trial):
        values = {
            key: trial.suggest_float(key, low, high, log=True)
            for key, (low, high, _) in SPACE.items()
        }
        pruning = Pruning(problem, trial)
        loss = problem.train(values, pruning)
        if pruning.stopped:
            raise optuna.TrialPruned
        return loss

    while problem.spent < TRAININGS:
        study.optimize(objective, n_trials=1)


class Baydin(keras.optimizers.Optimizer):
    """SGD whose learning rate, one a layer, follows its own hypergradient at every step (Baydin
    et al., 2018; the multiplicative form: by `beta` times the cosine of two successive updates)."""

    def __init__(self, rates: list[float], momentum: float, l2: list[float]):
        super().__init__(learning_rate=1.0)
        self.start, self.momentum, self.l2 = rates, momentum, l2  # of each layer

    def build(self, variables):
        super().build(variables)
        self.velocities = [self.add_variable_from_reference(v, "velocity") for v in variables]
        constant = keras.initializers.Constant
        self.rates = [self.add_variable((), constant(rate)) for rate in self.start]
        self.beta = self.add_variable((), constant(0.02))

    def apply(self, grads, trainable_variables=None):
        variables, velocities = self._trainable_variables, self.velocities
        for layer, rate in enumerate(self.rates):
            of_layer = range(2 * layer, 2 * layer + 2)  # kernel, bias
            gradients = [
                grads[i] + self.l2[layer] * (len(variables[i].shape) > 1) * variables[i].value
                for i in of_layer
            ]
            before = [velocities[i].value for i in of_layer]
            inner = tf.add_n([tf.reduce_sum(g * v) for g, v in zip(gradients, before, strict=True)])
            norms = tf.linalg.global_norm(gradients) * tf.linalg.global_norm(before)
            rate.assign(rate * (1.0 + self.beta * tf.math.divide_no_nan(inner, norms)))
            for i, gradient in zip(of_layer, gradients, strict=True):
                velocities[i].assign(self.momentum * velocities[i] + gradient)
                variables[i].assign(variables[i] - rate * velocities[i])
        self._iterations.assign_add(1)


def baydin(problem: Problem) -> None:
    trained = (layer.name for layer in problem.model.layers if layer.trainable_variables)
    kinds = [next(kind for kind in LAYERS if name.startswith(kind)) for name in trained]
    problem.compile(Baydin(
        [START[f"learning_rate/{kind}"] for kind in kinds],
        1.0 - START["1 - momentum"],
        [START[f"l2/{kind}"] for kind in kinds],
    ))  # fmt: skip
    rng = np.random.default_rng(problem.seed)
    beta = 0.02
    while problem.spent < TRAININGS:
        problem.restart()
        problem.model.optimizer.beta.assign(beta)
        problem.fit(problem.epochs, [])
        problem.note(problem.loss())
        beta = math.exp(rng.uniform(math.log(1e-4), math.log(0.1)))


def drmad(problem: Problem, short: bool = True, trajectory: str = "replay") -> None:
    """Updates through trainings from the first weights.

    Args:
        problem: What is trained.
        short: Updates are through trainings of a fifth of the full length: six of them, and then a
            full training after each. Otherwise every update is through a full training.
        trajectory: `"replay"` with the Hessian, or `"linear"` with Gauss-Newton.
    """
    horizon = problem.epochs // 5 if short else problem.epochs
    callback = kd.DrMADCallback(
        problem.validation,
        horizon=horizon,
        restart=True,
        trajectory=trajectory,
        hyper_batch_size=2000,
        jit_compile=False,  # as training, so that CPU seconds compare
    )
    problem.restart()  # the callback starts from the weights that it sees first
    problem.fit(horizon, [callback])  # tracing, as for the others, is not part of the race
    callback.history.clear()
    callback.outer_optimizer = keras.optimizers.Adam(0.5, beta_1=0.8, beta_2=0.95, clipvalue=0.1)
    problem.restart()
    problem.begin()
    curvature = "hessian" if trajectory == "replay" else "gauss_newton"
    cost = _cost_per_step(Setting(trajectories.get(trajectory), curvature))

    def update(count: int = 1) -> None:
        problem.restart(tuned=False)
        problem.fit(count * horizon, [callback])

    def walked(count: int = 1) -> None:
        problem.walked += cost * count * horizon * problem.per_epoch

    if short:
        update(6)
        walked(6)
    while problem.spent + 1 <= TRAININGS:
        if short:
            problem.restart(tuned=False)
            problem.fit(problem.epochs, [])
        else:
            update()  # it leaves the weights as this training, with the values before, made them
        problem.note(problem.loss())
        if short:
            update()
        walked()


# Running ---------------------------------------------------------------------------------------

METHODS = {
    "defaults": start,
    "random search": random_search,
    "KerasTuner": kerastuner,
    "Optuna": optuna_tpe,
    "DrMAD": drmad,
    "DrMAD, BFGS": drmad_bfgs,
    "DrMAD, full trainings": functools.partial(drmad, short=False),
    "DrMAD, linear": functools.partial(drmad, trajectory="linear"),
    "Baydin": baydin,  # the last: it compiles the net with an optimizer of its own
}


def run(problem: Problem, method: str) -> dict:
    """One method on one problem."""
    seconds = []
    for _ in range(2):
        problem.restart()
        problem.begin()
        problem.fit(problem.epochs, [])
        seconds.append(time.process_time() - problem.began)
    problem.begin()
    METHODS[method](problem)
    problem.model.set_weights(problem.kept)
    accuracy = problem.model.evaluate(*problem.test, batch_size=2000, verbose=0)[1]
    return {
        "data": problem.name, "seed": problem.seed, "l2": problem.per, "method": method,
        "steps": problem.steps, "seconds": min(seconds), "best": problem.best,
        "test_error": 1.0 - accuracy, "trials": problem.trials,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="of digits, mnist, cifar10: a,b")
    parser.add_argument("--mnist-file", default=None, help="mnist.npz, as Keras has it")
    parser.add_argument("--data-dir", default=None, help="where TFDS finds or puts CIFAR-10")
    parser.add_argument("--methods", default=";".join(METHODS), help="some of them: a;b")
    parser.add_argument("--l2", default="layer", help="layer or neuron: the penalty's grain")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", default=str(HERE.parent / "docs/results/race.json"))
    parser.add_argument("--tables", action="store_true", help="only print what was measured")
    parser.add_argument("--figure", default=None, help="only draw it, into this file")
    arguments = parser.parse_args()
    path = pathlib.Path(arguments.out)
    if arguments.tables:
        print(tables(load(path)))
        return
    if arguments.figure:
        figure(load(path)).savefig(arguments.figure, dpi=120)
        return
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in arguments.data.split(","):
            source = arguments.mnist_file if name == "mnist" else arguments.data_dir
            problem = Problem(name, seed, arguments.l2, source)
            asked = arguments.methods.split(";")
            for method in (m for m in METHODS if m in asked):
                result = run(problem, method)
                merge(path, [result])
                print(name, arguments.l2, seed, method, f"{result['best']:.4f}", flush=True)
            keras.backend.clear_session()


if __name__ == "__main__":
    main()
