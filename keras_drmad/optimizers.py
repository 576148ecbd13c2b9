"""Keras optimizers whose arguments can be tuned, one for each rule.

With floats alone they train as their Keras namesakes do. Each names its arguments and its rule;
what they have in common is `Optimizer`, and how to add one stands in docs/new_rule.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from keras_drmad import arguments as args
from keras_drmad import rules
from keras_drmad.arguments import Argument
from keras_drmad.base_optimizer import Optimizer as Optimizer
from keras_drmad.hyperparameters import Hyperparameter
from keras_drmad.schedules import block_of as block_of


@keras.saving.register_keras_serializable(package="keras_drmad")
class SGD(Optimizer):
    """Gradient descent with momentum whose every argument can be a `Hyperparameter`.

    With floats alone it follows `keras.optimizers.SGD`.

        g <- clip(g + l1 sign(w) + l2 w)
        w <- w - learning_rate weight_decay w
        v <- momentum v - learning_rate g
        w <- w + v                                       plain
        w <- w + momentum v - learning_rate g            nesterov (Sutskever et al., 2013)

    and, dampened (Maclaurin et al., 2015; Fu et al., 2016),

        v <- momentum v - (1 - momentum) g
        w <- w + learning_rate v

    Example:

    >>> optimizer = kd.optimizers.SGD(
    ...     learning_rate=kd.Hyperparameter(0.05, per="layer", over="step"), momentum=0.9)

    Args:
        learning_rate: A float, a `Hyperparameter`, a dictionary of layer names or globs to these,
            or a `LearningRateSchedule`. Defaults to 0.01.
        momentum: Defaults to 0.0, which keeps no velocity.
        nesterov: Whether to apply Nesterov momentum. Defaults to `False`.
        weight_decay: Decoupled decay of every variable, as in Keras. Defaults to 0.0.
        dampened: Whether the velocity is a running mean of gradients. Defaults to `False`.
        l1, l2: Penalties `l1 sum|w| + l2/2 sum w^2`, inside the gradient, on variables of rank 2
            or more (see `penalize`). Default to 0.0.
        name: The optimizer's name. Defaults to `"SGD"`.
        penalize: A function of a variable: whether `l1` and `l2` act on it.
        clipnorm, clipvalue, global_clipnorm: Gradient clipping, at most one of them.
    """

    namesake = keras.optimizers.SGD

    def __init__(
        self,
        learning_rate: Argument = 0.01,
        momentum: Argument = 0.0,
        nesterov: bool = False,
        weight_decay: Argument | None = 0.0,
        *,
        dampened: bool = False,
        l1: Argument = 0.0,
        l2: Argument = 0.0,
        name: str | None = "SGD",
        **kwargs: Any,
    ):
        if nesterov and dampened:
            raise ValueError("`nesterov` and `dampened` are two different rules. Pass one of them.")
        rule, own = rules.SGD, dict(learning_rate=learning_rate, momentum=momentum)
        if args.is_nonzero(momentum):
            rule = rules.NESTEROV if nesterov else rules.DAMPENED if dampened else rules.MOMENTUM
        super().__init__(rule, own, weight_decay, l1, l2, name=name, **kwargs)
        self.nesterov, self.dampened = bool(nesterov), bool(dampened)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "nesterov": self.nesterov, "dampened": self.dampened}


@keras.saving.register_keras_serializable(package="keras_drmad")
class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015) whose every argument can be a `Hyperparameter`.

    With floats alone it follows `keras.optimizers.Adam`, and with `weight_decay`
    `keras.optimizers.AdamW` (Loshchilov and Hutter, 2019). At update t, from 1,

        g <- clip(g + l1 sign(w) + l2 w)
        w <- w - learning_rate weight_decay w
        m <- beta_1 m + (1 - beta_1) g
        v <- beta_2 v + (1 - beta_2) g^2
        u <- v                                           u <- max(u, v) with amsgrad
        w <- w - learning_rate sqrt(1 - beta_2^t) / (1 - beta_1^t) m / (sqrt(u) + epsilon)

    A beta that changes over time enters the correction of the bias, beta^t, as it is at that
    step. Where every gradient so far was zero, sqrt(v) has derivative zero.

    Example:

    >>> optimizer = kd.optimizers.Adam(
    ...     learning_rate=kd.Hyperparameter(1e-3, per="layer"), beta_1=kd.Hyperparameter(0.9))

    Args:
        learning_rate: A float, a `Hyperparameter`, a dictionary of layer names or globs to these,
            or a `LearningRateSchedule`. Defaults to 0.001.
        beta_1: Decay of the mean of gradients. Defaults to 0.9.
        beta_2: Decay of the mean of squared gradients. Defaults to 0.999.
        epsilon: Defaults to 1e-7.
        amsgrad: Whether the largest v so far counts (Reddi et al., 2018). Defaults to `False`.
        weight_decay: Decoupled decay of every variable, as in Keras. Defaults to 0.0.
        l1, l2: Penalties `l1 sum|w| + l2/2 sum w^2`, inside the gradient, on variables of rank 2
            or more (see `penalize`). Default to 0.0.
        name: The optimizer's name. Defaults to `"Adam"`.
        penalize: A function of a variable: whether `l1` and `l2` act on it.
        clipnorm, clipvalue, global_clipnorm: Gradient clipping, at most one of them.
    """

    namesake = keras.optimizers.Adam

    def __init__(
        self,
        learning_rate: Argument = 0.001,
        beta_1: Argument = 0.9,
        beta_2: Argument = 0.999,
        epsilon: Argument = 1e-7,
        amsgrad: bool = False,
        weight_decay: Argument | None = 0.0,
        *,
        l1: Argument = 0.0,
        l2: Argument = 0.0,
        name: str | None = "Adam",
        **kwargs: Any,
    ):
        own = dict(learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)
        rule = rules.AMSGRAD if amsgrad else rules.ADAM
        super().__init__(rule, own, weight_decay, l1, l2, name=name, **kwargs)
        self.amsgrad = bool(amsgrad)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "amsgrad": self.amsgrad}


