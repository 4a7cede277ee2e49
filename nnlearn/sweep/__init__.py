"""Many runs in one program: grids, random search, successive halving, populations."""

from nnlearn.sweep.results import Plan as Plan
from nnlearn.sweep.results import Results as Results
from nnlearn.sweep.results import Score as Score
from nnlearn.sweep.space import choice as choice
from nnlearn.sweep.space import list_settings as list_settings
from nnlearn.sweep.space import log_uniform as log_uniform
from nnlearn.sweep.space import uniform as uniform
from nnlearn.sweep.sweep import SweepInterrupted as SweepInterrupted
from nnlearn.sweep.sweep import sweep as sweep
