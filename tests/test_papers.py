"""Every entry keeps the contract: a recipe card, claims, and a smoke that runs end to end."""

import importlib
import json

import pytest

from causal_jax.papers import Report, papers
from causal_jax.papers._catalogue import OWN, SYSTEMS
from causal_jax.reproduce.folder import RunFolder

NAMES = papers.names()
# many models, each a program of its own: minutes of compiling
SLOW = (
    "abrupt_icl", "causalmm", "context_awareness", "contextual_memory_reweaving", "gam",
    "hyper_attention", "icl_linear_regression", "lawcat", "leaf", "multihop_masking",
    "out_of_context_reasoning", "pine", "titans",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_entry_describes_itself(name):
    cls = papers[name]
    card = importlib.import_module(cls.__module__).__doc__ or ""
    assert cls.__module__ == f"causal_jax.papers.{name}"
    assert name in {*(s.name for s in SYSTEMS), *OWN}
    assert f"python -m causal_jax.reproduce {name}" in card
    assert cls.arxiv in card
    assert len(cls.claims) >= 1
    assert all(isinstance(c, str) and c for c in (*cls.claims, *cls.missing))
    assert cls.small() == cls()
    assert cls.small().seeds >= 1


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NAMES]
)
def test_the_entry_runs(name, tmp_path):
    settings = papers[name].smoke()
    folder = RunFolder(tmp_path / name, name)
    with folder.opened(settings, fresh=False):
        record = folder.finish(settings, settings.run(folder))
    assert len(record["rows"]) >= 1
    for row in record["rows"]:
        assert row["claim"]
        assert row["metric"]
    assert record["plots"]
    for plot in record["plots"]:
        assert (tmp_path / name / plot).stat().st_size > 1000

    # continued from its stages the run finds the same, and computes none of them again
    again = RunFolder(tmp_path / name, name)
    with again.opened(settings, fresh=False):
        evidence = settings.run(again)
    assert [row.measured for row in evidence.rows] == pytest.approx(
        [float(row["measured"]) for row in record["rows"]], nan_ok=True
    )


def test_a_report_without_a_folder_keeps_stages_in_memory():
    report, calls = Report(), []
    for _ in range(2):
        found = report.stage("a", lambda: calls.append(1) or {"x": 3})
    assert (found["x"].item(), calls) == (3, [1])
    json.dumps(found["x"].item())
