"""Next-token prediction: -log p(x_{t+1} | x_{<=t}), averaged over the targets with weight."""

import dataclasses

import jax.numpy as jnp

from causal_jax.objectives._base import Objective, objectives
from causal_jax.objectives._cross_entropy import chunked_cross_entropy
from causal_jax.objectives._pieces import piece_length


@objectives.register("next_token")
@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """loss = mean nll + z_loss * mean lse^2.

    Attributes:
        z_loss: keeps the normaliser near 1 (arXiv 2204.02311 uses 1e-4).
        logits_mib: most mebibytes of float32 logits that a device holds at a time.
    """

    z_loss: float = 0.0
    logits_mib: int = 256

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"z_loss must not be negative, got {self.z_loss}")
        if self.logits_mib < 1:
            raise ValueError(f"logits_mib must be at least 1, got {self.logits_mib}")

    def loss(self, model, batch, key):
        h = model.hidden(
            batch["tokens"],
            segments=batch["segments"],
            positions=batch["positions"],
            key=key,
        )
        sums = chunked_cross_entropy(
            h,
            model.unembed,
            batch["targets"],
            batch["weights"],
            chunk=piece_length(len(h), model.spec.vocab, self.logits_mib),
        )
        count = jnp.maximum(sums["count"], 1.0)
        scalar = (sums["nll"] + self.z_loss * sums["z2"]) / count
        metrics = {
            "loss": (sums["nll"], sums["count"]),
            "accuracy": (sums["correct"], sums["count"]),
        }
        return scalar, metrics
