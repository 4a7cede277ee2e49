"""Checkpoints: any pytree on the disk, complete or not there, and checked to the bit when it is loaded."""

from nnlearn.checkpoints.errors import CheckpointError as CheckpointError
from nnlearn.checkpoints.folder import load as load
from nnlearn.checkpoints.folder import read_metadata as read_metadata
from nnlearn.checkpoints.folder import save as save
from nnlearn.checkpoints.folder import verify as verify
from nnlearn.checkpoints.formats import export_msgpack as export_msgpack
from nnlearn.checkpoints.formats import export_orbax as export_orbax
from nnlearn.checkpoints.formats import export_safetensors as export_safetensors
from nnlearn.checkpoints.formats import import_msgpack as import_msgpack
from nnlearn.checkpoints.formats import import_orbax as import_orbax
from nnlearn.checkpoints.formats import import_safetensors as import_safetensors
from nnlearn.checkpoints.manager import Checkpoints as Checkpoints
from nnlearn.checkpoints.restore import LoadReport as LoadReport
