"""The run folder: one run, one folder, one process that writes to it.

config.json      the resolved recipe            tokenizer/       saved by the data
checkpoints/     the state (orbax)              metrics.jsonl    one record per report
log.txt          what was printed               loss.png         drawn at the end
starts.jsonl     every start: from which step, seed, devices, versions, commit, command
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from causal_jax.config import differences, from_json, to_json
from causal_jax.environment import environment
from causal_jax.errors import InputError
from causal_jax.training.recipe import MAY_CHANGE, Recipe


@contextlib.contextmanager
def locked(folder: Path, option: str = "--config.workdir") -> Iterator[None]:
    """Make the folder and hold it for this run; the hold ends with the process, however it ends.

    Args:
        folder: the run's.
        option: where the user chose it.

    Raises:
        InputError: it cannot be made or written to, or another run holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    except OSError as e:
        raise InputError(
            f"{option} {folder} cannot be written to ({e.strerror}); choose another {option}"
        ) from e
    with handle:
        _hold(handle, folder, option)
        yield


def _hold(handle: Any, folder: Path, option: str) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system: two runs in one folder are then the user's care
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        handle.seek(0)
        raise InputError(
            f"{option} {folder} is in use by another run ({handle.read().strip()}); wait for it, "
            f"stop it, or choose another {option}"
        ) from e
    except OSError:  # a file system without locks
        return
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {os.uname().nodename}")
    handle.flush()


def saved_config(folder: Path) -> dict[str, Any] | None:
    """The JSON of the recipe the run began with, or None where there is none.

    Raises:
        InputError: it is there and cannot be read.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(
            f"{path} cannot be read ({e}). It says what the checkpoints beside it are: put it "
            "back, or choose another --config.workdir"
        ) from e


def check_unchanged(recipe: Recipe, folder: Path) -> None:
    """Refuse to continue a run with another recipe, fields in `MAY_CHANGE` excepted.

    The saved recipe is read and written again first, so that a field which an older version did not
    have is compared by its default. What the data filled in (vocabulary, a task's length) counts as
    filled in again.

    Raises:
        InputError: naming every such field, both values and the remedy.
    """
    saved = saved_config(folder)
    if saved is None:
        raise InputError(
            f"{folder} holds checkpoints but no config.json, which says what they are: put it "
            "back, or choose another --config.workdir"
        )
    now = to_json(recipe)
    skip = [*MAY_CHANGE, *(["data.context"] if now["data"]["context"] == 0 else [])]
    found = [
        d
        for d in differences(to_json(from_json(saved)), now)
        if not any(d[0] == name or d[0].startswith(name + ".") for name in skip)
        and not (d[0].startswith("model.") and d[0].endswith("vocab") and d[2] == 0)
    ]
    if found:
        lines = "\n".join(f"  {f}: the run has {_short(a)}, now {_short(b)}" for f, a, b in found)
        raise InputError(
            f"the run in {folder} was begun with other settings:\n{lines}\nKeep the old values to "
            "continue it, or begin another run with --config.workdir NEW_FOLDER"
        )


def write_config(folder: Path, recipe: Recipe) -> None:
    """config.json, replaced in one move."""
    if jax.process_index() != 0:
        return
    part = folder / "config.json.part"
    part.write_text(json.dumps(to_json(recipe), indent=1) + "\n")
    part.replace(folder / "config.json")


def note_start(folder: Path, recipe: Recipe, step: int) -> None:
    """Add a line to starts.jsonl: what the numbers from `step` on depend on besides the recipe."""
    if jax.process_index() != 0:
        return
    record = {
        "step": step,
        "seed": recipe.seed,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "command": sys.argv,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **environment("flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    }
    with (folder / "starts.jsonl").open("a") as f:
        f.write(json.dumps(record) + "\n")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
