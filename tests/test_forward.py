"""With floats alone, the optimizers train as their Keras namesakes do."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_drmad as kd

CLIPPING = ({}, {"clipnorm": 1.0}, {"clipvalue": 0.5}, {"global_clipnorm": 1.5})


def combinations(**choices):
    """Every combination of the choices, as keyword arguments."""
    for chosen in itertools.product(*choices.values()):
        yield dict(zip(choices, chosen, strict=True))


# Our optimizer, its namesake, and the arguments that both take.
TABLE = [
    (kd.optimizers.SGD, keras.optimizers.SGD, {**arguments, **clipping})
    for arguments in combinations(
        learning_rate=[0.05],
        momentum=[0.0, 0.9],
        nesterov=[False, True],
        weight_decay=[None, 0.02],
    )
    for clipping in CLIPPING
]


def _name(row) -> str:
    ours, _, arguments = row
    said = (f"{key}={value}" for key, value in arguments.items() if value)
    return "-".join((ours.__name__, *said))


def assert_follows(ours, theirs):
    """To 1e-6, relative to each variable as a whole: an entry may pass through zero."""
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("row", TABLE, ids=_name)
def test_follows_its_namesake_over_100_steps(row):
    ours, theirs, arguments = row
    rng = np.random.default_rng(0)
    shapes = [(4, 3), (3,)]
    start = [rng.normal(size=shape) for shape in shapes]
    # Some steps are clipped, others not.
    scales = rng.choice([0.02, 0.2, 2.0], 100)
    gradients = [[rng.normal(0.0, scale, shape) for shape in shapes] for scale in scales]

    def train(optimizer):
        variables = [keras.Variable(w) for w in start]
        optimizer.build(variables)

        @tf.function
        def step(*gradients):
            optimizer.apply(list(gradients), variables)

        for of_step in gradients:
            step(*(tf.constant(g, tf.float32) for g in of_step))
        return variables

    assert_follows(train(ours(**arguments)), train(theirs(**arguments)))


def language_model():
    """Embedding gradients are IndexedSlices; a constraint is applied after every step."""
    return keras.Sequential(
        [
            keras.layers.Embedding(20, 4),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(8, "relu", kernel_constraint=keras.constraints.MaxNorm(0.8)),
            keras.layers.Dense(3, "softmax"),
        ]
    )


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.3, decay_steps=5, decay_rate=0.7)


@pytest.mark.parametrize(
    "arguments, callbacks",
    [
        (dict(learning_rate=schedule(), momentum=0.9, nesterov=True, weight_decay=0.01), []),
        (
            dict(learning_rate=0.5, momentum=0.5),
            [keras.callbacks.LearningRateScheduler(lambda epoch: 0.5 / (1 + epoch / 10))],
        ),
    ],
    ids=["schedule", "callback"],
)
def test_follows_its_namesake_in_fit(arguments, callbacks):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 20, (40, 2))
    y = x[:, 0] % 3
    trained = []
    for optimizer in (kd.optimizers.SGD(**arguments), keras.optimizers.SGD(**arguments)):
        keras.utils.set_random_seed(0)
        model = language_model()
        model.compile(optimizer, "sparse_categorical_crossentropy")
        history = model.fit(x, y, 8, epochs=20, verbose=0, callbacks=callbacks)
        assert history.history["loss"][-1] < 0.9 * history.history["loss"][0]
        columns = np.linalg.norm(model.layers[2].kernel, axis=0)
        assert columns.max() == pytest.approx(0.8, rel=1e-5)  # the constraint is at work
        trained.append((model, history.history))
    (ours, history), (theirs, expected) = trained
    assert_follows(ours.get_weights(), theirs.get_weights())
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-6)
    if callbacks:
        assert history["learning_rate"] == expected["learning_rate"]
        assert history["learning_rate"][-1] == pytest.approx(0.5 / 2.9)


@pytest.mark.parametrize("clipping", CLIPPING[1:], ids=lambda c: next(iter(c)))
def test_repeated_rows_of_an_embedding_are_clipped_as_their_sum(clipping):
    # Keras clips the rows of one token one by one and leaves a longer gradient than asked for.
    slices = tf.IndexedSlices(tf.constant([[3.0, 0.1], [1.0, 0.1]]), tf.constant([2, 2]), (4, 2))
    moved = []
    for gradient in (slices, tf.convert_to_tensor(slices)):
        variable = keras.Variable(np.zeros((4, 2)))
        optimizer = kd.optimizers.SGD(1.0, **clipping)
        optimizer.build([variable])
        optimizer.apply([gradient], [variable])
        moved.append(variable.numpy())
    np.testing.assert_array_equal(*moved)
    reference = keras.Variable(np.zeros((4, 2)))
    keras.optimizers.SGD(1.0, **clipping).apply([tf.convert_to_tensor(slices)], [reference])
    np.testing.assert_allclose(moved[0], reference, rtol=1e-6)
