"""Training: one step, and epochs of steps, as pure functions."""

from nnlearn.train.epoch import make_epoch as make_epoch
from nnlearn.train.packable import packing_difference as packing_difference
from nnlearn.train.policy import Policy as Policy
from nnlearn.train.state import TrainState as TrainState
from nnlearn.train.state import init_state as init_state
from nnlearn.train.step import Info as Info
from nnlearn.train.step import jit_step as jit_step
from nnlearn.train.step import make_step as make_step
