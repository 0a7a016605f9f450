"""The mechanistic basis of data dependence and abrupt learning (arXiv 2312.03002).

    python -m causal_jax.reproduce abrupt_icl           # two CPU cores, about 4 minutes
    python -m causal_jax.reproduce abrupt_icl --full    # one GPU, hours

Two attention layers learn to name an item by the label that stands beside its like in the context.
Claimed: accuracy waits at 1/N, a guess among the N labels of the context, and then jumps, when an
induction head forms in both layers together; many classes, bursty rows and within-class noise
favour the context, few classes the weights, Zipf's law both; an induction head of three or two
numbers does the same; three nested logits explain why, and why nothing moves where all labels are
in the context (L = N).

To expect: at D = 47, N = 8, L = 32 the jump comes between step 600 and 1000; K = 64 classes are
learned by heart, K = 4096 in context; at K = 512 bursts of 4 or noise of 1 turn the head from the
weights to the context. Thresholds are the card's; those of the dials, for which it has none, were
fixed after three other seeds.

Deviation from the paper: D = 47 instead of 63, as many positions as the row needs, Adam at 1e-3
instead of gradient descent at 0.01 over 1.5e5 steps. Adam shortens the slow phase.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax import plots
from causal_jax.data.tasks.item_labels import ItemLabels
from causal_jax.models._base import ModelSpec
from causal_jax.models.attention_only import AttentionOnly, progress
from causal_jax.models.induction_head import InductionHead, descend
from causal_jax.papers._base import Evidence, Paper, Report, Row, papers
from causal_jax.papers._harness import train
from causal_jax.training.optimizer import SGD, AdamW, Optimizer, Schedule
from causal_jax.training.state import graph_of

Stage = dict[str, np.ndarray]
SPLITS = ("context", "weights", "swapped")


@papers.register("abrupt_icl")
@dataclasses.dataclass(frozen=True)
class AbruptICL(Paper):
    """Settings.

    Attributes:
        dim, pairs, labels, noise: the rows: D, N, L and eps.
        steps: of the network on fresh classes and on `few` and `many` classes.
        few, many: numbers of classes, K, learned by heart and in context.
        equal_steps: of the network where L = N.
        head_steps: of the induction head in three and in two numbers.
        cell_steps: of each cell of the diagrams, which the induction head in three numbers fills.
        grid: numbers of classes in the diagrams.
        bursts: values of B in the diagram; 0 among them.
        noises: within-class noise in the diagram.
        flow: steps of gradient descent on the nested logits.
        batch, lr: of every training.
        sgd: plain gradient descent instead of Adam.
        tests: rows of every test.
        every: steps between two records; divides 250 and every number of steps.
    """

    dim: int = 47
    pairs: int = 8
    labels: int = 32
    noise: float = 0.1
    steps: int = 1500
    few: int = 64
    many: int = 4096
    equal_steps: int = 3000
    head_steps: int = 2000
    cell_steps: int = 1500
    grid: tuple[int, ...] = (64, 512, 4096)
    bursts: tuple[int, ...] = (0, 1, 4)
    noises: tuple[float, ...] = (0.1, 1.0)
    flow: int = 10000
    batch: int = 128
    lr: float = 1e-3
    sgd: bool = False
    tests: int = 512
    every: int = 50

    title: ClassVar = (
        "The mechanistic basis of data dependence and abrupt learning in an in-context "
        "classification task"
    )
    arxiv: ClassVar = "2312.03002"
    claims: ClassVar = (
        "in-context accuracy jumps after a slow phase at 1/N",
        "the jump is the formation of an induction head in both layers",
        "few classes are learned in the weights, many in context",
        "with as many labels as pairs (L = N) no induction head forms",
        "an induction head of three or two numbers behaves the same",
        "nested logits: with L > N learning starts by itself, with L = N it waits at a saddle",
        "burstiness and within-class noise favour the context over the weights",
        "Zipf's law supports both",
    )

    def __post_init__(self):
        super().__post_init__()
        self.need(250 % self.every == 0, "every", "a divisor of 250")
        for name in ("steps", "equal_steps", "head_steps", "cell_steps"):
            self.need(getattr(self, name) % self.every == 0, name, f"a multiple of {self.every}")
        self.need(0 in self.bursts and 1 in self.bursts, "bursts", "0 and 1 among them")

    @classmethod
    def full(cls) -> "AbruptICL":
        """The paper's sizes and optimizer."""
        return cls(
            seeds=6, dim=63, steps=150_000, equal_steps=150_000, head_steps=20_000,
            cell_steps=20_000, grid=tuple(2**n for n in range(6, 15)), bursts=(0, 1, 2, 4),
            noises=(0.1, 0.3, 1.0), lr=0.01, sgd=True, every=250,
        )  # fmt: skip

    @classmethod
    def smoke(cls) -> "AbruptICL":
        """A few steps."""
        return cls(
            seeds=2, dim=8, steps=10, equal_steps=10, head_steps=10, cell_steps=10, grid=(32, 64),
            many=128, bursts=(0, 1), noises=(0.1, 1.0), flow=100, batch=8, tests=16, every=5,
        )  # fmt: skip

    @property
    def task(self) -> ItemLabels:
        """Bursty rows, each class once."""
        return ItemLabels(
            classes=self.few, labels=self.labels, dim=self.dim, pairs=self.pairs, noise=self.noise
        )

    @property
    def optimizer(self) -> Optimizer:
        """Constant learning rate; the paper's decay, 1e-6 a step on everything, with `sgd`."""
        constant = Schedule("constant", 0)
        if not self.sgd:
            return AdamW(lr=self.lr, b2=0.999, clip=None, weight_decay=0.0, schedule=constant)
        return SGD(
            lr=self.lr, momentum=0.0, clip=None, weight_decay=1e-6 / self.lr, decays=".",
            schedule=constant,
        )  # fmt: skip

    def run(self, report: Report) -> Evidence:
        """See `Paper.run`."""
        jobs, done, out = self._jobs(), 0.0, {}
        total = sum(job.cost() for job in jobs.values())
        for name, job in jobs.items():
            end = done + job.cost()
            span = (done / total, end / total)
            stage = report.stage(name, functools.partial(self._train, name, job, report, span))
            done = end
            for i, member in enumerate(job.tasks):
                lanes = slice(i * job.seeds, (i + 1) * job.seeds)
                records = {n: v[lanes] for n, v in stage.items() if n != "step"}
                out[member] = records | {"step": stage["step"]}
        flow = {n: self._flow(*n) for n in ((8, 32), (8, 16), (4, 32), (8, 8))}
        rows = (
            self._abrupt(out["fresh"]) + self._classes(out) + self._head(out) + self._logits(flow)
            + self._dials(out)
        )  # fmt: skip
        pictures = draw(self, out, flow)
        names = tuple(report.figure(name, figure) for name, figure in pictures.items())
        return Evidence(rows, names, self._figures(out, flow))

    def _jobs(self) -> dict[str, "Job"]:
        """Everything that is trained; what differs in numbers of classes or in noise is one job."""
        change = dataclasses.replace
        fresh = change(self.task, fresh=1.0, classes=self.labels)
        equal = change(fresh, labels=self.pairs, classes=self.pairs)
        ks = {n: change(self.task, classes=n) for n in (self.few, self.many, *self.grid)}
        known = {"few": ks[self.few], "many": ks[self.many]}
        jobs = {
            "fresh classes": Job("network", {"fresh": fresh}, self.steps, self.seeds),
            "known classes": Job("network", known, self.steps, self.seeds),
            "L = N": Job("network", {"equal": equal}, self.equal_steps, self.seeds),
            "three numbers": Job("three", {"three": fresh}, self.head_steps, self.seeds),
            "two numbers": Job("two", {"two": fresh}, self.head_steps, self.seeds),
        }
        for b in self.bursts:
            cells = {f"K={k} B={b}": change(ks[k], burst=b) for k in self.grid}
            if b == 1:
                cells |= {
                    f"K={k} eps={e}": change(ks[k], noise=e) for k in self.grid for e in self.noises
                }
                cells["zipf"] = change(ks[self.many], zipf=1.0)
            jobs[f"cells of B={b}"] = Job("three", cells, self.cell_steps, 1)
        return jobs

    def _train(self, name: str, job: "Job", report: Report, span) -> Stage:
        """Records of all members of a job, [members x seeds, records]."""
        task, tasks = next(iter(job.tasks.values())), job.tasks.values()
        room, kind = max(t.classes for t in tasks), job.kind
        ends = jnp.asarray(np.stack([t.frequencies(room) for t in tasks]), jnp.float32)
        noise = jnp.asarray([t.noise for t in tasks], jnp.float32)
        if kind == "network":
            spec: ModelSpec = AttentionOnly(vocab=task.labels, width=task.width, std=task.dim**-0.5)
        else:
            spec = InductionHead(vocab=task.labels, dim=task.dim, labelled=kind == "three")
        graph = graph_of(spec)

        def read(rows) -> jax.Array:
            return rows.tokens if kind == "network" else rows.tokens[..., task.positions :]

        def loss(params, key, known):
            rows = task.sample(known, key, self.batch)
            logp = jax.nn.log_softmax(nnx.merge(graph, params)(read(rows)))
            return -jnp.take_along_axis(logp, rows.label[:, None], axis=1).mean()

        def measure(params, key, known):
            model = nnx.merge(graph, params)
            rows = task.tests(known, key, self.tests)
            found = {n: (model(read(r)).argmax(-1) == r.label).mean() for n, r in rows.items()}
            if kind == "network":
                seen = progress(model, *rows["context"])
                found |= {n: seen[n] for n in ("ila1", "tla2", "tila2", "cla")}
            if kind != "network":
                found |= {n: getattr(model, n)[...] for n in ("beta1", "alpha")}
            return found

        def given(key, seed):
            member = seed // job.seeds
            known = dataclasses.replace(task, classes=room).prototypes(key)
            return known._replace(ends=ends[member], noise=noise[member])

        return train(
            lambda key: nnx.split(spec.build(key))[1], loss, self.optimizer, job.steps,
            job.seeds * len(job.tasks), given=given, measure=measure, every=self.every,
            report=report, span=span, text=name,
        )[1]  # fmt: skip

    def _flow(self, pairs: int, labels: int) -> dict[str, np.ndarray]:
        """Gradient descent on the nested logits: losses, and steps until 0.05."""
        start = jnp.full((3,), 0.01)
        run = jax.jit(
            lambda t: descend(t, 0.05, self.flow, pairs=pairs, labels=labels, rivals=float(pairs))
        )
        theta, loss = map(np.asarray, run(start))
        below = np.flatnonzero(loss <= 0.05)
        time = below[0] if len(below) else np.inf
        return {"loss": loss, "theta": theta, "time": np.asarray(time, float)}

    def _abrupt(self, fresh: Stage) -> tuple[Row, ...]:
        ic, window = fresh["context"], min(250 // self.every, fresh["context"].shape[1] - 1)
        rise = ic[:, window:] - ic[:, :-window]
        start = rise.argmax(-1)
        at = lambda name, i: np.take_along_axis(fresh[name], i[:, None], 1)[:, 0]  # noqa: E731
        jump, head = self.claims[:2]
        when = f"jumps begin at steps {(start * self.every).tolist()}"
        return (
            Row.of_seeds(jump, f"accuracy in context at step {self.steps}", ic[:, -1], 0.95, ">=",
                         baseline=1 / self.pairs, note="fresh classes; baseline: 1/N"),
            Row.of_seeds(jump, "largest rise of it in 250 steps", rise.max(-1), 0.5, ">=",
                         note=when),
            Row.of_seeds(jump, "accuracy before the jump", at("context", start), 0.25, "<=",
                         baseline=1 / self.pairs, note="baseline: 1/N"),
            Row.of_seeds(jump, "probability of the labels in the context before it",
                         at("cla", start), 0.45, ">=", baseline=self.pairs / self.labels,
                         note="baseline: N/L"),
            Row.of_seeds(head, "first layer: label to its item, after the jump",
                         at("ila1", start + window), 0.7, ">=",
                         baseline=float(fresh["ila1"][:, 0].mean()), note="baseline: step 0"),
            Row.of_seeds(head, "second layer: target to the right label, after it",
                         at("tila2", start + window), 0.6, ">=",
                         baseline=float(fresh["tila2"][:, 0].mean()), note="baseline: step 0"),
        )  # fmt: skip

    def _classes(self, out) -> tuple[Row, ...]:
        few, many, equal = (out[n] for n in ("few", "many", "equal"))
        claim, k, more = self.claims[2], f"K = {self.few}", f"K = {self.many}"
        by_heart, in_context = "accuracy from the weights", "accuracy in context"
        return (
            Row.of_seeds(claim, f"{k}: {by_heart}", few["weights"][:, -1], 0.98, ">="),
            Row.of_seeds(claim, f"{k}: {in_context}", few["context"][:, -1], 0.1, "<="),
            Row.of_seeds(claim, f"{more}: {in_context}", many["context"][:, -1], 0.9, ">="),
            Row.of_seeds(claim, f"{more}: {by_heart}", many["weights"][:, -1], 0.2, "<="),
            Row.of_seeds(self.claims[3], f"L = N: accuracy in context at step {self.equal_steps}",
                         equal["context"][:, -1], 0.2, "<=", by="median",
                         baseline=1 / self.pairs, note="two of three seeds; baseline: 1/N"),
        )  # fmt: skip

    def _head(self, out) -> tuple[Row, ...]:
        claim, k = self.claims[4], (self.grid[0], self.grid[-1])
        few, many = (out[f"K={n} B=1"] for n in k)
        return (
            *(Row.of_seeds(claim, f"{n} numbers: accuracy in context at step {self.head_steps}",
                           out[n]["context"][:, -1], 0.95, ">=", note="fresh classes")
              for n in ("three", "two")),
            Row.of_seeds(claim, f"K = {k[0]}: accuracy in context", few["context"][:, -1], 0.1,
                         "<=", note="thresholds of the network"),
            Row.of_seeds(claim, f"K = {k[1]}: accuracy in context", many["context"][:, -1], 0.9,
                         ">=", note="thresholds of the network"),
        )  # fmt: skip

    def _logits(self, flow) -> tuple[Row, ...]:
        equal, more = (float(flow[n]["time"]) for n in ((8, 8), (8, 32)))
        ratio = equal / more if np.isfinite(more) else np.nan
        return (
            Row(self.claims[5], "steps to loss 0.05, (N, L) = (8, 8) / (8, 32)",
                ratio, 4.0, ">=", note=f"{equal:.0f} and {more:.0f} steps"),
        )  # fmt: skip

    def _dials(self, out) -> tuple[Row, ...]:
        at = lambda name, split: out[name][split][:, -1]  # noqa: E731
        most, middle = self.grid[-1], self.grid[len(self.grid) // 2]
        noisy, clean = (f"K={middle} eps={e}" for e in (self.noises[-1], self.noises[0]))
        plain = at(f"K={most} B=1", "weights")
        claim, head = self.claims[6], "induction head of three numbers, one seed"
        return (
            Row.of_seeds(claim, f"K = {most}: accuracy in context, B = 1 - B = 0",
                         at(f"K={most} B=1", "context") - at(f"K={most} B=0", "context"), 0.5,
                         note=head),
            Row.of_seeds(claim, f"K = {middle}: accuracy in context, noise {self.noises[-1]} - "
                         f"{self.noises[0]}", at(noisy, "context") - at(clean, "context"), 0.3,
                         note=f"{head}; three other seeds gave 0.59 to 0.65"),
            Row.of_seeds(self.claims[7], f"K = {self.many}, alpha = 1: accuracy in context",
                         at("zipf", "context"), 0.9, note=head),
            Row.of_seeds(self.claims[7], "its accuracy from the weights / that of alpha = 0",
                         at("zipf", "weights") / np.maximum(plain, 1 / self.tests), 2.0,
                         note=f"{head}; three other seeds gave 4 to 8"),
        )  # fmt: skip

    def _figures(self, out, flow) -> dict[str, Any]:
        return {
            "final": {
                name: {s: stage[s][:, -1].tolist() for s in SPLITS} for name, stage in out.items()
            },
            "steps to loss 0.05": {f"N={n} L={l}": float(f["time"]) for (n, l), f in flow.items()},
        }


@dataclasses.dataclass(frozen=True)
class Job:
    """One program: `seeds` trainings of each member.

    Attributes:
        kind: "network", or an induction head of "three" or "two" numbers.
        tasks: the members, alike but for their numbers of classes, Zipf's law and noise.
        steps, seeds: of each.
    """

    kind: str
    tasks: dict[str, ItemLabels]
    steps: int
    seeds: int

    def cost(self) -> float:
        """Of running, in arbitrary units; a program costs about 500 steps to compile."""
        unit = 4.0 if self.kind == "network" else 2.0
        return unit * (500 + self.steps * self.seeds * len(self.tasks))


def draw(paper: AbruptICL, out, flow) -> dict[str, Any]:
    """The pictures of the entry, by name."""
    fresh, levels = out["fresh"], {"1/N": 1 / paper.pairs, "1/L": 1 / paper.labels}
    one, axes = plots.panels(6)
    plots.curves(
        axes[0], fresh["step"],
        {"accuracy in context": fresh["context"], "label to its item (layer 1)": fresh["ila1"],
         "target to right label (layer 2)": fresh["tila2"],
         "target to all labels": fresh["tla2"], "probability of context labels": fresh["cla"]},
        title="fresh classes", xlabel="step",
    )  # fmt: skip
    names = {"few": f"K = {paper.few}", "many": f"K = {paper.many}"}
    for ax, (name, title) in zip(axes[1:3], names.items()):
        lines = {
            "in context": "context",
            "in weights": "weights",
            "against weights": "swapped",
        }
        plots.curves(
            ax, out[name]["step"], {t: out[name][s] for t, s in lines.items()},
            title=title, xlabel="step", ylabel="accuracy", levels=levels,
        )  # fmt: skip
    equal = out["equal"]
    plots.curves(
        axes[3], equal["step"],
        {"accuracy in context": equal["context"], "label to its item": equal["ila1"],
         "target to right label": equal["tila2"]},
        title=f"L = N = {paper.pairs}", xlabel="step", levels={"1/N": 1 / paper.pairs},
    )  # fmt: skip
    plots.curves(
        axes[4], out["three"]["step"],
        {"three numbers": out["three"]["context"], "two numbers": out["two"]["context"]},
        title="induction head, fresh classes", xlabel="step", ylabel="accuracy in context",
    )  # fmt: skip
    plots.curves(
        axes[5], np.arange(paper.flow),
        {f"N = {n}, L = {l}": f["loss"] / f["loss"][0] for (n, l), f in flow.items()},
        title="nested logits", xlabel="step", ylabel="loss / first loss",
    )  # fmt: skip
    two, axes = plots.panels(4, columns=4, width=3.2)
    ks = [str(k) for k in paper.grid]
    for row, split in enumerate(("context", "weights")):
        dials = (
            ("burst B", [str(b) for b in paper.bursts],
             [[f"K={k} B={b}" for b in paper.bursts] for k in paper.grid]),
            ("noise", [str(e) for e in paper.noises],
             [[f"K={k} eps={e}" for e in paper.noises] for k in paper.grid]),
        )  # fmt: skip
        for column, (label, ticks, cells) in enumerate(dials):
            plots.heat(
                axes[2 * row + column],
                [[out[name][split][:, -1].mean() for name in line] for line in cells],
                title=f"accuracy, {'in context' if split == 'context' else 'from the weights'}",
                xlabel=label, ylabel="classes K", xticks=ticks, yticks=ks, limit=1.0,
            )  # fmt: skip
    return {"learning": one, "dials": two}
