"""Why a run does not learn, and what to change: ``nnlearn.diagnose(train, hparams, key)``.

One file per family of checks, such as ``data``, ``program``, ``dynamics``, ``network`` and ``fit``. Each check is one
function of the ``Evidence``; ``ranking`` puts the most likely cause first.
"""

import inspect
import sys
import types

from nnlearn.diagnose.curves import diagnose_trace as diagnose_trace
from nnlearn.diagnose.curves import watch as watch
from nnlearn.diagnose.engine import diagnose as diagnose
from nnlearn.diagnose.preflight import preflight as preflight
from nnlearn.diagnose.repair import Repair as Repair
from nnlearn.diagnose.repair import repair as repair
from nnlearn.diagnose.report import Check as Check
from nnlearn.diagnose.report import Finding as Finding
from nnlearn.diagnose.report import Report as Report


class _Room(types.ModuleType):
    """This module, which can be called: ``nnlearn.diagnose`` names it and the function."""

    __call__ = staticmethod(diagnose)


__signature__ = inspect.signature(diagnose)
sys.modules[__name__].__class__ = _Room
