"""Which positions, which heads: one language for the whole catalogue.

    None               all                         5, -1          one (negative: from the end)
    [0, 3], range(4)   several                     slice(2, 9)    a span
    int [B, n]         others in every row         bool [n], [B, n]  a mask

Everything but the form may be traced: a position can be the axis of a `vmap`. What is known and out
of range is refused, what is traced and out of range selects nothing.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.edits import Site, is_bool, site
from causal_jax.errors import InputError
from causal_jax.shapes import Array, Bool

Layer = Any  # None: all | int | several | bool mask [L] | traced int
Selection = Any  # None | int | sequence of ints | slice | int or bool array


def at_layer(name: str, layer: Layer, when: Mapping[str, Any]) -> Site:
    """The site of these layers, and of what `when` says of further loops."""
    return site(name, **when) if layer is None else site(name, layer=layer, **when)


def leaves(what: str, sel: Selection) -> Any:
    """A selection as a pytree of numbers and arrays, fit for the arguments of an `Edit`.

    Raises:
        InputError: it is no selection.
    """
    if sel is None:
        return None
    if isinstance(sel, slice):
        if sel.step not in (None, 1):
            raise InputError(f"{what}={sel}: a span has no step; give a list of indices")
        return (0 if sel.start is None else sel.start, sel.stop)
    if isinstance(sel, range | list | tuple):
        sel = np.asarray(sel, dtype=None if len(sel) else np.int32)
    whole = isinstance(sel, int) or jnp.issubdtype(getattr(sel, "dtype", str), jnp.integer)
    if isinstance(sel, bool) or not (is_bool(sel) or whole) or np.ndim(sel) > 2:
        raise InputError(
            f"{what}={sel!r} is no selection; use None (all), an int, a list of ints, a slice, "
            "an int array [B, n] or a bool mask [n] or [B, n]"
        )
    if is_bool(sel) and np.ndim(sel) == 0:
        raise InputError(f"{what}={sel!r}: a mask has one entry per {what}")
    return sel


def hits(what: str, sel: Any, size: int) -> Bool[Array, "b n"]:
    """Which of `size` entries are selected, [1, size] or one row per sequence.

    Args:
        what: name of the field, for messages.
        sel: as `leaves` returned it.

    Raises:
        InputError: a known index is out of range, or a mask has another length.
    """
    index = jnp.arange(size)
    if sel is None:
        return jnp.ones((1, size), bool)
    if isinstance(sel, tuple):
        lo, hi = (size if b is None else _from_front(b, size) for b in sel)
        return ((index >= lo) & (index < hi))[None]
    check(what, sel, size)
    if is_bool(sel):
        return jnp.asarray(sel).reshape(-1, size)
    sel = _from_front(jnp.atleast_1d(jnp.asarray(sel)), size)
    return (sel[..., None] == index.reshape((1,) * sel.ndim + (size,))).any(-2).reshape(-1, size)


def check(what: str, sel: Any, size: int) -> None:
    """Refuse a known index out of range, and a mask of another length.

    Raises:
        InputError: naming `what`, the value and what there is.
    """
    if is_bool(sel):
        if sel.shape[-1] != size:
            raise InputError(f"{what}: a mask of {sel.shape[-1]} entries, there are {size}")
    elif isinstance(sel, int | np.ndarray | np.integer):
        known = np.asarray(sel)
        if np.any((known < -size) | (known >= size)):
            raise InputError(f"{what}={known.tolist()} is outside 0..{size - 1}")


def _from_front(i: Any, size: int) -> Any:
    return jnp.where(jnp.asarray(i) < 0, jnp.asarray(i) + size, i)


def per_layer(sel: Any, layers: int) -> Any:
    """The same selection for every layer, as a payload with the layer axis in front."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (layers, *jnp.shape(a))), sel)
