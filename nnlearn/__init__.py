"""nnlearn: optimisation and training in JAX, a whole run as one pure function, in optax's protocol."""

import typing as _typing

from nnlearn import checkpoints as checkpoints
from nnlearn import data as data
from nnlearn import distributed as distributed
from nnlearn import losses as losses
from nnlearn import optimizers as optimizers
from nnlearn import packing as packing
from nnlearn import schedules as schedules
from nnlearn import serialization as serialization
from nnlearn import sharding as sharding
from nnlearn import stream as stream
from nnlearn import train as train
from nnlearn import transforms as transforms
from nnlearn.borrowed import *  # noqa: F403
from nnlearn.gradients.curvature import adam_preconditioner as adam_preconditioner
from nnlearn.gradients.curvature import best_fixed_rate as best_fixed_rate
from nnlearn.gradients.curvature import extreme_eigenvalues as extreme_eigenvalues
from nnlearn.gradients.curvature import filter_normalized as filter_normalized
from nnlearn.gradients.curvature import gauss_newton_product as gauss_newton_product
from nnlearn.gradients.curvature import hessian_product as hessian_product
from nnlearn.gradients.curvature import hutchinson_trace as hutchinson_trace
from nnlearn.gradients.curvature import lanczos as lanczos
from nnlearn.gradients.curvature import loss_along as loss_along
from nnlearn.gradients.curvature import loss_on_plane as loss_on_plane
from nnlearn.gradients.curvature import sharpness as sharpness
from nnlearn.gradients.curvature import spectral_density as spectral_density
from nnlearn.gradients.noise_scale import batch_cost as batch_cost
from nnlearn.losses import absolute_error as absolute_error
from nnlearn.losses import batch_hard_triplet_loss as batch_hard_triplet_loss
from nnlearn.losses import binary_dice_loss as binary_dice_loss
from nnlearn.losses import convex_kl_divergence as convex_kl_divergence
from nnlearn.losses import cosine_distance as cosine_distance
from nnlearn.losses import cosine_similarity as cosine_similarity
from nnlearn.losses import cross_entropy as cross_entropy
from nnlearn.losses import ctc_beam_search_decode as ctc_beam_search_decode
from nnlearn.losses import ctc_greedy_decode as ctc_greedy_decode
from nnlearn.losses import ctc_loss as ctc_loss
from nnlearn.losses import dice_loss as dice_loss
from nnlearn.losses import gaussian_kl_divergence as gaussian_kl_divergence
from nnlearn.losses import gaussian_negative_log_likelihood as gaussian_negative_log_likelihood
from nnlearn.losses import generalized_kl_divergence as generalized_kl_divergence
from nnlearn.losses import hinge_loss as hinge_loss
from nnlearn.losses import huber_loss as huber_loss
from nnlearn.losses import info_nce_loss as info_nce_loss
from nnlearn.losses import iou_loss as iou_loss
from nnlearn.losses import kl_divergence as kl_divergence
from nnlearn.losses import kl_divergence_with_log_targets as kl_divergence_with_log_targets
from nnlearn.losses import l2_loss as l2_loss
from nnlearn.losses import linear_cross_entropy as linear_cross_entropy
from nnlearn.losses import list_mle_loss as list_mle_loss
from nnlearn.losses import log_cosh as log_cosh
from nnlearn.losses import make_fenchel_young_loss as make_fenchel_young_loss
from nnlearn.losses import margin_ranking_loss as margin_ranking_loss
from nnlearn.losses import mean_absolute_error as mean_absolute_error
from nnlearn.losses import mean_squared_error as mean_squared_error
from nnlearn.losses import multiclass_generalized_dice_loss as multiclass_generalized_dice_loss
from nnlearn.losses import multiclass_hinge_loss as multiclass_hinge_loss
from nnlearn.losses import multiclass_perceptron_loss as multiclass_perceptron_loss
from nnlearn.losses import multiclass_sparsemax_loss as multiclass_sparsemax_loss
from nnlearn.losses import negative_evidence_lower_bound as negative_evidence_lower_bound
from nnlearn.losses import ntxent as ntxent
from nnlearn.losses import pairwise_logistic_loss as pairwise_logistic_loss
from nnlearn.losses import perceptron_loss as perceptron_loss
from nnlearn.losses import poisson_negative_log_likelihood as poisson_negative_log_likelihood
from nnlearn.losses import poly_loss_cross_entropy as poly_loss_cross_entropy
from nnlearn.losses import quantile_loss as quantile_loss
from nnlearn.losses import ranking_softmax_loss as ranking_softmax_loss
from nnlearn.losses import safe_softmax_cross_entropy as safe_softmax_cross_entropy
from nnlearn.losses import sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy
from nnlearn.losses import sigmoid_focal_loss as sigmoid_focal_loss
from nnlearn.losses import sigmoid_pair_loss as sigmoid_pair_loss
from nnlearn.losses import smooth_labels as smooth_labels
from nnlearn.losses import softmax_cross_entropy as softmax_cross_entropy
from nnlearn.losses import softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels
from nnlearn.losses import sparsemax as sparsemax
from nnlearn.losses import sparsemax_loss as sparsemax_loss
from nnlearn.losses import squared_error as squared_error
from nnlearn.losses import supervised_contrastive_loss as supervised_contrastive_loss
from nnlearn.losses import triplet_margin_loss as triplet_margin_loss
from nnlearn.losses import tversky_loss as tversky_loss
from nnlearn.native import native_kernels as native_kernels
from nnlearn.native import native_status as native_status
from nnlearn.optimizers import *  # noqa: F403
from nnlearn.optimizers.citation import citation as citation
from nnlearn.packing import Packed as Packed
from nnlearn.packing import leaf_norms as leaf_norms
from nnlearn.packing import map_stacks as map_stacks
from nnlearn.packing import pack as pack
from nnlearn.packing import per_buffer as per_buffer
from nnlearn.packing import unpack as unpack
from nnlearn.programs.facts import Inspection as Inspection
from nnlearn.programs.facts import inspect_function as inspect_function
from nnlearn.programs.nonfinite import Origin as Origin
from nnlearn.programs.nonfinite import find_nonfinite as find_nonfinite
from nnlearn.programs.taps import Activation as Activation
from nnlearn.programs.taps import activations as activations
from nnlearn.schedules import constant_schedule as constant_schedule
from nnlearn.schedules import cosine_annealing_schedule as cosine_annealing_schedule
from nnlearn.schedules import cosine_annealing_warm_restarts_schedule as cosine_annealing_warm_restarts_schedule
from nnlearn.schedules import cosine_decay_schedule as cosine_decay_schedule
from nnlearn.schedules import cosine_onecycle_schedule as cosine_onecycle_schedule
from nnlearn.schedules import exponential_decay as exponential_decay
from nnlearn.schedules import inverse_square_root_schedule as inverse_square_root_schedule
from nnlearn.schedules import join_schedules as join_schedules
from nnlearn.schedules import linear_onecycle_schedule as linear_onecycle_schedule
from nnlearn.schedules import linear_schedule as linear_schedule
from nnlearn.schedules import piecewise_constant_schedule as piecewise_constant_schedule
from nnlearn.schedules import piecewise_interpolate_schedule as piecewise_interpolate_schedule
from nnlearn.schedules import polynomial_schedule as polynomial_schedule
from nnlearn.schedules import sgdr_schedule as sgdr_schedule
from nnlearn.schedules import warmup_constant_schedule as warmup_constant_schedule
from nnlearn.schedules import warmup_cosine_decay_schedule as warmup_cosine_decay_schedule
from nnlearn.schedules import warmup_exponential_decay_schedule as warmup_exponential_decay_schedule
from nnlearn.schedules import warmup_stable_decay_schedule as warmup_stable_decay_schedule
from nnlearn.sharding import make_mesh as make_mesh
from nnlearn.stream import FaultError as FaultError
from nnlearn.stream import FitResult as FitResult
from nnlearn.stream import RollBack as RollBack
from nnlearn.stream import fit as fit
from nnlearn.stream import run as run
from nnlearn.train import Info as Info
from nnlearn.train import Policy as Policy
from nnlearn.train import StopRule as StopRule
from nnlearn.train import Trace as Trace
from nnlearn.train import Train as Train
from nnlearn.train import TrainState as TrainState
from nnlearn.train import apply_accumulated as apply_accumulated
from nnlearn.train import apply_gradients as apply_gradients
from nnlearn.train import clipped_value_and_grad as clipped_value_and_grad
from nnlearn.train import converged as converged
from nnlearn.train import diverged as diverged
from nnlearn.train import evaluation as evaluation
from nnlearn.train import generated as generated
from nnlearn.train import hyper_value_and_grad as hyper_value_and_grad
from nnlearn.train import init_state as init_state
from nnlearn.train import jit_step as jit_step
from nnlearn.train import keep_best as keep_best
from nnlearn.train import make_epoch as make_epoch
from nnlearn.train import make_step as make_step
from nnlearn.train import make_train as make_train
from nnlearn.train import noise_scale_from_batches as noise_scale_from_batches
from nnlearn.train import noise_scale_from_examples as noise_scale_from_examples
from nnlearn.train import packing_difference as packing_difference
from nnlearn.train import patience as patience
from nnlearn.train import per_example_grads as per_example_grads
from nnlearn.train import per_example_norms as per_example_norms
from nnlearn.train import pmap_step as pmap_step
from nnlearn.train import poisson_sampled as poisson_sampled
from nnlearn.train import reached as reached
from nnlearn.train import replicate as replicate
from nnlearn.train import shuffled as shuffled
from nnlearn.train import skip_budget as skip_budget
from nnlearn.train import split_over_devices as split_over_devices
from nnlearn.train import state_shardings as state_shardings
from nnlearn.train import unreplicate as unreplicate
from nnlearn.transforms import *  # noqa: F403
from nnlearn.tree import global_norm as global_norm
from nnlearn.types import EmptyState as EmptyState
from nnlearn.types import GradientTransformation as GradientTransformation
from nnlearn.types import GradientTransformationExtraArgs as GradientTransformationExtraArgs
from nnlearn.types import MaskedNode as MaskedNode
from nnlearn.types import Model as Model
from nnlearn.types import StatefulModel as StatefulModel

