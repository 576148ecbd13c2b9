"""Find useless features: one weight per input feature, tuned on hyper data.

The 64 pixels of small digits are joined by features of pure noise. `kd.layers.FeatureWeights`
multiplies every feature by a weight between 0 and 1, and the hyper data tells which to turn down.
Each horizon is a short training from the same first weights.

    python examples/feature_selection.py --data-dir examples/data
"""

import argparse
import time

import keras
import numpy as np
import tensorflow_datasets as tfds

import keras_drmad as kd

CLASSES, PIXELS = 10, 64


def main():
    args = parse()
    keras.utils.set_random_seed(args.seed)
    train, hyper, test = load(args)
    features = PIXELS + args.noise_features

    model = model_of(args, features)
    mask = model.get_layer("mask")
    callback = kd.DrMADCallback(
        hyper,
        outer_optimizer=keras.optimizers.Adam(args.step),
        horizon=args.epochs,
        restart=True,
        trajectory=args.trajectory,
        variables=[mask],
    )
    begun = time.perf_counter()
    epochs = args.epochs * args.updates
    model.fit(*train, args.batch_size, epochs, verbose=0, callbacks=[callback, Say(args)])
    seconds = time.perf_counter() - begun
    weights = mask.feature_weights.numpy()
    report(weights, train[0])

    def accuracy(weights):
        """On the test data, after the same training from the same first weights."""
        callback.restore_first_weights()
        mask.feature_weights.assign(weights)
        model.fit(*train, args.batch_size, args.epochs, verbose=0)
        return model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]

    pixel = (np.arange(features) < PIXELS).astype("float32")
    print(f"\n{'feature weights':<44}{'test accuracy':>14}")
    for name, chosen in (
        ("all equal, as at the start", np.full(features, mask.initial)),
        ("all 1", np.ones(features)),
        ("learned", weights),
        ("learned, rounded to 0 or 1", np.round(weights)),
        ("1 for pixels, 0 for noise (unknown)", pixel),
    ):
        print(f"{name:<44}{accuracy(chosen):>14.4f}")
    print(f"\n{args.updates} updates of {features} weights in {seconds:.0f} s")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="examples/data", help="where TFDS finds the digits")
    parser.add_argument("--examples", type=int, default=400, help="for training; the rest is hyper")
    parser.add_argument("--noise-features", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=32, help="hidden units")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=20, help="of one horizon")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--step", type=float, default=0.3, help="of Adam on the raw weights")
    parser.add_argument("--trajectory", default="replay")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(args):
    """Training, hyper and test data, each with the noise appended."""
    rng = np.random.default_rng(args.seed)

    def arrays(split):
        data = tfds.load("digits", split=split, data_dir=args.data_dir, batch_size=-1)
        data = tfds.as_numpy(data)
        pixels = data["image"].reshape(-1, PIXELS) / 16.0
        # As large as the pixels, and without any meaning.
        noise = rng.uniform(0.0, 1.0, (len(pixels), args.noise_features))
        return np.concatenate([pixels, noise], 1).astype("float32"), data["label"].astype("int32")

    n = args.examples
    return arrays(f"train[:{n}]"), arrays(f"train[{n}:]"), arrays("test")


def model_of(args, features):
    """A mask of the features, and a net of one hidden layer."""
    model = keras.Sequential(
        [
            keras.Input((features,)),
            kd.layers.FeatureWeights(name="mask"),
            keras.layers.Dense(args.hidden, "relu"),
            keras.layers.Dense(CLASSES),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(kd.optimizers.SGD(args.learning_rate, momentum=0.9), loss, metrics=["accuracy"])
    return model


class Say(keras.callbacks.Callback):
    """Prints the outer loss after every update."""

    def __init__(self, args):
        super().__init__()
        self.epochs = args.epochs

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.epochs == 0:
            print(f"update {logs['update']:3d}: outer loss {logs['outer_loss']:.4f}", flush=True)


def report(weights, x):
    """How well the weights tell pixels from noise."""
    used = x[:, :PIXELS].std(0) > 0.05
    pixels, noise = weights[:PIXELS], weights[PIXELS:]
    print(f"\n{'features':<44}{'count':>6}{'mean weight':>13}{'below 0.5':>11}")
    for name, group in (
        ("pixels that differ from image to image", pixels[used]),
        ("pixels that hardly do (borders)", pixels[~used]),
        ("noise", noise),
    ):
        below = np.mean(group < 0.5)
        print(f"{name:<44}{len(group):>6}{group.mean():>13.3f}{below:>11.0%}")
    print("the pixels' weights, in percent:")
    for row in np.round(100 * pixels).astype(int).reshape(8, 8):
        print("".join(f"{value:>5}" for value in row))


if __name__ == "__main__":
    main()
