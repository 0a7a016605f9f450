"""Confounding tokens: those a student's answer hangs on and its teacher's does not.

    g_i    = || d l / d e_i ||_2                   l = mean -log p of the answer, e_i the embedding
    ghat   = (g - min g) / (max g - min g)         over the analysed span, per row and model
    Dhat   = the same of (ghat_teacher - ghat_student)
    chosen = Dhat <= tau                           fixed, or a quantile of the row, at most `cap`

Low Dhat is confounding. Every step is a function, and `find` keeps them all:

    found = find(teacher, student, batch)
    token_plot(found, 0, pieces)                   # the prompt, coloured

LeaF, arXiv 2506.07851. Deviation: gradients by L2 norm, as the authors' code (the paper says
absolute gradients); a row without any difference has no confounders (the quantile rule of the code
would choose all of it).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.data.counterfactual import before_answer, run_numbers
from causal_jax.errors import InputError
from causal_jax.shapes import Array, Bool, Float, Int
from causal_jax.taps import grad_sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which tokens of a span are confounding.

    Attributes:
        rule: "quantile" takes the lowest `share` of each row (the authors' code), "fixed" what lies
            at or below `tau` (the paper).
        share: of the span, for "quantile" (0.05 mathematics, 0.10 code).
        tau: for "fixed" (0.05 to 0.15, larger for smaller students).
        cap: no Dhat above it is confounding.
        protect: ids that never are: white space, marks of a template.
    """

    rule: Literal["quantile", "fixed"] = "quantile"
    share: float = 0.1
    tau: float = 0.1
    cap: float = 0.5
    protect: tuple[int, ...] = ()

    def __post_init__(self):
        if self.rule not in ("quantile", "fixed"):
            raise InputError(f"rule = {self.rule!r}: expected 'quantile' or 'fixed'")
        for name in ("share", "tau", "cap"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} = {getattr(self, name)}: expected 0 to 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Confounders:
    """Every intermediate of the search, all [B, T]; 0 outside the span.

    Attributes:
        span: the tokens analysed.
        teacher, student: ghat, sensitivities in [0, 1].
        score: Dhat in [0, 1].
        chosen: the confounding tokens.
        runs: which run of them, from 1.
    """

    span: Bool[Array | np.ndarray, "B T"]
    teacher: Float[Array | np.ndarray, "B T"]
    student: Float[Array | np.ndarray, "B T"]
    score: Float[Array | np.ndarray, "B T"]
    chosen: Bool[Array | np.ndarray, "B T"]
    runs: Int[Array | np.ndarray, "B T"]


def find(
    teacher: Any,
    student: Any,
    batch: Mapping[str, Array],
    rule: Rule = Rule(),
    span: Bool[Array, "B T"] | None = None,
) -> Confounders:
    """Search each row.

    Args:
        teacher, student: models with `hidden` and `unembed`.
        batch: tokens, targets, weights (1 on the answer), segments, positions [B, T], one document
            per row.
        rule: which tokens count.
        span: where to look, e.g. without the marks of a template; None: the whole prompt.
    """
    prompt = before_answer(batch)
    span = prompt if span is None else span & prompt
    theirs, own = (min_max(sensitivity(model, batch), span) for model in (teacher, student))
    score, differs = confounder_score(theirs, own, span)
    chosen = select(score, span & differs[:, None], rule, batch["tokens"])
    return Confounders(span, theirs, own, score, chosen, run_numbers(chosen))


def sensitivity(model: Any, batch: Mapping[str, Array]) -> Float[Array, "B T"]:
    """g_i = ||d l / d e_i||_2 of each row's own mean loss over its answer."""
    weights = batch["weights"]
    share = weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-9)

    def loss(h):
        logp = jax.nn.log_softmax(model.unembed(h).astype(jnp.float32))
        hit = jnp.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]
        return -jnp.sum(hit * share)

    where = {"segments": batch["segments"], "positions": batch["positions"]}
    gradient = grad_sites(loss, model.hidden, batch["tokens"], at=["embed"], **where)[2]["embed"]
    return jnp.linalg.norm(gradient.astype(jnp.float32), axis=-1)


def min_max(x: Float[Array, "B T"], span: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """x moved to [0, 1] over each row's span; as it is where all are equal, 0 outside."""
    low = jnp.min(x, 1, keepdims=True, where=span, initial=jnp.inf)
    high = jnp.max(x, 1, keepdims=True, where=span, initial=-jnp.inf)
    wide = high > low
    scaled = jnp.where(wide, (x - low) / jnp.where(wide, high - low, 1.0), x)
    return jnp.where(span, scaled, 0.0)


def confounder_score(
    teacher: Float[Array, "B T"], student: Float[Array, "B T"], span: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B"]]:
    """Dhat of two scaled sensitivities, and which rows have any difference at all."""
    gap = teacher - student
    low = jnp.min(gap, 1, where=span, initial=jnp.inf)
    high = jnp.max(gap, 1, where=span, initial=-jnp.inf)
    return min_max(gap, span), high > low


def select(
    score: Float[Array, "B T"],
    span: Bool[Array, "B T"],
    rule: Rule,
    tokens: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
    """Where Dhat <= tau in the span, protected ids left out.

    Raises:
        InputError: ids to protect, and no tokens.
    """
    if rule.rule == "quantile":
        tau = jnp.minimum(_quantile(score, span, rule.share), rule.cap)[:, None]
    else:
        tau = min(rule.tau, rule.cap)
    if rule.protect:
        if tokens is None:
            raise InputError(f"protect = {rule.protect}: give tokens=, to find these ids")
        span = span & ~jnp.isin(tokens, jnp.array(rule.protect))
    return span & (score <= tau)


def _quantile(x: Array, span: Array, share: float) -> Array:
    """Of each row's span, linear between ranks, as numpy; for an empty span +inf."""
    ordered = jnp.sort(jnp.where(span, x, jnp.inf), axis=1)
    rank = share * jnp.maximum(span.sum(1) - 1, 0)
    low = jnp.floor(rank).astype(jnp.int32)
    high = jnp.ceil(rank).astype(jnp.int32)
    a, b = (jnp.take_along_axis(ordered, i[:, None], 1)[:, 0] for i in (low, high))
    return jnp.where(high > low, a + (rank - low) * (b - a), a)


def token_plot(found: Confounders, row: int, pieces: Sequence[str], *, title: str = "") -> "Figure":
    """A prompt in three strips: sensitivity of teacher and student, and what confounds.

    Args:
        row: of the batch.
        pieces: text of each token of the row, at least as many as its span reaches.
    """
    from causal_jax.interp.plots import heat_map, plain

    places = np.flatnonzero(np.asarray(found.span[row])).tolist()
    names = [plain(pieces[i]) + ("*" if found.chosen[row, i] else "") for i in places]
    values = np.stack([np.asarray(x)[row, places] for x in _strips(found)])
    strips = ("teacher", "student", "confounding")
    return heat_map(values, x=names, y=strips, title=title, label="scaled", limit=1.0)


def _strips(found: Confounders) -> tuple[Any, Any, Any]:
    return found.teacher, found.student, 1.0 - found.score
