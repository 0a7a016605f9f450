"""One layer of multi-head attention that reads (x, y) pairs and predicts y of a query.

    Z = [x_1 .. x_S; y_1 .. y_S],  z_q = [x_q; 0]                       width D = dim + outputs
    f = sum_h O_h V_h Z a_h,       a_h = softmax(Z' K_h' Q_h z_q / sqrt(D))

No bias, residual, norm, position or feed-forward layer; every head is D wide; the query attends to
the pairs only. The layer is a function of its two circuits alone, which is how it is computed:

    KQ_h = K_h' Q_h / sqrt(D)  [D, D]        OV_h = O_h V_h  [O, D]

The last rows of z_q are 0, so the last columns of KQ are never used and never trained.

In-context linear regression demystified, arXiv 2503.12734. Deviation: none; its code's multi-layer
variant applies softmax twice, which is not followed.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax.attention import AttentionSpec, Dense
from causal_jax.errors import InputError
from causal_jax.models._base import ModelSpec, models
from causal_jax.shapes import Array, Bool, Float, Key
from causal_jax.taps import OFF, Tap


@models.register("regression_attention")
@dataclasses.dataclass(frozen=True)
class RegressionAttention(ModelSpec):
    """Sizes of the layer. There are no tokens: `vocab` stays 0.

    Attributes:
        dim: coordinates of x.
        outputs: coordinates of y.
        heads: H.
        attention: the mechanism; its default scale is 1/sqrt(D). All scores at once by default:
            the form for few queries is made for decoding, and slower to differentiate.
    """

    dim: int = 5
    outputs: int = 1
    heads: int = 2
    attention: AttentionSpec = Dense(implementation="reference")

    def __post_init__(self):
        for name in ("dim", "outputs", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.vocab:
            raise InputError(f"vocab={self.vocab}: expected 0, this model reads numbers")
        if "cross-full" not in self.attention.patterns:
            raise InputError(f"attention {self.attention}: one that serves a query apart from keys")

    @property
    def width(self) -> int:
        """D."""
        return self.dim + self.outputs

    def build(self, key: Key[Array, ""]) -> "RegressionAttentionLayer":
        """The layer with parameters drawn from U(-1, 1) / sqrt(fan in)."""
        return RegressionAttentionLayer(self, key)

    def flops_per_token(self, length: int) -> float:
        """Forward and backward, per pair of the prompt."""
        D = self.width
        circuits = self.heads * D * D * (D + self.outputs + 1)
        mixing = self.attention.cost(1, length, self.heads, D, D)
        return 3.0 * (2.0 * circuits + mixing) / length


class RegressionAttentionLayer(nnx.Module):
    """The parameters q, k, v [H, D, D] and o [H, O, D] of a `RegressionAttention`."""

    def __init__(self, spec: RegressionAttention, key: Key[Array, ""]):
        self.spec = spec
        H, D, O = spec.heads, spec.width, spec.outputs
        draws = jax.random.uniform(key, ((3 * D + O) * H * D,), minval=-1.0)  # one: see the task
        q, k, v, o = jnp.split(draws, [H * D * D, 2 * H * D * D, 3 * H * D * D])
        self.q, self.k, self.v = (nnx.Param(D**-0.5 * w.reshape(H, D, D)) for w in (q, k, v))
        self.o = nnx.Param((H * D) ** -0.5 * o.reshape(H, O, D))

    def __call__(
        self,
        x: Float[Array, "B S P"],
        y: Float[Array, "B S O"],
        xq: Float[Array, "B P"],
        *,
        mask: Bool[Array, "B S"] | None = None,
        tap: Tap = OFF,
    ) -> Float[Array, "B O"]:
        """Predictions.

        Args:
            x, y: the pairs of the prompt, P = dim coordinates and O outputs.
            xq: the query.
            mask: which pairs exist; None: all.
            tap: sites `attn.*` of the mechanism with T = 1, `out` [B, O].
        """
        Z = jnp.concatenate([x, y], axis=-1)
        # The scale 1/sqrt(D) is the mechanism's part of the circuit.
        q = jnp.einsum("hij,hip,bp->bhj", self.k[...], self.q[...][..., : self.spec.dim], xq)
        keys = Z[:, :, None]
        allowed = None if mask is None else mask[:, None, None]
        z = self.spec.attention(q[:, None], keys, keys, mask=allowed, tap=tap.scope("attn"))[:, 0]
        return tap("out", jnp.einsum("hoi,hij,bhj->bo", self.o[...], self.v[...], z))

    def circuits(self) -> tuple[Float[Array, "H D D"], Float[Array, "H O D"]]:
        """KQ, with the factor 1/sqrt(D), and OV."""
        kq = jnp.einsum("hij,hik->hjk", self.k[...], self.q[...]) * self.spec.width**-0.5
        return kq, jnp.einsum("hoi,hij->hoj", self.o[...], self.v[...])

    def set_circuits(self, kq: Float[Array, "H D D"], ov: Float[Array, "H O D"]) -> None:
        """Parameters that have these circuits: Q = sqrt(D) KQ, O = OV, K = V = identity."""
        one = jnp.broadcast_to(jnp.eye(self.spec.width)[None], self.q[...].shape)
        self.q[...] = self.spec.width**0.5 * kq
        self.k[...], self.v[...], self.o[...] = one, one, ov


class Pattern(NamedTuple):
    """How far circuits are of the form KQ_h = omega_h [I 0; 0 .], OV_h = mu_h e_y.

    Attributes:
        omega: [H], mean of the x diagonal of KQ_h. spread: [H], its standard deviation.
        off: [H], largest other entry of KQ_h, columns of the query's y (which is 0) left out.
        mu: [H, O], what each output reads of its own y. rest: [H], largest other entry of OV_h.
    """

    omega: Array
    spread: Array
    off: Array
    mu: Array
    rest: Array


def pattern_of(kq: Float[Array, "H D D"], ov: Float[Array, "H O D"]) -> Pattern:
    """Measure the form of circuits: see `Pattern`."""
    O, dim = ov.shape[1], kq.shape[-1] - ov.shape[1]
    diagonal = jnp.diagonal(kq[:, :dim, :dim], axis1=1, axis2=2)
    other = jnp.where(jnp.eye(*kq.shape[1:], dtype=bool)[None], 0.0, kq)[:, :, :dim]
    own = jnp.eye(O, kq.shape[-1], k=dim, dtype=bool)[None]
    return Pattern(
        omega=diagonal.mean(-1),
        spread=diagonal.std(-1),
        off=jnp.abs(other).max((1, 2)),
        mu=jnp.diagonal(ov[:, :, dim:], axis1=1, axis2=2),
        rest=jnp.abs(jnp.where(own, 0.0, ov)).max((1, 2)),
    )
