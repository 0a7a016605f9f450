"""The same in plain XLA: a few tiles at a time, memory linear in the length, its own backward pass.

    ds = p (do v^T - delta)    delta = rowsum(do o) - dlse    p = exp(s - lse)
    dq = ds k                  dk += ds^T q                   dv += p^T do

Forward tiles are [queries, keys], backward ones [keys, queries]: no product contracts the first
axis of its left factor, which spares transposing tiles of scores.
On a CPU tiles are worked on side by side, each with products of its own: XLA runs the small
products of a batch on one core. Tiles without queries are left out there.
Reverse-mode differentiation only (custom_vjp).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lsh_attention.problem import Problem

LANES = 16  # tiles side by side


class _Config(NamedTuple):
    scale: float
    lanes: int  # tiles of a turn; 0: all tiles in one batch
    upcast: bool  # multiply in float32


def xla(
    x: Problem, scale: float, *, entries: int = 0, upcast: bool = True
) -> tuple[jax.Array, jax.Array]:
    """o [P, C, Q, V] in v's dtype and lse [P, C, Q] in float32, both differentiable.

    Args:
        scale: factor on q . k.
        entries: scores computed at once; 0: all, and then tiles without queries as well.
        upcast: multiply in float32 (best on a CPU), else in the arrays' own type, summing in
            float32.
    """
    C, Q, width = *x.q.shape[1:3], x.k.shape[2] + x.k_sample.shape[1]
    lanes = min(LANES, C, max(1, entries // (Q * width))) if entries else 0
    if lanes:
        x = _whole_turns(x, lanes)
    ints = x._replace(q=None, k=None, v=None, k_sample=None, v_sample=None)
    cfg = _Config(float(scale), lanes, upcast)
    o, lse = _attend(  # pyright: ignore[reportGeneralTypeIssues]
        cfg, x.q, x.k, x.v, x.k_sample, x.v_sample, ints
    )
    return o[:, :C], lse[:, :C]


def _whole_turns(x: Problem, lanes: int) -> Problem:
    """Empty tiles at the end, so that every turn has as many."""
    spare = -x.q.shape[1] % lanes

    def longer(a):
        return jnp.pad(a, [(0, spare * (n == 1)) for n in range(a.ndim)]) if spare else a

    used = jnp.full(x.q.shape[0], x.q.shape[1], jnp.int32) if x.used is None else x.used
    places = x.places
    if places is not None:
        places = places._replace(h=longer(places.h), i=longer(places.i))
    return x._replace(q=longer(x.q), block=longer(x.block), used=used, places=places)


def _wide(x):
    return jnp.promote_types(jnp.float32, x.dtype)


def _dot(a, b) -> jax.Array:
    """[U, m, n] [U, n, o] -> [U, m, o]"""
    return jnp.einsum("umn,uno->umo", a, b, preferred_element_type=_wide(a))


def _dot_t(a, b) -> jax.Array:
    """[U, m, n] [U, o, n] -> [U, m, o]"""
    return jnp.einsum("umn,uon->umo", a, b, preferred_element_type=_wide(a))


class _Lists:
    """The keys, values and biases of each tile's list: its block's, then the samples."""

    def __init__(self, cfg: _Config, k, v, k_sample, v_sample, x: Problem):
        self.cfg, self.x = cfg, x
        (self.P, self.C), (self.M, self.S) = x.block.shape, x.bias.shape[1:]
        self.k, self.v = (self._flat(a) for a in (k, v))
        self.k_sample, self.v_sample = k_sample, v_sample

    def _flat(self, a):
        return a.reshape(self.P * self.M, *a.shape[2:])

    def operand(self, a):
        return a.astype(_wide(a)) if self.cfg.upcast else a

    def _of(self, a, index):
        """Rows of a for the tiles of `index` [U]: one row is sliced, not gathered."""
        if index.shape[0] == 1:
            return lax.dynamic_slice_in_dim(a, index[0], 1)
        return a[index]

    def every(self) -> dict[str, Any]:
        """What has to be known of all tiles, [P C, ..]."""
        p = jnp.broadcast_to(jnp.arange(self.P)[:, None], (self.P, self.C))
        out = {"p": p, "block": self.x.block, "bias": self._biases()}
        if self.x.mask is not None and self.x.places is not None:
            out |= {"h": self.x.places.h, "i": self.x.places.i}
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)

    def _biases(self):
        """Of every tile's list, [P, C, S + R]: made once, not anew for every query of a tile."""
        mine = self.x.block_sample[:, None] == self.x.block[..., None]
        sampled = jnp.where(mine, -jnp.inf, self.x.bias_sample[:, None])
        own = jnp.take_along_axis(self.x.bias, self.x.block[..., None], 1)
        return jnp.concatenate([own, sampled], 2)

    def own(self, at):
        return at["p"] * self.M + at["block"]

    def keys(self, at):
        parts = self._of(self.k, self.own(at)), self._of(self.k_sample, at["p"])
        return self.operand(jnp.concatenate(parts, 1))

    def values(self, at):
        parts = self._of(self.v, self.own(at)), self._of(self.v_sample, at["p"])
        return self.operand(jnp.concatenate(parts, 1))

    def modify(self, s, at, keys_axis: int):
        """Scores [U, .., ..] with bias and mask; keys on `keys_axis`, queries on the other."""
        other = 3 - keys_axis
        s = s + jnp.expand_dims(at["bias"], other).astype(s.dtype)
        if self.x.mask is None or self.x.places is None:
            return s
        where = self.x.places
        j = self._of(self._flat(where.j), self.own(at)), self._of(where.j_sample, at["p"])
        j = jnp.expand_dims(jnp.concatenate(j, 1), other)
        h, i = (jnp.expand_dims(a, keys_axis) for a in (at["h"], at["i"]))
        b = self._of(where.b, at["p"]).reshape(-1, 1, 1)
        return jnp.where(self.x.mask(b, h, i, j), s, -jnp.inf)


