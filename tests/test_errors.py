"""Refusals: early, readable, and with nothing changed. Each says what to do instead."""

import itertools
import re

import fits
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from versions import cases

import keras_drmad as kd
from keras_drmad import hyper_data

BATCH = 4
X, Y = fits.examples(8, dtype="float32")
HYPER_X, HYPER_Y = fits.examples(6, seed=2, dtype="float32")
HYPER = (HYPER_X, HYPER_Y)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(autouse=True)
def fixed_seeds():
    """As in conftest, without the collection of garbage: most tests here take no time."""
    fits.start()


def message_of(error, action) -> str:
    """The message of the error that an action raises."""
    with pytest.raises(error) as caught:
        action()
    return str(caught.value)


def assert_says(message, *parts) -> None:
    """Every part is in the message, in this order."""
    assert re.search(".*".join(map(re.escape, parts)), message, re.DOTALL), message


# The callback's arguments -----------------------------------------------------------------------

WHOLE, NUMBER, AMOUNT = "is a whole number >= 1", "is a finite number > 0", "a number of steps >= 1"
TRAJECTORIES = "is one of ['linear', 'piecewise', 'replay', 'stored'] or a"
CURVATURES = "is one of ['finite_difference', 'gauss_newton', 'hessian']"
NAMED_LOSS = "is a keras.losses.Loss or its name"
LISTED = "is a list of keras.Variables or pairs"
nan = float("nan")


def variable(value=1.0, **options):
    return keras.Variable(value, trainable=False, name="temperature", **options)


ARGUMENTS = [
    ("horizon", (0, -1, True, 1.5, "1", None), WHOLE),
    ("hyper_batch_size", (0, 2.0), WHOLE),
    ("max_batches", (0, True, 1.5), WHOLE),
    ("memory_limit", (0, 1e6), WHOLE),
    ("verify_every", (0, "2"), WHOLE),
    ("restart", ("yes", 1, None, np.zeros(2)), "is False, True or 'fresh'"),
    ("trajectory", ("nope", 3, None, np.zeros(2), kd.trajectories.Linear), TRAJECTORIES),
    ("curvature", ("nope", 3, ["hessian"]), CURVATURES),
    ("window", (-1, 0, 1.5, True, "x"), AMOUNT),
    ("reverse_steps", (-1, 0, 0.0, nan), AMOUNT),
    ("fidelity", (2, 0, 1.0, "x"), "is a number above 0 and below 1"),
    ("max_step", (0, -1.0, nan, "1", None), NUMBER),
    ("outer_optimizer", ("nope", "sign"), "is not the name of a Keras optimizer, such as 'adam'"),
    ("outer_optimizer", (3, None, keras.optimizers.Adam), "is a Keras optimizer or its name"),
    ("outer_loss", ("nope", 3, ["mse"], keras.losses.MeanSquaredError), NAMED_LOSS),
    ("jit_compile", ("always", None, 2), "is True, False or 'auto'"),
    ("log_dir", (3, "", b"logs"), "is the path of a folder"),
    ("variables", (3, None, "ab", variable()), LISTED),
]


@pytest.mark.parametrize("argument, wrong, expected", ARGUMENTS)
def test_arguments_of_the_callback(argument, wrong, expected):
    for value in wrong:
        arguments = {argument: value}
        with pytest.raises((TypeError, ValueError)) as caught:
            kd.DrMADCallback(HYPER, **arguments)
        message = str(caught.value)
        assert_says(message, f"`{argument}`", expected)
        assert_says(message, f"Received: {argument}={value!r}")


