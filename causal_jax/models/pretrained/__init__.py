"""Weights in and out: GGUF and safetensors, one file per family of models.

    model, tokenizer = load("smollm2")                     # or a file, a folder, "owner/name"
    save("out/model", model, tokenizer)                    # transformers opens it

On a mesh every device reads its own part, by the rules that training uses:

    place = lambda name, leaf: state_shardings(mesh, {name: leaf})[0][name]
    model, tokenizer = load("owner/name", place=place, param_dtype="bfloat16", dtype="bfloat16")

A further family is a further file in this folder: a class registered under its `model_type` with a
table of rules and its config read as a `Decoder`, and back. PARITY.md says what agrees with
transformers, how closely, and what is refused.
"""

from causal_jax.models.pretrained._base import Config, Family, Rule, families
from causal_jax.models.pretrained._load import load, load_language_model, spec_of
from causal_jax.models.pretrained._save import save
from causal_jax.models.pretrained._sources import resolve

__all__ = [
    "Config",
    "Family",
    "Rule",
    "families",
    "load",
    "load_language_model",
    "resolve",
    "save",
    "spec_of",
]
