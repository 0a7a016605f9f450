"""The block-sparse kernel in XLA: against the reference, over tiles, memory, shardings."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_problems import (  # noqa: F401
    IDS,
    MASKS,
    _small_tiles,
    arrays,
    attention,
    close,
    graded,
    qkv,
    reference,
    visible,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from causal_jax.attention import choose, dense_attention
from causal_jax.bench import main as bench
from causal_jax.hardware import compiling_for
from causal_jax.masks import Causal, Documents, Window, from_fn
from pallas_kernels.block_sparse import Schedule, Tiles, block_sparse_attention


# Every mask and every kind of bias, with and without soft cap and sinks: not every combination.
@pytest.mark.parametrize(
    ("name", "bias", "q_offset"),
    [
        ("none", None, 0),
        ("causal", None, 0),
        ("causal", (1, 1), 4),
        ("window", (1, 4), 9),
        ("streaming", None, 4),
        ("documents", (2, 4), 0),
        ("per_head", (2, 1), 4),
        ("prefix", None, 2),
        ("array", None, 0),
        ("blocks", (1, 1), 0),
        ("parity", None, 1),
    ],
)
def test_xla_is_the_reference(name, bias, q_offset, small_tiles):
    q, k, v = qkv(Hv=6)
    do, dlse, bias_, sinks = arrays((2, 37, 4, 6), (2, 37, 4), (*(bias or (1, 1)), 37, 45), (4,))
    bias_, sinks, cap = (bias_, sinks, 3.0) if bias else (None, None, None)
    o, lse, grads = graded(
        q, k, v, MASKS[name], bias_, sinks, do, dlse, implementation="xla", soft_cap=cap,
        q_offset=q_offset,
    )  # fmt: skip
    full = jnp.broadcast_to(bias_, (2, 4, 37, 45)) if bias else None
    o_ref, lse_ref, grads_ref = reference(
        q, k, v, visible(name, q_offset=q_offset), full, sinks, do, dlse, soft_cap=cap
    )
    if bias:  # the reference has seen each use of a shared bias as one of its own
        shared = tuple(axis for axis in (0, 1) if bias[axis] == 1)
        grads_ref = (*grads_ref[:3], grads_ref[3].sum(shared, keepdims=True), grads_ref[4])
    jax.tree.map(functools.partial(close, tol=5e-5), (o, lse, grads), (o_ref, lse_ref, grads_ref))


@pytest.mark.parametrize(
    ("T", "S", "K"), [(1, 1, 1), (16, 8, 6), (17, 9, 3), (5, 61, 1), (61, 5, 6)]
)
def test_xla_shapes(T, S, K, small_tiles):
    q, k, v = qkv(B=1, T=T, S=S, N=6, K=K)
    do, dlse = arrays((1, T, 6, 8), (1, T, 6))
    args = (q, k, v, Causal() & Window(11, None), None, None, do, dlse)
    jax.tree.map(
        functools.partial(close, tol=5e-5),
        graded(*args, implementation="xla"),
        reference(*args),
    )


def test_memory_grows_linearly():
    def temporaries(n):
        shapes = [jax.ShapeDtypeStruct((1, n, 4, 64), jnp.float32)] * 3
        loss = lambda q, k, v: jnp.sum(  # noqa: E731
            dense_attention(q, k, v, mask=Causal(), implementation="xla") ** 2
        )
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(8192), temporaries(32768)
    assert large < 4.2 * small
    assert large < 2**30


def test_only_live_tiles_are_visited(small_tiles):
    seen = []

    def causal(b, h, i, j):
        if isinstance(i, jax.core.Tracer):
            jax.debug.callback(lambda i, j: seen.append((int(i), int(j))), i.min(), j.min())
        return i >= j

    q, k, v = qkv(B=1, T=64, S=64, K=4)
    tiles = Tiles(16, 16)
    live = Causal().block_map(64, 64, 16, 16)
    schedule = Schedule.build(live.cnt, live.idx, live.kind)
    run = jax.jit(lambda q, k, v: block_sparse_attention(
        q, k, v, from_fn(causal), schedule, scale=1.0, tiles=tiles
    )[0])  # fmt: skip
    o = run(q, k, v)
    jax.effects_barrier()
    assert sorted(seen) == [(n, n) for n in (0, 16, 32, 48)]  # mask code on the diagonal only
    close(o, dense_attention(q, k, v, mask=Causal(), scale=1.0))
    # The loops obey the lists: without the last row's tiles that row stays empty.
    shorter = schedule._replace(
        count=np.where(np.arange(4) < 3, schedule.count, 0),
        full=np.minimum(schedule.full, [0, 1, 2, 0]),
    )
    cut, _ = block_sparse_attention(q, k, v, Causal(), shorter, scale=1.0, tiles=tiles)
    close(cut[:, :48], o[:, :48])
    assert not jnp.any(cut[:, 48:])


@pytest.mark.parametrize(
    ("tiles", "kinds"),
    [
        (Tiles(16, 8), True),
        (Tiles(16, 8), False),
        (Tiles(64, 64), True),
        (Tiles(8, 32, 1), True),  # one kv head at a time
        (Tiles(16, 16, 1024), True),  # one batch row at a time
    ],
)
def test_neither_tiles_nor_kinds_nor_units_matter(tiles, kinds):
    q, k, v = qkv(B=2, T=64, S=64, N=4, K=2)
    mask = Causal() & Window(30, None)
    expected = attention(q, k, v, mask=mask, implementation="reference")
    live = mask.block_map(64, 64, tiles.block_q, tiles.block_k)
    schedule = Schedule.build(live.cnt, live.idx, live.kind if kinds else np.minimum(live.kind, 1))
    o, _ = jax.jit(
        lambda q, k, v: block_sparse_attention(q, k, v, mask, schedule, scale=8**-0.5, tiles=tiles)
    )(q, k, v)
    close(o, expected, 1e-5)


def test_no_retrace_when_only_values_change():
    traces = []

    @jax.jit
    def f(q, k, v, ids):
        traces.append(1)
        return dense_attention(q, k, v, mask=Causal() & Documents(ids), implementation="xla")

    q, k, v = qkv(T=40, S=40)
    for ids in (IDS[:, :40], IDS[:, 20:60]):
        mask = Causal() & Documents(ids)
        expected = dense_attention(q, k, v, mask=mask, implementation="reference")
        close(f(q, k, v, ids), expected)
    assert len(traces) == 1


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_sharded_documents(platform, small_tiles):
    q, k, v = qkv(B=4, T=40, S=40)
    ids = jnp.concatenate([IDS, IDS[:, ::-1]])[:, :40]
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))

    def loss(q, k, v, ids):
        mask = Causal() & Documents(ids)
        return jnp.sum(jnp.sin(dense_attention(q, k, v, mask=mask, implementation="xla")))

    with compiling_for(platform):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        here = run(q, k, v, ids)
        q, k, v = (jax.device_put(x, split) for x in (q, k, v))
        ids = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
        text = run.lower(q, k, v, ids).compile().as_text()
    jax.tree.map(functools.partial(close, tol=5e-5), here, run(q, k, v, ids))
    if platform == "tpu":  # one schedule for all rows: no activation leaves its device
        assert not re.search(r"= f32\S* all-gather", text)


@pytest.mark.parametrize("name", ["per_head", "documents"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_form_for_accelerators(name, dtype, small_tiles):
    q, k, v = qkv(dtype=dtype)
    do, dlse = *arrays((2, 37, 4, 8), dtype=dtype), *arrays((2, 37, 4))
    with compiling_for("tpu"):
        ours = graded(q, k, v, MASKS[name], None, None, do, dlse, implementation="xla")
    theirs = reference(q, k, v, visible(name), None, None, do, dlse)
    tol = 5e-5 if dtype == jnp.float32 else 5e-2
    jax.tree.map(functools.partial(close, tol=tol), ours, theirs)


def alibi(slopes, s, b, h, i, j):
    return s - slopes[b * 0, h] * jnp.abs(i - j)


@pytest.mark.parametrize(("name", "q_offset"), [("none", 0), ("streaming", 4), ("per_head", 0)])
def test_score_modifications(name, q_offset, small_tiles):
    q, k, v = qkv(Hv=6)
    do, dlse, slopes = arrays((2, 37, 4, 6), (2, 37, 4), (1, 4))

    def run(q, k, v, slopes, implementation):
        return dense_attention(
            q, k, v, mask=MASKS[name], score_mod=jax.tree_util.Partial(alibi, slopes),
            soft_cap=2.0, q_offset=q_offset, return_lse=True, implementation=implementation,
        )  # fmt: skip

    def graded(implementation):
        f = jax.jit(lambda *args: run(*args, implementation))
        (o, lse), pull = jax.vjp(f, q, k, v, slopes)
        return o, lse, pull((do, jnp.where(lse == -jnp.inf, 0, dlse)))

    ours, theirs = graded("xla"), graded("reference")
    jax.tree.map(functools.partial(close, tol=5e-5), ours, theirs)
    i, j = jnp.ogrid[q_offset : q_offset + 37, :45]
    bias = -slopes[0, :, None, None] * jnp.abs(i - j)[None]
    same = dense_attention(
        q, k, v, mask=MASKS[name], bias=bias[None], soft_cap=2.0, q_offset=q_offset
    )
    close(ours[0], same)
    one = dense_attention(  # the form for few queries
        q[:, -1:], k, v, q_offset=36, score_mod=lambda s, b, h, i, j: alibi(slopes, s, b, h, i, j)
    )
    bias = -slopes[:, :, None, None] * jnp.abs(36 - j)[None, None]
    close(one, dense_attention(q[:, -1:], k, v, bias=bias))


def test_score_modifications_are_never_dropped():
    q, k, v = qkv(H=64, Hv=64, dtype=jnp.bfloat16)
    for platform, name in (("tpu", "tpu"), ("gpu", "gpu"), ("gpu", "cudnn")):
        with pytest.raises(NotImplementedError, match=f"{name}: it has no score_mod"):
            choose(q, k, v, score_mod=alibi, platform=platform, implementation=name)


def test_wide_tiles_begin_anywhere():
    grid = np.array([[0, 1, 2, 2, 2, 0, 0, 1], [2, 2, 0, 0, 1, 0, 2, 2], [0] * 8], np.int8)
    full, count, idx = (x[0, 0].tolist() for x in Schedule.spanned(grid[None, None], 2))
    assert (full, count) == ([1, 2, 0], [3, 3, 0])
    assert [idx[0], idx[1]] == [[3, 1, 7], [0, 6, 4]]  # one that hangs over is not full
    full, count, idx = (x[0, 0].tolist() for x in Schedule.spanned(grid[None, None], 3))
    assert (full, count) == ([0, 0, 0], [3, 3, 0])
    assert [idx[0], idx[1]] == [[1, 4, 7], [0, 4, 7]]
    assert Schedule.span(grid[None, None]) == 8
    assert Schedule.span(grid[None, None, :1, 1:5]) == 4


def test_explain_says_what_serves_and_why(capsys):
    words = ["explain", "--masks", "causal,topk:3", "--seq", "256", "--platform", "gpu"]
    assert bench([*words, "--dtype", "bfloat16"]) == 0
    causal, topk = capsys.readouterr().out.split("topk:3")
    assert "cudnn      chosen" in causal
    assert "cudnn      no: it knows full, causal" in topk
    assert "tpu        no: it needs a TPU, this is gpu" in topk
    assert "gpu        could be named" in topk
    assert bench([*words, "--heads", "3", "--kv_heads", "2"]) == 2


@pytest.mark.slow
def test_compiles_for_a_tpu_without_moving_keys():
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = jax.sharding.Mesh(np.array(topology.devices).reshape(2, 2), ("data", "tensor"))
    split = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((4, 4096, 8, 128), jnp.bfloat16, sharding=split)
    ids = jax.ShapeDtypeStruct((4, 4096), jnp.int32, sharding=rows)

    def loss(q, k, v, ids):
        mask = Causal() & Documents(ids)
        return dense_attention(q, k, v, mask=mask).astype(jnp.float32).sum()

    with compiling_for("tpu"):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, ids).compile()
    assert "all-gather" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20
