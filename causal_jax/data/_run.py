"""What a run folder remembers of its data, so that a resumed run goes on with the same."""

import json
from collections.abc import Callable
from pathlib import Path

from causal_jax.data.sources._base import Source
from causal_jax.data.tokenizers._base import Tokenizer, TokenizerSpec, load_tokenizer
from causal_jax.errors import InputError

RECORD = "data.json"


def check_source(folder: Path | None, source: Source, fingerprint: str) -> None:
    """Refuse text that is not what the run in `folder` began with."""
    if folder is None or not (folder / RECORD).is_file():
        return
    try:
        began = str(json.loads((folder / RECORD).read_text())["source"])
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{folder / RECORD} is damaged ({type(e).__name__}: {e}); delete it to go on "
            "without the check that the data is what the run began with"
        ) from None
    if began != fingerprint:
        raise InputError(
            f"data.source = {source}: its content is not what the run in {folder} began "
            f"with (sha256 {began[:12]} then, {fingerprint[:12]} now); put the old text back, or "
            "begin a new run in another folder"
        )


def run_tokenizer(
    folder: Path | None, spec: TokenizerSpec, given: Tokenizer | None, make: Callable[[], Tokenizer]
) -> Tokenizer:
    """The tokenizer of the run in `folder`, if it has one: then no other will do.

    Without one it is the given tokenizer, or else the one that `make` makes of `spec`.
    """
    if folder is None or not (folder / "tokenizer").is_dir():
        return make() if given is None else given
    saved = load_tokenizer(folder / "tokenizer")
    if given is None:
        same, wanted = saved.spec() == spec, str(spec)
    else:
        same, wanted = given.fingerprint() == saved.fingerprint(), f"another {given.spec()}"
    if not same:
        raise InputError(
            f"data.tokenizer is {wanted}, but the run in {folder} began with {saved.spec()}; keep "
            "that, or begin a new run in another folder"
        )
    return saved


def remember(folder: Path, source: Source, fingerprint: str, tokenizer: Tokenizer) -> None:
    """Write tokenizer and fingerprints into the run folder."""
    record = {"source": fingerprint, "tokenizer": tokenizer.fingerprint(), "from": repr(source)}
    part = folder / (RECORD + ".part")
    try:
        tokenizer.save(folder / "tokenizer")
        part.write_text(json.dumps(record, indent=1))
        part.replace(folder / RECORD)
    except OSError as e:
        raise InputError(
            f"the run folder {folder} cannot be written ({e.strerror or e}); give "
            "another, or make room"
        ) from None
