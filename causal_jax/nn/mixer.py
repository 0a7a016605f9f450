"""Mechanisms that mix a whole sequence x [B, T, D] and own parameters: they replace attention.

A `MixerSpec` stands in `Decoder.attention` beside the specs of attention over q, k, v; `build`
makes the module that takes `Attention`'s place in a block, with the same methods:

    y = mixer(x, mask=, rotations=, tap=)                        [B, T, D] -> [B, T, D]
    y, cache = mixer.extend(x, cache, layer, length=, ...)       the next T positions

The cache is whatever the mechanism remembers, stacked over layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from causal_jax import masks
from causal_jax.attention import AttentionSpec
from causal_jax.errors import InputError
from causal_jax.nn.attention import Rotations
from causal_jax.positions import Rotary
from causal_jax.registry import Registry
from causal_jax.shapes import Array, Float, Int
from causal_jax.taps import OFF, Tap

mixers = Registry("mixer", "causal_jax.nn")


@dataclasses.dataclass(frozen=True)
class MixerSpec(AttentionSpec):
    """Base of all: hyperparameters only. `cost` counts everything, projections too."""

    patterns: ClassVar[frozenset[str]] = frozenset({"self-causal"})
    streams: ClassVar[bool] = True

    def build(
        self, *, width: int, heads: int, head_dim: int, rotary: Rotary | None, rngs: nnx.Rngs,
        **sizes: Any,
    ) -> "Mixer":  # fmt: skip
        """The module with freshly drawn parameters; the arguments are those of `Attention`."""
        raise NotImplementedError(type(self).__name__)

    def exact_when(self, length: int) -> bool:
        """Never: it is no attention."""
        return False


class Mixer(nnx.Module):
    """Base of the modules.

    Attributes:
        rotary, head_dim: of the attention inside, if there is one.
    """

    rotary: Rotary | None = None
    head_dim: int = 0

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask,
        rotations: Rotations,
        tap: Tap = OFF,
    ) -> Float[Array, "B T D"]:
        """Mix all positions, from the beginning of the sequence."""
        raise NotImplementedError(type(self).__name__)

    def init_cache(self, layers: int, batch: int, length: int, dtype: Any) -> Any:
        """What `layers` stacked layers remember before the first position, [layers, B, ...]."""
        raise NotImplementedError(type(self).__name__)

    def extend(
        self,
        x: Float[Array, "B T D"],
        cache: Any,
        layer: int | Int[Array, ""],
        *,
        length: Int[Array, ""],
        mask: masks.Mask,
        rotations: Rotations,
        tap: Tap = OFF,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """T new positions after those in the cache."""
        raise NotImplementedError(type(self).__name__)


def check_plain(mask: masks.Mask, who: str) -> None:
    """Refuse a mask that is more than causality and documents: nothing here could honour it.

    Raises:
        InputError: there is more.
    """
    if isinstance(mask, masks.And):
        for part in mask.parts:
            check_plain(part, who)
    elif not isinstance(mask, masks.Causal | masks.Documents | masks.Full):
        raise InputError(f"mask {type(mask).__name__}: {who} is causal inside documents, no more")


def layer_of(cache: Any, layer: int | Int[Array, ""]) -> Any:
    """One layer's part of a stacked cache."""
    return jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, layer, 0, keepdims=False), cache)


def with_layer(cache: Any, layer: int | Int[Array, ""], new: Any) -> Any:
    """The stacked cache with one layer's part replaced, in place where it is a loop's carry."""
    return jax.tree.map(
        lambda c, n: jax.lax.dynamic_update_index_in_dim(c, n.astype(c.dtype), layer, 0), cache, new
    )


def of_layers(mixer: Mixer, make: Callable[[Any], Any]) -> Any:
    """make(mixer) for every layer of stacked parameters, stacked."""
    graph, params = nnx.split(mixer)
    trees = []

    def leaves(params):
        flat, tree = jax.tree.flatten(make(nnx.merge(graph, params)))
        trees.append(tree)
        return flat

    flat = jax.vmap(leaves)(params)
    return jax.tree.unflatten(trees[0], flat)
