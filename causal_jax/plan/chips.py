"""TPU generations and topologies: what one chip has, and which slices exist.

Peak FLOP/s (bfloat16, dense), memory, its bandwidth and the interconnect are those of the maker's
system architecture pages (cloud.google.com/tpu/docs, "v4" to "v6e"). A link's bandwidth is one way;
a chip of a two-dimensional torus has four links, of a three-dimensional one six.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from typing import Any

from causal_jax.errors import InputError

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: as in the topology's name.
        memory: bytes a program may use.
        flops: peak FLOP/s of bfloat16 matrix products.
        bandwidth: bytes/s between memory and chip.
        link: bytes/s of one link, one way.
        links: links per chip.
        sizes: slices that can be had.
        settings: for `get_topology_desc`.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    links: int
    sizes: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "4x4x16", "8x8x8", "8x8x12")
    + ("4x8x16", "8x8x16", "8x16x16", "16x16x16")
)  # fmt: skip
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1.2e12, 45e9, 6, _CUBES, (("chip_config_name", "megacore"),)),
        Chip("v5e", 15.75 * GIB, 197e12, 8.1e11, 45e9, 4, _FLAT),
        Chip("v5p", 95 * GIB, 459e12, 2.765e12, 90e9, 6, (*_CUBES, "16x16x24")),
        Chip("v6e", 31.25 * GIB, 918e12, 1.64e12, 90e9, 4, _FLAT),
    )
}
DCN = 6.25e9  # bytes/s per chip between slices


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a program would run.

    Attributes:
        name: of the topology.
        devices: real (this machine) or of the topology, for compiling only.
        chip: what each of them has.
        platform: "tpu" or "cpu".
    """

    name: str
    devices: Sequence[Any]
    chip: Chip
    platform: str

    @property
    def slices(self) -> int:
        """Slices that only the data-centre network joins."""
        return len({getattr(d, "slice_index", 0) or 0 for d in self.devices})


def valid() -> str:
    """Every topology by name, for a message."""
    lines = [f"  {c.name}: " + ", ".join(f"{c.name}:{s}" for s in c.sizes) for c in CHIPS.values()]
    return "\n".join([*lines, "  this machine: cpu, or cpu:8 for eight virtual devices"])


def target(name: str, slices: int = 1) -> Target:
    """The devices of a topology's name.

    Args:
        name: "v5e:16x16", "v5p:4x4x4", "cpu", "cpu:8".
        slices: so many of them, joined by the data-centre network.

    Raises:
        InputError: no such topology (the message lists all), or libtpu is not installed.
    """
    kind, _, size = name.partition(":")
    if slices < 1:
        raise InputError(f"--slices must be at least 1, got {slices}")
    if kind == "cpu" and re.fullmatch(r"|[1-9]\d{0,2}", size):
        if slices > 1:
            raise InputError("--slices: this machine is one")
        return _this_machine(name, int(size or 0))
    if kind in ("gpu", "cuda", "rocm") or re.fullmatch(r"[ahb]\d{2,3}.*", kind):
        raise InputError(
            f"--topology {name}: programs for GPUs cannot be compiled here, that needs a "
            "GPU plug-in of JAX and its device description. Known:\n" + valid()
        )
    chip = CHIPS.get(kind)
    if chip is None or size not in chip.sizes:
        known = [f"{c.name}:{s}" for c in CHIPS.values() for s in c.sizes]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"--topology {name}: no such topology{hint} Known:\n{valid()}")
    from pallas_kernels._testing import tpu_topology

    try:
        found = tpu_topology(name, num_slices=slices, **dict(chip.settings))
    except Exception as e:  # JAX and libtpu raise several kinds
        if "libtpu" in str(e) or "tpu" not in str(e).lower():
            raise InputError(
                f"--topology {name}: compiling for a TPU needs libtpu: pip install "
                f"'causal_jax[tpu]' ({' '.join(str(e).split())[:160]})"
            ) from e
        raise
    return Target(name if slices == 1 else f"{slices} x {name}", found.devices, chip, "tpu")


def _this_machine(name: str, count: int) -> Target:
    import jax

    from causal_jax.training.report import peak_flops

    if count:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError as e:
            if jax.local_device_count() != count:
                raise InputError(
                    f"--topology {name}: JAX runs already, with {jax.local_device_count()} devices"
                ) from e
    devices = jax.devices("cpu")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
    flops = peak_flops(devices[0]) or 1e10
    # bandwidths: two channels of DDR4, shared; memory is also the interconnect
    shared = 2.5e10 / len(devices)
    return Target(name, devices, Chip("cpu", memory, flops, shared, shared, 2, ()), "cpu")
