"""Schedules: functions from a step count to a value, such as a learning rate.

Every numeric setting may be a Python number, an array or a tracer. So a schedule can be compiled once for all its
settings, vmapped over them and differentiated with respect to them. Counts below 0 are treated as 0. Values are
float32, or float64 if a setting or JAX's default is.
"""

from nnlearn.schedules.basic import constant_schedule as constant_schedule
from nnlearn.schedules.basic import exponential_decay as exponential_decay
from nnlearn.schedules.basic import linear_schedule as linear_schedule
from nnlearn.schedules.basic import polynomial_schedule as polynomial_schedule
from nnlearn.schedules.cosine import cosine_annealing_schedule as cosine_annealing_schedule
from nnlearn.schedules.cosine import cosine_decay_schedule as cosine_decay_schedule
from nnlearn.schedules.join import join_schedules as join_schedules
from nnlearn.schedules.piecewise import cosine_onecycle_schedule as cosine_onecycle_schedule
from nnlearn.schedules.piecewise import linear_onecycle_schedule as linear_onecycle_schedule
from nnlearn.schedules.piecewise import piecewise_constant_schedule as piecewise_constant_schedule
from nnlearn.schedules.piecewise import piecewise_interpolate_schedule as piecewise_interpolate_schedule
from nnlearn.schedules.restarts import (
    cosine_annealing_warm_restarts_schedule as cosine_annealing_warm_restarts_schedule,
)
from nnlearn.schedules.restarts import sgdr_schedule as sgdr_schedule
from nnlearn.schedules.view import plot as plot
from nnlearn.schedules.view import preview as preview
from nnlearn.schedules.warmup import inverse_square_root_schedule as inverse_square_root_schedule
from nnlearn.schedules.warmup import warmup_constant_schedule as warmup_constant_schedule
from nnlearn.schedules.warmup import warmup_cosine_decay_schedule as warmup_cosine_decay_schedule
from nnlearn.schedules.warmup import warmup_exponential_decay_schedule as warmup_exponential_decay_schedule
from nnlearn.schedules.warmup import warmup_stable_decay_schedule as warmup_stable_decay_schedule
