"""Masks by name for the command line: `causal`, `window:256`, `stream:256+4`, `docs:8`, ...

`NAME` or `NAME:NUMBER+NUMBER`. Numbers of keys never count the query itself (`window:256` sees 257
keys). All are causal but `full`. Random ones draw from a fixed seed: a name means the same mask in
every run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from causal_jax import masks
from causal_jax.bench.options import pick
from causal_jax.errors import InputError

# (i, j, ids) -> bool, written with operators only, so that numpy, jax and torch can all evaluate it
Formula = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class NamedMask:
    """A mask for one sequence length.

    Attributes:
        name: as given on the command line.
        mask: the lazy mask.
        formula: the same as arithmetic on positions, for other libraries; None: needs a look-up.
        ids: [T] numpy array the formula reads (document ids), or None.
    """

    name: str
    mask: masks.Mask
    formula: Formula | None = None
    ids: np.ndarray | None = None

    def dense(self, length: int) -> np.ndarray:
        """The mask as booleans [1, 1, T, T]."""
        return np.asarray(self.mask.to_dense(length))


@dataclasses.dataclass(frozen=True)
class _Recipe:
    make: Callable[..., tuple]
    help: str
    defaults: tuple[int, ...] = ()
    required: int = 0


def _window(length: int, left: int):
    return masks.Window(left, 0), lambda i, j, _: (j <= i) & (j >= i - left)


def _stream(length: int, left: int, sinks: int):
    return masks.streaming(left, sinks), lambda i, j, _: (j <= i) & ((j >= i - left) | (j < sinks))


def _docs(length: int, count: int):
    _at_most(count, length, "documents")
    cuts = np.random.default_rng(0).choice(np.arange(1, length), count - 1, replace=False)
    ids = np.searchsorted(np.sort(cuts), np.arange(length), side="right").astype(np.int32)
    mask = masks.Causal() & masks.Documents(ids[None])
    return mask, lambda i, j, ids: (j <= i) & (ids[i] == ids[j]), ids


def _prefix(length: int, count: int):
    mask = masks.Causal() | masks.Sinks(count)  # a prefix of one length for all rows
    return mask, lambda i, j, _: (j <= i) | (j < count)


def _chunked(length: int, size: int):
    mask = masks.Causal() & masks.Chunked(size)
    return mask, lambda i, j, _: (j <= i) & (i // size == j // size)


def _strided(length: int, stride: int):
    return masks.strided_sparse(
        stride
    ), lambda i, j, _: (j <= i) & ((i - j < stride) | ((i - j) % stride == 0))


def _dilated(length: int, keys: int, stride: int):
    mask = masks.Dilated(keys + 1, stride)
    return mask, lambda i, j, _: (j <= i) & (i - j < (keys + 1) * stride) & ((i - j) % stride == 0)


def _bigbird(length: int, block: int, random: int):
    mask = masks.bigbird(length, window=block, globals=block, random=random, block=block)
    return mask, None


def _topk(length: int, count: int, block: int):
    import jax

    rows = -(-length // block)
    _at_most(count, rows, f"blocks of {block}")
    # scores are arrays: the list is made when the program runs, as with keys selected by similarity
    scores = jax.random.normal(jax.random.key(0), (1, 1, rows, rows))
    return masks.Causal() & masks.top_k_blocks(scores, count, block, block), None


RECIPES: dict[str, _Recipe] = {
    "causal": _Recipe(
        lambda length: (masks.Causal(), lambda i, j, _: j <= i), "the past and oneself"
    ),
    "full": _Recipe(
        lambda length: (masks.Full(), lambda i, j, _: (i >= 0) & (j >= 0)), "everything"
    ),
    "window": _Recipe(_window, "window:L  the last L keys and oneself", required=1),
    "stream": _Recipe(_stream, "stream:L+N  a window and the first N keys", (4,), 1),
    "docs": _Recipe(_docs, "docs:N  N packed documents of random lengths", required=1),
    "prefix": _Recipe(_prefix, "prefix:N  the first N keys for everybody", required=1),
    "chunked": _Recipe(_chunked, "chunked:C  inside chunks of C", required=1),
    "strided": _Recipe(_strided, "strided:S  the last S - 1 keys, then every S-th", required=1),
    "dilated": _Recipe(_dilated, "dilated:L+S  L earlier keys, S apart", required=2),
    "bigbird": _Recipe(
        _bigbird, "bigbird:B+R  blocks of B: near, first, and R random ones per row", (64, 3)
    ),
    "topk": _Recipe(
        _topk, "topk:K+B  K random blocks of B keys per row, listed at run time", (16, 64)
    ),
}


def parse(text: str, length: int) -> NamedMask:
    """The mask called `text` for sequences of `length`.

    Raises:
        InputError: unknown name (with the nearest), wrong number of numbers, not a number.
    """
    name, colon, rest = text.partition(":")
    pick([name], RECIPES, "mask")
    recipe = RECIPES[name]
    words = rest.split("+") if colon else []
    most = recipe.required + len(recipe.defaults)
    if not all(w.isdecimal() for w in words) or not recipe.required <= len(words) <= most:
        raise InputError(f"mask {text!r}: expected {_usage(name)}")
    missing = most - len(words)  # the last ones
    numbers = [int(w) for w in words] + list(recipe.defaults[len(recipe.defaults) - missing :])
    if any(n < 1 for n in numbers):
        raise InputError(f"mask {text!r}: numbers must be at least 1")
    return NamedMask(text, *recipe.make(length, *numbers))


def describe() -> str:
    """All names with their meaning, one a line."""
    return "\n".join(f"  {_usage(n)}" for n in RECIPES)


def _usage(name: str) -> str:
    text = RECIPES[name].help
    text = text if text.startswith(name + ":") else f"{name}  {text}"
    defaults = "+".join(map(str, RECIPES[name].defaults))
    return f"{text} (default {defaults})" if defaults else text


def _at_most(count: int, length: int, what: str) -> None:
    if count > length:
        raise InputError(f"{count} {what} do not fit into {length} tokens")
