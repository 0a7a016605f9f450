"""The small print of masks as values: pytrees, constants, numpy or jax, clamped reads."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError

C = TypeVar("C", bound=type)


def pytree(*leaves: str) -> Callable[[C], C]:
    """Class decorator: register a dataclass whose fields `leaves` hold arrays or masks.

    Unlike `jax.tree_util.register_dataclass` it does not run `__post_init__` when jax rebuilds an
    object: jax also does that with placeholders (axes of vmap, shardings), which a check of the
    user's input would refuse.
    """

    def register(cls: C) -> C:
        static = tuple(f.name for f in dataclasses.fields(cls) if f.name not in leaves)
        keys = tuple(jax.tree_util.GetAttrKey(name) for name in leaves)

        def flatten(x):
            return [getattr(x, n) for n in leaves], tuple(getattr(x, n) for n in static)

        def flatten_with_keys(x):
            children, aux = flatten(x)
            return list(zip(keys, children)), aux

        def unflatten(aux, children):
            x = object.__new__(cls)
            for name, value in (*zip(leaves, children), *zip(static, aux)):
                object.__setattr__(x, name, value)
            return x

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register


@jax.tree_util.register_static
class Constant:
    """An array that is part of the program, not an argument: compared by content, no leaf.

    `Dense(constant(x))` is a static mask: its tile schedule is computed on the host; another x
    compiles again.
    """

    def __init__(self, value: Any):
        self.value = np.array(value)
        self.value.setflags(write=False)
        self._hash = hash((self.value.shape, self.value.dtype.str, self.value.tobytes()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Constant)
            and self._hash == other._hash
            and self.value.dtype == other.value.dtype
            and np.array_equal(self.value, other.value)
        )

    def __repr__(self) -> str:
        v = self.value
        return repr(v.tolist()) if v.size <= 8 else f"constant({v.dtype}{list(v.shape)})"


def constant(value: Any) -> Constant:
    """Freeze a concrete array, so that a mask made of it stays static. See `Constant`."""
    return value if isinstance(value, Constant) else Constant(value)


def unwrap(x: Any) -> Any:
    """The array behind a field: numpy for a `Constant`, else a jax array."""
    return x.value if isinstance(x, Constant) else jnp.asarray(x)


def namespace(*xs: Any) -> Any:
    """numpy unless a jax array takes part."""
    return jnp if any(isinstance(x, jax.Array) for x in xs) else np


def aligned(*xs: Any) -> tuple[Any, ...]:
    """Arrays of one rank (scalars stay scalars): strict rank promotion refuses anything else."""
    xs = tuple(
        x
        if isinstance(x, jax.Array | np.ndarray)
        else np.asarray(x, np.int32 if isinstance(x, int) else None)
        for x in xs
    )
    rank = max(x.ndim for x in xs)
    return tuple(
        x if x.ndim in (0, rank) else x.reshape((1,) * (rank - x.ndim) + x.shape) for x in xs
    )


def broadcast(x: Any, *like: Any) -> Any:
    """x broadcast against all of `like`; a view in numpy."""
    shape = np.broadcast_shapes(np.shape(x), *(np.shape(y) for y in like))
    if np.shape(x) == shape and (isinstance(x, jax.Array) or namespace(*like) is np):
        return x
    return namespace(x, *like).broadcast_to(x, shape)


def shared_size(field: str, sizes: tuple[int, ...]) -> int:
    """The common size of an axis, where 1 goes with everything."""
    known = {n for n in sizes if n != 1}
    if len(known) > 1:
        raise InputError(
            f"{field}: masks with {sorted(known)} cannot be combined: use one size, or 1"
        )
    return known.pop() if known else 1


def read(x: Any, *index: Any) -> Any:
    """x[index], every index clamped into its axis; numpy if x is a `Constant` and they are too."""
    x = unwrap(x)
    xp = namespace(x, *index)
    index = tuple(xp.clip(i, 0, n - 1) for i, n in zip(index, x.shape))
    return x[index] if xp is np else jnp.asarray(x).at[index].get(mode="promise_in_bounds")


def pad_rank(x: Any, rank: int) -> Any:
    """The field x with axes of size 1 in front: below `vmap` it lacks those mapped over."""
    x = unwrap(x)
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def field_shape(x: Any, rank: int) -> tuple[int, ...]:
    """Shape of `pad_rank(x, rank)`."""
    shape = np.shape(x.value if isinstance(x, Constant) else x)
    return (1,) * (rank - len(shape)) + tuple(shape)


def as_field(x: Any, rank: int) -> Any:
    """`pad_rank` that keeps a `Constant` one, so that reads of it stay on the host."""
    if isinstance(x, Constant):
        return x if x.value.ndim == rank else constant(pad_rank(x, rank))
    return pad_rank(x, rank)


def set_size(mask: Any, field: str, least: int | None, optional: bool = False) -> None:
    """Check a static size, and store it as a plain int."""
    value = getattr(mask, field)
    if value is None and optional:
        return
    size = None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        size = int(value)
    if size is None or (least is not None and size < least):
        want = "an integer" if least is None else f"an integer >= {least}"
        want += " or None (unbounded)" if optional else ""
        raise InputError(f"{type(mask).__name__}: {field}={value!r}: expected {want}")
    object.__setattr__(mask, field, size)


def check_array(mask: Any, field: str, kind: str, ranks: tuple[int, ...], shape: str) -> None:
    """Check that a field is a `Constant` or an array of booleans or integers of a legal rank."""
    value = getattr(mask, field)
    if isinstance(value, list | tuple):
        value = np.asarray(value)
        object.__setattr__(mask, field, value)
    array = value.value if isinstance(value, Constant) else value
    dtype = getattr(array, "dtype", None)
    good = dtype is not None and jnp.issubdtype(
        dtype, jnp.bool_ if kind == "boolean" else jnp.integer
    )
    if not good or len(array.shape) not in ranks or 0 in array.shape:
        got = f"{dtype}{list(array.shape)}" if dtype is not None else repr(value)
        raise InputError(
            f"{type(mask).__name__}: {field} is {got}: expected a {kind} array {shape}"
        )
    if isinstance(value, Constant) and max(ranks) > 1:
        object.__setattr__(mask, field, as_field(value, max(ranks)))  # reads need not reshape it
