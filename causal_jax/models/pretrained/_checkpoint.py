"""Stored weights in, parameters of a `Decoder` out; and back."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.models.pretrained._base import Config, Family
from causal_jax.models.pretrained._views import View, stacked
from causal_jax.nn.stack import segments_of
from causal_jax.paths import map_named, named_leaves

Place = Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights that lie somewhere, none of them read yet.

    Attributes:
        where: for messages.
        config: of the model, with the keys of config.json.
        tensors: stored name -> view.
    """

    where: str
    config: Config
    tensors: Mapping[str, View]


def build(
    spec: Decoder,
    family: type[Family],
    checkpoint: Checkpoint,
    *,
    param_dtype: str = "float32",
    place: Place | None = None,
) -> DecoderModel:
    """The model with the stored parameters. All names and shapes are checked before any is read.

    Args:
        spec: of the model. family: whose names the checkpoint speaks.
        checkpoint: the weights.
        param_dtype: of the parameters.
        place: where each parameter goes: one sharding, or name and shape -> sharding. Each device
            reads its own block.

    Raises:
        InputError: stored tensors that no rule knows, parameters that no tensor holds, shapes that
            differ; all are listed.
    """
    abstract = nnx.eval_shape(lambda: spec.build(jax.random.key(0)))
    graph, shapes = nnx.split(abstract)
    views = _assigned(spec, family, checkpoint)
    leaves = named_leaves(shapes)
    plan = {name: stacked_names(name, spec) for name in leaves}
    _check(plan, leaves, views, checkpoint.where)
    if place is None:
        place = SingleDeviceSharding(jax.devices()[0])
    dtype = jnp.dtype(param_dtype)

    def read(name: str, leaf: Any) -> jax.Array:
        parts = plan[name]
        view = views[name] if parts is None else stacked([views[p] for p in parts])
        shape = jax.ShapeDtypeStruct(leaf.shape, dtype)
        where = place if isinstance(place, Sharding) else place(name, shape)

        def block(index: Any) -> np.ndarray:
            full = tuple(slice(*i.indices(n)) for i, n in zip(index, leaf.shape))
            return np.asarray(view.read(full), dtype)

        return jax.make_array_from_callback(leaf.shape, where, block)

    return nnx.merge(graph, map_named(read, shapes))


def stacked_names(name: str, spec: Decoder) -> list[str] | None:
    """The layers' own parameters (layers/3/...) that the parameter `name` stacks, or None."""
    found = re.fullmatch(r"stack/blocks/(\d+)/(\d+)/(.*)", name)
    if found is None:
        return None
    segment = segments_of(spec.layer_specs(), scan=spec.scan)[int(found[1])]
    step = len(segment.specs)
    layers = [segment.start + int(found[2]) + step * r for r in range(segment.repeats)]
    return [f"layers/{layer}/{found[3]}" for layer in layers]


def _assigned(spec: Decoder, family: type[Family], checkpoint: Checkpoint) -> dict[str, View]:
    """Parameter (layers apart) -> view of what is stored for it."""
    names = list(checkpoint.tensors)
    bare = not any(name.startswith(family.prefix) for name in names)
    views: dict[str, View] = {}
    unknown, twice = [], []
    for name in names:
        is_head = re.match(family.head, name) is not None
        full = family.prefix + name if bare and not is_head else name
        if any(re.fullmatch(pattern, full) for pattern in family.ignore):
            continue
        if spec.tied and is_head:
            continue  # a copy of the embedding
        hits = ((rule, rule.match(full)) for rule in family.rules)
        rule, targets = next(((r, t) for r, t in hits if t is not None), (None, None))
        if rule is None or targets is None:
            unknown.append(name)
            continue
        twice += [t for t in targets if t in views]
        parts = rule.transform.split(checkpoint.tensors[name], spec)
        views.update(zip(targets, parts, strict=True))
    _refuse(
        checkpoint.where,
        {"tensors that are no part of this model": unknown, "parameters stored twice": twice},
    )
    return views


def _check(
    plan: Mapping[str, list[str] | None],
    leaves: Mapping[str, Any],
    views: Mapping[str, View],
    where: str,
) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for name, parts in plan.items():
        shape = tuple(leaves[name].shape)
        wanted |= {name: shape} if parts is None else dict.fromkeys(parts, shape[1:])
    missing = [n for n in wanted if n not in views]
    extra = [n for n in views if n not in wanted]
    wrong = [
        f"{n} {views[n].shape}, expected {shape}"
        for n, shape in wanted.items()
        if n in views and views[n].shape != shape
    ]
    complaints = {
        "parameters without a tensor": missing,
        "tensors for which the model has no parameter": extra,
        "shapes that differ from the config": wrong,
    }
    _refuse(where, complaints)


def _refuse(where: str, complaints: Mapping[str, list[str]]) -> None:
    """One error for all complaints that have a name to list."""
    parts = []
    for what, names in complaints.items():
        more = f", ... ({len(names)} in all)" if len(names) > 8 else ""
        parts += [f"{what}: {', '.join(names[:8])}{more}"] if names else []
    if parts:
        raise InputError(f"{where}: {'; '.join(parts)}")
