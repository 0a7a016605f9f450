"""The feed-forward half of a block: gated (two input matrices) or plain (one)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax.nn.linear import Linear
from causal_jax.shapes import Array, Float
from causal_jax.taps import OFF, Tap

ActivationName = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu2"]

ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=False),
    "geglu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv 2109.08668
}


def is_gated(activation: ActivationName) -> bool:
    """Gated units compute act(x W_gate) * (x W_up) (arXiv 2002.05202)."""
    return "glu" in activation


class MLP(nnx.Module):
    """down(act(x W_gate) * (x W_up)) when gated, down(act(x W_up)) otherwise.

    Site: `mlp_act` [B, T, F], what enters `down`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: ActivationName,
        *,
        bias: bool = False,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.gate = Linear(width, hidden, bias=bias, rngs=rngs) if is_gated(activation) else None
        self.up = Linear(width, hidden, bias=bias, rngs=rngs)
        self.down = Linear(hidden, width, bias=bias, scale=out_scale, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], *, tap: Tap = OFF) -> Float[Array, "B T D"]:
        act = ACTIVATIONS[self.activation]
        h = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(tap("mlp_act", h))
