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
from keras.initializers import Constant

from keras_drmad import arguments as args
from keras_drmad import export, places, rules, saving, sums
from keras_drmad.arguments import Argument
from keras_drmad.hyperparameters import Group, Hyperparameter
from keras_drmad.schedules import block_of, resampled, within_horizon

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
        clipping = places.clipping_of(clipnorm, clipvalue, global_clipnorm)
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
            learning_rate=places.first_rate(arguments["learning_rate"]),
            name=name,
            **{key: arguments[key] for key in clipping if isinstance(arguments[key], float)},
        )
        self.rule = rule
        self.penalize = penalize
        self._arguments = arguments
        self._horizon = (0, 0)  # epochs, steps; 0 before it is known
        self._groups: tuple[Group, ...] = ()
        self._places: places.Places = ()
        self._constants: places.Constants = ()
        self._tuning_state = saving.TuningState(self)
        self._hide_from_checkpoints(_variables=self._variables)

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

    @property
    def in_use(self) -> bool:
        """Whether graphs may hold on to the variables (False before the first step)."""
        return self._tuning_state.in_use

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
        # All of them, so that the order of `variables`, by which Keras saves, stays the same.
        for variable in (*self._raw, self._position, self._horizon_steps):
            self._untrack_variable(variable)
        self._add_tuned_variables()
        self._position.assign(position)
        for raw, before, count in zip(self._raw, old, blocks, strict=True):
            raw.assign(resampled(before, count))
        return True

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Create the slots and the raw variables for the model's trainable variables."""
        if self.built:
            return
        variables = list(variables)
        self._groups, self._places, self._constants = places.lay_out(
            self._arguments, self.rule.arguments, variables, self.penalize, self._use_weight_decay
        )
        super().build(variables)
        self._slots = [
            [
                self.add_variable_from_reference(v, slot, Constant(self.rule.initial_slot))
                for slot in self.rule.slots
            ]
            for v in variables
        ]
        self._add_tuned_variables()
        self._tuning_state.after_build()

    def _add_tuned_variables(self) -> None:
        epochs, steps = self.horizon
        raw = [
            self.add_variable(
                shape=(group.spec.blocks(epochs, steps), *group.shape),
                initializer=Constant(group.domain.raw(group.initial)),
                dtype=group.dtype,
                name="_".join((group.argument, group.key, group.variable or ""))
                .strip("_")
                .replace("/", "_"),
            )
            for group in self.groups
        ]
        position = self.add_variable((), dtype="int64", name="position")
        steps = self.add_variable((), Constant(steps), dtype="int64", name="horizon_steps")
        # `TuningState` saves these: a checkpoint would hold on to variables of one shape.
        self._hide_from_checkpoints(_raw=raw, _position=position, _horizon_steps=steps)

    def _hide_from_checkpoints(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            if name in vars(self):
                delattr(self, name)  # TensorFlow's note of it as well
            self.__dict__[name] = value

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
        position = within_horizon(position, steps)
        values = []
        for group, raw in zip(self.groups, self._raw, strict=True):
            at = block_of(position, raw.shape[0], steps)
            values.append(group.domain.value(tf.gather(tf.convert_to_tensor(raw.value), at)))
        return values

    def pure_update(
        self,
        weights: Sequence[tf.Tensor],
        slots: Sequence[rules.Slots],
        gradients: Sequence[tf.Tensor | None],
        values: Sequence[tf.Tensor],
        learning_rate: tf.Tensor,
        t: tf.Tensor,
        spread: bool = False,
    ) -> tuple[list[tf.Tensor], list[rules.Slots]]:
        """The update as a pure function: what `apply` does, and what the reverse loop walks back.

        Args:
            weights, slots, gradients: Of each trainable variable.
            values: Of each group, its values at this step (see `values_at`).
            learning_rate: The scalar learning rate, which counts where it is not tuned.
            t: The number of this update, from 1.
            spread: Whether it will be differentiated under XLA (see `keras_drmad.sums`).
                Defaults to `False`.

        Returns:
            The new weights and the new slots.
        """
        return rules.update(
            self.rule,
            weights,
            slots,
            gradients,
            [self._values_of(i, w, values, learning_rate, spread) for i, w in enumerate(weights)],
            t,
            [getattr(v, "constraint", None) for v in self._trainable_variables],
        )

    def _values_of(
        self,
        i: int,
        weight: tf.Tensor,
        values: Sequence[tf.Tensor],
        learning_rate: tf.Tensor,
        spread: bool,
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
            result["learning_rate"] = tf.cast(learning_rate, weight.dtype)
        for name, place in self._places[i].items():
            value = tf.cast(tf.reshape(values[place.group], place.shape), weight.dtype)
            multiplies = name in ("learning_rate", *_COMMON)
            result[name] = sums.spread(value, weight.shape) if spread and multiplies else value
        return result

    def apply(self, grads, trainable_variables=None) -> None:
        """Update the variables by their gradients (called by `model.fit`)."""
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
            with tf.init_scope():  # what was loaded is assigned now, not at each step of a graph
                self.build(trainable_variables)
        self._tuning_state.in_use = True
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
        if not self._rate_is_ours:
            return self._get_current_learning_rate()
        if not self.built:
            # A copy: what is assigned to Keras's own variable would be of no effect.
            return tf.identity(self._get_current_learning_rate())
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
        self._tuning_state.attach(run)

    def detach(self) -> None:
        """The run has come to its end: what is loaded from now on is for the next one."""
        self._tuning_state.detach()

    def forget_run(self) -> None:
        """Drop a loaded tuning run: the next callback begins a new one with the values of now."""
        self._tuning_state.forget_run()

    def save_own_variables(self, store: Any) -> None:
        variables = {str(i): variable for i, variable in enumerate(self.variables)}
        for key, array in self._tuning_state.saved(variables).items():
            store[key] = array

    def load_own_variables(self, store: Any) -> None:
        self._tuning_state.load({key: np.array(store[key]) for key in store.keys()})

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
