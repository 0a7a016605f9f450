"""The folder of things made once: prepared datasets, trained tokenizers, tokens.

Everything in it can be deleted at any time; it is made again. A thing is written under a temporary
name and renamed when complete, so two processes that make the same thing at once both succeed, and
a killed one leaves nothing half done in place.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from causal_jax.errors import InputError

LAYOUT = "v1"  # another one whenever the code would make something else of the same name


def cache_folder() -> Path:
    """`$CAUSAL_JAX_CACHE`, or `~/.cache/causal_jax`."""
    return Path(os.environ.get("CAUSAL_JAX_CACHE") or Path.home() / ".cache" / "causal_jax")


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder `name`; when it is not there yet, `make(folder)` fills it first.

    Raises:
        InputError: the cache cannot be written (no permission, disk full).
    """
    final = cache_folder() / LAYOUT / name
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        part.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
    except OSError as e:
        raise _unwritable(e) from None
    try:
        make(part)
        try:
            part.rename(final)
        except OSError:
            if not final.is_dir():  # otherwise somebody else was first, with the same content
                raise
    except OSError as e:
        raise _unwritable(e) from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def _unwritable(e: OSError) -> InputError:
    return InputError(
        f"the cache folder {cache_folder()} cannot be used ({e.strerror or e}); "
        "set CAUSAL_JAX_CACHE to a folder with space that you may write"
    )
