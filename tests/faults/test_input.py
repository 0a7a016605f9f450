"""Whatever a user types, a mistake is one message and exit code 2: no traceback."""

import dataclasses
import traceback

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causal_jax import config, evaluate, generate, train
from causal_jax.plan.__main__ import main as plan
from causal_jax.training import report
from faults.runs import recipe_file

FIELDS = [path for path, *_ in config.fields(config.load("configs/lm_1b.py:smoke"))]
VALUES = st.one_of(
    st.sampled_from(
        ["", "none", "true", "0", "-1", "1e400", "nan", "inf", "muon", "bpe", "(", "[", "a,b", "--"]
    ),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.text(max_size=12),
)
WORDS = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(FIELDS),
            st.sampled_from(FIELDS).flatmap(lambda f: st.sampled_from([f[:-1], f + "x", f + ".y"])),
            st.text("abc.0_-=", max_size=12),
        ),
        VALUES,
        st.booleans(),
    ),
    min_size=1,
    max_size=3,
)


def _flat(words):
    out = []
    for name, value, joined in words:
        out += [f"--config.{name}={value}"] if joined else [f"--config.{name}", value]
    return out


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=WORDS)
def test_overrides(words, capsys):
    # with --help the recipe is made and shown, and nothing is trained
    argv = ["--config", "configs/lm_1b.py:smoke", *_flat(words), "--help"]
    code = train.main(argv)
    out, err = capsys.readouterr()
    assert code in (0, 2), err
    assert "Traceback" not in err
    assert err.startswith("error: ") if code == 2 else "Fields of this Recipe" in out or out


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.one_of(st.text(max_size=10), st.just("--config"), VALUES), max_size=4))
@pytest.mark.parametrize("main", [train.main, evaluate.main, generate.main, plan],
                         ids=["train", "evaluate", "generate", "plan"])  # fmt: skip
def test_commands(main, words, capsys):
    try:
        code = main([w for w in words if not w.startswith("configs")])
    except SystemExit as e:  # argparse
        code = e.code
    except Exception:
        pytest.fail(traceback.format_exc())
    assert code in (0, 2), capsys.readouterr().err
    assert "Traceback" not in capsys.readouterr().err


DAMAGED = {
    "no such file": ("nowhere.py", None, "no such file"),
    "not python": ("bad.py", "def get_config(:\n", ""),
    "raises": ("bad.py", "def get_config():\n    raise KeyError('x')\n", "get_config failed"),
    "no function": ("bad.py", "x = 1\n", "defines no function get_config()"),
    "another thing": ("bad.py", "def get_config():\n    return 3\n", "a dataclass instance"),
    "missing import": ("bad.py", "import nowhere_at_all\n", "nowhere_at_all"),
}


@pytest.mark.parametrize("case", DAMAGED, ids=[c.replace(" ", "-") for c in DAMAGED])
def test_config_files_that_cannot_be(tmp_path, capsys, case):
    name, text, message = DAMAGED[case]
    if text is not None:
        (tmp_path / name).write_text(text)
    assert train.main(["--config", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_a_run_folder_is_a_config_and_a_damaged_one_is_named(tmp_path, capsys, monkeypatch):
    file, run = recipe_file(tmp_path), tmp_path / "run"
    assert train.main(["--config", file, "--config.workdir", str(run), "--config.steps=2"]) == 0
    (start,) = report.read(run / "starts.jsonl")
    assert (start["step"], start["seed"], start["processes"]) == (0, 0, 1)
    assert {"jax", "orbax-checkpoint", "commit", "device", "command"} <= set(start)
    again = config.load(str(run))
    assert dataclasses.replace(again, steps=3).steps == 3
    monkeypatch.setenv("XLA_FLAGS", "")
    assert train.main(["--config", str(run), "--config.steps=3", "--deterministic"]) == 0
    *_, start = report.read(run / "starts.jsonl")
    assert start["step"] == 2
    assert "xla_gpu_deterministic_ops=true" in start["XLA_FLAGS"]
    (run / "config.json").write_text("{")
    capsys.readouterr()
    assert train.main(["--config", str(run)]) == 2
    assert "is not readable as JSON" in capsys.readouterr().err
