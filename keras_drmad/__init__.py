"""Hyperparameters tuned by gradient while `model.fit` runs."""

from keras_drmad import layers as layers
from keras_drmad import losses as losses
from keras_drmad import optimizers as optimizers
from keras_drmad import plots as plots
from keras_drmad import reports as reports
from keras_drmad import rules as rules
from keras_drmad import schedules as schedules
from keras_drmad import tensorboard as tensorboard
from keras_drmad import trajectories as trajectories
from keras_drmad.callback import DrMADCallback as DrMADCallback
from keras_drmad.hyperparameter_files import load_hyperparameters as load_hyperparameters
from keras_drmad.hyperparameter_files import save_hyperparameters as save_hyperparameters
from keras_drmad.hyperparameters import Hyperparameter as Hyperparameter
from keras_drmad.inspection import ModelReport as ModelReport
from keras_drmad.inspection import check_model as check_model
from keras_drmad.reports import Record as Record
from keras_drmad.sample_weights import SampleWeights as SampleWeights
from keras_drmad.tunable import tunable as tunable
from keras_drmad.verify import hypergradients as hypergradients
from keras_drmad.verify import verify_hypergradients as verify_hypergradients

__version__ = "0.1.0"
