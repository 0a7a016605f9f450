"""Checkpoints: the whole state of a run, written beside the training and read back exactly.

    checkpoints/<step>/   params   ema (if averaged)   train (optimizer, step)      orbax v1 (OCDBT)
                          _CHECKPOINT_METADATA: the caller's `meta` and a checksum of every part

A checkpoint is written under another name and renamed when complete, so a killed process or a full
disk costs the checkpoint in the making and nothing else. Arrays are stored under their names
(`causal_jax/paths.py`), not under the classes that held them, so what is read back does not depend
on the versions of the libraries that wrote it. They are read onto whatever mesh the reader has.

Where arrays lie in the host's memory, saving copies them and all else is done by a thread that
gives way to training. From an accelerator, or with several processes, orbax moves them to the host
before `save` returns, and writes them in threads of its own.
"""

import concurrent.futures
import contextlib
import errno
import gc
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.paths import named_leaves

_UNFINISHED = ".orbax-checkpoint-tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unreadable(Exception):
    """A checkpoint is there but cannot be read."""


class Store:
    """The checkpoints of one run.

    Args:
        folder: `<run>/checkpoints`.
        keep: newest checkpoints that stay.
        keep_best: checkpoints with the lowest `meta["validation"]` that stay besides.
        say: where to report what is noteworthy (a line at a time).
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep: int = 2,
        keep_best: int = 1,
        say: Callable[[str], None] = print,
    ):
        self.folder = Path(folder).absolute()  # orbax takes no relative paths
        self.keep, self.keep_best, self.say = keep, keep_best, say
        self._saving: tuple[int, Callable[[], Any]] | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "save", _give_way)
        # orbax logs whole tracebacks of what is raised here as well
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    # reading

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal())

    def meta(self, step: int) -> dict[str, Any]:
        """What the writer said about a checkpoint.

        Raises:
            Unreadable: it cannot be read.
        """
        path = self.folder / str(step) / "_CHECKPOINT_METADATA"
        try:
            return json.loads(json.loads(path.read_text())["custom_metadata"]["meta"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise Unreadable(f"its description is missing or damaged ({_brief(e)})") from e

    def find(self, which: str | int = "latest") -> int:
        """The step of "latest", "best" (lowest validation loss) or a given step.

        Raises:
            InputError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise InputError(f"{self.folder} holds no checkpoint: has the run saved one yet?")
        if which == "latest":
            return steps[-1]
        if which == "best":
            losses = self._losses()
            if not losses:
                raise InputError(
                    f"no checkpoint in {self.folder} has a validation loss: use latest"
                )
            return min(losses, key=lambda s: losses[s])
        if not str(which).isdecimal() or int(which) not in steps:
            known = ", ".join(map(str, steps))
            raise InputError(f"checkpoint {which!r}: use latest, best or one of the steps {known}")
        return int(which)

    def load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Read parts of a checkpoint.

        Args:
            step: which.
            abstract: {part: tree of ShapeDtypeStruct, with shardings to read onto} for some of the
                parts "params", "ema", "train".

        Raises:
            Unreadable: missing, damaged, or of other shapes.
        """
        from orbax.checkpoint import v1 as ocp

        meta = self.meta(step)
        wanted = {part: named_leaves(tree) for part, tree in abstract.items()}
        got, fault = {}, ""
        with warnings.catch_warnings():
            # a failed load leaves coroutines behind, which say so when they are collected
            warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
            try:
                got = ocp.load_checkpointables(str(self.folder / str(step)), wanted)
            except Exception as e:  # orbax and the layers below raise many kinds
                fault = _brief(e)
            if fault:
                gc.collect()
                raise Unreadable(f"missing or damaged data ({fault})")
        out = {}
        for part, target in wanted.items():
            for name, leaf in target.items():
                found = got[part][name]
                if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
                    raise Unreadable(
                        f"{part}/{name} is {found.dtype}{found.shape} there, "
                        f"{leaf.dtype}{leaf.shape} in this model"
                    )
            if int(checksum(got[part])) != meta["checksums"][part]:
                raise Unreadable(f"the data of {part} is not what was written (checksum)")
            leaves = [got[part][name] for name in target]
            out[part] = jax.tree.unflatten(jax.tree.structure(abstract[part]), leaves)
        return out

    def restore(self, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest readable state, or None where no checkpoint was ever made.

        Damaged checkpoints newer than it are reported and set aside as `damaged-<step>`.

        Raises:
            InputError: there are checkpoints, and none can be read.
        """
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                parts, meta = self.load(step, _parts(abstract)), self.meta(step)
            except Unreadable as e:
                faults[step] = str(e)
                self.say(f"checkpoint {step} cannot be read: {e}")
                continue
            for bad in faults:
                self._set_aside(bad)
            if faults:
                self.say(f"going on from checkpoint {step} instead")
            return _state(parts), meta
        if faults:
            lines = "; ".join(f"step {s}: {why}" for s, why in faults.items())
            raise InputError(
                f"none of the checkpoints in {self.folder} can be read ({lines}). Delete that "
                "folder to begin again, or choose another --config.workdir"
            )
        return None

    # writing

    def clean(self) -> None:
        """Remove what an interrupted process left unfinished. Only the process that trains may."""
        if jax.process_index() == 0 and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.endswith((_UNFINISHED, ".deleting")):
                    shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write a checkpoint in the background; the state may be donated as soon as this returns.

        An earlier one still being written is waited for; a step that is already there is left.

        Raises:
            InputError: the disk is full (then, or found so by the earlier one).
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        if step in self.steps():
            return
        parts = {name: named_leaves(tree) for name, tree in _parts(state).items()}
        with self._explained(step):
            self.folder.mkdir(parents=True, exist_ok=True)
            if _in_host_memory(parts):
                copies, sums = _copy(parts)

                def write():
                    self._write(ocp.save_checkpointables, step, copies, sums, meta)
                    self._prune()

                self._saving = (step, self._writer.submit(write).result)
            else:
                sums = {name: checksum(part) for name, part in parts.items()}
                job = self._write(ocp.save_checkpointables_async, step, parts, sums, meta)

                def finish():
                    job.result()
                    self._prune()

                self._saving = (step, finish)

    def _write(self, how: Callable, step: int, parts: Any, sums: Any, meta: dict) -> Any:
        from orbax.checkpoint import v1 as ocp

        sums = {name: int(total) for name, total in sums.items()}
        text = json.dumps(meta | {"step": step, "checksums": sums})
        # compressing float32 weights takes 40 % of the time and saves 8 % of the bytes
        saving = ocp.options.ArrayOptions.Saving(use_compression=False)
        with ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving)):
            return how(str(self.folder / str(step)), parts, custom_metadata={"meta": text})

    def wait(self) -> None:
        """Until nothing is being written; then remove what need not be kept.

        Raises:
            InputError: the disk is full; complete checkpoints are untouched.
        """
        if self._saving is None:
            return
        (step, finish), self._saving = self._saving, None
        with self._explained(step):
            finish()

    def _prune(self) -> None:
        if jax.process_index() != 0:
            return
        steps, losses = self.steps(), self._losses()
        best = sorted(losses, key=lambda s: losses[s])[: self.keep_best]
        for step in set(steps) - set(steps[-self.keep :]) - set(best):
            path = self.folder / str(step)
            # First renamed: a deletion cut short must not look like a damaged checkpoint.
            shutil.rmtree(path.rename(path.with_name(f"{step}.deleting")), ignore_errors=True)

    def _losses(self) -> dict[int, float]:
        losses = {}
        for step in self.steps():
            with contextlib.suppress(Unreadable):
                loss = self.meta(step).get("validation")
                if loss is not None and math.isfinite(loss):
                    losses[step] = loss
        return losses

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self.folder / f"damaged-{step}"
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / str(step)).rename(target)
            self.say(f"set aside as {target}")

    @contextlib.contextmanager
    def _explained(self, step: int):
        """Turn a full disk into the user's error, with what is left and what to do."""
        try:
            yield
        except Exception as e:
            reason = storage_fault(e)
            if reason is None:
                raise
            _expect_late_answers()
            for path in self.folder.glob(f"{step}*{_UNFINISHED}"):
                shutil.rmtree(path, ignore_errors=True)
            left = self.steps()
            kept = (
                f"checkpoint {left[-1]} is complete" if left else "no checkpoint was complete yet"
            )
            raise InputError(
                f"checkpoint {step} could not be written to {self.folder}: {reason}; {kept}. "
                "Make room there (or set another --config.workdir) and run the same command again"
            ) from e


