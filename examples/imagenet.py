"""ImageNet: learning rates and L2 for each layer of ResNet-50, tuned while it trains once.

    python examples/imagenet.py --data-dir DIR
    python examples/imagenet.py --fake-data --image-size 32 --batch-size 4 --steps 50 --updates 2

Every `--steps` training steps DrMAD walks back over the last of them (`--window`), visits some
(`--reverse-steps`) on some of their batches (`--max-batches`), and moves the hyperparameters;
training goes on. The path is the straight line, so that what is kept does not grow with the number
of steps: two copies of the weights and momenta, and those batches, as bytes. The outer loss is
measured on `--hyper` images that are held out of the training images.

TFDS wants ImageNet's two archives to be put into DIR/downloads/manual by hand. `--fake-data` sends
random JPEG images through the same pipeline and the same training instead. Printed is the accuracy
on the validation images, and what tuning costs in time and memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import keras_drmad as kd

CLASSES = 1000
WHOLE = [[[0.0, 0.0, 1.0, 1.0]]]  # the box around all of an image


# Images -----------------------------------------------------------------------------------------


def resized(encoded: tf.Tensor, box: tf.Tensor, size: int) -> tf.Tensor:
    """The box (top, left, height, width) of an encoded image, as a square of bytes."""
    image = tf.io.decode_and_crop_jpeg(encoded, box, channels=3)
    image = tf.image.resize(image, (size, size))
    return tf.cast(tf.round(image), tf.uint8)  # a quarter of the memory of floats


def augmented(encoded: tf.Tensor, size: int) -> tf.Tensor:
    """A random part of the image, of 8 % of its area or more, that may be mirrored."""
    shape = tf.image.extract_jpeg_shape(encoded)
    start, extent, _ = tf.image.sample_distorted_bounding_box(
        shape,
        WHOLE,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        use_image_if_no_bounding_boxes=True,
    )
    image = resized(encoded, tf.concat([start[:2], extent[:2]], 0), size)
    return tf.image.random_flip_left_right(image)


def centred(encoded: tf.Tensor, size: int) -> tf.Tensor:
    """The middle of the image, of seven eighths of its shorter side."""
    shape = tf.image.extract_jpeg_shape(encoded)[:2]
    side = tf.maximum(tf.reduce_min(shape) * 7 // 8, 1)
    return resized(encoded, tf.concat([(shape - side) // 2, [side, side]], 0), size)


def batches(arguments, split: str, training: bool = False) -> tf.data.Dataset:
    """Batches of images and labels: without end and augmented, or once through all of the split."""
    fake = tfds.testing.mock_data(
        num_examples=arguments.batch_size, policy=tfds.testing.MockPolicy.USE_CODE
    )
    with fake if arguments.fake_data else contextlib.nullcontext():
        data = tfds.load(
            "imagenet2012",
            data_dir=arguments.data_dir,
            split=split,
            as_supervised=True,
            shuffle_files=training,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
    if training:
        data = data.shuffle(arguments.shuffle, seed=arguments.seed).repeat()
    prepare = augmented if training else centred
    data = data.map(
        lambda encoded, label: (prepare(encoded, arguments.image_size), label),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return data.batch(arguments.batch_size, drop_remainder=training).prefetch(tf.data.AUTOTUNE)


# Training ---------------------------------------------------------------------------------------


def compiled_net(arguments, learning_rate, l2) -> keras.Model:
    keras.utils.set_random_seed(arguments.seed)
    inputs = keras.Input((arguments.image_size, arguments.image_size, 3))
    model = keras.applications.ResNet50(
        weights=None,
        input_tensor=keras.layers.Rescaling(1 / 127.5, offset=-1.0)(inputs),
        classes=CLASSES,
        classifier_activation=None,
    )
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # the outer loss needs statistics of the net as it is now
    model.compile(
        optimizer=kd.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True, l2=l2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(5, name="top_5")],
        jit_compile=arguments.jit_compile,
    )
    return model


class Clock(keras.callbacks.Callback):
    """The seconds of training steps and of updates; it stands behind the DrMADCallback."""

    def __init__(self):
        super().__init__()
        self.steps, self.updates = [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.last = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        began, self.last = self.last, time.perf_counter()
        self.steps.append(self.last - began)

    def on_epoch_end(self, epoch, logs=None):
        self.updates.append(time.perf_counter() - self.last)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="where TFDS finds or puts the data")
    parser.add_argument("--fake-data", action="store_true", help="random images instead")
    parser.add_argument("--untuned", action="store_true", help="the same training without DrMAD")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--shuffle", type=int, default=16384, help="encoded images to draw from")
    parser.add_argument("--steps", type=int, default=1000, help="from one update to the next")
    parser.add_argument("--updates", type=int, default=450, help="of --steps each")
    parser.add_argument("--hyper", type=int, default=10000, help="images for the outer loss")
    parser.add_argument("--window", type=int, default=100, help="steps that are walked back over")
    parser.add_argument("--reverse-steps", type=int, default=50, help="of which are visited")
    parser.add_argument("--max-batches", type=int, default=25, help="that are kept for that")
    parser.add_argument(
        "--learning-rate", type=float, default=0.1, help="where it starts, in batches of 256"
    )
    parser.add_argument("--l2", type=float, default=1e-4, help="where it starts")
    parser.add_argument("--outer-step", type=float, default=0.05, help="of the outer Adam")
    parser.add_argument("--jit-compile", action="store_true")
    parser.add_argument("--log-dir", default=None, help="for TensorBoard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="a JSON file to put what was measured into")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    steps, callbacks = arguments.steps, []
    rate, l2 = arguments.learning_rate * arguments.batch_size / 256, arguments.l2
    if not arguments.untuned:
        rate, l2 = kd.Hyperparameter(rate, per="layer"), kd.Hyperparameter(l2, per="layer")
        drmad = kd.DrMADCallback(
            batches(arguments, f"train[-{arguments.hyper}:]"),
            outer_optimizer=keras.optimizers.Adam(arguments.outer_step),
            trajectory="linear",
            window=min(arguments.window, steps),
            reverse_steps=min(arguments.reverse_steps, steps),
            max_batches=arguments.max_batches,
            jit_compile=arguments.jit_compile,
            log_dir=arguments.log_dir,
        )
        callbacks = [drmad]
    model = compiled_net(arguments, rate, l2)
    clock = Clock()
    model.fit(
        batches(arguments, f"train[:-{arguments.hyper}]", training=True),
        steps_per_epoch=steps,
        epochs=arguments.updates,
        verbose=2,
        callbacks=[*callbacks, clock],
    )
    if callbacks:
        drmad.summary()
    found = model.evaluate(batches(arguments, "validation"), verbose=0, return_dict=True)
    print(f"validation images: accuracy {found['accuracy']:.1%}, among 5 {found['top_5']:.1%}")

    settings = {k: v for k, v in vars(arguments).items() if k not in ("data_dir", "results")}
    weights = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    found = {
        "settings": settings,
        "weights": weights,
        "state_mb": round(2 * 4 * weights / 1e6, 1),  # with the momenta, in float32
        "batch_mb": round(arguments.batch_size * (arguments.image_size**2 * 3 + 8) / 1e6, 2),
        "tuned": sum(int(np.prod(v.shape)) for v in model.optimizer.raw_variables),
        "accepted": sum(record.accepted for record in drmad.history) if callbacks else 0,
        # The first ones wait for their graphs.
        "seconds_of_a_step": round(float(np.median(clock.steps[1 - steps :])), 3),
        "seconds_of_an_update": round(clock.updates[-1], 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }
    print(
        f"a training step: {found['seconds_of_a_step']:.2f} s, the last update: "
        f"{found['seconds_of_an_update']:.2f} s, peak of memory: {found['peak_mb']} MB"
    )
    if arguments.results:
        name = f"{'untuned' if arguments.untuned else 'tuned'}, {arguments.steps} steps"
        path = arguments.results
        results = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**results, name: found}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
