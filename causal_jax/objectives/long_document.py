"""Next-token prediction over documents longer than the backward pass: truncated through time.

    row = window_1 | window_2 | ... ;   state_i = stop_gradient(read(window_i, state_{i-1}))

A row is one long document, read window after window with what the model remembers carried over
(keys and values, or the state of a memory); gradients end at the window's beginning. So the memory
of a backward pass is that of one window, however long the row, and a model of constant state trains
on documents of any length. The loss is that of `next_token` over the whole row.
"""

import dataclasses

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.objectives._base import Objective, objectives
from causal_jax.objectives._cross_entropy import chunked_cross_entropy
from causal_jax.objectives._pieces import piece_length


@objectives.register("long_document")
@dataclasses.dataclass(frozen=True)
class LongDocument(Objective):
    """Mean nll, gradients within windows.

    Attributes:
        window: tokens of a window; with MAC layers a multiple of their segment.
        logits_mib: most mebibytes of float32 logits that a device holds at a time.
    """

    window: int = 512
    logits_mib: int = 256

    def __post_init__(self):
        for name in ("window", "logits_mib"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")

    def loss(self, model, batch, key):
        """See `Objective.loss`; document ids are not read: a row is one document."""
        rows, length = batch["tokens"].shape
        if length % self.window:
            raise InputError(
                f"rows of {length} tokens: expected a multiple of window={self.window}"
            )
        if model.spec.dropout:
            raise InputError(f"dropout={model.spec.dropout}: expected 0 with long documents")
        chunk = piece_length(rows, model.spec.vocab, self.logits_mib)

        def cut(name):
            x = batch[name].reshape(rows, length // self.window, self.window)
            return jnp.moveaxis(x, 1, 0)

        @jax.checkpoint
        def read(cache, xs):
            number, tokens, targets, weights = xs
            # the first window's gradient reaches what the memory begins with
            still = jax.lax.stop_gradient(cache)
            cache = jax.tree.map(lambda a, b: jnp.where(number == 0, a, b), cache, still)
            h, cache = model.extend_hidden(tokens, cache)
            return cache, chunked_cross_entropy(h, model.unembed, targets, weights, chunk=chunk)

        xs = (jnp.arange(length // self.window), cut("tokens"), cut("targets"), cut("weights"))
        _, sums = jax.lax.scan(read, model.init_cache(rows, length), xs)
        sums = jax.tree.map(lambda a: a.sum(0), sums)
        metrics = {
            "loss": (sums["nll"], sums["count"]),
            "accuracy": (sums["correct"], sums["count"]),
        }
        return sums["nll"] / jnp.maximum(sums["count"], 1.0), metrics
