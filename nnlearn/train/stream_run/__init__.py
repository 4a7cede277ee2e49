"""The host-driven run: any stream of batches, prefetched, with callbacks, progress, history and a clean end."""

from nnlearn.train.stream_run.callbacks import Event as Event
from nnlearn.train.stream_run.callbacks import every as every
from nnlearn.train.stream_run.fit import fit as fit
from nnlearn.train.stream_run.loggers import tensorboard as tensorboard
from nnlearn.train.stream_run.loggers import wandb_offline as wandb_offline
from nnlearn.train.stream_run.running import FitResult as FitResult
