"""Floating-point operations of a traced program, loops counted as often as they turn.

    dot      2 x (result) x (contracted)          convolution   2 x (result) x (kernel) / features
    kernel   what its cost estimate says

XLA's own cost analysis counts the body of a loop once, which for scanned layers is wrong by their
number; the traced program knows the lengths. Element-wise work is left out: on an accelerator it is
bounded by memory, not by multipliers.
"""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass
class Count:
    """Attributes:
    flops: of all devices together.
    kernels: Pallas calls counted by their cost estimate.
    silent: Pallas calls without one, counted as nothing.
    open_loops: loops whose length only the data decides, counted as one turn.
    """

    flops: float = 0.0
    kernels: int = 0
    silent: int = 0
    open_loops: int = 0

    def _add(self, other: "Count", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.kernels += other.kernels
        self.silent += other.silent
        self.open_loops += other.open_loops


def count(jaxpr: Any) -> Count:
    """Operations of a (closed) jaxpr."""
    total = Count()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total.flops += 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth
        elif name == "conv_general_dilated":
            kernel, features = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            size = math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel)
            total.flops += 2.0 * size / kernel[features]
        elif name == "pallas_call":
            cost = params.get("cost_estimate")
            total.kernels += cost is not None
            total.silent += cost is None
            total.flops += float(cost.flops) if cost is not None else 0.0
        elif name == "cond":
            total._add(max((count(b) for b in params["branches"]), key=lambda c: c.flops))
        elif name == "while":
            total.open_loops += 1
            total._add(count(params["body_jaxpr"]))
        else:
            times = float(params["length"]) if name == "scan" else 1.0
            if name == "shard_map":  # the body is one device's part
                mesh, manual = params["mesh"], params.get("manual_axes", ())
                times = float(math.prod(mesh.shape[a] for a in manual or mesh.axis_names))
            for inner in _bodies(params, name):
                total._add(count(inner), times)
    return total


def _bodies(params: dict[str, Any], name: str) -> list[Any]:
    if name.startswith("custom_"):  # rules for derivatives are not run
        return [params[k] for k in ("call_jaxpr", "fun_jaxpr") if k in params][:1]
    return [v for v in params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
