"""The exact hypergradient: against a full unroll, and against finite differences of a real fit."""

import numpy as np
import oracle
import pytest
import small_net

EXACT = dict(trajectory="stored", curvature="hessian")
OVER = ("run", "epoch", "step", 3)
GRAINS = [
    oracle.Grain(per, over)
    for per in ("model", "layer", "neuron", "input", "weight")
    for over in OVER
]
# What stands around plain momentum: the optimizer's arguments, and the oracle's.
VARIANTS = {
    "nesterov": (dict(nesterov=True), dict(rule="nesterov")),
    "dampened": (dict(dampened=True), dict(rule="dampened")),
    "clipnorm": (dict(clipnorm=0.25), dict(clipping=("clipnorm", 0.25))),
    "clipvalue": (dict(clipvalue=0.1), dict(clipping=("clipvalue", 0.1))),
    "global_clipnorm": (dict(global_clipnorm=0.4), dict(clipping=("global_clipnorm", 0.4))),
}


def unroll(record, grain, **options):
    train, hyper = oracle.data()
    return oracle.unroll(
        oracle.start_weights(),
        oracle.batches_of(*train),
        hyper,
        record.hyperparameters,
        grain,
        **options,
    )


def check(fitted, grain, **options):
    """The record of a fit agrees with the full unroll in everything that both have."""
    outer, weights, by_values, by_start = unroll(fitted.record, grain, **options)
    assert fitted.record.accepted
    oracle.assert_same(fitted.model.get_weights(), weights)
    oracle.assert_same(fitted.record.outer_loss, outer)
    assert set(fitted.record.hypergradients) == set(oracle.ARGUMENTS)
    oracle.assert_same(fitted.record.hypergradients, by_values)
    oracle.assert_same(fitted.record.initial_weights_gradient, by_start)


@pytest.mark.parametrize("grain", GRAINS, ids=lambda g: f"{g.per}-{g.over}")
def test_every_grain_agrees_with_a_full_unroll(float64, grain):
    check(small_net.fit(grain, **EXACT), grain)


def test_replay_is_exact(float64):
    grain = oracle.Grain("layer", "step")
    check(small_net.fit(grain, trajectory="replay"), grain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rule_and_clipping_agrees_with_a_full_unroll(float64, variant):
    arguments, options = VARIANTS[variant]
    grain = oracle.Grain("neuron", "step")
    fitted = small_net.fit(grain, arguments, **EXACT)
    plain, *_ = unroll(fitted.record, grain)
    assert abs(plain - fitted.record.outer_loss) > 1e-6  # the variant is at work
    check(fitted, grain, **options)


@pytest.mark.parametrize(
    "grain, variant",
    [
        (oracle.Grain("layer", "step"), "nesterov"),
        (oracle.Grain("neuron", 3), "global_clipnorm"),
        (oracle.Grain("weight", "epoch"), "dampened"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.per}-{x.over}",
)
def test_finite_differences_of_a_real_fit(float64, grain, variant):
    fitted = small_net.fit(grain, VARIANTS[variant][0], **EXACT)
    optimizer, record = fitted.model.optimizer, fitted.record
    rng = np.random.default_rng(4)

    def outer_loss(variable, entry, value):
        fitted.restore()
        array = variable.numpy()
        array[entry] = value
        variable.assign(array)
        fitted.train()
        _, (x, y) = oracle.data()
        return oracle.loss(fitted.model.get_weights(), x, y).numpy()

    def check(variable, entry, raw_of, value, found):
        step = 1e-5 * max(1e-2, abs(value))
        ahead = outer_loss(variable, entry, raw_of(value + step))
        behind = outer_loss(variable, entry, raw_of(value - step))
        np.testing.assert_allclose(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)

    def random_entry(shape):
        return tuple(rng.integers(0, shape))

    for argument in oracle.ARGUMENTS:
        groups = [i for i, group in enumerate(optimizer.groups) if group.argument == argument]
        raw_of = (lambda v: np.log(v / (1 - v))) if argument == "momentum" else np.log
        for i in rng.choice(groups, 3):
            group, raw = optimizer.groups[i], optimizer.raw_variables[i]
            value = record.hyperparameters[argument][group.key]
            found = record.hypergradients[argument][group.key]
            if grain.per == "weight":
                value, found = value[group.variable], found[group.variable]
            entry = random_entry(raw.shape)
            check(raw, entry, raw_of, value[entry], found[entry])

    start = oracle.start_weights()
    for i in rng.choice(len(start), 3):
        entry = random_entry(start[i].shape)
        found = record.initial_weights_gradient[i][entry]
        variable = fitted.model.trainable_variables[i]
        check(variable, entry, float, start[i][entry], found)
