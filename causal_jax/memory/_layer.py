"""Around a memory: projections, convolutions, gates, output (arXiv 2501.00663, section 4.4).

q, k, v = SiLU(conv(x W))       q, k with unit length per head       (v: SiLU by option)
log a = -softplus(x w_alpha + b)   log eta = log sigmoid(...)   theta = theta_max sigmoid(...)
o = (RMSNorm(y) * SiLU(x W_gate)) W_o
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from causal_jax.linear_maps import causal_conv, matmul
from causal_jax.memory._state import Gates, MemState

NORM_EPS = 1e-6


def init(spec, key, width: int, heads: int, head_dim: int) -> dict[str, Any]:
    """See `MemorySpec.init`."""
    inner = heads * head_dim
    keys = iter(jax.random.split(key, 12))

    def normal(rows, cols, scale):
        draw = jax.random.truncated_normal(next(keys), -2.0, 2.0, (rows, cols), jnp.float32)
        return draw * (scale / 0.87962566)

    params: dict[str, Any] = {n: normal(width, inner, width**-0.5) for n in ("q", "k", "v")}
    params["o"] = normal(inner, width, inner**-0.5)
    params["norm"] = jnp.ones((heads, head_dim), jnp.float32)
    if spec.output_gate:
        params["gate"] = normal(width, inner, width**-0.5)
    gates = {"theta": spec.theta_bias}
    if spec.decay:
        gates["alpha"] = spec.alpha_bias
    if spec.momentum:
        gates["eta"] = spec.eta_bias
    if spec.omega > 1:
        gates["gamma"] = 0.0
    params["gates"] = {
        n: {"w": normal(width, heads, width**-0.5), "b": jnp.full(heads, b, jnp.float32)}
        for n, b in gates.items()
    }
    if spec.conv:
        taps = {n: normal(spec.conv, inner, 0.15) for n in ("q", "k", "v")}
        params["conv"] = {n: w.at[-1].add(1.0) for n, w in taps.items()}  # near the token itself
    params["memory"] = spec.network.init(jax.random.fold_in(key, 1), heads, head_dim)
    return params


def init_state(spec, params, batch: int) -> MemState:
    """See `MemorySpec.init_state`."""
    heads, head_dim = params["norm"].shape
    zeros = lambda *shape: jnp.zeros((batch, *shape), jnp.float32)  # noqa: E731
    fast = {n: params["memory"][n] for n in spec.fast_leaves}
    weights = {n: jnp.broadcast_to(w[None], (batch, *w.shape)) for n, w in fast.items()}
    nothing = {n: zeros(*w.shape) for n, w in fast.items()}
    pending = recent = conv = None
    if spec.gate_chunk > 1:
        pending = {
            "surprise": nothing,
            "stored": jnp.zeros(batch, jnp.int32),
            "logits": zeros(heads, 2),
            "count": zeros(),
        }
    if spec.omega > 1:
        back = spec.omega - 1
        recent = {n: zeros(back, heads, head_dim) for n in ("k", "v")}
        recent["gamma"] = zeros(back, heads)
    if spec.conv:
        conv = {n: zeros(spec.conv - 1, heads * head_dim) for n in ("q", "k", "v")}
    number = lambda n: jnp.full(batch, n, jnp.int32)  # noqa: E731
    return MemState(
        weights=weights, momentum=nothing if spec.momentum else None,
        anchor=None if spec.anchor == 1 else weights, pending=pending, recent=recent, conv=conv,
        position=number(0), segment=number(-1), bad=number(-1), form=spec.form,
    )  # fmt: skip


def documents(state: MemState, T: int, mask, segments):
    """(live [B, T] | None, new [B, T] | None, last segment [B]): which tokens there are, where a
    document begins.

    Padding belongs to no document: the one after it is compared with the last one before it.
    """
    if segments is None:
        return mask, None, state.segment
    live = segments >= 0 if mask is None else mask & (segments >= 0)
    known = jnp.concatenate([state.segment[:, None], segments], 1)
    there = jnp.concatenate([jnp.ones_like(live[:, :1]), live], 1)
    last = jax.lax.cummax(jnp.where(there, jnp.arange(T + 1)[None], 0), axis=1)
    before = jnp.take_along_axis(known, last, 1)
    new = live & (segments != before[:, :-1]) & (before[:, :-1] >= 0)
    return live, new, before[:, -1]


def project(spec, params, state: MemState, x, live, segments, tap):
    """((q, k, v) [B, T, N, H], state)."""
    out, conv = [], {}
    for name in ("q", "k", "v"):
        y, conv[name] = _projected(spec, params, state, x, name, live, segments)
        out.append(tap(name, y))
    if state.conv is not None:
        state = dataclasses.replace(state, conv=conv)
    return out, state


def query(spec, params, state: MemState, x):
    """q [B, T, N, H] of tokens that only read."""
    return _projected(spec, params, state, x, "q", None, None)[0]


def _projected(spec, params, state, x, name, live, segments):
    y, past = matmul(x, params[name].astype(x.dtype)), None
    if state.conv is not None:
        before = state.conv[name]
        if segments is not None:
            # `causal_conv` counts `before` as the first token's document; so will the next call
            segments = jnp.where(live, segments, -1)
            same = (segments[:, 0] == state.segment) | (state.segment < 0)
            before = jnp.where(same[:, None, None], before, 0)
        y, past = causal_conv(y, params["conv"][name], before, segments)
        if segments is not None:
            first = jnp.broadcast_to(segments[:, :1], before.shape[:2])
            documents = jnp.concatenate([first, segments], 1)[:, x.shape[1] :]
            past = jnp.where((documents == segments[:, -1:])[..., None], past, 0)
        past = past.astype(jnp.float32)
    if name != "v" or spec.silu_v:
        y = jax.nn.silu(y)
    y = y.reshape(*y.shape[:2], *params["norm"].shape)
    return (y if name == "v" else _unit(y)), past


def _unit(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), -1, keepdims=True) + NORM_EPS)
    return wide.astype(x.dtype)


def gates(spec, params, state: MemState, x, live, new, tap) -> tuple[Gates, MemState]:
    """Gates of every token; with a gate chunk, a and eta from its mean logits so far."""
    theta_max = spec.default_theta if spec.theta_max is None else spec.theta_max
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    z = {n: matmul(wide, p["w"]) + p["b"][None, None] for n, p in params["gates"].items()}
    if spec.gate_chunk > 1:
        z, state = _pooled(spec, z, state, live, new)
    out: dict[str, Any] = {"theta": tap("theta", theta_max * jax.nn.sigmoid(z["theta"]))}
    if spec.decay:
        out["log_a"] = tap("log_a", -jax.nn.softplus(z["alpha"]))
    if spec.momentum:
        out["log_eta"] = tap("log_eta", jax.nn.log_sigmoid(z["eta"]))
    if spec.omega > 1:
        out["gamma"] = tap("gamma", jax.nn.sigmoid(z["gamma"]))
    return Gates(**out), state


def _pooled(spec, z, state: MemState, live, new):
    """Logits of alpha and eta replaced by their mean over the gate chunk up to each token."""
    names = [n for n in ("alpha", "eta") if n in z]
    (B, T), N, size = z["theta"].shape[:2], z["theta"].shape[2], spec.gate_chunk
    live = jnp.ones((B, T), bool) if live is None else live
    new = jnp.zeros((B, T), bool) if new is None else new
    values = jnp.stack([z.get(n, jnp.zeros((B, T, N))) for n in ("alpha", "eta")], -1)
    if spec.nonfinite == "skip":  # no logits, no part in the mean
        live = live & jnp.isfinite(values).all((2, 3))
    ones = jnp.ones((B, T, N, 1))
    terms = jnp.where(live[..., None, None], jnp.concatenate([values, ones], -1), 0)
    at = state.position[:, None] + jnp.arange(T)[None]

    def after(a, b):  # running sums that begin anew: log T passes, where a scan would take T steps
        (first, begun), (second, fresh) = a, b
        return jnp.where(fresh[..., None, None], second, first + second), begun | fresh

    count = state.pending["count"]
    carried = jnp.concatenate([state.pending["logits"], count[:, None, None] * ones[:, 0]], -1)
    fresh = (at % size == 0) | new
    terms = terms.at[:, 0].add(jnp.where(fresh[:, 0, None, None], 0, carried))
    sums, _ = jax.lax.associative_scan(after, (terms, fresh), axis=1)
    last = sums[:, -1]
    mean = sums[..., :2] / jnp.maximum(sums[..., 2:], 1)
    z = {**z, **{n: mean[..., ("alpha", "eta").index(n)] for n in names}}
    pending = {**state.pending, "logits": last[..., :2], "count": last[:, 0, 2]}
    return z, dataclasses.replace(state, pending=pending)


def output(params, y, x):
    """o [B, T, D] from what was read, [B, T, N, H]."""
    h = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + NORM_EPS)
    h = (h * params["norm"][None, None]).astype(x.dtype).reshape(*x.shape[:2], -1)
    if "gate" in params:
        h = h * jax.nn.silu(matmul(x, params["gate"].astype(x.dtype)))
    return matmul(h, params["o"].astype(x.dtype))
