"""Attention transfer: each linear layer imitates the softmax attention it will replace.

    L = weight / L' sum_l mean (y_l - y*_l)^2        over the L' layers that are being taught

y* the teacher's heads and y the student's, both before the output projection and from the same
input, which is the teacher's own stream (`nn.lawcat.Lawcat(teach=True)`). Train the students only:
`trainable=r"attention/lawcat/"`. LoLCATs, arXiv 2410.10254; LAWCAT, arXiv 2509.18467.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.linearize import check_taught
from causal_jax.objectives._base import Objective, objectives
from causal_jax.objectives.distil import attention_transfer_loss
from causal_jax.taps import run

SITES = ("lawcat.z", "lawcat.teacher")


@objectives.register("attention_transfer")
@dataclasses.dataclass(frozen=True)
class AttentionTransfer(Objective):
    """Stage one of linearisation.

    Attributes:
        weight: of the squared error; without it Adam's epsilon is too large beside the gradients.
    """

    weight: float = 1000.0

    likelihood: ClassVar[bool] = False

    def __post_init__(self):
        if not self.weight > 0:
            raise InputError(f"objective.weight={self.weight}: expected a number > 0")

    def loss(self, model, batch, key):
        check_taught(model.spec)
        _, seen = run(
            model.hidden,
            batch["tokens"],
            segments=batch["segments"],
            positions=batch["positions"],
            key=key,
            capture=SITES,
        )
        real = (batch["segments"] >= 0).astype(jnp.float32)
        told, teacher = (seen[site] for site in SITES)
        loss = self.weight * attention_transfer_loss(told, teacher, real)
        return loss, {"loss": (loss * real.sum(), real.sum())}
