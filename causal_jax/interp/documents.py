"""Prompts of numbered documents and a question, and where in the tokens each document lies.

The layout is that of arXiv 2505.11754: an instruction, `Document [i](Title: t) text` lines numbered
as they now stand, the question; then the answer's opening, so that the answer is what comes next.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from causal_jax.data.tokenizers import Tokenizer
from causal_jax.errors import InputError
from causal_jax.shapes import Int

INSTRUCTION = (
    "Answer the question using only the given search results (some of which might be irrelevant)."
)


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentPrompt:
    """A prompt.

    Attributes:
        ids: its tokens.
        spans: (first, one past the last) token of each document, in the order they stand.
    """

    ids: Int[np.ndarray, "T"]
    spans: tuple[tuple[int, int], ...]


def document_prompt(
    tokenizer: Tokenizer,
    documents: Sequence[tuple[str, str]],
    question: str,
    *,
    opening: str = "",
) -> DocumentPrompt:
    """Tokens of a prompt.

    Args:
        tokenizer: the model's; one with a chat template lays out a conversation.
        documents: (title, text), in the order they are to stand.
        opening: how the answer begins.
    """
    lines = [f"Document [{i}](Title: {t}) {text}" for i, (t, text) in enumerate(documents, 1)]
    content = "\n".join([INSTRUCTION, "", *lines, "", f"Question: {question}"])
    if getattr(tokenizer, "chat_template", None):
        chat = tokenizer.chat([{"role": "user", "content": content}])  # pyright: ignore
        ids = np.concatenate([chat, tokenizer.encode(opening)])
    else:
        front = [] if tokenizer.bos is None else [tokenizer.bos]
        text = f"{content}\nAnswer: {opening}".rstrip()
        ids = np.concatenate([front, tokenizer.encode(text)])
    ids = ids.astype(np.int32)
    return DocumentPrompt(ids, tuple(_places(tokenizer, ids, line) for line in lines))


def _places(tokenizer: Tokenizer, ids: np.ndarray, text: str) -> tuple[int, int]:
    """The tokens that hold a text, in part or whole."""
    pieces = [tokenizer.pieces[i] for i in ids]
    ends = np.cumsum([len(p) for p in pieces])
    at = b"".join(pieces).find(text.encode())
    if at < 0:
        raise InputError(f"the tokens do not spell {text!r}: its places are unknown")
    first = int(np.searchsorted(ends, at, side="right"))
    return first, int(np.searchsorted(ends, at + len(text.encode()))) + 1