ENTRIES = {
    "no variable": (3, "pairs (keras.Variable, domain)", "Received: 3"),
    "a pair of one": ((variable(),), "pairs (keras.Variable, domain)", "Received: (<Variable"),
    "unknown domain": ((variable(), "nope"), "`domain` is one of", "Received: domain='nope'"),
    "outside": ((variable(-1.0), "positive"), "temperature holds -1.0", "Start elsewhere"),
    "an int": (variable(1, dtype="int32"), "temperature is of dtype int32: no gradient"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_of_variables(name):
    entry, *expected = ENTRIES[name]
    message = message_of(
        (TypeError, ValueError), lambda: kd.DrMADCallback(HYPER, variables=[entry])
    )
    assert_says(message, *expected)


# Hyper data -------------------------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    """Batches of three, as given."""

    def __init__(self, x=HYPER_X, y=HYPER_Y, batches=2):
        super().__init__()
        self.x, self.y, self.batches = x, y, batches

    def __len__(self):
        return self.batches

    def __getitem__(self, i):
        at = slice(3 * i, 3 * i + 3)
        return self.x[at], self.y[at]


def slices(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(window=10), "Name a trajectory"),
        (dict(reverse_steps=0.5), "Name a trajectory"),
        (dict(curvature="gauss_newton"), "Name a trajectory"),
        (dict(verify_every=2), "Leave it out"),
        (dict(trajectory="linear", memory_limit=10**6), "Bound that by `window`"),
        (dict(trajectory="linear", fidelity=0.9), "with trajectory='linear'. Leave it out"),
        (dict(trajectory=kd.trajectories.Replay(), max_batches=9), "'replay', which needs"),
        (dict(trajectory="stored", max_batches=9), "Bound what is kept by `window`"),
        (dict(hyper_data=slices(*HYPER).batch(2), hyper_batch_size=2), "leave the argument out"),
        (dict(hyper_data=Batches(), hyper_batch_size=2), "with Batches. Batch the dataset as"),
        (dict(initial_scale=kd.Hyperparameter(1.0)), "Pass restart=True"),
    ],
)
def test_arguments_that_would_be_of_no_effect(arguments, says):
    arguments = {"hyper_data": HYPER, **arguments}
    message = message_of(ValueError, lambda: kd.DrMADCallback(**arguments))
    for argument in set(arguments) - {"trajectory", "hyper_data"}:
        assert_says(message, f"`{argument}`" if argument != "curvature" else "curvature=")
    assert_says(message, says)


