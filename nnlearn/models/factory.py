"""The decorator of every model factory."""

from collections.abc import Callable
from typing import Any, TypeVar

from nnlearn.settings import comparable

Factory = TypeVar("Factory", bound=Callable[..., tuple[Any, ...]])


def model_factory(factory: Factory) -> Factory:
    """Make the models of a factory compare equal when their settings are equal.

    A model can then be a static argument of ``jax.jit``, and equal models share one compiled program.

    >>> from nnlearn.models import dense
    >>> dense(2, 3) == dense(2, 3), dense(2, 3) == dense(2, 4)
    (True, False)
    >>> dense(2, 3).init
    dense(inputs=2, outputs=3).init
    """
    return comparable(factory)
