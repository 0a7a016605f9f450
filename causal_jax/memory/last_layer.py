"""A non-linear memory whose last matrix alone is fast: exact, at any tile.

    M(x) = [x +] phi(x) W        phi(x) = act(... act(x W_0) ...), slow: learned by the outer loop

It is linear memory with momentum on features phi(k), phi(q) (with the residual: regressing v - k
and adding q), and so shares `delta.py`'s chunkwise form. Paper: Titans, arXiv 2501.00663; updating
the last layer only does best among such layers according to arXiv 2602.21204.
"""

import dataclasses

import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.memory._base import Case, MemorySpec, memories
from causal_jax.memory.delta import run_linear
from causal_jax.taps import OFF
from pallas_kernels.memory_chunk.network import Act, Network


@memories.register(
    "last_layer",
    cases=(
        Case((2, 19, 2, 8), {"tile": 8, "expansion": 2}),
        Case((1, 11, 2, 4), {"tile": 4, "depth": 3, "residual": False, "act": "silu"}),
    ),
)
@dataclasses.dataclass(frozen=True)
class LastLayer(MemorySpec):
    """Deep memory of which the last matrix learns while reading.

    Attributes:
        depth: matrices of M, 2 to 4.
        expansion: hidden width over head width.
        act: non-linearity between them.
        residual: M(x) = x + ... .
        tile: tokens worked on at once; changes the speed, not the result.
    """

    depth: int = 2
    expansion: int = 4
    act: Act = "gelu"
    residual: bool = True
    tile: int = 64

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.depth <= 4:
            raise InputError(f"depth={self.depth}: expected 2, 3 or 4 (1 is the memory 'delta')")
        if self.tile < 1:
            raise InputError(f"tile={self.tile}: expected at least 1")

    @property
    def network(self) -> Network:
        """MLP, optionally with a residual."""
        return Network(
            self.depth, self.expansion, self.act, "residual" if self.residual else "none"
        )

    @property
    def fast_leaves(self) -> tuple[str, ...]:
        """The last matrix."""
        return (self.network.matrices[-1],)

    def chunked(self, leaves, state, q, k, v, gates, *, stored, new, aligned, tap):
        """`momentum_delta` on features."""
        return self._on_features(leaves, state, q, k, v, gates, stored, new, tap)

    def on_kernel(self, leaves, state, q, k, v, gates, *, stored, new, aligned):
        """The same; features are made outside the kernel."""
        return self._on_features(leaves, state, q, k, v, gates, stored, new, OFF, "tpu")

    def _on_features(self, leaves, state, q, k, v, gates, stored, new, tap, implementation=None):
        M, last = self.network, self.fast_leaves[0]
        slow = {n: w[None] for n, w in leaves.items() if n != last}
        features = lambda x: jnp.swapaxes(M.features(slow, jnp.swapaxes(x, 1, 2)), 1, 2)  # noqa: E731
        q, k, v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q, k, v))
        target = v - k if self.residual else v
        y, state, ok = run_linear(
            self, last, leaves[last], state, features(q), features(k), target, gates, stored, new,
            tap, implementation,
        )  # fmt: skip
        return y + q if self.residual else y, state, ok