NAN_X = HYPER_X.copy()
NAN_X[2, 0] = np.nan
FORMS = (
    "`hyper_data` is (x, y), (x, y, sample_weight), a tf.data.Dataset or a keras.utils.PyDataset"
)
LENGTHS = "`hyper_data` have different numbers of examples: [3, 6]. Pass as many targets"
UNCLEAN = "`hyper_data` holds NaN or infinite numbers. Clean it first"
EMPTY = "`hyper_data` is empty"
AT_ONCE = {  # refused by the callback itself
    "none": (None, FORMS, "Received: None"),
    "inputs alone": (HYPER_X, FORMS, "Received: ndarray of shape (6, 5)"),
    "one": ((HYPER_X,), FORMS, "Received: tuple of length 1"),
    "four": ((*HYPER, 1, 2), FORMS, "Received: tuple of length 4"),
    "no inputs": ((None, HYPER_Y), FORMS, "Received: None for x"),
    "a path": ("data.csv", FORMS, "Received: 'data.csv'"),
    "a dictionary": ({"x": HYPER_X}, FORMS, "Received: dict"),
    "a generator": ((pair for pair in [HYPER]), FORMS, "Received: generator"),
    "numbers": ((1, 2), FORMS, "Received: 1"),
    "objects": ((np.array([{}]), np.array([1])), FORMS, "Received: ndarray of shape (1,)"),
    "no arrays' examples": ((HYPER_X[:0], HYPER_Y[:0]), EMPTY, "at least one example"),
    "no batch in a dataset": (slices(*HYPER).take(0).batch(2), EMPTY, "at least one example"),
    "no batch of an unknown number": (slices(*HYPER).filter(lambda *_: False).batch(2), EMPTY),
    "no batch in a PyDataset": (Batches(batches=0), "empty or endless PyDataset", "a length"),
    "no end": (slices(*HYPER).repeat().batch(2), "never ends", "data.take(100)"),
    "targets of another length": ((HYPER_X, HYPER_Y[:3]), LENGTHS),
    "weights of another length": ((*HYPER, np.ones(3)), LENGTHS),
    "NaN in inputs": ((NAN_X, HYPER_Y), UNCLEAN),
    "NaN in a tensor": ((tf.constant(NAN_X), HYPER_Y), UNCLEAN),
    "infinite targets": ((HYPER_X, np.full(6, np.inf)), UNCLEAN),
    "NaN in weights": ((*HYPER, np.full(6, np.nan)), UNCLEAN),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_is_no_hyper_data(name):
    data, *expected = AT_ONCE[name]
    assert_says(message_of((TypeError, ValueError), lambda: kd.DrMADCallback(data)), *expected)


INPUTS, TARGETS = "The inputs of `hyper_data` differ", "The targets of `hyper_data` differ"
PREPARE = "Prepare the hyper data as the training data"
OTHER = {  # refused before the first step, when the training data is known
    "features": ((HYPER_X[:, :4], HYPER_Y), INPUTS, "(4, 5), received array: (None, 4)"),
    "another rank": ((HYPER_X[..., None], HYPER_Y), INPUTS, "(4, 5), received array: (None, 5, 1)"),
    "not batched": (slices(*HYPER), INPUTS, "(4, 5), received array: (5,)"),
    "two inputs": (((HYPER_X, HYPER_X), HYPER_Y), INPUTS, "received 0: (None, 5), 1: (None, 5)"),
    "named inputs": (({"a": HYPER_X}, HYPER_Y), INPUTS, "received a: (None, 5)"),
    "strings": ((HYPER_X.astype(str), HYPER_Y), INPUTS, "Expected float32, received string"),
    "one-hot": ((HYPER_X, np.eye(3)[HYPER_Y]), TARGETS, "(4,), received array: (None, 3)"),
    "two outputs": ((HYPER_X, (HYPER_Y,) * 2), TARGETS, "(4,), received 0: (None,), 1: (None,)"),
    "no targets": ((HYPER_X, None), TARGETS, "(4,), received none"),
    "features of a dataset": (slices(HYPER_X[:, 1:], HYPER_Y).batch(2), INPUTS, "(None, 4)"),
    "features of a PyDataset": (Batches(HYPER_X[:, 1:]), INPUTS, "(None, 4)"),
}


# Models and optimizers --------------------------------------------------------------------------


def net(optimizer=None, **options):
    """A small net; by default one that can be tuned."""
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(4, "tanh", name="hidden"), layers.Dense(3, name="head")]
    )
    return compiled(model, optimizer=optimizer or fits.optimizer(), **options)


def compiled(model, **options):
    # Without graphs, which would take most of the time here.
    return fits.compiled(model, LOSS, run_eagerly=True, **options)


def callback(hyper=HYPER, **options):
    return kd.DrMADCallback(hyper, trajectory="linear", **options)


class Stepping(keras.Sequential):
    """A model with a training step of its own."""

    def train_step(self, data):
        return super().train_step(data)


class Making(keras.Sequential):
    """A model that makes its training function itself."""

    def make_train_function(self, force=False):
        return super().make_train_function(force)


def custom(cls):
    return compiled(cls([keras.Input((5,)), layers.Dense(3)]))


def stepping_by_attribute():
    model = net()
    model.train_step = lambda data: keras.Model.train_step(model, data)
    return model


def half(policy="mixed_float16", **options):
    keras.config.set_dtype_policy(policy)
    try:
        return net(**options)
    finally:
        keras.config.set_dtype_policy("float32")


def frozen():
    model = net()
    model.trainable = False
    return model


def partly_frozen_after_a_fit():
    model = net()
    model.fit(X, Y, BATCH, verbose=0)
    model.get_layer("hidden").trainable = False
    return model


def renormalized():
    inner = [layers.Dense(4), layers.BatchNormalization(renorm=True, name="renorm")]
    return compiled(keras.Sequential([keras.Input((5,)), *inner, layers.Dense(3)]))


def resized():
    inner = [layers.Dense(4), layers.Reshape((2, 2, 1)), layers.UpSampling2D(2, name="up",
             interpolation="bilinear"), layers.Flatten()]  # fmt: skip
    return compiled(keras.Sequential([keras.Input((5,)), *inner, layers.Dense(3)]))


