"""The embedded corpus: Python's own language reference, which every interpreter carries.

`pydoc_data.topics` is what `help("assert")` prints: 79 chapters, 0.46 MB of technical English (the
exact text depends on the Python version, and so does the fingerprint). Chapters are taken in the
dictionary's order, exact repetitions dropped. Chapters quote each other, so part of the held-out
tenth (7 % of its bytes on Python 3.11, by whole paragraphs) also occurs in the training part:
compare figures on it only with each other.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from causal_jax.data.sources._base import Source, check_fraction, check_split, hold_out, sources
from causal_jax.data.tokenizers._base import digest
from causal_jax.errors import InputError


@sources.register("corpus")
@dataclass(frozen=True)
class Corpus(Source):
    """The language reference as a tensorflow-datasets builder in array_record.

    Args:
        held_out: the last part of the bytes, in chapter order, is the validation split; the
            chapter in which the cut falls is divided at the next line end.
    """

    held_out: float = 0.1

    def __post_init__(self):
        check_fraction("Corpus.held_out", self.held_out)

    def documents(self, split: str) -> Sequence[str]:
        from causal_jax.data._builders import DocumentSequence

        check_split(split)
        builder = self.builder()
        if split not in builder.info.splits:  # nothing held out
            return []
        records = builder.as_data_source(split=split)
        return DocumentSequence(records, "text", f"corpus/{split}")

    def builder(self):
        """The prepared `tfds.core.DatasetBuilder`: splits train, validation; title, text."""
        from causal_jax.data._builders import embedded

        train, held = hold_out(chapters(), self.held_out)
        splits = {"train": train, "validation": held}
        named = {
            split: [(text.lstrip().partition("\n")[0], text) for text in texts]
            for split, texts in splits.items()
        }
        about = "The Python language reference, as pydoc_data.topics holds it."
        return embedded("language_reference", about, self.fingerprint(), named)

    def fingerprint(self) -> str:
        return digest(str(self.held_out), *chapters())


@functools.cache
def chapters() -> tuple[str, ...]:
    """The distinct chapters of the language reference."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "source corpus: this Python has no pydoc_data.topics (the language reference); "
            "install the full standard library, or give a text with the source Text(path=...)"
        ) from None
    return tuple(dict.fromkeys(topics.values()))
