"""Dense attention with all scores at once: the reference, and a form for few queries on a CPU."""

import functools

import jax
import jax.numpy as jnp

from causal_jax.taps import OFF

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def reference(q, k, v, mask, *, bias, scale, soft_cap, score_mod, sinks, q_offset, tap=OFF):
    """The formula of `dense_attention` in float32 or wider: (o [B,T,N,H'], lse [B,T,N])."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G, dtype = N // K, v.dtype
    allowed = mask.to_dense(T, S, q_offset=q_offset)
    (q, bad_q), (k, bad_k), (v, bad_v) = (_finite(x.astype(_wide(x))) for x in (q, k, v))
    s = _einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, G, H), k) * scale
    s = _modify(s.reshape(B, N, T, S), bias, soft_cap, score_mod, q_offset)
    s = _with_bad(s, bad_q, bad_k + bad_v)
    p, lse = _softmax(tap("scores", s), allowed, sinks)
    p = tap("pattern", p)
    o = _einsum("bkgts,bskh->btkgh", p.reshape(B, K, G, T, S), v)
    return o.reshape(B, T, N, -1).astype(dtype), lse


def few_queries(q, k, v, mask, *, bias, scale, soft_cap, score_mod, sinks, q_offset):
    """The same without moving keys and values, whose copies cost more than the products on a CPU.

    The K heads of one position lie side by side in memory, so [S, K H] is a matrix as it is. It is
    multiplied by all queries at once, each placed in the rows of its own head and zero elsewhere:
    K times the operations, none of the copies. Should anything turn out not to be finite, the
    reference decides who sees it.
    """
    (B, T, N, H), (S, K), Hv = q.shape, k.shape[1:3], v.shape[-1]
    G, own = N // K, jnp.eye(K, dtype=q.dtype)
    if q.dtype != k.dtype:
        k = k.astype(_wide(k))
    spread = jnp.einsum("btkgh,kl->blhtkg", q.reshape(B, T, K, G, H), own)
    spread = spread.reshape(B, K * H, T * N).astype(k.dtype)
    raw = jnp.einsum(
        "bsd,bdn->bsn", k.reshape(B, S, K * H), spread, preferred_element_type=_wide(q)
    )
    s = raw.transpose(0, 2, 1).reshape(B, T, N, S).transpose(0, 2, 1, 3) * scale
    s = _modify(s, bias, soft_cap, score_mod, q_offset)
    p, lse = _softmax(s, mask.to_dense(T, S, q_offset=q_offset), sinks)
    p = p.transpose(0, 2, 1, 3).reshape(B, T * N, S).astype(v.dtype)
    o = jnp.einsum(
        "bns,bsd->bnd", p, v.reshape(B, S, K * Hv), preferred_element_type=_wide(q)
    ).reshape(B, T, K, G, K, Hv)
    o = jnp.einsum("btkglh,kl->btkgh", o, own.astype(o.dtype)).reshape(B, T, N, Hv)
    fine = jnp.isfinite(raw).all() & jnp.isfinite(o).all()
    rest = {"bias": bias, "scale": scale, "soft_cap": soft_cap, "sinks": sinks}
    rest["score_mod"] = score_mod
    return jax.lax.cond(
        fine,
        lambda: (o.astype(v.dtype), lse),
        lambda: reference(q, k, v, mask, q_offset=q_offset, **rest),
    )


def _wide(x):
    return jnp.promote_types(jnp.float32, x.dtype)


def _finite(x):
    """(x with 0 for what is not finite, 0 or NaN per vector): 0 * NaN must reach no masked pair."""
    ok = jnp.isfinite(x)
    return jnp.where(ok, x, 0), jnp.where(ok.all(-1), 0.0, jnp.nan).astype(x.dtype)


def _with_bad(s, bad_q, bad_keys):
    """Scores [B, N, T, S], NaN where the query or key was not finite: the mask decides who sees it.

    `bad_q` [B, T, N] and `bad_keys` [B, S, K] are 0 or NaN.
    """
    s = s + bad_q.transpose(0, 2, 1)[..., None]
    group = s.shape[1] // bad_keys.shape[-1]
    return s + jnp.repeat(bad_keys.transpose(0, 2, 1), group, axis=1)[:, :, None]


def _modify(s, bias, soft_cap, score_mod=None, q_offset=0):
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = s if bias is None else s + bias.astype(s.dtype)
    if score_mod is None:
        return s
    b, h, i, j = jnp.ogrid[tuple(slice(n) for n in s.shape)]
    i = i + jnp.asarray(q_offset, jnp.int32).reshape(-1, 1, 1, 1)
    return score_mod(s, b, h, i, j).astype(s.dtype)


def _softmax(s, allowed, sinks):
    """(p, lse) of scores [B, N, T, S]: rows without keys are 0 and -inf, without NaN gradients."""
    s = jnp.where(allowed, s, -jnp.inf)
    top = s.max(-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(s.dtype)[None, :, None, None]
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))[..., 0].transpose(0, 2, 1)
    return jnp.where(allowed, p / total, 0), lse