def rate(*args, **options):
    return net(kd.optimizers.SGD(kd.Hyperparameter(*args, **options)))


def weight_tuned(model):
    return [callback(variables=[model.layers[0].kernel])]


def scheduled(model):
    return [callback(), keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1)]


def plateau(model):
    reducing = keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=1e9)
    return [callback(), reducing]


NOTHING = "There is nothing to tune", "`variables` is empty", "Received: SGD with", "Pass one"
STOCK = "optimizers of keras_drmad. Received: Adam. Compile with keras_drmad.optimizers.SGD"
KNOWN = "The layers are: ['head', 'hidden']"
SETTER = "can't be set from outside. Remove the callback that sets it", "assign to `optimizer.raw"
FIT = {  # model, callbacks, what is said
    "stock optimizer": (lambda: net(keras.optimizers.Adam()), STOCK),
    "stock optimizer by name": (lambda: net("adam"), STOCK),
    "floats alone": (lambda: net(kd.optimizers.SGD(0.1)), *NOTHING),
    "held still": (lambda: rate(0.1, tunable=False), *NOTHING),
    "steps per execution": (
        lambda: net(steps_per_execution=2),
        "steps_per_execution > 1", "Received: steps_per_execution=2. Compile without it",
    ),
    "train_step": (lambda: custom(Stepping), "Stepping has a `train_step`", "`compute_loss`"),
    "train_step by attribute": (stepping_by_attribute, "`train_step` of its own"),
    "make_train_function": (lambda: custom(Making), "`make_train_function`", "`compute_loss`"),
    "mixed_float16 without loss scaling": (
        lambda: half(auto_scale_loss=False),
        "float16 is not supported", "sequential, input_layer, hidden, ... would", "or float32",
    ),
    "float16": (lambda: half("float16", auto_scale_loss=False), "float16 is not supported"),
    "mixed_float16": (half, "mixed_float16 is not supported", "'mixed_bfloat16') or float32"),
    "loss scaling": (
        lambda: net(keras.optimizers.LossScaleOptimizer(fits.optimizer())), "LossScaleOptimizer"
    ),
    "nothing trainable": (frozen, "no trainable variables", "Set `trainable = True`"),
    "frozen meanwhile": (partly_frozen_after_a_fit, "Compile the model again with a new optimizer"),
    "renorm": (renormalized, "renorm=True) is not supported", "renorm", "renorm=False"),
    "no second derivative": (resized, "wrong or missing for up", "curvature='finite_difference'"),
    "a weight in `variables`": (net, "hidden/kernel in `variables`", "trainable=False"),
    "two callbacks": (net, "Two DrMADCallbacks", "Pass one"),
    "LearningRateScheduler": (net, *SETTER),
    "ReduceLROnPlateau": (net, *SETTER),
}  # fmt: skip
CALLBACKS = {
    "a weight in `variables`": weight_tuned,
    "two callbacks": lambda model: [callback(), callback()],
    "LearningRateScheduler": scheduled,
    "ReduceLROnPlateau": plateau,
}


def kept(model):
    """What a refusal must leave alone, by value and by identity."""
    optimizer = model.optimizer
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    slots = [v for v in optimizer.variables if "learning_rate" not in v.path]
    return [v.numpy() for v in variables], {id(v): v.numpy() for v in slots}


