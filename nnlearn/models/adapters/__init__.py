"""Adapters from flax and equinox modules to ``Model`` or ``StatefulModel``; the packages are imported on use.

Adapters are optional: a ``loss_fn`` that calls the module itself works as well.
"""

from nnlearn.models.adapters.equinox import from_equinox as from_equinox
from nnlearn.models.adapters.linen import from_linen as from_linen
from nnlearn.models.adapters.nnx import from_nnx as from_nnx
