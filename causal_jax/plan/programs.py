"""The programs of a run, traced with shapes alone: the training step, prefill and decoding.

They are built by the functions that training and generating call; nothing is allocated.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from causal_jax.bench.recipes import context
from causal_jax.errors import InputError
from causal_jax.hardware import compiling_for
from causal_jax.placement import BATCH
from causal_jax.plan.chips import Target
from causal_jax.training import state, step
from causal_jax.training.recipe import Recipe
from causal_jax.training.sharding import MeshSpec, batch_sharding, check_batch, make_mesh

_FIELDS = {"tokens": "int32", "targets": "int32", "weights": "float32"} | {
    "segments": "int32",
    "positions": "int32",
}


@dataclasses.dataclass(frozen=True)
class Traced:
    """A program before it is compiled.

    Attributes:
        name: "train", "prefill", "decode".
        traced: `jax.stages.Traced`.
        platform: whose implementations were chosen.
        parts: {what: bytes per chip} of its arguments.
        tokens: that it reads, on all chips.
        notes: dimensions that could not be split.
    """

    name: str
    traced: Any
    platform: str
    parts: dict[str, int]
    tokens: int
    notes: tuple[str, ...] = ()

    def compile(self) -> Any:
        """Lower and compile, for the platform it was traced for."""
        with compiling_for(self.platform):
            return self.traced.lower().compile()


def mesh_of(spec: MeshSpec, target: Target) -> Mesh:
    """The mesh over all chips of a topology.

    Raises:
        InputError: the axes do not multiply to the number of chips.
    """
    mesh = make_mesh(spec, target.devices)
    if mesh.size != len(target.devices):
        raise InputError(
            f"mesh {spec.text()} uses {mesh.size} of the {len(target.devices)} chips of "
            f"{target.name}: set one axis to -1, or axes that multiply to {len(target.devices)}"
        )
    return mesh


def training_step(recipe: Recipe, target: Target) -> Traced:
    """One optimizer step of the recipe.

    Raises:
        InputError: the mesh cannot be, or cannot share out the batch.
    """
    mesh = mesh_of(recipe.mesh, target)
    rows, length = recipe.data.batch, context(recipe)
    check_batch(mesh, rows, length, recipe.accumulate)
    abstract, whole = state.state_of(recipe, mesh)
    run = step.step_of(recipe, abstract, mesh)
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), kind, sharding=batch_sharding(mesh, 2))
        for name, kind in _FIELDS.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh), compiling_for(target.platform):
        traced = run.trace(abstract, batch, key)
    parts = {"parameters": abstract["params"], "optimizer": abstract["opt"]}
    parts |= {"average": abstract["ema"]} if "ema" in abstract else {}
    parts |= {"batch": batch}
    sizes = {name: bytes_per_chip(tree) for name, tree in parts.items()}
    return Traced("train", traced, target.platform, sizes, rows * length, tuple(whole))


def serving(recipe: Recipe, target: Target) -> list[Traced]:
    """Prefill of `data.batch` prompts of `data.context` tokens, and one step of decoding after it.

    Raises:
        InputError: the model keeps no cache.
    """
    mesh = mesh_of(recipe.mesh, target)
    rows, length = recipe.data.batch, context(recipe)
    check_batch(mesh, rows, length, 1)
    graph = state.graph_of(recipe.model)
    if not hasattr(nnx.eval_shape(lambda: recipe.model.build(jax.random.key(0))), "extend_hidden"):
        raise InputError(f"--serve: {type(recipe.model).__name__} keeps no cache to decode with")
    tx = recipe.optimizer.transformation()
    abstract, whole = state.abstract_state(recipe.model, tx, mesh, rules=recipe.mesh.rules)
    params = abstract["params"]

    kinds = []  # of cache

    def prefill(params, tokens):
        model: Any = nnx.merge(graph, params)
        h, cache = model.extend_hidden(tokens, model.init_cache(*tokens.shape))
        kinds.append(jax.tree.structure(cache))
        return model.unembed(h[:, -1:]), jax.tree.leaves(cache)

    def decode(params, token, leaves):
        model: Any = nnx.merge(graph, params)
        logits, cache = model.extend(token, jax.tree.unflatten(kinds[0], leaves))
        return jnp.argmax(logits, -1), jax.tree.leaves(cache)

    def tokens(columns):
        where = NamedSharding(mesh, PartitionSpec(BATCH, None))
        return jax.ShapeDtypeStruct((rows, columns), "int32", sharding=where)

    with jax.set_mesh(mesh), compiling_for(target.platform):
        _, shapes = jax.eval_shape(prefill, params, tokens(length))
        cache = [_placed(mesh, a) for a in shapes]
        where = (NamedSharding(mesh, PartitionSpec(BATCH)), [a.sharding for a in cache])
        first = jax.jit(prefill, out_shardings=where).trace(params, tokens(length))
        next_ = jax.jit(decode, donate_argnums=2, out_shardings=where).trace(
            params, tokens(1), cache
        )
    sizes = {"parameters": bytes_per_chip(params), "cache": bytes_per_chip(cache)}
    kept = tuple(whole)
    return [
        Traced("prefill", first, target.platform, {"parameters": sizes["parameters"]},
               rows * length, kept),
        Traced("decode", next_, target.platform, sizes, rows, kept),
    ]  # fmt: skip


def _placed(mesh: Mesh, leaf: Any) -> Any:
    """A leaf of a cache: rows [layers, B, S, K, H] with the batch, heads over `tensor`."""
    spec = PartitionSpec()
    if leaf.ndim == 5:
        heads = "tensor" if leaf.shape[3] % mesh.shape["tensor"] == 0 else None
        spec = PartitionSpec(None, BATCH, None, heads)
    elif leaf.ndim > 1:
        spec = PartitionSpec(None, BATCH)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def bytes_per_chip(tree: Any) -> int:
    """Bytes of a tree of sharded shapes on one chip."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        part = leaf.sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize
        for n in part:
            size *= n
        total += size
    return total
