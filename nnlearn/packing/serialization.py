"""Serialization of packed trees: by pickle, by ``flax.serialization``, and in programs that ``jax.export`` writes.

A layout is written as the tree's structure and a description in plain values. Neither contains a hash, which differs
between processes, or a device, which is found by its id.
"""

import contextlib
import json
import sys
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

FLAX = "flax.serialization"


def describe_sharding(sharding: NamedSharding | None) -> dict[str, Any] | None:
    """Describe a sharding in JSON values; ``find_sharding`` is the reverse."""
    if sharding is None:
        return None
    mesh = sharding.mesh
    return {
        "axes": {name: size for name, size in mesh.shape.items()},
        "types": [axis_type.name for axis_type in mesh.axis_types],
        "devices": None if isinstance(mesh, AbstractMesh) else [device.id for device in mesh.devices.flat],
        "spec": [list(names) if isinstance(names, tuple) else names for names in sharding.spec],
    }


def find_sharding(facts: dict[str, Any] | None) -> NamedSharding | None:
    """Reverse ``describe_sharding``, with the devices of this process.

    Raises:
      ValueError: if a device is missing.
    """
    if facts is None:
        return None
    sizes, names = tuple(facts["axes"].values()), tuple(facts["axes"])
    types = tuple(AxisType[name] for name in facts["types"])
    spec = PartitionSpec(*(tuple(part) if isinstance(part, list) else part for part in facts["spec"]))
    if facts["devices"] is None:
        return NamedSharding(AbstractMesh(sizes, names, axis_types=types), spec)
    here = {device.id: device for device in jax.devices()}
    if missing := [index for index in facts["devices"] if index not in here]:
        raise ValueError(
            f"the tree was packed in parts over the mesh {facts['axes']}, and this process has no devices {missing}: "
            "start it with as many devices, or write the unpacked tree, unpack(...)"
        )
    devices = np.array([here[index] for index in facts["devices"]]).reshape(sizes)
    return NamedSharding(Mesh(devices, names, axis_types=types), spec)


def export_structure(treedef: Any, facts: dict[str, Any]) -> bytes:
    """Serialize a structure and a description; custom nodes must be registered with ``jax.export``."""
    skeleton = treedef.unflatten([jax.ShapeDtypeStruct((), jnp.bool_)] * treedef.num_leaves)
    # JAX serializes structures only as part of a program, so this program does nothing.
    program = jax.export.export(jax.jit(lambda tree: ()))(skeleton).serialize()
    header = json.dumps(facts).encode()
    return len(header).to_bytes(8, "little") + header + bytes(program)


def import_structure(content: bytes) -> tuple[Any, dict[str, Any]]:
    """Reverse ``export_structure``."""
    length = 8 + int.from_bytes(content[:8], "little")
    program = jax.export.deserialize(bytearray(content[length:]))
    (skeleton,), _ = jax.tree.unflatten(program.in_tree, range(program.in_tree.num_leaves))
    return jax.tree.structure(skeleton), json.loads(content[8:length])


def register_with_flax(packed_type: type, to_tree: Any, pack_like: Any) -> bool:
    """Register packed trees and random keys with ``flax.serialization``, if it has been imported.

    A packed tree is written as the tree that was packed, so either form can be restored from the other's file. A key is
    written as its data and the name of its generator.

    Args:
      packed_type: the class of packed trees.
      to_tree: ``to_tree(packed)``.
      pack_like: ``pack_like(layout, tree)``.

    Returns:
      Whether they are registered.
    """
    flax: Any = sys.modules.get(FLAX)
    if not hasattr(flax, "register_serialization_state"):  # not imported, or not yet completely
        return False

    def restore(packed, state):
        return pack_like(packed.layout, flax.from_state_dict(to_tree(packed), state))

    def write_key(key):
        return {"key_data": jax.random.key_data(key), "impl": str(jax.random.key_impl(key))}

    def restore_key(key, state):
        return jax.random.wrap_key_data(jnp.asarray(state["key_data"]), impl=state["impl"])

    flax.register_serialization_state(
        packed_type, lambda packed: flax.to_state_dict(to_tree(packed)), restore, override=True
    )
    with jax.ensure_compile_time_eval():  # in a traced function a new key is a tracer
        key_type = type(jax.random.key(0))
    with contextlib.suppress(ValueError):  # flax or the user has registered it
        flax.register_serialization_state(key_type, write_key, restore_key)
    return True


__all__ = ["describe_sharding", "export_structure", "find_sharding", "import_structure", "register_with_flax"]
