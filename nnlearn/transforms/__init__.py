"""Gradient transformations: each an array kernel with its equation, and thin plumbing. The only list of their names."""

from nnlearn.transforms.accumulate import MultiSteps as MultiSteps
from nnlearn.transforms.adam import scale_by_adam as scale_by_adam
from nnlearn.transforms.adam import scale_by_adamax as scale_by_adamax
from nnlearn.transforms.adam import scale_by_amsgrad as scale_by_amsgrad
from nnlearn.transforms.adam import scale_by_belief as scale_by_belief
from nnlearn.transforms.adam import scale_by_radam as scale_by_radam
from nnlearn.transforms.adam import scale_by_yogi as scale_by_yogi
from nnlearn.transforms.adaptive import scale_by_adadelta as scale_by_adadelta
from nnlearn.transforms.adaptive import scale_by_rms as scale_by_rms
from nnlearn.transforms.adaptive import scale_by_rss as scale_by_rss
from nnlearn.transforms.adaptive import scale_by_stddev as scale_by_stddev
from nnlearn.transforms.average import AverageParamsState as AverageParamsState
from nnlearn.transforms.average import average_params as average_params
from nnlearn.transforms.average import averaged_params as averaged_params
from nnlearn.transforms.clipping import adaptive_grad_clip as adaptive_grad_clip
from nnlearn.transforms.clipping import centralize as centralize
from nnlearn.transforms.clipping import clip as clip
from nnlearn.transforms.clipping import clip_by_block_rms as clip_by_block_rms
from nnlearn.transforms.clipping import clip_by_global_norm as clip_by_global_norm
from nnlearn.transforms.decay import add_decayed_weights as add_decayed_weights
from nnlearn.transforms.decay import add_noise as add_noise
from nnlearn.transforms.decay import freeze as freeze
from nnlearn.transforms.groups import by_label as by_label
from nnlearn.transforms.guard import apply_if_finite as apply_if_finite
from nnlearn.transforms.guard import skip_large_updates as skip_large_updates
from nnlearn.transforms.guard import skip_not_finite as skip_not_finite
from nnlearn.transforms.hyperparams import get_hyperparams as get_hyperparams
from nnlearn.transforms.hyperparams import inject_hyperparams as inject_hyperparams
from nnlearn.transforms.hyperparams import set_hyperparams as set_hyperparams
from nnlearn.transforms.loss_scale import DynamicLossScaleState as DynamicLossScaleState
from nnlearn.transforms.loss_scale import current_loss_scale as current_loss_scale
from nnlearn.transforms.loss_scale import dynamic_loss_scale as dynamic_loss_scale
from nnlearn.transforms.momentum import ema as ema
from nnlearn.transforms.momentum import scale_by_lion as scale_by_lion
from nnlearn.transforms.momentum import scale_by_sign as scale_by_sign
from nnlearn.transforms.momentum import trace as trace
from nnlearn.transforms.monitor import LayerStats as LayerStats
from nnlearn.transforms.monitor import MonitorLayersState as MonitorLayersState
from nnlearn.transforms.monitor import monitor_layers as monitor_layers
from nnlearn.transforms.plumbing import from_kernel as from_kernel
from nnlearn.transforms.precision import MasterParamsState as MasterParamsState
from nnlearn.transforms.precision import assemble as assemble
from nnlearn.transforms.scaling import ScaleByLearningRateState as ScaleByLearningRateState
from nnlearn.transforms.scaling import scale as scale
from nnlearn.transforms.scaling import scale_by_learning_rate as scale_by_learning_rate
from nnlearn.transforms.scaling import scale_by_schedule as scale_by_schedule
from nnlearn.transforms.scaling import scale_by_trust_ratio as scale_by_trust_ratio
from nnlearn.transforms.skipping import skip_whole as skip_whole
from nnlearn.transforms.skipping import was_skipped as was_skipped
from nnlearn.transforms.spikes import SkipSpikesState as SkipSpikesState
from nnlearn.transforms.spikes import skip_spikes as skip_spikes
from nnlearn.transforms.storage import Slot as Slot
from nnlearn.transforms.wrapping import by_leaf as by_leaf

# The names above, without the modules that they come from: `from nnlearn.transforms import *` makes the root's index.
globals()["__all__"] = [name for name, value in list(globals().items()) if name[0] != "_" and callable(value)]
