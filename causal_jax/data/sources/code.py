"""The standard library's own sources: a corpus of Python code that every interpreter carries."""

import functools
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from causal_jax.data.sources._base import Source, check_fraction, check_split, hold_out, sources
from causal_jax.data.tokenizers._base import digest
from causal_jax.errors import InputError

# Tests and bundled third-party code are not the library; pydoc_data is the other corpus.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data"}
LEFT_OUT |= {"__pycache__", "ensurepip"}


@sources.register("code")
@dataclass(frozen=True)
class Code(Source):
    """Standard library modules, one document each, as a tensorflow-datasets builder in
    array_record.

    The modules are put in the order of the sha256 of their relative paths, as good as random and
    always the same, and taken until `megabytes` are full (the last one is cut at a line end).

    Args:
        megabytes: how much of the library, in 10^6 bytes.
        held_out: the last part of those bytes is the validation split.
    """

    megabytes: float = 4.0
    held_out: float = 0.1

    def __post_init__(self):
        check_fraction("Code.held_out", self.held_out)
        if not self.megabytes > 0:
            raise InputError(f"Code.megabytes is {self.megabytes}; more than 0")

    def documents(self, split: str) -> Sequence[str]:
        from causal_jax.data._builders import DocumentSequence

        check_split(split)
        builder = self.builder()
        if split not in builder.info.splits:  # nothing held out
            return []
        records = builder.as_data_source(split=split)
        return DocumentSequence(records, "text", f"code/{split}")

    def builder(self):
        """The prepared `tfds.core.DatasetBuilder`: splits train, validation; title, text."""
        from causal_jax.data._builders import embedded

        names, texts = modules(int(self.megabytes * 1e6))
        train, held = hold_out(texts, self.held_out)
        first_held = len(texts) - len(held)
        splits = {
            "train": list(zip(names, train)),
            "validation": list(zip(names[first_held:], held)),
        }
        about = "Modules of the Python standard library."
        return embedded("standard_library", about, self.fingerprint(), splits)

    def fingerprint(self) -> str:
        return digest(str(self.held_out), *modules(int(self.megabytes * 1e6))[1])


@functools.lru_cache(maxsize=2)
def modules(size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and texts of the modules that fill `size` bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT]
        found += [Path(folder, name).relative_to(root) for name in files if name.endswith(".py")]
    found.sort(key=lambda p: hashlib.sha256(p.as_posix().encode()).hexdigest())
    names, texts, left = [], [], size
    for path in found:
        with tokenize.open(root / path) as f:  # honours the coding line
            text = f.read()
        data = text.encode()
        if not data:
            continue
        if len(data) > left:
            text = data[: data.rfind(b"\n", 0, left) + 1].decode()
        if text:
            names.append(path.as_posix())
            texts.append(text)
        left -= len(data)
        if left <= 0:
            break
    if not texts:
        raise InputError(f"source code: no Python sources of the standard library found in {root}")
    return tuple(names), tuple(texts)
