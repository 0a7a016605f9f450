"""Linear memory with momentum and forgetting: the delta rule that Titans make of it, exactly.

    M_t = a_t M_{t-1} + S_t     S_t = eta_t S_{t-1} - theta_t k_t^T (k_t M_{t-1} - v_t)
    y_t = q_t M_t

eta = 0: Gated DeltaNet with g = a, beta = theta / a, v' = a v (surprise is measured before
forgetting); eta = 0, a = 1: DeltaNet.

Paper: Titans, arXiv 2501.00663, with L_M = 1.
"""

import dataclasses

from causal_jax.errors import InputError
from causal_jax.memory._base import Case, MemorySpec, memories
from causal_jax.memory._network import Network


@memories.register("delta", cases=(Case((2, 19, 2, 8)),))
@dataclasses.dataclass(frozen=True)
class Delta(MemorySpec):
    """Linear memory with momentum (arXiv 2501.00663, L_M = 1), exact at any tile.

    Attributes:
        tile: tokens worked on at once; changes the speed, not the result.
    """

    tile: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.tile < 1:
            raise InputError(f"tile={self.tile}: expected at least 1")

    @property
    def network(self) -> Network:
        """One matrix, zero at the start."""
        return Network()

    def run(
        self, leaves, state, q, k, v, gates, *, mask=None, store=None, new=None, aligned=False,
        tap=None, implementation=None,
    ):  # fmt: skip
        """Write and read; see `MemorySpec.run`."""
        return self.reference(leaves, state, q, k, v, gates, mask=mask, store=store, new=new)
