"""Why a run does not learn, and what to change: ``nnlearn.diagnose(train, hparams, key)``.

One file per family of checks: ``data``, ``program``, ``dynamics``, ``network``, ``fit``. Each check is one function of
the ``Evidence``; ``ranking`` puts the most likely cause first.
"""

from nnlearn.diagnose.engine import diagnose as diagnose
from nnlearn.diagnose.report import Check as Check
from nnlearn.diagnose.report import Finding as Finding
from nnlearn.diagnose.report import Report as Report
