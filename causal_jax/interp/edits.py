"""The catalogue: interventions of the literature as named functions that return Edits.

    out, acts = run(model, tokens, edits=[patch(clean, layer=3, position=5), steer(v, layer=8)])

Every function returns a list, lists nest and apply in order. Common arguments:

    layer     None: all | int, possibly traced | several. Layer l counts from 0; its `resid_post`
              is what papers call "after l + 1 layers".
    position, query, key, head   selections, see `interp.selection`. Heads are query heads, in
              grouped-query attention too. Positions are places in the array at hand: under left
              padding or a cache translate them first (`interp.tokens`).
    **when    further loops, e.g. step=range(1, 50) while decoding.

Edits of the attention mask are in `interp.edges`, those of the pattern in `interp.counterfactuals`.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from causal_jax.edits import Edit, like, site
from causal_jax.errors import InputError
from causal_jax.interp.selection import (
    Layer,
    Selection,
    at_layer,
    check,
    hits,
    leaves,
    per_layer,
)
from causal_jax.shapes import Array, Float, Key

OUTSIDE = ("embed", "final", "logits")  # sites that no layer has
Acts = Mapping[str, Any]


def ablate_heads(
    heads: Any,
    how: Literal["zero", "mean", "uniform"] = "zero",
    *,
    mean: Any = None,
    position: Selection = None,
    **when: Any,
) -> list[Edit]:
    """Take away what heads write.

        zero     z <- 0
        mean     z <- mean                                          at the head's output
        uniform  q <- 0: all visible keys get equal weight, the head writes their mean value

    Args:
        heads: bool [L, N], or a list of (layer, head); ints may be traced.
        mean: for "mean": [L, N, H] or [L, T, N, H], of `attn.z`.
        position: of the queries.

    Raises:
        InputError: heads in no such form, or `mean` missing or without use.
    """
    if (how == "mean") != (mean is not None) or how not in ("zero", "mean", "uniform"):
        raise InputError(
            f"ablate_heads: how={how!r} with mean={'given' if mean is not None else None}; use "
            "'zero', 'uniform', or 'mean' with mean= [L, N, H] or [L, T, N, H]"
        )
    name = "q" if how == "uniform" else "attn.z"
    position = leaves("position", position)
    if getattr(heads, "ndim", 0) == 2 and heads.dtype == bool:
        value = jnp.zeros(len(heads)) if mean is None else _mean_of(mean)
        args = value, per_layer(position, len(heads)), heads
        return [site(name, **when).apply(_replace, *args, per="layer")]
    edits = []
    for layer, chosen in _by_layer(heads):
        value = 0.0 if mean is None else _of_layer(_mean_of(mean), layer, "mean")
        at = site(name, layer=layer, **when)
        edits.append(at.apply(_replace, value, position, leaves("head", chosen)))
    return edits


def patch(
    clean: Any,
    *,
    site: str = "resid_post",
    layer: Layer = None,
    position: Selection = None,
    head: Selection = None,
    **when: Any,
) -> list[Edit]:
    """Activation patching: put in what another run had there.

    `x <- clean` at the chosen layers, positions and heads.

    Args:
        clean: the other run's captures ({site: array}), or the array of this site: [L, B, T, ...],
            [B, T, ...] for a site outside the layers. A batch of 1 serves all rows.
        site: what to patch.
        head: for sites with heads: q, k, v (key/value heads), attn.z.

    Raises:
        InputError: `clean` lacks the site, or a layer it does not have is asked for.
    """
    sels = leaves("position", position), leaves("head", head)
    return _changed(site, _replace, _array(clean, site), sels, layer, when)


def path_patch(
    base: Acts,
    source: Acts,
    senders: Sequence[tuple[Any, Any]],
    *,
    freeze: Sequence[str] = ("attn.z", "mlp_out"),
    position: Selection = None,
) -> list[Edit]:
    """Path patching: only the direct way from the senders to what is read changes.

    Every head and feed-forward layer is held at `base`, then the senders get their `source` value:
    the final residual stream moves by (z_source - z_base) W_O of the senders and nothing else.
    To follow the path to a receiver, capture the receiver's input (`q`, `k`, `v`, ...) under these
    edits, and `patch` it into an ordinary run.

    Args:
        base: captures of the run being changed, with the `freeze` sites.
        source: captures of the other run, with `attn.z`.
        senders: (layer, head); ints may be traced.
        freeze: sites held at their base value; ("attn.z",) lets feed-forward layers respond.
        position: where the senders change.
    """
    held = [patch(base, site=name) for name in freeze]
    sent = [
        patch(source, site="attn.z", layer=layer, head=head, position=position)
        for layer, head in senders
    ]
    return [e for edits in (*held, *sent) for e in edits]


def subspace(
    source: Any,
    basis: Float[Array, "D *k"] | Float[np.ndarray, "D *k"],
    *,
    site: str = "resid_post",
    layer: Layer = None,
    position: Selection = None,
    head: Selection = None,
    **when: Any,
) -> list[Edit]:
    """Patch only what lies in a subspace: x <- x + (source - x) V V^T.

    Args:
        source: as `clean` of `patch`.
        basis: V [D, k] with orthonormal columns, or one vector [D] of any length. May be traced:
            the edit can be trained (DAS, arXiv 2303.02536).

    Raises:
        InputError: known columns that are not orthonormal.
    """
    v = _basis(basis)
    sels = leaves("position", position), leaves("head", head)
    return _changed(site, _subspace, _array(source, site), sels, layer, when, v)


def steer(
    vector: Float[Array, "..."] | Float[np.ndarray, "..."],
    *,
    scale: Any = 1.0,
    site: str = "resid_post",
    layer: Layer = None,
    position: Selection = None,
    head: Selection = None,
    **when: Any,
) -> list[Edit]:
    """x <- x + scale * vector. `vector` [D] (or what broadcasts against [B, T, D])."""
    sels = leaves("position", position), leaves("head", head)
    return [at_layer(site, layer, when).apply(_add, vector, scale, *sels)]


def noise(
    key: Key[Array, ""],
    scale: Any,
    *,
    site: str = "embed",
    layer: Layer = None,
    position: Selection = None,
    **when: Any,
) -> list[Edit]:
    """x <- x + scale * N(0, 1), as causal tracing corrupts the subject (arXiv 2202.05262).

    Same key, same noise: at all chosen layers too.
    """
    args = key, scale, leaves("position", position)
    return [at_layer(site, layer, when).apply(_noise, *args)]


# What the edits do: module-level functions, whose identity is part of the compile key.


def _replace(x, new, position, head):
    return _put(x, _fitted(new, x), position, head)


def _subspace(x, source, position, head, v):
    wide = jnp.promote_types(jnp.float32, x.dtype)
    if v.shape[0] != x.shape[-1]:
        raise InputError(f"a basis of shape {list(v.shape)} does not fit")
    source = like(jnp.broadcast_to(_fitted(source, x), x.shape), x)
    gap = source.astype(wide) - x.astype(wide)
    new = x.astype(wide) + (gap @ v.astype(wide)) @ v.astype(wide).T
    return _put(x, new, position, head)


def _add(x, vector, scale, position, head):
    step = jnp.broadcast_to(_fitted(scale * vector, x).astype(x.dtype), x.shape)
    return _put(x, x + like(step, x), position, head)


def _noise(x, key, scale, position):
    drawn = like(scale * jax.random.normal(key, x.shape), x)
    return _put(x, x + drawn.astype(x.dtype), position, None)


def _put(x, new, position, head):
    """new where chosen, x elsewhere; on explicit meshes both take x's sharding."""
    on = jnp.broadcast_to(_chosen(x, position, head), x.shape)
    new = jnp.broadcast_to(new.astype(x.dtype), x.shape)
    return jnp.where(like(on, x), like(new, x), x)


