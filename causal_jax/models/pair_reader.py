"""A decoder that reads one document per position: pairs of entities, then a question.

    x_i = E[a_i] + E[b_i + n] + P[i]     documents (a, b)
    x_T = E[a] + E[h + 2 n] + P[T]       the question: which entity is h steps on from a?
    logits = W norm(stack(x))_T          over the n entities

The documents see each other causally, or all of them (the prefix mask of arXiv 2505.11754).
"""

import jax.numpy as jnp

from causal_jax import masks
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.shapes import Array, Float, Int
from causal_jax.taps import OFF, Tap


def pair_reader(
    entities: int, hops: int, documents: int, *, layers: int, width: int, heads: int
) -> Decoder:
    """The decoder whose parameters `read_pairs` uses."""
    return Decoder(
        vocab=2 * entities + hops + 1,
        layers=layers,
        width=width,
        heads=heads,
        hidden=2 * width,
        rotary=None,
        learned_positions=True,
        tied=False,
        context=documents + 1,
    )


def read_pairs(
    model: DecoderModel,
    pairs: Int[Array, "B n 2"],
    asked: Int[Array, "B 2"],
    prefix: int | Int[Array, ""],
    entities: int,
    *,
    tap: Tap = OFF,
) -> Float[Array, "B V"]:
    """Logits of the answer.

    Args:
        pairs: the documents.
        asked: (entity, number of steps).
        prefix: so many first positions see each other; 0: causal, n: all documents.
        entities: how many there are.
    """
    B, n = pairs.shape[:2]
    a = jnp.concatenate([pairs[..., 0], asked[:, :1]], 1)
    b = jnp.concatenate([pairs[..., 1] + entities, asked[:, 1:] + 2 * entities], 1)
    places = jnp.broadcast_to(jnp.arange(n + 1)[None], (B, n + 1))
    assert model.positions is not None
    dtype = jnp.dtype(model.spec.dtype)
    x = model.embed(a, dtype) + model.embed(b, dtype) + model.positions(places, dtype)
    mask = masks.Causal() | masks.Prefix(jnp.full((B,), prefix, jnp.int32))
    x = model.stack(tap("embed", x), mask=mask, positions=places, tap=tap)
    return model.unembed(model.norm(x[:, -1]))[:, :entities]
