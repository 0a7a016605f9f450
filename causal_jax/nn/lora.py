"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen matrix plus the product of two thin ones.

    y = x W + b + (alpha / r) (x A) B        A [d_in, r] random, B [r, d_out] = 0 at the start

At the start nothing changes. An adapted linear map keeps the names of its kernel and bias; A and B
stand beside them as `lora_a` and `lora_b`, so r"lora_" is the pattern of what to train.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax.errors import InputError
from causal_jax.linear_maps import matmul
from causal_jax.nn.linear import Linear
from causal_jax.paths import check_pattern
from causal_jax.shapes import Array, Float


@dataclass(frozen=True)
class LoRA:
    """Which linear maps of a block get an adapter, and of what size.

    Attributes:
        targets: pattern searched for in their names: attention/q, k, v, o; mlp/gate, up, down.
        rank: r.
        alpha: the adapter's output is multiplied by alpha / rank.
    """

    targets: str = r"attention/(q|k|v|o)$"
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(f"lora.rank must be at least 1, got {self.rank}")
        check_pattern("lora.targets", self.targets)


class LoRALinear(Linear):
    """`base` with an adapter of its own."""

    def __init__(self, base: Linear, lora: LoRA, *, rngs: nnx.Rngs):
        self.kernel, self.bias, self.factor = base.kernel, base.bias, lora.alpha / lora.rank
        d_in, d_out = base.kernel.shape
        draw = jax.random.normal(rngs.params(), (d_in, lora.rank), jnp.float32)
        self.lora_a = nnx.Param(draw * d_in**-0.5)
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, d_out), jnp.float32))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        thin = matmul(x, self.lora_a[...].astype(x.dtype))
        added = matmul(thin, self.lora_b[...].astype(x.dtype))
        return super().__call__(x) + added * jnp.asarray(self.factor, x.dtype)


def adapt(module: nnx.Module, lora: LoRA, *, rngs: nnx.Rngs) -> None:
    """Give every linear map of `module` that `lora.targets` names an adapter, in place.

    Raises:
        InputError: it names none.
    """
    maps = {
        "/".join(map(str, (*path, name))): (parent, name, child)
        for path, parent in nnx.iter_modules(module)
        for name, child in sorted(vars(parent).items())
        if isinstance(child, Linear)
    }
    chosen = [name for name in sorted(maps) if re.search(lora.targets, name)]
    if not chosen:
        raise InputError(
            f"lora.targets = {lora.targets!r} names no linear map: {', '.join(sorted(maps))}"
        )
    for name in chosen:
        parent, attribute, child = maps[name]
        setattr(parent, attribute, LoRALinear(child, lora, rngs=rngs))


def merged(
    kernel: Float[Array, "*L D F"],
    a: Float[Array, "*L D R"],
    b: Float[Array, "*L R F"],
    factor: float,
) -> Float[Array, "*L D F"]:
    """W + factor A B, which needs no adapter; layers may be stacked in front."""
    product = jnp.einsum("...dr,...rf->...df", a, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + factor * product).astype(kernel.dtype)
