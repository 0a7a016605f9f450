"""Distillation: a student learns from what a frozen teacher says, and from how it gets there.

    L = logits D(p_T, p_S) + labels CE + hidden MSE(h_S, h_T) + attention E(a_S, a_T)

    forward   D = tau^2 KL(p_T || p_S)       covers all the teacher says (arXiv 1503.02531)
    reverse   D = tau^2 KL(p_S || p_T)       keeps to what it says most (arXiv 2306.08543)
    js        D = tau^2 (mix KL(p_T || m) + (1 - mix) KL(p_S || m)), m = mix p_T + (1 - mix) p_S
                                             in between (arXiv 2306.13649)

with p = softmax(logits / tau). Every term is a mean over the targets with weight, so microbatches
add up exactly. The model is a `models.pair.Pair`; gradients never reach the teacher.

The functions stand on their own: logits, hidden states and attention of any two models.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.models.pair import PairModel, on_device
from causal_jax.objectives._base import Metrics, Objective, objectives
from causal_jax.objectives._pieces import in_pieces, piece_length
from causal_jax.shapes import Array, Float
from causal_jax.taps import run

Kind = Literal["forward", "reverse", "js"]
_FLOOR = -1e9


def divergence(
    student: Float[Array, "*B V"],
    teacher: Float[Array, "*B U"],
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    mix: float = 0.5,
) -> Float[Array, "*B"]:
    """D of two sets of logits, in nats, float32.

    The gradient by the student's logits is tau (p_S - p_T) for "forward".

    Args:
        student, teacher: logits of one vocabulary; an id may be ruled out (-inf) in both.
        kind: "forward", "reverse" or "js".
        temperature: tau; tau^2 keeps gradients of one size (arXiv 1503.02531).
        mix: the teacher's share of m, "js" only.

    Raises:
        InputError: different vocabularies, or an unknown kind.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)}: "
            "expected one shape, and one vocabulary"
        )
    # finite where an id is ruled out: its probability is 0, and 0 (log 0 - log 0) is no number
    floored = (jnp.maximum(x.astype(jnp.float32), _FLOOR) for x in (student, teacher))
    s, t = (jax.nn.log_softmax(x / temperature) for x in floored)
    if kind == "forward":
        value = _kl(t, s)
    elif kind == "reverse":
        value = _kl(s, t)
    elif kind == "js":
        m = jnp.logaddexp(t + jnp.log(mix), s + jnp.log(1.0 - mix))
        value = mix * _kl(t, m) + (1.0 - mix) * _kl(s, m)
    else:
        raise InputError(f"kind={kind!r}: expected 'forward', 'reverse' or 'js'")
    return temperature**2 * value


def hidden_transfer_loss(
    student: Float[Array, "L B T D"],
    teacher: Float[Array, "L B T D"],
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """mean (h_S - h_T)^2 over layers, weighted positions and features, in float32."""
    gap = jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32))
    return _mean(gap.mean((0, -1)), weights)


def attention_transfer_loss(
    student: Float[Array, "L B T N H"],
    teacher: Float[Array, "L B T N H"],
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """mean (y_S - y_T)^2 of what the heads put out (site `attn.z`), before the output projection.

    The first stage of linearisation (LoLCATs, arXiv 2410.10254; LAWCAT, arXiv 2509.18467, which
    multiplies it by 1000).
    """
    gap = jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32))
    return _mean(gap.mean((0, -2, -1)), weights)


