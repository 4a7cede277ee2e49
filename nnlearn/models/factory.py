"""The decorator of every model factory."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from nnlearn.settings import comparable

P = ParamSpec("P")
R = TypeVar("R")


def model_factory(factory: Callable[P, R]) -> Callable[P, R]:
    """Make the models of a factory compare equal when their settings are equal.

    A model can then be a static argument of ``jax.jit``, and equal models share one compiled program.

    >>> from nnlearn.models import dense
    >>> dense(2, 3) == dense(2, 3), dense(2, 3) == dense(2, 4)
    (True, False)
    >>> dense(2, 3).init
    dense(inputs=2, outputs=3).init
    """
    return comparable(factory)
