"""The paper contract: settings that run and hand back evidence, claim by claim.

    @papers.register("titans")                      # the name of its specification card
    @dataclass(frozen=True)
    class Titans(Paper):                            # its fields are the settings of the small run
        title: ClassVar = "Titans: Learning to Memorize at Test Time"
        arxiv: ClassVar = "2501.00663"
        claims: ClassVar = ("what the paper says, in short", ...)
        steps: int = 400

        def run(self, report): ...                  # -> Evidence

A module of this folder is imported for `reproduce --list` too: at its top it imports jax, flax and
the light parts of causal_jax; what is heavy or optional is imported where it is used. (Annotate
`-> "Titans"`, not `Self`: the shape checks of the tests do not know it.)
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from causal_jax.errors import InputError
from causal_jax.registry import Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

papers = Registry("paper", "causal_jax.papers")


@dataclasses.dataclass(frozen=True)
class Row:
    """One claim, measured.

    Attributes:
        claim: what the paper says, in a few words.
        metric: what was measured, with its unit.
        measured: the figure that is held against the threshold.
        threshold: from the card; (low, high) where `better` is "in".
        better: how `measured` must stand to `threshold`.
        paper: the paper's own figure, as text.
        baseline: the figure of what it is compared with.
        per_seed: the figure of each seed, seed 0 first; empty where there are no seeds.
        note: what a reader must know to judge it.
    """

    claim: str
    metric: str
    measured: float
    threshold: float | tuple[float, float]
    better: Literal[">=", "<=", "in"] = ">="
    paper: str = ""
    baseline: float | None = None
    per_seed: tuple[float, ...] = ()
    note: str = ""

    def __post_init__(self):
        if isinstance(self.threshold, tuple) != (self.better == "in"):
            raise ValueError(f"{self.claim}: a (low, high) threshold goes with better='in' only")

    @classmethod
    def of_seeds(
        cls,
        claim: str,
        metric: str,
        values: Any,
        threshold: float | tuple[float, float],
        better: Literal[">=", "<=", "in"] = ">=",
        *,
        by: Literal["worst", "mean", "median"] = "worst",
        **rest: Any,
    ) -> "Row":
        """A row of one value per seed, judged by the worst of them (or their mean, or median)."""
        seeds = tuple(float(v) for v in values)
        if by == "worst":
            reduce: Callable = {">=": min, "<=": max, "in": _farthest(threshold)}[better]
        else:
            reduce = {"mean": np.mean, "median": np.median}[by]
        bad = [v for v in seeds if not math.isfinite(v)]  # min and max pass over a NaN
        measured = float(bad[0] if bad else reduce(seeds))
        return cls(claim, metric, measured, threshold, better, per_seed=seeds, **rest)

    @property
    def holds(self) -> bool:
        """Whether the figure meets the threshold; a NaN never does."""
        return self._meets(self.measured)

    @property
    def failed(self) -> tuple[int, ...]:
        """The seeds whose own figure does not meet the threshold."""
        return tuple(i for i, v in enumerate(self.per_seed) if not self._meets(v))

    def _meets(self, value: float) -> bool:
        if isinstance(self.threshold, tuple):
            return bool(self.threshold[0] <= value <= self.threshold[1])
        return bool(value >= self.threshold if self.better == ">=" else value <= self.threshold)


def _farthest(band: float | tuple[float, float]) -> Callable[[Sequence[float]], float]:
    """The value that lies worst with respect to a (low, high) band."""
    low, high = band if isinstance(band, tuple) else (band, band)
    return lambda values: max(values, key=lambda v: max(low - v, v - high))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a run found.

    Attributes:
        rows: the claims, measured.
        plots: names of the pictures that `report.figure` wrote.
        figures: further numbers worth keeping (JSON values).
    """

    rows: tuple[Row, ...]
    plots: tuple[str, ...] = ()
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(row.holds for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Paper:
    """Base of every entry. Defaults are the small setting: two CPU cores, mostly under 5 minutes.

    Attributes:
        seeds: how many independent runs, seeds 0, 1, ..., seeds - 1.
    """

    seeds: int = 3

    title: ClassVar[str]
    arxiv: ClassVar[str]
    claims: ClassVar[tuple[str, ...]]
    missing: ClassVar[tuple[str, ...]] = ()  # claims not built yet: the entry works only partly

    def __post_init__(self):
        self.need(self.seeds >= 1, "seeds", "at least 1")

    @classmethod
    def small(cls) -> "Paper":
        """The setting of `reproduce NAME`."""
        return cls()

    @classmethod
    def full(cls) -> "Paper":
        """The setting of `reproduce NAME --full`: the paper's sizes, as far as they can be had."""
        raise InputError(f"{papers.name_of(cls)} has no --full setting")

    @classmethod
    def smoke(cls) -> "Paper":
        """Everything runs, in seconds, on sizes too small for the claims to be expected to hold."""
        return cls.small()

    def run(self, report: "Report") -> Evidence:
        """Measure every claim."""
        raise NotImplementedError

    def need(self, ok: bool, field: str, remedy: str) -> None:
        """Refuse a setting: `InputError` naming the field and its value unless `ok`."""
        if not ok:
            raise InputError(f"{field} = {getattr(self, field)!r}: expected {remedy}")


class Report:
    """Where a run writes: progress, pictures, and finished stages, so that it can be continued.

    This base keeps stages in memory and pictures nowhere; `causal_jax.reproduce` has the one that
    writes into a folder.
    """

    def __init__(self):
        self._stages: dict[str, dict[str, np.ndarray]] = {}

    def progress(self, fraction: float, text: str = "") -> None:
        """How much of the whole run is done, in [0, 1], and what comes now."""

    def log(self, text: str) -> None:
        """A line for the reader."""

    def figure(self, name: str, figure: "Figure") -> str:
        """Keep a picture; returns the name of its file, for `Evidence.plots`."""
        return f"{name}.png"

    def stage(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The arrays that `compute()` returns; a run that is continued finds them instead.

        Args:
            name: unique in this entry; with one stage per seed, the seed is part of it.
            compute: makes {name: array}; called only where the stage is not there yet.
        """
        if name not in self._stages:
            self._stages[name] = {k: np.asarray(v) for k, v in compute().items()}
        return self._stages[name]


def require(module: str, command: str) -> None:
    """Refuse to start without an optional dependency: `InputError` with the command to install it.

    >>> require("json", "never needed")
    """
    if importlib.util.find_spec(module) is None:
        raise InputError(f"this needs {module}, which is not installed: {command}")
