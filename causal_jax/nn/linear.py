"""Linear map and embedding table: parameters keep their dtype, computation is in the input's."""

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax.linear_maps import matmul
from causal_jax.shapes import Array, Float, Int

_TRUNCATED_SD = 0.87962566  # of a standard normal cut at two standard deviations


class Linear(nnx.Module):
    """y = x W + b, with W ~ N(0, scale^2 / d_in) truncated at two standard deviations, b = 0.

    Args:
        d_in, d_out: widths.
        bias: whether there is a b.
        scale: multiplies the standard deviation at the start (residual outputs use 1 / sqrt(2 L)).
    """

    def __init__(
        self, d_in: int, d_out: int, *, bias: bool = False, scale: float = 1.0, rngs: nnx.Rngs
    ):
        draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, (d_in, d_out), jnp.float32)
        self.kernel = nnx.Param(draw * (scale * d_in**-0.5 / _TRUNCATED_SD))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        y = matmul(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...].astype(x.dtype), range(x.ndim - 1))
        return y


class Embed(nnx.Module):
    """A table [V, D] read by index. An index out of range reads the nearest row."""

    def __init__(self, vocab: int, width: int, *, std: float = 0.02, rngs: nnx.Rngs):
        self.table = nnx.Param(std * jax.random.normal(rngs.params(), (vocab, width), jnp.float32))

    def __call__(self, ids: Int[Array, "*B"], dtype: jnp.dtype) -> Float[Array, "*B D"]:
        return jnp.take(self.table[...], ids, axis=0, mode="clip").astype(dtype)
