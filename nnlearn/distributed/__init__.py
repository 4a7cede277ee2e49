"""Many processes: how they find each other, share the data, wait for each other, and end together."""

from nnlearn.distributed.launch import launch as launch
from nnlearn.distributed.place import Place as Place
from nnlearn.distributed.share import own_batches as own_batches
from nnlearn.distributed.share import own_rows as own_rows
from nnlearn.distributed.start import is_first as is_first
from nnlearn.distributed.start import start as start
from nnlearn.distributed.store import barrier as barrier
from nnlearn.distributed.store import check_equal as check_equal
from nnlearn.distributed.store import exchange as exchange
