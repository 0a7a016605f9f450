"""Other ways to spread a run over the same chips, compiled one by one and ranked."""

import dataclasses
import math
import time
from collections.abc import Iterator

from causal_jax.bench.recipes import context
from causal_jax.errors import InputError
from causal_jax.plan.chips import Target
from causal_jax.plan.estimate import Estimate, estimate, without_compiling
from causal_jax.plan.programs import training_step
from causal_jax.training.recipe import Recipe
from causal_jax.training.sharding import MeshSpec


def candidates(recipe: Recipe, chips: int) -> Iterator[Recipe]:
    """Recipes that compute the same: the given one, then other meshes, remat and microbatches.

    In the order in which they are worth a compilation: first what keeps most and talks least.
    """
    yield recipe
    heads = getattr(recipe.model, "heads", 1)
    kv = getattr(recipe.model, "kv_heads", 0) or heads
    meshes = [MeshSpec(data=1, fsdp=chips), MeshSpec(data=chips)]
    for tensor in (2, 4, 8):
        if chips % tensor == 0 and kv % tensor == 0:
            meshes.append(MeshSpec(data=1, fsdp=chips // tensor, tensor=tensor))
    if chips >= 16:
        meshes.append(MeshSpec(data=chips // 8, fsdp=8))
    kinds = ("none", "dots", "full") if hasattr(recipe.model, "remat") else (None,)
    for remat in kinds:
        for accumulate in dict.fromkeys((recipe.accumulate, 1, 2, 4)):
            for mesh in meshes:
                parts = mesh.data * mesh.fsdp * accumulate
                if recipe.data.batch % parts or context(recipe) % mesh.context:
                    continue
                model = recipe.model
                if remat is not None:
                    model = dataclasses.replace(model, remat=remat)  # pyright: ignore
                mesh = dataclasses.replace(mesh, rules=recipe.mesh.rules)
                new = dataclasses.replace(recipe, model=model, mesh=mesh, accumulate=accumulate)
                if new != recipe:
                    yield new


def search(
    recipe: Recipe, target: Target, limit: int, say=print, *, minutes: float = math.inf
) -> list[tuple[Recipe, Estimate]]:
    """Compile up to `limit` candidates; those that fit come first, fastest first.

    What would not fit by its arguments alone is not compiled and does not count.

    Args:
        recipe, target: what, and where.
        limit: compilations.
        say: gets a line per candidate.
        minutes: no compilation is begun that would end later, were it as long as the longest yet.

    Raises:
        InputError: no mesh shares out the batch.
    """
    found: list[tuple[Recipe, Estimate]] = []
    refused, compiled, longest, begun = None, 0, 0.0, time.perf_counter()
    for new in candidates(recipe, len(target.devices)):
        if compiled == limit:
            break
        if compiled and time.perf_counter() - begun + longest > 60 * minutes:
            say(f"{minutes:g} minutes are used up after {compiled} compilations (--minutes)")
            break
        before = time.perf_counter()
        try:
            program = training_step(new, target)
        except InputError as e:
            refused = e
            continue
        one = without_compiling(program, new, target)
        if one is None:
            one = estimate(program, new, target)
            compiled += 1
            longest = max(longest, time.perf_counter() - before)
        found.append((new, one))
        verdict = "does not fit"
        if one.fits:
            verdict = f"step {1e3 * one.step[0]:.3g}-{1e3 * one.step[1]:.3g} ms"
        say(f"{compiled}/{limit}  {describe(new, one)}: {verdict}")
    if not found and refused is not None:
        raise refused
    return sorted(found, key=lambda f: (not f[1].fits, sum(f[1].step), f[1].peak))


def describe(recipe: Recipe, one: Estimate) -> str:
    """mesh, remat and microbatches in a few words."""
    remat = getattr(recipe.model, "remat", "-")
    return f"{one.mesh}, remat {remat}, accumulate {recipe.accumulate}"