def pattern_transfer_loss(
    student: Float[Array, "L B N T S"],
    teacher: Float[Array, "L B N T S"],
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """mean KL(a_T || a_S) of attention patterns over layers, heads and weighted queries, nats.

    A query that sees nothing adds nothing. MiniLM, arXiv 2002.10957.
    """
    a, b = teacher.astype(jnp.float32), student.astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    terms = jnp.where(a > 0, a * (jnp.log(jnp.maximum(a, tiny)) - jnp.log(jnp.maximum(b, tiny))), 0)
    return _mean(terms.sum(-1).mean((0, 2)), weights)


@objectives.register("distil")
@dataclasses.dataclass(frozen=True)
class Distil(Objective):
    """Learn from a teacher; the model is a `Pair`.

    Attributes:
        kind, temperature, mix: of the divergence between the two predictions, see `divergence`.
        logits: weight of that divergence.
        labels: weight of the cross-entropy with the true targets.
        hidden: weight of the squared error of hidden states (`resid_post`).
        attention: weight of the error of the attention layers.
        maps: what of them: "outputs" of the heads (squared error) or "patterns" (divergence; makes
            [B, N, T, T] arrays).
        layers: (student's, teacher's) layers that are compared; empty: all, one to one.
        logits_mib: most mebibytes of float32 logits that a device holds at a time.
    """

    kind: Kind = "forward"
    temperature: float = 1.0
    mix: float = 0.5
    logits: float = 1.0
    labels: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    maps: Literal["outputs", "patterns"] = "outputs"
    layers: tuple[tuple[int, int], ...] = ()
    logits_mib: int = 256

    def __post_init__(self):
        if self.kind not in ("forward", "reverse", "js"):
            raise InputError(f"objective.kind = {self.kind!r}: expected forward, reverse or js")
        if self.maps not in ("outputs", "patterns"):
            raise InputError(f"objective.maps = {self.maps!r}: expected outputs or patterns")
        if not self.temperature > 0:
            raise InputError(f"objective.temperature must be positive, got {self.temperature}")
        if not 0.0 < self.mix < 1.0:
            raise InputError(f"objective.mix must be between 0 and 1, got {self.mix}")
        weights = {n: getattr(self, n) for n in ("logits", "labels", "hidden", "attention")}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise InputError(
                f"objective: weights must be 0 or more, and one above 0, got {weights}"
            )
        if self.logits_mib < 1:
            raise InputError(f"objective.logits_mib must be at least 1, got {self.logits_mib}")

    def loss(self, model, batch, key):
        pair = need_pair(model, "distil")
        sites = self._sites()
        h, acts = _forward(pair.student, batch, sites, key)
        h_teacher, teacher_acts = jax.lax.stop_gradient(_forward(pair.teacher, batch, sites, None))
        weights = batch["weights"]
        sums = prediction_sums(
            pair, h, h_teacher, batch["targets"], weights, kind=self.kind, mib=self.logits_mib,
            temperature=self.temperature, mix=self.mix,
        )  # fmt: skip
        count = jnp.sum(weights)
        scalar = self.logits * sums["divergence"] + self.labels * sums["nll"]
        scalar = scalar / jnp.maximum(count, 1.0)
        metrics = prediction_metrics(sums, count)
        for name, weight, value in self._transfers(pair, acts, teacher_acts, weights):
            scalar = scalar + weight * value
            metrics[name] = (value * count, count)
        return scalar, metrics

    def _sites(self) -> list[str]:
        attention = "attn.z" if self.maps == "outputs" else "attn.pattern"
        wanted = {"resid_post": self.hidden, attention: self.attention}
        return [name for name, weight in wanted.items() if weight]

    def _transfers(self, pair: PairModel, acts: dict, teacher: dict, weights: Array):
        """(name, weight, value) of the terms that compare layers."""
        for name in acts:
            s, t = self._matched(acts[name], teacher[name])
            if name == "resid_post":
                s = s if pair.bridge is None else pair.bridge(s)
                _check_shapes(name, s, t, "model.bridge = True maps one width to another")
                yield "hidden", self.hidden, hidden_transfer_loss(s, t, weights)
            else:
                _check_shapes(name, s, t, "expected heads of equal number and width")
                f = attention_transfer_loss if name == "attn.z" else pattern_transfer_loss
                yield "attention", self.attention, f(s, t, weights)

    def _matched(self, student: Array, teacher: Array) -> tuple[Array, Array]:
        """The layers that are compared, stacked."""
        depths = len(student), len(teacher)
        if not self.layers:
            if depths[0] != depths[1]:
                raise InputError(
                    f"objective.layers is empty, but the student has {depths[0]} layers and the "
                    f"teacher {depths[1]}: give (student's, teacher's) pairs"
                )
            return student, teacher
        for pair in self.layers:
            if not all(0 <= layer < depth for layer, depth in zip(pair, depths)):
                raise InputError(
                    f"objective.layers: {pair} is outside 0..{depths[0] - 1}, 0..{depths[1] - 1}"
                )
        own, its = (jnp.array(side) for side in zip(*self.layers))
        return student[own], teacher[its]


def need_pair(model: Any, name: str) -> PairModel:
    """The model, if it is a student with a teacher; the teacher ready to be computed with.

    Raises:
        InputError: it is not.
    """
    if not isinstance(model, PairModel):
        raise InputError(
            f"objective {name} needs a teacher: give model = Pair(student=..., teacher=...), got "
            f"{type(model).__name__}"
        )
    return on_device(model)


def prediction_sums(
    pair: PairModel,
    h: Float[Array, "B T D"],
    h_teacher: Float[Array, "B T E"],
    targets: Array,
    weights: Float[Array, "B T"],
    *,
    mib: int = 256,
    **kind: Any,
) -> dict[str, Float[Array, ""]]:
    """Weighted sums over all positions of what two predictions have to say about each other.

    Args:
        h, h_teacher: final hidden states; never are all logits held.
        targets: true ids [B, T].
        weights: of each position.
        mib: mebibytes of the student's logits at a time.
        **kind: as `divergence`.

    Returns:
        `divergence`, `nll` of the student, `correct` (its likeliest token is the target), `agree`
        (both have the same likeliest token).
    """

    def sums(h, h_teacher, targets, weights):
        s = pair.student.unembed(h)
        t = jax.lax.stop_gradient(pair.teacher.unembed(h_teacher))
        best = s.argmax(-1)
        hit = jnp.take_along_axis(jax.nn.log_softmax(s), targets[..., None], -1)[..., 0]
        each = {
            "divergence": divergence(s, t, **kind),
            "nll": -hit,
            "correct": best == targets,
            "agree": best == t.argmax(-1),
        }
        return {name: jnp.sum(value * weights) for name, value in each.items()}

    chunk = piece_length(len(h), pair.spec.vocab, mib)
    return in_pieces(sums, (h, h_teacher, targets, weights), chunk=chunk)


def prediction_metrics(sums: dict[str, Array], count: Array) -> Metrics:
    """The sums of `prediction_sums` as the metrics of an objective."""
    names = {"loss": "nll", "accuracy": "correct", "divergence": "divergence", "agreement": "agree"}
    return {name: (sums[key], count) for name, key in names.items()}


def _forward(model: Any, batch: Any, sites: list[str], key: Array | None) -> tuple[Array, dict]:
    where = {"segments": batch["segments"], "positions": batch["positions"], "key": key}
    return run(model.hidden, batch["tokens"], capture=sites, **where)


def _kl(p: Array, q: Array) -> Array:
    """sum p (log p - log q) from logarithms."""
    return jnp.sum(jnp.exp(p) * (p - q), -1)


def _mean(values: Float[Array, "B T"], weights: Array | None) -> Array:
    if weights is None:
        return values.mean()
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def _check_shapes(name: str, student: Array, teacher: Array, remedy: str) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"{name}: student {list(student.shape[1:])}, teacher {list(teacher.shape[1:])}; "
            f"{remedy}"
        )
