"""Where activations live on a device mesh: rows with the batch, whatever the parameters do.

Parameters that are cut over `fsdp` are meant to be gathered, layer by layer, by devices that each
keep their own rows. The compiler does not know that: free to choose, it may as well keep the
parameters cut and give every device all rows (on 8 devices: 3.4 times the temporary memory,
and activations instead of weights on the wire). One constraint on the residual stream settles it.
"""

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH = ("data", "fsdp")  # mesh axes that share out rows
TIME = "context"  # the mesh axis that shares out time
HEADS = "tensor"  # the mesh axis that shares out heads


def dividing(shape: dict[str, int], axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Of some mesh axes those over which an array axis of this size can be cut."""
    out, parts = (), 1
    for axis in axes:
        if shape.get(axis, 1) > 1 and size % (parts * shape[axis]) == 0:
            out, parts = (*out, axis), parts * shape[axis]
    return out


def with_batch(x: jax.Array) -> jax.Array:
    """x [B, T, ...] with B over the mesh axes `data` and `fsdp` and T over `context`.

    Only where such a mesh is set (`jax.set_mesh`); axes that are not automatic (inside `shard_map`)
    and sizes that do not divide are left alone. Otherwise, and on one device, x itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types)
        if kind == AxisType.Auto and name in (*BATCH, TIME) and mesh.shape[name] > 1
    }
    spec: list[tuple[str, ...] | None] = []
    for size, wanted in zip(x.shape, (BATCH, (TIME,))):
        axes = tuple(name for name in wanted if name in sizes)
        parts = 1
        for name in axes:
            parts *= sizes[name]
        spec.append(axes if axes and size % parts == 0 else None)
    if not any(spec):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def rows_here(rows: int) -> int:
    """Of `rows` of a batch, how many one device holds under the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1
    for name, kind in zip(mesh.axis_names, mesh.axis_types):
        parts *= mesh.shape[name] if kind == AxisType.Auto and name in BATCH else 1
    return rows if rows % parts else rows // parts


def time_is_whole() -> bool:
    """Whether no mesh axis cuts the time axis here: [B, T, ...] may be folded to [B T, ...]."""
    return jax.sharding.get_abstract_mesh().shape.get(TIME, 1) == 1
