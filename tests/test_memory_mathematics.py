"""Memories against formulas written out: the paper's, its relatives', titans-pytorch's numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from titans_pytorch_numbers import CASES as PARITY
from titans_pytorch_numbers import FILE

from causal_jax.memory import Deep, Delta, Gates
from causal_jax.memory.delta import momentum_delta
from causal_jax.memory.parity import parity_memory, parity_params, parity_spec
from pallas_kernels.memory_chunk.decay import (
    inverse_by_masks,
    segment_sums,
    sums_by_product,
    unit_lower_inverse,
)


def inputs(T=37, N=2, H=8, V=8, B=1, seed=0):
    """(q, k, v, theta, a, eta), keys and queries of unit length, float64."""
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    q, k = (unit(rng.standard_normal((B, T, N, H))) for _ in range(2))
    v = rng.standard_normal((B, T, N, V))
    theta, a, eta = (rng.uniform(lo, hi, (B, T, N)) for lo, hi in ((0, 1), (0.9, 1), (0, 0.9)))
    return q, k, v, theta, a, eta


def by_hand(q, k, v, theta, a, eta, M, S):
    """Equations 13 to 15 of arXiv 2501.00663 with L_M = 1, [B, N, H, V]."""
    ys = []
    for t in range(q.shape[1]):
        kt, vt = k[:, t, :, None], v[:, t, :, None]
        gate = lambda g: g[:, t, :, None, None]  # noqa: B023, E731
        S = gate(eta) * S - gate(theta) * np.swapaxes(kt, -1, -2) @ (kt @ M - vt)
        M = gate(a) * M + S
        ys.append((q[:, t, :, None] @ M)[:, :, 0])
    return np.stack(ys, 1), M, S


def single(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def test_the_linear_form_is_the_formula_at_any_tile():
    q, k, v, theta, a, eta = inputs()
    rng = np.random.default_rng(1)
    M, S = (0.5 * rng.standard_normal((1, 2, 8, 8)) for _ in range(2))
    true = by_hand(q, k, v, theta, a, eta, M, S)
    gates = Gates(*single(theta, np.log(a), np.log(eta)))
    for tile in (1, 4, 16, 37):
        out = jax.jit(lambda *x, tile=tile: momentum_delta(*x, tile=tile))(
            *single(q, k, v), gates, *single(M, S)
        )
        for ours, theirs in zip(out[:3], true):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_without_momentum_it_is_gated_deltanet():
    """S_t = g (I - beta k^T k) S + beta k^T v' with g = a, beta = theta / a, v' = a v."""
    q, k, v, theta, a, _ = inputs(T=20)
    state, ys = np.zeros((1, 2, 8, 8)), []
    for t in range(20):
        kt, beta = k[:, t, :, None], (theta / a)[:, t, :, None, None]
        g = a[:, t, :, None, None]
        kT = np.swapaxes(kt, -1, -2)
        state = g * (state - beta * kT @ (kt @ state)) + beta * kT @ (g * v[:, t, :, None])
        ys.append((q[:, t, :, None] @ state)[:, :, 0])
    y, *_ = momentum_delta(*single(q, k, v), Gates(*single(theta, np.log(a))), tile=8)
    np.testing.assert_allclose(y, np.stack(ys, 1), atol=1e-5)
    naive, *_ = momentum_delta(*single(q, k, v / a[..., None]), Gates(*single(theta, np.log(a))))
    assert np.abs(naive - np.stack(ys, 1)).max() > 1e-2


def test_without_momentum_and_decay_anchors_are_the_inner_loop_of_ttt():
    """W_t = W_b - sum of theta_i grad l_i(W_b) over tokens of the chunk (arXiv 2407.04620)."""
    q, k, v, theta, *_ = inputs(T=16)
    theta, C, W = 0.1 * theta, 8, 0.3 * np.random.default_rng(2).standard_normal((2, 8, 8))
    ys, start = [], W.copy()
    for t in range(16):
        if t % C == 0:
            anchor = W.copy()
        kt = k[0, t, :, None]
        W = W - theta[0, t, :, None, None] * np.swapaxes(kt, -1, -2) @ (
            kt @ anchor - v[0, t, :, None]
        )
        ys.append((q[0, t, :, None] @ W)[:, 0])
    memory = Deep(anchor=C, depth=1, around="none", momentum=False, decay=False)
    params = memory.init(jax.random.key(0), width=16, heads=2)
    leaves = {"w0": jnp.asarray(start, jnp.float32)}
    state = memory.init_state({**params, "memory": leaves}, 1)
    y, state = memory.run(leaves, state, *single(q, k, v), Gates(*single(theta)), aligned=True)
    np.testing.assert_allclose(y[0], np.stack(ys), atol=1e-5)
    np.testing.assert_allclose(state.weights["w0"][0], W, atol=1e-5)


def test_anchor_one_is_exact_and_anchors_are_not():
    q, k, v, theta, a, eta = inputs(T=16)
    gates = Gates(*single(theta, np.log(a), np.log(eta)))
    exact, *_ = momentum_delta(*single(q, k, v), gates)
    plain = {"depth": 1, "around": "none", "theta_max": 0.01}

    def run(anchor):
        memory = Deep(anchor=anchor, **plain)
        params = memory.init(jax.random.key(0), width=16, heads=2)
        state = memory.init_state(params, 1)
        return memory.run(params["memory"], state, *single(q, k, v), gates, aligned=True)[0]

    np.testing.assert_allclose(run(1), exact, atol=1e-5)
    assert np.abs(run(8) - exact).max() > 1e-2


def test_orthonormal_keys_are_remembered_and_the_last_value_wins():
    k = np.tile(np.eye(8), (2, 1))[None, :, None]
    v = np.random.default_rng(0).standard_normal((1, 16, 1, 8))
    gates = Gates(jnp.ones((1, 16, 1)))
    _, M, *_ = momentum_delta(*single(k, k, v), gates)
    np.testing.assert_allclose(M[0, 0], v[0, 8:, 0], atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9])
def test_the_bound_on_step_sizes_is_where_it_diverges(eta):
    T, k = 600, np.zeros((1, 600, 1, 4))
    k[..., 0] = 1
    bias = 30.0 if eta == 1 else float(np.log(eta / (1 - eta))) if eta else -40.0
    bound = Delta(decay=False, eta_bias=bias).stability
    assert abs(bound - 2 * (1 + eta)) < 1e-6
    for theta, stable in ((0.98 * bound, True), (1.02 * bound, False)):
        gates = Gates(jnp.full((1, T, 1), theta), None, jnp.full((1, T, 1), np.log(eta + 1e-30)))
        _, M, *_ = momentum_delta(*single(k, k, k), gates)
        assert (float(jnp.abs(M).max()) < 3) == stable


def test_sums_and_inverses_are_accurate():
    logs = np.random.default_rng(0).uniform(-0.1, 0, (3, 50))
    logs[:, 20:25] = -200.0
    true = np.cumsum(logs, -1)[:, :, None] - np.cumsum(logs, -1)[:, None]
    rows, columns = np.tril_indices(50)
    for sums in (segment_sums, sums_by_product):
        ours = np.asarray(sums(jnp.asarray(logs[:, None], jnp.float32)))[:, rows, columns]
        np.testing.assert_allclose(ours, true[:, rows, columns], rtol=2e-6, atol=1e-6)
    keys = np.ones((128, 4)) / 2 + 0.01 * np.random.default_rng(1).standard_normal((128, 4))
    x = np.tril(keys @ keys.T, -1)
    true = np.linalg.inv(np.eye(128) + x)
    for inverse in (unit_lower_inverse, inverse_by_masks):
        np.testing.assert_allclose(inverse(jnp.asarray(x, jnp.float32)), true, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "whole" else pytest.mark.slow) for n in PARITY],
)
def test_parity_with_titans_pytorch(name):
    options, _ = PARITY[name]
    data = np.load(FILE)
    stored = lambda part: {  # noqa: E731
        n.removeprefix(f"{name}/{part}/"): data[n] for n in data if n.startswith(f"{name}/{part}/")
    }
    network = options.get("default_model_kwargs", {})
    spec = parity_spec(
        chunk=options["chunk_size"], batch_size=options.get("batch_size"),
        momentum=options.get("momentum", True), depth=network.get("depth", 2),
    )  # fmt: skip
    params = parity_params(stored("param"), options.get("heads", 1))

    def loss(x):
        y, state = parity_memory(spec, params, x)
        return jnp.sum(jnp.sin(y)), (y, state)

    dx, (y, state) = jax.jit(jax.grad(loss, has_aux=True))(data[f"{name}/x"])
    np.testing.assert_allclose(y, data[f"{name}/y"], atol=1e-5)
    np.testing.assert_allclose(dx, data[f"{name}/dx"], atol=2e-4)
    for theirs, w in stored("weights").items():
        ours = "gamma" if theirs == "norm.gamma" else f"w{theirs.split('.')[-1]}"
        np.testing.assert_allclose(state.weights[ours].reshape(w.shape), w, atol=1e-5)


def test_unknown_titans_pytorch_options_are_refused():
    data = np.load(FILE)
    state = {n.removeprefix("whole/param/"): data[n] for n in data if n.startswith("whole/param/")}
    with pytest.raises(ValueError, match="transition_gate"):
        parity_params({**state, "transition_gate": np.zeros(())})
    assert dataclasses.is_dataclass(parity_spec(chunk=4))
