"""Change what a model is made of and keep its weights: other attention, adapters, partial freezing.

    model = swap_attention(model, {range(0, 30, 2): Dense(window=256)})
    model = add_lora(model, LoRA(rank=8), key)           # train r"lora_" only, then merge_lora

One operation under all of them: `rebuilt` builds the model of another spec and moves every
parameter of the old one to where its layer and name now are, stacked for `lax.scan` wherever layers
repeat. The models given stay as they are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax.attention import AttentionSpec
from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.nn.lora import LoRA, merged
from causal_jax.nn.stack import Stack
from causal_jax.paths import map_named, named_leaves

Layers = int | range | tuple[int, ...] | None  # None: all


def swap_attention(
    model: Any, specs: Mapping[Layers, Any], *, key: jax.Array | None = None
) -> DecoderModel:
    """The model with another attention mechanism in some layers.

    Args:
        model: a `DecoderModel`; stays as it is; a stack that stays whole is shared, not copied.
        specs: {layer, layers or None for all: `AttentionSpec`}; layers count from 0.
        key: draws the parameters a mechanism has of its own, where it has any.

    Returns:
        The new model; equal layers in a row, or in a period, still share one scan.

    Raises:
        InputError: a layer the model does not have or that is named twice, a spec it cannot take,
            parameters to draw and no key.
    """
    spec = _spec(model)
    chosen = list(spec.layer_specs())
    named: set[int] = set()
    for layers, new in specs.items():
        which = layers_of(layers, spec.layers)
        if twice := named.intersection(which):
            raise InputError(f"swap_attention: layer {min(twice)} is named twice")
        named.update(which)
        _check(new)
        for layer in which:
            chosen[layer] = new
    out = rebuilt(model, dataclasses.replace(spec, attention=shortest_period(chosen)), key)
    _try(out)
    return out


def add_lora(model: Any, lora: LoRA, key: jax.Array) -> DecoderModel:
    """The model with low-rank adapters; it computes the same until they are trained.

    Raises:
        InputError: it has adapters already, or `lora.targets` names nothing.
    """
    if _spec(model).lora is not None:
        raise InputError(f"the model has adapters already, {model.spec.lora}: merge_lora first")
    return rebuilt(model, dataclasses.replace(model.spec, lora=lora), key)


def merge_lora(model: Any) -> DecoderModel:
    """The model without adapters that computes the same: W <- W + (alpha / r) A B.

    Raises:
        InputError: it has no adapters.
    """
    spec = _spec(model)
    if spec.lora is None:
        raise InputError("merge_lora: the model has no adapters")
    graph, params = nnx.split(model)
    leaves = named_leaves(params)
    factor = spec.lora.alpha / spec.lora.rank

    def fold(name: str, leaf: Any) -> Any:
        a = leaves.get(name.removesuffix("kernel") + "lora_a")
        if not name.endswith("/kernel") or a is None:
            return leaf
        return merged(leaf, a, leaves[name.removesuffix("kernel") + "lora_b"], factor)

    folded = nnx.merge(graph, map_named(fold, params))
    return rebuilt(folded, dataclasses.replace(spec, lora=None))


def rebuilt(model: Any, spec: Decoder, key: jax.Array | None = None) -> DecoderModel:
    """The model of `spec` with the parameters of `model`, layer by layer and name by name.

    Parameters that only the old model has are left behind, those that only the new one has are
    drawn.

    Args:
        spec: with the same number of layers.
        key: for the parameters to draw.

    Raises:
        InputError: another number of layers, a parameter of another shape, or one to draw and no
            key.
    """
    if spec.layers != _spec(model).layers:
        raise InputError(f"rebuilt: {model.spec.layers} layers cannot become {spec.layers}")
    shell = nnx.eval_shape(lambda: spec.build(jax.random.key(0)))
    graph, shapes = nnx.split(shell)
    old, wanted = _by_layer(model), _by_layer(shell)
    for place, leaf in wanted.items():
        if place in old and old[place].shape != leaf.shape:
            raise InputError(
                f"rebuilt: {place[1]} of shape {list(old[place].shape)} cannot become "
                f"{list(leaf.shape)}"
            )
    missing = sorted({name for layer, name in wanted if (layer, name) not in old})
    if missing and key is None:
        raise InputError(f"parameters to draw ({', '.join(missing)}): give key=")
    fresh = _drawn(spec, key, frozenset(missing)) if missing else {}
    stacks = _places(shell.stack)

    def fill(name: str, shape: Any) -> jax.Array:
        block, rest = _block_of(name)
        if block is None:
            return old[None, name].leaf if (None, name) in old else fresh[name]
        layers = stacks[block]
        return _stacked([old.get((layer, rest)) for layer in layers], fresh.get(name))

    return nnx.merge(graph, map_named(fill, shapes))


@dataclasses.dataclass(frozen=True)
class _Part:
    """A parameter of one layer: entry `index` of a stacked array (None: the array itself)."""

    leaf: Any
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape if self.index is None else self.leaf.shape[1:]


def _by_layer(model: Any) -> dict[tuple[int | None, str], _Part]:
    """{(layer, name in its block) or (None, name): parameter}."""
    stacks, out = _places(model.stack), {}
    for name, leaf in named_leaves(nnx.split(model)[1]).items():
        block, rest = _block_of(name)
        if block is None:
            out[None, name] = _Part(leaf)
        else:
            out |= {(layer, rest): _Part(leaf, i) for i, layer in enumerate(stacks[block])}
    return out


def _places(stack: Stack) -> dict[str, range]:
    """{"segment/block": its layers, in the order in which they are stacked}."""
    places = {}
    for s, segment in enumerate(stack.segments):
        period = len(segment.specs)
        stop = segment.start + period * segment.repeats
        for j in range(period):
            places[f"{s}/{j}"] = range(segment.start + j, stop, period)
    return places


def _block_of(name: str) -> tuple[str | None, str]:
    """stack/blocks/1/0/mlp/up/kernel -> ("1/0", "mlp/up/kernel"); other names -> (None, name)."""
    words = name.split("/")
    if words[:2] != ["stack", "blocks"]:
        return None, name
    return "/".join(words[2:4]), "/".join(words[4:])


def _stacked(parts: list[_Part | None], fresh: Any) -> jax.Array:
    first = parts[0]
    if first is not None and first.index is not None:
        # As it was: the array itself, or a slice of it.
        run = range(first.index, first.index + len(parts))
        if all(p is not None and p.leaf is first.leaf and p.index == i for p, i in zip(parts, run)):
            return first.leaf if len(run) == len(first.leaf) else first.leaf[run.start : run.stop]
    return jnp.stack([fresh[i] if p is None else p.leaf[p.index] for i, p in enumerate(parts)])


def _drawn(spec: Decoder, key: Any, names: frozenset[str]) -> dict[str, jax.Array]:
    """The leaves of a new model whose name ends in one of `names`; no others are made."""

    def make(key: jax.Array) -> dict[str, jax.Array]:
        leaves = named_leaves(nnx.split(spec.build(key))[1])
        return {name: leaf for name, leaf in leaves.items() if _block_of(name)[1] in names}

    return jax.jit(make)(key)


def _spec(model: Any) -> Decoder:
    if not isinstance(model, DecoderModel):
        raise InputError(f"surgery needs a DecoderModel, got {type(model).__name__}")
    return model.spec


def layers_of(layers: Layers, depth: int) -> tuple[int, ...]:
    """The layers named, of a model of this depth.

    Raises:
        InputError: one that the model does not have.
    """
    which = range(depth) if layers is None else (layers,) if isinstance(layers, int) else layers
    for layer in which:
        if not 0 <= layer < depth:
            raise InputError(f"layers: layer {layer} is outside 0..{depth - 1}")
    return tuple(which)


def shortest_period(specs: Sequence[Any]) -> tuple:
    """The shortest beginning that, repeated, is the whole: `Decoder.attention` of these layers."""
    whole = tuple(specs)
    L = len(whole)
    return next(whole[:p] for p in range(1, L + 1) if (whole[:p] * -(-L // p))[:L] == whole)


def _check(spec: Any) -> None:
    if not isinstance(spec, AttentionSpec):
        raise InputError(f"swap_attention: {spec!r} is no attention spec, e.g. Dense(window=256)")
    if "self-causal" not in spec.patterns:
        raise InputError(f"{spec} cannot serve a causal decoder: it is for {sorted(spec.patterns)}")
    if spec.needs_key:
        raise InputError(f"{spec} draws random numbers: this decoder gives its attention no key")


def _try(model: DecoderModel) -> None:
    """Trace one forward pass: what a mechanism refuses is refused now."""
    length = min(64, model.spec.context)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    jax.eval_shape(lambda t: model(t), tokens)
