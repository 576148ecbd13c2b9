"""Readable refusals: what can't be tuned is said by name, before training starts."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import keras
import tensorflow as tf

from keras_drmad.normalization import uncorrected_layers
from keras_drmad.optimizers import Optimizer
from keras_drmad.tunable import losses_in


def check_model_and_optimizer(
    model: keras.Model, variables: Sequence[keras.Variable] = (), scaled: bool = False
) -> None:
    """Refuse a model that can't be tuned.

    Args:
        model: The model.
        variables: Variables of the model or its loss that are tuned.
        scaled: Whether the scale of the initial weights is tuned.

    Raises:
        TypeError, ValueError: naming what is not supported and what to do instead.
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"keras_drmad needs Keras on TensorFlow. Received: the backend "
            f"{keras.backend.backend()!r}. Set the environment variable KERAS_BACKEND=tensorflow "
            "before keras is imported."
        )
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            f"The model {model.name!r} has no optimizer. Compile it first, for example with "
            "keras_drmad.optimizers.SGD(learning_rate=keras_drmad.Hyperparameter(0.01))."
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "mixed_float16 is not supported: its loss scaling (LossScaleOptimizer) skips updates "
            "that the reverse pass would have to know of. Use "
            "keras.mixed_precision.set_global_policy('mixed_bfloat16') or float32."
        )
    half = [layer.name for layer in model._flatten_layers() if layer.compute_dtype == "float16"]
    if half:
        raise ValueError(
            f"float16 is not supported (dtype policies float16 and mixed_float16): {_some(half)} "
            "would give gradients that need loss scaling, which skips updates that the reverse "
            "pass would have to know of. Use "
            "keras.mixed_precision.set_global_policy('mixed_bfloat16') or float32."
        )
    if not isinstance(optimizer, Optimizer):
        name = type(optimizer).__name__
        raise TypeError(
            f"DrMADCallback tunes the arguments of the optimizers of keras_drmad. Received: "
            f"{name}. Compile with keras_drmad.optimizers.SGD(...), whose arguments are those of "
            "keras.optimizers.SGD, and pass a keras_drmad.Hyperparameter for what is to be tuned."
        )
    trained = {id(v) for v in model.trainable_variables}
    for variable in variables:
        if id(variable) in trained:
            raise ValueError(
                f"{variable.path} in `variables` is a trainable weight of the model. Create it "
                "with trainable=False: it is tuned on the hyper data, not trained."
            )
    tuned = any(spec.tunable for _, spec in optimizer.hyperparameters)
    if not (variables or scaled or tuned):
        raise ValueError(
            "There is nothing to tune: no argument of the optimizer is a tunable Hyperparameter, "
            f"and `variables` is empty. Received: {type(optimizer).__name__} with "
            f"{optimizer.arguments}. Pass one, for example "
            "keras_drmad.optimizers.SGD(learning_rate=keras_drmad.Hyperparameter(0.01))."
        )
    if model.steps_per_execution != 1:
        raise ValueError(
            "steps_per_execution > 1 is not supported: every training step is recorded. Received: "
            f"steps_per_execution={model.steps_per_execution}. Compile without it."
        )
    if getattr(model.train_step, "__func__", None) is not keras.Model.train_step:
        raise ValueError(
            f"{type(model).__name__} has a `train_step` of its own, which the reverse pass can't "
            "know. Override `compute_loss` instead, which it uses."
        )
    made_by = getattr(model.make_train_function, "__func__", None)
    if made_by is not keras.Model.make_train_function:
        raise ValueError(
            f"{type(model).__name__} has a `make_train_function` of its own, which would be passed "
            "over while steps are recorded. Leave it out, and override `compute_loss` instead."
        )
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1:
        raise ValueError(
            "Training on several replicas (tf.distribute) is not supported. Received: a strategy "
            f"of {replicas} replicas. Make and compile the model outside of its scope."
        )


def check_functions(model: keras.Model) -> None:
    """Refuse a model whose methods are TensorFlow functions.

    Such a function holds on to the variables that it was traced with, whatever values it is to be
    evaluated at, so that nothing would seem to depend on them.

    Args:
        model: A built model.

    Raises:
        ValueError: naming the layer and its method.
    """
    for layer in model._flatten_layers():
        for name in ("call", "compute_loss"):
            method = inspect.getattr_static(layer, name, None)
            if isinstance(method, tf.types.experimental.PolymorphicFunction):
                raise ValueError(
                    f"`{name}` of {layer.name!r} is decorated with tf.function, which can't be "
                    "evaluated at other weights than those of its first trace. Leave the decorator "
                    "out: `fit` compiles the whole training step anyway."
                )


