"""Text of your own: a file, a folder, a pattern, or JSON lines; UTF-8, byte for byte."""

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from causal_jax.data.sources._base import Source, check_fraction, check_split, hold_out, sources
from causal_jax.errors import InputError

JSON_LINES = (".jsonl", ".ndjson")


@sources.register("text")
@dataclass(frozen=True)
class Text(Source):
    """Files read from a path; each file is a document, each line of a JSON-lines file is one.

    The texts are held in memory while they are being tokenised; training then reads the tokens
    from a memory-mapped file.

    Args:
        path: a file; a folder (all its files, sub-folders included, by sorted path, names that
            begin with a dot excepted); or a pattern such as "books/**/*.txt". Names ending in
            .jsonl or .ndjson are JSON lines.
        validation: held-out text, the same kinds of path; "" takes `held_out` of `path` instead.
        held_out: the last part of the bytes, in order, is held out; the document in which the cut
            falls is divided at the next line end. Not together with `validation`.
        field: the key of the text in JSON lines.
        pattern: which files of a folder ("*.md"; tried on the file's name).
    """

    path: str = ""
    validation: str = ""
    held_out: float = 0.1
    field: str = "text"
    pattern: str = "*"

    def __post_init__(self):
        check_fraction("Text.held_out", self.held_out)
        if self.validation and self.held_out != 0.1:
            raise InputError(
                f"Text.held_out is {self.held_out} and Text.validation is {self.validation!r}; "
                "give one of them"
            )

    def documents(self, split: str) -> Sequence[str]:
        check_split(split)
        if self.validation:
            name = "path" if split == "train" else "validation"
            return self._read(name, getattr(self, name))
        return hold_out(self._read("path", self.path), self.held_out)[split == "validation"]

    def _read(self, name: str, path: str) -> list[str]:
        texts: list[str] = []
        files = self._files(name, path)
        for file in files:
            if file.suffix in JSON_LINES:
                texts += json_lines(file, self.field)
            else:
                texts.append(decoded(content(file), str(file)))
        texts = [t for t in texts if t]
        if not texts:
            empty = "the file is" if len(files) == 1 else f"all {len(files)} files are"
            raise InputError(f"Text.{name} = {path!r}: {empty} empty; there is nothing to train on")
        return texts

    def _files(self, name: str, path: str) -> list[Path]:
        if not path:
            raise InputError(f"Text.{name} is empty; give a file, a folder or a pattern")
        place = Path(path).expanduser()
        if place.is_file():
            return [place]
        if place.is_dir():
            found = sorted(
                p
                for p in place.rglob(self.pattern)
                if p.is_file() and not any(s.startswith(".") for s in p.relative_to(place).parts)
            )
            if not found:
                raise InputError(f"Text.{name} = {path!r}: no file {self.pattern!r} in that folder")
            return found
        if glob.has_magic(path):
            found = [Path(p) for p in sorted(glob.glob(str(place), recursive=True))]
            found = [p for p in found if p.is_file()]
            if found:
                return found
            raise InputError(f"Text.{name} = {path!r}: no file matches the pattern")
        raise InputError(f"Text.{name} = {path!r}: there is no such file or folder")


def content(file: Path) -> bytes:
    """The bytes of a file, or an InputError with what the system says."""
    try:
        return file.read_bytes()
    except OSError as e:
        raise InputError(f"{file} cannot be read ({e.strerror or e})") from None


def decoded(data: bytes, where: str) -> str:
    """UTF-8 text of `data`, or an InputError naming file and offset of the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(
            f"{where}: not UTF-8 text: byte {e.start} is 0x{data[e.start]:02x}; convert the file "
            "to UTF-8, or leave it out (Text.pattern picks the files of a folder)"
        ) from None


def json_lines(file: Path, field: str) -> list[str]:
    """The texts under `field` of a JSON-lines file; blank lines are skipped."""
    texts = []
    # Cut at \n alone: str.splitlines would also cut at U+2028 inside a string.
    for number, line in enumerate(decoded(content(file), str(file)).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as e:
            raise InputError(f"{file}, line {number}: not JSON ({e})") from None
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            has = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
            raise InputError(
                f"{file}, line {number}: no text under {field!r} (the line has: {has}); "
                "set Text.field to the right key"
            )
        texts.append(value)
    return texts
