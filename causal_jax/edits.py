"""An edit: what to change at which site of a model, and when; a pytree.

    site("attn.z", layer=range(4, 8)).at[:, :, h].mul(0.5)  ->  Edit

Static (part of the compile key): the site, the operation, the form of the index, `per`, `gate`.
Leaves: the payload, the ints and arrays of the index, the selections. Twelve edits of one form are
one compiled program. Used through `causal_jax.taps`, whose docstring has the catalogue.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from causal_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Deferrable:
    """A function for `apply` with a second form, for sites that need not become arrays.

    Attributes:
        now: x, *args -> x, as any function of `apply`.
        later: value, on, shape, *args -> value, where `value` stands for an array of that shape and
            the edit counts where `on` holds.
    """

    now: Callable
    later: Callable

    def __call__(self, x, *args):
        return self.now(x, *args)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["args", "parts", "when"],
    meta_fields=["site", "op", "index", "per", "gate"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """One change of one site (or of all that match a pattern); build it with `site(...)`."""

    site: str
    op: Any  # "set" | "add" | "mul" | function
    index: Any  # form of the index, None: the whole value
    per: Any  # loop axes that the payload has in front
    gate: str
    args: Any  # payload
    parts: Any  # ints, arrays and traced bounds of the index
    when: Any  # {loop axis: selection}


@dataclasses.dataclass(frozen=True)
class Site:
    """A site and when it is meant; `.at[index]` narrows it with the syntax of `jax.Array.at`."""

    name: str
    when: Any
    index: Any = None

    @property
    def at(self) -> "_At":
        """`.at[index]`: ints, arrays and the bounds of a slice without step may be traced."""
        return _At(self)

    def set(self, value, *, per=(), gate: str = "where") -> Edit:
        """x <- value, cast to x's dtype. `per`: the loop axis or axes that value has in front."""
        return _edit(self, "set", (value,), per, gate)

    def add(self, value, *, per=(), gate: str = "where") -> Edit:
        """x <- x + value."""
        return _edit(self, "add", (value,), per, gate)

    def mul(self, value, *, per=(), gate: str = "where") -> Edit:
        """x <- x * value."""
        return _edit(self, "mul", (value,), per, gate)

    def apply(self, fn, *args, per=(), gate: str = "where") -> Edit:
        """x <- fn(x, *args), of the same shape and dtype. `per` concerns all of args."""
        return _edit(self, fn, args, per, gate)


@dataclasses.dataclass(frozen=True)
class _At:
    site: Site

    def __getitem__(self, index) -> Site:
        return dataclasses.replace(self.site, index=index if isinstance(index, tuple) else (index,))


def site(name: str, /, **when) -> Site:
    """Where to intervene.

    Args:
      name: site name or fnmatch pattern, e.g. "resid_post", "attn.*".
      **when: loop axis = index | sequence of indices | range | bool mask, one entry per turn |
        traced int. Several axes: all must hold. None given: everywhere.
    Returns: a `Site`; its `.set .add .mul .apply`, also after `.at[index]`, give an `Edit`.
    Raises: InputError for a selection of another kind.
    """
    return Site(name, {axis: _selection(name, axis, sel) for axis, sel in when.items()})


def is_bool(a) -> bool:
    """Has a the dtype bool?"""
    return getattr(a, "dtype", None) == np.bool_


def _selection(name, axis, sel):
    if isinstance(sel, range | list | tuple):
        sel = np.asarray(sel, dtype=None if len(sel) else np.int32)
    integer = isinstance(sel, int) or jnp.issubdtype(getattr(sel, "dtype", str), jnp.integer)
    if (
        isinstance(sel, bool)
        or not (is_bool(sel) or integer)
        or np.ndim(sel) not in (is_bool(sel), 1)
    ):
        raise InputError(
            f"site {name!r}: {axis}={sel!r} is no selection; use an int, a sequence of ints, "
            "a range, a bool mask with one entry per turn of the loop, or an integer array"
        )
    if isinstance(sel, int | np.ndarray) and not is_bool(sel) and np.any(np.asarray(sel) < 0):
        raise InputError(f"site {name!r}: {axis}={sel!r} is negative; {axis} counts from 0")
    return sel


def selected(sel, index):
    """Is turn `index` of a loop selected? A Python bool when both are known, else a traced one."""
    if isinstance(index, int) and isinstance(sel, int | np.ndarray | np.integer):
        sel = np.asarray(sel)
        return bool(sel[index : index + 1].any() if is_bool(sel) else np.any(sel == index))
    if is_bool(sel):
        return lax.dynamic_index_in_dim(jnp.asarray(sel), index, keepdims=False)
    return jnp.any(jnp.asarray(sel) == index)


def _edit(at: Site, op, args, per, gate) -> Edit:
    if not isinstance(op, str) and not callable(op):
        raise InputError(f"site {at.name!r}: apply needs a function, got {op!r}")
    if gate not in ("where", "cond"):
        raise InputError(f'site {at.name!r}: gate={gate!r} is unknown; use "where" or "cond"')
    per = (per,) if isinstance(per, str) else tuple(per)
    if any(np.ndim(a) < len(per) for a in jax.tree.leaves(args)):
        raise InputError(f"site {at.name!r}: a payload per={per} needs these axes in front")
    form, parts = (None, ()) if at.index is None else _split(at.name, at.index)
    return Edit(at.name, op, form, per, gate, args, parts, at.when)


