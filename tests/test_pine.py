"""Prompts whose documents have no order: layouts, PINE's attention, and the decoder around it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.attention import Dense
from causal_jax.attention.pine import Pine
from causal_jax.models.decoder import Decoder
from causal_jax.positions import Rotary
from causal_jax.segments import doc_layout
from causal_jax.surgery import swap_attention

ROTARY = Rotary(base=100.0)
SPEC = Decoder(
    vocab=23, layers=3, width=32, heads=4, kv_heads=2, context=64, attention=(Pine(),)
)  # fmt: skip
PREFIX, LENGTHS, SUFFIX = 3, (4, 2, 5), 4


def pieces(seed=0, lengths=LENGTHS):
    """Ids of prefix, documents, suffix."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, 23, n).astype(np.int32)  # noqa: E731
    return draw(PREFIX), [draw(n) for n in lengths], draw(SUFFIX)


def joined(p, docs, s):
    """(tokens [1, T], lengths [1, M]) of one order of the documents."""
    return np.concatenate([p, *docs, s])[None], np.array([[len(d) for d in docs]])


def orders(p, docs, s):
    """All orders of the documents as one batch: tokens, layout, permutations."""
    perms = list(itertools.permutations(range(len(docs))))
    rows = [joined(p, [docs[i] for i in perm], s) for perm in perms]
    tokens, lengths = (np.concatenate(x) for x in zip(*rows))
    return tokens, doc_layout(tokens, len(p), lengths), perms


@functools.cache
def model(scale=1.0):
    """A decoder with parameters large enough that attention is far from uniform."""

    @jax.jit
    def make():
        graph_params = nnx.split(SPEC.build(jax.random.key(0)))
        leaves, tree = jax.tree.flatten(graph_params[1])
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
        return jax.tree.unflatten(tree, noisy)

    graph = nnx.split(nnx.eval_shape(lambda: SPEC.build(jax.random.key(0))))[0]
    return nnx.merge(graph, make())


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, tokens, layout):
    return nnx.merge(graph, params)(tokens, layout=layout)


def logits(m, tokens, layout=None):
    return np.asarray(forward(*nnx.split(m), jnp.asarray(tokens), layout))


@pytest.mark.parametrize("lengths", [LENGTHS, (3, 3), (2, 4, 1, 3)])
def test_the_order_of_the_documents_changes_nothing(lengths):
    p, docs, s = pieces(1, lengths)
    tokens, layout, perms = orders(p, docs, s)
    out = logits(model(), tokens, layout)
    scale = np.abs(out).max()
    # prefix and suffix
    np.testing.assert_allclose(out[:, :PREFIX] - out[:1, :PREFIX], 0, atol=2e-6 * scale)
    gap = np.abs(out[:, -SUFFIX:] - out[:1, -SUFFIX:]).max()
    assert gap <= 5e-6 * max(1, scale)
    # every document's own tokens, found again where it now is
    for row, perm in enumerate(perms):
        at = PREFIX + np.cumsum([0] + [len(docs[i]) for i in perm])
        back = [out[row, at[perm.index(i)] :][: len(d)] for i, d in enumerate(docs)]
        gap = np.abs(np.concatenate(back) - out[0, PREFIX:-SUFFIX]).max()
        assert gap <= 5e-6 * max(1, scale)
    # and without re-assigned positions, or without seeing each other, it does
    plain = swap_attention(model(), {None: Dense()})
    masked = logits(plain, tokens, layout)
    assert np.abs(masked[:, -1] - masked[:1, -1]).max() > 1e-3
    vanilla = logits(model(), tokens)
    assert np.abs(vanilla[:, -1] - vanilla[:1, -1]).max() > 1e-2
