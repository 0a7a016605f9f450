"""Out-of-context reasoning: generalisation and hallucination by one mechanism.

Huang et al. 2025, "Generalization or Hallucination? Understanding Out-of-Context Reasoning in
Transformers" (arXiv 2506.10887). A model is shown that some subjects have fact b_i and implication
c_i, and of further subjects the fact alone. Claim: with a value map trained as W_O W_V^T gradient
descent associates the implication with the fact, and answers c_i for subjects never seen with it;
with the same map trained as one matrix W_OV it does not, although both have the same functions. The
reason is the norm that is made small: nuclear in the first case, Frobenius in the second.

    python -m causal_jax.reproduce out_of_context_reasoning          two CPU cores, about 4 minutes
    python -m causal_jax.reproduce out_of_context_reasoning --full   an accelerator, minutes

Expect: factorised, test loss 0.03 and accuracy 1.00 after 2,000 steps; merged, test loss 3.0 = log
20 and accuracy 0.05 at a train loss of 0.006; rank 8 is enough, rank 3 is not, and rank 4, which
should be, misses one group of 20 on two seeds of three (after 20,000 steps too); margin of the test
implications in the program of least nuclear norm min(1, sqrt(train/test)), in that of least
Frobenius norm 0.

The closed form of the nuclear margin is a numerical finding of this project, which implies the
paper's bound train/(train + test). Weight decay on the factors is an explicit penalty of the
nuclear norm: the runs without it are the ones about implicit bias.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from causal_jax import plots
from causal_jax.data.tasks.fact_recall import FactRecall, Kind
from causal_jax.interp.margins import (
    Norm,
    effective_rank,
    least_norm,
    least_norm_convex,
    margins,
    nuclear_norm,
)
from causal_jax.models import one_layer_linear as layer
from causal_jax.papers._base import Evidence, Paper, Report, Row, papers, require
from causal_jax.papers._harness import train
from causal_jax.training.optimizer import AdamW, Schedule
from causal_jax.training.optimizer.sgd import SGD

CONSTANT = Schedule(kind="constant", warmup=0)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: what of the main setting it changes."""

    name: str
    steps: int
    rank: int | None = None
    merged: bool = False
    ones: float = 0.0
    decay: bool = True
    test: int | None = None  # test subjects per group


