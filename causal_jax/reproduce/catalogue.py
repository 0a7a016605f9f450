"""What there is, and how it stands: the list, the table of a run, the table in the README."""

import dataclasses
import difflib
import itertools
import textwrap
from collections.abc import Mapping
from pathlib import Path

from causal_jax.bench.report import table as columns
from causal_jax.errors import InputError
from causal_jax.papers import papers
from causal_jax.papers._catalogue import SYSTEMS
from causal_jax.reproduce.folder import Record, read_record

KEPT = Path(__file__).parent.parent / "papers" / "_evidence"  # what the README's table shows

EXIT = {0: "holds", 1: "failed", 2: "not run: input", 3: "does not hold"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the catalogue.

    Attributes:
        name, title, arxiv: the system.
        state: "works", "partly" or "not yet".
        claims: what the paper says.
        missing: claims the entry does not measure yet.
    """

    name: str
    title: str
    arxiv: str
    state: str
    claims: tuple[str, ...]
    missing: tuple[str, ...] = ()


def entries() -> tuple[Entry, ...]:
    """Every system, sorted by name: those that are built describe themselves."""
    known = {s.name: Entry(s.name, s.title, s.arxiv, "not yet", (s.claim,)) for s in SYSTEMS}
    for name in papers.names():
        cls = papers[name]
        state = "partly" if cls.missing else "works"
        known[name] = Entry(name, cls.title, cls.arxiv, state, cls.claims, cls.missing)
    return tuple(known[name] for name in sorted(known))


def entry(name: str) -> str:
    """The name itself, where it can be run.

    Raises:
        InputError: not built yet, or unknown (with the nearest name).
    """
    if name in papers.names():
        return name
    names = [e.name for e in entries()]
    if name in names:
        raise InputError(f"{name} is not built yet (there are: {', '.join(papers.names())})")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"unknown system {name!r}{hint} (--list shows all {len(names)})")


def last(name: str, runs: Path | None) -> Record | None:
    """The evidence of the small setting: of the last run, else what the checkout keeps."""
    found = read_record(runs / name) if runs is not None else None
    if found is None and (KEPT / name).is_dir():
        found = read_record(KEPT / name)
    return found


def standing(record: Record | None) -> str:
    """`5 of 6 hold` of a record."""
    if record is None:
        return "-"
    rows = record["rows"]
    return f"{sum(r['holds'] for r in rows)} of {len(rows)} hold"


def listing(runs: Path) -> str:
    """The text of `--list`."""
    lines = []
    for e in entries():
        record = last(e.name, runs)
        when = f", {record['env']['time'][:10]}, {record['seconds']:.0f} s" if record else ""
        state = f"{e.state}: {standing(record)}{when}" if record else e.state
        lines.append(f"{e.name}  [arXiv {e.arxiv}]  {state}\n    {e.title}")
        lines += [f"    claim: {c}" for c in e.claims]
        lines += [f"    not measured yet: {c}" for c in e.missing]
        for r in record["rows"] if record else ():
            verdict = "holds" if r["holds"] else "DOES NOT HOLD"
            figure = f"{number(r['measured'])} (needs {threshold(r)})"
            lines.append(f"    {verdict}: {r['claim']}: {r['metric']} {figure}")
    states = [e.state for e in entries()]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("works", "partly", "not yet"))
    return "\n".join([*lines, f"{len(states)} systems: {counts}"])


HEAD = ("claim", "metric", "paper", "baseline", "threshold", "measured", "verdict")


def cells(record: Record) -> list[tuple[str, ...]]:
    """The rows of a record as text, under `HEAD`."""
    return [
        (
            r["claim"],
            r["metric"],
            r["paper"],
            "" if r["baseline"] is None else number(r["baseline"]),
            threshold(r),
            measured(r),
            "holds" if r["holds"] else "DOES NOT HOLD",
        )
        for r in record["rows"]
    ]


def notes(record: Record) -> list[str]:
    """What belongs below the table: remarks, failed seeds, what is not measured, the machine."""
    rows, env = record["rows"], record["env"]
    found = [f"{r['claim']}: {r['note']}" for r in rows if r["note"]]
    for r in rows:
        if r["failed"]:
            seeds = ", ".join(map(str, r["failed"]))
            found.append(f"{r['claim']}: seeds that miss the threshold: {seeds}")
    found += [f"not measured yet: {m}" for m in record["missing"]]
    work = f"{record['cpu_seconds']:.0f} s of CPU time, " if "cpu_seconds" in record else ""
    run = f"{record['seconds']:.0f} s ({work}load {env['load']}) on {env['cores']} x "
    run += f"{env['device']}, {env['time'][:10]}"
    return [*found, f"{run}, jax {env['jax']}, commit {env['commit']}"]


WIDTHS = (32, 28, 18, 8, 10, 24, 13)  # of the columns under `HEAD`


def table(record: Record) -> str:
    """A run as text: its rows, long cells wrapped, and what belongs below."""
    lines = []
    for row in (HEAD, ["-" * w for w in WIDTHS], *cells(record)):
        wrapped = [textwrap.wrap(cell, w) for cell, w in zip(row, WIDTHS, strict=True)]
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            padded = (part.ljust(w) for part, w in zip(parts, WIDTHS, strict=True))
            lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, "", *notes(record)])


def threshold(row: Mapping) -> str:
    """`>= 0.9`, or `0.8 .. 1.2` of a row."""
    if row["better"] == "in":
        return " .. ".join(number(x) for x in row["threshold"])
    return f"{row['better']} {number(row['threshold'])}"


def measured(row: Mapping) -> str:
    """The figure, with the number of seeds and their range."""
    seeds = [float(v) for v in row["per_seed"]]
    text = number(row["measured"])
    if not seeds:
        return text
    return f"{text} ({len(seeds)} seeds, {number(min(seeds))} .. {number(max(seeds))})"


def number(value: float | str) -> str:
    """Four digits at most."""
    return f"{float(value):.4g}"


def summary(runs: Path, codes: Mapping[str, int], suffix: str) -> str:
    """What `--all` did: name, outcome, claims that hold, seconds."""
    rows, total = [], 0.0
    for name, code in codes.items():
        record = read_record(runs / f"{name}{suffix}") if code in (0, 3) else None
        total += record["seconds"] if record else 0.0
        seconds = f"{record['seconds']:.0f}" if record else "-"
        rows.append((name, EXIT.get(code, f"exit {code}"), standing(record), seconds))
    return columns(("", "outcome", "claims", "seconds"), [*rows, ("all", "", "", f"{total:.0f}")])


def readme_table() -> str:
    """The catalogue in Markdown, what is built first; figures are those the checkout keeps."""
    lines = ["| name | paper | the claim | state | figures |", "|---|---|---|---|---|"]
    short = {s.name: s.claim for s in SYSTEMS}
    for e in sorted(entries(), key=lambda e: e.state == "not yet"):
        record = last(e.name, None)
        link = "-" if e.arxiv == "-" else f"[{e.arxiv}](https://arxiv.org/abs/{e.arxiv})"
        claim = short.get(e.name, e.claims[0])
        lines.append(f"| `{e.name}` | {link} | {claim} | {e.state} | {standing(record)} |")
    return "\n".join(lines)
