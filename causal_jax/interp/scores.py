"""Numbers about heads, tokens and layers: attribution by gradients, the logit lens, metrics."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Float
from causal_jax.taps import grad_sites


def attribution(
    metric: Callable,
    f: Callable,
    *args: Any,
    clean: Mapping[str, Any],
    at: Any = ("attn.z",),
    edits: Any = (),
    **kw: Any,
) -> dict[str, Float[Array, "..."]]:
    """Attribution patching: the first-order effect of patching every activation, in one pass.

        score = sum_d (a_clean - a)_d dm/da_d                          (arXiv 2310.10348)

    Args:
        metric: what f returns -> scalar.
        f, args, kw: the run being changed.
        clean: captures of the other run at these sites.
        at: site names or patterns.
        edits: made first.

    Returns:
        {site: score}, the site's last axis summed over: [L, B, T, N] for attn.z, [L, B, T] for the
        residual stream; float32.

    Raises:
        InputError: `clean` lacks a site or has another shape.
    """
    _, acts, grads = grad_sites(metric, f, *args, at=at, edits=edits, **kw)
    scores = {}
    for name, grad in grads.items():
        if name not in clean or jnp.shape(clean[name]) != acts[name].shape:
            has = f"has shape {list(jnp.shape(clean[name]))}" if name in clean else "is missing"
            raise InputError(f"clean[{name!r}] {has}: expected {list(acts[name].shape)}")
        gap = clean[name].astype(jnp.float32) - acts[name].astype(jnp.float32)
        scores[name] = (gap * grad.astype(jnp.float32)).sum(-1)
    return scores


def logit_lens(model: Any, resid: Float[Array, "L *B D"], reduce: Callable | None = None) -> Any:
    """What the model would say if it ended after each layer: unembed(norm(resid_post of layer l)).

    Args:
        model: with `norm` and `unembed`.
        resid: captured `resid_post`.
        reduce: applied to the logits [*B, V] of each layer in turn, so that [L, *B, V] is never
            there at once.

    Returns:
        Logits [L, *B, V] in float32, or what `reduce` makes of them, stacked on L.
    """

    def one(h):
        logits = model.unembed(model.norm(h))
        return logits if reduce is None else reduce(logits)

    return jax.lax.map(one, resid)


def logit_difference(
    logits: Float[Array, "B T V"], right: Any, wrong: Any, position: Any = -1
) -> Float[Array, ""]:
    """Mean over the batch of logit(right) - logit(wrong) where the answer is read.

    Args:
        right, wrong: token ids, one for all rows or [B].
        position: where the next token is the answer, one for all rows or [B].
    """
    B = logits.shape[0]
    position, right, wrong = (jnp.broadcast_to(i, (B,)) for i in (position, right, wrong))
    rows = jnp.arange(B)
    return jnp.mean(logits[rows, position, right] - logits[rows, position, wrong])
