"""What every model spec offers to the training loop and the commands."""

import dataclasses
from typing import ClassVar

import jax
from flax import nnx

from causal_jax.registry import Registry

models = Registry("model", "causal_jax.models")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model as a value: the spec is the config, `build` makes the parameters.

    Attributes:
        vocab: number of token ids; 0 means "as many as the tokenizer has", filled in when a run
            starts.
    """

    vocab: int = 0

    causal: ClassVar[bool] = True
    frozen: ClassVar[str] = ""  # beginning of the names of parameters that are never trained

    @property
    def on_host(self) -> str:
        """Pattern of the parameters that rest in the host's memory; empty: none do."""
        return ""

    def build(self, key: jax.Array) -> nnx.Module:
        """The module with freshly drawn parameters; same key, same parameters."""
        raise NotImplementedError

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of a training step per token, at this sequence length."""
        raise NotImplementedError

    def param_count(self) -> int:
        """Number of parameters, without allocating any."""
        abstract = jax.eval_shape(lambda: nnx.state(self.build(jax.random.key(0)), nnx.Param))
        return sum(leaf.size for leaf in jax.tree.leaves(abstract))