def _fitted(value, x):
    """value with as many axes as x (those it lacks are batch and time)."""
    value = jnp.asarray(value)
    shape = (1,) * (x.ndim - value.ndim) + value.shape
    if len(shape) != x.ndim or any(n not in (1, m) for n, m in zip(shape, x.shape)):
        raise InputError(f"a value of shape {list(value.shape)} does not fit")
    return value.reshape(shape)


def _chosen(x, position, head):
    """Where an edit acts, as booleans that broadcast to x [B, T, ...]."""
    on = hits("position", position, x.shape[1])
    on = on.reshape(*on.shape, *(1,) * (x.ndim - 2))
    if head is None:
        return on
    if x.ndim != 4:
        raise InputError(f"head={head}: a site of shape {list(x.shape)} has no heads")
    return on & hits("head", head, x.shape[2])[:, None, :, None]


# How edits are put together.


def _changed(name, fn, values, sels, layer, when, *args):
    """`fn(x, value of this layer, *selections, *args)` at the chosen layers."""
    # Edits may become arguments of a compiled program, where nothing can be checked any more.
    batch = 0 if name in OUTSIDE else 1
    for what, sel, size in zip(("position", "head"), sels, jnp.shape(values)[batch + 1 : -1]):
        if size > 1:
            check(what, sel, size)
    if name in OUTSIDE:
        if layer is not None:
            raise InputError(f"site {name!r} is in no layer: layer={layer} has no meaning")
        return [site(name, **when).apply(fn, values, *sels, *args)]
    if layer is not None and np.ndim(layer) == 0:
        value = _of_layer(values, layer, f"site {name!r}")
        return [at_layer(name, layer, when).apply(fn, value, *sels, *args)]
    L = len(values)
    rest = per_layer((*sels, *args), L)
    return [at_layer(name, layer, when).apply(fn, values, *rest, per="layer")]