@pytest.mark.parametrize("name", cases([*FIT, *OTHER]))
def test_what_can_not_be_tuned(name):
    if name in OTHER:
        data, *expected = OTHER[name]
        expected.append(PREPARE)
        model = net()
        callbacks = [callback(data)]
    else:
        make, *expected = FIT[name]
        model = make()
        callbacks = CALLBACKS.get(name, lambda model: [callback()])(model)
    optimizer, before = model.optimizer, kept(model)
    own = vars(model).get("train_step")
    function = model.train_function

    def fit():
        model.fit(X, Y, BATCH, 3, verbose=0, callbacks=callbacks)

    assert_says(message_of((TypeError, ValueError), fit), *expected)

    if name != "ReduceLROnPlateau":  # which acts only after some epochs
        weights, state = kept(model)
        fits.assert_near(weights, before[0], 0)
        for key, value in before[1].items():
            np.testing.assert_array_equal(state[key], value)
    assert model.optimizer is optimizer
    assert vars(model).get("train_step") is own
    assert "_StandIn" not in type(model.train_function).__name__
    if function is not None:
        assert model.train_function is function
    if name not in ("nothing trainable", "frozen meanwhile"):
        weights = model.get_weights()
        model.fit(X, Y, BATCH, verbose=0)
        assert any(np.any(a != b) for a, b in zip(weights, model.get_weights(), strict=True))
        # In Keras 3.8 a LossScaleOptimizer leaves its own count at 0.
        counting = getattr(optimizer, "inner_optimizer", optimizer)
        assert int(counting.iterations) >= len(X) // BATCH


def stateful():
    """A model that begins each batch where the last one ended."""
    recurrent = layers.LSTM(4, stateful=True, name="memory")
    return keras.Sequential([keras.Input(batch_shape=(4, 5, 1)), recurrent, layers.Dense(3)])


def test_layers_that_keep_a_state():
    tuned = kd.DrMADCallback((HYPER_X[:4, :, None], HYPER_Y[:4]))
    model = compiled(stateful())
    said = message_of(
        ValueError, lambda: model.fit(X[..., None], Y, BATCH, verbose=0, callbacks=[tuned])
    )
    assert_says(said, "stateful=True is not supported: memory", "Train with stateful=False")