@papers.register("out_of_context_reasoning")
@dataclasses.dataclass(frozen=True)
class OutOfContextReasoning(Paper):
    """Settings.

    Attributes:
        groups, train, test, noise, length: the task (`FactRecall`).
        batch: rows per step, a third of each kind.
        steps, long_steps: of the main comparison; of that without weight decay and of the ranks.
        ranks: inner widths of the factorised map to try.
        subjects: subjects per group, one of them trained on, to try besides.
        lr, weight_decay, every: of AdamW; steps between two measurements.
        programs: (groups, train, test) of the programs of least norm.
        symmetric_steps: of full-batch gradient descent from a symmetric start.
        oracle: also solve the programs of least norm by a convex solver.
    """

    groups: int = 20
    train: int = 1
    test: int = 3
    noise: int = 5
    length: int = 16
    batch: int = 252
    steps: int = 2000
    long_steps: int = 4000
    ranks: tuple[int, ...] = (3, 4, 8)
    subjects: tuple[int, ...] = (2, 8)
    lr: float = 5e-3
    weight_decay: float = 0.03
    every: int = 100
    programs: tuple[tuple[int, int, int], ...] = (
        (4, 1, 3),
        (6, 1, 3),
        (3, 1, 5),
        (4, 1, 1),
        (4, 2, 2),
        (4, 3, 1),
    )
    symmetric_steps: int = 4000
    oracle: bool = True

    title: ClassVar = (
        "Generalization or Hallucination? Understanding Out-of-Context Reasoning in Transformers"
    )
    arxiv: ClassVar = "2506.10887"
    claims: ClassVar = (
        "a factorised output-value pair answers implications never shown",
        "the merged matrix fits the same training data and does not",
        "a rank of 4 is enough, 3 is unreliable",
        "one training subject per group is enough",
        "the difference is implicit bias: it needs no weight decay",
        "least nuclear norm gives the test implications a margin, least Frobenius norm none",
        "from a symmetric start the merged model never tells the implications apart",
    )
    missing: ClassVar[tuple[str, ...]] = (
        "mean rank of the implication in fine-tuned language models of 7-9B",
    )

    def __post_init__(self):
        super().__post_init__()
        self.need(self.batch % 3 == 0 and self.batch > 0, "batch", "a multiple of 3")
        for name in ("steps", "long_steps"):
            ok = getattr(self, name) > 0 and getattr(self, name) % self.every == 0
            self.need(ok, name, f"a positive multiple of every = {self.every}")
        self.need(min(self.subjects, default=2) >= 2, "subjects", "2 or more each")

    @classmethod
    def full(cls) -> "OutOfContextReasoning":
        return cls(
            long_steps=20000, ranks=(3, 4, 8, 16, 32, 64, 128), subjects=(2, 8, 16), every=200
        )

    @classmethod
    def smoke(cls) -> "OutOfContextReasoning":
        return cls(
            seeds=2,
            groups=3,
            batch=12,
            steps=20,
            long_steps=20,
            every=10,
            ranks=(3,),
            subjects=(),
            programs=((3, 1, 1),),
            symmetric_steps=20,
        )

    def run(self, report: Report) -> Evidence:
        if self.oracle:
            command = "pip install 'causal_jax[papers]' (or --set oracle=False to do without)"
            require("cvxpy", command)
        runs, found = self._runs(), {}
        whole = sum(r.steps for r in runs)
        for i, r in enumerate(runs):
            begin = sum(x.steps for x in runs[:i])
            span = 0.9 * begin / whole, 0.9 * (begin + r.steps) / whole
            found[r.name] = report.stage(r.name, lambda r=r, s=span: self._train(r, report, s))
        with jax.enable_x64(True):  # the statement is exact: rounding would break the symmetry
            spread = report.stage("symmetric", self._symmetric)
        report.progress(0.95, "programs of least norm")
        programs = report.stage("programs", self._programs)
        rows = (*self._training_rows(found), *self._theory_rows(spread, programs))
        plots = self._plots(report, found, programs)
        report.progress(1.0, "done")
        return Evidence(rows, plots, _figures(found, spread, programs))

    def _task(self, test: int | None = None) -> FactRecall:
        return FactRecall(self.groups, self.train, test or self.test, self.noise, self.length)

    def _runs(self) -> list[Run]:
        ones = Run("merged_ones", self.steps, merged=True, ones=1e-4)
        return [
            Run("factorised", self.steps),
            Run("merged", self.steps, merged=True),
            ones,
            Run("factorised_no_decay", self.long_steps, decay=False),
            Run("merged_no_decay", self.long_steps, merged=True, decay=False),
            *(Run(f"rank_{r}", self.long_steps, rank=r) for r in self.ranks),
            *(Run(f"subjects_{s}", self.steps, test=s - 1) for s in self.subjects),
        ]

    def _train(self, run: Run, report: Report, span: tuple[float, float]) -> dict[str, Any]:
        """Records of one run, all seeds; for the main two also what tokens add to the output."""
        task = self._task(run.test)

        def loss(params, key):
            tokens, answers = task.training(key, self.batch)
            return _cross_entropy(_logits(params, tokens, task), answers).mean()

        params, records = train(
            lambda key: layer.init(key, task.vocab, run.rank, merged=run.merged, ones=run.ones),
            loss,
            AdamW(
                lr=self.lr,
                schedule=CONSTANT,
                clip=None,
                weight_decay=self.weight_decay if run.decay else 0.0,
                decays=".",
                b2=0.999,
            ),
            run.steps,
            self.seeds,
            measure=lambda params, key: _measure(params, key, task),
            every=self.every,
            report=report,
            span=span,
            text=run.name,
        )
        kept = run.name in ("factorised", "merged")
        if not kept:
            return records
        # what each token adds to the output: its column of the value map times its score
        values, scores = jax.vmap(layer.output_value)(params), params["kq"][:, :, -1]
        return records | {"tokens": values * scores[:, None]}

    def _symmetric(self) -> dict[str, Any]:
        """The merged model by full-batch gradient descent: how far the logits of all c differ."""
        task = FactRecall(groups=4, train=1, test=3, noise=0, length=3)
        kinds: tuple[Kind, ...] = ("train_fact", "train_implication", "test_fact")
        items = np.concatenate([task.items(kind) for kind in kinds])
        tokens, answers = task.rows(jax.random.key(0), jnp.asarray(items))
        asked, right = task.rows(jax.random.key(0), jnp.asarray(task.items("test_implication")))

        def measure(params, key):
            out = _logits(params, asked, task)
            among = out[:, task.implications]
            spread = (among.max(1) - among.min(1)).max()
            return {"spread": spread, "test_loss": _cross_entropy(out, right).mean()}

        steps = self.symmetric_steps
        _, records = train(
            lambda key: layer.init(key, task.vocab, merged=True, ones=1e-4),
            lambda params, key: _cross_entropy(_logits(params, tokens, task), answers).mean(),
            SGD(lr=0.5, schedule=CONSTANT, clip=None, weight_decay=0.0, momentum=0.0),
            steps,
            1,
            measure=measure,
            every=max(steps // 40, 1),
        )
        return records

    def _programs(self) -> dict[str, Any]:
        """Test margins [programs, solvers] of the maps of least norm."""
        solvers = (least_norm, least_norm_convex) if self.oracle else (least_norm,)
        found: dict[Norm, list] = {"nuclear": [], "frobenius": []}
        for groups, shown, asked in self.programs:
            task = FactRecall(groups, shown, asked, noise=0, length=3)
            kinds: tuple[Kind, ...] = ("train_fact", "train_implication", "test_fact")
            z, answers = map(np.asarray, _items(task, *kinds))
            for norm, margins_of in found.items():
                maps = [f(z, answers, 2 * groups, norm) for f in solvers]
                margins_of.append([float(_margin(jnp.asarray(w), task)) for w in maps])
        return {norm: np.asarray(values) for norm, values in found.items()}

    def _training_rows(self, found: dict[str, dict]) -> tuple[Row, ...]:
        """What was trained, judged at its last step; thresholds are the card's."""
        chance = math.log(self.groups)
        acc = "test-implication accuracy"

        def last(run: str, what: str) -> np.ndarray:
            return found[run][what][:, -1]

        def row(claim, metric, run, what, threshold, better, **rest):
            return Row.of_seeds(claim, metric, last(run, what), threshold, better, **rest)

        rows = []
        for suffix, kind in {"": "", "_no_decay": ", no weight decay"}.items():
            one, other = f"factorised{suffix}", f"merged{suffix}"
            base = float(last(other, "accuracy").mean())
            rows += [
                row(
                    f"factorised associates{kind}", acc, one, "accuracy", 0.99, ">=", baseline=base
                ),
                row(
                    f"factorised associates{kind}",
                    "test-implication loss",
                    one,
                    "test_loss",
                    0.1,
                    "<=",
                    paper="-> 0",
                    baseline=float(last(other, "test_loss").mean()),
                ),
                row(f"merged fits{kind}", "train loss", other, "loss", 0.02, "<="),
                row(
                    f"merged does not associate{kind}",
                    "test-implication loss",
                    other,
                    "test_loss",
                    0.98 * chance,
                    ">=",
                    paper=f"about log {self.groups} = {chance:.2f}",
                ),
                row(f"merged does not associate{kind}", acc, other, "accuracy", 0.15, "<="),
            ]
        claim = "merged does not associate, start 1e-4 everywhere"
        rows.append(row(claim, acc, "merged_ones", "accuracy", 0.15, "<="))
        for rank in self.ranks:
            run = f"rank_{rank}"
            if rank < 4:
                what = f"rank {rank} is unreliable"
                rows.append(row(what, acc, run, "accuracy", 0.9, "<=", paper="fails"))
            else:
                rows.append(row(f"rank {rank} is enough", acc, run, "accuracy", 0.99, ">="))
        for count in self.subjects:
            what = f"one shown of {count} subjects is enough"
            rows.append(row(what, acc, f"subjects_{count}", "accuracy", 0.99, ">="))
        return tuple(rows)

    def _theory_rows(self, spread: dict, programs: dict) -> tuple[Row, ...]:
        """The programs of least norm, and the symmetric start."""
        expected = np.array([min(1.0, math.sqrt(a / b)) for _, a, b in self.programs])[:, None]
        nuclear = np.abs(programs["nuclear"] - expected).max(0)
        frobenius = np.abs(programs["frobenius"]).max(0)
        rows = []
        for i, solver in enumerate(("descent", "convex solver")[: len(nuclear)]):
            metric = (
                f"margin of the test implications, distance from min(1, sqrt(train/test)), {solver}"
            )
            rows.append(
                Row(
                    "least nuclear norm associates",
                    metric,
                    float(nuclear[i]),
                    1e-2,
                    "<=",
                    paper="margin at least train/(train + test)",
                )
            )
            metric = f"margin of the test implications, {solver}"
            rows.append(
                Row("least Frobenius norm does not", metric, float(frobenius[i]), 1e-3, "<=", "0")
            )
        late = spread["spread"][0][spread["step"] >= self.symmetric_steps // 4]
        rows.append(
            Row(
                "merged, symmetric start: implications are never told apart",
                "spread of their logits, full-batch gradient descent, float64",
                float(late.max()),
                1e-5,
                "<=",
                paper="test loss >= log n at all times",
                note="float64, because rounding breaks the symmetry on the way (7e-5 in float32); "
                f"least test loss {spread['test_loss'].min():.4f}, log 4 = {math.log(4):.4f}; "
                f"train loss at the end {spread['loss'][0, -1]:.1e}",
            )
        )
        return tuple(rows)

    def _plots(self, report: Report, found: dict, programs: dict) -> tuple[str, ...]:
        two = ("factorised", "merged")
        chance = {f"log {self.groups}": math.log(self.groups)}
        fig, axes = plots.panels(6, title="Out-of-context reasoning along training")
        steps = found["merged"]["step"]
        shown = {
            "test_loss": ("loss of the test implications", chance),
            "accuracy": ("accuracy on the test implications", None),
            "loss": ("train loss", None),
            "margin": (
                "test margin / least train margin",
                {"nuclear": min(1.0, math.sqrt(self.train / self.test)), "Frobenius": 0.0},
            ),
            "nuclear": ("nuclear norm of the value map", None),
            "effective_rank": ("effective rank of the value map", None),
        }
        for ax, (what, (title, levels)) in zip(axes, shown.items(), strict=True):
            lines = {run: found[run][what] for run in two}
            log = "y" if what in ("loss", "test_loss") else ""
            plots.curves(ax, steps, lines, title=title, xlabel="step", levels=levels, log=log)
        names = [report.figure("training", fig)]
        task = self._task()
        fig, axes = plots.panels(2, width=5.5, title="What subjects add to implications, seed 0")
        begin = task.implications.stop
        for ax, run in zip(axes, two, strict=True):
            block = found[run]["tokens"][0][task.implications, begin : begin + task.subjects]
            plots.heat(ax, block, title=run, xlabel="subject, group by group", ylabel="implication")
        names.append(report.figure("value_map", fig))

        fig, (left, right) = plots.panels(2)
        widths = {f"rank {r}": found[f"rank_{r}"]["accuracy"] for r in self.ranks}
        at = found[f"rank_{self.ranks[0]}"]["step"] if self.ranks else steps
        plots.curves(left, at, widths, title="accuracy by inner width", xlabel="step")
        labels = ["/".join(map(str, p)) for p in self.programs]
        series = {norm: programs[norm][:, 0] for norm in programs}
        series["sqrt(train/test)"] = [min(1.0, math.sqrt(a / b)) for _, a, b in self.programs]
        plots.bars(right, labels, series, title="margins of least norm (groups/train/test)")
        return (*names, report.figure("theory", fig))


def _logits(params, tokens, task: FactRecall):
    return layer.logits(params, jax.nn.one_hot(tokens, task.vocab))


def _cross_entropy(logits, answers):
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers)


def _items(task: FactRecall, *kinds: Kind, scores: Any = None) -> tuple[jax.Array, jax.Array]:
    """What is read of every item, e_s + e_r [M, D] (weighed by `scores` [D]), and its answer [M].

    Answers are counted among facts and implications, from 0.
    """
    items = np.concatenate([task.items(kind) for kind in kinds])
    z = jax.nn.one_hot(items[:, :2], task.vocab).sum(1)
    return z if scores is None else z * scores[None], jnp.asarray(items[:, 2] - task.facts.start)


def _margin(w: jax.Array, task: FactRecall, scores: Any = None) -> jax.Array:
    """Least margin of the test implications against other implications; w [2n, D]."""
    z, answers = _items(task, "test_implication", scores=scores)
    h = margins(w, z, answers)[:, task.groups :]
    other = ~jax.nn.one_hot(answers - task.groups, task.groups, dtype=bool)
    return jnp.where(other, h, jnp.inf).min()


def _measure(params: layer.Params, key: jax.Array, task: FactRecall) -> dict[str, jax.Array]:
    """What is recorded along training."""
    tokens, answers = task.sample(key, "test_implication", 10 * task.groups * task.test)
    out = _logits(params, tokens, task)
    among = out[:, task.implications].argmax(-1) + task.implications.start
    w, scores = layer.output_value(params), params["kq"][:, -1]
    rows = w[task.facts.start : task.implications.stop]
    z, right = _items(task, "train_fact", "train_implication", "test_fact", scores=scores)
    own = jax.nn.one_hot(right, len(rows), dtype=bool)
    train_margin = jnp.where(own, jnp.inf, margins(rows, z, right)).min()
    return {
        "test_loss": _cross_entropy(out, answers).mean(),
        "accuracy": (out.argmax(-1) == answers).mean(),
        "accuracy_among": (among == answers).mean(),
        # before the training set is fitted the ratio says nothing
        "margin": jnp.where(train_margin > 0, _margin(rows, task, scores) / train_margin, jnp.nan),
        "nuclear": nuclear_norm(w),
        "frobenius": jnp.linalg.norm(w),
        "effective_rank": effective_rank(w),
    }


def _figures(found: dict, spread: dict, programs: dict) -> dict[str, Any]:
    """The last records of every run, per seed."""
    names = ("loss", "test_loss", "accuracy", "accuracy_among", "margin", "nuclear", "frobenius")
    return {
        "final": {run: {k: f[k][:, -1] for k in names} for run, f in found.items()},
        "program_margins": programs,
        "symmetric_start": {k: spread[k][0, -1] for k in ("loss", "test_loss", "spread")},
    }
