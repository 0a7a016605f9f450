"""Tokens of a split, made once per (text, tokenizer) and memory-mapped ever after."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from causal_jax.data._cache import made_once
from causal_jax.data.packing import Stream
from causal_jax.data.sources._base import SPLITS, Source
from causal_jax.data.tokenizers._base import Tokenizer, TokenizerSpec, digest, load_tokenizer

CHUNK = 256  # documents encoded at once


def trained(spec: TokenizerSpec, source: Source, fingerprint: str) -> Tokenizer:
    """The tokenizer of `spec` for the training documents of `source`, trained once."""
    key = digest(repr(spec), fingerprint)[:24]
    folder = made_once(
        f"tokenizers/{key}", lambda part: spec.train(source.documents("train")).save(part)
    )
    return load_tokenizer(folder)


def token_streams(source: Source, fingerprint: str, tokenizer: Tokenizer) -> dict[str, Stream]:
    """The documents of each split as bos t1 .. tn eos in one memory-mapped array."""
    key = digest(fingerprint, tokenizer.fingerprint())[:24]

    def make(folder: Path) -> None:
        for split in SPLITS:
            starts = write_npy(
                folder / f"{split}.npy", coded(source.documents(split), tokenizer), tokenizer
            )
            np.save(folder / f"{split}.starts.npy", starts)

    folder = made_once(f"tokens/{key}", make)
    streams = {}
    for split in SPLITS:
        starts = np.load(folder / f"{split}.starts.npy")
        mode = "r" if starts[-1] else None  # an empty file cannot be mapped
        streams[split] = Stream(np.load(folder / f"{split}.npy", mmap_mode=mode), starts)
    return streams


def coded(documents: Sequence[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Each non-empty document with its marks; where there is no bos, eos stands in front too."""
    front = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    before, after = np.array([front], np.int32), np.array([tokenizer.eos], np.int32)
    texts = (text for text in documents if text)
    for chunk in iter(lambda: list(itertools.islice(texts, CHUNK)), []):
        for ids in tokenizer.encode_documents(chunk):
            yield np.concatenate([before, ids, after])


def write_npy(path: Path, documents: Iterable[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """Write the documents one after another as one .npy; returns where each begins, and the end."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)
    starts = [0]

    def header(f):
        fields = {"descr": dtype.str, "fortran_order": False, "shape": (starts[-1],)}
        np.lib.format.write_array_header_1_0(f, fields)
        return f.tell()

    with path.open("wb") as f:
        before = header(f)
        for ids in documents:
            f.write(ids.astype(dtype).tobytes())
            starts.append(starts[-1] + len(ids))
        f.seek(0)  # numpy leaves room in the header for a growing first axis
        if header(f) != before:
            raise RuntimeError("numpy's .npy header changed its size")
    return np.array(starts, np.int64)
