"""``nnlearn compare``: optimizers side by side on real data, nnlearn's and optax's."""

from nnlearn.compare.main import compare as compare
from nnlearn.compare.settings import Settings as Settings
