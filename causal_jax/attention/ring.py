"""Ring attention: exact attention over a time axis that is cut over devices.

Device r of n holds queries, keys and values of T / n positions. Keys and values travel round the
ring; at each of n steps a device attends to those that have come by and merges:

    step s on device r:   (o_s, lse_s) = attention(q of r, k v of device r - s mod n)
    o, lse = merge over s

The mask is asked at absolute positions, so each step has its own map of live tiles and dead ones
cost nothing. Under a causal mask contiguous pieces would leave the first device idle while the last
one does everything; `zigzag` gives device r stripes r and 2n - 1 - r of 2n, which is the same work
for everybody.

The backward pass goes round once more, with dk and dv travelling beside k and v: a device never
holds more than two pieces of keys. With w_s = exp(lse_s - lse),

    do_s = w_s do        dlse_s = w_s (do . (o_s - o) + dlse)

    cost     dense attention's over n devices; 2 K (H + H') T / n numbers sent per step and device
    exact    always

Deviation: parts are merged by `merge_attention`, and each step's forward is made again in the
backward pass, so that any implementation of dense attention serves. Papers: Ring Attention with
Blockwise Transformers, arXiv 2310.01889; Striped Attention, arXiv 2311.09431.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from causal_jax.attention._base import Case, attention
from causal_jax.attention.dense import Dense, _check, _check_mask, dense_attention
from causal_jax.attention.merge import merge_attention
from causal_jax.errors import InputError
from causal_jax.masks import PARTIAL, Mask, Prefix, as_mask
from causal_jax.masks.tiles import Tiles
from causal_jax.masks.values import namespace, pytree
from causal_jax.placement import BATCH, HEADS, TIME, dividing
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import OFF, Tap


class _Ring(NamedTuple):
    """What is static on every device."""

    axis: str
    n: int
    stripe: int
    zigzag: bool
    scale: float | None
    soft_cap: float | None
    implementation: str | None


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask | Bool[Array, "..."] | None = None,
    mesh: Any = None,
    axis: str = TIME,
    zigzag: bool | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    kv_length: Int[Array, "B"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Exact self-attention with T cut over a mesh axis, differentiable (reverse mode).

    Args:
        q, k, v: global arrays. Rows are also cut over `data` and `fsdp` and heads over `tensor`
            where the mesh has these axes and they divide.
        mask, scale, soft_cap, kv_length: as in `dense_attention`; the mask at absolute positions.
            What arrays it holds are copied to all devices.
        mesh: the devices; None: the mesh that is set (`jax.set_mesh`).
        axis: the mesh axis of the ring.
        zigzag: device r works on stripes r and 2n - 1 - r; None: where 2n divides T.
        return_lse: also return the log of the sum of exponentials (differentiable).
        implementation: of `dense_attention`, for each step.

    Returns:
        o in v's dtype, cut as q is.

    Raises:
        InputError: no such mesh axis, a length that n does not divide, shapes that do not fit.
    """
    _check(q, k, v, mask, None, None, soft_cap, scale)
    (B, T, N, _), K = q.shape, k.shape[2]
    if k.shape[1] != T:
        raise InputError(f"q {q.shape} and k {k.shape}: ring attention is self-attention")
    shape = dict((mesh or jax.sharding.get_abstract_mesh()).shape)
    if axis not in shape:
        known = ", ".join(shape) or "no mesh is set"
        raise InputError(f"axis={axis!r}: the mesh has no such axis ({known})")
    n = shape[axis]
    if T % n:
        raise InputError(f"length {T}: expected a multiple of {axis}={n}, the devices of the ring")
    if zigzag and T % (2 * n):
        raise InputError(f"length {T}: zigzag needs a multiple of 2 x {axis} = {2 * n}")
    stripes: bool = T % (2 * n) == 0 if zigzag is None else zigzag
    mask = as_mask(mask)
    if kv_length is not None:
        mask = mask & Prefix(kv_length)
    _check_mask(mask, B, N)
    mask._require(T, T)
    ring = _Ring(
        axis, n, T // (2 * n) if stripes else T // n, stripes, scale, soft_cap, implementation
    )
    rows = dividing(shape, BATCH, B)
    heads = dividing(shape, (HEADS,), K)
    spec = PartitionSpec(rows or None, axis, heads or None)

    def local(q, k, v, mask):
        first = _index(rows, shape) * len(q), _index(heads, shape) * q.shape[2]
        q, k, v = (_to_zigzag(x, ring) if stripes else x for x in (q, k, v))
        o, lse = _around(ring, q, k, v, (mask, *first))
        return tuple(_from_zigzag(x, ring) if stripes else x for x in (o, lse))

    o, lse = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec, spec, spec, PartitionSpec()),
        out_specs=(spec, spec),
        check_vma=False,
    )(q, k, v, mask)
    return (o, lse) if return_lse else o


