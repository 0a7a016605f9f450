"""A synthetic task as a source: rows of ids made on demand, no text and no tokenizer to train."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from causal_jax.data.sources._base import Source, sources
from causal_jax.data.tokenizers._base import digest
from causal_jax.errors import InputError

HELD_OUT_SEED = 0x5EED  # added to the data's seed: validation rows come from another stream


@sources.register("task")
@dataclass(frozen=True)
class Task(Source):
    """Endless training rows of a generator of `causal_jax.data.tasks`, and a fixed number to
    validate on.

    Args:
        task: a frozen dataclass with `vocab`, `length` and `sample(seed, index) -> {"tokens",
            "targets", "weights"}`, each of `length` entries.
        validation_rows: size of the validation split.
    """

    task: Any = None
    validation_rows: int = 256

    def __post_init__(self):
        missing = [n for n in ("sample", "vocab", "length") if not hasattr(self.task, n)]
        if missing:
            raise InputError(
                f"Task.task is {self.task!r}, which has no {', '.join(missing)}; give a task such as Recall()"
            )
        if self.validation_rows < 1:
            raise InputError(f"Task.validation_rows is {self.validation_rows}; at least 1")

    def documents(self, split: str) -> Sequence[str]:
        raise InputError("source task: a task makes rows of ids, it has no text documents")

    def fingerprint(self) -> str:
        task = [f"{f.name}={getattr(self.task, f.name)!r}" for f in fields(self.task)]
        return digest(type(self.task).__qualname__, *task, str(self.validation_rows))
