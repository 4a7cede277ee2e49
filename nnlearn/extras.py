"""Optional packages: imported on first use, with an error that says how to install them."""

import importlib
from types import ModuleType


def import_extra(module: str, what: str, extra: str, package: str | None = None) -> ModuleType:
    """Import a module of an optional package.

    Args:
      module: the module, such as ``"matplotlib.figure"``.
      what: the feature that needs it, for the message.
      extra: the extra of nnlearn that installs it.
      package: the package's name for ``pip``, if it is not the module's first name.

    Raises:
      ImportError: if the package is not installed; the message says how to install it.

    >>> import_extra("not_installed_here", "this picture", "plot")
    Traceback (most recent call last):
    ImportError: this picture needs not_installed_here: pip install "nnlearn[plot]"
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise ImportError(f'{what} needs {package}: pip install "nnlearn[{extra}]"') from error
