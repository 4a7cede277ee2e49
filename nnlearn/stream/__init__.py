"""The host-driven run: any stream of batches, prefetched, with callbacks, progress, history and a clean end."""

from nnlearn.stream.callbacks import Event as Event
from nnlearn.stream.callbacks import every as every
from nnlearn.stream.durable import run as run
from nnlearn.stream.fit import fit as fit
from nnlearn.stream.loggers import tensorboard as tensorboard
from nnlearn.stream.loggers import wandb_offline as wandb_offline
from nnlearn.stream.loop import FitResult as FitResult
from nnlearn.stream.rollback import FaultError as FaultError
from nnlearn.stream.rollback import RollBack as RollBack
