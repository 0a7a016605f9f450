"""Drawing one token from logits: temperature, top-k, top-p, min-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Float, Int, Key


def sample_logits(
    logits: Float[Array, "*B V"],
    key: Key[Array, ""],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Int[Array, "*B"]:
    """Draw token ids from softmax(logits / temperature), restricted to the likely ones.

    The restrictions apply in this order, each to what the one before left (renormalised): top_k
    keeps the k largest; top_p the fewest most likely ones whose probabilities together reach p
    (arXiv 1904.09751); min_p those at least min_p times as likely as the likeliest (2407.01082).
    The likeliest always stays; of equal logits the lower id counts as larger.

    Args:
        logits: any float type; the arithmetic is float32.
        temperature: 0 takes the likeliest and ignores the rest.
        top_k, top_p, min_p: None switches a restriction off.

    Returns:
        int32 ids [*B].
    """
    Sampling(temperature, top_k, top_p, min_p)  # refuses what is out of range
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    z = logits.astype(jnp.float32) / temperature
    index = None
    if top_k is not None or top_p is not None:
        size = logits.shape[-1]
        z, index = jax.lax.top_k(z, size if top_k is None else min(top_k, size))
    if top_p is not None:
        p = jax.nn.softmax(z, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        z = jnp.where(before < top_p, z, -jnp.inf)  # nothing is before the first: it stays
    if min_p is not None and min_p > 0:
        floor = z.max(axis=-1, keepdims=True) + jnp.log(min_p)
        z = jnp.where(z >= floor, z, -jnp.inf)
    drawn = jax.random.categorical(key, z, axis=-1)
    if index is not None:
        drawn = jnp.take_along_axis(index, drawn[..., None], axis=-1)[..., 0]
    return drawn.astype(jnp.int32)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: the settings of `sample_logits`, checked."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError(
                f"temperature {self.temperature}: 0 (always the likeliest) or a positive number"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k {self.top_k}: 1 or more, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: above 0 and at most 1, or leave it out")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p {self.min_p}: from 0 to 1, or leave it out")

    def __call__(self, logits: Float[Array, "*B V"], key: Key[Array, ""]) -> Int[Array, "*B"]:
        """`sample_logits` with these settings."""
        return sample_logits(
            logits,
            key,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )
