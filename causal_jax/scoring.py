"""What a model makes of every target of a batch: how likely it was, and whether the likeliest.

Whole rows at once, or a window at a time as decoding reads, what is remembered carried on: then the
memory needed is that of one window and of this state.
"""

import functools
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.errors import InputError

_LOGITS = 1 << 26  # most float32 logits to hold at a time


def score(
    model: Any, batch: Mapping[str, Any], window: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What the model makes of every target.

    Args:
        model: with `hidden` and `unembed`, such as a `DecoderModel`.
        batch: tokens, targets, segments, positions [B, T].
        window: read so many tokens at a time (`init_cache`, `extend_hidden`); None: all at once.

    Returns:
        -log p(target) in nats, float32 [B, T]; whether the target is the likeliest, bool [B, T].

    Raises:
        InputError: a window, and rows of more than one document.
    """
    if window is not None:
        return _score_streaming(model, batch, window)
    graph, params = nnx.split(model)
    names = ("tokens", "targets", "segments", "positions")
    return jax.device_get(_score(graph, params, {name: batch[name] for name in names}))


@functools.partial(jax.jit, static_argnums=0)
def _score(graph: Any, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    model, targets = nnx.merge(graph, params), batch["targets"]
    h = model.hidden(batch["tokens"], segments=batch["segments"], positions=batch["positions"])
    return _told(model, h, targets)


def _score_streaming(model: Any, batch: Mapping[str, Any], window: int):
    """`score`, window after window."""
    segments, tokens = np.asarray(batch["segments"]), np.asarray(batch["tokens"])
    if (segments > 0).any():
        raise InputError(
            f"window={window}: rows of several documents are read whole, expected None"
        )
    (rows, length), (graph, params) = tokens.shape, nnx.split(model)
    behind = ((0, 0), (0, -length % window))  # seen by nobody
    tokens, targets = (np.pad(x, behind) for x in (tokens, np.asarray(batch["targets"])))
    # a buffer of its own for every leaf, as all are given away
    cache, told = jax.tree.map(jnp.copy, model.init_cache(rows, tokens.shape[1])), []
    for at in range(0, tokens.shape[1], window):
        here = slice(at, at + window)
        cache, *said = _next(graph, params, cache, tokens[:, here], targets[:, here])
        told.append(jax.device_get(said))
    nll, best = (np.concatenate(x, 1)[:, :length] for x in zip(*told, strict=True))
    return nll, best


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _next(graph: Any, params: Any, cache: Any, tokens: jax.Array, targets: jax.Array):
    model = nnx.merge(graph, params)
    h, cache = model.extend_hidden(tokens, cache)
    return cache, *_told(model, h, targets)


def state_bytes(model: Any, length: int) -> int:
    """Bytes of what the model remembers of one row of `length` tokens, by its cache."""
    leaves = jax.eval_shape(lambda: jax.tree.leaves(model.init_cache(1, length)))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def peak_mib() -> float:
    """Most memory that this process has had so far, in MiB (nan where that is not told)."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _told(model: Any, h: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """nll and best from hidden states, a few logits at a time."""
    rows, length = targets.shape
    piece = max(1, min(length, _LOGITS // (rows * model.spec.vocab)))
    padding = -length % piece

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, piece, *x.shape[2:]), 1, 0)

    def of_piece(xs):
        logits, target = model.unembed(xs[0]), xs[1]
        hit = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        best = jnp.argmax(logits, axis=-1) == target
        return jax.nn.logsumexp(logits, axis=-1) - hit, best

    pieces = jax.lax.map(of_piece, (cut(h), cut(targets)))
    nll, best = (jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length] for x in pieces)
    return nll, best
