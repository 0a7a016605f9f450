"""Deep memory: an MLP of which every matrix learns while reading, gradients taken at anchors.

Gradients inside a chunk of `anchor` tokens are taken at the memory as it was at the chunk's start:
then S and M are linear recurrences inside the chunk, and matrix products do the work. The chunk is
part of the function, not a tile: another anchor is another memory, to be used as trained. anchor =
1 is the exact rule, token after token.

Paper: Titans, arXiv 2501.00663, section 3.2; the Omega rule of Atlas, arXiv 2505.23735.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from causal_jax.errors import InputError
from causal_jax.memory import _kernels
from causal_jax.memory._anchored import Chunk
from causal_jax.memory._base import Case, MemorySpec, _sigmoid, memories
from causal_jax.memory._frames import chunk_form, token_form
from causal_jax.memory._reference import recurrence
from causal_jax.taps import OFF
from pallas_kernels.memory_chunk.network import Act, Around, Network


@memories.register(
    "deep",
    cases=(
        Case((2, 19, 2, 8), {"anchor": 4, "theta_max": 0.3}),
        Case((2, 19, 2, 4), {"anchor": 8, "gate_chunk": 4, "fast": "all", "clip": 0.5}),
        Case((2, 19, 1, 4), {"anchor": 8, "omega": 3, "decay_to": "init", "around": "residual"}),
        Case((2, 19, 1, 4), {"anchor": None, "gate_chunk": 4, "mean_loss": True, "read_at": "pre"}),
        Case((1, 19, 2, 4), {"anchor": None, "depth": 1, "around": "none", "read_at": "pre"}),
        Case((1, 19, 1, 4), {"anchor": 6, "momentum": False, "fast": "all", "nonfinite": "skip"}),
        Case((1, 13, 1, 4), {"anchor": 1, "theta_max": 0.3}),
        Case((2, 19, 2, 4), {"anchor": 8, "gate_chunk": 4, "depth": 3, "fast": "all", "clip": 0.5}),
    ),
)
@dataclasses.dataclass(frozen=True)
class Deep(MemorySpec):
    """Deep memory with anchored gradients.

    Attributes:
        depth: matrices of M, L_M, 1 to 4.
        expansion: hidden width over head width.
        act: non-linearity between them.
        around: what stands around the MLP: "residual_ln": x + LN(.), "residual": x + ., "none".
        fast: "weights": the matrices learn while reading; "all": the norm's scale too.
        anchor: tokens between two anchors; None: gradients are always taken where the state began.
        gate_chunk: tokens per update of S and M; 1: every token. More: one step per chunk, with the
            sum of its surprises and the chunk's mean gates, visible once the chunk is complete.
        omega: length of the window of past losses in every step (inside the chunk); 1: Titans.
        clip: soft bound on the norm of a token's gradient.
        mean_loss: mean instead of half the sum of squares (as titans-pytorch).
    """

    depth: int = 2
    expansion: int = 4
    act: Act = "gelu"
    around: Around = "residual_ln"
    fast: Literal["weights", "all"] = "weights"
    anchor: int | None = 64  # pyright: ignore[reportIncompatibleVariableOverride]
    gate_chunk: int = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    omega: int = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    clip: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    mean_loss: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.depth <= 4:
            raise InputError(f"depth={self.depth}: expected 1 to 4")
        for name in ("anchor", "gate_chunk", "omega", "expansion"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: expected at least 1")
        if self.gate_chunk > 1 and self.anchor is not None and self.anchor % self.gate_chunk:
            raise InputError(
                f"gate_chunk={self.gate_chunk}: expected a divisor of anchor={self.anchor}"
            )
        if self.omega > 1 and (self.anchor is None or self.anchor < self.omega):
            raise InputError(f"omega={self.omega}: expected at most anchor={self.anchor}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip={self.clip}: expected a number > 0, or None")

    @property
    def network(self) -> Network:
        """MLP with what is around it."""
        return Network(self.depth, self.expansion, self.act, self.around)

    @property
    def fast_leaves(self) -> tuple[str, ...]:
        """The matrices, and with fast="all" the norm's scale."""
        scale = ("gamma",) if self.fast == "all" and self.around == "residual_ln" else ()
        return self.network.matrices + scale

    @property
    def stability(self) -> float:
        """2 (1 - eta) / anchor, by the card's measurements of one repeated key."""
        if self.anchor == 1:
            return super().stability
        eta = _sigmoid(self.eta_bias) if self.momentum else 0.0
        return 2 * (1 - eta) / (self.anchor or 64)

    @property
    def default_theta(self) -> float:
        """The bound, at most 1."""
        return min(1.0, self.stability)

    def loss_scale(self, width: int) -> float:
        """2 / width for the mean."""
        return 2.0 / width if self.mean_loss else 1.0

    def chunked(self, leaves, state, q, k, v, gates, *, stored, new, aligned, tap):
        """In chunks of `anchor` or `gate_chunk` tokens; a few tokens off a border one by one."""
        T = q.shape[1]
        chunk = self.gate_chunk if self.gate_chunk > 1 else self.anchor
        border = self.anchor or chunk
        known = aligned and border and not isinstance(state.position, Tracer)
        at = jax.device_get(state.position).tolist() if known else []
        if any(p % border for p in at):
            raise InputError(f"aligned=True at position {at}: expected multiples of {border}")
        few = max(1, (chunk or 0) // 8)
        if chunk == 1 or (chunk and not aligned and few >= T):
            return recurrence(self, leaves, state, q, k, v, gates, stored=stored, new=new)
        gates = self._weighted(gates, stored)
        q, k, v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q, k, v))
        tokens = Chunk(q, k, v, gates, jnp.ones_like(stored), stored, new)
        forward = token_form if self.gate_chunk == 1 else chunk_form
        y, loss, state, ok = forward(self, leaves, state, tokens, aligned or chunk is None)
        if tap.wants("surprise"):
            tap("surprise", loss)
        return y, state, ok

    def on_kernel(self, leaves, state, q, k, v, gates, *, stored, new, aligned):
        """Whole chunks on the kernel, the rest as in `chunked`."""

        def rest(state, q, k, v, gates, stored, new):
            return self.chunked(
                leaves, state, q, k, v, gates, stored=stored, new=new, aligned=True, tap=OFF
            )

        gates = self._weighted(gates, stored)
        return _kernels.deep(self, leaves, state, q, k, v, gates, stored, new, aligned, rest)

    def _weighted(self, gates, stored):
        """Weights of the Omega rule's windows, 0 where nothing is stored."""
        if self.omega == 1:
            return gates
        gamma = jnp.ones_like(gates.theta) if gates.gamma is None else gates.gamma
        return dataclasses.replace(gates, gamma=jnp.where(stored[..., None], gamma, 0))
