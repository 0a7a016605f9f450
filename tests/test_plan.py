"""Plans: what is counted against what can be counted by hand, and what the command refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec
from tiny import Tiny, compiled  # noqa: F401

from causal_jax import masks
from causal_jax.attention import dense_attention
from causal_jax.hardware import compiling_for
from causal_jax.models.decoder import Decoder
from causal_jax.plan import chips, flops, hlo
from causal_jax.plan.__main__ import main
from causal_jax.plan.estimate import _overflow, estimate
from causal_jax.plan.programs import Traced, bytes_per_chip, mesh_of, serving, training_step
from causal_jax.plan.search import candidates, search
from causal_jax.training import state
from causal_jax.training.optimizer import AdamW
from causal_jax.training.recipe import Recipe
from causal_jax.training.sharding import MeshSpec, make_mesh

SMOKE = "configs/lm_1b.py:smoke"


DECODER = Decoder(vocab=64, layers=3, width=32, heads=4, context=16, remat="dots")


def _recipe(model=DECODER, **changes):
    base = Recipe(model, mesh=MeshSpec(data=1, fsdp=8), optimizer=AdamW())
    data = dataclasses.replace(base.data, context=16, batch=16)
    return dataclasses.replace(base, data=data, **changes)


@pytest.fixture(scope="module")
def here():
    return chips.target("cpu:8")


# operations


def test_products_in_loops_count_as_often_as_they_turn():
    w = jnp.ones((8, 8))

    def f(x):
        x, _ = jax.lax.scan(lambda c, _: (c @ w, None), x, length=5)
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x)
        return jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ w, x)

    found = flops.count(jax.make_jaxpr(f)(jnp.ones((4, 8))))
    one = 2 * 4 * 8 * 8
    assert found.flops == (5 + 1 + 1) * one
    assert found.open_loops == 1


def test_convolutions_kernels_and_shards():
    x, k = jnp.ones((2, 9, 3)), jnp.ones((4, 3, 5))

    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    assert flops.count(jax.make_jaxpr(conv)(x, k)).flops == 2 * (2 * 6 * 5) * 4 * 3

    def kernel(cost):
        def call(x):
            return pl.pallas_call(
                lambda x_ref, o_ref: None,
                out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
                cost_estimate=cost,
            )(x)

        return flops.count(jax.make_jaxpr(call)(jnp.ones((8, 128))))

    said = kernel(pl.CostEstimate(flops=123, bytes_accessed=1, transcendentals=0))
    assert (said.flops, said.kernels, said.silent) == (123.0, 1, 0)
    assert kernel(None).silent == 1

    mesh = make_mesh(MeshSpec(data=8))
    f = jax.shard_map(
        lambda a: a @ jnp.ones((4, 4)), mesh=mesh, in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )  # fmt: skip
    assert flops.count(jax.make_jaxpr(f)(jnp.ones((16, 4)))).flops == 2 * 16 * 4 * 4


def test_the_attention_kernels_say_what_they_cost():
    def loss(q, k, v):
        return dense_attention(q, k, v, mask=masks.Causal(), implementation="tpu").sum()

    length, heads, width = 4096, 4, 128
    q = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16)
    with compiling_for("tpu"):
        found = flops.count(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, kv, kv))
    assert (found.kernels, found.silent) == (3, 0)
    # 2 products forward, 3 for dq, 4 for dk and dv; the diagonal's tiles are computed whole
    pairs = heads * length * length / 2
    assert 1.0 <= found.flops / (9 * 2 * width * pairs) <= 1.3


def test_a_training_step_does_what_the_model_says(here):
    recipe = _recipe(mesh=MeshSpec(data=8))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, remat="none"))
    counted = flops.count(training_step(recipe, here).traced.jaxpr).flops
    own = recipe.model.flops_per_token(16) * 16 * 16
    # at this length dense attention computes all pairs, the model's figure has the allowed ones
    assert own <= counted <= 1.35 * own


# the compiled text


def _program(f, *args):
    return hlo.read(jax.jit(f).lower(*args).compile().as_text())


def test_collectives_in_loops_are_read_from_the_compiled_program():
    mesh = make_mesh(MeshSpec(data=2, fsdp=4))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    w = jax.device_put(np.ones((64, 64), np.float32), rows)

    def f(w):  # every turn needs all of what the turn before made
        def body(c, _):
            whole = jax.lax.with_sharding_constraint(c, NamedSharding(mesh, PartitionSpec()))
            return jax.lax.with_sharding_constraint(jnp.sin(whole @ whole), rows), None

        return jax.lax.scan(body, w, length=7)[0]

    found = _program(f, w)
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    assert [(c.times, c.bytes, c.devices) for c in gathers] == [(7.0, 64 * 64 * 4, 4)]
    assert gathers[0].wire == pytest.approx(7 * 64 * 64 * 4 * 3 / 4)
    assert found.open_loops == 0


def test_traffic_of_a_copy_and_of_a_loop_over_slices():
    x = jnp.ones((1 << 16,), jnp.float32)
    assert _program(lambda x: x + 1, x).traffic == pytest.approx(2 * x.nbytes, rel=0.05)
    stacked = jnp.ones((6, 1 << 14), jnp.float32)

    def total(c):
        return jax.lax.scan(lambda c, row: (c + row, None), jnp.zeros(1 << 14), c)[0]

    # every turn reads a row and the sum, and writes the sum: not six times the whole array
    found = _program(total, stacked).traffic
    assert 3 * stacked.nbytes * 0.9 <= found <= 3 * stacked.nbytes * 1.5


GROUPS = {
    "replica_groups={{0,2},{1,3}}, dimensions={0}, x": [[0, 2], [1, 3]],
    "replica_groups=[2,2]<=[4], x": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[2,2]T(1,0), x": [[0, 2], [1, 3]],
    "replica_groups=mesh['a'=2,'b'=2] {'a'}, x": [[0, 2], [1, 3]],
    "replica_groups=mesh['a'=4] {'a':(2)2}, x": [[0, 1], [2, 3]],
    "source_target_pairs={{0,1},{1,0}}, x": [[0, 1], [1, 0]],
}


@pytest.mark.parametrize("text", GROUPS, ids=range(len(GROUPS)))
def test_device_groups_in_every_spelling(text):
    assert hlo._groups(text).tolist() == GROUPS[text]


TPU = """HloModule m
%cond (p: (s32[], f32[4])) -> pred[] {
  %c = s32[]{:T(128)} constant(16)
  %p = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4]{0:T(128)S(1)} get-tuple-element(%p), index=1
  %g = bf16[8,256]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, replica_groups=[1,4]<=[4]
  %h = bf16[8,256]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, replica_groups=[1,4]<=[4]
  ROOT %t = (s32[]{:T(128)}, f32[4]{0}) tuple(%i, /*index=1*/%x)
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0:T(128)} parameter(0)
  %z = s32[] constant(0)
  %t = (s32[], f32[4]{0}) tuple(%z, %a)
  %w = (s32[]{:T(128)}, f32[4]{0}) while(%t), condition=%cond, body=%body
  ROOT %r = f32[4]{0} get-tuple-element(%w), index=1
}
"""


def test_a_tpu_programs_text():
    found = hlo.read(TPU, lambda d: d // 2)
    (gather,) = found.collectives  # once by its channel, though it stands there twice
    assert (gather.times, gather.bytes, gather.devices) == (16.0, 8 * 256 * 2, 4)
    assert gather.crosses
    assert found.traffic == 16 * 2 * 8 * 256 * 2  # what lies in S(1) is free


# memory


def test_memory_terms_are_those_of_the_sharded_state(here):
    recipe = _recipe(Tiny(vocab=64, width=16))
    one = estimate(training_step(recipe, here), recipe, here)
    mesh = make_mesh(recipe.mesh)
    abstract, _ = state.abstract_state(recipe.model, recipe.optimizer.transformation(), mesh)
    assert one.parts["parameters"] == bytes_per_chip(abstract["params"])
    assert one.parts["parameters"] < state.size_in_bytes({"params": abstract["params"]}) / 4
    assert one.arguments == pytest.approx(sum(one.parts.values()), abs=256)
    assert one.peak == one.arguments + one.outputs - one.aliased + one.temporaries + one.code
    assert one.fits
    assert one.seconds["network"] > 0
    assert one.step[0] <= one.step[1]
    assert {"all-gather"} <= set(one.collectives)
    json.dumps(one.json())


def test_serving_has_a_cache(here):
    recipe = _recipe()
    prefill, decode = (estimate(p, recipe, here) for p in serving(recipe, here))
    rows, length, heads, width = 16, 16, 4, 8
    assert decode.parts["cache"] == pytest.approx(
        2 * 3 * rows * length * heads * width * 4 / 8, abs=64
    )
    assert prefill.flops == pytest.approx(decode.flops * length, rel=0.4)


def test_a_search_ranks_what_fits_first(here):
    recipe = _recipe()
    tried = list(candidates(recipe, 8))
    assert tried[0] == recipe
    assert len(set(tried)) == len(tried)
    recipe = _recipe(Tiny(vocab=64, width=16))
    found = search(recipe, here, 2, lambda line: None)
    steps = [sum(one.step) for _, one in found]
    assert len(found) == 2
    assert steps == sorted(steps)
    said = []
    assert len(search(recipe, here, 5, said.append, minutes=1e-9)) == 1
    assert "minutes are used up after 1 compilations" in said[-1]


def test_a_search_compiles_nothing_whose_arguments_do_not_fit(here, monkeypatch):
    monkeypatch.setattr(Traced, "compile", lambda self: pytest.fail("compiled"))
    recipe = _recipe(Tiny(vocab=64, width=16))
    small = dataclasses.replace(here, chip=dataclasses.replace(here.chip, memory=16.0))
    found = search(recipe, small, 2, lambda line: None)
    assert found
    assert not any(one.fits for _, one in found)
    assert all("dominate" in one.advice[0] for _, one in found)


def test_the_compilers_complaint_is_understood():
    text = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm"
    assert _overflow(text) == (int(20.5 * 2**30), int(15.75 * 2**30))
    assert _overflow("something else") is None


# the command


REFUSED = {
    "topology": (["--topology", "v5e:3x3"], ["no such topology; did you mean v5e:", "v6e:16x16"]),
    "chip": (["--topology", "nonsense"], ["no such topology", "v5p:4x4x4", "cpu:8"]),
    "gpu": (["--topology", "h100:8"], ["cannot be compiled here"]),
    "slices": (["--topology", "cpu:8", "--slices", "2"], ["this machine is one"]),
    "mesh": (["--topology", "cpu:8", "--mesh", "data=3"], ["uses 3 of the 8 chips"]),
    "mesh more": (["--topology", "cpu:8", "--mesh", "fsdp=16"], ["needs 16 devices, there are 8"]),
    "mesh word": (["--topology", "cpu:8", "--mesh", "rows=8"], ["'rows=8' is not AXIS=N"]),
    "batch": (["--topology", "cpu:8", "--batch", "12"], ["data.batch = 12 must be a multiple of"]),
    "limit": (["--topology", "cpu:8", "--search", "--limit", "0"], ["--limit must be at least 1"]),
    "minutes": (
        ["--topology", "cpu:8", "--search", "--minutes", "-1"],
        ["--minutes must be above"],
    ),
    "field": (["--topology", "cpu:8", "--config.stepz", "1"], ["did you mean config.steps?"]),
}


@pytest.mark.parametrize("case", REFUSED, ids=[c.replace(" ", "-") for c in REFUSED])
def test_what_the_user_can_put_right(case, capsys):
    words, messages = REFUSED[case]
    assert main(["--config", SMOKE, *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert all(m in err for m in messages), err


def test_what_does_not_fit_says_why(here, capsys, monkeypatch):
    small = dataclasses.replace(here, chip=dataclasses.replace(here.chip, memory=65536.0))
    monkeypatch.setattr(chips, "target", lambda *_: small)
    assert main(["--config", SMOKE, "--topology", "cpu:8"]) == 2
    out, err = capsys.readouterr()
    assert "does NOT fit" in out
    assert " dominate: " in out
    assert "recompute more: --config.model.remat full (now dots)" in out
    assert "train does not fit on cpu:8" in err


def test_the_command_writes_table_json_and_picture(tmp_path, capsys):
    out = tmp_path / "plan"
    assert main(["--config", SMOKE, "--topology", "cpu:8", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "train on cpu:8 (8 chips), mesh fsdp=8: fits" in said
    assert "resident at the peak" in said
    assert "assumed: " in said
    record = json.loads((out / "plan.json").read_text())
    assert record["programs"][0]["fits"] is True
    assert record["process"]["peak"] > record["process"]["libraries"]
    assert (out / "plan.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def libtpu():
    return pytest.importorskip("libtpu")


def test_a_step_for_a_slice_nobody_here_has(libtpu):
    target = chips.target("v5e:2x4")
    recipe = _recipe()
    one = estimate(training_step(recipe, target), recipe, target)
    assert one.fits
    assert one.capacity == 15.75 * 2**30
    assert one.collectives["all-gather"]["wire"] > 0
    assert 0 < one.mfu[1] <= one.mfu[0] <= 1


@pytest.mark.slow
def test_two_slices_are_crossed_by_data_alone(libtpu):
    target = chips.target("v5e:2x2", slices=2)
    recipe = _recipe(mesh=MeshSpec(data=2, fsdp=4))
    program = training_step(recipe, target)
    slices = [[d.slice_index for d in row.flat] for row in mesh_of(recipe.mesh, target).devices]
    assert slices == [[0] * 4, [1] * 4]
    one = estimate(program, recipe, target)
    assert one.fits
    assert any("between slices" in line for line in one.advice)


@pytest.mark.slow
def test_a_search_over_a_slice_nobody_here_has(libtpu, tmp_path, capsys):
    out = tmp_path / "plan"
    words = ["--config", SMOKE, "--topology", "v5e:2x4", "--search", "--limit", "4"]
    assert main([*words, "--out", str(out)]) == 0
    record = json.loads((out / "plan.json").read_text())
    found = record["search"]
    assert len(found) == 4
    assert len({(f["mesh"], f["what"]) for f in found}) == 4
    fits = [f["fits"] for f in found]
    assert fits == sorted(fits, reverse=True)
    assert record["programs"][0]["mesh"] == found[0]["mesh"]
    assert "fits  peak GiB" in capsys.readouterr().out
    assert (out / "plan.png").exists()