serialization.register_for_export()

__version__ = "0.1.0"


# Aliases of names in `nnlearn.stream`. Type checkers do not see them, because `train` cannot import `stream`.
for _name in ("Event", "FitResult", "every", "fit", "tensorboard", "wandb_offline"):
    setattr(train, _name, getattr(stream, _name))


# Imported at first use: name -> module. They are a third of the import time, and many programs need none of them.
_LAZY = {name: f"nnlearn.{name}" for name in ("datasets", "models", "report", "sweeps", "tasks")}
_LAZY |= {"sweep": "nnlearn.sweeps", "find_learning_rate": "nnlearn.sweeps"}
_LAZY |= {"Task": "nnlearn.tasks", "load_task": "nnlearn.tasks"}
_LAZY |= dict.fromkeys(("diagnose", "diagnose_trace", "preflight", "repair"), "nnlearn.diagnose")

if _typing.TYPE_CHECKING:
    from nnlearn import datasets as datasets
    from nnlearn import models as models
    from nnlearn import report as report
    from nnlearn import sweeps as sweeps
    from nnlearn import tasks as tasks
    from nnlearn.diagnose import diagnose as diagnose
    from nnlearn.diagnose import diagnose_trace as diagnose_trace
    from nnlearn.diagnose import preflight as preflight
    from nnlearn.diagnose import repair as repair
    from nnlearn.sweeps import find_learning_rate as find_learning_rate
    from nnlearn.sweeps import sweep as sweep
    from nnlearn.tasks import Task as Task
    from nnlearn.tasks import load_task as load_task


