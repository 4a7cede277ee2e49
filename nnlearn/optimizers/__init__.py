"""Optimizers: each a few lines that chain transformations, with optax's arguments."""

from nnlearn.optimizers.adam import adabelief as adabelief
from nnlearn.optimizers.adam import adam as adam
from nnlearn.optimizers.adam import adamax as adamax
from nnlearn.optimizers.adam import adamaxw as adamaxw
from nnlearn.optimizers.adam import adamw as adamw
from nnlearn.optimizers.adam import amsgrad as amsgrad
from nnlearn.optimizers.adam import nadam as nadam
from nnlearn.optimizers.adam import nadamw as nadamw
from nnlearn.optimizers.adam import radam as radam
from nnlearn.optimizers.adam import yogi as yogi
from nnlearn.optimizers.adaptive import adadelta as adadelta
from nnlearn.optimizers.adaptive import adagrad as adagrad
from nnlearn.optimizers.adaptive import rmsprop as rmsprop
from nnlearn.optimizers.layerwise import lamb as lamb
from nnlearn.optimizers.layerwise import lars as lars
from nnlearn.optimizers.lion import lion as lion
from nnlearn.optimizers.sgd import sgd as sgd
from nnlearn.optimizers.sgd import sign_sgd as sign_sgd
