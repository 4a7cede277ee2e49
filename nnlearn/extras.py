"""Packages that only some of nnlearn needs: imported when they are used, and named with their cure where missing."""

import importlib
from types import ModuleType


def import_extra(module: str, what: str, extra: str, package: str | None = None) -> ModuleType:
    """A module of a package that an extra of nnlearn brings.

    Args:
      module: such as ``"matplotlib.figure"``.
      what: what needs it, for the message.
      extra: the extra that brings it.
      package: what ``pip`` calls the package, if not by the module's first name.

    Raises:
      ImportError: it is not installed; the message says how to install it.

    >>> import_extra("not_installed_here", "this picture", "plot")
    Traceback (most recent call last):
    ImportError: this picture needs not_installed_here: pip install "nnlearn[plot]"
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise ImportError(f'{what} needs {package}: pip install "nnlearn[{extra}]"') from error
