"""The language-model half of multi-hop masking: a pretrained decoder on chains told in English."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.data.tasks.multihop import Question, contains, exact_match, permute, tell
from causal_jax.interp import grouped, pad, prefix, retrieval
from causal_jax.interp.documents import document_prompt
from causal_jax.papers._subject import load_subject, peak_gib


class Reader:
    """The pretrained model on told questions."""

    def __init__(self, settings: Any):
        self.settings = settings
        self.model, self.tokenizer = load_subject(settings.model)
        self.questions = [
            tell(0, i, hops=settings.hops, documents=settings.documents)
            for i in range(settings.questions)
        ]
        distances = [f"distance {d}" for d in settings.distances]
        plain = ["original", "forward", "backward", *distances, "remove_first", "gold_only"]
        self.names = [*plain, "original, prefix mask"]
        graph, self.params = nnx.split(self.model)

        @functools.partial(jax.jit, static_argnames="opened")
        def answer(params, tokens, start, keys, *, opened):
            model = nnx.merge(graph, params)
            edits = ()
            if opened:  # all of the prompt but its last token, which sees everything anyway
                last = tokens.shape[1] - 2
                span = jnp.minimum(start[:, None] + jnp.arange(last + 1)[None], last)
                edits = prefix(span)
            reading = retrieval.read(model, tokens, start, room=settings.max_new, edits=edits)
            one = jnp.ones((1, 1), jnp.float32)

            def see(row):
                return grouped.grouped_attention(row[:, :, None], one, keys)[:, :, 0]

            said = retrieval.answer(
                model,
                reading,
                steps=settings.max_new,
                stop_tokens=self.tokenizer.stop_tokens,
                see=see,
            )
            ga = said.seen.transpose(1, 2, 3, 0, 4)  # [L, B, N, S, documents]
            count = (said.tokens >= 0).sum(0)[:, None]
            step = jnp.arange(settings.max_new)[None]
            # rows of the answer's own tokens: row s is that of token s - 1
            fed = grouped.information_contribution(ga, (step >= 1) & (step <= count))
            predicting = grouped.information_contribution(ga, step < count)
            return said.tokens, grouped.peak(fed), grouped.peak(predicting)

        self._answer = functools.partial(answer, self.params)

    def orders(self, progress: Any) -> dict[str, Any]:
        """Accuracy [order, question] of the named orders."""
        begun, found = time.perf_counter(), []
        for i, name in enumerate(self.names):
            order, _, opened = name.partition(", ")
            kind, _, distance = order.partition(" ")
            prompts = [
                (q, permute(len(q.documents), q.gold, kind, int(distance or 0)))
                for q in self.questions
            ]
            found.append(self._ask(prompts, bool(opened)))
            progress((i + 1) / len(self.names))
        joined = {k: np.stack([f[k] for f in found]) for k in found[0]}
        return joined | {"seconds": time.perf_counter() - begun, "peak GiB": peak_gib()}

    def peaks(self, progress: Any) -> dict[str, Any]:
        """The same documents in random orders: [tries, question]."""
        begun, found = time.perf_counter(), []
        for i in range(self.settings.model_tries):
            rng = np.random.default_rng(i)
            prompts = [(q, rng.permutation(len(q.documents)).tolist()) for q in self.questions]
            found.append(self._ask(prompts, False))
            progress((i + 1) / self.settings.model_tries)
        joined = {k: np.stack([f[k] for f in found]) for k in found[0]}
        return joined | {"seconds": time.perf_counter() - begun, "peak GiB": peak_gib()}

    def _ask(self, prompts: list[tuple[Question, list[int]]], opened: bool) -> dict[str, Any]:
        parts = []
        for i in range(0, len(prompts), self.settings.rows):
            part = prompts[i : i + self.settings.rows]
            laid = [
                document_prompt(self.tokenizer, q.ordered(order), q.text, opening=q.opening)
                for q, order in part
            ]
            batch = pad([p.ids for p in laid])
            size = batch.tokens.shape[1] + self.settings.max_new
            keys = np.stack(
                [
                    grouped.group_matrix([(a + s, b + s) for a, b in p.spans], size)
                    for p, s in zip(laid, np.asarray(batch.start).tolist())
                ]
            )
            tokens, fed, predicting = self._answer(batch.tokens, batch.start, keys, opened=opened)
            texts = [self.tokenizer.decode(t[t >= 0].tolist()) for t in np.asarray(tokens).T]
            pairs = [(text, q.answer) for text, (q, _) in zip(texts, part)]
            parts.append(
                {
                    "right": np.array([contains(*p) for p in pairs]),
                    "exact": np.array([exact_match(*p) for p in pairs]),
                    "peak": np.asarray(fed),
                    "predicting peak": np.asarray(predicting),
                }
            )
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
