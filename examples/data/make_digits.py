"""Writes the folder `digits/1.0.0` beside this file. Needs scikit-learn, which ships the images.

Not needed to run the examples: the folder is in the repository.
"""

import tempfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

HERE = Path(__file__).parent
SEED = 0
TRAIN = 1200  # the other 597 images are the test split

CITATION = """\
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  publisher = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}
"""


def source():
    """The 1,797 images, (8, 8, 1) uint8 of 0 to 16, and their labels, in the original order."""
    images, labels = load_digits(return_X_y=True)
    return images.astype(np.uint8).reshape(-1, 8, 8, 1), labels


def split(labels):
    """The indices of the two splits: drawn at random, with the classes in equal proportion."""
    place = np.empty(len(labels))  # where an image stands in its shuffled class, from 0 to 1
    rng = np.random.default_rng(SEED)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(place, kind="stable")
    return {"train": np.sort(order[:TRAIN]), "test": np.sort(order[TRAIN:])}


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits of 8x8 pixels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "The 1,797 test images of the UCI data set 'Optical Recognition of Handwritten "
                "Digits': 8x8 pixels of 0 to 16, split here into 1,200 for training and 597 for "
                "testing."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
            citation=CITATION,
            license="CC BY 4.0",
        )

    def _split_generators(self, dl_manager):
        _, labels = source()
        return {name: self._generate_examples(chosen) for name, chosen in split(labels).items()}

    def _generate_examples(self, chosen):
        images, labels = source()
        for i in chosen.tolist():
            yield i, {"image": images[i], "label": int(labels[i])}


def check():
    """Compares what the plain reader finds in the folder with the source, image by image."""
    images, labels = source()
    for name, chosen in split(labels).items():
        written = tfds.load("digits:1.0.0", data_dir=HERE, split=name, as_supervised=True)
        found = sorted((x.tobytes(), int(y)) for x, y in tfds.as_numpy(written))
        assert found == sorted((images[i].tobytes(), int(labels[i])) for i in chosen), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as downloads:  # stays empty
        Digits(data_dir=HERE).download_and_prepare(download_dir=downloads)
    check()
