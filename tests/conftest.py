import keras
import pytest
import tensorflow as tf
from tensorflow.python.framework.config import disable_op_determinism


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same seeds and with no layer names taken."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)


@pytest.fixture
def float64():
    """Models and data are float64 within the test."""
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


@pytest.fixture
def determinism():
    tf.config.experimental.enable_op_determinism()
    yield
    disable_op_determinism()
