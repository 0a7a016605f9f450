"""Retrieval heads: a few heads copy the needle into the answer, and recall hangs on them.

Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality"
(arXiv 2404.15574). Claim: in every model a few per cent of the heads copy tokens from a far
context into the output; knocking them out destroys recall, knocking out as many others does not.

    python -m causal_jax.reproduce retrieval_heads        SmolLM2-135M, two CPU cores
    python -m causal_jax.reproduce retrieval_heads --set model=FOLDER_OR_HUB_ID

Here: invented facts in the language reference, two context lengths. A head's score is the share of
the fact's key part that it copied, averaged over prompts; heads are ranked on three facts and
masked on three others, while decoding only, by uniform attention, as the official code does. The
answer begins with the fact's opening words (`lead`). Random controls have the top heads' layers.
Measured: 7 minutes on two cores shared with five other jobs, 1.9 GiB; 24 of 270 heads above 0.1 at
either length, strongest 18-6, 20-6, 17-3, 23-2 (layer-head); recall 0.85, with the top 14 masked
0.23, with 14 random ones 0.83.
"""

import dataclasses
import functools
import time
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax import plots
from causal_jax.data.sources.corpus import chapters
from causal_jax.interp import ablate_heads, pad, retrieval
from causal_jax.interp.needles import FACTS, NeedlePrompt, needle_prompt, prose, recall
from causal_jax.papers._base import Evidence, Paper, Report, Row, papers
from causal_jax.papers._subject import TOY, load_subject, peak_gib

THRESHOLD = 0.1  # above it a head is a retrieval head
SUCCESS = 0.5  # recall above which an answer is right


@papers.register("retrieval_heads")
@dataclasses.dataclass(frozen=True)
class RetrievalHeads(Paper):
    """Settings.

    Attributes:
        seeds: independent books; the facts are the same.
        model: "smollm2", a folder, a GGUF file or a hub repository.
        lengths: tokens of a prompt; the first is the one heads are masked at.
        depths: where the needle stands, as fractions of the book.
        max_new: tokens of an answer at most.
        lead: begin the answer with the needle's opening words.
        masked: how many heads are masked, in per cent of all; the first is judged.
        draws: random controls at that number.
        how: what masking does: "uniform" attention, or "zero" output.
        rows: prompts read at the same time.
    """

    seeds: int = 1
    model: str = "smollm2"
    lengths: tuple[int, ...] = (512, 1024)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    max_new: int = 14
    lead: bool = True
    masked: tuple[float, ...] = (5.0, 1.0, 2.0, 10.0, 20.0)
    draws: int = 10
    how: str = "uniform"
    rows: int = 9

    title: ClassVar = "Retrieval Head Mechanistically Explains Long-Context Factuality"
    arxiv: ClassVar = "2404.15574"
    claims: ClassVar = (
        "a few per cent of the heads copy from a far context: score above 0.1",
        "masking the top heads destroys recall of another needle",
        "masking as many random heads does not",
        "the heads are the same at another context length",
    )
    missing: ClassVar[tuple[str, ...]] = (
        "the small net trained on retrieval: recall lost, language kept",
        "extractive QA, GSM8K, MMLU and MuSiQue under masking",
        "where the top heads look on failures",
    )

    @classmethod
    def full(cls) -> "RetrievalHeads":
        lengths = tuple(int(n) for n in np.linspace(1024, 8000, 20))
        depths = tuple(float(d) for d in np.linspace(0, 1, 10))
        return cls(lengths=lengths, depths=depths, max_new=50, lead=False, rows=10)

    @classmethod
    def smoke(cls) -> "RetrievalHeads":
        return cls(
            model=TOY, lengths=(400, 420), depths=(0.5,), max_new=3, masked=(20.0,), draws=2, rows=3
        )

    def __post_init__(self):
        super().__post_init__()
        self.need(len(self.lengths) >= 2, "lengths", "at least two")
        self.need(all(0 <= d <= 1 for d in self.depths), "depths", "fractions from 0 to 1")
        self.need(self.max_new >= 1, "max_new", "at least 1")
        self.need(all(0 < m < 50 for m in self.masked), "masked", "per cent, above 0 and below 50")
        self.need(self.draws >= 1, "draws", "at least 1")
        self.need(self.how in ("uniform", "zero"), "how", "'uniform' or 'zero'")
        self.need(self.rows >= 1, "rows", "at least 1")

    def run(self, report: Report) -> Evidence:
        subject = _Subject(self)
        scores, masks = [], []
        for seed in range(self.seeds):
            for i, length in enumerate(self.lengths):
                done = (seed + 0.5 * i / len(self.lengths)) / self.seeds
                report.progress(done, f"scores at {length} tokens, book {seed}")
                stage = functools.partial(subject.scores, length, seed)
                scores.append(report.stage(f"scores_{length}_{seed}", stage))
            here = scores[-len(self.lengths) :]
            ranking = np.mean([s["score"] for s in here], 0)
            progress = functools.partial(_within, report, seed, self.seeds)
            stage = functools.partial(subject.masking, ranking, seed, progress)
            masks.append(report.stage(f"masking_{seed}", stage))
        report.progress(1.0, "done")
        table = {k: np.stack([s[k] for s in scores]) for k in scores[0]}
        table = {
            k: v.reshape(self.seeds, len(self.lengths), *v.shape[1:]) for k, v in table.items()
        }
        masking = {k: np.stack([m[k] for m in masks]) for k in masks[0]}
        rows = _rows(self, table, masking)
        return Evidence(rows, _plots(self, report, table, masking), _figures(self, table, masking))


