"""A mask as arithmetic on one tile: what a kernel can run, and the vectors it has to be given.

Kernels cannot gather. `mask(b, h, i, j)` is traced once on whole axes, and its graph is cut: a
value that depends on arrays (document ids, prefix lengths, chosen keys) but on queries only, or on
keys only, is computed outside and handed in as a vector, tile by tile; arithmetic and comparisons
of such vectors and of indices run in the kernel. A look-up by query *and* key (a written-out
array, a list of blocks) cannot be cut; then `cut` says so and the kernel reads stored tiles.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import Literal

from pallas_kernels.block_sparse.steps import partial_tiles

_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint")
_HANDED = (jnp.bool_, jnp.int8, jnp.int16, jnp.int32, jnp.uint8, jnp.uint16, jnp.float32)


@dataclasses.dataclass(eq=False)
class _Node:
    """A value of the traced mask: an index, something known, or result `out` of an equation."""

    aval: Any
    inputs: tuple["_Node", ...] = ()
    eqn: Any = None
    out: int = 0
    value: Any = None
    index: int | None = None  # 0 b, 1 h, 2 i, 3 j
    arrays: bool = False  # depends on an array

    @functools.cached_property
    def scalar(self) -> Any:
        """The number it is, or None."""
        if self.arrays or self.eqn is not None or self.index is not None:
            return None
        return np.asarray(self.value).item()

    @property
    def pair(self) -> bool:
        return len(self.aval.shape) == 4 and self.aval.shape[2] > 1 and self.aval.shape[3] > 1


@dataclasses.dataclass(frozen=True, eq=False)
class TileMask:
    """A mask that kernels can run.

    Attributes:
        vectors: int32 or float32 [B|1, N|1, 1, T or S]; or one int8 [B|1, N|1, P bq, bk].
        axes: for each vector "q" or "k"; "stored" for tiles of the mask itself.
        run: `run(shape, b, h, i, j, tiles) -> bool tile`; all but `shape` int32 scalars or tiles,
            `tiles` being the vectors broadcast to the shape.
    """

    vectors: tuple[jax.Array, ...]
    axes: tuple[str, ...]
    run: Callable[..., Any]


def cut(mask: Any, sizes: tuple[int, int, int, int], offset: jax.Array) -> TileMask | None:
    """The mask for B, N, T, S (both lengths above 1), or None if it looks up query and key at once.

    Args:
        offset: int32 [B] or [1], absolute index of query 0.
    """
    B, N, T, S = sizes
    index = (
        jnp.arange(B).reshape(-1, 1, 1, 1),
        jnp.arange(N).reshape(1, -1, 1, 1),
        jnp.arange(T).reshape(1, 1, -1, 1) + offset.reshape(-1, 1, 1, 1),
        jnp.arange(S).reshape(1, 1, 1, -1),
    )
    index = tuple(x.astype(jnp.int32) for x in index)
    leaves, structure = jax.tree.flatten(mask)

    def ask(index, leaves):
        return jax.tree.unflatten(structure, leaves)(*index)

    closed = jax.make_jaxpr(ask)(index, leaves)
    inputs = [_Node(jax.typeof(x), index=n) for n, x in enumerate(index)]
    inputs += [_known(x) for x in leaves]
    (root,) = _graph(closed.jaxpr, closed.consts, inputs)
    handed: list[_Node] = []
    try:
        order = _plan(root, handed)
    except _Uncut:
        return None
    memo = dict(zip(inputs, index))
    vectors = [_outside(node, memo) for node in handed]
    axes = tuple("k" if n.aval.shape and n.aval.shape[3] > 1 else "q" for n in handed)
    vectors = tuple(_vector(x, T if axis == "q" else S, axis) for x, axis in zip(vectors, axes))
    return TileMask(vectors, axes, functools.partial(_run, root, order, handed))


def stored(
    mask: Any, apart: tuple[int, int], kinds: Any, tiles: Any, offset: jax.Array
) -> TileMask:
    """The partial tiles of any mask, written out: P block_q block_k bytes.

    Args:
        apart: how many batch rows and heads the mask tells apart.
        kinds: int8 [B|1, N|1, nq, nk].
        offset: int32 [B] or [1].
    """
    rows, columns = (jnp.asarray(x) for x in partial_tiles(kinds))
    b = jnp.arange(max(apart[0], offset.shape[0]), dtype=jnp.int32).reshape(-1, 1, 1, 1)
    h = jnp.arange(apart[1], dtype=jnp.int32).reshape(1, -1, 1, 1)
    di = jnp.arange(tiles.block_q, dtype=jnp.int32).reshape(1, 1, -1, 1)
    dj = jnp.arange(tiles.block_k, dtype=jnp.int32).reshape(1, 1, 1, -1)

    def tile(at):
        row, column = (x[:, :, None, None] for x in at)
        i = row * tiles.block_q + di + offset.reshape(-1, 1, 1, 1)
        return mask(b, h, i, column * tiles.block_k + dj).astype(jnp.int8)

    every = lax.map(tile, (jnp.moveaxis(rows, 2, 0), jnp.moveaxis(columns, 2, 0)))
    store = jnp.moveaxis(every, 0, 2)
    store = store.reshape(*store.shape[:2], -1, tiles.block_k)
    return TileMask((store,), ("stored",), _read_stored)


def _read_stored(shape, b, h, i, j, tiles):
    return tiles[0] != 0


class _Uncut(Exception):
    pass


def _known(x: Any) -> _Node:
    concrete = not isinstance(x, Tracer) and np.size(x) == 1
    return _Node(jax.typeof(x), value=x, arrays=not concrete)


def _graph(jaxpr: Any, consts: Any, args: list[_Node]) -> list[_Node]:
    """The outputs of a jaxpr as nodes; calls are opened."""
    env = dict(zip(jaxpr.constvars, map(_known, consts))) | dict(zip(jaxpr.invars, args))

    def node(x):
        return _known(x.val) if isinstance(x, Literal) else env[x]

    for eqn in jaxpr.eqns:
        inputs = tuple(node(x) for x in eqn.invars)
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in _CALLS and inner is not None:
            consts = getattr(inner, "consts", ())
            outs = _graph(getattr(inner, "jaxpr", inner), consts, list(inputs))
        else:
            arrays = any(x.arrays for x in inputs)
            outs = [_Node(v.aval, inputs, eqn, n, arrays=arrays) for n, v in enumerate(eqn.outvars)]
        env.update(zip(eqn.outvars, outs))
    return [node(x) for x in jaxpr.outvars]


def _plan(root: _Node, handed: list[_Node]) -> list[_Node]:
    """The nodes to run in the kernel, in order; what it is handed is appended to `handed`."""
    order: list[_Node] = []
    seen: set[_Node] = set()

    def visit(node):
        if node in seen:
            return
        seen.add(node)
        if node.index is not None or node.scalar is not None:
            return
        runs = node.eqn is not None and _elementwise(node)
        if not node.pair and (node.arrays or not runs):
            if node.aval.dtype not in _HANDED or len(node.aval.shape) not in (0, 4):
                raise _Uncut
            handed.append(node)
            return
        if not runs:
            raise _Uncut
        for x in node.inputs:
            visit(x)
        order.append(node)

    visit(root)
    return order


def _elementwise(node: _Node) -> bool:
    name, shape = node.eqn.primitive.name, node.aval.shape
    if name == "broadcast_in_dim":
        dims = node.eqn.params["broadcast_dimensions"]
        return len(shape) == 4 and dims in ((), (0, 1, 2, 3))
    ranks = {len(x.aval.shape) for x in node.inputs} | {len(shape)}
    return name in _OPS and ranks <= {0, 4}


def _outside(node: _Node, memo: dict[_Node, Any]) -> Any:
    """The value of a node on whole axes."""
    if node not in memo:
        if node.eqn is None:
            memo[node] = node.value
        else:
            inputs = [_outside(x, memo) for x in node.inputs]
            out = node.eqn.primitive.bind(*inputs, **node.eqn.params)
            out = out if node.eqn.primitive.multiple_results else [out]
            memo[node] = out[node.out]
    return memo[node]


def _vector(x: Any, length: int, axis: str) -> jax.Array:
    """[B|1, N|1, 1, length] in int32 or float32."""
    x = jnp.asarray(x)
    x = x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    x = x.swapaxes(2, 3) if axis == "q" else x
    return lax.stop_gradient(jnp.broadcast_to(x, (*x.shape[:2], 1, length)))


def _run(root, order, handed, shape, b, h, i, j, tiles) -> Any:
    """Evaluate on a tile. Every value is a number or has the tile's whole shape: no broadcasts of
    booleans, which Mosaic lacks."""
    values: dict[_Node, Any] = {}
    for node, x in zip(handed, tiles):
        values[node] = x != 0 if node.aval.dtype == jnp.bool_ else x

    def get(node):
        if node.index is not None:
            x = (b, h, i, j)[node.index]
            return jnp.full(shape, x, jnp.int32) if jnp.ndim(x) == 0 else x
        return values.get(node, node.scalar)

    for node in order:
        values[node] = _OPS[node.eqn.primitive.name](node, *map(get, node.inputs))
    out = get(root)
    if jnp.ndim(out) == 0:
        return jnp.full(shape, int(out), jnp.int32) != 0
    return out


def _is_bool(node: _Node) -> bool:
    return node.inputs[-1].aval.dtype == jnp.bool_


def _equal(node, x, y):
    return ~(x ^ y) if _is_bool(node) else x == y


def _differ(node, x, y):
    return x ^ y if _is_bool(node) else x != y


def _select(node, which, *cases):
    if len(cases) != 2:
        raise _Uncut
    no, yes = cases
    if _is_bool(node):
        return (which & yes) | (~which & no)
    return jnp.where(which, yes, no)


def _convert(node, x):
    dtype = node.aval.dtype
    if _is_bool(node) and dtype != jnp.bool_:
        return jnp.where(x, 1, 0)
    if dtype == jnp.bool_:
        return x if _is_bool(node) else x != 0
    return x.astype(jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else x


def _tiles(x, y):
    return (
        jnp.broadcast_arrays(jnp.int32(x), jnp.int32(y)) if jnp.ndim(x) != jnp.ndim(y) else (x, y)
    )


def _plain(f: Callable) -> Callable:
    return lambda node, *xs: f(*xs)


def _not(node, x):
    return (not x) if isinstance(x, bool) else ~x


_OPS: dict[str, Callable[..., Any]] = {
    "eq": _equal,
    "ne": _differ,
    "select_n": _select,
    "convert_element_type": _convert,
    "not": _not,
    "broadcast_in_dim": lambda node, x, *_: x,
    "clamp": lambda node, low, x, high: jnp.minimum(jnp.maximum(x, low), high),
    "integer_pow": lambda node, x: math.prod([x] * node.eqn.params["y"]),
} | {
    name: _plain(f)
    for name, f in {
        "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y,
        "ge": lambda x, y: x >= y,
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul": lambda x, y: x * y,
        "neg": lambda x: -x,
        "abs": jnp.abs,
        "sign": lambda x: jnp.where(x > 0, 1, jnp.where(x < 0, -1, 0)),
        "max": jnp.maximum,
        "min": jnp.minimum,
        "rem": lambda x, y: lax.rem(*_tiles(x, y)),
        "div": lambda x, y: lax.div(*_tiles(x, y)),
        "and": lambda x, y: x & y,
        "or": lambda x, y: x | y,
        "xor": lambda x, y: x ^ y,
        "copy": lambda x: x,
        "stop_gradient": lambda x: x,
    }.items()
}