CLASSES = "A label of `hyper_data` is {}, but the model has 3 outputs, for labels from 0 to 2"
SPARSE = keras.losses.SparseCategoricalCrossentropy
LABELS = {  # the loss; hyper data of a class that the model does not know
    "an object": (SPARSE(from_logits=True), (HYPER_X, HYPER_Y + 1)),
    "negative": (SPARSE(from_logits=True), (HYPER_X, HYPER_Y - 1)),
    "a name": ("sparse_categorical_crossentropy", (HYPER_X, HYPER_Y + 1.0)),
    "a list": ([LOSS], slices(HYPER_X, HYPER_Y + 1).batch(2)),
    "wrapped": (kd.losses.ClassWeights(3, LOSS), Batches(y=HYPER_Y + 1)),
    "outer loss": ("sparse_categorical_crossentropy", (HYPER_X, HYPER_Y + 1)),
    "ignored class": (SPARSE(from_logits=True, ignore_class=4), (HYPER_X, HYPER_Y + 1)),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_hyper_data_that_are_no_class(name):
    loss, hyper = LABELS[name]
    model = net()
    model.compile(fits.optimizer(), loss, run_eagerly=True)
    outer = dict(outer_loss=SPARSE(from_logits=True)) if name == "outer loss" else {}
    before = model.get_weights()

    def fit(hyper=hyper):
        model.fit(X, Y, BATCH, verbose=0, callbacks=[callback(hyper, **outer)])

    assert_says(message_of(ValueError, fit), CLASSES.format(-1 if name == "negative" else 3))
    fits.assert_near(model.get_weights(), before, 0)
    if name == "ignored class":
        fit((HYPER_X, np.where(HYPER_Y == 0, 4, HYPER_Y)))


class InAFunction(layers.Dense):
    @tf.function
    def call(self, x):
        return super().call(x)


def test_a_layer_in_a_function_of_its_own():
    """It holds on to the weights of its first trace."""
    fits.start()
    model = compiled(keras.Sequential([keras.Input((5,)), InAFunction(4), layers.Dense(3)]))
    said = message_of(ValueError, lambda: model.fit(X, Y, BATCH, verbose=0, callbacks=[callback()]))
    assert_says(said, "`call` of 'in_a_function' is decorated with tf.function", "Leave the")


def test_an_outer_loss_of_one_output_for_two():
    """Refused before anything is trained."""
    fits.start()
    x = keras.Input((5,))
    model = keras.Model(x, [layers.Dense(3)(x), layers.Dense(1)(x)])
    model.compile(fits.optimizer(), [LOSS, "mse"], jit_compile=False)
    hyper = HYPER_X, (HYPER_Y, HYPER_X[:, :1])
    tuned, before = callback(hyper, outer_loss="mse"), model.get_weights()
    train = slices(X, (Y, X[:, :1])).batch(BATCH)
    said = message_of(ValueError, lambda: model.fit(train, verbose=0, callbacks=[tuned]))
    assert_says(said, "`outer_loss` is for models of one output", "Leave it out")
    fits.assert_near(model.get_weights(), before, 0)


def test_what_the_model_can_not_take():
    """A fault that only TensorFlow sees is told in a sentence that names the hyper data."""
    fits.start()
    inner = [layers.Embedding(10, 2), layers.Flatten(), layers.Dense(3)]
    model = compiled(keras.Sequential([keras.Input((5,), dtype="int32"), *inner]))
    x = np.arange(40, dtype="int32").reshape(8, 5) % 10
    tuned = callback((x[:6] + 7, HYPER_Y))
    said = message_of(ValueError, lambda: model.fit(x, Y, BATCH, verbose=0, callbacks=[tuned]))
    assert_says(said, "can't take a batch of `hyper_data`", "TensorFlow says: ", "not in [0, 10)")
    assert "File" not in said


def generated(generator):
    """A dataset of unknown length."""
    spec = tf.TensorSpec((None, 5)), tf.TensorSpec((None,), "int64")
    return tf.data.Dataset.from_generator(generator, output_signature=spec)


def test_hyper_data_without_an_end_that_nobody_told(monkeypatch):
    monkeypatch.setattr(hyper_data, "LONGEST", 20)
    tuned = callback(generated(lambda: itertools.repeat(HYPER)))
    said = message_of(ValueError, lambda: net().fit(X, Y, BATCH, verbose=0, callbacks=[tuned]))
    assert_says(said, "has given 20 batches", "data.take(100)", "assert_cardinality(n)")
    tuned = callback(generated(lambda: itertools.repeat(HYPER, 20)))
    net().fit(X, Y, BATCH, 2, verbose=0, callbacks=[tuned])
    assert [record.accepted for record in tuned.history] == [True, True]


def test_hyper_data_that_can_be_read_once():
    once = itertools.repeat(HYPER, 3)
    tuned = callback(generated(lambda: once))
    said = message_of(ValueError, lambda: net().fit(X, Y, BATCH, verbose=0, callbacks=[tuned]))
    assert_says(said, "`hyper_data` gave no batch any more", "data.cache()")


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: fits.optimizer(), "nothing tunes its own. Received: SGD with a Hyperparameter"),
        (lambda: keras.optimizers.Adam(use_ema=True), "`use_ema` of the `outer_optimizer`"),
        (lambda: keras.optimizers.SGD(loss_scale_factor=2.0), "loss_scale_factor=2.0. Leave it"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), "inner optimizer"),
    ],
)
def test_outer_optimizers_with_what_has_no_meaning_there(make, says):
    optimizer = make()
    said = message_of(ValueError, lambda: kd.DrMADCallback(HYPER, outer_optimizer=optimizer))
    assert_says(said, "`outer_optimizer`")
    assert_says(said, says)


@pytest.mark.parametrize("function", [kd.hypergradients, kd.verify_hypergradients])
def test_a_measurement_over_the_epochs_of_a_fit(function):
    def measure(**epochs):
        return function(net(), X, Y, hyper_data=HYPER, batch_size=BATCH, **epochs)

    found = measure(epochs=3, initial_epoch=1)
    assert getattr(found, "step", None) or found.steps == 4
    said = message_of(ValueError, lambda: measure(epochs=2, initial_epoch=2))
    assert_says(said, "`epochs` is the number of the last epoch", "epochs=2 with initial_epoch=2")


