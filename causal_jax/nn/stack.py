"""Blocks stacked over depth: parameters with a leading layer axis, `lax.scan` over it.

A model's layers are a sequence of specs, one per layer. Equal layers share a scan: the sequence is
cut into segments, each a short *period* of different layers repeated many times (one spec repeated
L times; five local layers and a global one repeated four times, then two local ones; ...). Block j
of a period holds the parameters of all its repeats, stacked on axis 0.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax import masks
from causal_jax.attention import AttentionSpec
from causal_jax.nn.attention import Rotations
from causal_jax.nn.block import Block
from causal_jax.placement import with_batch
from causal_jax.positions import rotation
from causal_jax.segments import DocLayout
from causal_jax.shapes import Array, Float, Int, Key
from causal_jax.taps import OFF, Tap


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers start, start + 1, ...: `specs` in order, `repeats` times over."""

    start: int
    specs: tuple[AttentionSpec, ...]
    repeats: int


def segments_of(specs: Sequence[AttentionSpec], *, scan: bool = True) -> tuple[Segment, ...]:
    """Cut one spec per layer into segments; `scan=False` makes every layer its own.

    The whole sequence as one repeated period where it has one (with a tail that is a beginning of
    the period), else runs of equal layers.
    """
    specs = tuple(specs)
    depth = len(specs)
    if not scan:
        return tuple(Segment(i, (s,), 1) for i, s in enumerate(specs))
    period = next(p for p in range(1, depth + 1) if specs == (specs[:p] * depth)[:depth])
    if 2 * period <= depth:
        whole = depth - depth % period
        head = Segment(0, specs[:period], depth // period)
        return (head, Segment(whole, specs[whole:], 1)) if whole < depth else (head,)
    runs, start = [], 0
    for spec, group in itertools.groupby(specs):
        repeats = len(list(group))
        runs.append(Segment(start, (spec,), repeats))
        start += repeats
    return tuple(runs)


class Stack(nnx.Module):
    """All blocks of a model.

    Args:
        make: builds one block for a spec.
        specs: one attention spec per layer.
        scan: whether equal layers share a stacked scan.
        remat: what the backward pass keeps of a layer ("none": everything, "dots": matrix products,
            "full": nothing).
    """

    def __init__(
        self,
        make: Callable[[AttentionSpec, nnx.Rngs], Block],
        specs: Sequence[AttentionSpec],
        *,
        scan: bool = True,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.segments = segments_of(specs, scan=scan)
        self.remat = remat
        self.blocks = nnx.List(
            nnx.List(_stacked(make, spec, segment.repeats, rngs) for spec in segment.specs)
            for segment in self.segments
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask,
        positions: Int[Array, "B T"],
        layout: DocLayout | None = None,
        segments: Int[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
        tap: Tap = OFF,
    ) -> Float[Array, "B T D"]:
        rotations = self._rotations(positions, layout, segments)

        def layer(graph, x, xs, tap):
            params, key = xs
            block = nnx.merge(graph, params)
            x = block(x, mask=mask, rotations=rotations, key=key, tap=tap)
            return with_batch(x), None

        for segment, graphs, params in self._parts():
            keys = [None] * len(graphs)
            if key is not None:
                key, used = jax.random.split(key)
                keys = jax.random.split(used, (len(graphs), segment.repeats))
            fs = tuple(functools.partial(layer, graph) for graph in graphs)
            x, _ = tap.loop(
                fs,
                x,
                tuple(zip(params, keys)),
                start=segment.start,
                scan=segment.repeats > 1,
                remat=None if self.remat == "none" else self.remat,
            )
        return x

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> tuple[tuple[Any, ...], ...]:
        """One cache of stacked layers (a `KV`, for attention) per block of every segment."""
        return tuple(
            tuple(b.attention.init_cache(segment.repeats, batch, length, dtype) for b in blocks)
            for segment, blocks in zip(self.segments, self.blocks)
        )

    def extend(
        self,
        x: Float[Array, "B T D"],
        caches: tuple[tuple[Any, ...], ...],
        *,
        length: Int[Array, ""],
        mask: masks.Mask,
        positions: Int[Array, "B T"],
        layout: DocLayout | None = None,
        tap: Tap = OFF,
    ) -> tuple[Float[Array, "B T D"], tuple[tuple[Any, ...], ...]]:
        """T new positions through all layers; caches ride in the carry, updated in place."""

        rotations = self._rotations(positions, layout)

        def layer(graph, j, carry, xs, tap):
            x, caches = carry
            params, index = xs
            block = nnx.merge(graph, params)
            x, new = block.extend(
                x, caches[j], index, length=length, mask=mask, rotations=rotations, tap=tap
            )
            return (x, caches[:j] + (new,) + caches[j + 1 :]), None

        out = []
        for (segment, graphs, params), cache in zip(self._parts(), caches):
            fs = tuple(functools.partial(layer, graph, j) for j, graph in enumerate(graphs))
            xs = tuple((p, jnp.arange(segment.repeats)) for p in params)
            (x, cache), _ = tap.loop(
                fs, (x, cache), xs, start=segment.start, scan=segment.repeats > 1
            )
            out.append(cache)
        return x, tuple(out)

    def unstacked(self) -> "Stack":
        """The same layers, each its own segment with its own parameters."""
        layers = []
        for segment, graphs, params in self._parts():
            for repeat in range(segment.repeats):
                for graph, stacked in zip(graphs, params):
                    one = jax.tree.map(operator.itemgetter(slice(repeat, repeat + 1)), stacked)
                    layers.append(nnx.merge(graph, one))
        specs = [spec for s in self.segments for spec in s.specs * s.repeats]
        out = nnx.merge(*nnx.split(self))
        out.segments = segments_of(specs, scan=False)
        out.blocks = nnx.List(nnx.List([block]) for block in layers)
        return out

    def _rotations(
        self, positions: Array, layout: DocLayout | None, segments: Array | None = None
    ) -> Rotations:
        layers = [block.attention for blocks in self.blocks for block in blocks]
        tables = {a.rotary: rotation(positions, a.rotary, a.head_dim) for a in layers if a.rotary}
        return Rotations(tables, layout, segments)

    def _parts(self):
        for segment, blocks in zip(self.segments, self.blocks):
            graphs, params = zip(*(nnx.split(block) for block in blocks))
            yield segment, graphs, params


def _stacked(make: Callable, spec: AttentionSpec, repeats: int, rngs: nnx.Rngs) -> Block:
    @nnx.split_rngs(splits=repeats)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return make(spec, rngs)

    return build(rngs)
