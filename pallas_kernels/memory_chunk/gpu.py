"""Mosaic GPU: no kernel for memories yet; `implementation=None` takes the XLA path there.

A chunk's programs multiply what they have just computed (the inverse of I + T, coefficients,
scores), each product waiting for the last. On Hopper every one of them would go through shared
memory as an operand of `wgmma`, in float32 as three products; none of this can be written with
confidence where it can be neither run nor timed.
"""


def refusal() -> str:
    """Why no kernel serves on a GPU."""
    return "no Mosaic GPU kernel for memories; the XLA path serves GPUs"