@keras.saving.register_keras_serializable(package="keras_drmad")
class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton, 2012) whose every argument can be a `Hyperparameter`.

    With floats alone it follows `keras.optimizers.RMSprop`.

        g <- clip(g + l1 sign(w) + l2 w)
        w <- w - learning_rate weight_decay w
        v <- rho v + (1 - rho) g^2
        a <- rho a + (1 - rho) g                         centered (Graves, 2013); otherwise a = 0
        d <- learning_rate g / sqrt(v - a^2 + epsilon)
        p <- momentum p + d
        w <- w - p

    Example:

    >>> optimizer = kd.optimizers.RMSprop(kd.Hyperparameter(1e-3), rho=kd.Hyperparameter(0.9))

    Args:
        learning_rate: A float, a `Hyperparameter`, a dictionary of layer names or globs to these,
            or a `LearningRateSchedule`. Defaults to 0.001.
        rho: Decay of the means. Defaults to 0.9.
        momentum: Defaults to 0.0, which keeps no p.
        epsilon: Inside of the root, as in Keras. Defaults to 1e-7.
        centered: Whether gradients are scaled by their variance. Defaults to `False`.
        weight_decay: Decoupled decay of every variable, as in Keras. Defaults to 0.0.
        l1, l2: Penalties `l1 sum|w| + l2/2 sum w^2`, inside the gradient, on variables of rank 2
            or more (see `penalize`). Default to 0.0.
        name: The optimizer's name. Defaults to `"RMSprop"`.
        penalize: A function of a variable: whether `l1` and `l2` act on it.
        clipnorm, clipvalue, global_clipnorm: Gradient clipping, at most one of them.
    """

    namesake = keras.optimizers.RMSprop

    def __init__(
        self,
        learning_rate: Argument = 0.001,
        rho: Argument = 0.9,
        momentum: Argument = 0.0,
        epsilon: Argument = 1e-7,
        centered: bool = False,
        weight_decay: Argument | None = 0.0,
        *,
        l1: Argument = 0.0,
        l2: Argument = 0.0,
        name: str | None = "RMSprop",
        **kwargs: Any,
    ):
        own = dict(learning_rate=learning_rate, rho=rho, momentum=momentum, epsilon=epsilon)
        rule = rules.rmsprop(bool(centered), args.is_nonzero(momentum))
        super().__init__(rule, own, weight_decay, l1, l2, name=name, **kwargs)
        self.centered = bool(centered)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "centered": self.centered}


@keras.saving.register_keras_serializable(package="keras_drmad")
class Adagrad(Optimizer):
    """Adagrad (Duchi et al., 2011) whose every argument can be a `Hyperparameter`.

    With floats alone it follows `keras.optimizers.Adagrad`.

        g <- clip(g + l1 sign(w) + l2 w)
        w <- w - learning_rate weight_decay w
        v <- v + g^2
        w <- w - learning_rate g / sqrt(v + epsilon)

    Example:

    >>> optimizer = kd.optimizers.Adagrad(kd.Hyperparameter(0.05, per="layer"))

    Args:
        learning_rate: A float, a `Hyperparameter`, a dictionary of layer names or globs to these,
            or a `LearningRateSchedule`. Defaults to 0.001.
        initial_accumulator_value: Where v starts, a float. Defaults to 0.1.
        epsilon: Inside of the root, as in Keras. Defaults to 1e-7.
        weight_decay: Decoupled decay of every variable, as in Keras. Defaults to 0.0.
        l1, l2: Penalties `l1 sum|w| + l2/2 sum w^2`, inside the gradient, on variables of rank 2
            or more (see `penalize`). Default to 0.0.
        name: The optimizer's name. Defaults to `"Adagrad"`.
        penalize: A function of a variable: whether `l1` and `l2` act on it.
        clipnorm, clipvalue, global_clipnorm: Gradient clipping, at most one of them.
    """

    namesake = keras.optimizers.Adagrad

    def __init__(
        self,
        learning_rate: Argument = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: Argument = 1e-7,
        weight_decay: Argument | None = 0.0,
        *,
        l1: Argument = 0.0,
        l2: Argument = 0.0,
        name: str | None = "Adagrad",
        **kwargs: Any,
    ):
        if isinstance(initial_accumulator_value, (Hyperparameter, dict)):
            raise TypeError("`initial_accumulator_value` is a float: it can't be tuned.")
        start = args.checked("initial_accumulator_value", initial_accumulator_value, "positive")
        own = dict(learning_rate=learning_rate, epsilon=epsilon)
        rule = replace(rules.ADAGRAD, initial_slot=start)
        super().__init__(rule, own, weight_decay, l1, l2, name=name, **kwargs)
        self.initial_accumulator_value = start

    def get_config(self) -> dict[str, Any]:
        start = self.initial_accumulator_value
        return {**super().get_config(), "initial_accumulator_value": start}


@keras.saving.register_keras_serializable(package="keras_drmad")
class Lion(Optimizer):
    """Lion (Chen et al., 2023) whose every argument can be a `Hyperparameter`.

    With floats alone it follows `keras.optimizers.Lion`.

        g <- clip(g + l1 sign(w) + l2 w)
        w <- w - learning_rate weight_decay w
        w <- w - learning_rate sign(beta_1 m + (1 - beta_1) g)
        m <- beta_2 m + (1 - beta_2) g

    The sign has derivative zero almost everywhere, and that is what the hypergradient sees:
    `learning_rate` and `weight_decay`, which act outside of the sign, have true hypergradients;
    those of the betas, of `l1`, `l2`, clipping, and of whatever else acts through the gradient
    alone, are zero, though a change large enough to turn a sign does change the training. These
    are better left as floats.

    Example:

    >>> optimizer = kd.optimizers.Lion(kd.Hyperparameter(1e-4, per="layer", over="epoch"))

    Args:
        learning_rate: A float, a `Hyperparameter`, a dictionary of layer names or globs to these,
            or a `LearningRateSchedule`. Defaults to 0.001.
        beta_1: Weight of the mean in the direction. Defaults to 0.9.
        beta_2: Decay of the mean of gradients. Defaults to 0.99.
        weight_decay: Decoupled decay of every variable, as in Keras. Defaults to 0.0.
        l1, l2: Penalties `l1 sum|w| + l2/2 sum w^2`, inside the gradient, on variables of rank 2
            or more (see `penalize`). Default to 0.0.
        name: The optimizer's name. Defaults to `"Lion"`.
        penalize: A function of a variable: whether `l1` and `l2` act on it.
        clipnorm, clipvalue, global_clipnorm: Gradient clipping, at most one of them.
    """

    namesake = keras.optimizers.Lion

    def __init__(
        self,
        learning_rate: Argument = 0.001,
        beta_1: Argument = 0.9,
        beta_2: Argument = 0.99,
        weight_decay: Argument | None = 0.0,
        *,
        l1: Argument = 0.0,
        l2: Argument = 0.0,
        name: str | None = "Lion",
        **kwargs: Any,
    ):
        own = dict(learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2)
        super().__init__(rules.LION, own, weight_decay, l1, l2, name=name, **kwargs)


@keras.saving.register_keras_serializable(package="keras_drmad")
class Sign(keras.optimizers.Optimizer):
    """Steps of one size against the sign of the gradient: the paper's outer optimizer.

    Example:

    >>> callback = kd.DrMADCallback(hyper_data, outer_optimizer=kd.optimizers.Sign(0.1))

    Args:
        step: The size of a step in raw units (logarithms, logits). Defaults to 0.1.
        name: The optimizer's name. Defaults to `"Sign"`.
    """

    def __init__(self, step: float = 0.1, name: str | None = "Sign"):
        if isinstance(step, (dict, Hyperparameter)):
            raise TypeError(f"`step` is a float. Received: step={step!r}")
        super().__init__(learning_rate=args.checked("step", step, "positive"), name=name)

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, keras.ops.cast(learning_rate, variable.dtype) * tf.sign(gradient))

    def get_config(self) -> dict[str, Any]:
        return {"step": float(self.learning_rate), "name": self.name}
