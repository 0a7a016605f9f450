"""Where in a prompt: phrases to positions, left padding, and what of it lies behind a cache.

    prompt = tokenize(tokenizer, "The capital of France is")
    where = prompt.find(" France")                                  # positions of its tokens
    both = pad([prompt, other])
    out, acts = run(model, both.tokens, edits=patch(c, layer=3, position=both.place([w0, w1])),
                    **both.inputs())

Positions count the tokens the model reads, its bos included, from 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax import masks
from causal_jax.data.tokenizers import Tokenizer
from causal_jax.errors import InputError
from causal_jax.shapes import Array, Bool, Int


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A text as tokens, each with its place in the text.

    Attributes:
        text: as it was given.
        ids: int32 [T].
        spans: [T, 2] first and one past the last byte of each token in the UTF-8 of the text; empty
            for bos.
        pieces: text of each token, for labels.
    """

    text: str
    ids: Int[np.ndarray, "T"]
    spans: Int[np.ndarray, "T 2"]
    pieces: tuple[str, ...]

    def find(self, phrase: str, occurrence: int | None = None) -> Int[np.ndarray, "n"]:
        """Positions of the tokens that hold a phrase, in part or whole.

        Args:
            phrase: of the text.
            occurrence: which of several, from 0 (or -1: the last).

        Raises:
            InputError: it does not occur, or more than once and `occurrence` says not which.
        """
        data, wanted = self.text.encode(), phrase.encode()
        starts = [i for i in range(len(data)) if data.startswith(wanted, i)] if wanted else []
        if not starts:
            raise InputError(f"phrase {phrase!r} does not occur in {self.text!r}")
        if occurrence is None and len(starts) > 1:
            raise InputError(
                f"phrase {phrase!r} occurs {len(starts)} times: say which by occurrence=0.."
                f"{len(starts) - 1}"
            )
        number = 0 if occurrence is None else occurrence
        if not -len(starts) <= number < len(starts):
            raise InputError(f"occurrence={number}: {phrase!r} occurs {len(starts)} times")
        begin = starts[number]
        inside = (self.spans[:, 0] < begin + len(wanted)) & (self.spans[:, 1] > begin)
        return np.flatnonzero(inside & (self.spans[:, 1] > self.spans[:, 0]))


def tokenize(tokenizer: Tokenizer, text: str, *, bos: bool = True) -> Prompt:
    """A text as the model reads it.

    Args:
        bos: put the tokenizer's bos in front, where it has one.

    Raises:
        InputError: the tokens do not spell the text (so places in it are not known).
    """
    ids = [int(i) for i in tokenizer.encode(text)]
    if bos and tokenizer.bos is not None:
        ids = [tokenizer.bos, *ids]
    pieces = [tokenizer.pieces[i] for i in ids]
    ends = np.cumsum([len(p) for p in pieces], dtype=np.int64)
    data = text.encode()
    shift = b"".join(pieces).find(data)  # some tokenizers begin with a space of their own
    if shift not in (0, 1):
        raise InputError(f"the tokens of {text!r} spell {b''.join(pieces)!r}: places are unknown")
    starts = ends - np.array([len(p) for p in pieces], np.int64)
    spans = np.clip(np.stack([starts, ends], 1) - shift, 0, len(data))
    names = tuple(p.decode(errors="replace") if p else "<bos>" for p in pieces)
    return Prompt(text, np.array(ids, np.int32), spans, names)


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Prompts padded in front to one length.

    Attributes:
        tokens: [B, T].
        start: [B] first real position of each row.
    """

    tokens: Int[Array, "B T"]
    start: Int[Array, "B"]

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model that make padding invisible."""
        T = self.tokens.shape[1]
        positions = jnp.maximum(jnp.arange(T)[None] - self.start[:, None], 0)
        return {"mask": ~masks.Prefix(self.start), "positions": positions}

    def real(self) -> Bool[Array, "B T"]:
        """Where there are tokens and no padding."""
        return jnp.arange(self.tokens.shape[1])[None] >= self.start[:, None]

    def place(self, positions: Sequence[Any]) -> Bool[np.ndarray, "B T"]:
        """Positions in each prompt as a selection of the batch, a mask.

        Args:
            positions: for each prompt an int (negative: from its end) or several; [] for none.

        Raises:
            InputError: not one entry per row, or outside a prompt.
        """
        B, T = self.tokens.shape
        if len(positions) != B:
            raise InputError(f"positions for {len(positions)} prompts, the batch has {B}")
        out = np.zeros((B, T), bool)
        for row, (where, start) in enumerate(zip(positions, np.asarray(self.start))):
            where, length = np.atleast_1d(np.asarray(where, np.int64)), T - int(start)
            if np.any((where < -length) | (where >= length)):
                raise InputError(
                    f"prompt {row} has {length} tokens: positions {where.tolist()} are outside"
                )
            out[row, start + where % length] = True
        return out


def pad(prompts: Sequence[Prompt | Sequence[int] | np.ndarray]) -> Batch:
    """Prompts (or their ids) of any lengths as one batch, shorter ones padded in front.

    Raises:
        InputError: none, or an empty one.
    """
    rows = [np.asarray(p.ids if isinstance(p, Prompt) else p, np.int32) for p in prompts]
    if not rows or not all(len(r) for r in rows):
        raise InputError("pad: give at least one prompt, each of at least one token")
    longest = max(map(len, rows))
    tokens = np.stack([np.pad(r, (longest - len(r), 0)) for r in rows])
    start = np.array([longest - len(r) for r in rows], np.int32)
    return Batch(jnp.asarray(tokens), jnp.asarray(start))


def in_chunk(
    place: Bool[Array, "B S"] | Bool[np.ndarray, "B S"], length: Any, new: int
) -> Bool[Array, "B n"]:
    """A selection of a whole sequence as one of the `new` positions that follow `length` cached.

    For the query axis of sites inside `extend`; keys keep their places in the cache.
    """
    width = max(place.shape[1], new)
    room = jnp.pad(jnp.asarray(place), ((0, 0), (0, width - place.shape[1] + new)))
    return jax.lax.dynamic_slice_in_dim(room, length, new, axis=1)
