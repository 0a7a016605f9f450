"""Linear attention without feature map: softmax attention to first order, the mean taken out.

    o_i = 1/n_i sum_allowed (scale q_i . k_j) v_j       n_i: number of allowed keys, or a constant

The weights may be negative and do not sum to one. With n_i constant it is the "unnormalised" linear
attention of the theory of in-context learning: what it gives grows with the number of keys, so that
it has to be rescaled at lengths it was not trained at; with n_i the number of allowed keys it
estimates E[(q . k) v] at any length.

    cost     2 (H + H') operations per head and pair: all pairs are computed, which serves any mask
    exact    never: a first order expansion of softmax attention

Deviation: none. Papers: Linear transformers are secretly fast weight programmers, arXiv 2102.11174;
one step of gradient descent in a linear layer, arXiv 2212.07677.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from causal_jax.attention._base import AttentionSpec, Case, attention
from causal_jax.attention._scores import _finite, _wide, _with_bad
from causal_jax.errors import InputError
from causal_jax.masks import Mask, Prefix, as_mask
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import OFF, Tap


def linear_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask | Bool[Array, "..."] | None = None,
    scale: float | None = None,
    divisor: float | None = None,
    q_offset: int | Int[Array, "B"] = 0,
    kv_length: Int[Array, "B"] | None = None,
    key: Key[Array, ""] | None = None,
    tap: Tap = OFF,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Sum of values weighted by q . k, computed in float32.

    Args:
        q, k, v, mask, q_offset, kv_length: as in `dense_attention`.
        scale: factor on q . k; None: H ** -0.5.
        divisor: of the sum; None: the number of keys that the query may attend to.
        key: not used, nothing is random here; part of the contract of all mechanisms.
        tap: sites `mask` [B,N,T,S] (materialised only if wanted), `pattern` [B,N,T,S] float32 (the
            weights, divided), `z` = o.
        implementation: None or "reference".

    Returns:
        o in v's dtype; 0 for a query that may attend to nothing.

    Raises:
        InputError: shapes that do not fit, unknown implementation.
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    if implementation not in (None, "reference"):
        raise InputError(f"implementation={implementation!r}: expected None or 'reference'")
    if k.shape != (B, S, K, H) or v.shape[:3] != (B, S, K) or N % K:
        raise InputError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, T, N, H], [B, S, K, H] and "
            "[B, S, K, H'] with N a multiple of K"
        )
    mask = as_mask(mask)
    if kv_length is not None:
        mask = mask & Prefix(kv_length)
    allowed = mask.to_dense(T, S, q_offset=q_offset)
    if tap.wants("mask"):
        allowed = tap("mask", jnp.broadcast_to(allowed, (B, N, T, S)))
    (q, bad_q), (k, bad_k), (w, bad_v) = (_finite(x.astype(_wide(x))) for x in (q, k, v))
    s = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k).reshape(B, N, T, S)
    s = s * (H**-0.5 if scale is None else scale)
    s = _with_bad(s, bad_q, bad_k + bad_v)
    count = jnp.maximum(allowed.sum(-1, keepdims=True), 1)
    p = jnp.where(allowed, s, 0.0) / (count.astype(jnp.float32) if divisor is None else divisor)
    p = tap("pattern", p)
    o = jnp.einsum("bkgts,bskh->btkgh", p.reshape(B, K, N // K, T, S), w)
    return tap("z", o.reshape(B, T, N, -1).astype(v.dtype))


@attention.register(
    "linear",
    cases=(
        Case((2, 17, 4, 8)),
        Case((2, 33, 4, 8), kv_heads=2, spec={"divisor": 20.0}),
        Case((1, 19, 2, 8), S=27, spec={"scale": 0.5}),
    ),
)
@dataclasses.dataclass(frozen=True)
class Linear(AttentionSpec):
    """Linear attention without feature map (arXiv 2102.11174).

    Attributes:
        scale: factor on q . k; None: head width ** -0.5.
        divisor: of the sum over the keys; None: the number of keys a query may attend to.
    """

    scale: float | None = None
    divisor: float | None = None

    patterns: ClassVar[frozenset[str]] = frozenset(
        {"self-causal", "self-full", "cross-causal", "cross-full"}
    )

    def __post_init__(self):
        if self.scale is not None and not math.isfinite(self.scale):
            raise InputError(f"scale={self.scale}: expected a finite number, or None")
        if self.divisor is not None and not self.divisor > 0:
            raise InputError(f"divisor={self.divisor}: expected a number > 0, or None")

    def exact_when(self, length: int) -> bool:
        """Never."""
        return False

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """2 (H + H') operations per head and pair, allowed or not."""
        return float(2 * (H + Hv) * N * T * S)

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        key: Key[Array, ""] | None = None,
        tap: Tap = OFF,
        implementation: str | None = None,
        q_offset: int | Int[Array, "B"] = 0,
        kv_length: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T N V"]:
        """Attend."""
        return linear_attention(
            q, k, v, mask=mask, scale=self.scale, divisor=self.divisor, q_offset=q_offset,
            kv_length=kv_length, key=key, tap=tap, implementation=implementation,
        )  # fmt: skip