def _index(axes: tuple[str, ...], shape: dict[str, int]) -> Any:
    """This device's number along several mesh axes, the first one slowest."""
    number = jnp.zeros((), jnp.int32)
    for axis in axes:
        number = number * shape[axis] + jax.lax.axis_index(axis)
    return number


@pytree("mask", "b0", "h0", "q_start", "k_start")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Local(Mask):
    """`mask` asked by local indices: of rows and heads from b0 and h0 on, and of two stripes of
    `stripe` positions that begin at `q_start` [2] among the queries, `k_start` [2] among the keys.
    """

    mask: Mask
    b0: Any
    h0: Any
    q_start: Any
    k_start: Any
    stripe: int
    sizes: tuple[int, int]

    @property
    def batch(self) -> int:
        return self.sizes[0] if self.mask.batch > 1 else 1

    @property
    def heads(self) -> int:
        return self.sizes[1] if self.mask.heads > 1 else 1

    @property
    def _blind(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mask._blind

    def _at(self, start, i):
        return jnp.where(i < self.stripe, i + start[0], i - self.stripe + start[1])

    def _allow(self, b, h, i, j):
        i, j = self._at(self.q_start, i), self._at(self.k_start, j)
        return self.mask(b + self.b0, h + self.h0, i, j)

    def _status(self, t):
        """Tiles that lie in two stripes are PARTIAL."""
        whole, ends = True, []
        for start, low, high in ((self.q_start, t.q0, t.q1), (self.k_start, t.k0, t.k1)):
            whole = whole & ((low < self.stripe) == (high <= self.stripe))
            ends += [self._at(start, low), self._at(start, high - 1) + 1]
        inside = self.mask._tile_status(
            Tiles._make((t.b + self.b0, t.h + self.h0, *ends, t.extent))
        )
        return namespace(inside, whole).where(whole, inside, jnp.int8(PARTIAL))


def starts(device: Any, n: int, stripe: int, zigzag: bool) -> Any:
    """Where the stripes of a device begin, [2]; without zigzag there is one."""
    other = (2 * n - 1 - device) * stripe
    return jnp.stack([device * stripe, other if zigzag else jnp.zeros_like(other)])


def _step(ring: _Ring, q, k, v, context, step):
    """Attention to the keys that are here at a step."""
    mask, b0, h0 = context
    here = jax.lax.axis_index(ring.axis)
    own, other = (
        starts(r, ring.n, ring.stripe, ring.zigzag) for r in (here, (here - step) % ring.n)
    )
    local = _Local(mask, b0, h0, own, other, ring.stripe, (len(q), q.shape[2]))
    return dense_attention(
        q, k, v, mask=local, scale=ring.scale, soft_cap=ring.soft_cap, return_lse=True,
        implementation=ring.implementation,
    )  # fmt: skip


def _pass_on(ring: _Ring, *arrays):
    """Everything to the next device of the ring."""
    to = [(r, (r + 1) % ring.n) for r in range(ring.n)]
    return tuple(jax.lax.ppermute(x, ring.axis, to) for x in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _around(ring: _Ring, q, k, v, context):
    wide = jnp.promote_types(jnp.float32, q.dtype)

    def turn(carry, step):
        k, v, o, lse = carry
        part, part_lse = _step(ring, q, k, v, context, step)
        o, lse = merge_attention((o, part), (lse, part_lse))
        return (*_pass_on(ring, k, v), o, lse), None

    o = jnp.zeros((*q.shape[:3], v.shape[-1]), wide)
    carry = (k, v, o, jnp.full(q.shape[:3], -jnp.inf, wide))
    (_, _, o, lse), _ = jax.lax.scan(turn, carry, jnp.arange(ring.n))
    return o.astype(v.dtype), lse


def _around_fwd(ring, q, k, v, context):
    o, lse = _around(ring, q, k, v, context)  # pyright: ignore[reportGeneralTypeIssues]
    return (o, lse), (q, k, v, context, o, lse)


def _around_bwd(ring: _Ring, saved, grads):
    q, k, v, context, o, lse = saved
    wide = lse.dtype
    do, dlse = (g.astype(wide) for g in grads)
    safe = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # exp(lse_s - inf) = 0 in rows without keys

    def turn(carry, step):
        k, v, dq, dk, dv = carry
        (part, part_lse), pull = jax.vjp(
            lambda q, k, v: _step(ring, q, k, v, context, step), q, k, v
        )
        w = jnp.exp(part_lse - safe)
        away = (do * (part.astype(wide) - o.astype(wide))).sum(-1)
        do_part = (w[..., None] * do).astype(part.dtype)
        parts = pull((do_part, (w * (away + dlse)).astype(part_lse.dtype)))
        dq, dk, dv = (x + g.astype(wide) for x, g in zip((dq, dk, dv), parts))
        k, v, dk, dv = _pass_on(ring, k, v, dk, dv)
        return (k, v, dq, dk, dv), None

    zeros = (jnp.zeros(x.shape, wide) for x in (q, k, v))
    (_, _, *sums), _ = jax.lax.scan(turn, (k, v, *zeros), jnp.arange(ring.n))
    return (*(g.astype(x.dtype) for g, x in zip(sums, (q, k, v))), None)


_around.defvjp(_around_fwd, _around_bwd)


def _routes(n: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where device r sends stripes 2r and 2r + 1, which it holds of a contiguous cut."""
    owner = [min(s, 2 * n - 1 - s) for s in range(2 * n)]
    even, odd = ([(r, owner[2 * r + half]) for r in range(n)] for half in (0, 1))
    return even, odd


def _to_zigzag(x, ring: _Ring):
    """Contiguous pieces [B, T / n, ..] -> stripes r and 2n - 1 - r."""
    even, odd = (
        jax.lax.ppermute(half, ring.axis, route)
        for half, route in zip(jnp.split(x, 2, 1), _routes(ring.n))
    )
    first_even = jax.lax.axis_index(ring.axis) % 2 == 0  # stripe r is the even one
    pair = jnp.where(first_even, even, odd), jnp.where(first_even, odd, even)
    return jnp.concatenate(pair, 1)


def _from_zigzag(x, ring: _Ring):
    """Its inverse."""
    first, second = jnp.split(x, 2, 1)
    first_even = jax.lax.axis_index(ring.axis) % 2 == 0
    pair = jnp.where(first_even, first, second), jnp.where(first_even, second, first)
    back = ([(to, r) for r, to in route] for route in _routes(ring.n))
    return jnp.concatenate(
        [jax.lax.ppermute(half, ring.axis, route) for half, route in zip(pair, back)], 1
    )


@attention.register("ring", cases=(Case((2, 17, 4, 8), kv_heads=2),))
@dataclasses.dataclass(frozen=True)
class Ring(Dense):
    """Dense attention that goes round the `context` axis of the mesh that is set, if it has one.

    Without such an axis, for queries that are not all the keys' own (a cache) and where a tap wants
    to see inside, it is `Dense` itself: the results are the same.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        key: Key[Array, ""] | None = None,
        tap: Tap = OFF,
        implementation: str | None = None,
        q_offset: int | Int[Array, "B"] = 0,
        kv_length: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T N V"]:
        """Attend; an `implementation` given here wins over the spec's."""
        T = q.shape[1]
        own = k.shape[1] == T and isinstance(q_offset, int) and q_offset == 0
        inside = any(tap.wants(site) for site in ("mask", "bias", "scores", "pattern"))
        n = _ring_size()
        if n == 1 or not own or inside or T % n:
            return super().__call__(
                q, k, v, mask=mask, key=key, tap=tap, implementation=implementation,
                q_offset=q_offset, kv_length=kv_length,
            )  # fmt: skip
        z: Any = ring_attention(
            q, k, v, mask=self.allowed(mask), scale=self.scale, soft_cap=self.soft_cap,
            kv_length=kv_length, implementation=implementation or self.implementation,
        )  # fmt: skip
        return tap("z", z)


def _ring_size() -> int:
    """Devices along `context` in the mesh that is set; 1 inside of `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    return mesh.shape[TIME] if kinds.get(TIME) == AxisType.Auto else 1
