"""Meshes, path rules, and one step on eight devices against the same step on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from tiny import Tiny, compiled, make_run, random_batch  # noqa: F401

from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.paths import named_leaves
from causal_jax.placement import with_batch
from causal_jax.training.optimizer import AdamW, Muon, Schedule
from causal_jax.training.sharding import (
    MeshSpec,
    check_batch,
    make_mesh,
    put_batch,
    state_shardings,
)
from causal_jax.training.state import abstract_state, shardings_of

DECODER = Decoder(vocab=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, context=16)
NOW = Schedule(kind="constant", warmup=0)
KEY = jax.random.key(3)


def _three_steps(spec, optimizer, mesh_spec, **settings):
    mesh = make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        now, step, abstract = make_run(spec, optimizer, mesh, **settings)
        losses = []
        for seed in range(3):
            now, out = step(now, put_batch(mesh, random_batch(8, 16, spec.vocab, seed)), KEY)
            losses.append(float(out["metrics"]["loss"][0] / out["metrics"]["loss"][1]))
        same = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), now, shardings_of(abstract)
        )
    assert all(jax.tree.leaves(same))  # a step leaves the state where it was
    params = {k: np.asarray(v) for k, v in named_leaves(now["params"]).items()}
    return losses, params, now


@pytest.fixture(scope="module")
def single():
    cases = {}

    def get(name, spec, optimizer):
        if name not in cases:
            cases[name] = _three_steps(spec, optimizer, MeshSpec(data=1))
        return cases[name]

    return get


MESHES = {
    "8 data": MeshSpec(data=8),
    "1x8 fsdp": MeshSpec(data=1, fsdp=8),
    "2x4 fsdp x tensor": MeshSpec(data=1, fsdp=2, tensor=4),
    "all four": MeshSpec(data=1, fsdp=2, tensor=2, context=2),
}


@pytest.mark.parametrize("name", MESHES, ids=[m.replace(" ", "-") for m in MESHES])
def test_eight_devices_do_the_step_of_one(single, name):
    adamw = AdamW(lr=1e-3, schedule=NOW)
    losses, params, _ = single("adamw", DECODER, adamw)
    sharded, got, now = _three_steps(DECODER, adamw, MESHES[name])
    np.testing.assert_allclose(sharded, losses, rtol=1e-5)
    for leaf in params:
        np.testing.assert_allclose(got[leaf], params[leaf], atol=1e-4, err_msg=leaf)
    if MESHES[name].fsdp > 1:
        up = named_leaves(now)["params/stack/blocks/0/0/mlp/up/kernel"]
        assert up.addressable_shards[0].data.size == up.size // (
            MESHES[name].fsdp * MESHES[name].tensor
        )


def test_muon_and_microbatches_on_eight_devices(single):
    muon = Muon(lr=1e-3, schedule=NOW)
    tiny = Tiny(vocab=24, width=8)
    losses, params, _ = single("muon", tiny, muon)
    mesh = MeshSpec(data=2, fsdp=2, tensor=2)
    sharded, got, _ = _three_steps(tiny, muon, mesh, accumulate=2, ema=0.9)
    np.testing.assert_allclose(sharded, losses, rtol=1e-5)
    for leaf in params:
        np.testing.assert_allclose(got[leaf], params[leaf], atol=1e-4, err_msg=leaf)


def test_parameters_and_optimizer_state_follow_the_table():
    mesh = make_mesh(MeshSpec(data=1, fsdp=2, tensor=4))
    abstract, whole = abstract_state(DECODER, AdamW().transformation(), mesh, ema=True)
    specs = {name: leaf.sharding.spec for name, leaf in named_leaves(abstract).items()}
    block = "stack/blocks/0/0"
    want = {
        f"{block}/attention/q/kernel": PartitionSpec(None, "fsdp", "tensor"),
        f"{block}/attention/k/kernel": PartitionSpec(
            None, "fsdp", None
        ),  # 2 heads are not cut in 4
        f"{block}/attention/o/kernel": PartitionSpec(None, "tensor", "fsdp"),
        f"{block}/mlp/gate/kernel": PartitionSpec(None, "fsdp", "tensor"),
        f"{block}/mlp/down/kernel": PartitionSpec(None, "tensor", "fsdp"),
        f"{block}/attention_norm/scale": PartitionSpec(),
        "embed/table": PartitionSpec("tensor", "fsdp"),
    }
    for name, spec in want.items():
        copies = [found for full, found in specs.items() if full.endswith(name)]
        assert copies == [spec] * 4, name  # parameter, average, two moments
    assert specs["step"] == PartitionSpec()
    assert {line.split(" ")[0].split("/")[-2] for line in whole} == {"k", "v"}
    line = "(2, 32, 16): 2 heads are not divisible by tensor=4, kept whole"
    assert all(line in entry for entry in whole)


def test_a_dimension_that_does_not_divide_stays_whole_and_is_named():
    mesh = make_mesh(MeshSpec(data=1, fsdp=2, tensor=4))
    leaves = {"embed": {"table": jax.ShapeDtypeStruct((65, 32), jnp.float32)}}
    shardings, whole = state_shardings(mesh, leaves)
    assert shardings["embed"]["table"].spec == PartitionSpec(None, "fsdp")
    assert whole == ["embed/table (65, 32): 65 is not divisible by tensor=4, kept whole"]


def test_rules_of_the_config_replace_the_table():
    mesh = make_mesh(MeshSpec(data=1, fsdp=8))
    leaves = {"a": jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)}
    shardings, _ = state_shardings(mesh, leaves, ((r"^a$", (None, "fsdp")),))
    assert shardings["a"].spec == PartitionSpec(None, None, "fsdp")


def test_minus_one_takes_the_rest():
    assert dict(make_mesh(MeshSpec(data=1, fsdp=-1, tensor=2)).shape) == {
        "data": 1,
        "fsdp": 4,
        "tensor": 2,
        "context": 1,
    }
    assert make_mesh(MeshSpec(data=3)).size == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_mesh(MeshSpec(data=16)), "needs 16 devices, there are 8"),
        (lambda: make_mesh(MeshSpec(data=-1, tensor=3)), "multiply to 3, which does not divide 8"),
        (lambda: make_mesh(MeshSpec(data=-1, tensor=16)), "multiply to 16"),
        (lambda: MeshSpec(data=-1, fsdp=-1), "only one axis of the mesh may be -1"),
        (lambda: MeshSpec(tensor=0), "mesh.tensor must be at least 1, or -1 for the rest, got 0"),
        (lambda: MeshSpec(rules=(("a", ("model",)),)), "no axis 'model'"),
        (lambda: MeshSpec(rules=(("(", ("data",)),)), "not a regular expression"),
        (lambda: _check(6, 16, 1), r"data.batch = 6 must be a multiple of .* = 2 x 2 x 1 = 4"),
        (lambda: _check(8, 16, 4), r"2 x 2 x 4 = 16"),
        (lambda: _check(8, 15, 1), r"sequence length 15 must be a multiple of mesh.context = 2"),
    ],
)
def test_impossible_meshes_and_batches(make, message):
    with pytest.raises(InputError, match=message):
        make()


def _check(batch, length, accumulate):
    mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=1, context=2))
    check_batch(mesh, batch, length, accumulate)


def test_a_batch_lies_where_it_is_used():
    mesh = make_mesh(MeshSpec(data=2, fsdp=2, context=2))
    local = random_batch(8, 16, 5)
    batch = put_batch(mesh, local)
    for name, x in batch.items():
        np.testing.assert_array_equal(x, local[name])
        assert {s.data.shape for s in x.addressable_shards} == {(2, 8)}


def test_bfloat16_compute_trains_float32_parameters():
    mesh = make_mesh(MeshSpec(data=1))
    spec = Decoder(vocab=16, layers=1, width=16, heads=2, dtype="bfloat16")
    now, step, _ = make_run(spec, AdamW(lr=3e-3, schedule=NOW), mesh)
    batch = put_batch(mesh, random_batch(4, 8, 16))
    losses = []
    for _ in range(20):
        now, out = step(now, batch, KEY)
        losses.append(float(out["metrics"]["loss"][0] / out["metrics"]["loss"][1]))
    assert losses[-1] < 0.9 * losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(now["params"])} == {jnp.dtype("float32")}


def test_fsdp_moves_weights_and_keeps_rows_at_home():
    spec, rows, length = Tiny(vocab=32, width=32), 16, 64
    texts = {}
    for name, mesh_spec in (("data", MeshSpec(data=8)), ("fsdp", MeshSpec(data=1, fsdp=8))):
        mesh = make_mesh(mesh_spec)
        with jax.set_mesh(mesh):
            now, step, _ = make_run(spec, AdamW(), mesh)
            batch = put_batch(mesh, random_batch(rows, length, spec.vocab))
            program = step.lower(now, batch, KEY).compile()
        texts[name] = program.as_text()
    hidden = f"f32[{rows},{length},{4 * spec.width}]"
    assert hidden not in texts["fsdp"]  # no device computes on all rows
    assert f"f32[{rows // 8},{length},{4 * spec.width}]" in texts["fsdp"]
    assert "all-gather" in texts["fsdp"]


def test_placement_leaves_alone_what_it_cannot_split():
    x = jnp.ones((3, 4, 5))
    assert with_batch(x) is x  # no mesh
    with jax.set_mesh(make_mesh(MeshSpec(data=1))):
        assert with_batch(x) is x  # one device
    with jax.set_mesh(make_mesh(MeshSpec(data=2, fsdp=2, context=2))):
        assert jax.jit(with_batch)(x).sharding.spec == PartitionSpec(None, "context")
        even = jax.jit(with_batch)(jnp.ones((8, 3)))
        assert even.sharding.spec == PartitionSpec(("data", "fsdp"))
    with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))):
        assert with_batch(x) is x  # another project's mesh
