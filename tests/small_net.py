"""The oracle's net as a Keras model, trained by a real `fit` with the callback."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
import oracle

import keras_drmad as kd


@dataclass(frozen=True)
class Fitted:
    """One fit, and what is needed to do it again."""

    model: keras.Model
    callback: kd.DrMADCallback
    saved: list  # (variable, value) of model and optimizer, before the fit

    @property
    def record(self) -> kd.Record:
        return self.callback.history[-1]

    def restore(self) -> None:
        for variable, value in self.saved:
            variable.assign(value)

    def train(self, callbacks=()) -> None:
        (x, y), _ = oracle.data()
        self.model.fit(
            x, y, oracle.BATCH, oracle.EPOCHS, shuffle=False, verbose=0, callbacks=list(callbacks)
        )


def fit(grain: oracle.Grain, optimizer=None, **options) -> Fitted:
    """Fit the oracle's net once, tuning all five arguments of SGD at values that all differ."""

    def tuned(initial):
        return kd.Hyperparameter(initial, per=grain.per, over=grain.over)

    model = keras.Sequential(
        [
            keras.Input((oracle.FEATURES,)),
            keras.layers.Dense(oracle.HIDDEN, "tanh", name="first"),
            keras.layers.Dense(oracle.CLASSES, name="second"),
        ]
    )
    model.set_weights(oracle.start_weights())
    sgd = kd.optimizers.SGD(
        learning_rate=tuned(0.3),
        momentum=tuned(0.8),
        l1=tuned(0.01),
        l2=tuned(0.02),
        weight_decay=tuned(0.03),
        **(optimizer or {}),
    )
    model.compile(sgd, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    sgd.build(model.trainable_variables)
    sgd.set_horizon(oracle.EPOCHS, oracle.STEPS)
    rng = np.random.default_rng(3)
    for raw in sgd.raw_variables:
        raw.assign_add(rng.normal(0.0, 0.3, raw.shape))
    saved = [(v, v.numpy()) for v in [*model.variables, *sgd.variables]]
    _, hyper = oracle.data()
    callback = kd.DrMADCallback(hyper, horizon=oracle.EPOCHS, **options)
    fitted = Fitted(model, callback, saved)
    fitted.train([callback])
    return fitted