def check_horizon(optimizer: Optimizer, steps: int | None) -> None:
    """Refuse a schedule over a horizon whose number of steps is not known.

    Raises:
        ValueError: naming the argument.
    """
    for name, spec in optimizer.hyperparameters:
        if steps is None and spec.over != "run":
            raise ValueError(
                f"`{name}` has a schedule (over={spec.over!r}), which needs the number of steps "
                "of an epoch, and the training data does not tell it. Pass `steps_per_epoch` to "
                "`fit`, or use data of known length "
                "(dataset.apply(tf.data.experimental.assert_cardinality(n)))."
            )


def check_trainable(model: keras.Model) -> None:
    """Refuse a built model that has nothing to train.

    Raises:
        ValueError: if so.
    """
    if not model.trainable_variables:
        raise ValueError(
            f"The model {model.name!r} has no trainable variables, so no hyperparameter has an "
            "effect on it. Set `trainable = True` on a layer, and compile the model again."
        )


def check_trained_variables(model: keras.Model) -> None:
    """Refuse a model of which other variables are trainable than the optimizer was built for.

    Raises:
        ValueError: if so.
    """
    known = [id(v) for v in model.optimizer.trained_variables]
    if known != [id(v) for v in model.trainable_variables]:
        raise ValueError(
            "The model's trainable variables are not those that the optimizer was built for: a "
            "layer's `trainable` has changed, or the optimizer was used for another model. "
            "Compile the model again with a new optimizer."
        )


def check_curvature(model: keras.Model, curvature: str) -> None:
    """Refuse a curvature that is known to be wrong for a model, by the types of its layers.

    This takes no time; `check_model` tests the layers instead.

    Args:
        model: A model, compiled for the check of its loss.
        curvature: A name of `keras_drmad.curvature`.

    Raises:
        ValueError: naming the layers and the way out.
    """
    layers = [layer for layer in model._flatten_layers() if _recomputed(layer) == "call"]
    if layers:
        raise ValueError(
            f"Rematerialization (keras.RematScope) is not supported: {_names(layers)} would have "
            "no gradient for the reverse pass. Make these layers outside of the scope."
        )
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.SpectralNormalization) and layer.trainable_variables
    ]
    if layers:
        raise ValueError(
            f"SpectralNormalization is not supported: {_names(layers)} overwrites its weights when "
            "it is called, which the reverse pass can't follow. Train without it, or with "
            "kernel_constraint=keras.constraints.UnitNorm() in its place."
        )
    layers = [layer for layer in model._flatten_layers() if getattr(layer, "stateful", 0) is True]
    if layers:
        raise ValueError(
            f"stateful=True is not supported: {_names(layers)} begins each batch where the last "
            "one ended, and these states are not recorded. Train with stateful=False."
        )
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
        and getattr(layer, "renorm", False)  # older Keras does not have it
    ]
    if layers:
        raise ValueError(
            f"BatchNormalization(renorm=True) is not supported: the gradient of {_names(layers)} "
            "takes for constant what depends on the weights. Train with renorm=False."
        )
    if curvature == "finite_difference":
        return
    named = uncorrected_layers(model)
    named += [layer.name for layer in model._flatten_layers() if _recomputed(layer)]
    if named:
        raise ValueError(
            f"curvature={curvature!r} is wrong or missing for {', '.join(named)}: TensorFlow does "
            "not differentiate the gradient of these layers. Use curvature='finite_difference'."
        )
    compiled = getattr(model, "loss", None)
    losses = [keras.losses.get(x) for x in keras.tree.flatten(compiled) if x]
    losses += losses_in(compiled)  # also wrapped ones
    ctc = (keras.losses.CTC, keras.losses.ctc)
    if any(isinstance(x, ctc[0]) or ctc[1] in (x, getattr(x, "function", None)) for x in losses):
        raise ValueError(
            f"The second derivative of keras.losses.CTC is not a number, and curvature="
            f"{curvature!r} needs it. Use curvature='finite_difference'."
        )


