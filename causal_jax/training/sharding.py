"""Which device holds what: a mesh from the config, and a table of path rules for everything else.

    data     the batch is split, parameters are copied
    fsdp     the batch is split, and so are parameters and optimizer state (arXiv 1910.02054)
    tensor   heads and feed-forward columns are split (arXiv 1909.08053)
    context  the time axis is split

Slices of a pod that only the data-centre network joins are crossed by `data` alone: gradients are
summed once a step, everything else stays within a slice.

The program is the same on every mesh: shardings are only attached to the step's inputs and outputs,
and the compiler inserts the communication.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from causal_jax.errors import InputError
from causal_jax.paths import check_pattern, map_named
from causal_jax.placement import BATCH, TIME

AXES = ("data", "fsdp", "tensor", "context")

# (pattern in the parameter's name, mesh axis of each of its last axes); the first match counts.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|/)(q|k|v|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(o|down)/kernel$", ("tensor", "fsdp")),
    (r"(^|/)head/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(q|k|v|gate|up)/bias$", ("tensor",)),
    (r"(^|/)table$", ("tensor", "fsdp")),
    (r"(^|/)kernel$", ("fsdp", None)),
)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Devices along each axis; their product is the number of devices used. -1: all the rest.

    Attributes:
        data: copies of the model, each with its part of the batch.
        fsdp: parts into which batch, parameters and optimizer state are cut.
        tensor: parts into which heads and feed-forward columns are cut.
        context: parts into which the time axis is cut.
        rules: sharding of parameters: (pattern, mesh axes of the last axes); empty for the table in
            `training/sharding.py`.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < 1 and getattr(self, axis) != -1:
                raise InputError(
                    f"mesh.{axis} must be at least 1, or -1 for the rest, got {getattr(self, axis)}"
                )
        if sum(getattr(self, axis) == -1 for axis in AXES) > 1:
            raise InputError(f"only one axis of the mesh may be -1, got {self.text()}")
        for pattern, axes in self.rules:
            check_pattern("mesh.rules", pattern)
            for axis in axes:
                if axis is not None and axis not in AXES:
                    raise InputError(f"mesh.rules {pattern!r}: no axis {axis!r} (known: {AXES})")

    def text(self) -> str:
        """data=1 x fsdp=8 ..."""
        return " x ".join(f"{axis}={getattr(self, axis)}" for axis in AXES)


def make_mesh(spec: MeshSpec, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config, with Auto axes.

    Raises:
        InputError: the axes do not multiply to a number of devices that is there, or `data` cannot
            be shared out to the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(spec, axis) for axis in AXES}
    fixed = math.prod(n for n in sizes.values() if n != -1)
    count = len(devices)
    for axis, n in sizes.items():
        if n == -1:
            if count % fixed:
                raise InputError(
                    f"mesh {spec.text()}: {count} devices cannot be shared out, the fixed axes "
                    f"multiply to {fixed}, which does not divide {count}"
                )
            sizes[axis] = count // fixed
    used = math.prod(sizes.values())
    if used > count:
        raise InputError(f"mesh {spec.text()} needs {used} devices, there are {count}")
    if used < count and jax.process_count() > 1:
        raise InputError(
            f"mesh {spec.text()} uses {used} of {count} devices; with several processes all must "
            "be used (set one axis to -1)"
        )
    shape = tuple(sizes.values())
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(d, "slice_index", 0) or 0 for d in devices[:used]})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:used])
    if sizes["data"] % slices:
        raise InputError(
            f"mesh.data = {sizes['data']} must be a multiple of the {slices} slices: only `data` "
            "goes across the network between them"
        )
    within = (sizes["data"] // slices, *shape[1:])
    across = (slices, *(1,) * (len(AXES) - 1))
    laid = mesh_utils.create_hybrid_device_mesh(within, across, devices[:used])
    return Mesh(laid, AXES, axis_types=types)


def state_shardings(
    mesh: Mesh,
    state: Any,
    rules: Sequence[tuple[str, tuple[str | None, ...]]] = (),
    heads: Mapping[str, int] | None = None,
) -> tuple[Any, list[str]]:
    """A NamedSharding for every leaf of an (abstract) state.

    A rule speaks of a leaf's last axes; axes in front of them (stacked layers) are not split. Where
    a dimension is not divisible by its mesh axis, that dimension is kept whole rather than refused:
    the result is the same and one odd size (a vocabulary, say) should not stop a run; what it costs
    is memory, so every such case is returned for the log.

    Args:
        mesh, state: the devices; arrays or their shapes.
        rules: in place of `RULES`.
        heads: {projection: heads its columns are made of}. A head is never cut over `tensor`: the
            products of one head belong together (and XLA of jaxlib 0.12.0 dies of it).

    Returns:
        (the tree of shardings, one line per dimension that was kept whole).
    """
    kept: list[str] = []
    heads = heads or {}

    def shard(name: str, leaf: Any) -> NamedSharding:
        projection = name.split("/")[-2] if "/" in name else ""
        for pattern, axes in rules or RULES:
            if re.search(pattern, name) and len(axes) <= leaf.ndim:
                parts = heads.get(projection)
                return NamedSharding(mesh, _fit(mesh, name, leaf.shape, axes, parts, kept))
        return NamedSharding(mesh, PartitionSpec())

    return map_named(shard, state), kept


def _fit(
    mesh: Mesh, name: str, shape: tuple, axes: tuple, heads: int | None, kept: list[str]
) -> PartitionSpec:
    front = len(shape) - len(axes)
    spec: list[str | None] = [None] * front
    for size, axis in zip(shape[front:], axes):
        whole, unit = (heads, " heads") if axis == "tensor" and heads else (size, "")
        if axis is not None and whole % mesh.shape[axis]:
            verb = "are" if unit else "is"
            kept.append(
                f"{name} {shape}: {whole}{unit} {verb} not divisible by "
                f"{axis}={mesh.shape[axis]}, kept whole"
            )
            axis = None
        spec.append(axis)
    return PartitionSpec(*spec)


def check_batch(mesh: Mesh, batch: int, length: int, accumulate: int) -> None:
    """Refuse a batch that the mesh cannot split evenly; sizes are global."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % (parts * accumulate):
        raise InputError(
            f"data.batch = {batch} must be a multiple of mesh.data x mesh.fsdp x accumulate = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} x {accumulate} = {parts * accumulate}"
        )
    if length % mesh.shape["context"]:
        raise InputError(
            f"the sequence length {length} must be a multiple of mesh.context = "
            f"{mesh.shape['context']}"
        )
    if parts % jax.process_count():
        raise InputError(
            f"mesh.data x mesh.fsdp = {parts} must be a multiple of the number of processes "
            f"({jax.process_count()}): each process feeds its own rows"
        )


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Rows over data and fsdp, time over context."""
    axes = (BATCH, TIME)[:ndim]
    return NamedSharding(mesh, PartitionSpec(*axes))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows as its part of global arrays [B, ...]."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh, x.ndim), np.asarray(x))
        for name, x in batch.items()
    }


def describe(mesh: Mesh) -> str:
    """One line for the log."""
    device = mesh.devices.flat[0]
    axes = " x ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "1"
    return f"mesh {axes} on {mesh.size} {device.device_kind} ({jax.process_count()} process(es))"
