"""The folder of a run: settings, finished stages, plots, evidence.

settings.json        what is run           stages/NAME.npz      finished stages
evidence.json        what was found        *.png                plots

Every file is replaced in one move: one that is there is whole.
"""

import contextlib
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from causal_jax.config import differences, to_json
from causal_jax.errors import InputError
from causal_jax.papers import Evidence, Paper, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path("runs/reproduce")

Record = dict[str, Any]  # the contents of evidence.json


class RunFolder(Report):
    """A `Report` that writes into a folder.

    Args:
        out: the folder; made when it is opened.
        name: the entry's name.
    """

    out: Path

    def __init__(self, out: Path, name: str):
        super().__init__()
        self.out, self.name = Path(out), name
        self._begun = _clocks()
        self._mark: tuple[float, float] | None = None  # (time, fraction) the ETA counts from
        self._reused = np.zeros(2)  # seconds that the stages found here once took, both clocks
        self._said = -math.inf

    @contextlib.contextmanager
    def opened(self, settings: Paper, *, fresh: bool) -> Iterator[None]:
        """Hold the folder for a run with these settings.

        Raises:
            InputError: it belongs to something else, to a run with other settings, or another
                process is at work in it.
        """
        from causal_jax.training.folder import locked

        path = self.out / "settings.json"
        if not path.exists() and any(self.out.glob("[!.]*")):
            raise InputError(
                f"--out {self.out} holds other files and no settings.json, so it is not the "
                "folder of a run; give an empty or new one"
            )
        with locked(self.out, option="--out"):
            if fresh:
                self._clear()
            if path.exists():
                self._check_same(path, settings)
            else:
                _write(path, _text({"name": self.name, "settings": to_json(settings)}))
            yield

    def record(self) -> Record | None:
        """The evidence of a finished run, or None."""
        return read_record(self.out)

    def finish(self, settings: Paper, evidence: Evidence) -> Record:
        """Write evidence.json; returns what it holds."""
        from causal_jax.environment import environment

        rows = [
            {
                "claim": r.claim,
                "metric": r.metric,
                "paper": r.paper,
                "baseline": r.baseline,
                "threshold": r.threshold,
                "better": r.better,
                "measured": r.measured,
                "per_seed": r.per_seed,
                "failed": r.failed,
                "note": r.note,
                "holds": r.holds,
            }
            for r in evidence.rows
        ]
        seconds, cpu = _clocks() - self._begun + self._reused
        record = {
            "name": self.name,
            "title": settings.title,
            "arxiv": settings.arxiv,
            "missing": settings.missing,
            "holds": evidence.holds,
            "rows": rows,
            "plots": evidence.plots,
            "figures": evidence.figures,
            "seconds": round(float(seconds), 1),
            "cpu_seconds": round(float(cpu), 1),  # of all cores; a busy machine changes it little
            "settings": to_json(settings),
            "env": environment(),
        }
        _write(self.out / "evidence.json", _text(_plain(record)))
        return json.loads((self.out / "evidence.json").read_text())

    def progress(self, fraction: float, text: str = "") -> None:
        now = time.perf_counter()
        if self._mark is None:
            self._mark = now, fraction
        if now - self._said < 1.0 and fraction < 1.0:
            return
        self._said = now
        since, done = now - self._mark[0], fraction - self._mark[1]
        left = f", about {_time(since * (1 - fraction) / done)} left" if done > 0 else ""
        self.log(f"[{100 * fraction:3.0f} %] {text} ({_time(now - self._begun[0])}{left})")

    def log(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def figure(self, name: str, figure: "Figure") -> str:
        part = self.out / f"{name}.png.part"
        figure.savefig(part, dpi=130, format="png")
        part.replace(self.out / f"{name}.png")
        return f"{name}.png"

    def stage(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        if name in self._stages:
            return self._stages[name]
        path = self.out / "stages" / f"{name}.npz"
        found = _read_stage(path)
        if found is None:
            begun = _clocks()
            found = {k: np.asarray(v) for k, v in compute().items()}
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            with part.open("wb") as f:
                np.savez(f, allow_pickle=False, **found, _seconds=_clocks() - begun)
            part.replace(path)
        else:
            self._reused = self._reused + found.pop("_seconds")
            self._mark = None  # what is found here costs no time: the estimate begins anew
            self.log(f"{name}: found finished in {path.parent}")
        self._stages[name] = found
        return found

    def _check_same(self, path: Path, settings: Paper) -> None:
        try:
            saved = json.loads(path.read_text())
            name, there = saved["name"], saved["settings"]
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise InputError(f"{path} cannot be read ({e}); --fresh begins anew") from e
        if name != self.name:
            raise InputError(f"--out {self.out} is the folder of a run of {name}; give another one")
        found = differences(there, json.loads(json.dumps(to_json(settings))))
        if found:
            lines = "\n".join(f"  {f}: the run there has {a}, now {b}" for f, a, b in found)
            raise InputError(
                f"--out {self.out} is the folder of a run with other settings:\n{lines}\n"
                "Give another --out, or --fresh to begin anew"
            )

    def _clear(self) -> None:
        names = ("settings.json", "evidence.json", "*.png", "*.part", "stages/*.npz")
        for pattern in (*names, "stages/*.part"):
            for path in self.out.glob(pattern):
                path.unlink()


def read_record(folder: Path) -> Record | None:
    """evidence.json of a folder, or None where there is none.

    Raises:
        InputError: it is there and not readable.
    """
    path = folder / "evidence.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read ({e}); --fresh measures again") from e


def _read_stage(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as f:
            return dict(f)
    except (OSError, ValueError, zipfile.BadZipFile):  # not there, or not whole
        return None


def _plain(value: Any) -> Any:
    """Arrays and tuples as lists, numbers that JSON has not as text ("nan", "inf")."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, str | bool | int | None):
        return value
    array = np.asarray(value)
    if array.ndim:
        return _plain(array.tolist())
    number = array.item()
    return number if not isinstance(number, float) or math.isfinite(number) else str(number)


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


def _clocks() -> np.ndarray:
    """Seconds on the wall, and of work by all cores together."""
    return np.array([time.perf_counter(), time.process_time()])


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
