"""Parameters as a few large buffers: layout, packing, operations on whole leaves, rules about leaves."""

from nnlearn.packing.layout import Layout as Layout
from nnlearn.packing.layout import make_layout as make_layout
from nnlearn.packing.packed import Packed as Packed
from nnlearn.packing.packed import is_packed as is_packed
from nnlearn.packing.packed import pack as pack
from nnlearn.packing.packed import pack_like as pack_like
from nnlearn.packing.packed import unpack as unpack
from nnlearn.packing.rules import per_buffer as per_buffer
from nnlearn.packing.rules import worth_packing as worth_packing
from nnlearn.packing.stacks import leaf_norms as leaf_norms
from nnlearn.packing.stacks import map_stacks as map_stacks
from nnlearn.packing.stacks import stack_values as stack_values
