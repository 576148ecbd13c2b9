"""What a run tunes, of every kind, in one order: records, names and the outer update follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_drmad.estimator import Hypergradients
from keras_drmad.hyperparameters import Group
from keras_drmad.initial_scale import InitialScale
from keras_drmad.outer import Tuned
from keras_drmad.reports import Label


class SearchSpace:
    """The optimizer's hyperparameters, then the initial scale's, then single variables.

    Args:
        variables: Variables of the model or its loss (see `outer.tuned_variables`).
        scale: The scale of the initial weights, if that is tuned.
    """

    def __init__(self, variables: list[Tuned], scale: InitialScale | None):
        self.variables, self.scale = variables, scale
        self.targets = [t.target for t in variables if t.target is not None]

    def groups(self, model: keras.Model) -> list[tuple[keras.Variable, Group]]:
        """Raw variables and what they hold, those that stand still included."""
        optimizer = model.optimizer
        found = list(zip(optimizer.raw_variables, optimizer.groups, strict=True))
        if self.scale is not None:
            found += zip(self.scale.raw(model), self.scale.groups(model), strict=True)
        return found

    def moved(self, model: keras.Model) -> list[Tuned]:
        """What the outer optimizer moves."""
        groups = self.groups(model)
        return [Tuned(raw, g.domain) for raw, g in groups if g.spec.tunable] + self.variables

    def labels(self, model: keras.Model) -> Sequence[Label]:
        """Where each array stands in a record."""
        return [
            *(
                Label(g.argument, g.key, g.variable, g.spec.over != "run", g.spec.per)
                for _, g in self.groups(model)
            ),
            *(Label(v.path, "model", None, False) for v in self.targets),
        ]

    def values(self, model: keras.Model) -> list[Any]:
        """The current values, in the order of the labels."""
        scales = [] if self.scale is None else self.scale.values(model)
        return [*model.optimizer.values(), *scales, *(v.value[None] for v in self.targets)]

    def hypergradients(self, model: keras.Model, estimate: Hypergradients) -> list[Any]:
        """Derivatives by these values, in the order of the labels."""
        return [*self._by_groups(model, estimate), *(h[None] for h in estimate.tuned)]

    def moved_hypergradients(self, model: keras.Model, estimate: Hypergradients) -> list[Any]:
        """Derivatives by the values of what is moved."""
        pairs = zip(self.groups(model), self._by_groups(model, estimate), strict=True)
        return [*(h for (_, group), h in pairs if group.spec.tunable), *estimate.tuned]

    def _by_groups(self, model: keras.Model, estimate: Hypergradients) -> list[Any]:
        scale = self.scale
        by_scale = [] if scale is None else scale.hypergradients(model, estimate.weights)
        return [*estimate.values, *by_scale]
