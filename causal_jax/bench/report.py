"""What a benchmark leaves behind: an aligned table, JSON lines, plots."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from causal_jax.errors import InputError

Record = dict[str, Any]
UNSTEADY = 0.3  # a spread above which medians are not to be trusted


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under their headings: the first column flush left, the others flush right."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def add_ratios(records: Sequence[Record], baselines: Sequence[str]) -> None:
    """Write `faster_than` into the records: {baseline: its median / own median}.

    `faster_than_by_min` is the same of the smallest samples, which a busy machine disturbs less.
    """
    timed = {r["name"]: r for r in records if "median_s" in r}
    for name, r in timed.items():
        others = {b: timed[b] for b in baselines if b in timed and b != name}
        r["faster_than"] = {b: o["median_s"] / r["median_s"] for b, o in others.items()}
        r["faster_than_by_min"] = {b: o["min_s"] / r["min_s"] for b, o in others.items()}


def case_table(records: Sequence[Record], baselines: Sequence[str]) -> str:
    """The records of one case as text; below, who did not serve and why."""
    timed = [r for r in records if "median_s" in r]
    present = [b for b in baselines if any(r["name"] == b for r in timed)]
    optional: list[tuple[str, str, Callable[[Any], str]]] = [
        ("GFLOP/s", "flops_per_s", lambda x: f"{x / 1e9:.1f}"),
        ("of matmul", "of_matmul", lambda x: f"{100 * x:.0f} %"),
        ("tokens/s", "tokens_per_s", lambda x: f"{x:,.0f}"),
        ("max diff", "max_diff", lambda x: f"{x:.0e}"),
        ("peak MiB", "rss_bytes", mib),
    ]
    shown = [o for o in optional if any(r.get(o[1]) is not None for r in timed)]
    columns = ["", "median ms", "min ms", "spread", "compile s", "temp MiB"]
    columns += [o[0] for o in shown] + [f"vs {b}" for b in present]
    rows = []
    for r in timed:
        row = [
            r["name"],
            milliseconds(r["median_s"]),
            milliseconds(r["min_s"]),
            f"{100 * r['spread']:.0f} %",
            f"{r['compile_s']:.2f}",
            mib(r["temp_bytes"]),
        ]
        row += ["-" if r.get(f) is None else show(r[f]) for _, f, show in shown]
        row += [f"{r['faster_than'][b]:.2f}x" if b in r["faster_than"] else "1" for b in present]
        rows.append(row)
    text = table(columns, rows) if rows else ""
    notes = [f"{r['name']}: {r['note']}" for r in records if r.get("note")]
    spread = max((r["spread"] for r in timed), default=0.0)
    if spread > UNSTEADY and present:
        ratios = (
            f"{r['name']} {x:.2f}x {b}"
            for r in timed
            if r["name"] not in present
            for b, x in r["faster_than_by_min"].items()
        )
        notes.append(
            f"unsteady machine (spread up to {100 * spread:.0f} %); by the smallest samples: "
            + ", ".join(ratios)
        )
    return "\n".join(filter(None, [text, *notes]))


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with three digits at least."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def mib(value: int | None) -> str:
    """Bytes as MiB."""
    return "-" if value is None else f"{value / 2**20:.1f}"


class Writer:
    """Appends records to `DIR/bench.jsonl`; without a folder it only keeps them."""

    def __init__(self, out: str | None, env: Record):
        self.env, self.records = env, []
        self.folder = None if out is None else Path(out)
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "bench.jsonl").open("a").close()
            except OSError as e:
                raise InputError(
                    f"--out {out}: cannot be written ({e.strerror}); give a folder of your own"
                ) from e

    def add(self, records: Sequence[Record]) -> None:
        """Keep the records of one case, and write them at once: a later failure loses nothing."""
        self.records += records
        if self.folder is not None:
            with (self.folder / "bench.jsonl").open("a") as f:
                for r in records:
                    f.write(json.dumps(r | {"env": self.env}) + "\n")


def proportionality(points: Sequence[tuple[float, float]]) -> Record | None:
    """Least squares y = intercept + slope x, and r2; None for fewer than three different x.

    `within`: the least p with all y inside (1 +- p) c x for one c; 0 is y = c x.
    """
    x, y = (np.array(c, np.float64) for c in zip(*points))
    if np.unique(x).size < 3:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    rest, total = np.sum((y - slope * x - intercept) ** 2), np.sum((y - y.mean()) ** 2)
    low, high = np.min(y / x), np.max(y / x)
    within = (high - low) / (high + low)
    return {"slope": slope, "intercept": intercept, "r2": 1 - rest / total, "within": within}


def plot_lines(
    path: Path,
    panels: dict[str, dict[str, list[tuple[float, float, str]]]],
    *,
    xlabel: str,
    log: bool,
    title: str,
    ylabel: str = "milliseconds",
) -> bool:
    """One PNG, one panel per key, one line per name through its points (x, y, label).

    Returns:
        False where no panel has two different x: nothing is drawn then.
    """
    panels = {
        name: lines
        for name, lines in panels.items()
        if len({x for pts in lines.values() for x, _, _ in pts}) > 1
    }
    if not panels:
        return False
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    names = list(dict.fromkeys(n for lines in panels.values() for n in lines))
    for ax in axes[len(panels) :]:
        ax.axis("off")
    for ax, (panel, lines) in zip(axes, panels.items()):
        for name, points in lines.items():
            points = sorted(points)
            colour = f"C{names.index(name) % 10}"
            ax.plot(*zip(*(p[:2] for p in points)), "o-", color=colour, label=name, linewidth=1)
        if log:
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
        else:
            ax.set_xlim(0, 1.15 * ax.get_xlim()[1])
            ax.set_ylim(bottom=0)
            for x, y, label in {p[2]: p for pts in lines.values() for p in pts}.values():
                ax.annotate(label, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        ax.set_title(panel, fontsize=9)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    return True
