"""Muon: momentum orthogonalised by Newton-Schulz for hidden matrices, Adam for everything else.

Keller Jordan, "Muon" (2024); the scale 0.2 sqrt(max(in, out)), which gives every matrix the update
size of AdamW so that one learning rate serves both, is arXiv 2502.16982.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from causal_jax.errors import InputError
from causal_jax.paths import check_pattern, map_named
from causal_jax.training.optimizer._base import Optimizer, optimizers


@optimizers.register("muon")
@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """direction(W) = 0.2 sqrt(max(in, out)) orthogonalise(momentum) for matrices, Adam elsewhere.

    A stacked kernel [L, in, out] is L matrices: each is orthogonalised on its own.

    Attributes:
        momentum: of the matrices' gradient average; Nesterov's form.
        ns_steps: Newton-Schulz iterations.
        matrices: which parameters are matrices: a pattern searched for in their names.
        adam_lr: learning rate of the other parameters as a multiple of `lr`.
        b1, b2, eps: Adam's, for the other parameters.
    """

    lr: float = 2e-3
    momentum: float = 0.95
    ns_steps: int = 5
    matrices: str = r"blocks/.*kernel$"
    adam_lr: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        check_pattern("optimizer.matrices", self.matrices)
        for name in ("momentum", "b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.ns_steps < 1:
            raise InputError(f"optimizer.ns_steps must be at least 1, got {self.ns_steps}")

    def direction(self) -> optax.GradientTransformation:
        muon = optax.contrib.scale_by_muon(
            beta=self.momentum,
            ns_steps=self.ns_steps,
            # every axis in front of the last two counts matrices
            weight_dimension_numbers=lambda tree: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree
            ),
        )
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return optax.partition(
            {
                "muon": optax.chain(muon, optax.stateless(_like_adam)),
                "adam": optax.chain(adam, optax.scale(self.adam_lr)),
            },
            self.labels,
        )

    def labels(self, params: Any) -> Any:
        """Which of the two rules moves each parameter."""

        def label(name: str, leaf: jax.Array) -> str:
            if re.search(self.matrices, name) is None:
                return "adam"
            if leaf.ndim < 2:
                raise InputError(
                    f"optimizer.matrices = {self.matrices!r} takes in {name}, which has shape "
                    f"{leaf.shape}: Muon needs matrices"
                )
            return "muon"

        labels = map_named(label, params)
        if "muon" not in jax.tree.leaves(labels):
            raise InputError(
                f"optimizer.matrices = {self.matrices!r} matches no parameter of this model"
            )
        return labels


def _like_adam(updates: Any, params: Any) -> Any:
    del params
    return jax.tree.map(lambda u: u * (0.2 * jnp.sqrt(max(u.shape[-2:]))), updates)