def __dir__() -> list[str]:
    """The public names, without internal modules."""
    inner = {"borrowed", "calls", "checks", "cli", "extras", "figures", "files", "programs", "settings"}
    inner |= {"commands", "machine", "sums", "tree"}
    return sorted(name for name in {*globals(), *_LAZY} - inner if not (name[0] == "_" and name[1] != "_"))


def _load(name: str) -> object:
    """Import a name of ``_LAZY``; otherwise raise ``AttributeError`` and say where the name is, or which is nearest."""
    import difflib
    import importlib

    if name in _LAZY:
        module = importlib.import_module(_LAZY[name])
        value = module if module.__name__ == f"nnlearn.{name}" else getattr(module, name)
        globals()[name] = value
        return value

    import optax
    import optax.contrib

    cure = ""
    if not name.startswith("_"):
        rooms = {f"nnlearn.{room}.": f"nnlearn.{room}" for room in ("models", "sweeps", "stream", "train")}
        parts = {place: importlib.import_module(module) for place, module in rooms.items()}
        parts |= {"optax.": optax, "optax.contrib.": optax.contrib, "optax.tree.": optax.tree}
        places = [f"{place}{name}" for place, part in parts.items() if hasattr(part, name)]
        near = difflib.get_close_matches(name.lower(), [known for known in __dir__() if known[0] != "_"], 1)
        if places:
            cure = f": use {places[0]}" + (", which works inside nnlearn" if places[0].startswith("optax") else "")
        elif near:
            cure = f"; did you mean nnlearn.{near[0]}?"
    raise AttributeError(f"module 'nnlearn' has no attribute {name!r}{cure}")


if not _typing.TYPE_CHECKING:  # with a __getattr__, type checkers would accept any name
    __getattr__ = _load
