"""Keras optimizers whose arguments can be tuned: everything but the rules themselves.

They own the raw variables of the hyperparameters, resolve them to values, call the rule and assign
what it returns. What an update is stands in `rules.py` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drmad import arguments as args
from keras_drmad import export, rules
from keras_drmad.arguments import Argument
from keras_drmad.hyperparameters import Group, Hyperparameter, Place, Use, layout
from keras_drmad.saving import RunState

# What stands around every rule: nothing where it is zero.
_COMMON = ("l1", "l2", "weight_decay")


class Optimizer(keras.optimizers.Optimizer):
    """Base of the optimizers with tunable arguments.

    An argument is a float, a `Hyperparameter`, or a dictionary of layer names or globs to these,
    of which the first that matches a layer holds for it. A subclass names its rule and its
    arguments; everything else is here (docs/new_rule.md).

    Args:
        rule: The `keras_drmad.rules.Rule` that this optimizer applies.
        arguments: The rule's arguments by name, `learning_rate` among them, which may also be a
            `keras.optimizers.schedules.LearningRateSchedule` (then it is not tuned).
        weight_decay: Decoupled decay of every variable, as in Keras. Defaults to 0.0.
        l1, l2: Penalties `l1 sum|w| + l2/2 sum w^2`, inside the gradient. Default to 0.0.
        penalize: A function of a variable: whether `l1` and `l2` act on it. Defaults to
            variables of rank 2 or more.
        clipnorm, clipvalue, global_clipnorm: Gradient clipping, at most one, as in Keras. Default
            to `None`.
        name: The optimizer's name. Defaults to the name of the class.

    Raises:
        ValueError, TypeError: for a value that an argument can't take, and by name for what is
            not supported (EMA, gradient accumulation, loss scaling).
    """

    namesake: type[keras.optimizers.Optimizer] | None = None  # what it is with floats alone

    def __init__(
        self,
        rule: rules.Rule,
        arguments: dict[str, Argument],
        weight_decay: Argument | None = 0.0,
        l1: Argument = 0.0,
        l2: Argument = 0.0,
        penalize: Callable[[keras.Variable], bool] | None = None,
        clipnorm: Argument | None = None,
        clipvalue: Argument | None = None,
        global_clipnorm: Argument | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        args.refuse(kwargs, type(self).__name__, type(self).__init__)
        missing = {"learning_rate", *rule.arguments} - set(arguments)
        if missing:
            raise ValueError(f"The rule's {sorted(missing)} are not among the `arguments`.")
        if penalize is not None and not callable(penalize):
            raise TypeError(f"`penalize` is a function of a variable. Received: {penalize!r}")
        norms = dict(clipnorm=clipnorm, clipvalue=clipvalue, global_clipnorm=global_clipnorm)
        # As in Keras, a norm of 0 is no clipping.
        clipping = {key: norm for key, norm in norms.items() if norm is not None and norm != 0}
        if len(clipping) > 1:
            raise ValueError(f"At most one gradient clipping can be set. Received: {clipping}")
        if _is_divided(clipping.get("global_clipnorm")):
            raise ValueError("`global_clipnorm` is one value for all variables: per='model'.")
        arguments = {
            **arguments,
            "weight_decay": 0.0 if weight_decay is None else weight_decay,
            "l1": l1,
            "l2": l2,
            **clipping,
        }
        arguments = {
            key: args.checked(key, value, rule.arguments.get(key, "positive"))
            for key, value in arguments.items()
        }
        super().__init__(
            learning_rate=_first_rate(arguments["learning_rate"]),
            name=name,
            **{key: arguments[key] for key in clipping if isinstance(arguments[key], float)},
        )
        self.rule = rule
        self.penalize = penalize
        self._arguments = arguments
        self._horizon = (0, 0)  # epochs, steps; 0 before it is known
        self._groups: tuple[Group, ...] = ()
        self._places: tuple[dict[str, Place], ...] = ()
        self._constants: tuple[dict[str, float], ...] = ()
        self._run_state = RunState()

    # What is tuned ---------------------------------------------------------------------------

    @property
    def arguments(self) -> dict[str, Argument]:
        """Argument name to the float, schedule, `Hyperparameter` or dictionary that was passed."""
        return dict(self._arguments)

    @property
    def hyperparameters(self) -> list[tuple[str, Hyperparameter]]:
        """Every `Hyperparameter` with the argument that it stands for."""
        return args.hyperparameters(self._arguments)

    @property
    def groups(self) -> list[Group]:
        """The arrays of values that are tuned, in the order of `raw_variables`."""
        return list(self._groups)

    @property
    def raw_variables(self) -> list[keras.Variable]:
        """The variables that hold the raw values, `(blocks, *group.shape)` each."""
        return list(self._raw) if self.built else []

    @property
    def slot_variables(self) -> list[list[keras.Variable]]:
        """Of each trainable variable, the rule's slots."""
        return [list(slots) for slots in self._slots]

    @property
    def trained_variables(self) -> list[keras.Variable]:
        """The model's variables that this optimizer updates, in the order of its slots."""
        return list(self._trainable_variables)

    @property
    def position(self) -> keras.Variable:
        """The step within the horizon, from 0 (int64)."""
        return self._position

    @property
    def horizon(self) -> tuple[int, int]:
        """Epochs and steps that schedules over time stretch over; zeros before it is known."""
        return self._horizon

    def set_horizon(self, epochs: int, steps: int) -> bool:
        """Stretch the schedules over a horizon.

        A schedule that has another number of blocks is resampled to the new one.

        Args:
            epochs: Epochs of a horizon.
            steps: Training steps of a horizon.

        Returns:
            Whether variables were replaced, so that functions traced before are out of date.
        """
        self._horizon = (int(epochs), int(steps))
        if not self.built:
            return False
        self._horizon_steps.assign(steps)
        blocks = [group.spec.blocks(epochs, steps) for group in self.groups]
        if all(
            raw.shape[0] == count for raw, count in zip(self.raw_variables, blocks, strict=True)
        ):
            return False
        old = [keras.ops.convert_to_numpy(raw) for raw in self._raw]
        position = int(self._position)
        self._drop_tuned_variables()
        self._add_tuned_variables()
        self._position.assign(position)
        for raw, before, count in zip(self._raw, old, blocks, strict=True):
            # Each new block takes the value of the old block in which it begins.
            raw.assign(before[[i * len(before) // count for i in range(count)]])
        return True

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Create the slots and the raw variables for the model's trainable variables."""
        if self.built:
            return
        variables = list(variables)
        layers, names = layer_names([_path(v) for v in variables])
        penalize = self.penalize or _penalized_by_default
        penalized = [bool(penalize(v)) for v in variables]
        everywhere = [True] * len(variables)
        acts = {
            **dict.fromkeys(self._arguments, everywhere),
            "l1": penalized,
            "l2": penalized,
            "weight_decay": [self._use_weight_decay(v) for v in variables],
        }
        uses: dict[tuple[str, int], Use] = {}
        constants: list[dict[str, float]] = [{} for _ in variables]
        for name, argument in self._arguments.items():
            for i, (pattern, value) in enumerate(args.at_layers(name, argument, layers)):
                if isinstance(value, Hyperparameter):
                    domain = self.rule.arguments.get(name, "positive")
                    nowhere = [False] * len(variables)
                    use = Use(name, value, domain, nowhere, pattern)
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
        self._groups, self._places, self._constants = tuple(groups), tuple(places), tuple(constants)
        super().build(variables)
        self._slots = [
            [
                self.add_variable_from_reference(
                    v, name=slot, initializer=keras.initializers.Constant(self.rule.initial_slot)
                )
                for slot in self.rule.slots
            ]
            for v in variables
        ]
        self._add_tuned_variables()
        if self._run_state.until_built is not None:
            self._load(self._run_state.until_built)
            self._run_state.until_built = None

    def _add_tuned_variables(self) -> None:
        epochs, steps = self.horizon
        self._raw = [
            self.add_variable(
                shape=(group.spec.blocks(epochs, steps), *group.shape),
                initializer=keras.initializers.Constant(group.domain.raw(group.initial)),
                dtype=group.dtype,
                name="_".join((group.argument, group.key, group.variable or ""))
                .strip("_")
                .replace("/", "_"),
            )
            for group in self.groups
        ]
        self._position = self.add_variable((), dtype="int64", name="position")
        self._horizon_steps = self.add_variable(
            (), keras.initializers.Constant(steps), dtype="int64", name="horizon_steps"
        )

    def _drop_tuned_variables(self) -> None:
        # All of them, so that the order of `variables`, by which Keras saves, stays the same.
        for variable in (*self._raw, self._position, self._horizon_steps):
            self._untrack_variable(variable)

    # The update ------------------------------------------------------------------------------

    def values(self) -> list[tf.Tensor]:
        """Of every group, its values over the horizon, `(blocks, *group.shape)`, user's units."""
        return [
            group.domain.value(tf.convert_to_tensor(raw.value))
            for group, raw in zip(self.groups, self._raw, strict=True)
        ]

    def values_at(self, position: tf.Tensor) -> list[tf.Tensor]:
        """The values of every group at a step of the horizon, in the user's units."""
        steps = tf.convert_to_tensor(self._horizon_steps.value)
        # Beyond the horizon a schedule begins again.
        position = tf.math.floormod(position, tf.maximum(steps, 1))
        values = []
        for group, raw in zip(self.groups, self._raw, strict=True):
            raw = tf.convert_to_tensor(raw.value)
            at = block_of(position, raw.shape[0], steps)
            values.append(group.domain.value(tf.gather(raw, at)))
        return values

    def pure_update(
        self,
        weights: Sequence[tf.Tensor],
        slots: Sequence[rules.Slots],
        gradients: Sequence[tf.Tensor | None],
        values: Sequence[tf.Tensor],
        learning_rate: tf.Tensor,
        t: tf.Tensor,
    ) -> tuple[list[tf.Tensor], list[rules.Slots]]:
        """The update as a pure function: what `apply` does, and what the reverse loop walks back.

        Args:
            weights, slots, gradients: Of each trainable variable.
            values: Of each group, its values at this step (see `values_at`).
            learning_rate: The scalar learning rate, which counts where it is not tuned.
            t: The number of this update, from 1.

        Returns:
            The new weights and the new slots.
        """
        return rules.update(
            self.rule,
            weights,
            slots,
            gradients,
            [self._values_of(i, w.dtype, values, learning_rate) for i, w in enumerate(weights)],
            t,
            [getattr(v, "constraint", None) for v in self._trainable_variables],
        )

    def _values_of(
        self, i: int, dtype: tf.DType, values: Sequence[tf.Tensor], learning_rate: tf.Tensor
    ) -> rules.Values:
        """The hyperparameters of the i-th variable, shaped to broadcast on it.

        Those that stand still remain Python floats, as in Keras: 1 - 0.999 is rounded once.
        """
        result: rules.Values = {
            name: value
            for name, value in self._constants[i].items()
            if name not in _COMMON or value != 0.0
        }
        if not self._rate_is_ours:
            result["learning_rate"] = tf.cast(learning_rate, dtype)
        for name, place in self._places[i].items():
            result[name] = tf.cast(tf.reshape(values[place.group], place.shape), dtype)
        return result

    def apply(self, grads, trainable_variables=None) -> None:
        """Update the variables by their gradients (called by `model.fit`)."""
        self._run_state.in_use = True
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "`trainable_variables` is needed until the optimizer is built. Call "
                    "`optimizer.build(model.trainable_variables)` first."
                )
            trainable_variables = self._trainable_variables
        trainable_variables = list(trainable_variables)
        if not self.built:
            self.build(trainable_variables)
        self._check_variables_are_known(trainable_variables)
        grads, trainable_variables = self._filter_empty_gradients(grads, trainable_variables)
        gradients: list[tf.Tensor | None] = [None] * len(self._trainable_variables)
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            # Embedding gradients come as IndexedSlices; rules see dense tensors.
            gradients[self._get_variable_index(variable)] = tf.cast(
                tf.convert_to_tensor(gradient), variable.dtype
            )
        weights, slots = self.pure_update(
            [tf.convert_to_tensor(v.value) for v in self._trainable_variables],
            [tuple(tf.convert_to_tensor(s.value) for s in slots) for slots in self._slots],
            gradients,
            self.values_at(tf.convert_to_tensor(self._position.value)),
            self.fixed_learning_rate(),
            tf.convert_to_tensor(self._iterations.value) + 1,
        )
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self._trainable_variables[i].assign(weights[i])
                for slot, value in zip(self._slots[i], slots[i], strict=True):
                    slot.assign(value)
        # TensorFlow counts a step even where the batch turns out to be missing (the end of an epoch
        # of unknown length), unless the counting waits for what is made of the batch.
        with tf.control_dependencies([g for g in gradients if g is not None]):
            self._position.assign_add(1)
            self._iterations.assign_add(1)

    def fixed_learning_rate(self) -> tf.Tensor:
        """The scalar learning rate at this step, which counts where it is not tuned."""
        return tf.convert_to_tensor(super()._get_current_learning_rate())

    # Keras's own door to the learning rate -----------------------------------------------------

    @property
    def _rate_is_ours(self) -> bool:
        """Whether the learning rate is tuned, or a dictionary: not one scalar of Keras's."""
        return isinstance(self._arguments["learning_rate"], (Hyperparameter, dict))

    @property
    def learning_rate(self):
        """The learning rate; where it is tuned or a dictionary, the mean of it at this step."""
        if not self._rate_is_ours or not self.built:
            return self._get_current_learning_rate()
        wanted = {p["learning_rate"].group for p in self._places if "learning_rate" in p}
        values = self.values_at(tf.convert_to_tensor(self._position.value))
        flat = [tf.reshape(tf.cast(values[i], "float32"), [-1]) for i in sorted(wanted)]
        flat += [tf.constant([c["learning_rate"]]) for c in self._constants if "learning_rate" in c]
        return tf.reduce_mean(tf.concat(flat, 0))

    @learning_rate.setter
    def learning_rate(self, value):
        if self._rate_is_ours:
            raise ValueError(
                "`learning_rate` is tuned by a Hyperparameter or differs from layer to layer, so "
                "it can't be set from outside. Remove the callback that sets it "
                "(ReduceLROnPlateau, LearningRateScheduler), or pass a float as `learning_rate`. "
                "To change the tuned values themselves, assign to `optimizer.raw_variables`."
            )
        keras.optimizers.Optimizer.learning_rate.fset(self, value)

    # Saving ------------------------------------------------------------------------------------

    def to_keras(self) -> keras.optimizers.Optimizer:
        """A new stock Keras optimizer that trains with the values of now.

        A learning rate that changes over the horizon becomes a `LearningRateSchedule`, which like
        this optimizer begins again after the horizon. Slots are not taken along.

        Example:

        >>> model.compile(tuned_model.optimizer.to_keras(), loss="mse")

        Raises:
            ValueError: naming what a stock optimizer can't express.
        """
        return export.to_keras(self)

    def attach(self, run: Any) -> None:
        """Save a run together with this optimizer, and hand it what was loaded with it.

        Args:
            run: An object with `get_state() -> dict` of names to arrays, and `set_state(dict)`.
        """
        self._run_state.attach(run)

    def detach(self) -> None:
        """The run has come to its end: what is loaded from now on is for the next one."""
        self._run_state.detach()

    def forget_run(self) -> None:
        """Drop the state of a loaded tuning run, so that the next callback begins a new one.

        The hyperparameters stay as they are.
        """
        self._run_state.deserialize(b"")

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store["horizon"] = np.asarray(self.horizon, "int64")
        store["run"] = np.frombuffer(self._run_state.serialize(), "uint8")

    def load_own_variables(self, store: Any) -> None:
        saved = {key: np.array(store[key]) for key in store.keys()}
        if self.built:
            self._load(saved)
        else:
            self._run_state.until_built = saved

    def _load(self, saved: dict[str, np.ndarray]) -> None:
        """Take over what `save_own_variables` stored, or raise; Keras would skip it and warn."""
        if "horizon" not in saved:
            raise ValueError(
                f"The file does not hold the state of a keras_drmad optimizer, but {self.name} is "
                "one. To take over the model's weights only, load them before `compile`."
            )
        horizon = tuple(int(n) for n in saved["horizon"])
        blocks = [group.spec.blocks(*horizon) for group in self.groups]
        if self._run_state.in_use and blocks != [raw.shape[0] for raw in self._raw]:
            raise ValueError(
                f"The file was saved with a horizon of {horizon[0]} epochs and {horizon[1]} "
                f"steps, here it is {self.horizon[0]} and {self.horizon[1]}. Load it into a newly "
                "compiled model."
            )
        self.set_horizon(*horizon)
        arrays = [saved.get(str(i)) for i in range(len(self.variables))]
        wanted = [tuple(v.shape) for v in self.variables]
        found = [None if a is None else a.shape for a in arrays]
        if found != wanted or str(len(wanted)) in saved:
            wrong = [
                f"{v.path}: expected {shape}, found {other}"
                for v, shape, other in zip(self.variables, wanted, found, strict=True)
                if shape != other
            ]
            raise ValueError(
                f"The file holds other optimizer variables than {self.name} has. It was saved with "
                "other arguments, or another model. "
                + ("; ".join(wrong[:5]) or f"It holds more than {len(wanted)}.")
            )
        for variable, array in zip(self.variables, arrays, strict=True):
            variable.assign(array)
        self._run_state.deserialize(saved["run"].tobytes())

    def get_config(self) -> dict[str, Any]:
        config = {
            "name": self.name,
            "penalize": keras.saving.serialize_keras_object(self.penalize),
            "horizon": list(self.horizon),
            **args.encode(self._arguments),
        }
        if not self._rate_is_ours:
            # It may have been changed since by the setter.
            config["learning_rate"] = super().get_config()["learning_rate"]
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects=None) -> Optimizer:
        config = args.decode(config, custom_objects)
        horizon = config.pop("horizon", (0, 0))
        optimizer = cls(**config)
        optimizer.set_horizon(*horizon)
        return optimizer


def block_of(position: tf.Tensor, blocks: int, steps: tf.Tensor) -> tf.Tensor:
    """The block of a schedule of so many blocks in which a step of the horizon lies."""
    at = tf.math.floordiv(position * blocks, tf.maximum(steps, 1))
    return tf.clip_by_value(at, 0, blocks - 1)


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


def _first_rate(argument: Any) -> Any:
    """What Keras's own variable of the learning rate starts from."""
    while isinstance(argument, (Hyperparameter, dict)):
        if isinstance(argument, dict):
            argument = next(iter(argument.values()))
        else:
            argument = argument.initial
    return argument


def _is_divided(argument: Any) -> bool:
    return isinstance(argument, dict) or (
        isinstance(argument, Hyperparameter) and argument.per != "model"
    )


def _penalized_by_default(variable: keras.Variable) -> bool:
    return len(variable.shape) >= 2
