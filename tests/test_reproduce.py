"""The reproduce command: exit codes, folders, resuming, bad input, pages, the README's table."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest

from causal_jax import plots
from causal_jax.papers import Evidence, Paper, Row, papers, require
from causal_jax.papers._catalogue import SYSTEMS
from causal_jax.reproduce import catalogue, main, pages
from causal_jax.reproduce.folder import RunFolder

computed: list[str] = []  # stages that were really computed


@dataclasses.dataclass(frozen=True)
class Coin(Paper):
    """How often a coin shows heads; `stop` interrupts it before that seed."""

    sides: int = 2
    level: float = 0.4
    stop: ClassVar[int | None] = None

    title: ClassVar = "On coins"
    arxiv: ClassVar = "0000.00000"
    claims: ClassVar = ("a coin is fair",)

    @classmethod
    def full(cls):
        return cls(sides=4, level=0.2)

    def run(self, report):
        report.progress(0.0, "tossing")
        shares = []
        for seed in range(self.seeds):
            if seed == Coin.stop:
                raise KeyboardInterrupt
            shares.append(report.stage(f"seed_{seed}", lambda s=seed: self.toss(s))["share"])
        report.progress(1.0, "done")
        fig, (ax,) = plots.panels(1)
        plots.bars(ax, ["heads"], {"share": [np.mean(shares)]})
        row = Row.of_seeds("a coin is fair", "share of heads", shares, self.level, note="tossed")
        return Evidence((row,), (report.figure("share", fig),), {"shares": np.array(shares)})

    def toss(self, seed):
        computed.append(f"seed_{seed}")
        rng = np.random.default_rng(seed)
        return {"share": (rng.integers(0, self.sides, 1000) == 0).mean()}


@dataclasses.dataclass(frozen=True)
class Needy(Coin):
    """Needs what is not installed."""

    def run(self, report):
        require("no_such_module", "pip install 'causal_jax[nothing]'")
        return super().run(report)


@dataclasses.dataclass(frozen=True)
class Unwritable(Coin):
    """Finds something that evidence.json cannot hold."""

    def run(self, report):
        return Evidence((), (), {"what": object()})


@pytest.fixture(autouse=True)
def entries(monkeypatch):
    """Three entries more than there are."""
    papers.names()
    for name, cls in {"coin": Coin, "needy": Needy, "unwritable": Unwritable}.items():
        monkeypatch.setitem(papers._classes, name, cls)
    monkeypatch.setattr(Coin, "stop", None)
    computed.clear()


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command in a folder of its own: (exit code, stdout, stderr)."""

    def go(*words):
        try:
            code = main([*words, "--runs", str(tmp_path)])
        except SystemExit as e:  # argparse
            code = e.code
        text = capsys.readouterr()
        return code, text.out, text.err

    return go


def evidence(tmp_path, name="coin"):
    return json.loads((tmp_path / name / "evidence.json").read_text())


def test_a_claim_that_holds(run, tmp_path):
    code, out, err = run("coin")
    assert code == 0
    assert "holds" in out
    assert "DOES NOT HOLD" not in out
    assert "100 %" in err
    record = evidence(tmp_path)
    assert record["holds"] is True
    assert record["rows"][0]["per_seed"] == record["figures"]["shares"]
    assert len(record["figures"]["shares"]) == 3
    assert record["settings"]["sides"] == 2
    assert {"device", "jax", "commit", "time"} <= set(record["env"])
    assert (tmp_path / "coin" / "share.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.part"))


def test_a_claim_that_does_not_hold_names_the_seeds(run, tmp_path):
    code, out, _ = run("coin", "--set", "sides=10")
    assert code == 3
    assert "DOES NOT HOLD" in out
    assert "seeds that miss the threshold: 0, 1, 2" in out


def test_settings_change_the_run_and_its_folder(run, tmp_path):
    assert run("coin", "--seeds", "5", "--set", "level=0.1")[0] == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("coin-")
    assert len(evidence(tmp_path, folder.name)["rows"][0]["per_seed"]) == 5
    assert run("coin", "--full")[0] == 0
    assert evidence(tmp_path, "coin-full")["settings"]["sides"] == 4


