"""Layers with a tunable variable: noise, dropout, weights of input features.

Each is as its Keras namesake, but what Keras fixes at construction is a variable here, marked for
`DrMADCallback(variables=[layer])` (see `keras_drmad.tunable`). In a pure inference pass noise and
dropout do nothing, as in Keras.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_drmad import domains
from keras_drmad.tunable import tunable


class _Random(keras.layers.Layer):
    """A layer that draws random numbers in training, by the amount of one tuned number."""

    def __init__(self, name_of_amount: str, amount: float, domain: str, seed: int | None, **kwargs):
        super().__init__(**kwargs)
        self._initial = {name_of_amount: _inside(amount, domain, name_of_amount)}
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True
        amount_variable = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(amount),
            trainable=False,
            name=name_of_amount,
        )
        setattr(self, name_of_amount, tunable(amount_variable, domain))

    def normal(self, inputs: Any) -> Any:
        """Standard normal numbers in the shape of the inputs."""
        return keras.random.normal(
            ops.shape(inputs), dtype=self.compute_dtype, seed=self.seed_generator
        )

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._initial, "seed": self.seed}


@keras.saving.register_keras_serializable(package="keras_drmad")
class GaussianNoise(_Random):
    """Adds Gaussian noise in training, with a standard deviation that can be tuned.

    Example:

    >>> noise = kd.layers.GaussianNoise(0.1)
    >>> model = keras.Sequential([keras.Input((20,)), noise, keras.layers.Dense(10)])
    >>> callback = kd.DrMADCallback(hyper_data, variables=[noise])

    Args:
        stddev: The standard deviation to start from, above 0. The variable `layer.stddev` holds
            it, in the domain `"positive"`.
        seed: As in Keras. Defaults to `None`.
        **kwargs: Of `keras.layers.Layer`.

    Raises:
        ValueError: for a standard deviation that is not positive.
    """

    def __init__(self, stddev: float, seed: int | None = None, **kwargs):
        super().__init__("stddev", stddev, "positive", seed, **kwargs)

    def call(self, inputs, training=False):
        if not training:
            return inputs
        noise = self.normal(inputs)
        return inputs + noise * ops.cast(self.stddev, self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_drmad")
class GaussianDropout(_Random):
    """Multiplies by Gaussian noise of mean 1 in training, at a rate that can be tuned.

    The noise has the variance `rate / (1 - rate)`, that of dropout at this rate (Srivastava et
    al., 2014, section 10).

    Example:

    >>> dropout = kd.layers.GaussianDropout(0.3)
    >>> callback = kd.DrMADCallback(hyper_data, variables=[dropout])

    Args:
        rate: The rate to start from, strictly between 0 and 1. The variable `layer.rate` holds it,
            in the domain `"unit"`.
        seed: As in Keras. Defaults to `None`.
        **kwargs: Of `keras.layers.Layer`.

    Raises:
        ValueError: for a rate that is not strictly between 0 and 1.
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs):
        super().__init__("rate", rate, "unit", seed, **kwargs)

    def call(self, inputs, training=False):
        if not training:
            return inputs
        noise = self.normal(inputs)
        rate = ops.cast(self.rate, self.compute_dtype)
        return inputs * (1.0 + noise * ops.sqrt(rate / (1.0 - rate)))


@keras.saving.register_keras_serializable(package="keras_drmad")
class RelaxedDropout(_Random):
    """Dropout with a smooth mask, at a rate that can be tuned.

    The mask of dropout is 0 or 1, and no gradient reaches the rate through it. Here it is a number
    between 0 and 1, near to one of them (Maddison et al., 2017; Gal et al., 2017):

        mask = sigmoid((logit(1 - rate) + logit(u)) / temperature),  u uniform on (0, 1)

    Training uses this very mask, so that the hypergradient is that of the training that was done.
    It is not that of `keras.layers.Dropout`, which has none: the lower the temperature, the nearer
    the mask is to dropout's, and the steeper the loss in the rate.

    Example:

    >>> dropout = kd.layers.RelaxedDropout(0.3)
    >>> callback = kd.DrMADCallback(hyper_data, variables=[dropout])

    Args:
        rate: The rate to start from, strictly between 0 and 1. The variable `layer.rate` holds it,
            in the domain `"unit"`.
        temperature: How smooth the mask is, above 0. Defaults to 0.1.
        seed: As in Keras. Defaults to `None`.
        **kwargs: Of `keras.layers.Layer`.

    Raises:
        ValueError: for a rate that is not strictly between 0 and 1, or a temperature not above 0.
    """

    def __init__(self, rate: float, temperature: float = 0.1, seed: int | None = None, **kwargs):
        super().__init__("rate", rate, "unit", seed, **kwargs)
        self.temperature = _inside(temperature, "positive", "temperature")

    def call(self, inputs, training=False):
        if not training:
            return inputs
        # In float32 at least: the logarithms near the ends need it.
        dtype = "float64" if self.compute_dtype == "float64" else "float32"
        tiny = 1e-7
        u = keras.random.uniform(
            ops.shape(inputs), tiny, 1.0 - tiny, dtype=dtype, seed=self.seed_generator
        )
        rate = ops.cast(self.rate, dtype)
        logit = ops.log1p(-rate) - ops.log(rate) + ops.log(u) - ops.log1p(-u)
        mask = ops.sigmoid(logit / self.temperature) / (1.0 - rate)
        return inputs * ops.cast(mask, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "temperature": self.temperature}


@keras.saving.register_keras_serializable(package="keras_drmad")
class FeatureWeights(keras.layers.Layer):
    """Multiplies every input feature by a weight of its own, which can be tuned.

    In the domain `"unit"` it is a soft mask of the features; in `"positive"`, a scale. It acts in
    training and in inference.

    Example:

    >>> mask = kd.layers.FeatureWeights()
    >>> model = keras.Sequential([keras.Input((20,)), mask, keras.layers.Dense(10)])
    >>> callback = kd.DrMADCallback(hyper_data, variables=[mask])

    Args:
        initial: What every weight starts from. Defaults to 0.5.
        domain: Where the weights live. Defaults to `"unit"`.
        **kwargs: Of `keras.layers.Layer`.

    The variable `layer.feature_weights` has the shape of an example; along an axis of open length
    (time) one weight holds for all.

    Raises:
        ValueError: for an initial weight outside of the domain.
    """

    def __init__(
        self,
        initial: float = 0.5,
        domain: str | tuple[float, float] = "unit",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.initial = _inside(initial, domain, "initial")
        self.domain = domain if isinstance(domain, str) else (domain[0], domain[1])
        self.supports_masking = True

    def build(self, input_shape):
        weights = self.add_weight(
            shape=tuple(size or 1 for size in input_shape[1:]),
            initializer=keras.initializers.Constant(self.initial),
            trainable=False,
            name="feature_weights",
        )
        self.feature_weights = tunable(weights, self.domain)

    def call(self, inputs):
        return inputs * ops.cast(self.feature_weights, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "initial": self.initial, "domain": self.domain}


def _inside(value: Any, domain: Any, argument: str) -> float:
    """A number of a domain, or a readable refusal."""
    known = domains.get(domain)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not known.contains(number):
        raise ValueError(f"`{argument}` is {known.says}. Received: {argument}={value!r}")
    return number
