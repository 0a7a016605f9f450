"""The induction head with its weights replaced by three numbers, and its loss in closed form.

The network (contents c only, no positions; target T the last token):

    r_i = sum_{j<=i} p_ij c_j,  p_ij = softmax_j( beta1 [j = i - 1] )         previous token
    z   = sum_j w_j c_j,        w_j  = softmax_j( alpha c_T . r_j + beta2 [j is a label] )
    logits = classifier([c_T; z])

The loss (N pairs, L labels, c tokens that compete for the first head's attention):

    a = e^beta1 / (e^beta1 + c)         w+ = e^(alpha a) / (e^(alpha a) + N - 1),  w- = (1-w+)/(N-1)
    loss = -log( e^(xi w+) / ( e^(xi w+) + (N-1) e^(xi w-) + (L-N) ) )

With more labels than pairs xi grows first, by itself: the answer is guessed among the labels of the
context; then alpha and beta1 multiply each other's gradients, and the loss falls off a cliff. With
L = N everything waits at a saddle.

Reddy 2023, arXiv 2312.03002. Deviation: the forms are reconstructed from the descriptions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax.errors import InputError
from causal_jax.models._base import ModelSpec, models
from causal_jax.models._classifier import Classifier
from causal_jax.shapes import Array, Float, Key
from causal_jax.taps import OFF, Tap


@models.register("induction_head")
@dataclasses.dataclass(frozen=True)
class InductionHead(ModelSpec):
    """Sizes; `vocab` is the number of labels.

    Attributes:
        dim: of the contents, D.
        width, depth: of the classifier's hidden layers.
        labelled: whether there is a beta2; without it two numbers are trained.
        start: value of the numbers before training.
    """

    vocab: int = 32
    dim: int = 63
    width: int = 128
    depth: int = 3
    labelled: bool = True
    start: float = 0.1

    def __post_init__(self):
        for name in ("vocab", "dim", "width", "depth"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")

    def build(self, key: Key[Array, ""]) -> "InductionHeadModel":
        """The model with a freshly drawn classifier."""
        return InductionHeadModel(self, key)

    def flops_per_token(self, length: int) -> float:
        """Forward and backward, per token of a row."""
        w = self.width
        classifier = 2 * self.dim * w + (self.depth - 1) * w * w + w * self.vocab
        return 6.0 * (classifier / length + self.dim * (length + 2))


class InductionHeadModel(nnx.Module):
    """beta1, alpha, beta2 and the classifier of an `InductionHead`."""

    def __init__(self, spec: InductionHead, key: Key[Array, ""]):
        self.spec = spec
        self.beta1 = nnx.Param(jnp.float32(spec.start))
        self.alpha = nnx.Param(jnp.float32(spec.start))
        self.beta2 = nnx.Param(jnp.float32(spec.start)) if spec.labelled else None
        self.classifier = Classifier(2 * spec.dim, spec.width, spec.depth, spec.vocab, key)

    def __call__(self, c: Float[Array, "B T D"], *, tap: Tap = OFF) -> Float[Array, "B V"]:
        """Logits of the labels.

        Args:
            c: contents of item, label, ..., item, label, target.
            tap: sites `previous` [T,T], `pattern` [B,T], `read` (z) [B,D], `logits`.
        """
        place = jnp.arange(c.shape[1])
        lag = place[:, None] - place[None]
        score = jnp.where(lag < 0, -jnp.inf, jnp.where(lag == 1, self.beta1[...], 0.0))
        previous = tap("previous", jax.nn.softmax(score, axis=-1))
        match = self.alpha[...] * jnp.einsum("bd,ij,bjd->bi", c[:, -1], previous, c)
        if self.beta2 is not None:
            match = match + (self.beta2[...] * (place % 2))[None]
        pattern = tap("pattern", jax.nn.softmax(match, axis=-1))
        z = tap("read", jnp.einsum("bt,btd->bd", pattern, c))
        return tap("logits", self.classifier(jnp.concatenate([c[:, -1], z], axis=-1)))


def nested_loss(
    theta: Float[Array, "3"], *, pairs: int, labels: int, rivals: float
) -> Float[Array, ""]:
    """The loss in closed form.

    Args:
        theta: beta1, alpha, xi.
        pairs: N >= 2. labels: L >= N. rivals: c.
    """
    if not 2 <= pairs <= labels:
        raise InputError(f"pairs={pairs}: expected 2 to labels={labels}")
    beta1, alpha, xi = theta
    found = jax.nn.sigmoid(beta1 - jnp.log(rivals))
    right = jax.nn.sigmoid(alpha * found - jnp.log(pairs - 1.0))
    wrong = (1 - right) / (pairs - 1)
    others = jnp.log(pairs - 1.0) + xi * wrong
    # log(L - N) is -inf where there are no other labels
    absent = jnp.log(jnp.float32(labels - pairs)) if labels > pairs else jnp.float32(-jnp.inf)
    return jax.nn.logsumexp(jnp.stack([xi * right, others, absent])) - xi * right


def descend(
    theta: Float[Array, "3"], lr: float, steps: int, *, pairs: int, labels: int, rivals: float
) -> tuple[Float[Array, "steps 3"], Float[Array, "steps"]]:
    """Gradient descent on `nested_loss`.

    Returns:
        theta and the loss before each of the steps.
    """

    def step(theta, _):
        loss, grad = jax.value_and_grad(nested_loss)(
            theta, pairs=pairs, labels=labels, rivals=rivals
        )
        return theta - lr * grad, (theta, loss)

    return jax.lax.scan(step, theta, length=steps)[1]
