"""Synthetic tasks: rows whose answers the prompt determines, made from (seed, index) alone.

Row `index` of stream `seed` is the same whenever, wherever and beside whatever it is asked for:
its randomness is a Philox counter stream keyed by task and seed and started at the index. So there
is no epoch, no file and no state; another seed is another stream, which is how training and
evaluation are kept apart.

A row is a sequence of length+1 tokens, shown as `tokens` (all but the last) and `targets` (all but
the first); `weights` is 1 where the target is part of the answer and 0 elsewhere.
"""

import dataclasses
import itertools
import types
import typing
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from causal_jax.errors import InputError
from causal_jax.registry import Registry

tasks = Registry("task", "causal_jax.data.tasks")

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """Base of every task; the fields are its dials.

    Args:
        length: tokens of a row, T.
    """

    length: int = 64

    textual: ClassVar[bool] = False  # True: has `text(seed, index)`, and `batch` takes a tokenizer

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        raise NotImplementedError

    @property
    def draws(self) -> int:
        """Uniform numbers that one row uses up."""
        raise NotImplementedError

    def sequences(
        self, u: Float[np.ndarray, "B draws"]
    ) -> tuple[Int[np.ndarray, "B T1"], Bool[np.ndarray, "B T1"]]:
        """Turn uniform numbers into whole sequences.

        Args:
            u: [B, draws] in [0, 1).

        Returns:
            tokens [B, length+1] and, of the same shape, which of them are the answer.
        """
        raise NotImplementedError

    def batch(self, seed: int, indices: Sequence[int]) -> Rows:
        """Rows `indices` of stream `seed`.

        Returns:
            tokens, targets, segments (0), positions: int32 [B, length]; weights: float32, 1 where
            the target belongs to the answer.
        """
        u = uniforms(tasks.name_of(self), seed, indices, self.draws)
        return rows(*self.sequences(u))

    def sample(self, seed: int, index: int) -> Rows:
        """One row: as `batch`, without the leading axis."""
        return {name: value[0] for name, value in self.batch(seed, [index]).items()}

    def need(self, ok: bool, field: str, remedy: str) -> None:
        """Refuse a dial: `InputError` naming the field and its value unless `ok`."""
        if not ok:
            name = tasks.name_of(self)
            raise InputError(f"task {name}: {field} {getattr(self, field)!r}: {remedy}")


def uniforms(
    name: str, seed: int, indices: Sequence[int], draws: int
) -> Float[np.ndarray, "B draws"]:
    """Uniform float64 numbers in [0, 1) of each index of a stream: 53 bits of raw Philox4x64.

    Raw bits rather than a `Generator`'s methods: numpy promises never to change the former.
    """
    if seed < 0:
        raise InputError(f"seed {seed}: a task's seed is 0 or more")
    key = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(2, np.uint64)
    bits = np.empty((len(indices), draws), np.uint64)
    for row, index in zip(bits, indices, strict=True):
        if not 0 <= index < 2**63:
            raise InputError(f"index {index}: a task's rows are numbered from 0 to 2**63 - 1")
        # The row's own stretch of the stream: 2**128 blocks per index.
        counter = np.array([0, 0, index, 0], np.uint64)
        row[:] = np.random.Philox(key=key, counter=counter).random_raw(draws)
    return (bits >> np.uint64(11)) * 2.0**-53


def rows(sequence: Int[np.ndarray, "B T1"], answer: Bool[np.ndarray, "B T1"]) -> Rows:
    """Whole sequences as next-token rows; the loss counts the answer only."""
    sequence = sequence.astype(np.int32)
    tokens = sequence[:, :-1]
    return {
        "tokens": tokens,
        "targets": sequence[:, 1:],
        "weights": answer[:, 1:].astype(np.float32),
        "segments": np.zeros_like(tokens),
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
    }


def pick(u: Float[np.ndarray, "B n"], count: int) -> Int[np.ndarray, "B count"]:
    """`count` different numbers below n in random order: the places of the smallest u."""
    return np.argsort(u, axis=1, kind="stable")[:, :count]


def parse_tasks(spec: str) -> tuple[Task, ...]:
    """Tasks from one line: `name:field=value,...`; a value `a/b/c` makes one task for each.

    >>> [t.length for t in parse_tasks("copying:data=8,length=32/64")]
    [32, 64]

    Raises:
        InputError: unknown task or field, or a value that is not of the field's type.
    """
    name, _, dials = spec.partition(":")
    cls = tasks[name.strip()]
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    grid: dict[str, list[Any]] = {}
    for dial in filter(None, dials.split(",")):
        field, equals, values = (part.strip() for part in dial.partition("="))
        if not equals or field not in known:
            raise InputError(
                f"task {name!r}: {dial!r} is not FIELD=VALUE with FIELD of {list(known)}"
            )
        grid[field] = [_value(name, field, known[field], text) for text in values.split("/")]
    return tuple(
        cls(**dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())
    )


def _value(task: str, field: str, hint: Any, text: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise InputError(f"task {task!r}: {field}={text!r} is not {wanted}")
