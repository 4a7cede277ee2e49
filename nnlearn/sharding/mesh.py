"""Meshes of devices from a few words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

FORM = "write axes as 'data=4,model=2'; one size may be left out, and is then what the devices allow"


def make_mesh(
    axes: str | Mapping[str, int | None] = "data", *, explicit: bool = False, devices: Sequence[Any] | None = None
) -> Mesh:
    """Arrange devices in a mesh with named axes.

    Args:
      axes: names and sizes, as in ``"data=4,model=2"`` or ``{"data": 4, "model": 2}``. One size may be left out, as in
        ``"data,model=2"``: this axis takes all remaining devices.
      explicit: False makes Auto axes: any function runs, and XLA chooses the shardings inside it. True makes Explicit
        axes: the types of arrays show their shardings, and JAX rejects operations with an ambiguous result.
      devices: the devices; None for all devices of all processes.

    Returns:
      A ``jax.sharding.Mesh``. If its size is smaller than the number of devices, it takes the first devices.

    Raises:
      ValueError: if ``axes`` cannot be read, an axis occurs twice, or the mesh does not fit the devices.

    >>> dict(make_mesh("data=1,model=1").shape)
    {'data': 1, 'model': 1}
    >>> make_mesh("data=1000")
    Traceback (most recent call last):
    ValueError: mesh 'data=1000' needs 1000 devices, but there are ...
    """
    sizes = _parse(axes) if isinstance(axes, str) else dict(axes)
    text = axes if isinstance(axes, str) else ",".join(f"{name}={size}" for name, size in sizes.items())
    available = list(jax.devices() if devices is None else devices)
    free = [name for name, size in sizes.items() if size is None]
    if not sizes or len(free) > 1:
        raise ValueError(f"mesh {text!r} has {len(free)} axes without a size: {FORM}")
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"axis {name!r} of mesh {text!r} has size {size!r}, not a positive int: {FORM}")
    fixed = math.prod(size for size in sizes.values() if size is not None)
    if free and len(available) % fixed:
        raise ValueError(
            f"mesh {text!r} cannot give axis {free[0]!r} a size: {len(available)} devices are no multiple of {fixed}"
        )
    shape = {name: len(available) // fixed if size is None else size for name, size in sizes.items()}
    needed = math.prod(shape.values())
    if needed > len(available):
        raise ValueError(
            f"mesh {text!r} needs {needed} devices, but there are {len(available)}: make an axis smaller, start more "
            "processes, or imitate devices on a CPU with XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{needed}"
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    kinds = (kind,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=kinds, devices=available[:needed])


def _parse(text: str) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {}
    for part in text.split(","):
        name, has_size, size = (word.strip() for word in part.partition("="))
        if not name.isidentifier() or (has_size and not size.isdigit()):
            raise ValueError(f"mesh {text!r} has an axis {part.strip()!r} that cannot be read: {FORM}")
        if name in sizes:
            raise ValueError(f"mesh {text!r} has the axis {name!r} twice: give each axis its own name")
        sizes[name] = int(size) if has_size else None
    return sizes


__all__ = ["make_mesh"]
