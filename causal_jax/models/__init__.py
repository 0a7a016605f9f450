"""Models, each a frozen spec that builds an NNX module."""

from causal_jax.models._base import ModelSpec, models

__all__ = ["ModelSpec", "models"]