def test_an_interrupted_run_continues(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Coin, "stop", 2)
    code, _, err = run("coin")
    assert code == 1
    assert "the same command continues" in err
    assert not (tmp_path / "coin" / "evidence.json").exists()
    assert computed == ["seed_0", "seed_1"]
    monkeypatch.setattr(Coin, "stop", None)
    # what was being written when the process died is not taken for a finished stage
    (tmp_path / "coin" / "stages" / "seed_1.npz").write_bytes(b"PK\x03\x04 half a file")
    computed.clear()
    assert run("coin")[0] == 0
    assert computed == ["seed_1", "seed_2"]
    whole = evidence(tmp_path)
    assert run("coin", "--fresh")[0] == 0
    assert evidence(tmp_path)["rows"] == whole["rows"]
    assert whole["seconds"] >= 0
    assert whole["cpu_seconds"] >= 0


def test_a_finished_run_is_shown_and_not_repeated(run):
    assert run("coin")[0] == 0
    computed.clear()
    code, out, _ = run("coin")
    assert (code, computed) == (0, [])
    assert "--fresh measures again" in out
    assert "share of heads" in out
    assert run("coin", "--fresh")[0] == 0
    assert computed == ["seed_0", "seed_1", "seed_2"]


def test_evidence_is_whole_or_not_there(run, tmp_path):
    code, _, err = run("unwritable")
    assert code == 1
    assert "TypeError" in err
    assert [p.name for p in (tmp_path / "unwritable").glob("evidence*")] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["titan"], "did you mean 'titans'?"),
        (["coins"], "unknown system 'coins'; did you mean"),
        (["coin", "--set", "sidez=3"], "unknown field set.sidez; did you mean set.sides?"),
        (["coin", "--set", "sides=many"], "set.sides = 'many': expected int"),
        (["coin", "--set", "sides"], "--set sides: expected SETTING=VALUE"),
        (["coin", "--seeds", "0"], "seeds = 0: expected at least 1"),
        (["needy"], "no_such_module, which is not installed: pip install 'causal_jax[nothing]'"),
        (["--list", "--seeds", "2"], "--seeds goes with a NAME"),
        (["--all", "--out", "x"], "--out goes with a NAME or report"),
        (["coin", "--keep"], "--keep goes with report"),
        (["--all", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["coin", "--all"], "give one of NAME, report, --list, --all"),
        ([], "give one of NAME, report, --list, --all"),
        (["report"], "holds no evidence yet"),
    ],
)
def test_bad_input_is_explained(run, words, message, monkeypatch, tmp_path):
    monkeypatch.setattr(catalogue, "KEPT", tmp_path / "none kept")
    code, _, err = run(*words)
    assert code == 2
    assert message in err
    assert computed == []


def test_an_entry_that_is_not_built_says_so(run):
    unbuilt = next(s.name for s in SYSTEMS if s.name not in papers.names())
    code, _, err = run(unbuilt)
    assert code == 2
    assert f"{unbuilt} is not built yet" in err