def _in_host_memory(parts: dict[str, Any]) -> bool:
    """Whether a copy costs no memory of an accelerator, and no other process takes part."""
    devices = {d for leaf in jax.tree.leaves(parts) for d in leaf.devices()}
    return jax.process_count() == 1 and all(d.platform == "cpu" for d in devices)


@jax.jit
def _copy(parts: dict[str, dict[str, jax.Array]]) -> tuple[Any, dict[str, jax.Array]]:
    """Copies that nobody gives away, and their checksums."""
    sums = {name: checksum(part) for name, part in parts.items()}
    return jax.tree.map(jnp.copy, parts), sums


def _give_way() -> None:
    """Let other threads go first; those started from here on inherit it (Linux)."""
    if sys.platform == "linux":  # elsewhere a thread's number may be another process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def checksum(leaves: dict[str, jax.Array]) -> jax.Array:
    """A uint32 over all bits of named arrays; the same however they are spread over devices."""
    return _checksum([leaves[name] for name in sorted(leaves)])


@jax.jit
def _checksum(leaves: list[jax.Array]) -> jax.Array:
    # Integer sums wrap and commute, so the order of the devices does not matter.
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
    total = jnp.zeros((), jnp.uint32)
    for i, x in enumerate(leaves):
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        bits = jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize])
        total = total * jnp.uint32(31) + jnp.sum(bits, dtype=jnp.uint32) + jnp.uint32(i)
    return total


def storage_fault(error: BaseException | None) -> str | None:
    """What the file system refused, in words, or None if that is not what happened."""
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        found = re.search(r"os_error_code='(\d+)'", str(error))
        code = int(found[1]) if found else code
        if code in _FULL:
            return "the disk is full (or a quota is used up)"
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            return "writing there is not allowed"
        error = error.__cause__ or error.__context__
    return None


def _expect_late_answers() -> None:
    """Writes under way when one failed report to an event loop that is gone: say nothing of it."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook


def check_space(folder: Path, size: int) -> None:
    """Refuse to begin where not even one checkpoint of `size` bytes fits."""
    free = shutil.disk_usage(folder).free
    if jax.process_index() == 0 and free < size:
        raise InputError(
            f"workdir {folder} has {free / 2**20:.1f} MiB free, one checkpoint needs about "
            f"{size / 2**20:.1f} MiB: make room, or choose another --config.workdir"
        )


def _parts(state: dict[str, Any]) -> dict[str, Any]:
    """A state as checkpoint parts: what a reader of the model wants, and the rest."""
    parts = {name: state[name] for name in ("params", "ema") if name in state}
    return parts | {"train": {k: v for k, v in state.items() if k not in parts}}


def _state(parts: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in parts.items() if k != "train"} | parts["train"]


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}{'...' if len(text) > 120 else ''}"
