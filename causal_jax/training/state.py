"""The training state: a dict of arrays that is everything a run needs to go on.

    {"step": int32 [], "params": nnx.State, "opt": optax state, "ema": nnx.State (if averaged)}

The optimizer's state covers what is trained. Parameters, moments and averages are float32 whatever
the model computes in.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from causal_jax.models._base import ModelSpec
from causal_jax.paths import map_named, partition
from causal_jax.training.recipe import Recipe
from causal_jax.training.sharding import state_shardings

State = dict[str, Any]


def graph_of(spec: ModelSpec) -> nnx.GraphDef:
    """The model without its parameters; `nnx.merge(graph, params)` is whole. Allocates nothing."""
    model = nnx.eval_shape(lambda: spec.build(jax.random.key(0)))
    graph, params = nnx.split(model)
    others = [v for _, v in nnx.to_flat_state(params) if not isinstance(v, nnx.Param)]
    if others:
        raise ValueError(f"a model holds parameters only, found {type(others[0]).__name__}")
    return graph


def init_state(
    spec: ModelSpec,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    ema: bool = False,
    trainable: str = "",
    params: Any = None,
) -> State:
    """A state at step 0. Pure: trace it to get shapes, jit it to make it sharded from the start.

    Args:
        params: to begin with; None draws them.
    """
    params = nnx.split(spec.build(key))[1] if params is None else params
    trained, _ = partition(trainable, params, "trainable")
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt": tx.init(trained)}
    return state | {"ema": jax.tree.map(jnp.copy, params)} if ema else state


def state_of(recipe: Recipe, mesh: Mesh) -> tuple[State, list[str]]:
    """`abstract_state` of the state that a recipe asks for."""
    return abstract_state(
        recipe.model,
        recipe.optimizer.transformation(),
        mesh,
        ema=recipe.ema is not None,
        trainable=recipe.trained,
        rules=recipe.mesh.rules,
    )


def abstract_state(
    spec: ModelSpec,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool = False,
    trainable: str = "",
    rules: tuple = (),
) -> tuple[State, list[str]]:
    """The state as shapes, dtypes and shardings; nothing is allocated.

    Returns:
        (tree of ShapeDtypeStruct with sharding, dimensions that could not be split).
    """

    def init(key: jax.Array) -> State:
        return init_state(spec, tx, key, ema=ema, trainable=trainable)

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings, kept = state_shardings(mesh, shapes, rules, _heads(spec))
    if spec.on_host:
        both = {"params", "ema"} & {*shapes}
        parts = {name: _on_host(spec.on_host, shardings[name]) for name in both}
        shardings = shardings | parts
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )
    # the optimizer's copies say nothing new
    return abstract, [line for line in kept if line.startswith("params/")]


def _on_host(pattern: str, shardings: Any) -> Any:
    """The same places, in the host's memory for the parameters that match."""

    def moved(name: str, place: Any) -> Any:
        return place.with_memory_kind("pinned_host") if re.search(pattern, name) else place

    return map_named(moved, shardings)


def _heads(spec: Any) -> dict[str, int]:
    """Of how many heads the columns of each attention projection are made."""
    heads = getattr(spec, "heads", 0)
    shared = getattr(spec, "kv_heads", 0) or heads
    return {"q": heads, "o": heads, "k": shared, "v": shared} if heads else {}


def shardings_of(abstract: State) -> Any:
    """The shardings alone."""
    return jax.tree.map(lambda a: a.sharding, abstract)


def new_state(
    spec: ModelSpec,
    tx: optax.GradientTransformation,
    abstract: State,
    seed: int,
    *,
    trainable: str = "",
    params: Any = None,
) -> State:
    """The state at step 0, every array made where it belongs; the same values on every mesh.

    Args:
        params: to begin with, where they belong and given away; None draws them.
    """
    ema = "ema" in abstract

    def init(key: jax.Array, params: Any) -> State:
        return init_state(spec, tx, key, ema=ema, trainable=trainable, params=params)

    make = jax.jit(init, out_shardings=shardings_of(abstract), donate_argnums=1)
    return make(jax.random.key(seed), params)


def averaged(state: State) -> Any:
    """The parameters to validate, sample and evaluate with: the average where there is one."""
    return state.get("ema", state["params"])


def param_count(state: State) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(state["params"]))


def size_in_bytes(state: State) -> int:
    """Bytes of the whole (abstract or real) state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
