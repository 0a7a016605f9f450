"""The config's part of a benchmark: the recipe with its vocabulary, random batches of its shape."""

import dataclasses
from typing import Any

import numpy as np

from causal_jax import config
from causal_jax.errors import InputError
from causal_jax.training.recipe import Recipe

DEFAULT = "configs/quickstart.py"


def load(args: Any) -> Recipe:
    """The recipe of `--config` and its overrides, `model.vocab` filled in.

    Raises:
        InputError: no such file or field, or the config is not a `Recipe`.
    """
    recipe = config.load(args.config or DEFAULT, args.overrides)
    if not isinstance(recipe, Recipe):
        raise InputError(f"--config {args.config}: expected a Recipe, got {type(recipe).__name__}")
    if recipe.model.vocab:
        return recipe
    tokenizer = recipe.data.tokenizer
    vocab = getattr(tokenizer, "vocab", 0) or tokenizer.train(()).vocab
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab=vocab))


def context(recipe: Recipe) -> int:
    """Tokens per row."""
    return recipe.data.context or recipe.data.source.task.length  # type: ignore[attr-defined]


def random_batch(recipe: Recipe, seed: int) -> dict[str, np.ndarray]:
    """One global batch of random tokens, one document per row."""
    shape = (recipe.data.batch, context(recipe))
    rng = np.random.default_rng(seed)
    tokens, targets = (rng.integers(0, recipe.model.vocab, shape, np.int32) for _ in range(2))
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": np.ones(shape, np.float32),
        "segments": np.zeros(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
    }
