"""Which implementation of dense attention serves a call, and why: decided by statics only.

A kernel that was never run on its own hardware is never the default: "tpu" and "gpu" have only been
interpreted and compiled, so they must be named. Until they are measured, the default on a GPU is
cudnn where it can serve, then tokamax, then "xla"; on a TPU and on a CPU it is "xla".
"""

import importlib.util
from typing import Any, NamedTuple

import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.hardware import elsewhere, target
from causal_jax.masks import Causal, Full, Mask, Prefix, Window, as_mask, parts_of
from causal_jax.taps import OFF, Tap
from pallas_kernels.block_sparse import gpu, tpu

IMPLEMENTATIONS = ("reference", "xla", "cudnn", "tokamax", "tpu", "gpu")
SMALL = 128 * 128  # queries x keys up to which all scores at once are as fast, and compile faster


class Choice(NamedTuple):
    """The implementation chosen and why, in one sentence."""

    name: str
    reason: str


def choose(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    soft_cap: float | None = None,
    score_mod: Any = None,
    sinks: Any = None,
    q_offset: Any = 0,
    kv_length: Any = None,
    return_lse: bool = False,
    tap: Tap = OFF,
    implementation: str | None = None,
    platform: str | None = None,
) -> Choice:
    """Which implementation `dense_attention` takes for these arguments.

    Args:
        q, k, v: arrays or `jax.ShapeDtypeStruct`s; the other arguments as in `dense_attention`.
        platform: "cpu", "gpu" or "tpu"; None: the default backend, or that of `compiling_for`.

    Raises:
        InputError: unknown name. NotImplementedError: the one named cannot serve this.
    """
    platform = platform or target()
    refused = refusals(
        q, k, v, mask=mask, bias=bias, soft_cap=soft_cap, score_mod=score_mod, sinks=sinks,
        q_offset=q_offset, kv_length=kv_length, return_lse=return_lse, tap=tap, platform=platform,
    )  # fmt: skip
    if implementation is not None:
        if implementation not in refused:
            known = ", ".join(IMPLEMENTATIONS)
            raise InputError(f"implementation={implementation!r}: expected None or one of {known}")
        if refused[implementation]:
            raise NotImplementedError(f"{implementation}: {refused[implementation]}")
        return Choice(implementation, "named by the caller")
    if refused["xla"]:
        return Choice("reference", refused["xla"])
    if not refused["cudnn"]:
        return Choice("cudnn", "full, causal or windowed attention on an NVIDIA GPU")
    if not refused["tokamax"]:
        return Choice("tokamax", f"installed; cudnn cannot serve this: {refused['cudnn']}")
    if few(q, k):
        if platform == "cpu":
            return Choice("xla", "few queries: keys and values are read where they lie")
        return Choice("reference", "few queries: all scores at once")
    if q.shape[1] * k.shape[1] <= SMALL:
        return Choice("reference", "small: all scores at once are cheapest")
    return Choice("xla", f"live tiles only, linear memory; cudnn: {refused['cudnn']}")


def refusals(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    soft_cap: float | None = None,
    score_mod: Any = None,
    sinks: Any = None,
    q_offset: Any = 0,
    kv_length: Any = None,
    return_lse: bool = False,
    tap: Tap = OFF,
    platform: str | None = None,
) -> dict[str, str | None]:
    """For every implementation why it cannot serve, or None if it can. Arguments as in `choose`."""
    mask, platform = as_mask(mask), platform or target()
    if kv_length is not None:
        mask = mask & Prefix(kv_length)
    site = next((s for s in ("scores", "pattern") if tap.wants(s)), None)
    lost = f"site {site!r} needs all scores at once: only 'reference' has them" if site else None
    plain = lost or ("it has no score_mod" if score_mod is not None else None)
    unbiased = "it has no bias" if bias is not None else None
    fused = plain or _fused_refusal(q, k, mask, sinks, q_offset, return_lse)
    return {
        "reference": None,
        "xla": lost,
        "cudnn": fused or _cudnn_refusal(q, k, v, bias, soft_cap, platform),
        "tokamax": fused or _tokamax_refusal(bias, soft_cap, platform),
        "tpu": plain or elsewhere("tpu", platform) or unbiased or tpu.refusal(q, k, v),
        "gpu": plain or elsewhere("gpu", platform) or unbiased or gpu.refusal(q, k, v),
    }


def few(q: Any, k: Any) -> bool:
    """Few queries, as in decoding: wide products with all keys cost less than moving keys."""
    return q.shape[1] <= 16 and q.shape[1] * k.shape[2] <= 128


def _fused_refusal(q, k, mask, sinks, q_offset, return_lse) -> str | None:
    """Why no vendor's kernel can serve this."""
    if sinks is not None:
        return "it has no sinks"
    if return_lse:
        return "it has no differentiable lse"
    form = causal_window(mask)
    if form is None:
        return f"it knows full, causal and causal-window masks, not {type(mask).__name__}"
    aligned = isinstance(q_offset, int) and q_offset == 0 and q.shape[1] == k.shape[1]
    if form[0] and not aligned:
        return "its causal mask needs as many queries as keys and q_offset=0"
    return None


def _cudnn_refusal(q, k, v, bias, soft_cap, platform) -> str | None:
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, this is {platform}"
    if soft_cap is not None:
        return "it has no soft cap"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"it needs one type, bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}"
    H, Hv = q.shape[-1], v.shape[-1]
    if Hv != H or H % 8 or H > 128:
        return f"it needs equal head widths, a multiple of 8 and at most 128, not {H} and {Hv}"
    if bias is not None and (q.shape[1] % 2 or k.shape[1] % 2):
        return "with a bias it needs even lengths"
    return None


def _tokamax_refusal(bias, soft_cap, platform) -> str | None:
    if platform not in ("gpu", "cuda", "tpu"):
        return f"it needs a GPU or TPU, this is {platform}"
    if bias is not None and soft_cap is not None:
        return "it adds the bias before the soft cap"
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed (pip install 'causal_jax[kernels]')"
    return None


def causal_window(mask: Mask) -> tuple[bool, int | None] | None:
    """(causal, keys before self or None) if the mask is exactly that, else None."""
    causal, left = False, None
    for part in parts_of(mask):
        if isinstance(part, Causal) and part.offset == 0:
            causal = True
        elif isinstance(part, Window) and part.right in (0, None):
            causal |= part.right == 0
            if part.left is not None:
                left = part.left if left is None else min(left, part.left)
        elif not isinstance(part, Full):
            return None
    return (causal, left) if causal or left is None else None