def test_the_folder_of_something_else_is_refused(run, tmp_path):
    out = str(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    code, _, err = run("coin", "--out", out, "--fresh")
    assert code == 2
    assert "holds other files and no settings.json" in err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_the_folder_of_another_run_is_refused(run, tmp_path):
    out = str(tmp_path / "one")
    assert run("coin", "--out", out)[0] == 0
    code, _, err = run("coin", "--out", out, "--set", "sides=3")
    assert code == 2
    assert "sides: the run there has 2, now 3" in err
    code, _, err = run("needy", "--out", out)
    assert code == 2
    assert "is the folder of a run of coin" in err
    assert run("coin", "--out", out, "--set", "sides=3", "--set", "level=0.1", "--fresh")[0] == 0


def test_two_runs_do_not_share_a_folder(run, tmp_path):
    with RunFolder(tmp_path / "coin", "coin").opened(Coin.small(), fresh=False):
        code, _, err = run("coin")
    assert code == 2
    assert "in use by another run" in err


def test_the_list_has_every_system(run, tmp_path):
    run("coin")
    code, out, _ = run("--list")
    assert code == 0
    for s in SYSTEMS:
        assert f"{s.name}  [arXiv {s.arxiv}]" in out
    assert "coin  [arXiv 0000.00000]  works: 1 of 1 hold" in out
    assert "holds: a coin is fair: share of heads" in out
    names = {s.name for s in SYSTEMS}
    built = [n for n in papers.names() if n in names]
    assert f"{len(names) - len(built)} not yet" in out


def test_the_catalogue_has_37_systems():
    assert len({s.name for s in SYSTEMS}) == len({s.arxiv for s in SYSTEMS}) == len(SYSTEMS) == 37
    known = {s.name: s for s in SYSTEMS}
    for name in set(papers.names()) & set(known):
        assert papers[name].arxiv == known[name].arxiv


def test_all_runs_each_and_skips_finished_ones(run, tmp_path, monkeypatch):
    real = [n for n in papers.names() if n in {s.name for s in SYSTEMS}][:3]  # a process each
    monkeypatch.setattr(papers, "_classes", {n: papers[n] for n in real})
    for i, name in enumerate(real):  # finished already: the commands show what is there
        row = Row("a claim", "a figure", 1.0 - 2.0 * (i == 0), 0.0)
        settings = papers[name].small()
        folder = RunFolder(tmp_path / name, name)
        with folder.opened(settings, fresh=False):
            folder.finish(settings, Evidence((row,)))
    code, out, _ = run("--all")
    assert code == 3
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "does not hold  0 of 1 hold" in lines[real[0]]
    for name in real[1:]:
        assert "holds  1 of 1 hold" in lines[name]


def test_the_report_shows_tables_and_plots(run, tmp_path):
    run("coin")
    code, out, _ = run("report", "--out", str(tmp_path / "pages"))
    assert code == 0
    for page in ("report.md", "report.html"):
        text = (tmp_path / "pages" / page).read_text()
        assert "share of heads" in text
        assert "plots/coin-share.png" in text
        assert page in out
    assert (tmp_path / "pages" / "plots" / "coin-share.png").exists()


def test_kept_evidence_is_listed_and_makes_the_table(run, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{pages.MARKS[0]}\nyesterday\n{pages.MARKS[1]}\nafter\n")
    monkeypatch.setattr(pages, "README", readme)
    for module in (pages, catalogue):
        monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    run("coin")
    assert run("report", "--out", str(tmp_path / "pages"), "--keep")[0] == 0
    assert (tmp_path / "kept" / "coin" / "evidence.json").exists()
    text = readme.read_text()
    assert "yesterday" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| works | 1 of 1 hold |" in text
    assert pages.with_table(text) == text


def test_the_readme_is_in_step(monkeypatch):
    for name in ("coin", "needy", "unwritable"):
        monkeypatch.delitem(papers._classes, name)
    text = pages.README.read_text()
    assert pages.with_table(text) == text, "run: python -m causal_jax.reproduce report --keep"


def test_a_row_is_judged_by_its_worst_seed():
    row = Row.of_seeds("c", "m", [0.9, 0.5, 0.8], 0.7)
    assert (row.measured, row.holds, row.failed) == (0.5, False, (1,))
    assert Row.of_seeds("c", "m", [0.9, 0.5, 0.8], 0.7, by="median").holds
    assert Row.of_seeds("c", "m", [0.2, 0.1], 0.2, "<=").holds
    band = Row.of_seeds("c", "m", [0.0, 3.0, -2.0], (-1.0, 4.0), "in")
    assert (band.measured, band.holds, band.failed) == (-2.0, False, (2,))
    for better, threshold in ((">=", 0.0), ("<=", 0.0), ("in", (-1.0, 1.0))):
        nan = Row.of_seeds("c", "m", [1.0, float("nan")], threshold, better)
        assert not nan.holds
        assert 1 in nan.failed
    with pytest.raises(ValueError, match="goes with better='in'"):
        Row("c", "m", 0.0, (0.0, 1.0))