def _within(report: Report, seed: int, seeds: int, fraction: float, text: str) -> None:
    report.progress((seed + 0.5 + 0.5 * fraction) / seeds, text)


class _Subject:
    """The model with its two programs, and the measurements on it."""

    def __init__(self, settings: RetrievalHeads):
        self.settings = settings
        self.model, self.tokenizer = load_subject(settings.model)
        graph, self.params = nnx.split(self.model)
        self.L, self.N = self.model.spec.layers, self.model.spec.heads
        stops = self.tokenizer.stop_tokens + _line_ends(self.tokenizer)

        @jax.jit
        def read(params, tokens, start):
            model = nnx.merge(graph, params)
            return retrieval.read(model, tokens, start, room=settings.max_new)

        @jax.jit
        def answer(params, reading, heads):
            model, how = nnx.merge(graph, params), settings.how
            edits = ablate_heads(heads, how)  # pyright: ignore[reportArgumentType]
            return retrieval.answer(
                model, reading, steps=settings.max_new, stop_tokens=stops, edits=edits
            )

        self.read = functools.partial(read, self.params)
        self.answer = functools.partial(answer, self.params)
        self.nobody = np.zeros((self.L, self.N), bool)

    def prompts(self, facts: Any, length: int, seed: int) -> list[list[NeedlePrompt]]:
        """Groups of prompts, a group being read at the same time."""
        made = []
        for number, fact in enumerate(facts):
            book = prose(chapters(), self.tokenizer, length, first=11 * seed + 5 * number)
            for depth in self.settings.depths:
                prompt = needle_prompt(
                    self.tokenizer, book, fact, length=length, depth=depth, lead=self.settings.lead
                )
                made.append(prompt)
        return [made[i : i + self.settings.rows] for i in range(0, len(made), self.settings.rows)]

    def scores(self, length: int, seed: int) -> dict[str, Any]:
        """Scores at one context length, on the first half of the facts."""
        begun, found = time.perf_counter(), []
        for group in self.prompts(FACTS[: len(FACTS) // 2], length, seed):
            batch = pad([p.ids for p in group])
            said = self.answer(self.read(batch.tokens, batch.start), self.nobody)
            span = jnp.array([p.span for p in group]) + batch.start[:, None]
            hits = retrieval.copy_hits(said.seen, said.tokens, batch.tokens, span)
            found.append(
                {
                    "set": retrieval.retrieval_score(hits, said.seen, span),
                    "events": retrieval.retrieval_score(hits, said.seen, span, "events"),
                    "active": hits.any(0),
                    "recall": self._recalls(group, said)[None, :, None],
                }
            )
        joined = {k: np.concatenate([f[k] for f in found], -2) for k in found[0]}
        recalls = joined["recall"][0, :, 0]
        right = recalls > SUCCESS
        return {
            "score": joined["set"].mean(1),
            "score of the right": joined["set"][:, right].mean(1) if right.any() else self.nobody,
            "events of the right": joined["events"][:, right].mean(1)
            if right.any()
            else self.nobody,
            "frequency": joined["active"].mean(1),
            "recall": recalls,
            "seconds": time.perf_counter() - begun,
            "peak GiB": peak_gib(),
        }

    def masking(self, ranking: np.ndarray, seed: int, progress: Any) -> dict[str, Any]:
        """Recall on the other facts with the top heads masked, and with random ones."""
        begun, settings = time.perf_counter(), self.settings
        groups = self.prompts(FACTS[len(FACTS) // 2 :], settings.lengths[0], seed)
        batches = [pad([p.ids for p in group]) for group in groups]
        readings = [self.read(b.tokens, b.start) for b in batches]
        strong = retrieval.top_heads(ranking, int((ranking > THRESHOLD).sum()))
        total = 1 + len(settings.masked) + settings.draws + 3 * (len(settings.masked) - 1)
        done = []

        def measured(heads):
            mask = retrieval.head_mask(heads, self.L, self.N)
            said = [self.answer(reading, mask) for reading in readings]
            recalls = [self._recalls(g, s) for g, s in zip(groups, said)]
            done.append(np.concatenate(recalls).mean())
            progress(len(done) / total, f"{len(heads)} heads masked, recall {done[-1]:.2f}")
            return done[-1]

        found = {"whole": measured([]), "top": [], "random": []}
        for number, share in enumerate(settings.masked):
            best = retrieval.top_heads(ranking, self.heads(share))
            found["top"].append(measured(best))
            draws = settings.draws if number == 0 else min(3, settings.draws)
            values = np.full(settings.draws, np.nan)
            for draw in range(draws):
                key = jax.random.key(1000 * seed + draw)
                values[draw] = measured(retrieval.random_heads(key, best, self.N, strong))
            found["random"].append(values)
        return found | {"seconds": time.perf_counter() - begun, "peak GiB": peak_gib()}

    def heads(self, share: float) -> int:
        """So many heads are `share` per cent."""
        return max(1, round(share / 100 * self.L * self.N))

    def _recalls(self, group: list[NeedlePrompt], said: retrieval.Answers) -> np.ndarray:
        texts = [self.tokenizer.decode(row[row >= 0].tolist()) for row in np.asarray(said.tokens).T]
        return np.array([recall(text, p.fact.key) for text, p in zip(texts, group)])


def _line_ends(tokenizer: Any) -> tuple[int, ...]:
    return tuple(i for i, piece in enumerate(tokenizer.pieces) if piece.startswith(b"\n"))


def _rows(settings: RetrievalHeads, table: dict, masking: dict) -> tuple[Row, ...]:
    """The card's thresholds for a language model."""
    share = 100 * (table["score"] > THRESHOLD).mean((-2, -1))  # [seeds, lengths]
    whole = np.where(masking["whole"] > 0, masking["whole"], np.nan)  # nothing recalled: no ratio
    top = masking["top"][:, 0] / whole
    random = np.nanmean(masking["random"][:, 0], -1) / whole
    count = round(settings.masked[0] / 100 * table["score"][0, 0].size)
    where = f"{settings.how} attention while decoding, other needles"
    alike = [_pearson(s[0], s[-1]) for s in table["score"]]
    return (
        Row.of_seeds(
            "a few heads retrieve",
            "% of heads with score above 0.1, every length",
            share.ravel(),
            (1.0, 15.0),
            "in",
            paper="3 to 6 % (Llama-2-7B 3.2, Mistral-7B 4.2)",
            note=f"by book and length {settings.lengths}",
        ),
        Row.of_seeds(
            "without the top heads the needle is lost",
            f"recall with {count} heads masked / recall without",
            top,
            0.5,
            "<=",
            paper="below 50 % with 50 heads masked",
            baseline=float(random.mean()),
            note=where,
        ),
        Row.of_seeds(
            "without as many random heads it is not",
            f"recall with {count} random heads masked / recall without",
            random,
            0.9,
            ">=",
            paper="much weaker",
            baseline=float(top.mean()),
            note=f"mean of {settings.draws} draws from the same layers, none above 0.1; {where}",
        ),
        Row.of_seeds(
            "the heads are intrinsic",
            f"correlation of the scores at {settings.lengths[0]} and {settings.lengths[-1]} tokens",
            alike,
            0.8,
            ">=",
            paper="0.8 to 0.9 between a model and its derivative",
            note="the card's threshold for training continued at twice the length",
        ),
    )


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    if not (a.std() and b.std()):
        return float("nan")
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _figures(settings: RetrievalHeads, table: dict, masking: dict) -> dict[str, Any]:
    """The list of heads, how often each was active, recalls, time and memory."""
    names = [f"{n} tokens" for n in settings.lengths]
    mean = {k: v.mean(0) for k, v in table.items()}  # over books
    best = retrieval.top_heads(mean["score"].mean(0), min(20, mean["score"][0].size))
    columns = ("score", "score of the right", "events of the right", "frequency")
    heads = {
        f"{layer}-{head}": {
            name: {c: round(float(mean[c][i, layer, head]), 3) for c in columns}
            for i, name in enumerate(names)
        }
        for layer, head in best
    }
    levels = {
        name: {
            "0": float((s == 0).mean()),
            "(0, 0.1]": float(((s > 0) & (s <= THRESHOLD)).mean()),
            "(0.1, 0.5]": float(((s > THRESHOLD) & (s <= 0.5)).mean()),
            "above 0.5": float((s > 0.5).mean()),
        }
        for name, s in zip(names, mean["score"])
    }
    return {
        "heads (layer-head), best first": heads,
        "share of heads by score": levels,
        "recall": {n: float(r.mean()) for n, r in zip(names, table["recall"].swapaxes(0, 1))},
        "prompts per length": int(table["recall"].shape[-1]),
        "answered rightly": {
            n: int((r > SUCCESS).sum()) for n, r in zip(names, table["recall"].swapaxes(0, 1))
        },
        "recall, masked": {
            "none": masking["whole"],
            **{
                f"{share:g} %": {"top": masking["top"][:, i], "random": masking["random"][:, i]}
                for i, share in enumerate(settings.masked)
            },
        },
        "minutes": {
            **{n: float(s.sum() / 60) for n, s in zip(names, table["seconds"].T)},
            "masking": float(masking["seconds"].sum() / 60),
        },
        "peak memory, GiB": float(max(table["peak GiB"].max(), masking["peak GiB"].max())),
    }


def _plots(settings: RetrievalHeads, report: Report, table: dict, masking: dict) -> tuple[str, ...]:
    fig, axes = plots.panels(4, columns=2, width=5.0)
    for ax, i in ((axes[0], 0), (axes[1], -1)):
        title = f"retrieval score, {settings.lengths[i]} tokens"
        score = table["score"].mean(0)[i]
        plots.heat(ax, score, title=title, xlabel="head", ylabel="layer", limit=1.0, label="score")
    low, high = (np.sort(table["score"].mean(0)[i].ravel())[::-1] for i in (0, -1))
    ranks = np.arange(1, 1 + min(60, low.size))
    plots.curves(
        axes[2],
        ranks,
        {
            f"{settings.lengths[0]} tokens": low[: len(ranks)],
            f"{settings.lengths[-1]} tokens": high[: len(ranks)],
        },
        title="scores, sorted",
        xlabel="rank of the head",
        ylabel="score",
        levels={"retrieval head": THRESHOLD},
    )
    order = np.argsort(settings.masked)
    start = masking["whole"][:, None]
    draws = np.nanmean(masking["random"], -1)[:, order]
    plots.curves(
        axes[3],
        [0.0, *np.asarray(settings.masked)[order]],
        {
            "top heads": np.concatenate([start, masking["top"][:, order]], 1),
            "random heads, same layers": np.concatenate([start, draws], 1),
        },
        title=f"masked while decoding ({settings.how}), {settings.lengths[0]} tokens",
        xlabel="heads masked, % of all",
        ylabel="recall of the needle",
    )
    return (report.figure("retrieval_heads", fig),)
