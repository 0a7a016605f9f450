"""Questions about documents whose order means nothing, in words.

    prices   "The lamp costs 31 dollars." ...    The most expensive item in the list is the -> lamp
    homes    "Emma lives in Vienna." ...         Where does Emma live? -> Vienna

The answer is one of the words that the documents differ in, so a model's choice among them, and how
often it chooses which place, can be read off the next-token logits. Any change of the choice under
a permutation of the documents is position bias.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from causal_jax.errors import InputError

# Different initials: a tokenizer of bytes tells them apart at the first byte, too.
ITEMS = ("apple", "book", "chair", "hat", "lemon", "orange", "ring", "shirt", "table", "watch")
NAMES = ("Alice", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack")
CITIES = ("Berlin", "Chicago", "Dallas", "London", "Madrid", "Paris", "Rome", "Seattle", "Tokyo")
KINDS = ("prices", "homes")


@dataclasses.dataclass(frozen=True)
class Question:
    """One item.

    Attributes:
        prefix, documents, suffix: its text, in pieces that are tokenized alone.
        answers: the word that stands for each document.
        right: the document whose word is the answer.
    """

    prefix: str
    documents: tuple[str, ...]
    suffix: str
    answers: tuple[str, ...]
    right: int


def question(kind: str, documents: int, seed: int) -> Question:
    """A question about so many documents; the same seed gives the same one.

    Raises:
        InputError: unknown kind, or more documents than there are words.
    """
    if kind not in KINDS:
        raise InputError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    words = ITEMS if kind == "prices" else CITIES
    if not 2 <= documents <= len(words):
        raise InputError(f"documents={documents}: expected 2 to {len(words)}")
    rng = np.random.default_rng(seed)
    answers = tuple(str(w) for w in rng.permutation(words)[:documents])
    if kind == "prices":
        prices = rng.permutation(np.arange(10, 100))[:documents]
        texts = tuple(f"The {a} costs {p} dollars.\n" for a, p in zip(answers, prices))
        end = "\nThe most expensive item in the list is the"
        front = "Here is a list of items and their prices.\n"
        return Question(front, texts, end, answers, int(prices.argmax()))
    names = [str(n) for n in rng.permutation(NAMES)[:documents]]
    texts = tuple(f"{n} lives in {a}.\n" for n, a in zip(names, answers))
    right = int(rng.integers(documents))
    who = names[right]
    end = f"\nQuestion: Where does {who} live?\nAnswer: {who} lives in"
    return Question("Read these notes about people.\n", texts, end, answers, right)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Questions in several orders as one batch, padded in front.

    Attributes:
        tokens: [B, T].
        start, prefix, lengths: the layout's numbers, [B], [B], [B, M].
        answers: [B, M] the id that begins each document's word, by place.
        place: [B] where the right document stands.
        order: [B, M] the document at each place.
    """

    tokens: np.ndarray
    start: np.ndarray
    prefix: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    place: np.ndarray
    order: np.ndarray


def rows(tokenizer: Any, questions: Sequence[Question], orders: Sequence[Sequence[int]]) -> Rows:
    """Every question in every order, question by question.

    Raises:
        InputError: a tokenizer to which two answers begin alike.
    """
    front = [] if tokenizer.bos is None else [tokenizer.bos]
    ids, found = lambda text: list(map(int, tokenizer.encode(text))), []
    for q in questions:
        prefix, documents = front + ids(q.prefix), [ids(d) for d in q.documents]
        words = [ids(f" {a}") for a in q.answers]
        same = 0  # what all answers begin with belongs to the prompt
        while len({tuple(w[: same + 1]) for w in words}) == 1:
            same += 1
        first = [w[same] for w in words]
        if len(set(first)) < len(first):
            raise InputError(f"answers {q.answers}: two begin with the same token")
        suffix = ids(q.suffix) + words[0][:same]
        for order in orders:
            text = prefix + [t for d in order for t in documents[d]] + suffix
            lengths = [len(documents[d]) for d in order]
            answers, place = [first[d] for d in order], list(order).index(q.right)
            found.append((text, len(prefix), lengths, answers, place, list(order)))
    text, prefix, *rest = zip(*found)
    longest = max(map(len, text))
    start = np.array([longest - len(t) for t in text], np.int32)
    tokens = np.stack([np.pad(t, (longest - len(t), 0)) for t in text]).astype(np.int32)
    return Rows(tokens, start, np.array(prefix, np.int32), *(np.array(x, np.int32) for x in rest))
