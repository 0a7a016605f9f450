"""All evidence on one page, as Markdown and as HTML; the README's catalogue."""

import html
import shutil
from collections.abc import Sequence
from pathlib import Path

from causal_jax.errors import InputError
from causal_jax.reproduce.catalogue import (
    HEAD,
    KEPT,
    cells,
    entries,
    last,
    notes,
    readme_table,
    standing,
)
from causal_jax.reproduce.folder import Record

README = Path(__file__).parent.parent.parent / "README.md"
MARKS = ("<!-- catalogue: written by `reproduce report --keep` -->", "<!-- end of catalogue -->")

STYLE = """body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: .2em .6em }
th { text-align: left; background: #f4f4f4 }
img { max-width: 100% }"""


def write(runs: Path, out: Path, *, keep: bool) -> list[Path]:
    """Write report.md and report.html with the plots beside them.

    Args:
        runs: the folder that holds one folder per run.
        out: where the pages go.
        keep: also keep the evidence of these runs in the checkout and renew the README's table.

    Returns:
        the files written.
    """
    found = {e.name: r for e in entries() if (r := last(e.name, runs)) is not None}
    if not found:
        raise InputError(f"{runs} holds no evidence yet; run `reproduce NAME` or `--all` first")
    if keep:
        for name in found:
            _keep(runs / name, KEPT / name)
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {out} cannot be written ({e.strerror})") from e
    plots = {name: _plots(name, record, runs, out) for name, record in found.items()}
    (out / "report.md").write_text(_markdown(found, plots))
    (out / "report.html").write_text(_html(found, plots))
    written = [out / "report.md", out / "report.html"]
    if keep and README.exists():
        README.write_text(with_table(README.read_text()))
        written.append(README)
    return written


def with_table(readme: str) -> str:
    """The README's text with the catalogue between its marks renewed."""
    before, begin, rest = readme.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise InputError(f"README.md has no lines {MARKS[0]} and {MARKS[1]}")
    return f"{before}{begin}\n{readme_table()}\n{end}{after}"


def _keep(run: Path, kept: Path) -> None:
    """Evidence alone is kept in the checkout: plots are made again by the run."""
    if (run / "evidence.json").exists():
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / "evidence.json", kept / "evidence.json")


def _plots(name: str, record: Record, runs: Path, out: Path) -> list[str]:
    """Copy the plots of a run beside the pages; returns their addresses from there."""
    copied = []
    for plot in record["plots"]:
        if (runs / name / plot).exists():
            shutil.copyfile(runs / name / plot, out / "plots" / f"{name}-{plot}")
            copied.append(f"plots/{name}-{plot}")
    return copied


def _markdown(found: dict[str, Record], plots: dict[str, list[str]]) -> str:
    lines = ["# Evidence", ""]
    for name, record in found.items():
        lines += [f"## {name}: {standing(record)}", "", _source(record), ""]
        rows = [HEAD, ["---"] * len(HEAD), *cells(record)]
        lines += ["| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in rows]
        lines += ["", *(f"- {note}" for note in notes(record)), ""]
        lines += [f"![{name}]({plot})\n" for plot in plots[name]]
    return "\n".join(lines)


def _html(found: dict[str, Record], plots: dict[str, list[str]]) -> str:
    body = ["<h1>Evidence</h1>"]
    for name, record in found.items():
        body += [f"<h2>{name}: {standing(record)}</h2>", f"<p>{html.escape(_source(record))}</p>"]
        body.append("<table>" + _html_row("th", HEAD))
        body += [_html_row("td", row) for row in cells(record)]
        body.append("</table><ul>")
        body += [f"<li>{html.escape(note)}</li>" for note in notes(record)]
        body.append("</ul>")
        body += [f'<p><img src="{plot}" alt="{name}"></p>' for plot in plots[name]]
    head = f'<meta charset="utf-8"><title>causal_jax: evidence</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{chr(10).join(body)}</body></html>\n"


def _html_row(tag: str, row: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"


def _source(record: Record) -> str:
    return f"{record['title']} (arXiv {record['arxiv']})"
