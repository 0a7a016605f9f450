"""Optimizers as values: a frozen dataclass is the config and builds the optax transformation."""

from causal_jax.training.optimizer._base import Optimizer, Schedule, optimizers
from causal_jax.training.optimizer.adamw import AdamW
from causal_jax.training.optimizer.muon import Muon
from causal_jax.training.optimizer.sgd import SGD

__all__ = ["SGD", "AdamW", "Muon", "Optimizer", "Schedule", "optimizers"]
