"""What a family of pretrained models is: its config read as a `Decoder`, its weights by name.

    name in the checkpoint  --rule-->  name in the model        model.layers.3.mlp.up_proj.weight
                              |                                  -> layers/3/mlp/up/kernel
                              +-- transform (W stored [out, in] -> kernel [in, out], ...)

The table is ordered, the first rule that matches a stored name wins, and every stored name and
every parameter of the model must be used exactly once. Both directions read the same table.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained._views import View
from causal_jax.registry import Registry

families = Registry("model family", "causal_jax.models.pretrained")


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one stored tensor becomes one or several parameters, and back.

    Attributes:
        split: (view, spec) -> one view per parameter.
        join: (parameters, spec) -> what is stored.
    """

    split: Callable[[View, Decoder], tuple[View, ...]]
    join: Callable[[Sequence[np.ndarray], Decoder], np.ndarray]


COPY = Transform(lambda view, _: (view,), lambda arrays, _: arrays[0])
TRANSPOSE = Transform(lambda view, _: (view.transposed(),), lambda arrays, _: arrays[0].T)
# Gemma stores w and multiplies with 1 + w.
PLUS_ONE = Transform(
    lambda view, _: (view.each(lambda w: w.astype(np.float32) + 1),),
    lambda arrays, _: arrays[0] - 1,
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a family's table; `{l}` stands for the layer's number in source and targets."""

    source: str
    targets: tuple[str, ...]
    transform: Transform = COPY

    def match(self, name: str) -> tuple[str, ...] | None:
        """The parameters that the stored `name` holds, or None: not this rule's."""
        found = re.fullmatch(re.escape(self.source).replace(r"\{l\}", r"(\d+)"), name)
        if found is None:
            return None
        layer = found[1] if found.re.groups else ""
        return tuple(t.replace("{l}", layer) for t in self.targets)


def linear(source: str, target: str) -> tuple[Rule, Rule]:
    """weight [out, in] -> kernel [in, out], and a bias where there is one."""
    return (
        Rule(f"{source}.weight", (f"{target}/kernel",), TRANSPOSE),
        Rule(f"{source}.bias", (f"{target}/bias",)),
    )


def norm(source: str, target: str, scale: Transform = COPY) -> tuple[Rule, Rule]:
    """weight -> scale, and a bias where there is one."""
    return (
        Rule(f"{source}.weight", (f"{target}/scale",), scale),
        Rule(f"{source}.bias", (f"{target}/bias",)),
    )


class Config(dict):
    """config.json (or a GGUF file's metadata under the same keys) that knows where it came from."""

    def __init__(self, values: Mapping[str, Any], where: str):
        super().__init__(values)
        self.where = where

    def need(self, key: str) -> Any:
        """The value, or an InputError that names key and file."""
        if self.get(key) is None:
            raise InputError(f"{self.where}: {key} is missing in the model's config")
        return self[key]

    def refuse(self, key: str, *served: Any) -> None:
        """InputError unless the value is absent or one of those served."""
        if self.get(key) is not None and self[key] not in served:
            wanted = " or ".join(map(repr, served))
            raise InputError(f"{self.where}: {key}={self[key]!r} is not supported, only {wanted}")


class Family:
    """A family: one subclass in one file, registered under its `model_type`.

    Class attributes:
        architecture: class name in config.json.
        gguf: name of the architecture in GGUF files.
        prefix: what stored names of all but the head begin with; some files leave it out.
        head: pattern of what the output head's names begin with.
        rules: the table. ignore: patterns of stored names that hold no parameter.
        gguf_keys: metadata key (without the architecture's name in front) -> key in config.json.
    """

    architecture: ClassVar[str]
    gguf: ClassVar[str]
    prefix: ClassVar[str] = "model."
    head: ClassVar[str] = r"lm_head\."
    rules: ClassVar[tuple[Rule, ...]]
    ignore: ClassVar[tuple[str, ...]] = ()
    gguf_keys: ClassVar[Mapping[str, str]] = {
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.sliding_window": "sliding_window",
        "context_length": "max_position_embeddings",
        "rope.freq_base": "rope_theta",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }

    @classmethod
    def decoder(cls, config: Config) -> Decoder:
        """The spec of a model with this config.

        Raises:
            InputError: a key is missing or asks for what the decoder lacks.
        """
        raise NotImplementedError

    @classmethod
    def config(cls, spec: Decoder) -> dict[str, Any]:
        """`decoder` backwards, for `save`.

        Raises:
            InputError: the spec is no model of this family.
        """
        raise NotImplementedError

    @classmethod
    def from_gguf(cls, name: str, stored: View, config: Config) -> View:
        """A tensor as llama.cpp stores it -> as the family's own checkpoints do."""
        return stored
