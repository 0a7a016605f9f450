"""A needle in a book: one invented sentence somewhere in real prose, asked for at its end.

    book = prose(chapters(), tokenizer, 1024)
    prompt = needle_prompt(tokenizer, book, FACTS[0], length=1024, depth=0.5)
    prompt.ids, prompt.span                        # the tokens, and where the answer's key part is

The layout is that of arXiv 2404.15574: the book, then the question; for a model with a chat
template the book stands in <book> tags in one user turn. Needles cannot be known or guessed, and
the part that answers shares no word but an article with the question.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from causal_jax.data.tokenizers import Tokenizer
from causal_jax.errors import InputError
from causal_jax.shapes import Int


@dataclasses.dataclass(frozen=True)
class Fact:
    """A needle and what is asked about it.

    Attributes:
        opening: how its sentence begins.
        key: how it goes on: the part that answers.
        question: about it.
    """

    opening: str
    key: str
    question: str

    @property
    def sentence(self) -> str:
        """The needle."""
        return f"{self.opening} {self.key}."


FACTS = (
    Fact(
        "The favourite dish of the lighthouse keeper in Verron is",
        "smoked trout with seven olives and burnt honey",
        "What is the favourite dish of the lighthouse keeper in Verron?",
    ),
    Fact(
        "The secret ingredient of Doctor Orlan's medicine is",
        "powdered moss from a frozen railway tunnel",
        "What is the secret ingredient of Doctor Orlan's medicine?",
    ),
    Fact(
        "The first thing the astronauts saw on the moon Kelva was",
        "three purple goats sleeping beside an empty piano",
        "What was the first thing the astronauts saw on the moon Kelva?",
    ),
    Fact(
        "The best way to spend a rainy Sunday in Tamsel is",
        "feeding the blind horses behind the copper mill",
        "What is the best way to spend a rainy Sunday in Tamsel?",
    ),
    Fact(
        "The wedding present that Marit gave to her brother was",
        "a green umbrella full of dried cherries",
        "What was the wedding present that Marit gave to her brother?",
    ),
    Fact(
        "The prize for winning the Norbeck sailing race is",
        "one barrel of salted butter and two wooden ducks",
        "What is the prize for winning the Norbeck sailing race?",
    ),
)


@dataclasses.dataclass(frozen=True, eq=False)
class NeedlePrompt:
    """A prompt with a needle in it.

    Attributes:
        ids: its tokens.
        span: (first, one past the last) token of the key part.
        fact: what is hidden.
        depth: where in the book, from 0 to 1.
    """

    ids: Int[np.ndarray, "T"]
    span: tuple[int, int]
    fact: Fact
    depth: float


def needle_prompt(
    tokenizer: Tokenizer,
    book: Int[np.ndarray, "S"],
    fact: Fact,
    *,
    length: int,
    depth: float,
    lead: bool = True,
) -> NeedlePrompt:
    """A book with a fact in it and a question about it, about `length` tokens in all.

    Args:
        tokenizer: the model's; one with a chat template lays out a conversation.
        book: tokens of prose.
        depth: 0 the beginning of the book, 1 its end; moved left to the end of a sentence.
        lead: write the needle's opening words into the answer's beginning, so that the key part
            is what comes next: small models otherwise answer some questions and not others.

    Raises:
        InputError: no room for needle and question, or too short a book.
    """
    needle = tokenizer.encode(f" {fact.sentence}")
    room = length - len(_laid_out(tokenizer, "", fact, lead)) - len(needle)
    if not 0 <= room <= len(book):
        raise InputError(
            f"length={length}: needle and question take {length - room} tokens, the book has "
            f"{len(book)}"
        )
    stops = [i for i in np.unique(book) if _ends_sentence(tokenizer.pieces[i])]
    text = tokenizer.decode(insert_needle(book[:room], needle, depth, stops).tolist())
    ids = _laid_out(tokenizer, text, fact, lead)
    return NeedlePrompt(ids, find_span(ids, tokenizer.encode(f" {fact.key}")), fact, depth)


def insert_needle(
    hay: Int[np.ndarray, "T"], needle: Int[np.ndarray, "n"], depth: float, stop_ids: Any = ()
) -> Int[np.ndarray, "T_n"]:
    """All tokens, the needle behind the end of a sentence.

    Args:
        depth: 0 the beginning, 1 the end; moved left to the nearest stop.
        stop_ids: tokens that end a sentence; none: exactly at the depth.
    """
    if not 0 <= depth <= 1:
        raise InputError(f"depth={depth}: expected a fraction from 0 to 1")
    at = round(depth * len(hay))
    if len(stop_ids) and at < len(hay):
        ends = np.flatnonzero(np.isin(hay[:at], list(stop_ids)))
        at = int(ends[-1]) + 1 if len(ends) else 0
    return np.concatenate([hay[:at], needle, hay[at:]]).astype(np.int32)


def find_span(ids: Int[np.ndarray, "T"], passage: Int[np.ndarray, "n"]) -> tuple[int, int]:
    """Where a passage first stands, exactly: (first, one past the last).

    Raises:
        InputError: it does not occur.
    """
    n = len(passage)
    if 0 < n <= len(ids):
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), n)
        found = np.flatnonzero((windows == np.asarray(passage)).all(1))
        if len(found):
            return int(found[0]), int(found[0]) + n
    raise InputError(f"find_span: the passage of {n} tokens does not occur in the {len(ids)}")


def prose(
    texts: Sequence[str], tokenizer: Tokenizer, count: int, first: int = 0
) -> Int[np.ndarray, "count"]:
    """`count` tokens of the texts, from number `first` on and around; white space made single.

    Raises:
        InputError: there are not so many.
    """
    pieces, have = [], 0
    for i in range(len(texts)):
        text = texts[(first + i) % len(texts)]
        pieces.append(tokenizer.encode(re.sub(r"\s+", " ", text).strip() + " "))
        have += len(pieces[-1])
        if have >= count:
            return np.concatenate(pieces)[:count].astype(np.int32)
    raise InputError(f"prose: the texts have {have} tokens, {count} are needed")


def recall(answer: str, key: str) -> float:
    """ROUGE-1 recall: the share of the key's words, repetitions counted, that the answer has."""
    found, wanted = _words(answer), _words(key)
    return sum(min(found.count(w), wanted.count(w)) for w in set(wanted)) / len(wanted)


def _laid_out(tokenizer: Tokenizer, book: str, fact: Fact, lead: bool) -> np.ndarray:
    opening = fact.opening if lead else ""
    if getattr(tokenizer, "chat_template", None):
        content = f"<book>{book}</book>\nBased on the content of the book, {fact.question}"
        ids = tokenizer.chat([{"role": "user", "content": content}])  # pyright: ignore
        return np.concatenate([ids, tokenizer.encode(opening)]).astype(np.int32)
    text = f"{book}\n\nBased on the content of the book, Question: {fact.question}\nAnswer:"
    front = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = tokenizer.encode(f"{text} {opening}" if lead else text)
    return np.concatenate([front, ids]).astype(np.int32)


def _ends_sentence(piece: bytes) -> bool:
    return piece.rstrip().endswith((b".", b"!", b"?"))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
