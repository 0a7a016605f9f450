"""A synthetic task as a source: rows made on demand, of ids or of text through a tokenizer."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from causal_jax.data.packing import Row, Rows
from causal_jax.data.sources._base import Source, sources
from causal_jax.data.tasks._base import Task
from causal_jax.data.tasks.recall import Recall
from causal_jax.data.tokenizers._base import Tokenizer, TokenizerSpec, digest
from causal_jax.data.tokenizers.byte import Bytes
from causal_jax.data.tokenizers.ids import Ids
from causal_jax.errors import InputError

# Seeds of training end below 2**31: validation rows come from a stream that no run trains on.
HELD_OUT_SEED = (1 << 31) + 1
SAMPLES = 2000  # rows that a tokenizer is trained on


@sources.register("task")
@dataclass(frozen=True)
class Synthetic(Source):
    """Endless training rows of a task, and a fixed number of other rows to validate on.

    Args:
        task: a task of `causal_jax.data.tasks`.
        validation_rows: size of the validation split, the same rows whatever the run's seed.
    """

    task: Task = field(default_factory=Recall)
    validation_rows: int = 256

    def __post_init__(self):
        if not isinstance(self.task, Task):
            raise InputError(f"Synthetic.task is {self.task!r}; give a task such as Recall()")
        if self.validation_rows < 1:
            raise InputError(f"Synthetic.validation_rows is {self.validation_rows}; at least 1")

    def documents(self, split: str) -> Sequence[str]:
        raise InputError("source task: a task makes rows of ids, it has no text documents")

    def fingerprint(self) -> str:
        dials = [f"{f.name}={getattr(self.task, f.name)!r}" for f in fields(self.task)]
        return digest(type(self.task).__qualname__, *dials, str(self.validation_rows))

    def tokenizer(self) -> TokenizerSpec:
        """What rows are written in where nothing else is said: bytes for text, else numbers."""
        return Bytes() if self.task.textual else Ids(self.task.vocab)

    def samples(self) -> Iterator[str]:
        """Text to train a tokenizer on: rows of a stream of its own."""
        task: Any = self.task
        for index in range(SAMPLES):
            yield "".join(task.text(HELD_OUT_SEED + 1, index))


class TaskRows(Rows):
    """Rows of one stream of a task: as good as endless to train on, or the held-out ones.

    Args:
        source: the task.
        seed: of the stream; None: the held-out rows.
        length: tokens of a row; text that needs fewer is padded behind (weight 0, segment -1).
        tokenizer: of text.
    """

    def __init__(self, source: Synthetic, seed: int | None, length: int, tokenizer: Tokenizer):
        self._task: Any = source.task
        self._tokens, self._tokenizer = length, tokenizer
        self._seed = HELD_OUT_SEED if seed is None else seed
        self._length = source.validation_rows if seed is None else sys.maxsize // 2

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Sequence[int]) -> Row:
        if not self._task.textual:
            return self._task.batch(self._seed, indices)
        made = self._task.batch(self._seed, indices, tokenizer=self._tokenizer)
        more = self._tokens - made["tokens"].shape[1]
        if more < 0:
            raise InputError(
                f"data.context is {self._tokens}, but a row of the task has "
                f"{made['tokens'].shape[1]} tokens; give a longer context, or a shorter task"
            )
        fill = {"segments": -1}
        return {
            name: np.pad(value, ((0, 0), (0, more)), constant_values=fill.get(name, 0))
            for name, value in made.items()
        }
