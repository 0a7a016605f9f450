"""Exact linear memory over a time axis that is cut over devices.

Every device's tokens are one affine map of what it is handed, [M; S] -> A [M; S] + b: its columns
are found by reading and writing values [v | 0 | 0] from the starts M = [0 | I | 0], S = [0 | 0 | I]
in one run, since columns of values never meet. Maps compose associatively,

    (A_2, b_2) after (A_1, b_1) = (A_2 A_1, A_2 b_1 + b_2)

so a prefix over devices gives each the state before its first token, and what its queries read from
that state is a product with columns that are already there.

    cost     that of the run with V + 2 H columns instead of V, over n devices; 2 H (2 H + V)
             numbers per head gathered from every device
    exact    always (with several fast layers nothing of the kind exists)
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from causal_jax.memory._state import Gates
from causal_jax.placement import BATCH, HEADS, TIME, dividing
from causal_jax.shapes import Array


def devices() -> int:
    """How many devices share out time under the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    return mesh.shape[TIME] if kinds.get(TIME) == AxisType.Auto else 1


def over_context(
    run, q: Array, k: Array, v: Array, gates: Gates, weights: Array, momentum: Array | None, *,
    initial: Array, stored: Array, new: Array | None,
) -> tuple[Array, Array, Array | None, Array]:  # fmt: skip
    """`momentum_delta` with T cut over the mesh axis `context`; returns as it does.

    Args:
        run: `momentum_delta` with its static arguments bound.
        q, k, v, gates, weights, momentum, initial, stored, new: global arrays; rows are also cut
            over `data` and `fsdp` and heads over `tensor` where these divide.
    """
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    B, _, N, H = q.shape
    V = v.shape[-1]
    rows = dividing(shape, BATCH, B) or None
    heads = dividing(shape, (HEADS,), N) or None
    of_token, of_head = PartitionSpec(rows, TIME, heads), PartitionSpec(rows, heads)
    flag = PartitionSpec(rows, TIME)

    def local(q, k, v, gates, weights, momentum, initial, stored, new):
        B, _, N, _ = q.shape
        wide = jnp.promote_types(jnp.float32, v.dtype)
        parts = 1 if momentum is None else 2  # M, or M and S

        def columns(a):
            return jnp.concatenate(
                [a.astype(wide), jnp.zeros((*a.shape[:-1], parts * H), wide)], -1
            )

        unit = jnp.broadcast_to(jnp.eye(H, dtype=wide)[None, None], (B, N, H, H))
        nothing = jnp.zeros_like(unit)
        starts = [
            jnp.concatenate([jnp.zeros((B, N, H, V), wide), *own], -1)
            for own in ([[unit]] if parts == 1 else [[unit, nothing], [nothing, unit]])
        ]
        y, *ends, _ = run(
            q, k, columns(v), gates, starts[0], starts[1] if parts == 2 else None,
            initial=columns(initial), stored=stored, new=new,
        )  # fmt: skip
        end = jnp.concatenate(ends[:parts], -2)  # [B, N, parts H, V + parts H]
        own = jax.lax.all_gather((end[..., V:], end[..., :V]), TIME)
        A, b = jax.lax.associative_scan(_after, own)
        given = weights if momentum is None else jnp.concatenate([weights, momentum], -2)
        reached = A @ given[None].astype(wide) + b  # after every device
        before = jnp.concatenate([given[None].astype(wide), reached[:-1]])
        before = before[jax.lax.axis_index(TIME)]
        read = jnp.einsum("btns,bnsv->btnv", y[..., V:], before)
        last = reached[-1]
        ok = jnp.isfinite(reached).all((2, 3, 4))
        if heads is not None:  # a row is bad if one of its heads is
            ok = jax.lax.pmin(ok.astype(jnp.int32), heads) > 0
        S = last[:, :, H:] if parts == 2 else None
        return (y[..., :V] + read).astype(v.dtype), last[:, :, :H], S, ok

    S_spec = None if momentum is None else of_head
    args = (q, k, v, gates, weights, momentum, initial, stored, new)
    tokens = (of_token,) * 4  # q, k, v and all gates
    specs = (*tokens, of_head, S_spec, PartitionSpec(heads), flag)
    return jax.shard_map(
        local,
        in_specs=(*specs, None if new is None else flag),
        out_specs=(of_token, of_head, S_spec, PartitionSpec(None, rows)),
        check_vma=False,
    )(*args)


def _after(first, second):
    (A1, b1), (A2, b2) = first, second
    return A2 @ A1, A2 @ b1 + b2