@pytest.mark.parametrize(
    "initial, says",
    [
        ({"hiden": 0.1, "*": 0.2}, ("`initial` of 'learning_rate' names 'hiden'", KNOWN)),
        ({"hidden": 0.1}, ("no value for layer 'head': it names ['hidden']", "Add the layer, or")),
    ],
)
def test_unknown_layers(initial, says):
    """An optimizer that can't be built trains nothing; the model is free to be compiled anew."""
    model = rate(initial, per="layer")
    before = model.get_weights()

    def fit():
        model.fit(X, Y, BATCH, verbose=0, callbacks=[callback()])

    assert_says(message_of(ValueError, fit), *says)
    fits.assert_near(model.get_weights(), before, 0)
    assert not model.optimizer.built
    compiled(model)
    model.fit(X, Y, BATCH, verbose=0)


def test_a_model_that_is_not_compiled():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    said = message_of(ValueError, lambda: model.fit(X, Y, verbose=0, callbacks=[callback()]))
    assert_says(said, "compile()")
    assert_says(message_of(ValueError, lambda: callback().set_model(model)), "Compile it first")


def test_another_backend(monkeypatch):
    model = net()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    said = message_of(ValueError, lambda: callback().set_model(model))
    assert_says(said, "on TensorFlow. Received: the backend 'jax'", "KERAS_BACKEND=tensorflow")


def test_several_replicas(monkeypatch):
    class Strategy:
        num_replicas_in_sync = 2

    model = net()
    monkeypatch.setattr(type(model), "distribute_strategy", Strategy())
    said = message_of(ValueError, lambda: callback().set_model(model))
    assert_says(said, "tf.distribute", "a strategy of 2 replicas", "outside of its scope")


# Optimizers -------------------------------------------------------------------------------------

