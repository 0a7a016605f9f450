"""Many interventions as one compiled program: a map over layers and positions is a `vmap`.

    edits_of = functools.partial(patch_at, acts)             # patch_at(acts, l, p) -> Edits
    effect = sweep(metric, functools.partial(model, tokens), edits_of, jnp.arange(L), jnp.arange(T))

The functions may be plain functions, modules, or `functools.partial`s of them. Arrays in a partial
and parameters of a module are arguments of the program: another prompt of the same length, other
weights, other captures run without compiling again. A lambda that closes over arrays works too, but
compiles every time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.errors import InputError
from causal_jax.taps import run


def sweep(
    metric: Callable,
    f: Callable,
    edits_of: Callable,
    *grids: Any,
    chunk: int | None = 32,
) -> Any:
    """metric(run(f, edits=edits_of(g_1, ..., g_n))) for every point of a grid.

    Args:
        metric: what f returns -> an array or a pytree of them.
        f: called with `tap=` only.
        edits_of: one value of each grid -> Edits; the values are traced.
        grids: arrays, ranges or lists, swept along their first axis (or pytrees of such).
        chunk: so many runs side by side, the rest after each other; None: all at once. Memory grows
            with it, and on a CPU speed hardly does.

    Returns:
        What the metric returns, with one axis per grid in front.

    Raises:
        InputError: no grid, an empty one, or what `run` refuses.
    """
    if not grids:
        raise InputError("sweep: give at least one grid, e.g. jnp.arange(layers)")
    if chunk is not None and chunk < 1:
        raise InputError(f"sweep: chunk={chunk}; at least 1, or None for all at once")
    arrays = tuple(jax.tree.map(jnp.asarray, g, is_leaf=_sequence) for g in grids)
    sizes = tuple(_length(g) for g in arrays)
    return _swept(_split(metric), _split(f), _split(edits_of), arrays, sizes, chunk)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _swept(metric, f, edits_of, grids, sizes, chunk):
    count = int(np.prod(sizes))
    width = min(chunk or count, count)
    # Points beyond the last repeat it: every chunk is full, so the model is traced once.
    number = jnp.minimum(jnp.arange(-(-count // width) * width), count - 1)
    places = jnp.unravel_index(number, sizes)
    points = tuple(jax.tree.map(lambda a, i=i: a[i], g) for g, i in zip(grids, places))

    def one(point):
        return metric(run(f, edits=edits_of(*point))[0])

    flat = jax.vmap(one)(points) if width == count else jax.lax.map(one, points, batch_size=width)
    return jax.tree.map(lambda a: a[:count].reshape(*sizes, *a.shape[1:]), flat)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Call:
    """A function taken apart: `arrays` are leaves, the rest decides whether to compile again.

    Attributes:
        inner: a module's parameters, or a function taken apart itself, or None.
        arrays: of the arguments that are fixed already; None where `fixed` holds something else.
        f: the graph of a module, a function, or None where `inner` is the function.
        tree: structure of the fixed arguments.
        fixed: their other leaves.
    """

    inner: Any
    arrays: Any
    f: Any = dataclasses.field(metadata={"static": True})
    tree: Any = dataclasses.field(metadata={"static": True})
    fixed: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, *args, **kw):
        if isinstance(self.f, nnx.GraphDef):
            return nnx.merge(self.f, self.inner)(*args, **kw)
        leaves = [s if a is None else a for a, s in zip(self.arrays, self.fixed)]
        given, named = jax.tree.unflatten(self.tree, leaves)
        return (self.inner if self.f is None else self.f)(*given, *args, **(named | kw))


def _split(f: Any) -> _Call:
    if isinstance(f, nnx.Module):
        graph, params = nnx.split(f)
        return _Call(params, (), graph, None, ())
    given, named = (), {}
    if isinstance(f, functools.partial):
        f, given, named = f.func, f.args, f.keywords
    leaves, tree = jax.tree.flatten((given, named))
    arrays = tuple(x if _is_array(x) else None for x in leaves)
    fixed = tuple(None if _is_array(x) else x for x in leaves)
    if isinstance(f, functools.partial | nnx.Module):
        return _Call(_split(f), arrays, None, tree, fixed)
    return _Call(None, arrays, f, tree, fixed)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _sequence(x: Any) -> bool:
    return isinstance(x, range | list)


def _length(grid: Any) -> int:
    sizes = {a.shape[:1] for a in jax.tree.leaves(grid)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise InputError(f"sweep: a grid needs one first axis of at least 1, got {sorted(sizes)}")
    return sizes.pop()[0]
