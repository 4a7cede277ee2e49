"""Many runs in one program: grids, random search, successive halving, populations."""

from nnlearn.sweep.halving import Halving as Halving
from nnlearn.sweep.halving import Rung as Rung
from nnlearn.sweep.halving import plan_rungs as plan_rungs
from nnlearn.sweep.halving import successive_halving as successive_halving
from nnlearn.sweep.population import Population as Population
from nnlearn.sweep.population import train_population as train_population
from nnlearn.sweep.results import Plan as Plan
from nnlearn.sweep.results import Results as Results
from nnlearn.sweep.results import Score as Score
from nnlearn.sweep.space import choice as choice
from nnlearn.sweep.space import list_settings as list_settings
from nnlearn.sweep.space import log_uniform as log_uniform
from nnlearn.sweep.space import uniform as uniform
from nnlearn.sweep.sweep import SweepInterrupted as SweepInterrupted
from nnlearn.sweep.sweep import sweep as sweep
