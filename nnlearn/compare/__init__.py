"""``nnlearn compare``: compare nnlearn's optimizers with optax's on real data."""

from nnlearn.compare.main import compare as compare
from nnlearn.compare.options import CompareOptions as CompareOptions
