"""The step, the optimizers and the schedule; then whole runs through the command."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import Tiny, compiled, make_run, random_batch  # noqa: F401

from causal_jax import config, train
from causal_jax.errors import InputError
from causal_jax.objectives._base import Objective
from causal_jax.objectives.next_token import NextToken
from causal_jax.paths import named_leaves
from causal_jax.training import report, state
from causal_jax.training.optimizer import SGD, AdamW, Muon, Schedule
from causal_jax.training.recipe import Recipe
from causal_jax.training.run import load_run
from causal_jax.training.sharding import MeshSpec, make_mesh, put_batch

VOCAB = 11
SPEC = Tiny(vocab=VOCAB, width=8)
NOW = Schedule(kind="constant", warmup=0)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshSpec(data=1))


def _params(state):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state["params"]).items()}


def _assert_close(a, b, rtol=1e-5, atol=1e-6):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=name)


# the step


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_microbatches_give_the_gradient_of_the_whole_batch(mesh, parts):
    batch = put_batch(mesh, random_batch(6, 5, VOCAB))
    sgd = SGD(lr=1.0, schedule=NOW, clip=None, weight_decay=0.0, momentum=0.0)
    objective = NextToken(z_loss=0.1)
    results = []
    for accumulate in (1, parts):
        begun, step, _ = make_run(SPEC, sgd, mesh, objective=objective, accumulate=accumulate)
        results.append(step(begun, batch, KEY))
    (one, a), (many, b) = results
    _assert_close(_params(one), _params(many))
    for name, pair in a["metrics"].items():
        np.testing.assert_allclose(pair, b["metrics"][name], rtol=1e-6)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)


def test_the_mean_is_over_targets_not_over_microbatches(mesh):
    # what would be wrong: averaging the microbatches' means
    local = random_batch(4, 5, VOCAB)
    local["weights"][:2] = 0.0
    local["weights"][0, 0] = 1.0
    sgd = SGD(lr=1.0, schedule=NOW, clip=None, weight_decay=0.0, momentum=0.0)
    begun, step, _ = make_run(SPEC, sgd, mesh, accumulate=2)
    before = _params(begun)
    after, report = step(begun, put_batch(mesh, local), KEY)
    graph = state.graph_of(SPEC)

    def loss(params):
        model = nnx.merge(graph, params)
        logits = model.unembed(model.hidden(jnp.asarray(local["tokens"])))
        nll = -jnp.take_along_axis(
            jax.nn.log_softmax(logits), local["targets"][..., None], axis=-1
        )[..., 0]
        return jnp.sum(nll * local["weights"]) / jnp.sum(local["weights"])

    fresh, _, _ = make_run(SPEC, sgd, mesh)
    value, grads = jax.value_and_grad(loss)(fresh["params"])
    want = {name: before[name] - np.asarray(g) for name, g in named_leaves(grads).items()}
    _assert_close(_params(after), want)
    total, count = report["metrics"]["loss"]
    np.testing.assert_allclose(total / count, value, rtol=1e-6)
    assert count == local["weights"].sum()


def test_the_second_step_neither_traces_nor_compiles(mesh):
    traces = []

    @dataclasses.dataclass(frozen=True)
    class Counting(NextToken):
        def loss(self, model, batch, key):
            traces.append(1)
            return super().loss(model, batch, key)

    begun, step, _ = make_run(SPEC, AdamW(), mesh, objective=Counting(), ema=0.9)
    after, _ = step(begun, put_batch(mesh, random_batch(4, 5, VOCAB)), KEY)
    once = len(traces)
    for seed in range(3):
        after, _ = step(after, put_batch(mesh, random_batch(4, 5, VOCAB, seed)), KEY)
    assert len(traces) == once
    assert step._cache_size() == 1


def test_the_state_is_donated(mesh):
    begun, step, _ = make_run(SPEC, AdamW(), mesh)
    leaf = jax.tree.leaves(begun["params"])[0]
    step(begun, put_batch(mesh, random_batch(4, 5, VOCAB)), KEY)
    assert leaf.is_deleted()


@dataclasses.dataclass(frozen=True)
class Poisoned(Objective):
    """Next token, not a number where a target is 0 in the first column."""

    def loss(self, model, batch, key):
        scalar, metrics = NextToken().loss(model, batch, key)
        bad = batch["targets"][0, 0] == 0
        return jnp.where(bad, jnp.nan, 1.0) * scalar, metrics


def test_a_step_that_is_not_finite_changes_nothing_but_the_counter(mesh):
    begun, step, _ = make_run(SPEC, AdamW(schedule=NOW), mesh, objective=Poisoned(), ema=0.9)
    good, bad = random_batch(4, 5, VOCAB), random_batch(4, 5, VOCAB)
    good["targets"][0, 0], bad["targets"][0, 0] = 1, 0
    middle, report = step(begun, put_batch(mesh, good), KEY)
    assert bool(report["finite"])
    before = {k: np.asarray(v) for k, v in named_leaves(middle).items()}
    after, report = step(middle, put_batch(mesh, bad), KEY)
    assert not bool(report["finite"])
    changed = {k for k, v in named_leaves(after).items() if not np.array_equal(before[k], v)}
    assert changed == {"step"}
    last, report = step(after, put_batch(mesh, good), KEY)
    assert bool(report["finite"])
    assert all(np.isfinite(v).all() for v in _params(last).values())


def test_randomness_differs_by_step_and_repeats_by_key(mesh):
    noisy = dataclasses.replace(SPEC, noise=1.0)
    frozen = SGD(lr=1e-30, schedule=NOW, weight_decay=0.0)
    batch = put_batch(mesh, random_batch(4, 5, VOCAB))
    losses = []
    for _ in range(2):
        now, step, _ = make_run(noisy, frozen, mesh)
        for _ in range(2):
            now, out = step(now, batch, KEY)
            losses.append(float(out["metrics"]["loss"][0]))
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


def test_the_average_follows_its_formula(mesh):
    batch = put_batch(mesh, random_batch(4, 5, VOCAB))
    now, step, _ = make_run(SPEC, AdamW(schedule=NOW), mesh, ema=0.5)
    want = _params(now)
    for t in range(8):
        now, _ = step(now, batch, KEY)
        decay = min(0.5, (t + 1) / (t + 10))
        params = _params(now)
        want = {k: decay * want[k] + (1 - decay) * params[k] for k in want}
    got = {k: np.asarray(v) for k, v in named_leaves(state.averaged(now)).items()}
    _assert_close(got, want)
    assert state.averaged({"params": 1}) == 1


def test_parameters_and_moments_are_float32(mesh):
    now, _, _ = make_run(SPEC, Muon(), mesh, ema=0.9)
    for name, leaf in named_leaves(now).items():
        assert leaf.dtype == (jnp.int32 if name.endswith(("step", "count")) else jnp.float32)


# optimizers


@pytest.mark.parametrize("optimizer", [AdamW(), Muon(), SGD()], ids=["adamw", "muon", "sgd"])
def test_every_optimizer_learns(mesh, optimizer):
    optimizer = dataclasses.replace(optimizer, lr=0.02, schedule=NOW)
    now, step, _ = make_run(SPEC, optimizer, mesh)
    batch = put_batch(mesh, random_batch(4, 5, VOCAB))
    losses = []
    for _ in range(30):
        now, out = step(now, batch, KEY)
        losses.append(float(out["metrics"]["loss"][0] / out["metrics"]["loss"][1]))
    assert losses[-1] < 0.7 * losses[0]


def test_adamw_is_optax_adamw(mesh):
    mine = AdamW(lr=0.01, schedule=NOW, clip=0.5, weight_decay=0.3, decays="")
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.3)
    )
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    ours, other = params, params
    tx = mine.transformation()
    s, t = tx.init(params), theirs.init(params)
    for i in range(4):
        grads = jax.tree.map(lambda p: jnp.cos(p + i), params)  # noqa: B023
        u, s = tx.update(grads, s, ours)
        ours = jax.tree.map(lambda p, u: p - mine.learning_rate(0, 10) * u, ours, u)
        v, t = theirs.update(grads, t, other)
        other = optax.apply_updates(other, v)
    for name in params:
        np.testing.assert_allclose(ours[name], other[name], rtol=1e-6)


def test_weight_decay_leaves_norms_and_biases_alone(mesh):
    now, _, _ = make_run(SPEC, AdamW(), mesh)
    tx = dataclasses.replace(AdamW(), weight_decay=1.0, clip=None).transformation()
    params = jax.tree.map(jnp.ones_like, now["params"])
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    moved = {name for name, u in named_leaves(updates).items() if np.any(u != 0)}
    assert moved == {
        "embed/table",
        "stack/blocks/0/up/kernel",
        "stack/blocks/0/down/kernel",
    }
    assert {"norm/scale", "stack/blocks/0/up/bias"} <= set(named_leaves(params))


def _newton_schulz(m, steps=5):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m / np.linalg.norm(m)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        g = x @ x.T
        x = a * x + (b * g + c * g @ g) @ x
    return x.T if tall else x


def test_muon_treats_a_stacked_kernel_as_so_many_matrices():
    rng = np.random.default_rng(0)
    grads = {
        "blocks": {"up": {"kernel": rng.standard_normal((3, 4, 7)).astype("f4")}},
        "embed": {"table": rng.standard_normal((5, 4)).astype("f4")},
        "head": {"kernel": rng.standard_normal((4, 5)).astype("f4")},
    }
    grads["blocks"]["up"]["kernel"][1] *= 100.0  # of no influence on the other two
    params = jax.tree.map(jnp.zeros_like, grads)
    muon = Muon(clip=None, weight_decay=0.0)
    tx = muon.transformation()
    updates, _ = tx.update(jax.tree.map(jnp.asarray, grads), tx.init(params), params)
    got = np.asarray(updates["blocks"]["up"]["kernel"])
    for layer in range(3):
        # the first update is along the gradient, whatever the momentum
        want = _newton_schulz(grads["blocks"]["up"]["kernel"][layer]) * 0.2 * np.sqrt(7)
        np.testing.assert_allclose(got[layer], want, rtol=2e-3, atol=2e-4)
    for name in ("embed", "head"):  # Adam: the first step is the sign
        (leaf,) = jax.tree.leaves(updates[name])
        (grad,) = jax.tree.leaves(grads[name])
        np.testing.assert_allclose(leaf, np.sign(grad), rtol=1e-3)
    assert muon.labels(params)["blocks"]["up"]["kernel"] == "muon"


def test_muon_refuses_a_pattern_that_cannot_be(mesh):
    with pytest.raises(InputError, match=r"optimizer.matrices = 'nowhere' matches no parameter"):
        make_run(SPEC, Muon(matrices="nowhere"), mesh)
    with pytest.raises(InputError, match=r"takes in norm/scale, which has shape \(8,\)"):
        make_run(SPEC, Muon(matrices="."), mesh)
    with pytest.raises(InputError, match="not a regular expression"):
        Muon(matrices="(")


def test_schedules_by_hand():
    cosine = Schedule(kind="cosine", warmup=4, final=0.1)
    assert [float(cosine(t, 14)) for t in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert float(cosine(9, 14)) == pytest.approx(0.55)  # half way
    assert float(cosine(14, 14)) == pytest.approx(0.1)
    assert float(cosine(99, 14)) == pytest.approx(0.1)
    linear = Schedule(kind="linear", warmup=0, final=0.0)
    assert [float(linear(t, 4)) for t in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    wsd = Schedule(kind="wsd", warmup=2, final=0.2, decay=0.5)
    assert [float(wsd(t, 8)) for t in (0, 1, 4, 6, 8)] == pytest.approx([0.5, 1, 1, 0.6, 0.2])
    constant = Schedule(kind="constant", warmup=2)
    assert [float(constant(t, 3)) for t in range(4)] == pytest.approx([0.5, 1, 1, 1])
    # a run shorter than its warm-up just warms up
    assert float(Schedule(warmup=100)(9, 10)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(lr=0.0), "optimizer.lr must be positive, got 0.0"),
        (lambda: AdamW(lr=float("nan")), "optimizer.lr must be positive"),
        (lambda: AdamW(clip=-1.0), "optimizer.clip must be positive or None, got -1.0"),
        (lambda: AdamW(b2=1.0), r"optimizer.b2 must be in \[0, 1\), got 1.0"),
        (lambda: AdamW(eps=0.0), "optimizer.eps must be positive"),
        (lambda: AdamW(weight_decay=-0.1), "optimizer.weight_decay must not be negative"),
        (lambda: AdamW(decays="["), r"optimizer.decays = '\[' is not a regular expression"),
        (lambda: SGD(momentum=1.0), "optimizer.momentum"),
        (lambda: Muon(ns_steps=0), "optimizer.ns_steps must be at least 1, got 0"),
        (lambda: Schedule(warmup=-1), "schedule.warmup must not be negative, got -1"),
        (lambda: Schedule(final=1.5), r"schedule.final must be in \[0, 1\], got 1.5"),
        (lambda: Schedule(decay=0.0), "schedule.decay"),
        (lambda: Recipe(SPEC, steps=0), "steps must be at least 1, got 0"),
        (lambda: Recipe(SPEC, ema=1.0), "ema must be between 0 and 1, or None, got 1.0"),
        (lambda: Recipe(SPEC, accumulate=3), r"accumulate = 3 must divide data.batch = 16"),
    ],
)
def test_settings_are_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


# whole runs through the command

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from tiny import Tiny
from causal_jax.data.pipeline import Data
from causal_jax.training.optimizer import AdamW, Schedule
from causal_jax.training.recipe import Checkpoints, Evaluation, Recipe, Report
from causal_jax.training.sharding import MeshSpec

def get_config():
    return Recipe(
        model=Tiny(width=8, noise=0.1),
        data=Data(context=16, batch=4),
        optimizer=AdamW(lr=0.01, schedule=Schedule(warmup=2)),
        mesh=MeshSpec(data=1),
        steps=8,
        ema=0.9,
        evaluation=Evaluation(every=4, batches=2, final_batches=2, ngrams=0),
        checkpoint=Checkpoints(every=4),
        report=Report(every=1, plot=False),
    )
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG.format(tests=str(Path(__file__).parent)))
    return str(path)


def _train(recipe_file, folder, *words):
    return train.main(["--config", recipe_file, "--config.workdir", str(folder), *words])


def _losses(folder, split="train"):
    records = report.read(folder / "metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if r["split"] == split}


def test_a_run_leaves_everything_a_run_folder_holds(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--config.report.plot", "--config.report.every", "2", "--config.evaluation.ngrams=2"]
    assert _train(recipe_file, run, *words) == 0
    out = capsys.readouterr().out
    assert (run / "log.txt").read_text() == out
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "tokenizer").is_dir()
    assert config.load(str(run)).model.vocab == 258
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["4", "8"]
    assert sorted(_losses(run)) == [2, 4, 6, 8]
    assert sorted(_losses(run, "validation")) == [4]
    assert sorted(_losses(run, "final")) == [8]
    line = r"step 8/8  loss \d\.\d{4}  bits/byte \d\.\d{3}  lr \d\.\d\de-0\d  grad \d+\.\d\d  "
    assert re.search(line + r".*tok/s  .*mfu \d+\.\d %  eta 0:00", out)
    final = next(r for r in report.read(run / "metrics.jsonl") if r["split"] == "final")
    assert final["bits_per_byte"] == pytest.approx(final["loss"] / np.log(2), rel=0.05)
    assert re.search(
        r"2-gram \(Witten-Bell\) +\d\.\d{3}\n  this model +\d\.\d{3}   beats \d of 2", out
    )
    assert f"done: step 8; run folder {run}" in out


def test_eight_steps_are_four_and_four_more(recipe_file, tmp_path, capsys):
    constant = ["--config.optimizer.schedule.kind", "constant"]  # the others look at the end
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _train(recipe_file, whole, *constant) == 0
    assert _train(recipe_file, parts, *constant, "--config.steps", "4") == 0
    assert "going on" not in capsys.readouterr().out
    assert _train(recipe_file, parts, *constant) == 0
    assert "going on from step 4" in capsys.readouterr().out
    assert _losses(whole) == _losses(parts)
    a, b = _final_params(whole), _final_params(parts)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert _train(recipe_file, parts, *constant) == 0
    assert "nothing to do: step 8 is reached" in capsys.readouterr().out
    assert _losses(whole) == _losses(parts)


def _start(recipe_file, folder, *words):
    env = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",  # the same programs as in this process
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "causal_jax.train", "--config", recipe_file]
    return subprocess.Popen(
        [*command, "--config.workdir", str(folder), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )


def _wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end, "nothing happened"
        time.sleep(0.01)


def _final_params(folder):
    run = load_run(folder)
    return {k: np.asarray(v) for k, v in named_leaves(nnx.split(run.model)[1]).items()}


def test_killed_and_resumed_is_the_same_run_bit_for_bit(recipe_file, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["--config.steps", "40", "--config.checkpoint.every", "8"]
    assert _train(recipe_file, whole, *words) == 0
    process = _start(recipe_file, cut, *words)
    _wait_for(lambda: (cut / "checkpoints" / "8").is_dir(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    begun = max(int(p.name) for p in (cut / "checkpoints").iterdir() if p.name.isdecimal())
    assert begun < 40
    assert _train(recipe_file, cut, *words) == 0
    assert f"going on from step {begun}" in (cut / "log.txt").read_text()
    assert _losses(cut) == _losses(whole)
    steps = [r["step"] for r in report.read(cut / "metrics.jsonl") if r["split"] == "train"]
    assert steps == list(range(1, 41))  # no step twice
    a, b = _final_params(whole), _final_params(cut)
    assert all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_signal_saves_and_ends_well(recipe_file, tmp_path, number):
    run = tmp_path / "run"
    process = _start(recipe_file, run, "--config.steps", "100000", "--config.checkpoint.every", "0")
    _wait_for(lambda: len(_losses(run)) > 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    done = int(re.search(rf"{number.name}: saved at step (\d+) of 100000; the same", out)[1])
    assert (run / "checkpoints" / str(done)).is_dir()
    assert max(_losses(run)) == done
    assert err == ""


def test_not_finite_leaves_out_some_steps_then_stops(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    words = [
        "--config.optimizer.lr",
        "1e30",
        "--config.optimizer.clip",
        "none",
        "--config.skip",
        "2",
    ]
    assert _train(recipe_file, run, *words, "--config.steps", "40") == 1
    out, err = capsys.readouterr()
    assert "not finite, left out (2 in a row)" in out
    found = re.search(r"stopped: step (\d+): .*not finite 3 times in a row \(skip = 2\)", err)
    assert "Traceback" not in err
    batch = np.load(run / f"not_finite_step{found[1]}_process0.npz")
    assert batch["tokens"].shape == (4, 16)


def test_tensorboard_and_profile(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--config.report.tensorboard", "--config.report.profile", "2", "3"]
    assert _train(recipe_file, run, *words) == 0
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert list((run / "profile").glob("**/*.xplane.pb"))
    assert "profile written to" in capsys.readouterr().out


def test_tensorboard_that_is_not_there(recipe_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert _train(recipe_file, tmp_path / "run", "--config.report.tensorboard") == 2
    assert "pip install 'causal_jax[logging]'" in capsys.readouterr().err


REFUSED = {
    "field": (["--config.stepz", "3"], "unknown field config.stepz; did you mean config.steps?"),
    "value": (["--config.steps", "x"], "config.steps = 'x': expected int"),
    "mesh": (["--config.mesh.data", "64"], "needs 64 devices, there are 8"),
    "mesh rest": (["--config.mesh.data=-1", "--config.mesh.tensor=3"], "does not divide 8"),
    "batch": (["--config.mesh.data=8"], "data.batch = 4 must be a multiple of"),
    "vocabulary": (["--config.model.vocab", "10"], "model.vocab is 10, the tokenizer has 258"),
    "context": (["--config.data.context", "9999999"], "data.context is 9999999"),
    "argument": (["--fast"], "unknown argument '--fast'"),
}


@pytest.mark.parametrize("case", REFUSED, ids=[c.replace(" ", "-") for c in REFUSED])
def test_what_the_user_can_put_right_is_exit_code_2(recipe_file, tmp_path, capsys, case):
    words, message = REFUSED[case]
    assert _train(recipe_file, tmp_path / "run", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_a_continued_run_must_be_the_same_run(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert _train(recipe_file, run, "--config.steps", "2") == 0
    capsys.readouterr()
    assert _train(recipe_file, run, "--config.seed", "5", "--config.optimizer.lr=0.5") == 2
    err = capsys.readouterr().err
    assert "optimizer.lr: the run has 0.01, now 0.5" in err
    assert "seed: the run has 0, now 5" in err
    assert "--config.workdir NEW_FOLDER" in err
    assert _train(recipe_file, run, "--config.data.tokenizer", "bpe") == 2
    assert "data.tokenizer.type: the run has" in capsys.readouterr().err
    # these may change
    words = ["--config.report.every=2", "--config.checkpoint.keep=1", "--config.mesh.data=2"]
    assert _train(recipe_file, run, *words, "--config.accumulate=2") == 0
    assert "going on from step 2" in capsys.readouterr().out
    # and the folder alone is enough
    assert train.main(["--config", str(run), "--config.steps", "9"]) == 0
    assert "going on from step 8" in capsys.readouterr().out


def test_two_runs_do_not_share_a_folder(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    process = _start(recipe_file, run, "--config.steps", "1000000")
    _wait_for(lambda: len(_losses(run)) > 0, process)
    assert _train(recipe_file, run) == 2
    err = capsys.readouterr().err
    assert f"workdir {run} is in use by another run (process {process.pid} on" in err
    process.kill()
    process.communicate()
    assert _train(recipe_file, run, "--config.steps", "1") == 0


def test_a_folder_that_cannot_be(recipe_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert _train(recipe_file, tmp_path / "file" / "run") == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_help_is_quick_and_says_how(recipe_file, capsys):
    begun = time.time()
    code = "import sys; from causal_jax import train; train.main(['--help']); "
    code += "sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0  # JAX was not even imported
    assert "--config.steps 200" in done.stdout
    assert time.time() - begun < 10
    assert train.main(["--config", recipe_file, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--config.optimizer.schedule.warmup int = 2" in out
    assert train.main([]) == 2
    assert "--config is missing" in capsys.readouterr().err


def test_reports_survive_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"split": "train", "step": n, "loss": 1.0} for n in (1, 2, 3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"split": "tr')
    assert [r["step"] for r in report.read(path)] == [1, 2, 3]
    report.keep_until(path, 2)
    assert path.read_text() == "".join(json.dumps(r) + "\n" for r in records[:2])