def _split(name, index):
    """Index -> (hashable form, leaves)."""
    form, parts = [], []
    for item in index:
        if item is None or item is Ellipsis:
            form.append("new" if item is None else "...")
        elif isinstance(item, slice) and not any(
            isinstance(b, jax.Array) for b in (item.start, item.stop, item.step)
        ):
            bounds = (item.start, item.stop, item.step)
            form.append(tuple(None if b is None else operator.index(b) for b in bounds))
        elif isinstance(item, slice):
            if item.step is not None:
                raise InputError(f"site {name!r}: a slice with traced bounds takes no step")
            form.append("span")
            parts.append((0 if item.start is None else item.start, item.stop))
        elif isinstance(item, bool | str | float):
            raise InputError(f"site {name!r}: {item!r} is no index")
        else:
            form.append("part")
            parts.append(np.asarray(item) if isinstance(item, list) else item)
    return tuple(form), tuple(parts)


def _join(name, edit: Edit, shape):
    """(index for `.at`, mask of the spans with traced bounds or None)."""
    parts, index, mask, axis = iter(edit.parts), [], None, 0
    widths = [
        0 if form in ("new", "...") else 1 if form != "part" else _width(part)
        for form, part in _zip_parts(edit)
    ]
    if sum(widths) > len(shape):
        raise InputError(f"site {name!r} is {list(shape)}; the index takes {sum(widths)} axes")
    for form, width in zip(edit.index, widths):
        if form == "new":
            index.append(None)
        elif form == "...":
            index.append(Ellipsis)
            width = len(shape) - sum(widths)
        elif form == "span":  # its length is unknown: take the whole axis, select afterwards
            lo, hi = (shape[axis] if b is None else b for b in next(parts))
            lo, hi = (jnp.where(jnp.asarray(b) < 0, b + shape[axis], b) for b in (lo, hi))
            where = lax.broadcasted_iota(jnp.int32, shape, axis)
            inside = (where >= lo) & (where < hi)
            mask = inside if mask is None else mask & inside
            index.append(slice(None))
        elif form == "part":
            index.append(_checked(name, next(parts), axis, shape))
        else:
            index.append(slice(*form))
        axis += width
    return tuple(index), mask


def _zip_parts(edit: Edit):
    parts = iter(edit.parts)
    return [(form, next(parts) if form in ("part", "span") else None) for form in edit.index]


def _width(part) -> int:  # axes of the value that one part of an index takes
    return part.ndim if is_bool(part) else 1


def _checked(name, part, axis, shape):
    """jax drops what lies outside; a known index that does is a mistake."""
    if isinstance(part, int | np.ndarray | np.integer) and not is_bool(part):
        known = np.asarray(part)
        if np.any((known < -shape[axis]) | (known >= shape[axis])):
            raise InputError(f"site {name!r}: index {part} is outside axis {axis} of {list(shape)}")
    return part


def like(value, x):
    """On explicit meshes the edited value gets the activation's sharding, not its payload's."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.explicit_axes and jax.typeof(value).sharding != sharding:
        return jax.sharding.reshard(value, sharding)
    return value


def _payload(name, value, x):
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.inexact) and not jnp.issubdtype(x.dtype, jnp.inexact):
        raise InputError(f"site {name!r} holds {x.dtype}: a value of {value.dtype} does not fit")
    return value.astype(x.dtype)


def _applied(edit: Edit, name, x):
    try:
        return edit.op(x, *edit.args)
    except InputError as e:  # a function does not know where it was called
        raise InputError(f"site {name!r} is {list(x.shape)}: {e}") from e


def _whole(edit: Edit, name, x):
    if callable(edit.op):
        return _applied(edit, name, x)
    value = _payload(name, edit.args[0], x)
    try:
        value = like(jnp.broadcast_to(value, x.shape), x)
    except ValueError as e:
        raise InputError(
            f"site {name!r} is {list(x.shape)}: a value of {list(value.shape)} does not fit"
        ) from e
    return value if edit.op == "set" else x + value if edit.op == "add" else x * value


def _indexed(edit: Edit, name, x):
    index, mask = _join(name, edit, x.shape)
    sharding = jax.typeof(x).sharding
    kw = {"out_sharding": sharding} if sharding.mesh.explicit_axes else {}
    if callable(edit.op):
        if mask is not None:
            raise InputError(f"site {name!r}: apply cannot take a slice with traced bounds")
        return x.at[index].set(_applied(edit, name, x[index]), **kw)
    value = _payload(name, edit.args[0], x)
    try:
        new = getattr(x.at[index], edit.op)(value, **kw)
    except (TypeError, ValueError) as e:
        raise InputError(f"site {name!r} is {list(x.shape)}: .at[...].{edit.op}: {e}") from e
    return new if mask is None else jnp.where(mask, new, x)


def edited(edit: Edit, name: str, x) -> Any:
    """x after the edit, gates aside.

    Raises: InputError with the site's name: shape or dtype change, index or payload do not fit.
    """
    x = jnp.asarray(x)
    new: Any = _whole(edit, name, x) if edit.index is None else _indexed(edit, name, x)
    if jnp.shape(new) != x.shape or jnp.result_type(new) != x.dtype:
        raise InputError(
            f"site {name!r} is {x.dtype}{list(x.shape)}; the edit made it "
            f"{jnp.result_type(new)}{list(jnp.shape(new))}"
        )
    return like(new, x)
