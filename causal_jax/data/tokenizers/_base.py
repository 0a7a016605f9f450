"""What a tokenizer is: a table of byte strings, one per id, so that any text comes back exactly."""

import codecs
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np

from causal_jax.errors import InputError
from causal_jax.registry import Registry
from causal_jax.shapes import Int

tokenizers = Registry("tokenizer", "causal_jax.data.tokenizers")

META = "tokenizer.json"


def utf8(text: str) -> bytes:
    """UTF-8 bytes of `text`; a lone surrogate, which has none, is refused with its place."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InputError(
            f"text: character {e.start} is the lone surrogate U+{ord(text[e.start]):04X}, which no "
            "UTF-8 text can hold; decode the source as UTF-8 first"
        ) from None


class DecodeStream:
    """Text of a growing token sequence, given out only in whole characters.

    `"".join(s.push(i) for i in ids) + s.flush() == tokenizer.decode(ids)`, always.
    """

    def __init__(self, pieces: Sequence[bytes]):
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: SupportsInt) -> str:
        """The text that became complete with this token (perhaps none: "")."""
        return self._decoder.decode(self._pieces[int(token)])

    def flush(self) -> str:
        """What is left at the end; bytes that never became a character come out as U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class Tokenizer:
    """Ids to bytes by a table, text to ids by the subclass.

    Attributes:
        pieces: for each id the bytes it stands for; b"" for the special ids.
        vocab: number of ids, special ones included.
        bos, eos: ids put before and after every document, or None where there are none.
    """

    pieces: Sequence[bytes]
    bos: int | None
    eos: int | None

    @property
    def vocab(self) -> int:
        return len(self.pieces)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a continuation."""
        return () if self.eos is None else (self.eos,)

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Ids (int32) of `text`, without bos and eos; `decode` gives `text` back exactly.

        Raises:
            InputError: the text holds a lone surrogate.
        """
        raise NotImplementedError

    def encode_documents(self, texts: Sequence[str]) -> list[Int[np.ndarray, "_"]]:
        """`encode` of each text; a subclass may do them in parallel."""
        return [self.encode(t) for t in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Text of the ids; special ids are silent, bytes that are not UTF-8 come out as U+FFFD."""
        return b"".join(self.pieces[int(i)] for i in ids).decode("utf-8", errors="replace")

    def decode_stream(self) -> DecodeStream:
        """A new incremental decoder for text that is shown while it is being made."""
        return DecodeStream(self.pieces)

    def piece_bytes(self) -> Int[np.ndarray, "V"]:
        """UTF-8 bytes that each id stands for, 0 for special ids."""
        return np.array([len(p) for p in self.pieces], np.int32)

    def fingerprint(self) -> str:
        """A sha256 that differs whenever some text could get other ids."""
        raise NotImplementedError

    def spec(self) -> "TokenizerSpec":
        """The spec that made it."""
        raise NotImplementedError

    def save(self, folder: Path | str) -> None:
        """Write the whole tokenizer into `folder`; `load_tokenizer(folder)` needs nothing else."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spec = self.spec()
        record = {
            "kind": tokenizers.name_of(spec),
            "spec": dataclasses.asdict(spec),
            "fingerprint": self.fingerprint(),
            **self._payload(),
        }
        # Under another name first: a killed run never leaves half a tokenizer behind.
        part = folder / (META + ".part")
        part.write_text(json.dumps(record, ensure_ascii=True, indent=1), encoding="utf-8")
        part.replace(folder / META)

    def _payload(self) -> dict[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """How to make a tokenizer: the config, before the training text is seen."""

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer of this spec for these (training) documents; same texts, same tokenizer."""
        raise NotImplementedError

    def _load(self, record: dict[str, Any]) -> Tokenizer:
        raise NotImplementedError


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer saved in `folder`.

    Raises:
        InputError: nothing saved there, or the file is damaged.
    """
    path = Path(folder) / META
    if not path.is_file():
        raise InputError(f"no tokenizer in {folder}: {META} is missing there")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kind, fields, print_ = record["kind"], record["spec"], record["fingerprint"]
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} is not a saved tokenizer ({type(e).__name__}: {e})") from None
    cls = tokenizers[kind]
    try:
        tokenizer = cls(**fields)._load(record)
    except InputError:
        raise
    except Exception as e:  # whatever a damaged file makes of the parser
        raise InputError(f"{path} is damaged ({type(e).__name__}: {e})") from None
    if tokenizer.fingerprint() != print_:
        raise InputError(f"{path} is damaged: its content does not match its own fingerprint")
    return tokenizer


def digest(*parts: bytes | str) -> str:
    """sha256 over the parts, each preceded by its length, so that no two lists collide."""
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()
