"""Kernels of memories without a TPU: against token loops, interpreted, compiled ahead of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from causal_jax.memory import Deep, Delta
from pallas_kernels import _testing
from pallas_kernels.memory_chunk import Form, Tokens, reference, tpu, xla
from pallas_kernels.memory_chunk.network import Network


def tokens(n=2, B=2, N=2, C=16, H=8, *, documents=False, gates="ae", dtype=jnp.float32):
    """Chunks of tokens of which some are not stored, and what is not stored is 0."""
    r = np.random.default_rng(0)
    draw = lambda scale: jnp.asarray(scale * r.standard_normal((n, B, N, C, H)), jnp.float32)  # noqa: E731
    gate = lambda lo, hi: jnp.asarray(r.uniform(lo, hi, (n, B, N, 1, C)), jnp.float32)  # noqa: E731
    q, k, v = draw(0.4), draw(0.4), draw(1.0)
    stored = jnp.broadcast_to(jnp.asarray(r.random((n, B, 1, 1, C)) < 0.8), (n, B, N, 1, C))
    new = None
    if documents:
        new = jnp.zeros((n, B, N, 1, C), bool).at[1, 0, :, 0, 5].set(True)
    there = stored.swapaxes(-1, -2)
    return Tokens(
        q.astype(dtype), jnp.where(there, k, 0).astype(dtype), jnp.where(there, v, 0).astype(dtype),
        jnp.where(stored, gate(0.02, 0.2), 0), gate(-0.2, 0) if "a" in gates else None,
        gate(-1, 0) if "e" in gates else None, stored, new,
    )  # fmt: skip


def state(*shape, seed=1):
    return 0.5 * jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def results(f, x, *rest):
    """Outputs and the gradients of tokens, gates and everything else."""
    floats = [name for name, a in zip(x._fields, x) if a is not None and a.dtype != bool]

    def loss(given, rest):
        y, *ends = f(x._replace(**given), *rest)
        ends = jax.tree.leaves(ends)
        total = jnp.sum(jnp.sin(y.astype(jnp.float32))) + sum(jnp.sum(jnp.cos(e)) for e in ends)
        return total, (y, ends)

    given = {name: getattr(x, name) for name in floats}
    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(given, rest)
    return out, grads


def close(ours, theirs, tol):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.abs(a - b).max() < tol * max(1, np.abs(b).max())


LINEAR = [
    ({}, {"to_init": False, "read_at": "post"}, 1e-5),
    ({"documents": True, "C": 24}, {"to_init": True, "read_at": "pre"}, 1e-5),
    ({"gates": "", "B": 1}, {"to_init": False, "read_at": "post"}, 1e-5),
    ({"dtype": jnp.bfloat16}, {"to_init": False, "read_at": "post"}, 2e-2),
]


@pytest.mark.parametrize(
    ("sizes", "how", "tol"),
    [pytest.param(*c, marks=() if i in (0, 1) else pytest.mark.slow) for i, c in enumerate(LINEAR)],
)
def test_the_linear_form_is_the_token_loop(sizes, how, tol):
    x = tokens(**sizes)
    wide = 8 * (1 + (x.log_eta is not None))
    rest = state(x.q.shape[1], 2, 8, wide), state(2, 8, 8, seed=2)
    true = results(functools.partial(reference.linear, **how), x, *rest)
    close(results(functools.partial(tpu.linear, interpret=True, **how), x, *rest), true, tol)
    if x.q.dtype == jnp.float32:

        def in_xla(x, state, initial):
            y, _, after, _ = xla.linear(x, state, initial[None], **how)
            return y, after

        close(results(in_xla, x, *rest), true, tol)


DEEP = [
    ({}, Form(Network(2, 2, "gelu", "residual_ln"), 1.0), False, 1e-5),
    ({"documents": True}, Form(Network(2, 2, "silu", "residual_ln"), 0.25, True, "pre", 0.5), True,
     1e-5),
    ({"gates": "a"}, Form(Network(1, 1, "gelu", "none")), False, 1e-5),
    ({"documents": True}, Form(Network(2, 2, "relu", "residual"), omega=3), False, 1e-5),
    ({"B": 1, "C": 8}, Form(Network(4, 2, "gelu", "residual_ln")), True, 1e-5),
    ({"dtype": jnp.bfloat16}, Form(Network(2, 2, "gelu", "residual_ln")), True, 3e-2),
]  # fmt: skip


def deep_case(x, form, every):
    """(W, S, initial, gamma, weight): leaves of all shapes that a memory has."""
    B, N, H = x.q.shape[1], x.q.shape[2], x.q.shape[-1]
    net = form.net
    leaves = {n: w + 0.1 * state(*w.shape) for n, w in net.init(jax.random.key(0), N, H).items()}
    leaves = {n: w[:, None] if n == "gamma" else w for n, w in leaves.items()}
    gamma = None if every else leaves.pop("gamma", None)
    W = {n: w[None] + 0.1 * state(B, *w.shape, seed=i) for i, (n, w) in enumerate(leaves.items())}
    S = None if x.log_eta is None else jax.tree.map(lambda w: 0.1 * w, W)
    weight = None
    if form.omega > 1:
        weight = jnp.where(x.stored, 0.3 + 0.5 * jnp.cos(x.theta), 0)
    return W, S, leaves, gamma, weight


@pytest.mark.parametrize(
    ("sizes", "form", "every", "tol"),
    [pytest.param(*c, marks=() if i == 1 else pytest.mark.slow) for i, c in enumerate(DEEP)],
)
def test_anchored_chunks_are_the_token_loop(sizes, form, every, tol):
    x = tokens(**sizes)
    W, S, initial, gamma, weight = deep_case(x, form, every)

    def run(f, **kw):
        return results(
            lambda x, W, S, i, g: f(form, x, W, S, i, g, weight=weight, **kw), x, W, S, initial,
            gamma,
        )  # fmt: skip

    close(run(tpu.deep, interpret=True), run(reference.deep), tol)


def test_what_does_not_fit_is_refused_with_a_reason():
    x = tokens(C=12)
    with pytest.raises(NotImplementedError, match="chunks of 12 tokens"):
        tpu.linear(x, state(2, 2, 8, 16), state(2, 8, 8), to_init=False, read_at="post")
    x = tokens(C=16, dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match="float16"):
        tpu.linear(x, state(2, 2, 8, 16), state(2, 8, 8), to_init=False, read_at="post")


def abstract(n, B, N, C, H, dtype):
    shape = jax.ShapeDtypeStruct
    row = shape((n, B, N, 1, C), jnp.float32)
    return [*[shape((n, B, N, C, H), dtype)] * 3, row, row, row]


@pytest.mark.skipif(bool(_testing.no_tpu_compiler()), reason="needs libtpu")
@pytest.mark.parametrize(
    "topology",
    [
        pytest.param(t, marks=() if t == "v5e:2x2" else pytest.mark.slow)
        for t in _testing.TOPOLOGIES
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_linear_form_compiles_for_tpus(topology, dtype):
    shape, H = jax.ShapeDtypeStruct, 64

    def loss(q, k, v, theta, log_a, log_eta, state, initial):
        x = Tokens(q, k, v, theta, log_a, log_eta, theta > 0)
        y, after = tpu.linear(x, state, initial, to_init=False, read_at="post")
        return y.astype(jnp.float32).sum() + after.sum()

    given = [*abstract(4, 2, 2, 128, H, dtype), shape((2, 2, H, 2 * H), jnp.float32)]
    given.append(shape((2, H, H), jnp.float32))
    _testing.compile_for_tpu(jax.grad(loss, tuple(range(8))), *given, topology=topology)


@pytest.mark.skipif(bool(_testing.no_tpu_compiler()), reason="needs libtpu")
@pytest.mark.parametrize(
    ("topology", "depth", "dtype"),
    [
        pytest.param(t, d, dtype, marks=() if (t, d) == ("v5e:2x2", 2) else pytest.mark.slow)
        for t in _testing.TOPOLOGIES
        for d, dtype in ((1, jnp.float32), (2, jnp.bfloat16), (4, jnp.float32))
    ],
)
def test_anchored_chunks_compile_for_tpus(topology, depth, dtype):
    shape, H = jax.ShapeDtypeStruct, 64
    net = Network(depth, 4, "gelu", "residual_ln" if depth > 1 else "none")
    form = Form(net)
    leaves = jax.eval_shape(lambda: net.init(jax.random.key(0), 2, H))
    names = net.matrices

    def loss(q, k, v, theta, log_a, log_eta, *leaves):
        x = Tokens(q, k, v, theta, log_a, log_eta, theta > 0)
        W = dict(zip(names, leaves))
        initial = {n: w[0] for n, w in W.items()}
        gamma = jnp.zeros((2, 1, H)) if depth > 1 else None
        y, W, _ = tpu.deep(form, x, W, jax.tree.map(jnp.zeros_like, W), initial, gamma)
        return y.astype(jnp.float32).sum() + sum(w.sum() for w in W.values())

    given = abstract(4, 1, 2, 64, H, dtype)
    given += [shape((1, *leaves[n].shape), jnp.float32) for n in names]
    _testing.compile_for_tpu(jax.grad(loss, tuple(range(len(given)))), *given, topology=topology)


@pytest.mark.parametrize(
    "memory",
    [
        Delta(tile=8),
        pytest.param(Deep(anchor=8, theta_max=0.1), marks=pytest.mark.slow),
    ],
    ids=["delta", "deep"],
)
def test_a_memory_runs_on_the_kernel(memory, monkeypatch):
    """Odd length, NaN in the padding, per-sequence states, documents, bfloat16."""
    params = memory.init(jax.random.key(0), width=16, heads=2)
    x = jax.random.normal(jax.random.key(1), (2, 21, 16))
    at = 21 - 21 % 8  # a kernel begins where a chunk begins
    _, before = memory(params, x[:, ::-1][:, :at])
    segments = jnp.where(jnp.arange(21) < 19, jnp.arange(21) // 11, -1)[None].repeat(2, 0)
    given = jnp.where((segments < 0)[..., None], jnp.nan, x)

    def run(implementation):
        def loss(params, x):
            y, s = memory(params, x, before, segments=segments, aligned=True,
                          implementation=implementation)  # fmt: skip
            return jnp.sum(jnp.sin(y)), (y, s)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, given)

    true = run("chunked")
    with pytest.raises(NotImplementedError, match="tpu: it needs a TPU, this is cpu"):
        run("tpu")
    monkeypatch.setattr("causal_jax.memory._kernels.INTERPRET", True)
    close(run("tpu"), true, 3e-5)
    with pytest.raises(NotImplementedError, match="gpu: "):
        run("gpu")


@pytest.mark.parametrize(
    "how",
    [{}, pytest.param({"decay_to": "init", "read_at": "pre", "momentum": False},
                      marks=pytest.mark.slow)],
    ids=["plain", "to_init"],
)  # fmt: skip
def test_time_over_devices_is_the_same(how, tmp_path):
    """Chunks over the `context` axis: outputs, gradients, documents, the state as a file."""
    memory = Delta(tile=4, **how)
    params = memory.init(jax.random.key(0), width=16, heads=2)
    stir = lambda w: w + 0.3 * jax.random.normal(jax.random.key(3), w.shape)  # noqa: E731
    params["memory"] = jax.tree.map(stir, params["memory"])
    x = jax.random.normal(jax.random.key(1), (2, 32, 16))
    _, before = memory(params, x[:, ::-1])
    segments = jnp.where(jnp.arange(32) < 30, jnp.arange(32) // 13, -1)[None].repeat(2, 0)

    def loss(params, x):
        y, s = memory(params, x, before, segments=segments)
        return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.cos(w)) for w in s.weights.values()), (y, s)

    true = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "context")))
        sharded = jax.jit(jax.value_and_grad(lambda p, x: loss(p, x), (0, 1), has_aux=True))
        program = sharded.lower(params, placed).compile()
        ours = program(params, placed)
    assert "all-gather" in str(program.as_text())
    close(ours, true, 2e-5)
    file = tmp_path / "state.npz"
    ours[0][1][1].save(file)
    close(memory.load_state(params, file), true[0][1][1], 1e-5)
