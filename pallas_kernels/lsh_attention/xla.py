"""The same in plain XLA: a few tiles at a time, memory linear in the length, its own backward pass.

    ds = p (do v^T - delta)    delta = rowsum(do o) - dlse    p = exp(s - lse)
    dq = ds k                  dk += ds^T q                   dv += p^T do

Forward tiles are [queries, keys], backward ones [keys, queries]: every product contracts the last
axis of its left and the second of its right factor, which spares transposing tiles of scores.
Reverse-mode differentiation only (custom_vjp).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lsh_attention.problem import Problem


class _Config(NamedTuple):
    scale: float
    unit: int  # tiles worked on at once
    upcast: bool  # multiply in float32


def xla(
    x: Problem, scale: float, *, entries: int = 0, upcast: bool = True
) -> tuple[jax.Array, jax.Array]:
    """o [P, C, Q, V] in v's dtype and lse [P, C, Q] in float32, both differentiable.

    Args:
        scale: factor on q . k.
        entries: scores computed at once; 0: all.
        upcast: multiply in float32 (best on a CPU), else in the arrays' own type, summing in
            float32.
    """
    (P, C, Q), width = x.q.shape[:3], x.k.shape[2] + x.k_sample.shape[1]
    most = max(1, entries // (Q * width)) if entries else P * C
    unit = max(n for n in range(1, min(most, P * C) + 1) if P * C % n == 0)
    ints = x._replace(q=None, k=None, v=None, k_sample=None, v_sample=None)
    cfg = _Config(float(scale), unit, upcast)
    return _attend(  # pyright: ignore[reportGeneralTypeIssues]
        cfg, x.q, x.k, x.v, x.k_sample, x.v_sample, ints
    )


def _wide(x):
    return jnp.promote_types(jnp.float32, x.dtype)


def _dot(a, b) -> jax.Array:
    """[U, m, n] [U, n, o] -> [U, m, o]"""
    return jnp.einsum("umn,uno->umo", a, b, preferred_element_type=_wide(a))


class _Lists:
    """The keys, values and biases of each tile's list: its block's, then the samples."""

    def __init__(self, cfg: _Config, k, v, k_sample, v_sample, x: Problem):
        self.cfg, self.x = cfg, x
        (self.P, self.C), (self.M, self.S) = x.block.shape, x.bias.shape[1:]
        self.R = x.bias_sample.shape[1]
        self.k, self.v = (self._flat(a) for a in (k, v))
        self.kt, self.k_sample_t = self.k.swapaxes(1, 2), k_sample.swapaxes(1, 2)
        self.k_sample, self.v_sample = k_sample, v_sample

    def _flat(self, a):
        return a.reshape(self.P * self.M, *a.shape[2:])

    def tiles(self, a):
        """[P, C, ..] -> [steps, U, ..]"""
        unit = self.cfg.unit
        return a.reshape(self.P * self.C // unit, unit, *a.shape[2:])

    def operand(self, a):
        return a.astype(_wide(a)) if self.cfg.upcast else a

    def steps(self) -> dict[str, Any]:
        """What a scan over units of tiles needs to know of each."""
        p = jnp.broadcast_to(jnp.arange(self.P)[:, None], (self.P, self.C))
        out = {"p": p, "block": self.x.block}
        if self.x.mask is not None and self.x.places is not None:
            out |= {"h": self.x.places.h, "i": self.x.places.i}
        return jax.tree.map(self.tiles, out)

    def own(self, at):
        return at["p"] * self.M + at["block"]

    def keys_t(self, at):
        return self.operand(jnp.concatenate([self.kt[self.own(at)], self.k_sample_t[at["p"]]], -1))

    def keys(self, at):
        return self.operand(jnp.concatenate([self.k[self.own(at)], self.k_sample[at["p"]]], 1))

    def values(self, at):
        return self.operand(jnp.concatenate([self.v[self.own(at)], self.v_sample[at["p"]]], 1))

    def modify(self, s, at, keys_axis: int):
        """Scores [U, .., ..] with bias and mask; keys on `keys_axis`, queries on the other."""
        mine = self.x.block_sample[at["p"]] == at["block"][:, None]
        sampled = jnp.where(mine, -jnp.inf, self.x.bias_sample[at["p"]])
        bias = jnp.concatenate([self._flat(self.x.bias)[self.own(at)], sampled], 1)
        other = 3 - keys_axis
        s = s + jnp.expand_dims(bias, other).astype(s.dtype)
        if self.x.mask is None or self.x.places is None:
            return s
        where = self.x.places
        j = jnp.concatenate([self._flat(where.j)[self.own(at)], where.j_sample[at["p"]]], 1)
        h, i = (jnp.expand_dims(a, keys_axis) for a in (at["h"], at["i"]))
        b = where.b[at["p"]].reshape(-1, 1, 1)
        return jnp.where(self.x.mask(b, h, i, jnp.expand_dims(j, other)), s, -jnp.inf)


def _forward(cfg: _Config, q, k, v, k_sample, v_sample, x: Problem):
    lists = _Lists(cfg, k, v, k_sample, v_sample, x)

    def step(_, tile):
        qu, at = tile
        s = lists.modify(_dot(lists.operand(qu) * cfg.scale, lists.keys_t(at)), at, 2)
        top = s.max(-1, keepdims=True)
        top = jnp.where(top == -jnp.inf, 0, top)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        nothing = total == 0
        total = jnp.where(nothing, 1, total)
        values = lists.values(at)
        o = _dot(p.astype(values.dtype), values) / total
        lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))[..., 0]
        return None, (o.astype(v.dtype), lse)

    _, (o, lse) = lax.scan(step, None, (lists.tiles(q), lists.steps()))
    return o.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def _backward(cfg: _Config, saved: Any, grads: Any):
    q, k, v, k_sample, v_sample, x, o, lse = saved
    do, dlse = grads
    acc = _wide(q)
    delta = (do.astype(acc) * o.astype(acc)).sum(-1) - dlse.astype(acc)
    far = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # exp(s - inf) = 0 in rows without keys
    lists = _Lists(cfg, k, v, k_sample, v_sample, x)
    S = lists.S

    def step(carry, tile):
        qu, dou, far, delta, at = tile
        qu, dou = lists.operand(qu) * cfg.scale, lists.operand(dou)
        keys, values = lists.keys(at), lists.values(at)
        s = lists.modify(_dot(keys, qu.swapaxes(1, 2)), at, 1)
        p = jnp.exp(s - far[:, None])
        ds = p * (_dot(values, dou.swapaxes(1, 2)) - delta[:, None])
        p, ds = p.astype(dou.dtype), ds.astype(qu.dtype)
        dq = _dot(lists.keys_t(at), ds) * cfg.scale
        dkeys, dvalues = _dot(ds, qu), _dot(p, dou)
        dk, dv, dk_sample, dv_sample = carry
        own = lists.own(at)
        carry = (
            dk.at[own].add(dkeys[:, :S]),
            dv.at[own].add(dvalues[:, :S]),
            dk_sample.at[at["p"]].add(dkeys[:, S:]),
            dv_sample.at[at["p"]].add(dvalues[:, S:]),
        )
        return carry, dq.astype(q.dtype)

    zeros = tuple(jnp.zeros(a.shape, acc) for a in (lists.k, lists.v, k_sample, v_sample))
    tiles = (*(lists.tiles(a) for a in (q, do, far, delta)), lists.steps())
    grads, dq = lax.scan(step, zeros, tiles)
    dq = dq.swapaxes(2, 3).reshape(q.shape)
    shaped = (g.reshape(a.shape).astype(a.dtype) for g, a in zip(grads, (k, v, k_sample, v_sample)))
    return dq, *shaped, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cfg, q, k, v, k_sample, v_sample, x):
    return _forward(cfg, q, k, v, k_sample, v_sample, x)


def _attend_fwd(cfg, *args):
    o, lse = _forward(cfg, *args)
    return (o, lse), (*args, o, lse)


_attend.defvjp(_attend_fwd, _backward)
