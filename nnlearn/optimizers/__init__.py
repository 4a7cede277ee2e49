"""Optimizers: each a few lines that chain transformations, with optax's arguments. The only list of their names."""

from nnlearn.optimizers.adafactor import adafactor as adafactor
from nnlearn.optimizers.adafactor import scale_by_factored_rms as scale_by_factored_rms
from nnlearn.optimizers.adafactor import scale_by_param_block_rms as scale_by_param_block_rms
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
from nnlearn.optimizers.ademamix import ademamix as ademamix
from nnlearn.optimizers.ademamix import scale_by_ademamix as scale_by_ademamix
from nnlearn.optimizers.layerwise import lamb as lamb
from nnlearn.optimizers.layerwise import lars as lars
from nnlearn.optimizers.lion import lion as lion
from nnlearn.optimizers.lookahead import lookahead as lookahead
from nnlearn.optimizers.muon import muon as muon
from nnlearn.optimizers.muon import scale_by_muon as scale_by_muon
from nnlearn.optimizers.muon import scale_by_shape as scale_by_shape
from nnlearn.optimizers.sgd import sgd as sgd
from nnlearn.optimizers.sgd import sign_sgd as sign_sgd

# The names above, without the modules that they come from: `from nnlearn.optimizers import *` makes the root's index.
globals()["__all__"] = [name for name, value in list(globals().items()) if name[0] != "_" and callable(value)]
