"""LeaF: find what misleads the student, take it out, distil on both.

"Learning to Focus: Causal Attention Distillation via Gradient-Guided Token Pruning" (arXiv
2506.07851). Claim: tokens that the student's loss is sensitive to and the teacher's is not are
confounders; distilling also on prompts without them makes a better student than distilling alone.

    python -m causal_jax.reproduce leaf
    python -m causal_jax.reproduce leaf --full               longer prompts, larger models

Here: sums of two tagged digits with a hint that is mostly the answer (`data.tasks.hinted_sum`). The
teacher has seen hints that say nothing, and prompts without them; the student has learned to copy
the hint. The confounders are known, and arms differ only in what is deleted: nothing (KD), what the
gradients find (LeaF), as many random tokens. As in the paper the search is made once, with the
student as it was; there is one counterfactual per run of tokens.

Expect (300 s of processor time): without the hint LeaF answers 0.89, KD 0.51, random deletion 0.83;
with a random hint 0.37, 0.29, 0.35. What does not hold: ten of sixteen tokens are filler, to which
nobody is sensitive, so the student's gradient alone ranks the hint above them (AUC 0.88), and the
difference, in which filler lies in the middle, does so less (0.57). Pruning needs the lowest only:
in 44 % of the prompts that is a token of the hint (by chance, 12 %).
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from causal_jax import plots
from causal_jax.data.counterfactual import pick_run, prune
from causal_jax.data.tasks.hinted_sum import HintedSum
from causal_jax.interp.confounders import (
    Confounders,
    Rule,
    find,
    min_max,
    sensitivity,
    token_plot,
)
from causal_jax.models.decoder import Decoder
from causal_jax.objectives.distil import divergence
from causal_jax.papers._base import Evidence, Paper, Report, Row, papers
from causal_jax.papers._harness import train
from causal_jax.taps import run
from causal_jax.training.optimizer import AdamW, Schedule

ARMS = ("KD", "LeaF", "random")
FIELDS = ("tokens", "targets", "weights", "segments", "positions")


@papers.register("leaf")
@dataclasses.dataclass(frozen=True)
class LeaF(Paper):
    """Settings.

    Attributes:
        length: tokens of a prompt.
        width, layers, heads: of teacher and student.
        teacher_steps, student_steps, lr: their training; AdamW.
        rho: how often the hint is right in the distillation corpora, one experiment each.
        corpus: prompts to distil on.
        steps, distil_lr, batch: of the distillation.
        share: lambda.
        quantile: share of a prompt's tokens that are taken for confounding.
        items: test prompts.
    """

    length: int = 17
    width: int = 64
    layers: int = 2
    heads: int = 4
    teacher_steps: int = 1200
    student_steps: int = 300
    lr: float = 4e-3
    rho: tuple[float, ...] = (0.98,)
    corpus: int = 400
    steps: int = 300
    distil_lr: float = 5e-4
    batch: int = 64
    share: float = 0.5
    quantile: float = 0.2
    items: int = 1000

    title: ClassVar = (
        "Learning to Focus: Causal Attention Distillation via Gradient-Guided Token Pruning"
    )
    arxiv: ClassVar = "2506.07851"
    claims: ClassVar = (
        "the difference of teacher's and student's gradients finds the confounders",
        "distilling on counterfactual prompts too makes the student independent of them",
        "random deletion of as many tokens does less",
        "attention to the confounders falls",
    )
    missing: ClassVar[tuple[str, ...]] = (
        "LLaMA and Qwen students on mathematics, code and multi-hop questions",
        "response-level pruning measured (the objective has it)",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("teacher_steps", "student_steps", "steps", "corpus", "batch", "items"):
            self.need(getattr(self, name) >= 1, name, "at least 1")
        self.need(0 < self.share < 1, "share", "between 0 and 1")
        self.need(0 < self.quantile < 1, "quantile", "between 0 and 1")
        self.need(all(0 <= r <= 1 for r in self.rho), "rho", "probabilities")

    @classmethod
    def full(cls) -> "LeaF":
        return cls(
            length=65, width=256, layers=4, rho=(0.98, 0.9), teacher_steps=20_000,
            student_steps=2000, lr=5e-4,
            corpus=20_000, steps=3000, quantile=0.05, items=5000,
        )  # fmt: skip

    @classmethod
    def smoke(cls) -> "LeaF":
        return cls(
            seeds=1, length=9, width=16, heads=2, layers=1, teacher_steps=2, student_steps=2,
            rho=(0.9,), corpus=8, steps=2, batch=4, items=8,
        )  # fmt: skip

    def run(self, report: Report) -> Evidence:
        work = _Work(self, report)
        pair = report.stage("pair", work.pair)
        found = report.stage("search", lambda: work.search(pair))
        measured = report.stage("distil", lambda: work.distil(pair, found))
        report.progress(1.0, "done")
        plot = work.plots(found, measured)
        figures = {
            "accuracy by arm, corpus, seed: decorrelated, hint absent, as trained": {
                arm: measured["accuracy"][i] for i, arm in enumerate(ARMS)
            },
            "before distillation: teacher, student": measured["before"],
            "attention to the hint": dict(zip(ARMS, measured["attention"])),
            "sensitivity to the hint": dict(zip(ARMS, measured["sensitivity"])),
            "AUC: difference, student alone": found["auc"],
            "lowest Dhat is the hint's": found["first"],
            "runs per prompt": found["count"],
        }
        return Evidence(_rows(self, found, measured), plot, figures)


class _Work:
    """The stages, each for all seeds at once."""

    def __init__(self, settings: LeaF, report: Report):
        self.s, self.report = settings, report
        self.task = HintedSum(length=settings.length)
        self.spec = Decoder(
            vocab=self.task.vocab, layers=settings.layers, width=settings.width,
            heads=settings.heads, activation="gelu", context=settings.length + 1, tied=False,
        )  # fmt: skip
        self.graph, shapes = nnx.split(nnx.eval_shape(lambda: self.spec.build(jax.random.key(0))))
        self.tree = jax.tree.structure(shapes)

    def rows(self, rho: float, count: int, stream: int, absent: float = 0.0) -> dict[str, Any]:
        task = dataclasses.replace(self.task, rho=rho, absent=absent)
        return {k: jnp.asarray(v) for k, v in task.batch(stream, range(count)).items()}

    def model(self, params: Any) -> Any:
        return nnx.merge(self.graph, params)

    def params(self, arrays: dict, name: str) -> Any:
        """The parameters of a stage, stacked over seeds."""
        leaves = [arrays[f"{name}/{i}"] for i in range(self.tree.num_leaves)]
        return jax.tree.unflatten(self.tree, [jnp.asarray(x) for x in leaves])

    def pair(self) -> dict[str, Any]:
        """Teacher and student before distillation."""
        s, out = self.s, {}
        for name, rho, absent, steps, span in (
            ("teacher", 0.1, 0.5, s.teacher_steps, (0.0, 0.35)),
            ("student", 0.97, 0.0, s.student_steps, (0.35, 0.45)),
        ):
            pool = self.rows(rho, 64 * s.corpus, 1 if name == "teacher" else 2, absent)

            def loss(params, key, pool):
                which = jax.random.randint(key, (s.batch,), 0, len(pool["tokens"]))
                rows = {k: pool[k][which] for k in FIELDS}
                logits = self.at_answer(params, rows)[0]
                right = self.answer(rows)
                return optax.softmax_cross_entropy_with_integer_labels(logits, right).mean()

            params, records = train(
                lambda key: nnx.split(self.spec.build(key))[1],
                loss,
                AdamW(lr=s.lr, schedule=Schedule(warmup=min(50, steps), final=0.0)),
                steps,
                s.seeds,
                given=lambda key, seed, pool=pool: pool,
                report=self.report,
                span=span,
                text=name,
            )
            out |= {f"{name}/{i}": x for i, x in enumerate(jax.tree.leaves(params))}
            out[f"{name} loss"] = records["loss"][:, -1]
        return out

    def at_answer(self, params: Any, rows: Any, capture: Any = ()) -> tuple[Any, Any]:
        """Logits [B, V] where the answer is predicted, and what was captured."""
        where = {"segments": rows["segments"], "positions": rows["positions"]}
        model = self.model(params)
        h, acts = run(model.hidden, rows["tokens"], capture=capture, **where)
        at = rows["weights"].argmax(1)
        return model.unembed(jnp.take_along_axis(h, at[:, None, None], 1)[:, 0]), acts

    def answer(self, rows: Any) -> Any:
        at = rows["weights"].argmax(1)
        return jnp.take_along_axis(rows["targets"], at[:, None], 1)[:, 0]

    def search(self, pair: dict) -> dict[str, Any]:
        """Confounders of every corpus and seed, and how good the search was."""
        teacher, student = (self.params(pair, n) for n in ("teacher", "student"))
        rule = Rule(share=self.s.quantile)

        @jax.jit
        def one(teacher, student, rows):
            batch = {k: rows[k] for k in FIELDS}
            return find(self.model(teacher), self.model(student), batch, rule, rows["span"] > 0)

        found: list[dict[str, Any]] = []
        for rho in self.s.rho:
            for seed in range(self.s.seeds):
                rows = self.rows(rho, self.s.corpus, 10 + seed)
                t, st = (jax.tree.map(lambda x, s=seed: x[s], p) for p in (teacher, student))
                seen = one(t, st, rows)
                found.append(_judged(seen, rows) | {"chosen": seen.chosen, "runs": seen.runs})
                if len(found) == 1:
                    first = {n: getattr(seen, n)[:4] for n in ("span", "teacher", "student")}
                    first |= {"score": seen.score[:4], "tokens": rows["tokens"][:4]}
        shape = (len(self.s.rho), self.s.seeds)
        out = {k: np.stack([f[k] for f in found]) for k in found[0]}
        out = {k: v.reshape(*shape, *v.shape[1:]) for k, v in out.items()}
        return out | {f"shown {k}": v for k, v in first.items()}

    def distil(self, pair: dict, found: dict) -> dict[str, Any]:
        """All arms, corpora and seeds as one training of many students."""
        s, shape = self.s, (len(ARMS), len(self.s.rho), self.s.seeds)
        teacher, student = (self.params(pair, n) for n in ("teacher", "student"))
        runs = np.stack([np.zeros_like(found["runs"]), found["runs"], self._random(found)])
        rows = [[self.rows(rho, s.corpus, 10 + seed) for seed in range(s.seeds)] for rho in s.rho]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *[r for line in rows for r in line])
        flat_runs = jnp.asarray(runs.reshape(-1, *runs.shape[3:]))

        def given(key, number):
            _, corpus, seed = jnp.unravel_index(number, shape)
            at = corpus * s.seeds + seed
            return {
                "rows": jax.tree.map(lambda x: x[at], stacked),
                "runs": flat_runs[number],
                "share": jnp.where(number < shape[1] * shape[2], 1.0, s.share),
                "teacher": jax.tree.map(lambda x: x[seed], teacher),
                "student": jax.tree.map(lambda x: x[seed], student),
            }

        def loss(moved, key, fixed):
            keys = jax.random.split(key)
            which = jax.random.randint(keys[0], (s.batch,), 0, s.corpus)
            rows = {k: fixed["rows"][k][which] for k in FIELDS}
            pruned = prune(rows, pick_run(fixed["runs"][which], keys[1]))
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, pruned)
            params = jax.tree.map(jnp.add, fixed["student"], moved)
            said = self.at_answer(params, both)[0]
            taught = jax.lax.stop_gradient(self.at_answer(fixed["teacher"], both)[0])
            each = divergence(said, taught)
            return (
                fixed["share"] * each[: s.batch].mean()
                + (1.0 - fixed["share"]) * each[s.batch :].mean()
            )

        moved, _ = train(
            # what is trained is the way from the student as it was
            lambda key: jax.tree.map(lambda x: jnp.zeros_like(x[0]), student),
            loss,
            AdamW(
                lr=s.distil_lr,
                schedule=Schedule(warmup=min(5, s.steps), final=0.0),
                weight_decay=0.0,
            ),
            s.steps,
            int(np.prod(shape)),
            given=given,
            report=self.report,
            span=(0.5, 0.95),
            text="distillation",
        )
        seeds = jnp.asarray(np.tile(np.arange(s.seeds), len(ARMS) * len(s.rho)))
        final = jax.tree.map(lambda p, m: p[seeds] + m, student, moved)
        out = {k: v.reshape(*shape, *v.shape[1:]) for k, v in self._tested(final).items()}
        before = [self._tested(p)["accuracy"] for p in (teacher, student)]
        return out | {"before": np.stack(before)}

    def _random(self, found: dict) -> np.ndarray:
        """Runs for the control: every run has as many tokens, put at random places of the span."""
        rng = np.random.default_rng(0)
        runs = np.array(found["runs"])
        flat = runs.reshape(-1, runs.shape[-1])
        for row in flat:
            sizes = [int((row == i).sum()) for i in range(1, row.max() + 1)]
            places = rng.permutation(self.s.length - 1)
            row[:] = 0
            for number, size in enumerate(sizes, 1):
                row[places[:size]], places = number, places[size:]
        return flat.reshape(runs.shape)

    def _tested(self, params: Any) -> dict[str, np.ndarray]:
        """Accuracies [models, 3] on the three tests; attention and sensitivity to the hint."""
        tests = [
            self.rows(0.1, self.s.items, 100),
            self.rows(0.1, self.s.items, 101, 1.0),
            self.rows(0.97, self.s.items, 102),
        ]

        @jax.jit
        def one(params):
            right = []
            for rows in tests:
                logits, acts = self.at_answer(params, rows, {"attn.pattern": None})
                right.append((logits.argmax(-1) == self.answer(rows)).mean())
                if len(right) == 1:
                    at = rows["weights"].argmax(1)[None, :, None, None, None]
                    seen = jnp.take_along_axis(acts["attn.pattern"], at, 3)[:, :, :, 0]
                    mass = (seen * rows["hint"][None, :, None]).sum(-1).mean()
            rows = tests[0]
            batch = {k: rows[k] for k in FIELDS}
            g = min_max(sensitivity(self.model(params), batch), rows["span"] > 0)
            feels = (g * rows["hint"]).sum() / rows["hint"].sum()
            return {"accuracy": jnp.stack(right), "attention": mass, "sensitivity": feels}

        return jax.tree.map(np.asarray, jax.lax.map(one, params))

    def plots(self, found: dict, measured: dict) -> tuple[str, ...]:
        fig, axes = plots.panels(3)
        tests = ("decorrelated", "hint absent", "hint as trained")
        for ax, rho, accuracy in zip(axes, self.s.rho, measured["accuracy"].swapaxes(0, 1)):
            plots.bars(
                ax, tests, dict(zip(ARMS, accuracy)), ylabel="accuracy",
                title=f"hint right in {100 * rho:.0f} % of the corpus",
            )  # fmt: skip
        auc = found["auc"].reshape(-1, 2)
        plots.bars(
            axes[2], ["AUC of the hint"], {"difference": auc[:, :1], "student alone": auc[:, 1:]},
            title="who finds the confounder", levels={"chance": 0.5},
        )  # fmt: skip
        shown = {n: found[f"shown {n}"] for n in ("span", "teacher", "student", "score")}
        chosen = shown["span"] & (found["runs"][0, 0][:4] > 0)
        one = Confounders(**shown, chosen=chosen, runs=found["runs"][0, 0][:4])
        words = [".", "=", "A", "B", "C", *map(str, range(10)), *"abcdefghijklmnop"]
        pieces = [words[i] for i in found["shown tokens"][0]]
        strip = token_plot(one, 0, pieces, title="a prompt; * is taken out")
        return self.report.figure("leaf", fig), self.report.figure("leaf_prompt", strip)


def _judged(found: Confounders, rows: dict) -> dict[str, Any]:
    """AUC of the hint's tokens by Dhat and by the student alone; is the lowest the hint's?"""
    span, hint = np.asarray(found.span), np.asarray(rows["hint"]) > 0
    score, student = np.asarray(found.score), np.asarray(found.student)
    lowest = np.where(span, score, np.inf).argmin(1)
    return {
        # each prompt is scaled for itself, and chosen from for itself
        "auc": np.array(
            [
                np.nanmean([_auc(x[i][span[i]], hint[i][span[i]]) for i in range(len(x))])
                for x in (-score, student)
            ]
        ),
        "auc pooled": np.array([_auc(-score[span], hint[span]), _auc(student[span], hint[span])]),
        "first": hint[np.arange(len(hint)), lowest].mean(),
        "count": np.asarray(found.runs).max(1).mean(),
    }


def _auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    p = int(positive.sum())
    n = len(score) - p
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n)) if p and n else float("nan")


def _rows(settings: LeaF, found: dict, measured: dict) -> tuple[Row, ...]:
    out = []
    kd, leaf, random = measured["accuracy"]  # [rho, seeds, tests]
    for i, rho in enumerate(settings.rho):
        where = f"hint right in {rho:g} of the corpus"
        auc = found["auc"][i]
        gain, lead = leaf[i] - kd[i], leaf[i] - random[i]
        of = functools.partial(Row.of_seeds, by="mean", note=where)
        out += [
            of(
                "the difference of sensitivities finds the confounder",
                "AUC of Dhat for the hint's tokens", auc[:, 0], 0.7,
                baseline=float(auc[:, 1].mean()), paper="beats random and perplexity",
            ),
            of(
                "the teacher adds signal", "AUC of Dhat minus that of the student's gradient",
                auc[:, 0] - auc[:, 1], 0.0,
            ),
            of(
                "LeaF frees the student of an absent confounder",
                "accuracy without hint, LeaF minus KD", gain[:, 1], 0.3,
                baseline=float(kd[i, :, 1].mean()), paper="+2.4 % (math), +2.5 % (code)",
            ),
            of(
                "LeaF helps where the confounder misleads",
                "accuracy with a random hint, LeaF minus KD", gain[:, 0], 0.03,
                baseline=float(kd[i, :, 0].mean()),
            ),
            of(
                "better than random deletion, hint absent", "accuracy, LeaF minus random",
                lead[:, 1], 0.0, baseline=float(random[i, :, 1].mean()),
            ),
            of(
                "better than random deletion, random hint", "accuracy, LeaF minus random",
                lead[:, 0], 0.0, baseline=float(random[i, :, 0].mean()),
            ),
            *(
                of(
                    f"{name} to the confounder falls",
                    f"{name} to the hint's tokens, LeaF minus KD",
                    measured[name][1, i] - measured[name][0, i], 0.0, "<=",
                    baseline=float(measured[name][0, i].mean()),
                )
                for name in ("attention", "sensitivity")
            ),
        ]  # fmt: skip
    return tuple(out)
