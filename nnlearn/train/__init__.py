"""Training as pure functions: one step, epochs of steps, whole runs."""

from nnlearn.train.epoch import make_epoch as make_epoch
from nnlearn.train.evaluation import evaluation as evaluation
from nnlearn.train.hypergrad import hyper_value_and_grad as hyper_value_and_grad
from nnlearn.train.packable import packing_difference as packing_difference
from nnlearn.train.policy import Policy as Policy
from nnlearn.train.run import Run as Run
from nnlearn.train.run import Train as Train
from nnlearn.train.run import make_train as make_train
from nnlearn.train.sampler import Sampler as Sampler
from nnlearn.train.sampler import generated as generated
from nnlearn.train.sampler import shuffled as shuffled
from nnlearn.train.state import TrainState as TrainState
from nnlearn.train.state import init_state as init_state
from nnlearn.train.step import Info as Info
from nnlearn.train.step import jit_step as jit_step
from nnlearn.train.step import make_step as make_step
from nnlearn.train.stopping import StopRule as StopRule
from nnlearn.train.stopping import converged as converged
from nnlearn.train.stopping import diverged as diverged
from nnlearn.train.stopping import keep_best as keep_best
from nnlearn.train.stopping import patience as patience
from nnlearn.train.stopping import reached as reached
from nnlearn.train.trace import Trace as Trace
