"""What a source is: training and held-out documents in a fixed order, and their fingerprint."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from causal_jax.errors import InputError
from causal_jax.registry import Registry

sources = Registry("source", "causal_jax.data.sources")

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Source:
    """Where text comes from. A subclass is its own config."""

    def documents(self, split: str) -> Sequence[str]:
        """The documents of "train" or "validation", always in the same order.

        Raises:
            InputError: the data is missing, empty or not UTF-8 text.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 of the content of both splits, document by document."""
        h = hashlib.sha256()
        for split in SPLITS:
            h.update(split.encode())
            for text in self.documents(split):
                data = text.encode("utf-8", errors="surrogatepass")
                h.update(len(data).to_bytes(8, "little"))
                h.update(data)
        return h.hexdigest()


def check_split(split: str) -> None:
    """Refuse a split that no source has (InputError)."""
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; one of {', '.join(SPLITS)}")


def check_fraction(field: str, value: float) -> None:
    """Refuse a held-out share outside [0, 1) (InputError)."""
    if not 0 <= value < 1:
        raise InputError(f"{field} is {value}; a fraction from 0 (nothing held out) to below 1")


def hold_out(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Cut a list of documents: its last `fraction` of UTF-8 bytes is held out.

    The cut falls `fraction` of all bytes before the end; the document it falls into is divided
    after the next line end at or behind the cut (anywhere, if no line ends there), and both halves
    count as documents. The order is kept, empty documents vanish, `"".join(train + held out)` is
    all the text.

    Args:
        documents: texts, in their order.
        fraction: in [0, 1).

    Returns:
        (train, held out)
    """
    sizes = [len(d.encode("utf-8", errors="surrogatepass")) for d in documents]
    left = sum(sizes) - int(sum(sizes) * fraction)  # bytes for training
    train: list[str] = []
    for i, (text, size) in enumerate(zip(documents, sizes)):
        if size < left:
            train.append(text)
            left -= size
            continue
        head, tail = _cut(text, left)
        return [t for t in (*train, head) if t], [t for t in (tail, *documents[i + 1 :]) if t]
    return [t for t in train if t], []


def _cut(text: str, at: int) -> tuple[str, str]:
    data = text.encode("utf-8", errors="surrogatepass")
    line = data.find(b"\n", max(at - 1, 0))
    if at < len(data) and line >= 0 and line + 1 < len(data):
        at = line + 1
    while at < len(data) and data[at] & 0xC0 == 0x80:  # not inside a character
        at += 1
    return tuple(part.decode("utf-8", errors="surrogatepass") for part in (data[:at], data[at:]))  # type: ignore[return-value]
