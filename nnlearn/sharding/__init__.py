"""Arrays over the devices of a mesh: which axis of which array is sharded over which mesh axis."""

from nnlearn.sharding.follow import follow as follow
from nnlearn.sharding.mesh import make_mesh as make_mesh
from nnlearn.sharding.place import bytes_per_device as bytes_per_device
from nnlearn.sharding.place import describe as describe
from nnlearn.sharding.place import place as place
from nnlearn.sharding.place import shard_batch as shard_batch
from nnlearn.sharding.rules import fsdp as fsdp
from nnlearn.sharding.rules import shardings as shardings
from nnlearn.sharding.rules import tensor_parallel as tensor_parallel
from nnlearn.sharding.zero import zero as zero
