"""One optimizer step, as one compiled program with a donated state.

    g = sum_i n_i grad loss_i / sum_i n_i        over microbatches, n_i = weighted targets in each
    theta <- theta - lr(t) (direction(clip(g)) + weight_decay theta)

The objective's scalar is a mean over n_i targets, so g is the gradient of the mean over the whole
global batch, however it is cut into microbatches and spread over devices. A step whose loss or
gradient is not finite changes nothing but the step counter.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from causal_jax.objectives._base import Objective
from causal_jax.paths import combine, partition
from causal_jax.placement import BATCH, TIME
from causal_jax.training.optimizer import Optimizer
from causal_jax.training.recipe import Recipe
from causal_jax.training.state import State, graph_of, shardings_of

Batch = dict[str, jax.Array]
Step = Callable[[State, Batch, jax.Array], tuple[State, dict[str, Any]]]


def step_of(recipe: Recipe, abstract: State, mesh: Mesh) -> Step:
    """The step that a recipe asks for; `abstract` as of `training.state.state_of`."""
    return make_step(
        graph_of(recipe.model),
        recipe.objective,
        recipe.optimizer,
        abstract,
        mesh,
        steps=recipe.steps,
        accumulate=recipe.accumulate,
        trainable=recipe.trained,
        ema=recipe.ema,
    )


def make_step(
    graph: nnx.GraphDef,
    objective: Objective,
    optimizer: Optimizer,
    abstract: State,
    mesh: Mesh,
    *,
    steps: int,
    accumulate: int = 1,
    trainable: str = "",
    ema: float | None = None,
) -> Step:
    """The compiled step.

    Args:
        graph: the model without parameters.
        objective: what is minimised.
        optimizer: how.
        abstract: shapes and shardings of the state.
        mesh: the devices.
        steps: length of the run, for the learning-rate schedule.
        accumulate: microbatches; B must be divisible by it.
        trainable: pattern of the parameters that are trained; the others stay as they are.
        ema: decay of the average, where the state has one.

    Returns:
        step(state, batch, key) -> (state, report). The state is donated, `batch` a dict of global
        arrays [B, T], `key` the run's key, the same at every step. The report holds device scalars:
        "metrics" {name: (sum, count)}, "grad_norm", "lr", "finite".
    """
    tx = optimizer.transformation()

    def gradient(trained: Any, frozen: Any, batch: Batch, key: jax.Array):
        def loss(trained):
            return objective.loss(nnx.merge(graph, combine(trained, frozen)), batch, key)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        return value, metrics, grads

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, dict[str, Any]]:
        key = jax.random.fold_in(key, state["step"])
        params, frozen = partition(trainable, state["params"], "trainable")
        if accumulate == 1:
            value, metrics, grads = gradient(params, frozen, batch, key)
        else:
            part = functools.partial(gradient, params, frozen)
            value, metrics, grads = _accumulate(part, batch, key, accumulate, mesh)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        lr = optimizer.learning_rate(state["step"], steps)
        updates, opt = tx.update(grads, state["opt"], params)
        moved = jax.tree.map(lambda p, u: p - lr * u, params, updates)

        def unless_bad(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        # what is frozen is passed on untouched: it may rest in the host's memory
        new = {"params": combine(unless_bad(moved, params), frozen)}
        new["opt"] = unless_bad(opt, state["opt"])
        if "ema" in state and ema is not None:
            # young averages follow closely: the start of training is forgotten
            decay = jnp.minimum(ema, (state["step"] + 1.0) / (state["step"] + 10.0))
            old, still = partition(trainable, state["ema"], "trainable")
            moved = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, old, moved)
            new["ema"] = combine(unless_bad(moved, old), still)
        report = {"metrics": metrics, "grad_norm": norm, "lr": lr, "finite": finite}
        return {"step": state["step"] + 1} | new, report

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(abstract), everywhere))


def _accumulate(gradient, batch: Batch, key, parts: int, mesh: Mesh):
    """Gradient of the whole batch from `parts` microbatches in turn; sums in float32."""

    def cut(x: jax.Array) -> jax.Array:
        # Microbatch i takes rows i, i + parts, ...: every device then finds its share at home.
        x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
        spec = PartitionSpec(None, BATCH, *(TIME,)[: x.ndim - 2])
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def weigh(value, metrics, grads):
        count = metrics["loss"][1].astype(jnp.float32)
        return value * count, metrics, jax.tree.map(lambda g: count * g.astype(jnp.float32), grads)

    def body(total, xs):
        micro, i = xs
        new = weigh(*gradient(micro, jax.random.fold_in(key, i)))
        return jax.tree.map(jnp.add, total, new), None

    micros = jax.tree.map(cut, batch)
    first = jax.eval_shape(lambda: weigh(*gradient(jax.tree.map(lambda x: x[0], micros), key)))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
    (value, metrics, grads), _ = jax.lax.scan(body, zero, (micros, jnp.arange(parts)))
    count = jnp.maximum(metrics["loss"][1], 1e-9)
    return value / count, metrics, jax.tree.map(lambda g: g / count, grads)


def make_eval_step(
    graph: nnx.GraphDef, objective: Objective, mesh: Mesh
) -> Callable[[Any, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
    """eval_step(params, batch) -> metrics {name: (sum, count)}, without randomness or gradient."""

    def evaluate(params: Any, batch: Batch):
        return objective.loss(nnx.merge(graph, params), batch, None)[1]

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))
