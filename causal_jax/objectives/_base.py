"""The objective contract."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from causal_jax.registry import Registry

objectives = Registry("objective", "causal_jax.objectives")

Metrics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What to minimise, as a value.

    `loss(model, batch, key)` returns the scalar to differentiate and metrics as (sum, count) pairs,
    so that averages over microbatches and devices are exact. `"loss"` is always among them: the
    summed negative log-likelihood (nats) and the number of targets; the scalar is a mean over that
    count. `key=None` means evaluation: no dropout, no other randomness.

    Class attributes:
        likelihood: whether "loss" is one, so that bits per byte can be told from it.
    """

    likelihood: ClassVar[bool] = True

    def loss(
        self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The scalar to minimise, and metrics."""
        raise NotImplementedError
