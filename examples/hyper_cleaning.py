"""Find wrong labels: one weight per training example, tuned on clean hyper data.

Half of 5,000 training labels of MNIST are replaced at random. `kd.SampleWeights` gives every
example a weight, and 5,000 hyper images with right labels tell which examples help (Franceschi et
al., 2017, section 5.1). Each horizon is a short training from the same first weights.

    python examples/hyper_cleaning.py --data-dir DIR
"""

import argparse
import time

import keras
import numpy as np
import tensorflow_datasets as tfds

import keras_drmad as kd

CLASSES = 10


def main():
    args = parse()
    keras.utils.set_random_seed(args.seed)
    (x, right), hyper, test = load(args)
    y, wrong = corrupted(right, args.noise, args.seed)

    model, loss = model_of(args, len(x))
    callback = kd.DrMADCallback(
        hyper,
        outer_optimizer=keras.optimizers.Adam(args.step),
        horizon=args.epochs,
        restart=True,
        trajectory=args.trajectory,
        variables=[loss],
        max_step=args.step,
    )
    begun = time.perf_counter()
    index = np.arange(len(x))
    epochs = args.epochs * args.updates
    model.fit(
        x,
        y,
        args.batch_size,
        epochs,
        sample_weight=index,
        verbose=0,
        callbacks=[callback, Say(args)],
    )
    seconds = time.perf_counter() - begun
    weights = loss.sample_weights.numpy()
    report(weights, wrong)

    def accuracy(x, y, index=None):
        """On the test data, after the same training from the same first weights."""
        callback.restore_first_weights()
        model.fit(x, y, args.batch_size, args.epochs, sample_weight=index, verbose=0)
        return model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]

    keep = weights >= 0.5
    print(f"\n{'trained on':<44}{'test accuracy':>14}")
    for name, data in (
        ("all, with equal weights", (x, y)),
        ("all, with the learned weights", (x, y, index)),
        ("those of a learned weight of at least 0.5", (x[keep], y[keep])),
        ("the right labels only (unknown in practice)", (x[~wrong], y[~wrong])),
        ("the hyper data itself", hyper),
    ):
        print(f"{name:<44}{accuracy(*data):>14.4f}")
    print(f"\n{args.updates} updates of {len(x)} weights in {seconds:.0f} s")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="where TFDS finds or puts MNIST")
    parser.add_argument(
        "--examples", type=int, default=5000, help="for training, and as many hyper"
    )
    parser.add_argument("--noise", type=float, default=0.5, help="part of the labels replaced")
    parser.add_argument("--hidden", type=int, default=64, help="hidden units")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=20, help="of one horizon")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--step", type=float, default=0.3, help="of Adam on the raw weights")
    parser.add_argument("--trajectory", default="replay")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(args):
    """Training, hyper and test data."""

    def arrays(split):
        data = tfds.load("mnist", split=split, data_dir=args.data_dir, batch_size=-1)
        data = tfds.as_numpy(data)
        x = data["image"].reshape(len(data["image"]), -1).astype("float32") / 255.0
        return x, data["label"].astype("int32")

    n = args.examples
    return arrays(f"train[:{n}]"), arrays(f"train[{n}:{2 * n}]"), arrays("test")


def corrupted(y, noise, seed):
    """Labels of which a part is replaced by another class at random, and which they are."""
    rng = np.random.default_rng(seed)
    wrong = np.zeros(len(y), bool)
    wrong[rng.permutation(len(y))[: round(noise * len(y))]] = True
    return np.where(wrong, (y + rng.integers(1, CLASSES, len(y))) % CLASSES, y), wrong


def model_of(args, n):
    """A net of one hidden layer, and its loss with a weight for each of n examples."""
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(args.hidden, "relu"),
            keras.layers.Dense(CLASSES),
        ]
    )
    loss = kd.SampleWeights(n, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.compile(kd.optimizers.SGD(args.learning_rate, momentum=0.9), loss, metrics=["accuracy"])
    return model, loss


class Say(keras.callbacks.Callback):
    """Prints the outer loss after every update."""

    def __init__(self, args):
        super().__init__()
        self.epochs = args.epochs

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.epochs == 0:
            print(f"update {logs['update']:3d}: outer loss {logs['outer_loss']:.4f}", flush=True)


def report(weights, wrong):
    """How well the weights tell wrong labels from right ones."""
    found = weights < 0.5
    hits = np.sum(found & wrong)
    precision, recall = hits / max(1, np.sum(found)), hits / np.sum(wrong)
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    of_wrong, of_right = weights[wrong].mean(), weights[~wrong].mean()
    print(f"\nmean weight: {of_wrong:.3f} of wrong labels, {of_right:.3f} of right ones")
    print("wrong labels found by a weight below 0.5: ", end="")
    print(f"precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}")


if __name__ == "__main__":
    main()
