"""LeaF: distil from the text as it is, and from the text without what misleads the student.

    L = lambda L_kd + (1 - lambda) L_cd
    L_kd = (1/|R|) sum_{j in R} KL(p_T(. | x, y_<j) || p_S(. | x, y_<j))
    L_cd = the same with x \\ A_i for both,   A_i a run of confounding tokens

A token is confounding where the student's loss is sensitive to it and the teacher's is not
(`interp.confounders`). Rows without such tokens count as themselves in both terms.

Deviation: the paper searches once, with the student as it was before distillation, and lists all
runs as samples; this objective searches in every batch with the student as it is, and draws one run
per row. The paper's order is in the entry `reproduce leaf`, made of the same functions.

LeaF, arXiv 2506.07851. Nothing here touches attention weights: that attention moves is an effect.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from causal_jax.data.counterfactual import before_answer, pick_run, prune, split_response
from causal_jax.errors import InputError
from causal_jax.interp.confounders import Rule, find
from causal_jax.models.pair import PairModel
from causal_jax.objectives._base import Objective, objectives
from causal_jax.objectives.distil import need_pair, prediction_metrics, prediction_sums
from causal_jax.shapes import Array, Bool


@objectives.register("leaf")
@dataclasses.dataclass(frozen=True)
class Leaf(Objective):
    """Causal attention distillation; the model is a `Pair`.

    Attributes:
        share: lambda, the weight of the rows as they are; 1 is plain distillation.
        rule: which tokens are confounding.
        level: "instruction" prunes the prompt; "response" takes the last of `parts` parts of the
            answer for the answer and prunes all that comes before it.
        parts: into how many an answer is split, "response" only.
        collective: remove all runs at once, not one.
        keep: which pruned rows count: "any", or only those that the "teacher", or "both", answer
            rightly.
        temperature: of the divergence.
        shifted: False weighs positions as the authors' code does, one too late: the first answer
            token's prediction is left out. To compare with its results only.
        logits_mib: most mebibytes of float32 logits to hold at a time.
    """

    share: float = 0.5
    rule: Rule = Rule()
    level: Literal["instruction", "response"] = "instruction"
    parts: int = 2
    collective: bool = False
    keep: Literal["any", "teacher", "both"] = "any"
    temperature: float = 1.0
    shifted: bool = True
    logits_mib: int = 256

    def __post_init__(self):
        if not 0.0 <= self.share <= 1.0:
            raise InputError(f"objective.share must be in [0, 1], got {self.share}")
        for name, known in {
            "level": ("instruction", "response"),
            "keep": ("any", "teacher", "both"),
        }.items():
            if getattr(self, name) not in known:
                raise InputError(f"objective.{name} = {getattr(self, name)!r}: one of {known}")
        if self.parts < 2:
            raise InputError(f"objective.parts must be at least 2, got {self.parts}")
        if not self.temperature > 0:
            raise InputError(f"objective.temperature must be positive, got {self.temperature}")

    def loss(self, model, batch, key):
        pair = need_pair(model, "leaf")
        if self.level == "response":
            batch = _last_part(batch, self.parts)
        own, count = self._sums(pair, batch)
        metrics = prediction_metrics(own, count)
        value = own["divergence"]
        if self.share < 1.0:
            pruned, chosen = self.counterfactual(pair, batch, key)
            other, _ = self._sums(pair, pruned)
            value = self.share * value + (1.0 - self.share) * other["divergence"]
            metrics["divergence, pruned"] = (other["divergence"], count)
            metrics["pruned tokens"] = (chosen.sum(), jnp.asarray(float(len(chosen))))
        return value / jnp.maximum(count, 1.0), metrics

    def counterfactual(
        self, pair: PairModel, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[dict[str, Array], Bool[Array, "B T"]]:
        """The rows without what was found, and what was taken out."""
        rows = {n: batch[n] for n in ("tokens", "targets", "weights", "segments", "positions")}
        span = batch["span"] > 0 if "span" in batch else None
        found = jax.lax.stop_gradient(find(pair.teacher, pair.student, rows, self.rule, span))
        if self.collective:
            chosen = jnp.asarray(found.chosen)
        else:
            chosen = pick_run(jnp.asarray(found.runs), jax.random.key(0) if key is None else key)
        pruned = prune(rows, chosen)
        if self.keep == "any":
            return pruned, chosen
        kept = self._kept(pair, pruned)[:, None]
        pruned = {n: jnp.where(kept, pruned[n], rows[n]) for n in rows}
        return pruned, chosen & kept

    def _kept(self, pair: PairModel, rows: Mapping[str, Array]) -> Bool[Array, "B"]:
        """Which rows are answered rightly, token by token."""
        right = jnp.ones(len(rows["tokens"]), bool)
        for model in (pair.teacher, pair.student)[: 1 + (self.keep == "both")]:
            best = model.unembed(_hidden(model, rows)).argmax(-1)
            right &= jnp.all((best == rows["targets"]) | (rows["weights"] == 0), axis=1)
        return right

    def _sums(self, pair: PairModel, rows: Mapping[str, Array]) -> tuple[dict[str, Array], Array]:
        weights: Any = rows["weights"]
        if not self.shifted:
            weights = jnp.pad(weights[:, :-1], ((0, 0), (1, 0)))
        h_teacher = jax.lax.stop_gradient(_hidden(pair.teacher, rows))
        sums = prediction_sums(
            pair, _hidden(pair.student, rows), h_teacher, rows["targets"], weights,
            mib=self.logits_mib, temperature=self.temperature,
        )  # fmt: skip
        return sums, jnp.sum(weights)


def _last_part(batch: Mapping[str, Array], parts: int) -> dict[str, Array]:
    """The rows with the last part of the answer for the answer, the rest of it in the span."""
    weights = split_response(batch["weights"], parts - 1, parts)
    rows = {**batch, "weights": weights}
    if "span" in batch:
        said = jnp.pad(batch["weights"][:, :-1], ((0, 0), (1, 0))) > 0
        rows["span"] = jnp.where(said & before_answer(rows), 1, batch["span"])
    return rows


def _hidden(model: Any, rows: Mapping[str, Array]) -> Array:
    return model.hidden(rows["tokens"], segments=rows["segments"], positions=rows["positions"])
