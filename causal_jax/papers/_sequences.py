"""Small decoders on sequences that are drawn on the device: loss, accuracy, training, by spec.

A drawn batch is (sequence [B, T + 1], asked [B, T + 1]): tokens, and which of them the prompt
determines; tokens are predicted from those in front of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.models._base import ModelSpec
from causal_jax.papers import _harness
from causal_jax.shapes import Array, Bool, Float, Int
from causal_jax.training.optimizer import Optimizer
from causal_jax.training.state import graph_of

# for programs of a minute or two: compiles in 60 % of the time, and is no slower at these sizes
QUICK = {"xla_backend_optimization_level": 1}


_graph_of = functools.cache(graph_of)


def model_of(spec: ModelSpec, params: Any) -> Any:
    """The model with these parameters."""
    return nnx.merge(_graph_of(spec), params)


def fresh(spec: ModelSpec) -> Callable[[Any], Any]:
    """key -> newly drawn parameters."""
    return lambda key: nnx.split(spec.build(key))[1]


def asked_nll(
    logits: Float[Array, "B T V"], sequence: Int[Array, "B T1"], asked: Bool[Array, "B T1"]
) -> Float[Array, ""]:
    """Mean -log p of the tokens asked for, nats."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), sequence[:, 1:, None], -1)[..., 0]
    weights = asked[:, 1:].astype(chosen.dtype)
    return -jnp.sum(chosen * weights) / jnp.maximum(weights.sum(), 1.0)


def asked_right(
    logits: Float[Array, "B T V"], sequence: Int[Array, "B T1"], asked: Bool[Array, "B T1"]
) -> Float[Array, ""]:
    """The share of the tokens asked for that are the likeliest."""
    hit = (jnp.argmax(logits, -1) == sequence[:, 1:]) & asked[:, 1:]
    return hit.sum() / jnp.maximum(asked[:, 1:].sum(), 1)


def train_loss(
    spec: ModelSpec, loss: Callable[..., Array], optimizer: Optimizer, steps: int, seeds: int,
    *, init: Any = None, **more: Any,
) -> tuple[Any, dict[str, np.ndarray]]:  # fmt: skip
    """One model per seed on a loss (params, key[, constants]), new or from the stacked parameters
    `init`; other keywords as of `_harness.train`."""
    options, begin = QUICK if jax.default_backend() == "cpu" else None, init or fresh(spec)
    return _harness.train(begin, loss, optimizer, steps, seeds, options=options, **more)


def train(
    spec: ModelSpec, draw: Callable[..., tuple[Array, Array]], optimizer: Optimizer, steps: int,
    seeds: int, **more: Any,
) -> tuple[Any, dict[str, np.ndarray]]:  # fmt: skip
    """One model per seed, trained on what `draw(key[, constants])` draws."""

    def loss(params, key, *constants):
        sequence, asked = draw(key, *constants)
        return asked_nll(model_of(spec, params)(sequence[:, :-1]), sequence, asked)

    return train_loss(spec, loss, optimizer, steps, seeds, **more)


def of_seed(tree: Any, seed: int) -> Any:
    """One seed's part of stacked parameters."""
    return jax.tree.map(lambda x: x[seed], tree)
