"""What a compiled program needs and how fast it could run: memory, roofline, advice.

    compute   FLOPs / chips / peak          memory   bytes to and from it / bandwidth
    network   bytes on the wire / links     step     from max (all at once) to sum (one after other)

The estimate is a bound, not a measurement: it knows neither launch overheads nor how well a product
of odd shape fills the multipliers. `ASSUMPTIONS` says what went into it.
"""

import dataclasses
import re
import time
from collections import defaultdict
from typing import Any

from causal_jax.plan import flops, hlo
from causal_jax.plan.chips import DCN, Target
from causal_jax.plan.programs import Traced
from causal_jax.training.recipe import Recipe

ASSUMPTIONS = (
    "peak FLOP/s and bandwidths of the data sheet, all of them reached",
    "matrix products only: element-wise work is bounded by memory",
    "work shared evenly by all chips",
    "collectives run as rings over two links, over all links where a group spans a quarter of the "
    "chips or more",
    f"between slices {DCN / 1e9:.2f} GB/s per chip",
    "MFU counts the model's own operations (6 per weight and token, and attention's), as training "
    "reports it",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One program on one topology; bytes and FLOPs are those of one chip unless said otherwise.

    Attributes:
        name: of the program.
        topology, chips: where.
        mesh: axes above 1.
        parts: {what: bytes} of the arguments.
        arguments, outputs, aliased, temporaries, code: as the compiler says.
        peak: all of them, outputs that reuse arguments counted once.
        capacity: bytes a program may use.
        fits: whether peak is within it.
        flops: executed, or the model's own where that is more.
        model_flops: the model's own, of all chips together.
        traffic: bytes to and from memory.
        collectives: kind -> {"count", "bytes", "wire", "seconds"}.
        seconds: {"compute", "memory", "network"}.
        step: (all at once, one after the other) in seconds.
        mfu: of the same two.
        compile_seconds: this machine's.
        advice: what would make it fit; what is noteworthy.
    """

    name: str
    topology: str
    chips: int
    mesh: str
    parts: dict[str, int]
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int
    capacity: int
    fits: bool
    flops: float = 0.0
    model_flops: float = 0.0
    traffic: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    step: tuple[float, float] = (0.0, 0.0)
    mfu: tuple[float, float] = (0.0, 0.0)
    compile_seconds: float = 0.0
    advice: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def estimate(program: Traced, recipe: Recipe, target: Target) -> Estimate:
    """Compile a program and read what it costs."""
    begun, base = time.perf_counter(), _base(program, recipe, target)
    try:
        compiled = program.compile()
    except Exception as e:  # the compiler's own type is not public
        found = _overflow(str(e))
        if found is None:
            raise
        return _too_large(base, found, program, recipe, time.perf_counter() - begun)
    took = time.perf_counter() - begun
    m = compiled.memory_analysis()
    sizes = {
        "arguments": m.argument_size_in_bytes,
        "outputs": m.output_size_in_bytes,
        "aliased": m.alias_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "code": m.generated_code_size_in_bytes,
    }
    peak = sum(sizes.values()) - 2 * sizes["aliased"]
    fits = peak <= base["capacity"]
    speed = _speed(_text(compiled), program, recipe, target)
    notes = speed.pop("notes")
    if not fits:
        notes = [*_remedies(program.parts, sizes["temporaries"], recipe), *notes]
    return Estimate(
        **base, **sizes, peak=peak, fits=fits, **speed, compile_seconds=took,
        advice=(*notes, *program.notes),
    )  # fmt: skip


def without_compiling(program: Traced, recipe: Recipe, target: Target) -> Estimate | None:
    """The estimate of a program whose arguments alone do not fit; None where they do."""
    base, size = _base(program, recipe, target), sum(program.parts.values())
    if size <= base["capacity"]:
        return None
    return _too_large(base, (size, base["capacity"]), program, recipe, 0.0)


def _base(program: Traced, recipe: Recipe, target: Target) -> dict[str, Any]:
    chips = len(target.devices)
    return {
        "name": program.name,
        "topology": target.name,
        "chips": chips,
        "mesh": _mesh_text(program, recipe, chips),
        "parts": program.parts,
        "capacity": int(target.chip.memory),
    }


def _text(compiled: Any) -> str | None:
    """The compiled program, or None where this JAX cannot read what a newer libtpu made."""
    try:
        return compiled.as_text()
    except Exception as e:  # XLA's own type is not public
        if "RET_CHECK" not in str(e) and "INTERNAL" not in str(e):
            raise
        return None


def _speed(text: str | None, program: Traced, recipe: Recipe, target: Target) -> dict[str, Any]:
    chips, chip = len(target.devices), target.chip
    counted = flops.count(program.traced.jaxpr)
    read = hlo.Program([], 0.0, 0)
    if text is not None:
        read = hlo.read(text, lambda i: getattr(target.devices[i], "slice_index", 0) or 0)
    per_token = recipe.model.flops_per_token(recipe.data.context or 1)
    own = per_token * program.tokens / (1 if program.name == "train" else 3)  # forward alone
    executed = max(counted.flops, own)
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for c in read.collectives:
        wide = c.devices * 4 >= chips
        rate = DCN if c.crosses else chip.link * (chip.links if wide else min(2, chip.links))
        entry = kinds[c.kind]
        entry["count"] += c.times
        entry["bytes"] += c.times * c.bytes
        entry["wire"] += c.wire
        entry["seconds"] += c.wire / rate
    seconds = {
        "compute": executed / chips / chip.flops,
        "memory": read.traffic / chip.bandwidth,
        "network": sum(k["seconds"] for k in kinds.values()),
    }
    ends = max(seconds.values()), sum(seconds.values())
    notes = []
    if counted.open_loops or read.open_loops:
        notes.append(
            f"{counted.open_loops} loops whose length the data decides are counted as one turn; "
            "at least the model's own operations are assumed"
        )
    if text is None:
        notes.append(
            "collectives and traffic are unknown (taken as none): this JAX cannot read the program "
            "of a libtpu that is newer than it; install the one of 'causal_jax[tpu]'"
        )
    if target.slices > 1:
        notes.append("what goes between slices as sends through the hosts is not counted")
    if counted.silent:
        notes.append(f"{counted.silent} kernels say nothing about their cost")
    return {
        "flops": executed / chips,
        "model_flops": own,
        "traffic": read.traffic,
        "collectives": {kind: dict(entry) for kind, entry in sorted(kinds.items())},
        "seconds": seconds,
        "step": ends,
        "mfu": tuple(own / chips / chip.flops / max(s, 1e-12) for s in ends),
        "notes": notes,
    }


def _mesh_text(program: Traced, recipe: Recipe, chips: int) -> str:
    sizes = {axis: getattr(recipe.mesh, axis) for axis in ("data", "fsdp", "tensor", "context")}
    fixed = 1
    for n in sizes.values():
        fixed *= n if n != -1 else 1
    sizes = {axis: chips // fixed if n == -1 else n for axis, n in sizes.items()}
    return " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "1"


def _overflow(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes there) from the compiler's complaint, or None if it is another."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
    if found is None:
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return int(float(found[1]) * units[found[2]]), int(float(found[3]) * units[found[4]])


def _too_large(base, found, program: Traced, recipe: Recipe, took: float) -> Estimate:
    needed, there = found
    arguments = sum(program.parts.values())
    temporaries = max(needed - arguments, 0)
    return Estimate(
        **base | {"capacity": there},
        arguments=arguments,
        outputs=arguments,
        aliased=arguments,
        temporaries=temporaries,
        code=0,
        peak=needed,
        fits=False,
        compile_seconds=took,
        advice=tuple(_remedies(program.parts, temporaries, recipe)),
    )


def _remedies(parts: dict[str, int], temporaries: int, recipe: Recipe) -> list[str]:
    """Which term dominates, and what would make it smaller."""
    terms = parts | {"temporaries": temporaries}
    name = max(terms, key=lambda t: terms[t])
    lines = [f"{name} dominate: {terms[name] / 2**30:.2f} GiB of a chip"]
    if name == "temporaries":
        remat = getattr(recipe.model, "remat", None)
        stronger = {"none": "dots", "dots": "full"}.get(str(remat))
        if stronger:
            lines.append(f"recompute more: --config.model.remat {stronger} (now {remat})")
        if recipe.accumulate < recipe.data.batch:
            lines.append(f"more microbatches: --config.accumulate {2 * recipe.accumulate}")
        lines.append("fewer rows per chip (--batch), or share out time (--mesh ...,context=2)")
    elif name == "cache":
        lines.append("fewer rows (--batch), a shorter context, or more kv heads over tensor")
    else:
        lines.append("cut over more chips: more of the mesh to fsdp or tensor (--mesh ...,fsdp=-1)")
    return lines
