"""The small network inside a memory: a plain MLP whose weights are what is remembered.

    h = x;  h = act(h W_0);  ...;  out = h W_{L-1}                       L matrices, no biases
    M(x) = out  |  x + out  |  x + LN(out) (1 + gamma)

Leaves carry head axes in front and the tokens of a head stand in the last but one axis of x, so one
batched product serves all heads: x [..., T, H], w [..., H, F].
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Act = Literal["gelu", "silu", "relu"]
Around = Literal["none", "residual", "residual_ln"]
LN_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Network:
    """Shape of M.

    Attributes:
        depth: number of matrices, L_M.
        expansion: hidden width over head width.
        act: between the matrices ("gelu" is the exact one, by the error function).
        around: what is added around the matrices.
    """

    depth: int = 1
    expansion: int = 4
    act: Act = "gelu"
    around: Around = "none"

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices in order."""
        return tuple(f"w{i}" for i in range(self.depth))

    def init(self, key: jax.Array, heads: int, width: int) -> dict[str, jax.Array]:
        """Leaves [N, ...]: Xavier-uniform matrices; a single matrix and gamma: 0."""
        hidden = [self.expansion * width] * (self.depth - 1)
        sizes = list(zip([width, *hidden], [*hidden, width]))
        leaves = {}
        for name, (i, o), k in zip(self.matrices, sizes, jax.random.split(key, self.depth)):
            bound = 0.0 if self.depth == 1 else (6 / (i + o)) ** 0.5
            leaves[name] = jax.random.uniform(k, (heads, i, o), jnp.float32, -bound, bound)
        if self.around == "residual_ln":
            leaves["gamma"] = jnp.zeros((heads, width), jnp.float32)
        return leaves

    def activate(self, z: jax.Array) -> jax.Array:
        """The non-linearity."""
        if self.act == "gelu":  # not `jax.nn.gelu`: its erfc is unknown to Mosaic
            return 0.5 * z * (1 + jax.lax.erf(z * 0.5**0.5))
        return jax.nn.silu(z) if self.act == "silu" else jnp.where(z > 0, z, 0)

    def slope(self, z: jax.Array, g: jax.Array) -> jax.Array:
        """g times the derivative of `activate` at z."""
        return jax.vjp(self.activate, z)[1](g)[0]

    def apply(self, leaves: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        """M(x)."""
        out = self.features(leaves, x) @ leaves[self.matrices[-1]]
        return self.finish(leaves.get("gamma"), x, out)

    def features(self, leaves: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        """What the last matrix is multiplied with."""
        for name in self.matrices[:-1]:
            x = self.activate(x @ leaves[name])
        return x

    def finish(self, gamma: jax.Array | None, x: jax.Array, out: jax.Array) -> jax.Array:
        """What is done with the last matrix's output; gamma [..., H] or one per token."""
        if self.around == "none":
            return out
        if self.around == "residual":
            return x + out
        assert gamma is not None
        if gamma.ndim < x.ndim:
            gamma = gamma[..., None, :]
        return x + normalised(out)[0] * (1 + gamma)


def normalised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x without mean and scale over its last axis, 1 / standard deviation)."""
    x = x - jnp.mean(x, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + LN_EPS)
    return x * inverse, inverse
