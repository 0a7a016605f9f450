"""Objectives: what a model is trained for. Strategies, never trainers: one loop serves all."""

from causal_jax.objectives._base import Objective, objectives

__all__ = ["Objective", "objectives"]
