"""Gated associative memory (GAM): a short convolution and a bank of learned patterns, gated.

    l_t = b + sum_j w_j * x_{t - k + 1 + j}          local: depthwise causal convolution
    p_t = softmax(M x_t),  g_t = M^T p_t              bank: M [m, D] holds parameters, not tokens
    y_t = sigmoid(a_t) * l_t + sigmoid(c_t) * g_t     [a_t, c_t] = x_t W + b

No output projection, no scale on the scores, keys and values tied. The bank's part of y_t is a
function of token t alone (a feed-forward layer M^T softmax(M x)): only the convolution mixes
tokens, so L layers see exactly L (k - 1) + 1 of them and nothing from further back, ever.

    cost     2 T D (k + 2 m + 2 D), linear in T; decode state: the last k - 1 inputs
    exact    the bank's read equals attention to M as keys and values, scale 1, no mask

Deviation: weights of the gates are drawn as everywhere here (truncated normal), not uniformly; the
model around it is `Decoder`'s (as the paper's: layer norms, biases, GELU, learned positions, tied
head). Gated Associative Memory, arXiv 2509.00605.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax import masks
from causal_jax.errors import InputError
from causal_jax.linear_maps import causal_conv
from causal_jax.nn.attention import Rotations
from causal_jax.nn.linear import Linear
from causal_jax.nn.mixer import Mixer, MixerSpec, check_plain, layer_of, mixers, with_layer
from causal_jax.positions import Rotary
from causal_jax.shapes import Array, Float, Int
from causal_jax.taps import OFF, Tap

Mode = Literal["gate", "sum", "local", "global"]


def slot_weights(
    x: Float[Array, "*B D"], bank: Float[Array, "M D"], *, scale: float = 1.0
) -> Float[Array, "*B M"]:
    """How much of each pattern every token reads: softmax(scale M x), float32 (or wider)."""
    wide = jnp.promote_types(jnp.float32, x.dtype)
    return jax.nn.softmax(scale * jnp.einsum("...d,md->...m", x.astype(wide), bank.astype(wide)))


def memory_read(
    x: Float[Array, "*B D"], bank: Float[Array, "M D"], *, scale: float = 1.0
) -> Float[Array, "*B D"]:
    """The mean of the patterns under `slot_weights`, in x's dtype."""
    p = slot_weights(x, bank, scale=scale)
    return jnp.einsum("...m,md->...d", p, bank.astype(p.dtype)).astype(x.dtype)


def slot_usage(p: Float[Array, "*B M"]) -> dict[str, Float[Array, "..."]]:
    """Which slots are used: mean load [M], its entropy and the tokens' mean entropy in nats."""
    load = p.reshape(-1, p.shape[-1]).mean(0)
    entropy = lambda q: -jnp.sum(jax.scipy.special.xlogy(q, q), axis=-1)  # noqa: E731
    return {"load": load, "load_entropy": entropy(load), "token_entropy": entropy(p).mean()}


@mixers.register("gam")
@dataclasses.dataclass(frozen=True)
class GAM(MixerSpec):
    """Gated associative memory in attention's place (arXiv 2509.00605).

    Attributes:
        slots: patterns in the bank, m.
        kernel: taps of the convolution, k; 1: none but the token itself.
        mode: "gate", or one of the paper's ablations: "sum" l + g, "local" l, "global" g alone.
        scale: on the scores; the paper has none.
    """

    slots: int = 512
    kernel: int = 3
    mode: Mode = "gate"
    scale: float = 1.0

    def __post_init__(self):
        for name in ("slots", "kernel"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.mode not in get_args(Mode):
            raise InputError(f"mode={self.mode!r}: expected one of {get_args(Mode)}")
        if not math.isfinite(self.scale):
            raise InputError(f"scale={self.scale}: expected a finite number")

    def receptive_field(self, layers: int) -> int:
        """Tokens that a model of so many layers sees, itself included."""
        return 1 + (layers * (self.kernel - 1) if self.mode != "global" else 0)

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """Convolution, bank and gates, for width N H."""
        width, parts = N * H, {"local": (1, 0, 0), "global": (0, 1, 0), "sum": (1, 1, 0)}
        conv, bank, gate = parts.get(self.mode, (1, 1, 1))
        return 2.0 * T * width * (conv * self.kernel + bank * 2 * self.slots + gate * 2 * width)

    def build(
        self, *, width: int, heads: int, head_dim: int, rotary: Rotary | None, rngs: nnx.Rngs,
        **sizes: Any,
    ) -> "GAMMixer":  # fmt: skip
        """The module; heads and rotations mean nothing to it."""
        return GAMMixer(self, width, rngs=rngs)


class GAMMixer(Mixer):
    """The parameters of a `GAM`.

    Sites: `gam.local`, `gam.global` [B,T,D], `gam.slots` [B,T,M] (what is read from each pattern),
    `gam.gates` [B,T,2D], those of them that the mode has.
    """

    def __init__(self, spec: GAM, width: int, *, rngs: nnx.Rngs):
        self.spec, self.width = spec, width
        conv, bank = spec.mode != "global", spec.mode != "local"
        limit, wide = spec.kernel**-0.5, (6.0 / (spec.slots + width)) ** 0.5
        draw = lambda limit, *shape: nnx.Param(  # noqa: E731
            jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit)
        )
        self.taps = draw(limit, spec.kernel, width) if conv else None
        self.bias = draw(limit, width) if conv else None
        self.bank = draw(wide, spec.slots, width) if bank else None
        self.gate = Linear(width, 2 * width, bias=True, rngs=rngs) if spec.mode == "gate" else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask,
        rotations: Rotations,
        tap: Tap = OFF,
    ) -> Float[Array, "B T D"]:
        check_plain(mask, "GAM")
        return self._mix(x, None, rotations.segments, tap.scope("gam"))[0]

    def init_cache(self, layers: int, batch: int, length: int, dtype: Any) -> Array:
        """The last k - 1 inputs, zeros before the first; `length` does not matter."""
        past = self.spec.kernel - 1
        return jnp.zeros((layers, batch, past, self.width), dtype)

    def extend(
        self,
        x: Float[Array, "B T D"],
        cache: Any,
        layer: int | Int[Array, ""],
        *,
        length: Int[Array, ""],
        mask: masks.Mask,
        rotations: Rotations,
        tap: Tap = OFF,
    ) -> tuple[Float[Array, "B T D"], Any]:
        check_plain(mask, "GAM")
        y, state = self._mix(x, layer_of(cache, layer), None, tap.scope("gam"))
        return y, with_layer(cache, layer, state)

    def _mix(self, x: Array, state: Array | None, segments: Array | None, tap: Tap):
        """y and the convolution's state after it."""
        local, read = jnp.zeros_like(x), jnp.zeros_like(x)
        if self.taps is not None and self.bias is not None:
            bias = self.bias[...].astype(x.dtype)[None, None]
            local, state = causal_conv(x, self.taps[...], state, segments)
            local = tap("local", local + bias)
        if self.bank is not None:
            p = tap("slots", slot_weights(x, self.bank[...], scale=self.spec.scale))
            bank = self.bank[...].astype(p.dtype)
            read = tap("global", jnp.einsum("btm,md->btd", p, bank).astype(x.dtype))
        if self.gate is None:
            return local + read, state
        a, c = jnp.split(jax.nn.sigmoid(tap("gates", self.gate(x))), 2, axis=-1)
        return a * local + c * read, state
