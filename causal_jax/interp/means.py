"""Tables of mean activations, and the ablations that use them.

    mean[l, (t, c)] = E[ a^l(x, t) | class of x_t = c ]        over prompts x of one template

With the token as class it is the context-aware mean (CAMA, arXiv 2509.09650): a position keeps what
its own token and the template say and loses everything the other tokens contributed. With one class
for all it is the plain mean ablation.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from causal_jax.edits import Edit
from causal_jax.errors import InputError
from causal_jax.interp.edits import OUTSIDE, patch
from causal_jax.interp.selection import Selection
from causal_jax.shapes import Array, Float, Int
from causal_jax.taps import run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanTable:
    """Mean activations of one site by position and class of token.

    Attributes:
        values: [L, P, ...] float32, one entry per (position, class) that occurred, by position;
            [P, ...] for a site outside the layers.
        rows: [T, C] place in `values` of a position and class; -1: never seen.
        counts: [P] prompts behind each entry.
        classes: [V] class of every token, or None: the token itself.
        site: which activation.
    """

    values: Float[Array, "..."]
    rows: Int[Array, "T C"]
    counts: Int[Array, "P"]
    classes: Int[Array, "V"] | None
    site: str = dataclasses.field(metadata={"static": True})

    def rows_of(self, ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """The entry of every token of a batch, -1 where there is none.

        Raises:
            InputError: another number of positions, or known ids that were never seen there.
        """
        if ids.shape[1] != len(self.rows):
            raise InputError(f"ids of shape {list(ids.shape)}: the table has {len(self.rows)} long")
        known = ids if self.classes is None else jnp.take(self.classes, ids, mode="clip")
        rows = jnp.take_along_axis(self.rows, known.T, axis=1, mode="fill", fill_value=-1).T
        if not isinstance(rows, Tracer) and (np.asarray(rows) < 0).any():
            row, position = np.argwhere(np.asarray(rows) < 0)[0]
            raise InputError(
                f"ids: token {ids[row, position]} was never seen at position {position} by the "
                "prompts of the table; build it from more prompts, or from classes"
            )
        return rows

    def of(self, ids: Int[Array, "B T"]) -> Float[Array, "..."]:
        """The means that belong to a batch: [L, B, T, ...]; NaN where traced ids were not seen."""
        rows = self.rows_of(ids)
        axis = 0 if self.site in OUTSIDE else 1
        values = jnp.take(self.values, rows, axis=axis)
        seen = (rows >= 0).reshape((1,) * axis + rows.shape + (1,) * (values.ndim - axis - 2))
        return jnp.where(seen, values, jnp.nan)


def mean_table(
    model: Any,
    ids: Int[Array, "M T"] | Int[np.ndarray, "M T"],
    *,
    site: str = "resid_post",
    by: Any = "token",
    chunk: int = 64,
) -> MeanTable:
    """Mean activations over many prompts of one template, in float32.

    Args:
        model: called with tokens [chunk, T].
        ids: the prompts, all of one length.
        site: which activation.
        by: "token", "position" (one class for all tokens), or an int array [V]: token -> class.
        chunk: prompts per pass.

    Raises:
        InputError: ids not [M, T], or `by` something else.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or not ids.size:
        raise InputError(f"ids of shape {list(ids.shape)}: expected [prompts, length]")
    classes = _classes(by, int(ids.max()) + 1)
    known = ids if classes is None else classes[ids]
    T, C = ids.shape[1], int(known.max()) + 1
    pairs, rows = np.unique(np.arange(T)[None] * C + known, return_inverse=True)
    table = np.full(T * C, -1, np.int32)
    table[pairs] = np.arange(len(pairs))
    rows = rows.reshape(ids.shape).astype(np.int32)
    sums, parts = 0.0, nnx.split(model)
    for start in range(0, len(ids), chunk):
        part, to = ids[start : start + chunk], rows[start : start + chunk]
        short = min(chunk, len(ids)) - len(part)  # the last pass is filled up; what fills it drops
        part = np.pad(part, ((0, short), (0, 0)))
        to = np.pad(to, ((0, short), (0, 0)), constant_values=len(pairs))
        sums = sums + _sums(*parts, jnp.asarray(part), jnp.asarray(to), site, len(pairs))
    counts = np.bincount(rows.reshape(-1), minlength=len(pairs))
    axis = 0 if site in OUTSIDE else 1
    shape = [1] * jnp.ndim(sums)
    shape[axis] = len(pairs)
    return MeanTable(
        jnp.asarray(sums) / counts.reshape(shape),
        jnp.asarray(table.reshape(T, C)),
        jnp.asarray(counts, jnp.int32),
        None if classes is None else jnp.asarray(classes),
        site,
    )


def cama(
    table: MeanTable, depth: Any, ids: Int[Array, "B T"], *, position: Selection = None
) -> list[Edit]:
    """Context-aware mean ablation: after `depth` layers every position holds its mean.

    Args:
        table: of `resid_post`.
        depth: completed layers, 0..L; may be traced; 0 changes nothing (an embedding knows only its
            own token).
        ids: the prompts being run.
        position: where; None: everywhere.

    Raises:
        InputError: a table of another site, or tokens it has not seen.
    """
    if table.site != "resid_post":
        raise InputError(f"cama needs a table of 'resid_post', not of {table.site!r}")
    if isinstance(depth, int) and not 0 <= depth <= len(table.values):
        raise InputError(f"depth={depth} is outside 0..{len(table.values)}")
    if isinstance(depth, int) and depth == 0:
        return []
    one = jnp.asarray(table.values)[jnp.maximum(depth - 1, 0)]
    means = MeanTable(one[None], table.rows, table.counts, table.classes, table.site).of(ids)[0]
    # `patch` would take the layer out of a stack: the one layer is all there is here.
    stack = jnp.broadcast_to(means[None], (len(table.values), *means.shape))
    return patch(stack, layer=depth - 1, position=position)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _sums(graph, params, ids, rows, site, count):
    acts = run(nnx.merge(graph, params), ids, capture=[site])[1][site].astype(jnp.float32)
    axis = 0 if site in OUTSIDE else 1
    flat = acts.reshape(*acts.shape[:axis], -1, *acts.shape[axis + 2 :])

    def add(a):
        return jax.ops.segment_sum(a, rows.reshape(-1), num_segments=count + 1)[:count]

    return add(flat) if axis == 0 else jax.vmap(add)(flat)


def _classes(by: Any, tokens: int) -> np.ndarray | None:
    if isinstance(by, str):
        if by not in ("token", "position"):
            raise InputError(f"by={by!r}: expected 'token', 'position' or an int array [V]")
        return None if by == "token" else np.zeros(tokens, np.int32)
    by = np.asarray(by)
    if by.ndim != 1 or not np.issubdtype(by.dtype, np.integer) or len(by) < tokens:
        raise InputError(
            f"by of shape {list(by.shape)}: expected integers, one for each of {tokens} tokens"
        )
    return by.astype(np.int32)
