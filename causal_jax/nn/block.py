"""A pre-norm residual block: a mixer, then a feed-forward layer.

    h = x + post(attention(norm(x)));  y = h + post(mlp(norm(h)))          sequential (default)
    y = x + attention(norm(x)) + mlp(norm'(x))                             parallel (GPT-NeoX)

Sites: `resid_pre`, `attn_out`, `resid_mid`, `mlp_out`, `resid_post`, all [B, T, D]. "After l + 1
layers" in papers is `resid_post` of layer l.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax import masks
from causal_jax.nn.attention import Attention, Rotations
from causal_jax.nn.mixer import Mixer
from causal_jax.nn.mlp import MLP
from causal_jax.nn.norm import LayerNorm, RMSNorm
from causal_jax.shapes import Array, Float, Int, Key
from causal_jax.taps import OFF, Tap

Norm = RMSNorm | LayerNorm


class Block(nnx.Module):
    """Ready-made parts in, one residual block out.

    Args:
        attention, mlp: the two branches (a `Mixer` in attention's place); attention_norm, mlp_norm:
            what each reads through.
        post_norms: norms of the two branches' outputs (Gemma 2), or None.
        parallel: both branches read the block's input.
        dropout: rate applied to both branches' outputs when a key is given.
    """

    def __init__(
        self,
        attention: Attention | Mixer,
        mlp: MLP,
        attention_norm: Norm,
        mlp_norm: Norm,
        *,
        post_norms: tuple[Norm, Norm] | None = None,
        parallel: bool = False,
        dropout: float = 0.0,
    ):
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = attention_norm, mlp_norm
        self.attention_post, self.mlp_post = post_norms or (None, None)
        self.parallel, self.dropout = parallel, dropout

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask,
        rotations: Rotations,
        key: Key[Array, ""] | None = None,
        tap: Tap = OFF,
    ) -> Float[Array, "B T D"]:
        x = tap("resid_pre", x)
        mixed = self.attention(self.attention_norm(x), mask=mask, rotations=rotations, tap=tap)
        return self._finish(x, mixed, key, tap)

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
        """The same on T new positions after those in the cache."""
        x = tap("resid_pre", x)
        mixed, cache = self.attention.extend(
            self.attention_norm(x),
            cache,
            layer,
            length=length,
            mask=mask,
            rotations=rotations,
            tap=tap,
        )
        return self._finish(x, mixed, None, tap), cache

    def _finish(self, x: Array, mixed: Array, key: Array | None, tap: Tap) -> Array:
        """Everything after the mixer: blind to time, so prefill, step and training share it."""
        keys = (None, None) if key is None else jax.random.split(key)
        if self.attention_post is not None:
            mixed = self.attention_post(mixed)
        mixed = tap("attn_out", dropout(mixed, self.dropout, keys[0]))
        middle = tap("resid_mid", x + mixed)
        out = self.mlp(self.mlp_norm(x if self.parallel else middle), tap=tap)
        if self.mlp_post is not None:
            out = self.mlp_post(out)
        out = tap("mlp_out", dropout(out, self.dropout, keys[1]))
        return tap("resid_post", middle + out)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero entries with probability `rate`, scale the rest by 1 / (1 - rate); no key: x."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