def _over_tiles(lists: _Lists, arrays, step: Callable, carry) -> Any:
    """`carry = step(first, at, arrays of some tiles, carry)` for all tiles, flat [P C, ..]."""
    flat = [a.reshape(-1, *a.shape[2:]) for a in arrays]
    every, lanes = lists.every(), lists.cfg.lanes
    if not lanes:
        return step(0, every, flat, carry)

    def turn(n, carry, p):
        for lane in range(lanes):
            first = p * lists.C + n * lanes + lane
            at, parts = jax.tree.map(
                lambda a, first=first: lax.dynamic_slice_in_dim(a, first, 1), (every, flat)
            )
            carry = step(first, at, parts, carry)
        return carry

    def problem(p, carry):
        turns = -(-lists.x.used[p] // lanes)
        return lax.fori_loop(0, turns, functools.partial(turn, p=p), carry)

    return lax.fori_loop(0, lists.P, problem, carry)


def _put(x, part, first):
    return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), first, 0)


def _add(x, part, index):
    """x with rows added at index [U]."""
    if index.shape[0] == 1:
        return _put(x, lax.dynamic_slice_in_dim(x, index[0], 1) + part, index[0])
    return x.at[index].add(part)


def _forward(cfg: _Config, q, k, v, k_sample, v_sample, x: Problem):
    lists = _Lists(cfg, k, v, k_sample, v_sample, x)

    def step(first, at, tile, carry):
        s = _dot_t(lists.operand(tile[0]) * cfg.scale, lists.keys(at))
        s = lists.modify(s, at, 2)
        top = s.max(-1, keepdims=True)
        top = jnp.where(top == -jnp.inf, 0, top)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        nothing = total == 0
        total = jnp.where(nothing, 1, total)
        values = lists.values(at)
        o = _dot(p.astype(values.dtype), values) / total
        lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))[..., 0]
        return _put(carry[0], o, first), _put(carry[1], lse, first)

    P, C, Q = q.shape[:3]
    out = jnp.zeros((P * C, Q, v.shape[-1]), v.dtype), jnp.full((P * C, Q), -jnp.inf, _wide(q))
    o, lse = _over_tiles(lists, [q], step, out)
    return o.reshape(P, C, Q, -1), lse.reshape(P, C, Q)


def _backward(cfg: _Config, saved: Any, grads: Any):
    q, k, v, k_sample, v_sample, x, o, lse = saved
    do, dlse = grads
    acc = _wide(q)
    delta = (do.astype(acc) * o.astype(acc)).sum(-1) - dlse.astype(acc)
    far = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # exp(s - inf) = 0 in rows without keys
    lists = _Lists(cfg, k, v, k_sample, v_sample, x)
    S = lists.S

    def step(first, at, tile, carry):
        qu, dou, far, delta = tile
        qu, dou = lists.operand(qu) * cfg.scale, lists.operand(dou)
        keys, values = lists.keys(at), lists.values(at)
        s = lists.modify(_dot_t(keys, qu), at, 1)
        p = jnp.exp(s - far[:, None])
        ds = p * (_dot_t(values, dou) - delta[:, None])
        p, ds = p.astype(dou.dtype), ds.astype(qu.dtype)
        dkeys, dvalues = _dot(ds, qu), _dot(p, dou)
        dq, dk, dv, dk_sample, dv_sample = carry
        own = lists.own(at)
        return (
            _put(dq, _dot(keys.swapaxes(1, 2), ds) * cfg.scale, first),
            _add(dk, dkeys[:, :S], own),
            _add(dv, dvalues[:, :S], own),
            _add(dk_sample, dkeys[:, S:], at["p"]),
            _add(dv_sample, dvalues[:, S:], at["p"]),
        )

    P, C, Q, H = q.shape
    zeros = tuple(jnp.zeros(a.shape, acc) for a in (lists.k, lists.v, k_sample, v_sample))
    zeros = (jnp.zeros((P * C, H, Q), q.dtype), *zeros)
    dq, *sums = _over_tiles(lists, [q, do, far, delta], step, zeros)
    dq = dq.swapaxes(1, 2).reshape(q.shape)
    shaped = (g.reshape(a.shape).astype(a.dtype) for g, a in zip(sums, (k, v, k_sample, v_sample)))
    return dq, *shaped, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cfg, q, k, v, k_sample, v_sample, x):
    return _forward(cfg, q, k, v, k_sample, v_sample, x)


def _attend_fwd(cfg, *args):
    o, lse = _forward(cfg, *args)
    return (o, lse), (*args, o, lse)


_attend.defvjp(_attend_fwd, _backward)