def _array(acts: Any, name: str) -> Any:
    if not isinstance(acts, Mapping):
        return acts
    if name not in acts:
        near = difflib.get_close_matches(name, acts, n=3, cutoff=0.5) or list(acts)
        raise InputError(f"no captured {name!r}; nearest: {', '.join(near)}; capture it first")
    return acts[name]


def _of_layer(values: Any, layer: Any, what: str) -> Any:
    if isinstance(layer, int | np.integer) and not 0 <= layer < len(values):
        raise InputError(f"{what}: layer={layer} is outside 0..{len(values) - 1}")
    return jnp.asarray(values)[layer]


def _mean_of(mean: Any) -> Any:
    mean = jnp.asarray(mean)
    if mean.ndim not in (3, 4):
        raise InputError(f"mean of shape {list(mean.shape)}: expected [L, N, H] or [L, T, N, H]")
    return mean


def _by_layer(heads: Any) -> list[tuple[Any, Any]]:
    """(layer, its heads) of a list of pairs; pairs with traced numbers stay alone."""
    try:
        pairs = [(layer, head) for layer, head in heads]
    except (TypeError, ValueError):
        raise InputError(
            f"heads={heads!r}: expected bool [L, N] or a list of (layer, head)"
        ) from None
    known = [p for p in pairs if all(isinstance(i, int | np.integer) for i in p)]
    grouped: dict[int, list[int]] = {}
    for layer, head in known:
        grouped.setdefault(int(layer), []).append(int(head))
    traced = [p for p in pairs if not all(isinstance(i, int | np.integer) for i in p)]
    return [*grouped.items(), *traced]


def _basis(basis: Any) -> Any:
    if jnp.ndim(basis) == 1:
        v = jnp.asarray(basis)
        return (v / jnp.linalg.norm(v))[:, None]
    if not isinstance(basis, Tracer):
        v = np.asarray(basis, np.float64)
        if v.ndim != 2 or not np.allclose(v.T @ v, np.eye(v.shape[1]), atol=1e-3):
            raise InputError(
                f"basis of shape {list(v.shape)} has columns that are not orthonormal; "
                "jnp.linalg.qr(basis)[0] makes them so"
            )
    return jnp.asarray(basis)
