"""Weights in and out: GGUF and safetensors, one file per family of models."""

from causal_jax.models.pretrained._base import Config, Family, Rule, families
from causal_jax.models.pretrained._load import load
from causal_jax.models.pretrained._save import save
from causal_jax.models.pretrained._sources import resolve

__all__ = ["Config", "Family", "Rule", "families", "load", "resolve", "save"]
