"""A loop over layers: traced once by `lax.scan` or unrolled in Python, with rematerialisation.

Layers of p kinds in a fixed order form a period: xs then is a tuple of p pytrees, each stacking the
G layers of its kind, and layer g of kind j is turn g*p + j. `tap.loop` is built on it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from causal_jax.errors import InputError

POLICIES: dict[str, Any] = {
    "full": None,  # keep nothing, recompute the layer
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep x @ w, not scores
}


def repeats(p: int, xs, length: int | None) -> int:
    """G, from the leading axes of the p pytrees xs and `length`.

    Raises: InputError if they are not one positive number.
    """
    if not isinstance(xs, tuple) or len(xs) != p:
        raise InputError(f"tap.loop: {p} bodies need a tuple of {p} xs")
    sizes = {jnp.shape(a)[0] for a in jax.tree.leaves(xs)}
    if length is not None:
        sizes.add(length)
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(f"tap.loop: leading axes of xs and length must be one number: {sizes}")
    return sizes.pop()


def scanned(body, carry, xs, first, extra, *, length: int, unroll: int | bool):
    """`lax.scan` over G periods.

    Args:
      body: (j, number of the turn) -> function (carry, x, extra) -> (carry, y, z), for kind j.
      xs: p pytrees [G, ...]. first: [G] number of each period's first turn, or None.
      extra: pytree [G*p, ...], one entry per turn.
    Returns: (carry, p pairs (ys, zs), stacked [G, ...]).
    """
    p = len(xs)
    if p > 1:
        extra = jax.tree.map(lambda a: a.reshape(length, p, *a.shape[1:]), extra)

    def period(carry, inputs):
        xs, first, extra = inputs
        outs = []
        for j in range(p):
            number = first + j if j and first is not None else first
            carry, y, z = body(j, number)(carry, xs[j], extra if p == 1 else at(extra, j))
            outs.append((y, z))
        return carry, outs

    return lax.scan(period, carry, (xs, first, extra), length=length, unroll=unroll)


def unrolled(body, carry, xs, extra, turns: range):
    """The same, turn by turn in Python.

    Args:
      body: (i, number of the turn) -> function (carry, x, extra) -> (carry, y, z), i from 0.
      xs, extra: as in `scanned`. turns: the numbers.
    Returns: (carry, [(y, z) of each turn]).
    """
    outs = []
    for i, number in enumerate(turns):
        carry, y, z = body(i, number)(carry, at(xs[i % len(xs)], i // len(xs)), at(extra, i))
        outs.append((y, z))
    return carry, outs


def rematerialised(body, remat: Any, *, prevent_cse: bool):
    """`body` under `jax.checkpoint`.

    Args:
      remat: None (body as it is), "full", "dots" or a policy of `jax.checkpoint_policies`.
    Raises: InputError for another string.
    """
    if remat is None:
        return body
    if not callable(remat) and remat not in POLICIES:
        raise InputError(f"remat={remat!r}: use None, {', '.join(map(repr, POLICIES))} or a policy")
    policy: Any = remat if callable(remat) else POLICIES[remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)


def at(tree, i):
    """Entry i of every leaf."""
    return jax.tree.map(lambda a: a[i], tree)


def stack(trees):
    """Pytrees of one structure -> one, with a new leading axis."""
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)
