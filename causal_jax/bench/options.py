"""Command-line words: lists, whole numbers, names with a suggestion."""

import difflib
from collections.abc import Callable, Iterable

from causal_jax.errors import InputError


def words(text: str, option: str, everything: Callable[[], list[str]] | None = None) -> list[str]:
    """A comma-separated option; "all" stands for `everything()`."""
    if everything is not None and text == "all":
        return everything()
    found = [w.strip() for w in text.split(",") if w.strip()]
    if not found:
        raise InputError(f"--{option} {text!r}: expected at least one, separated by commas")
    return list(dict.fromkeys(found))


def positive(text: str, option: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--{option} {text!r}: expected whole numbers of at least 1")
    return int(text)


def pick(names: Iterable[str], known: Iterable[str], kind: str) -> None:
    """Refuse names that are not among the known ones, with the nearest."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")