def check_choice(
    trajectory: Any,
    curvature: str | None,
    window: Any,
    reverse_steps: Any,
    verify_every: int | None,
    memory_limit: int | None,
    fidelity: float | None,
    max_batches: int | None,
) -> None:
    """Refuse arguments of the callback that say two things at once.

    Args:
        trajectory: `"auto"` or an object of `keras_drmad.trajectories`.
        curvature, window, reverse_steps, verify_every, memory_limit, fidelity, max_batches: As
            they were passed; None is nothing.

    Raises:
        ValueError: naming the argument that would have no effect.
    """
    is_auto = isinstance(trajectory, str)
    if is_auto and (window, reverse_steps) != (None, None):
        raise ValueError(
            "`window` and `reverse_steps` are chosen by trajectory='auto'. Name a trajectory "
            "to set them."
        )
    if is_auto and curvature == "gauss_newton":
        raise ValueError(
            "trajectory='auto' measures against the exact curvature. Name a trajectory to set "
            "curvature='gauss_newton'."
        )
    if is_auto and verify_every is not None:
        raise ValueError(
            "`verify_every` is for a named trajectory: 'auto' measures by itself. Leave it out."
        )
    if not is_auto and memory_limit is not None:
        raise ValueError(
            "`memory_limit` bounds what trajectory='auto' chooses. Received: memory_limit="
            f"{memory_limit} with trajectory={trajectory.name!r}. Bound that by `window` and "
            "`max_batches` instead."
        )
    if not is_auto and fidelity is not None:
        raise ValueError(
            "`fidelity` is what trajectory='auto' aims at. Received: "
            f"fidelity={fidelity} with trajectory={trajectory.name!r}. Leave it out; "
            "`verify_every` measures how well a named trajectory does."
        )
    if not is_auto and trajectory.all_batches and max_batches is not None:
        raise ValueError(
            "`max_batches` is for a path that is not exact. Received: max_batches="
            f"{max_batches} with trajectory={trajectory.name!r}, which needs every batch that it "
            "walks over. Bound what is kept by `window` instead."
        )


def _names(layers: Sequence[keras.layers.Layer]) -> str:
    return ", ".join(layer.name for layer in layers)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _recomputed(layer: keras.layers.Layer) -> str:
    """What of a layer is computed again for its gradient: "", "activation", or its whole "call".

    A call that is computed again finds other weights than those of a `keras.StatelessScope`. An
    activation has a gradient there, which has none of its own.
    """
    remat = getattr(layer, "_remat_mode", None)
    if remat is None or remat.mode is None:
        return ""
    if remat.mode == "activations":
        return "activation" if getattr(layer, "activation", None) is not None else ""
    if remat.mode == "list_of_layers":
        return "call" if layer.name in remat.layer_names else ""
    return "call"


def positive_int(value: Any, argument: str) -> int:
    """A whole number of at least 1.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{argument}` is a whole number >= 1. Received: {argument}={value!r}")
    return int(value)


def step_amount(value: Any, argument: str) -> int | float | None:
    """A number of steps: None, a whole number >= 1, or a fraction in (0, 1].

    Raises:
        ValueError: for anything else.
    """
    if value is None:
        return None
    if _is_number(value) and isinstance(value, Integral) and int(value) >= 1:
        return int(value)
    if _is_number(value) and not isinstance(value, Integral) and 0.0 < value <= 1.0:
        return float(value)
    raise ValueError(
        f"`{argument}` is None (all steps), a number of steps >= 1, or a fraction above 0 and at "
        f"most 1.0. Received: {argument}={value!r}"
    )


def positive_float(value: Any, argument: str) -> float:
    """A finite number above 0.

    Raises:
        ValueError: for anything else.
    """
    if not _is_number(value) or not 0.0 < value <= sys.float_info.max:
        raise ValueError(f"`{argument}` is a finite number > 0. Received: {argument}={value!r}")
    return float(value)


def fraction(value: Any, argument: str) -> float:
    """A number above 0 and below 1.

    Raises:
        ValueError: for anything else.
    """
    if not _is_number(value) or not 0.0 < value < 1.0:
        raise ValueError(
            f"`{argument}` is a number above 0 and below 1. Received: {argument}={value!r}"
        )
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
