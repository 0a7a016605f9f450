"""A synthetic task as a source: rows of ids made on demand, no text to read or tokenise."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from causal_jax.data.packing import Row, Rows
from causal_jax.data.sources._base import Source, sources
from causal_jax.data.tasks._base import Task
from causal_jax.data.tasks.recall import Recall
from causal_jax.data.tokenizers._base import TokenizerSpec, digest
from causal_jax.data.tokenizers.byte import Bytes
from causal_jax.data.tokenizers.ids import Ids
from causal_jax.errors import InputError

# Seeds of training end below 2**31: validation rows come from a stream that no run trains on.
HELD_OUT_SEED = (1 << 31) + 1


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
        """Bytes where the task is text, else numbers."""
        return Bytes() if self.task.textual else Ids(self.task.vocab)


class TaskRows(Rows):
    """Rows of one stream of a task: as good as endless to train on, or the held-out ones."""

    def __init__(self, source: Synthetic, seed: int | None):
        self._task = source.task
        self._seed = HELD_OUT_SEED if seed is None else seed
        self._length = source.validation_rows if seed is None else sys.maxsize // 2

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Sequence[int]) -> Row:
        return self._task.batch(self._seed, indices)
