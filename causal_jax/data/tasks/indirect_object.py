"""Indirect-object identification: "When Mary and John went to the store, John gave a drink to".

Each prompt has two names, one of which comes again; the answer is the other one. Its counterpart
repeats the other name, so the answer changes sides and nothing else does. Text in the tokens of a
pretrained model: names are single tokens, and all prompts of a draw have the same length.

Wang et al. 2022 (arXiv 2211.00593); both orders of the names (ABBA and BABA).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from causal_jax.data.tokenizers import Tokenizer
from causal_jax.errors import InputError

NAMES = (
    "John", "Mary", "Tom", "James", "Sarah", "David", "Anna", "Paul", "Emma", "Mark", "Laura",
    "Peter", "Alice", "Jack", "Kate", "Robert", "Susan", "Michael", "Lisa", "Daniel", "Helen",
    "George", "Linda", "Adam", "Jane", "Henry", "Ruth", "Simon", "Martin", "Rachel",
)  # fmt: skip

TRAIN = (
    "When {a} and {b} went to the store, {s} gave a drink to",
    "When {a} and {b} got to the office, {s} gave a letter to",
    "When {a} and {b} came to the garden, {s} handed a flower to",
)
TEST = (
    "When {a} and {b} went to the park, {s} gave a ball to",
    "When {a} and {b} got to the station, {s} handed a ticket to",
    "When {a} and {b} came to the hospital, {s} gave a book to",
)


class Pairs(NamedTuple):
    """Prompts and their counterparts.

    Attributes:
        base, source: int32 [B, T], the same but for the repeated name.
        answer: int32 [B], right after `base` and wrong after `source`.
        other: int32 [B], the other way round.
    """

    base: np.ndarray
    source: np.ndarray
    answer: np.ndarray
    other: np.ndarray


def pairs(tokenizer: Tokenizer, count: int, seed: int, templates: Sequence[str] = TRAIN) -> Pairs:
    """Random prompts over templates, names and their order; same seed, same prompts.

    Args:
        tokenizer: of the model.
        count: B.
        seed: of names and templates.
        templates: texts with {a} and {b}, the names in order, and {s}, the repeated one.

    Raises:
        InputError: the templates have different lengths in these tokens, or fewer than two of the
            names are single tokens.
    """
    ids = {name: tokenizer.encode(f" {name}") for name in NAMES}
    single = [name for name in NAMES if len(ids[name]) == 1]
    if len(single) < 2:
        raise InputError("fewer than two of the names are single tokens of this tokenizer")
    rng = np.random.default_rng(seed)
    bases, sources, answers = [], [], []
    for _ in range(count):
        a, b = (single[i] for i in rng.choice(len(single), 2, replace=False).tolist())
        template = templates[int(rng.integers(len(templates)))]
        repeated, answer = (a, b) if rng.integers(2) else (b, a)
        bases.append(tokenizer.encode(template.format(a=a, b=b, s=repeated)))
        sources.append(tokenizer.encode(template.format(a=a, b=b, s=answer)))
        answers.append((ids[answer][0], ids[repeated][0]))
    if len({len(row) for row in (*bases, *sources)}) > 1:
        raise InputError("the templates have different numbers of tokens: give those of one length")
    right, wrong = np.array(answers, np.int32).T
    return Pairs(np.array(bases, np.int32), np.array(sources, np.int32), right, wrong)
