"""Contrastive decoding: what a model says, away from what it says under an intervention.

    l' = l + sum_k gamma_k (l - l_k)        -inf where l < max(l) + log eps

l are the model's logits, l_k those of a negative branch: the same model with edits, on the same
tokens, with a cache of its own. `Contrastive` is a model to `causal_jax.generate.generate`:

    model = Contrastive(model, [counterfactual("random", key)], gamma=0.5)
    generate(model, prompts)

CausalMM (arXiv 2410.04780) contrasts with counterfactual attention; the form is that of contrastive
decoding (arXiv 2210.15097) and of visual contrastive decoding (arXiv 2311.16922). The cost is one
forward pass per branch and token.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from causal_jax.edits import Edit
from causal_jax.errors import InputError
from causal_jax.models.decoder import Cache, Decoder, DecoderModel
from causal_jax.shapes import Array, Float, Int
from causal_jax.taps import OFF, Tap, run


def contrast(
    logits: Float[Array, "*B V"],
    negatives: Sequence[Float[Array, "*B V"]],
    gamma: float | Sequence[float] = 0.5,
    eps: float = 0.1,
) -> Float[Array, "*B V"]:
    """Logits moved away from those of the negative branches, among plausible tokens only.

    Args:
        logits: of the model as it is.
        negatives: of each negative branch.
        gamma: strength, one for all branches or one each; 0 changes nothing but the cut-off.
        eps: tokens less than eps times as likely as the likeliest are cut off, from 0 (none) to 1
            (all but the likeliest).

    Returns:
        float32 (or wider), -inf where cut off.

    Raises:
        InputError: gamma or eps out of range, not one gamma per branch.
    """
    strengths = _strengths(gamma, eps, len(negatives))
    wide = jnp.promote_types(jnp.float32, logits.dtype)
    plain = logits.astype(wide)
    out = plain
    for strength, negative in zip(strengths, negatives):
        out = out + strength * (plain - negative.astype(wide))
    if eps == 0:
        return out
    return jnp.where(plain < plain.max(-1, keepdims=True) + math.log(eps), -jnp.inf, out)


class Contrastive(nnx.Module):
    """A decoder whose logits are contrasted with those of itself under edits.

    Args:
        model: the decoder.
        branches: edits of each negative branch, as `interp` makes them.
        gamma, eps: of `contrast`.
    """

    def __init__(
        self,
        model: DecoderModel,
        branches: Sequence[Sequence[Edit]],
        *,
        gamma: float | Sequence[float] = 0.5,
        eps: float = 0.1,
    ):
        _strengths(gamma, eps, len(branches))
        self.model = model
        self.branches = nnx.data([[], *(list(b) for b in branches)])
        self.gamma = gamma if isinstance(gamma, int | float) else tuple(gamma)
        self.eps = eps

    @property
    def spec(self) -> Decoder:
        """The decoder's."""
        return self.model.spec

    def __call__(self, tokens: Int[Array, "B T"], **inputs: Any) -> Float[Array, "B T V"]:
        """Contrasted logits of every position; `inputs` as the decoder's own."""
        h = [run(self.model.hidden, tokens, edits=b, **inputs)[0] for b in self.branches]
        return self.unembed(jnp.stack(h, -2))

    def init_cache(
        self, batch: int, length: int, *, start: Int[Array, "B"] | None = None
    ) -> tuple[Cache, ...]:
        """An empty cache for every branch."""
        return tuple(self.model.init_cache(batch, length, start=start) for _ in self.branches)

    def extend(
        self, tokens: Int[Array, "B T"], cache: tuple[Cache, ...]
    ) -> tuple[Float[Array, "B T V"], tuple[Cache, ...]]:
        """Read T more tokens with every branch; contrasted logits and the caches after them."""
        h, cache = self.extend_hidden(tokens, cache)
        return self.unembed(h), cache

    def extend_hidden(
        self, tokens: Int[Array, "B T"], cache: tuple[Cache, ...], *, tap: Tap = OFF
    ) -> tuple[Float[Array, "B T R D"], tuple[Cache, ...]]:
        """`extend` up to the final norm, the branches side by side (R)."""
        if not tap.off:
            raise InputError("Contrastive: edit the model inside, or give a branch")
        found = [
            run(self.model.extend_hidden, tokens, c, edits=b)[0]
            for b, c in zip(self.branches, cache)
        ]
        hidden, caches = zip(*found)
        return jnp.stack(hidden, -2), tuple(caches)

    def unembed(self, h: Float[Array, "*B R D"]) -> Float[Array, "*B V"]:
        """Contrasted logits of hidden states side by side."""
        logits = self.model.unembed(h)
        plain, *negatives = (logits[..., i, :] for i in range(logits.shape[-2]))
        return contrast(plain, negatives, self.gamma, self.eps)


def _strengths(gamma: float | Sequence[float], eps: float, branches: int) -> tuple[float, ...]:
    strengths = (gamma,) * branches if isinstance(gamma, int | float) else tuple(gamma)
    if len(strengths) != branches:
        raise InputError(f"gamma={gamma}: expected a number, or one for each of {branches}")
    if not all(g >= 0 and math.isfinite(g) for g in strengths):
        raise InputError(f"gamma={gamma}: expected numbers >= 0")
    if not 0 <= eps <= 1:
        raise InputError(f"eps={eps}: expected a number from 0 to 1")
    return strengths
