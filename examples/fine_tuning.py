"""Fine-tune a pretrained net with a learning rate of its own for every layer, tuned by gradient.

A small convolutional net learns the MNIST digits 0 to 4. Then its first layer is frozen, it gets a
new head, and learns 5 to 9 from few examples. The learning rates start small near the input and
larger near the output, as is usual for fine-tuning; the hyper data moves them from there. Each
horizon is one fine-tuning from the same pretrained weights.

    python examples/fine_tuning.py --data-dir DIR
"""

import argparse
import time

import keras
import numpy as np
import tensorflow_datasets as tfds

import keras_drmad as kd

RATES = {"conv_2": 1e-3, "dense": 3e-3, "head": 1e-2}


def main():
    args = parse()
    keras.utils.set_random_seed(args.seed)
    old, _ = load(args, range(5), args.pretraining_examples, 0)
    train, hyper = load(args, range(5, 10), args.examples, args.hyper_examples)
    test, _ = load(args, range(5, 10), None, 0, split="test")

    pretrained = pretrain(args, old)
    model = keras.Sequential([*pretrained.layers[:-1], keras.layers.Dense(5, name="head")])
    model.build((None, 28, 28, 1))
    model.get_layer("conv_1").trainable = False
    model.compile(
        kd.optimizers.SGD(kd.Hyperparameter(RATES, per="layer"), momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    callback = kd.DrMADCallback(
        hyper,
        outer_optimizer=keras.optimizers.Adam(args.step),
        horizon=args.epochs,
        restart=True,
        trajectory=args.trajectory,
    )
    begun = time.perf_counter()
    epochs = args.epochs * args.updates
    model.fit(*train, args.batch_size, epochs, verbose=0, callbacks=[callback, Say(args)])
    seconds = time.perf_counter() - begun
    print()
    callback.summary(by_layer=True)

    def results(rates):
        """On the test data, after one fine-tuning from the pretrained weights."""
        callback.restore_first_weights()
        for group, raw in zip(model.optimizer.groups, model.optimizer.raw_variables, strict=True):
            raw.assign([group.domain.raw(rates[name_of(group)])])
        model.fit(*train, args.batch_size, args.epochs, verbose=0)
        found = model.evaluate(*test, verbose=0, return_dict=True)
        return found["loss"], found["accuracy"]

    optimizer = model.optimizer
    values = zip(optimizer.groups, optimizer.values(), strict=True)
    tuned = {name_of(group): float(value[0]) for group, value in values}
    print(f"\n{'learning rates (conv_2, dense, head)':<44}{'test loss':>10}{'accuracy':>10}")
    for name, rates in (
        ("as they start", RATES),
        ("tuned", tuned),
        ("1e-3 everywhere", dict.fromkeys(RATES, 1e-3)),
        ("1e-2 everywhere", dict.fromkeys(RATES, 1e-2)),
        ("1e-1 everywhere", dict.fromkeys(RATES, 1e-1)),
    ):
        loss, accuracy = results(rates)
        print(f"{name:<44}{loss:>10.4f}{accuracy:>10.4f}")
    print(f"\n{args.updates} updates in {seconds:.0f} s")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="where TFDS finds or puts MNIST")
    parser.add_argument("--pretraining-examples", type=int, default=5000)
    parser.add_argument("--examples", type=int, default=200, help="for fine-tuning")
    parser.add_argument("--hyper-examples", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5, help="of one horizon")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--step", type=float, default=0.2, help="of Adam on the logarithms")
    parser.add_argument("--trajectory", default="replay")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(args, classes, count, more, split="train"):
    """The first `count` images of some classes, and as many `more`; labels from 0."""
    data = tfds.as_numpy(tfds.load("mnist", split=split, data_dir=args.data_dir, batch_size=-1))
    wanted = np.isin(data["label"], classes)
    x = data["image"][wanted].astype("float32") / 255.0
    y = data["label"][wanted].astype("int32") - min(classes)
    count = len(x) if count is None else count
    return (x[:count], y[:count]), (x[count : count + more], y[count : count + more])


def pretrain(args, data):
    """A convolutional net that knows the first five digits."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(8, 5, strides=2, activation="relu", name="conv_1"),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu", name="conv_2"),
            keras.layers.Flatten(),
            keras.layers.Dense(32, "relu", name="dense"),
            keras.layers.Dense(5, name="old_head"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(), loss, metrics=["accuracy"])
    history = model.fit(*data, batch_size=50, epochs=3, verbose=0).history
    print(f"pretrained on 0 to 4: training accuracy {history['accuracy'][-1]:.4f}")
    return model


def name_of(group):
    """The layer's own name: layers taken from another model keep its name in their path."""
    return group.key.rsplit("/", 1)[-1]


class Say(keras.callbacks.Callback):
    """Prints the outer loss after every update."""

    def __init__(self, args):
        super().__init__()
        self.epochs = args.epochs

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.epochs == 0:
            print(f"update {logs['update']:3d}: outer loss {logs['outer_loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