SGD, Tuned = kd.optimizers.SGD, kd.Hyperparameter
START = "Start elsewhere (a small value such as 1e-6 stands for none), or pass another `domain`"
OPTIMIZERS = {
    "negative": (lambda: SGD(Tuned(-0.1)), "`learning_rate` is a number above 0", "-0.1", START),
    "zero": (lambda: SGD(0.1, l2=Tuned(0.0)), "`l2` is a number above 0", "Received: 0.0", START),
    "one": (lambda: SGD(0.1, momentum=Tuned(1.0)), "`momentum`", "between 0 and 1", START),
    "negative at a layer": (
        lambda: SGD({"*": Tuned(-1.0)}), "`learning_rate['*']` is a number above 0", START
    ),
    "negative in a dictionary": (
        lambda: SGD(Tuned({"a": -1.0}, per="layer")), "`learning_rate` is", "Received: -1.0", START
    ),
    "EMA": (lambda: SGD(0.1, use_ema=True), "`use_ema`", "keras.callbacks.SwapEMAWeights"),
    "accumulation": (
        lambda: SGD(0.1, gradient_accumulation_steps=2),
        "`gradient_accumulation_steps` is not supported", "Use a larger batch",
    ),
    "loss scaling": (
        lambda: kd.optimizers.Adam(loss_scale_factor=2.0),
        "`loss_scale_factor` is not supported by keras_drmad.optimizers.Adam", "float32",
    ),
    "unknown": (lambda: SGD(lr=0.1), "SGD has no argument 'lr'. It takes ['learning_rate'"),
    "a string": (lambda: SGD("0.1"), "is a float or a", "Received: learning_rate='0.1'"),
    "two clippings": (lambda: SGD(clipnorm=1.0, clipvalue=1.0), "At most one", "Received"),
    "anchors": (lambda: kd.trajectories.Replay(0), "`anchors`", "at least 2", "anchors=0"),
    "spacing": (lambda: kd.trajectories.Piecewise(9, ["x"]), "`spacing` is 'quadratic'", "['x']"),
    "step": (lambda: kd.optimizers.Sign(-1.0), "`step` is a finite number", "step=-1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arguments_of_optimizers(name):
    make, *expected = OPTIMIZERS[name]
    assert_says(message_of((TypeError, ValueError), make), *expected)


@pytest.mark.parametrize("built", [False, True])
def test_a_tuned_rate_can_not_be_set(built):
    model = net()
    optimizer = model.optimizer
    if built:
        optimizer.build(model.trainable_variables)
    before = float(optimizer.learning_rate)
    said = message_of(ValueError, lambda: setattr(optimizer, "learning_rate", 0.3))
    assert_says(said, "`learning_rate` is tuned", *SETTER)
    with pytest.raises(AttributeError):
        optimizer.learning_rate.assign(0.3)  # it is a copy: no assignment without a word
    assert float(optimizer.learning_rate) == pytest.approx(before) == pytest.approx(0.1)


def test_a_rate_that_is_not_tuned_can_be_set():
    optimizer = fits.optimizer(learning_rate=0.1)
    optimizer.learning_rate = 0.3
    optimizer.learning_rate.assign(optimizer.learning_rate + 0.1)
    assert float(optimizer.learning_rate) == pytest.approx(0.4)


# What is told and goes on -----------------------------------------------------------------------


def test_inputs_of_another_kind():
    tuned = callback(((100 * HYPER_X).astype("int32"), HYPER_Y))
    with pytest.warns(UserWarning, match="of `hyper_data` are int32, .* trains on float32") as w:
        net().fit(X, Y, BATCH, 2, verbose=0, callbacks=[tuned])
    assert len(w) == 1 and len(tuned.history) == 2


def test_a_fit_that_is_shorter_than_a_horizon():
    """Nothing is ever tuned by it, nor by many of them."""
    model, tuned = net(), callback(horizon=3)
    with pytest.warns(UserWarning, match="2 epochs are less than a horizon of 3.*begun anew") as w:
        for _ in range(2):
            model.fit(X, Y, BATCH, 2, verbose=0, callbacks=[tuned])
    assert len(w) == 1 and tuned.history == []


@pytest.mark.parametrize(
    "hyper",
    [slices(NAN_X, HYPER_Y).batch(3), Batches(NAN_X)],
    ids=["dataset", "PyDataset"],
)
def test_hyper_data_that_turns_out_to_be_nan(hyper):
    """What is read batch by batch is not looked through: no update is made, and that is said."""
    model = net()
    model.optimizer.build(model.trainable_variables)
    raw = [v.numpy() for v in model.optimizer.raw_variables]
    tuned = callback(hyper)
    with pytest.warns(UserWarning, match="skipped: the outer loss is not finite") as caught:
        model.fit(X, Y, BATCH, 3, verbose=0, callbacks=[tuned])
    assert len(caught) == 1
    assert [(r.accepted, r.reason) for r in tuned.history] == [
        (False, "the outer loss is not finite")
    ] * 3
    fits.assert_near([v.numpy() for v in model.optimizer.raw_variables], raw, 0)
    assert np.isfinite(model.evaluate(X, Y, verbose=0))


def test_batches_of_hyper_data_whose_arrays_differ_in_length():
    model = net()
    tuned = callback(Batches(HYPER_X, HYPER_Y[:4]))
    said = message_of(ValueError, lambda: model.fit(X, Y, BATCH, verbose=0, callbacks=[tuned]))
    assert_says(said, "batch 1 of the `hyper_data`", "[1, 3]. Return as many targets as inputs")


def test_auto_passes_over_what_a_layer_has_no_derivative_for(monkeypatch):
    """Candidates that TensorFlow can't differentiate are left out, not raised in the middle."""
    from keras_drmad.fidelity import Auto

    monkeypatch.setattr(Auto, "WINDOWS", ())  # no cheap choice that ends the search
    fits.start()
    inner = [layers.Dense(4), layers.Reshape((2, 2, 1)), layers.Resizing(3, 3, "nearest")]
    model = compiled(
        keras.Sequential([keras.Input((5,)), *inner, layers.Flatten(), layers.Dense(3)])
    )
    tuned = kd.DrMADCallback(HYPER)
    model.fit(X, Y, BATCH, 2, verbose=0, callbacks=[tuned])
    assert [record.accepted for record in tuned.history] == [True, True]
    assert "gauss_newton" not in tuned.history[0].setting
