"""From an optimizer's arguments and a model's variables to what is tuned where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import keras

from keras_drmad import arguments as args
from keras_drmad.hyperparameters import Group, Hyperparameter, Place, Use, layout

Places = tuple[dict[str, Place], ...]
Constants = tuple[dict[str, float], ...]


def lay_out(
    arguments: Mapping[str, Any],
    domains: Mapping[str, Any],
    variables: Sequence[keras.Variable],
    penalize: Callable[[keras.Variable], bool] | None,
    decays: Callable[[keras.Variable], bool],
) -> tuple[tuple[Group, ...], Places, Constants]:
    """Find for every variable its value of every argument.

    Args:
        arguments: Argument name to float, `Hyperparameter`, or dictionary of layers to these.
        domains: Argument name to the domain it is tuned in, where that is not `"positive"`.
        variables: The trainable variables.
        penalize: Whether penalties act on a variable; None is on those of rank 2 or more.
        decays: Whether decay acts on a variable.

    Returns:
        The groups; of each variable its places in them by argument, and its constants.
    """
    layers, names = layer_names([_path(v) for v in variables])
    penalized = [bool((penalize or _has_rank_2)(v)) for v in variables]
    acts = dict.fromkeys(arguments, [True] * len(variables))
    acts.update(l1=penalized, l2=penalized, weight_decay=[decays(v) for v in variables])
    uses: dict[tuple[str, int], Use] = {}
    constants: Constants = tuple({} for _ in variables)
    for name, argument in arguments.items():
        for i, (pattern, value) in enumerate(args.at_layers(name, argument, layers)):
            if isinstance(value, Hyperparameter):
                domain = domains.get(name, "positive")
                use = Use(name, value, domain, [False] * len(variables), pattern)
                use = uses.setdefault((name, id(value)), use)
                use.acts[i] = acts[name][i]
            elif isinstance(value, float) and acts[name][i]:
                constants[i][name] = value
    groups, places = layout(
        list(uses.values()),
        layers,
        names,
        [tuple(v.shape) for v in variables],
        [v.dtype for v in variables],
    )
    return tuple(groups), tuple(places), constants


def _has_rank_2(variable: keras.Variable) -> bool:
    return len(variable.shape) >= 2


def layer_names(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The layers' paths and the variables' own names, from the variables' paths.

    What all layers share at the front (the model's name) is left out; two layers of one path are
    told apart by a number.
    """
    parts = [path.split("/") for path in paths]
    folders = [tuple(p[:-1]) or (p[-1],) for p in parts]
    names = [p[-1] for p in parts]
    while folders and all(len(f) > 1 and f[0] == folders[0][0] for f in folders):
        folders = [f[1:] for f in folders]
    seen: dict[tuple[str, str], int] = {}
    layers = []
    for folder, name in zip(folders, names, strict=True):
        layer = "/".join(folder)
        count = seen[layer, name] = seen.get((layer, name), -1) + 1
        layers.append(f"{layer}#{count}" if count else layer)
    return layers, names


def _path(variable: Any) -> str:
    return getattr(variable, "path", None) or variable.name.split(":")[0]


def clipping_of(clipnorm: Any, clipvalue: Any, global_clipnorm: Any) -> dict[str, Any]:
    """Of the three ways to clip gradients, the one that is set, if any is.

    Raises:
        ValueError: for several of them, or a global norm that differs between variables.
    """
    norms = dict(clipnorm=clipnorm, clipvalue=clipvalue, global_clipnorm=global_clipnorm)
    # As in Keras, a norm of 0 is no clipping.
    clipping = {
        key: norm
        for key, norm in norms.items()
        if norm is not None and not (isinstance(norm, Real) and norm == 0)
    }
    if len(clipping) > 1:
        raise ValueError(f"At most one gradient clipping can be set. Received: {clipping}")
    overall = clipping.get("global_clipnorm")
    divided = isinstance(overall, Hyperparameter) and overall.per != "model"
    if divided or isinstance(overall, dict):
        raise ValueError("`global_clipnorm` is one value for all variables: per='model'.")
    return clipping


def first_rate(argument: Any) -> Any:
    """What Keras's own variable of the learning rate starts from."""
    while isinstance(argument, (Hyperparameter, dict)):
        if isinstance(argument, dict):
            argument = next(iter(argument.values()))
        else:
            argument = argument.initial
    return argument
