"""Layers of attention and nothing between them, and a classifier on the last token.

    x <- x + V_l sum_{j<=i} p_ij x_j,    p_ij = softmax_j (K_l x_j) . (Q_l x_i)
    logits = classifier(x at the last token)

One head as wide as the stream, no norm, no bias, no 1/sqrt(width), no feed-forward layer in
between: two layers are the smallest network that can form an induction head. It reads vectors, not
tokens. The classifier is deep so that the network can also know all answers by heart.

Keys and values are the stream itself, Q and K folded into the query and V applied to the result:
the same numbers for fewer products; and only the last token goes through the last layer.

The mechanistic basis of data dependence and abrupt learning, arXiv 2312.03002.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax import masks, taps
from causal_jax.attention import AttentionSpec, Dense
from causal_jax.errors import InputError
from causal_jax.models._base import ModelSpec, models
from causal_jax.models._classifier import Classifier
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import OFF, Tap


@models.register("attention_only")
@dataclasses.dataclass(frozen=True)
class AttentionOnly(ModelSpec):
    """Sizes; `vocab` is the number of labels.

    Attributes:
        layers: of attention, L.
        width: of a token, D.
        depth: hidden layers of the classifier.
        std: of the entries of Q, K, V at the start; 0: width ** -0.5.
        attention: the mechanism.
    """

    vocab: int = 32
    layers: int = 2
    width: int = 128
    depth: int = 3
    std: float = 0.0
    attention: AttentionSpec = Dense(scale=1.0, implementation="reference")

    def __post_init__(self):
        for name in ("vocab", "layers", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("depth", "std"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: expected 0 or more")
        if not {"self-causal", "cross-full"} <= self.attention.patterns:
            raise InputError(
                f"attention {self.attention}: expected one for causal sequences and for a query "
                "apart from its keys"
            )

    def build(self, key: Key[Array, ""]) -> "AttentionOnlyModel":
        """The network with freshly drawn parameters."""
        return AttentionOnlyModel(self, key)

    def flops_per_token(self, length: int) -> float:
        """Forward and backward, per token of a row."""
        D, n = self.width, self.layers - 1
        mixing = n * self.attention.cost(length, length, 1, D, D)
        mixing += self.attention.cost(1, length, 1, D, D)
        products = D * D * (3 * n * length + 3 + self.depth) + D * self.vocab
        return 3.0 * (2.0 * products + mixing) / length


class AttentionOnlyModel(nnx.Module):
    """The parameters q, k, v [L, D, D] and the classifier of an `AttentionOnly`."""

    def __init__(self, spec: AttentionOnly, key: Key[Array, ""]):
        self.spec = spec
        keys = jax.random.split(key)
        shape, std = (3, spec.layers, spec.width, spec.width), spec.std or spec.width**-0.5
        self.q, self.k, self.v = map(nnx.Param, std * jax.random.normal(keys[0], shape))
        self.classifier = Classifier(spec.width, spec.width, spec.depth, spec.vocab, keys[1])

    def __call__(self, x: Float[Array, "B T D"], *, tap: Tap = OFF) -> Float[Array, "B V"]:
        """Logits of the labels.

        Sites: `resid` [B,T,D] after and `attn.*` in every layer but the last, stacked on those
        layers; `last.attn.*` with T = 1; `logits`.
        """
        x = self._through(x, self.spec.layers - 1, tap)
        q, k, v = (w[...][-1] for w in (self.q, self.k, self.v))
        h = self._attend(x[:, -1:], x, (q, k, v), None, tap.scope("last"))
        return tap("logits", self.classifier(h[:, 0]))

    def hidden(self, x: Float[Array, "B T D"], *, tap: Tap = OFF) -> Float[Array, "B T D"]:
        """The stream after all layers, at every token; sites as in `__call__`, stacked on all."""
        return self._through(x, self.spec.layers, tap)

    def _through(self, x, layers: int, tap: Tap):
        def layer(x, weights, tap):
            return tap("resid", self._attend(x, x, weights, masks.Causal(), tap)), None

        weights = tuple(w[...][:layers] for w in (self.q, self.k, self.v))
        return tap.loop(layer, x, weights, scan=False)[0]

    def _attend(self, x, keys, weights, mask, tap: Tap):
        q, k, v = weights
        heads = keys[:, :, None]
        query = ((x @ q) @ k.T)[:, :, None]
        z = self.spec.attention(query, heads, heads, mask=mask, tap=tap.scope("attn"))
        return x + z[:, :, 0] @ v


def progress(
    model: AttentionOnlyModel,
    tokens: Float[Array, "B T D"],
    label: Int[Array, "B"],
    labels: Int[Array, "B N"],
    match: Bool[Array, "B N"],
) -> dict[str, Float[Array, ""]]:
    """How far an induction head has formed, on rows item, label, ..., item, label, target.

    Args:
        tokens, label, labels, match: a batch of `data.tasks.item_labels`, T = 2N + 1.

    Returns:
        ila1: attention in the first layer from a label to its item.
        tla2: attention in the last layer from the target to all labels. tila2: to the labels of
            its own class. cla: probability of the labels that are in the context.
        accuracy, loss: of the answer.
    """
    logits, seen = taps.run(model, tokens, capture=("attn.pattern", "last.attn.pattern"))
    first, last = seen["attn.pattern"][0, :, 0], seen["last.attn.pattern"][:, 0, 0]
    at = jnp.arange(1, tokens.shape[1], 2)  # the labels
    present = jax.nn.one_hot(labels, logits.shape[-1]).max(1)
    logp = jax.nn.log_softmax(logits)
    return {
        "ila1": first[:, at, at - 1].mean(),
        "tla2": last[:, at].sum(-1).mean(),
        "tila2": (last[:, at] * match).sum(-1).mean(),
        "cla": (jnp.exp(logp) * present).sum(-1).mean(),
        "accuracy": (logits.argmax(-1) == label).mean(),
        "loss": -jnp.take_along_axis(logp, label[:, None], axis=1).mean(),
    }
