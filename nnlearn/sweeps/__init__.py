"""Many runs in one program: grids, random search, successive halving, populations."""

from nnlearn.sweeps.grid import SweepInterrupted as SweepInterrupted
from nnlearn.sweeps.grid import sweep as sweep
from nnlearn.sweeps.halving import Halving as Halving
from nnlearn.sweeps.halving import Rung as Rung
from nnlearn.sweeps.halving import plan_rungs as plan_rungs
from nnlearn.sweeps.halving import successive_halving as successive_halving
from nnlearn.sweeps.learning_rate import LearningRates as LearningRates
from nnlearn.sweeps.learning_rate import find_learning_rate as find_learning_rate
from nnlearn.sweeps.population import Population as Population
from nnlearn.sweeps.population import train_population as train_population
from nnlearn.sweeps.results import Execution as Execution
from nnlearn.sweeps.results import Results as Results
from nnlearn.sweeps.results import Score as Score
from nnlearn.sweeps.space import choice as choice
from nnlearn.sweeps.space import list_settings as list_settings
from nnlearn.sweeps.space import log_uniform as log_uniform
from nnlearn.sweeps.space import uniform as uniform
