"""The benchmark measures what it says: fair turns, equal work, nothing skipped in silence."""

import dataclasses
import importlib.util
import json
from argparse import Namespace

import jax
import numpy as np
import pytest

from causal_jax.attention import Dense, attention
from causal_jax.bench import attention as bench_attention
from causal_jax.bench import main, mask_names, peers, timing
from causal_jax.bench.generate import record
from causal_jax.bench.report import proportionality
from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder

NAMES = ["causal", "full", "window:5", "stream:5+2", "docs:4", "prefix:3", "chunked:7"]
NAMES += ["strided:4", "dilated:3+2"]
LISTED = ["bigbird:4+2", "topk:3+4"]

CONFIG = """
from causal_jax.data.pipeline import Data
from causal_jax.models.decoder import Decoder
from causal_jax.training.optimizer import AdamW, Muon, Schedule
from causal_jax.training.recipe import Recipe
from causal_jax.training.sharding import MeshSpec

def get_config(arg="adamw"):
    optimizer = {"adamw": AdamW, "muon": Muon}[arg](lr=1e-2, schedule=Schedule("constant", 0))
    return Recipe(
        model=Decoder(layers=2, width=32, heads=4, kv_heads=2, context=24),
        data=Data(context=24, batch=8),
        optimizer=optimizer,
        mesh=MeshSpec(data=1),
        steps=10,
    )
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return str(path)


def lines(folder):
    return [json.loads(x) for x in (folder / "bench.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------- masks by name


@pytest.mark.parametrize("name", NAMES)
def test_formula_for_other_libraries_is_the_mask(name):
    named, n = mask_names.parse(name, 23), 23
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    assert named.formula is not None
    expected = np.broadcast_to(named.formula(i, j, named.ids), (n, n))
    np.testing.assert_array_equal(named.dense(n)[0, 0], expected)


@pytest.mark.parametrize("name", [*NAMES, *LISTED])
def test_named_masks_are_causal_reproducible_and_see_themselves(name):
    dense = mask_names.parse(name, 24).dense(24)[0, 0]
    np.testing.assert_array_equal(dense, mask_names.parse(name, 24).dense(24)[0, 0])
    assert dense.diagonal().all()
    if not name.startswith(("full", "prefix")):
        assert not np.triu(dense, 1).any()


def test_windows_count_keys_before_self():
    dense = mask_names.parse("window:5", 23).dense(23)[0, 0]
    assert dense.sum(1).max() == 6
    assert mask_names.parse("stream:5", 23).dense(23)[0, 0].sum(1).max() == 10  # 4 sinks by default


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("windw:5", "window"),
        ("window", "window:L"),
        ("window:5+6", "window:L"),
        ("window:-5", "window:L"),
        ("window:0", "at least 1"),
        ("causal:3", "causal"),
        ("docs:99", "99 documents"),
        ("topk:99", "99 blocks"),
    ],
)
def test_wrong_mask_is_named_with_what_would_be_right(text, words):
    with pytest.raises(InputError, match=words):
        mask_names.parse(text, 23)


# ----------------------------------------------------------------------------------- the stopwatch


def test_candidates_take_turns_and_every_sample_is_waited_for():
    log = []

    def candidate(name):
        return timing.Candidate(
            name, lambda: log.append(name), lambda _: log.append("wait " + name)
        )

    a, b = timing.measure([candidate("a"), candidate("b")], repeats=3, sample_s=0.0, pause_s=0.0)
    warm_up = ["a", "wait a"] * 2 + ["b", "wait b"] * 2
    assert log == warm_up + ["a", "wait a", "b", "wait b"] * 3
    assert len(a.seconds) == len(b.seconds) == 3


def test_short_calls_are_repeated_within_a_sample():
    calls = []
    quick = timing.Candidate("quick", lambda: calls.append(0), lambda _: None)
    (t,) = timing.measure([quick], repeats=2, sample_s=1e-3)
    assert t.calls_per_sample > 10
    assert len(calls) == 2 + 2 * (t.calls_per_sample + 1)


def test_timing_statistics():
    t = timing.Timing("x", (1.0, 2.0, 4.0), 1, 0.5)
    assert (t.median, t.spread) == (2.0, 1.5)
    assert t.record()["min_s"] == 1.0


def test_compilation_and_temporaries_are_reported_apart():
    x = np.ones((256, 256), np.float32)
    c = timing.jax_candidate("f", lambda x: jax.numpy.sin(x @ x) @ x, x)
    assert c.compile_s > 0
    assert c.temp_bytes is not None
    assert c.temp_bytes >= x.nbytes


def test_program_larger_than_memory_is_refused(monkeypatch):
    x = np.ones((256, 256), np.float32)
    monkeypatch.setattr(timing, "free_bytes", lambda: 1000)
    with pytest.raises(NotImplementedError, match="GiB of temporaries"):
        timing.jax_candidate("f", lambda x: jax.numpy.sin(x @ x) @ x, x)


def test_peak_memory_of_a_call():
    size = 64 * timing.MIB

    def call():
        np.ones(size, np.uint8)

    peak = timing.rss_of(timing.Candidate("x", call, lambda _: None))
    if peak is None:
        pytest.skip("needs Linux's /proc")
    assert 0.9 * size < peak < 2 * size


# --------------------------------------------------------------------------------------- attention


def test_attention_run_compares_equal_things(tmp_path, capsys):
    words = "attention --names dense/xla,dense/reference --masks causal,docs:5 --seq 300"
    words += " --kv_heads 2 --head_dim 16"
    peers = "jax,torch" if importlib.util.find_spec("torch") else "jax"
    words += f" --bwd --repeats 1 --peers {peers} --out {tmp_path}"
    assert main(words.split()) == 0
    records = lines(tmp_path)
    assert len(records) == 2 * 2 * (2 + len(peers.split(",")))
    for r in records:
        assert r["median_s"] > 0
        assert r["env"]["jax"] == jax.__version__
        assert r["max_diff"] is None or r["max_diff"] < 1e-5, r
        assert set(r["faster_than"]) == set(peers.split(",")) - {r["name"]}
    assert sum(r["max_diff"] is None for r in records) == 4  # one to compare with per case
    out = capsys.readouterr().out
    assert "vs jax" in out
    assert "docs:5, n = 300, forward+backward" in out
    assert (tmp_path / "attention_fwd_vs_live_fraction.png").stat().st_size > 1000


def test_ratios_are_baseline_over_own(tmp_path):
    words = f"attention --names dense --seq 32,64 --peers jax --repeats 3 --out {tmp_path}"
    assert main(words.split()) == 0
    by_case = {}
    for r in lines(tmp_path):
        by_case.setdefault(r["seq"], {})[r["name"]] = r
    assert set(by_case) == {32, 64}
    for case in by_case.values():
        expected = case["jax"]["median_s"] / case["dense"]["median_s"]
        assert case["dense"]["faster_than"] == {"jax": pytest.approx(expected)}
        assert case["dense"]["implementation"] in ("reference", "xla")
    assert (tmp_path / "attention_fwd_vs_n.png").exists()


def test_live_tiles_are_what_is_paid_for():
    shape, tile = (1, 1024, 2, 2, 8), bench_attention.TILE

    def case(mask, backward=False):
        named = mask_names.parse(mask, 1024)
        return bench_attention.make_case(named, shape, "float32", backward, 0)

    tiles = 1024 // tile
    full, causal = (bench_attention.describe(case(m)) for m in ("full", "causal"))
    assert full["live_flops"] == 4 * 1024 * 1024 * 8 * 2
    assert causal["live_fraction"] == (tiles + 1) / (2 * tiles)
    both = bench_attention.describe(case("causal", backward=True))
    assert both["live_flops"] == 3.5 * causal["live_flops"]


def test_own_cases_of_a_mechanism():
    shape = dict.fromkeys(["seq", "heads", "kv_heads", "head_dim", "batch"])
    problems = bench_attention.own_cases(Namespace(names="dense", **shape))
    cases = [c for c in attention.cases("dense", "bench") if c.S is None]
    assert sum(len(subjects) for _, subjects in problems) == len(cases) > 0
    for (shape, subjects), case in zip(problems, cases):
        assert shape[:2] == case.shape[:2]
        assert subjects[0][1] == attention["dense"](**case.spec)


def test_a_window_of_the_mechanism_counts_as_its_own_work():
    named = mask_names.parse("causal", 1024)
    case = bench_attention.make_case(named, (1, 1024, 2, 2, 8), "float32", False, 0)
    _, narrow, _ = bench_attention.parse_subject("dense:window=1")
    _, wide, _ = bench_attention.parse_subject("dense")
    assert bench_attention.useful_flops(wide, case) == 36 * 4 * 128 * 128 * 8 * 2
    assert bench_attention.useful_flops(narrow, case) == 15 * 4 * 128 * 128 * 8 * 2


def test_fit_against_the_live_fraction():
    line = [(x, 2.0 + 3.0 * x) for x in (0.1, 0.2, 0.7)]
    fit = proportionality(line)
    # y / x: 23, 13, 5.86
    wanted = {"slope": 3.0, "intercept": 2.0, "r2": 1.0, "within": (23 - 41 / 7) / (23 + 41 / 7)}
    assert fit == pytest.approx(wanted)
    through = proportionality([(x, 5 * x) for x in (0.1, 0.2, 0.7)])
    assert through is not None
    assert through["within"] == pytest.approx(0)
    noisy = proportionality([*line, (0.5, 1.0)])
    assert noisy is not None
    assert noisy["r2"] < 0.9
    assert proportionality(line[:2] * 3) is None


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is not None, reason="tokamax is installed")
def test_missing_peer_is_reported_with_its_remedy(tmp_path, capsys):
    words = f"attention --names dense --seq 32 --peers tokamax --repeats 1 --out {tmp_path}"
    assert main(words.split()) == 0
    assert 'not installed: pip install "causal_jax[kernels]"' in capsys.readouterr().out
    assert [r["name"] for r in lines(tmp_path)] == ["dense", "tokamax"]


@pytest.mark.parametrize("mask", ["causal", "bigbird:64+1"])
def test_splash_attention_agrees(mask):
    """The peer of a TPU, here in the interpreter; by itself it refuses another device."""
    case = bench_attention.make_case(
        mask_names.parse(mask, 256), (1, 256, 4, 2, 128), "float32", False, 0
    )
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        peers.splash("splash", case)
    theirs = peers.splash("splash", case, interpret=True)
    ours = bench_attention.subject_candidate("dense", Dense(), "reference", case)
    (a,), (b,) = (c.collect(c.call()) for c in (theirs, ours) if c.collect)
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_implementation_that_cannot_serve_is_reported(capsys):
    words = "attention --names dense,dense/cudnn --seq 32 --peers none --repeats 1"
    assert main(words.split()) == 0
    assert "dense/cudnn: " in capsys.readouterr().out


def test_settings_of_a_mechanism_on_the_command_line():
    text, spec, implementation = bench_attention.parse_subject("dense/xla:window=256:sinks=4")
    assert (text, implementation) == ("dense/xla:window=256:sinks=4", "xla")
    assert (spec.window, spec.sinks) == (256, 4)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("attention --names dens", "did you mean 'dense'"),
        ("attention --names dense:windw=3", "window"),
        ("attention --names dense:3", "FIELD=VALUE"),
        ("attention --masks cusal", "did you mean 'causal'"),
        ("attention --peers torhc", "did you mean 'torch'"),
        ("attention --seq 12x", "whole numbers"),
        ("attention --seq ,", "at least one"),
        ("attention --heads 4 --kv_heads 3", "multiple of kv_heads"),
        ("attention --cases --seq 32", "shapes come from the mechanisms"),
        ("attention --cases --names dense:window=3", "settings come from the cases"),
        ("attention --baseline torch --peers jax", "baseline"),
        ("attention --repeats 0", "at least 1"),
        ("attention --config x.py", "no model"),
        ("attention --out /proc/nowhere", "cannot be written"),
        ("train --config nowhere.py", "no such file"),
    ],
)
def test_wrong_input_is_exit_code_2(words, message, capsys):
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")


def test_unknown_group_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["atention"])
    assert stop.value.code == 2
    assert "attention" in capsys.readouterr().err


# -------------------------------------------------------------------------- the model beside torch


@pytest.mark.parametrize("tied", [True, False])
def test_torch_peer_gives_the_same_logits(tied):
    torch = pytest.importorskip("torch")
    from causal_jax.bench.torch_decoder import TorchDecoder

    spec = Decoder(vocab=61, layers=3, width=48, heads=4, kv_heads=2, context=32, tied=tied)
    model = spec.build(jax.random.key(0))
    peer = TorchDecoder(spec)
    peer.copy_from(model)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 32), np.int32)
    theirs = peer(torch.from_numpy(tokens).long()).detach().numpy()
    np.testing.assert_allclose(model(jax.numpy.asarray(tokens)), theirs, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_torch_peer_learns_the_same(optimizer, config_file):
    pytest.importorskip("torch")
    from causal_jax.bench import recipes, train

    args = Namespace(config=f"{config_file}:{optimizer}", overrides=[])
    recipe = recipes.load(args)
    batch = recipes.random_batch(recipe, 0)
    own, weights, first = train.our_step(recipe, batch)
    peer, theirs = train.torch_step("torch", recipe, batch, weights)
    assert first == pytest.approx(theirs, rel=1e-5)
    for _ in range(4):
        total, count = own.call()[1]["metrics"]["loss"]
        assert float(total / count) == pytest.approx(peer.call().item(), rel=1e-4)
    assert float(total / count) < first - 0.5


@pytest.mark.parametrize(
    "change",
    [{"norm": "layer"}, {"qk_norm": True}, {"logits_soft_cap": 30.0}, {"activation": "gelu"}],
)
def test_torch_peer_refuses_what_it_does_not_follow(change):
    pytest.importorskip("torch")
    from causal_jax.bench.torch_decoder import refuse

    spec = dataclasses.replace(Decoder(vocab=61, layers=1, width=48, heads=4), **change)
    with pytest.raises(NotImplementedError, match=next(iter(change))):
        refuse(spec)


def test_train_run(config_file, tmp_path, capsys):
    pytest.importorskip("torch")
    out = tmp_path / "out"
    words = f"train --config {config_file} --config.model.layers 1 --repeats 2 --out {out}"
    assert main(words.split()) == 0
    own, peer = lines(out)
    assert (own["name"], peer["name"]) == ("causal_jax", "torch")
    assert own["tokens_per_s"] == pytest.approx(8 * 24 / own["median_s"])
    ratio = own["tokens_per_s"] / peer["tokens_per_s"]
    assert own["faster_than"]["torch"] == pytest.approx(ratio)
    assert own["overrides"] == ["--config.model.layers", "1"]
    assert "tokens/s" in capsys.readouterr().out


def test_generate_run(config_file, tmp_path, capsys):
    words = f"generate --config {config_file} --config.model.context 100 --prompt_length 4"
    assert main(f"{words} --batch 3 --repeats 1 --out {tmp_path}".split()) == 0
    records = lines(tmp_path)
    assert [(r["name"], r["batch"]) for r in records] == [("generate", 3), ("layers apart", 3)]
    for r in records:
        assert r["tokens"] == 96
        assert r["positions"][-1] == 100
        assert r["tokens_per_s"] > 0
        assert r["late_over_early"] > 0
    assert "late / early" in capsys.readouterr().out


def test_step_times_by_position():
    """Three runs of five chunks; the first chunk (with the prefill) does not count as steps."""
    clock = np.cumsum([9.0, 1.6, 1.6, 3.2, 3.2])
    made = np.array([16, 32, 48, 64, 80])
    r = record("x", [(clock + d, made, 20.0) for d in (0.0, 0.1, 0.2)], 2, 10, 30.0)
    np.testing.assert_allclose(r["step_s"], [0.1, 0.1, 0.2, 0.2])
    assert r["late_over_early"] == pytest.approx(2.0)
    assert r["positions"] == [42, 58, 74, 90]
    assert r["tokens_per_s"] == pytest.approx(8.0)
