"""Networks as pairs of pure functions, ``init(key) -> params`` and ``apply(params, inputs, key=None) -> outputs``.

A key means training, and dropout is active; no key means inference. Parameters are nested dicts and tuples under the
field's names (``kernel`` of shape (inputs, outputs), ``bias``, ``scale``). Equal settings make equal models, so a model
may be a static argument of ``jax.jit``.
"""

from nnlearn.models.factory import model_factory as model_factory
from nnlearn.models.factory import parameter_count as parameter_count
from nnlearn.models.layers import activation as activation
from nnlearn.models.layers import dense as dense
from nnlearn.models.layers import dropout as dropout
from nnlearn.models.layers import layer_norm as layer_norm
from nnlearn.models.layers import rms_norm as rms_norm
from nnlearn.models.layers import sequential as sequential
from nnlearn.models.mlp import mlp as mlp
from nnlearn.models.named import activation_function as activation_function
from nnlearn.models.named import initializer as initializer
