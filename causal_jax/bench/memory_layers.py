"""`bench memory`, whole layers: a MAG layer beside exact causal attention, decoding by position."""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax import masks
from causal_jax.attention import Dense
from causal_jax.bench.report import Record
from causal_jax.bench.timing import Candidate, jax_candidate, measure
from causal_jax.nn.attention import Attention, Rotations
from causal_jax.nn.titans import MAG

NOWHERE = Rotations({})


def layer(args: argparse.Namespace, T: int, N: int, H: int) -> list[Record]:
    """Forward pass of a MAG layer and of a layer of exact causal attention of equal width."""
    sizes = _sizes(N, H)
    x = jax.random.normal(jax.random.key(args.seed), (1, T, N * H))
    modules = {
        "exact attention": Attention(Dense(), **sizes, rngs=nnx.Rngs(args.seed)),
        "MAG": MAG().build(**sizes, rngs=nnx.Rngs(args.seed)),
    }
    candidates = []
    for name, module in modules.items():
        graph, params = nnx.split(module)

        def forward(params: Any, x: jax.Array, graph: Any = graph) -> jax.Array:
            return nnx.merge(graph, params)(x, mask=masks.Causal(), rotations=NOWHERE)

        candidates.append(jax_candidate(name, forward, params, x))
    timings = measure(candidates, repeats=args.repeats, rss=args.rss)
    common = {"part": "layer", "tokens": T, "heads": N, "head_dim": H, "window": MAG().window}
    return [common | t.record() for t in timings]


def decode(args: argparse.Namespace, positions: list[int], N: int, H: int) -> list[Record]:
    """Time of one token and bytes of state of a MAG layer after so many tokens, in turns.

    The prompt is read for real, in windows of 4096 tokens: every state is one that decoding meets.
    """
    graph, params = nnx.split(MAG().build(**_sizes(N, H), rngs=nnx.Rngs(args.seed)))

    def extend(params: Any, x: jax.Array, cache: Any, length: jax.Array) -> Any:
        mixer = nnx.merge(graph, params)
        return mixer.extend(
            x, cache, 0, length=length, mask=masks.Causal(), rotations=NOWHERE
        )  # fmt: skip

    @jax.jit
    def read(params: Any, x: jax.Array, cache: Any, length: jax.Array) -> Any:
        return extend(params, x, cache, length)[1]

    module: Any = nnx.merge(graph, params)
    cache = jax.tree.map(lambda a: a[None], module.fresh(1, jnp.float32))  # of one layer
    one = jax.random.normal(jax.random.key(args.seed), (1, 1, N * H))
    compiled = jax.jit(extend).lower(params, one, cache, jnp.int32(0)).compile()
    candidates, sizes, at = [], [], 0
    for position in sorted(positions):
        while at < position:
            T = min(4096, position - at)
            x = jax.random.normal(jax.random.key(at), (1, T, N * H))
            cache = read(params, x, cache, jnp.int32(at))
            at += T
        given = (params, one, cache, jnp.int32(position))
        call = lambda given=given: compiled(*given)  # noqa: E731
        candidates.append(Candidate(f"at {position}", call, jax.block_until_ready))
        sizes.append(sum(a.nbytes for a in jax.tree.leaves(cache)))
    records = []
    for position, size, timing in zip(
        sorted(positions), sizes, measure(candidates, repeats=args.repeats)
    ):
        r = {"part": "decode", "position": position, "heads": N, "head_dim": H, "state_bytes": size}
        records.append(r | timing.record())
    return records


def _sizes(N: int, H: int) -> dict[str, Any]:
    return {
        "width": N * H, "heads": N, "kv_heads": N, "head_dim": H, "rotary": None, "out_scale": 1.0
    }  # fmt: skip
