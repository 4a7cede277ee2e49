"""Networks written in flax or equinox as ``Model`` or ``StatefulModel``; neither package is imported before it is used.

An adapter is a convenience, not a need: a ``loss_fn`` that calls the module itself trains as well.
"""

from nnlearn.models.adapters.equinox import from_equinox as from_equinox
from nnlearn.models.adapters.linen import from_linen as from_linen
from nnlearn.models.adapters.nnx import from_nnx as from_nnx
