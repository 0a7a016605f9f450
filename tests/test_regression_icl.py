"""In-context linear regression: problems, the layer, and what it is compared with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax import taps
from causal_jax.attention.linear import Linear, linear_attention
from causal_jax.data.tasks import regression_predictors as predictors
from causal_jax.data.tasks.linear_regression import LinearRegression
from causal_jax.errors import InputError
from causal_jax.models import models
from causal_jax.models.regression_attention import RegressionAttention, pattern_of
from causal_jax.training.state import graph_of

TASK = LinearRegression()
draw = jax.jit(LinearRegression.sample, static_argnums=(0, 2))
apply = jax.jit(
    lambda spec, params, *a, **kw: nnx.merge(graph_of(spec), params)(*a, **kw), static_argnums=0
)


def mse(guess, prompt):
    return float(jnp.mean((guess - prompt.yq) ** 2))


def layer(spec, omega, mu):
    """Parameters with KQ_h = omega_h I on x and OV_h = mu_h e_y."""
    model, D = spec.build(jax.random.key(0)), spec.width
    eye = jnp.diag((jnp.arange(D) < spec.dim).astype(jnp.float32))
    kq = jnp.asarray(omega, jnp.float32)[:, None, None] * eye[None]
    ov = jnp.asarray(mu, jnp.float32)[:, None, None] * jnp.eye(spec.outputs, D, k=spec.dim)[None]
    model.set_circuits(kq, ov)
    return nnx.split(model)[1]


def test_problems_are_drawn_from_the_distribution_they_name():
    task = LinearRegression(pairs=3, dim=5, noise=0.25, rho=0.5, supports=((0, 3), (1, 5)))
    prompt = draw(task, jax.random.key(0), 40_000)
    again = draw(task, jax.random.key(0), 40_000)
    jax.tree.map(np.testing.assert_array_equal, prompt, again)
    assert [a.shape for a in prompt] == [(40_000, 3, 5), (40_000, 3, 2), (40_000, 5), (40_000, 2)]
    for x in (prompt.x[:, 1], prompt.xq):
        np.testing.assert_allclose(np.cov(np.asarray(x).T), task.covariance, atol=0.03)
    # y = beta x + noise: what is left of two pairs' products is the prior under x.
    for o, prior in enumerate(task.prior):
        variance = np.trace(np.diag(prior) @ task.covariance) + task.noise
        assert abs(np.var(prompt.yq[:, o]) - variance) < 0.05
        assert abs(np.var(prompt.y[:, 0, o]) - variance) < 0.05
        products = np.einsum("b,bi,bj->bij", prompt.y[:, 0, o] * prompt.y[:, 1, o],
                             prompt.x[:, 0], prompt.x[:, 1])  # fmt: skip
        cross = products.mean(0)
        wanted = task.covariance @ np.diag(prior) @ task.covariance
        np.testing.assert_allclose(cross, wanted, atol=0.05)
    assert task.prior[0, 3:].sum() == 0
    assert task.prior[1, 0] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": 0}, "pairs=0"),
        ({"dim": 0}, "dim=0"),
        ({"noise": -0.1}, "noise=-0.1"),
        ({"rho": 1.0}, "rho=1.0"),
        ({"supports": ((0, 6),)}, r"\[0, 6\)"),
    ],
)
def test_impossible_problems(fields, message):
    with pytest.raises(InputError, match=message):
        LinearRegression(**fields)


def test_the_layer_is_its_formula():
    spec = RegressionAttention(dim=3, outputs=2, heads=3)
    model = spec.build(jax.random.key(1))
    task = LinearRegression(pairs=7, dim=3, supports=((0, 2), (1, 3)))
    prompt = draw(task, jax.random.key(2), 4)
    got = apply(spec, nnx.split(model)[1], *prompt[:3])
    q, k, v, o = (np.asarray(w[...], np.float64) for w in (model.q, model.k, model.v, model.o))
    wanted = np.zeros((4, 2))
    for b in range(4):
        Z = np.concatenate([prompt.x[b], prompt.y[b]], -1).T.astype(np.float64)
        zq = np.concatenate([prompt.xq[b], np.zeros(2)])
        for h in range(3):
            s = Z.T @ k[h].T @ q[h] @ zq / np.sqrt(5)
            a = np.exp(s - s.max())
            wanted[b] += o[h] @ v[h] @ Z @ (a / a.sum())
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    bound = 1 / np.sqrt(spec.width)
    assert 0.8 * bound < np.abs(q).max() <= bound
    assert np.abs(o).max() <= bound / np.sqrt(3)
    assert models["regression_attention"] is RegressionAttention
    assert spec.param_count() == 3 * (3 * 25 + 10)


def test_circuits_are_all_there_is():
    spec = RegressionAttention(heads=2)
    model, prompt = spec.build(jax.random.key(1)), draw(TASK, jax.random.key(2), 8)
    kq, ov = model.circuits()
    other = spec.build(jax.random.key(5))
    other.set_circuits(kq, ov)
    got, wanted = (apply(spec, nnx.split(m)[1], *prompt[:3]) for m in (other, model))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    found = pattern_of(kq, ov)
    for h in range(2):
        block = np.asarray(kq[h])[:, :5].copy()
        np.testing.assert_allclose(found.omega[h], np.diag(block).mean(), rtol=1e-5)
        np.testing.assert_allclose(found.spread[h], np.diag(block).std(), rtol=1e-4)
        np.fill_diagonal(block, 0)
        np.testing.assert_allclose(found.off[h], np.abs(block).max(), rtol=1e-6)
        np.testing.assert_allclose(found.mu[h, 0], ov[h, 0, 5], rtol=1e-6)
        np.testing.assert_allclose(found.rest[h], np.abs(ov[h, 0, :5]).max(), rtol=1e-6)


def test_symmetries():
    spec = RegressionAttention(heads=2)
    two, prompt = layer(spec, [0.4, -0.3], [1.5, -1.5]), draw(TASK, jax.random.key(3), 16)
    x, y, xq, _ = prompt
    f = apply(spec, two, x, y, xq)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_allclose(apply(spec, two, x[:, order], y[:, order], xq), f, atol=1e-5)
    np.testing.assert_allclose(apply(spec, two, x, 3 * y, xq), 3 * f, atol=1e-5)
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0], jnp.float32)
    np.testing.assert_allclose(apply(spec, two, x @ turn, y, xq @ turn), f, atol=1e-5)
    # Zero-sum heads cannot see a constant on y, a single one passes it on.
    assert jnp.abs(apply(spec, two, x, y + 1, xq) - f).max() < 1e-5
    alone = dataclasses.replace(spec, heads=1)
    one = layer(alone, [0.4], [1.5])
    moved = apply(alone, one, x, y + 1, xq) - apply(alone, one, x, y, xq)
    np.testing.assert_allclose(moved, 1.5, atol=1e-5)


def test_masked_pairs_do_not_exist():
    spec = RegressionAttention(heads=3)
    params = nnx.split(spec.build(jax.random.key(1)))[1]
    x, y, xq, _ = draw(TASK, jax.random.key(3), 4)
    padded = (jnp.concatenate([a, jnp.full_like(a[:, :5], jnp.nan)], axis=1) for a in (x, y))
    mask = jnp.broadcast_to((jnp.arange(45) < 40)[None], (4, 45))
    np.testing.assert_allclose(
        apply(spec, params, *padded, xq, mask=mask), apply(spec, params, x, y, xq), atol=1e-5
    )


def test_sites():
    spec = RegressionAttention(heads=2)
    model, prompt = spec.build(jax.random.key(1)), draw(TASK, jax.random.key(2), 3)
    out, seen = taps.run(model, *prompt[:3], capture=("attn.pattern", "out"))
    assert seen["attn.pattern"].shape == (3, 2, 1, 40)
    np.testing.assert_allclose(seen["attn.pattern"].sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(seen["out"], out)


@pytest.mark.parametrize(
    ("fields", "message"), [({"heads": 0}, "heads=0"), ({"vocab": 7}, "vocab=7")]
)
def test_impossible_layers(fields, message):
    with pytest.raises(InputError, match=message):
        RegressionAttention(**fields)


def test_two_opposite_heads_are_debiased_gradient_descent():
    """omega = 1e-3: softmax is linear in the scores, and only the mean of y cancels."""
    eta, omega = predictors.debiased_step(5, 40, 0.1), 1e-3
    prompt = draw(TASK, jax.random.key(0), 256)
    spec = RegressionAttention(heads=2)
    mu = eta / (2 * omega)
    got = apply(spec, layer(spec, [omega, -omega], [mu, -mu]), *prompt[:3])
    wanted = predictors.debiased_gd(prompt, eta)
    assert jnp.linalg.norm(got - wanted) < 1e-3 * jnp.linalg.norm(wanted)
    assert jnp.linalg.norm(got - predictors.gd(prompt, eta)) > 1e-2 * jnp.linalg.norm(wanted)


def test_linear_attention_is_gradient_descent_and_its_divisor_is_a_length():
    prompt = draw(TASK, jax.random.key(0), 64)
    fixed = RegressionAttention(heads=1, attention=Linear(divisor=40.0))
    free = dataclasses.replace(fixed, attention=Linear())
    params, wanted = layer(fixed, [0.5], [2.0]), predictors.gd(prompt, 1.0)
    for spec in (fixed, free):
        np.testing.assert_allclose(apply(spec, params, *prompt[:3]), wanted, atol=1e-4)
    short = prompt._replace(x=prompt.x[:, :10], y=prompt.y[:, :10])
    wanted = predictors.gd(short, 1.0)
    np.testing.assert_allclose(apply(free, params, *short[:3]), wanted, atol=1e-4)
    np.testing.assert_allclose(4 * apply(fixed, params, *short[:3]), wanted, atol=1e-4)


def test_linear_attention_refuses():
    q = jnp.ones((1, 3, 3, 4))
    with pytest.raises(InputError, match="multiple of K"):
        linear_attention(q, q[:, :, :2], q[:, :, :2])
    with pytest.raises(InputError, match="divisor=0"):
        Linear(divisor=0.0)
    with pytest.raises(InputError, match="scale=inf"):
        Linear(scale=float("inf"))


def test_losses_of_gradient_descent_are_exact():
    for d, S, noise in ((5, 40, 0.1), (3, 10, 0.5)):
        task = LinearRegression(S, d, noise)
        prompt = draw(task, jax.random.key(7), 400_000)
        for step, loss, rule in (
            (predictors.plain_step, predictors.plain_loss, predictors.gd),
            (predictors.debiased_step, predictors.debiased_loss, predictors.debiased_gd),
        ):
            eta = step(d, S, noise)
            found = [mse(rule(prompt, c * eta), prompt) for c in (0.8, 1.0, 1.25)]
            assert abs(found[1] / loss(d, S, noise) - 1) < 0.01
            assert found[1] < min(found[0], found[2])


def test_ridge_is_the_bayes_rule():
    task = LinearRegression(pairs=6, dim=4, noise=0.3, supports=((0, 2), (1, 4)))
    prompt = draw(task, jax.random.key(0), 20)
    got = predictors.ridge(prompt, task.noise, task.prior)
    x, y, xq = (np.asarray(a, np.float64) for a in prompt[:3])
    for b in range(20):
        for o, (i, j) in enumerate(task.supports):
            X, d = x[b][:, i:j], j - i
            beta = np.linalg.solve(X.T @ X + d * task.noise * np.eye(d), X.T @ y[b, :, o])
            np.testing.assert_allclose(got[b, o], xq[b, i:j] @ beta, atol=1e-5)
    big = draw(TASK, jax.random.key(1), 20_000)
    assert abs(mse(predictors.ridge(big, 0.1, TASK.prior), big) - 0.1141) < 0.004
    np.testing.assert_allclose(predictors.ridge_limit(5, 40, 0.1), 0.11406, atol=1e-5)


def test_two_ridges_in_one_program_end():
    """Batched LAPACK solves did not, on a CPU with two cores."""
    prompt = draw(TASK, jax.random.key(1), 5000)
    both = jax.jit(lambda p: [predictors.ridge(p, n, TASK.prior) for n in (0.1, 0.2, 0.4)])(prompt)
    assert all(jnp.isfinite(x).all() for x in both)


def test_the_preconditioner_is_a_minimum():
    task = LinearRegression(rho=0.5)
    prompt, best = draw(task, jax.random.key(0), 200_000), predictors.preconditioner(task)
    lowest = mse(predictors.preconditioned_gd(prompt, best), prompt)
    rng = np.random.default_rng(0)
    for _ in range(4):
        other = best + 0.15 * rng.normal(size=best.shape)
        assert mse(predictors.preconditioned_gd(prompt, other), prompt) > lowest
    for other in (np.linalg.inv(task.covariance), np.eye(5)):
        assert mse(predictors.preconditioned_gd(prompt, other), prompt) > lowest
    assert predictors.misfit(-3 * best, best) < 1e-12
    np.testing.assert_allclose(predictors.misfit(np.eye(2), np.diag([1.0, 0.0])), 0.5**0.5)


@pytest.mark.parametrize(
    ("S", "tolerance"), [(40, 0.12), pytest.param(400, 0.03, marks=pytest.mark.slow)]
)
def test_the_reduced_loss_is_near_the_layers(S, tolerance):
    spec, omega, noise = RegressionAttention(heads=2), 0.15, 0.1
    mu = predictors.debiased_step(5, S, noise) / (2 * omega)
    params, task = layer(spec, [omega, -omega], [mu, -mu]), LinearRegression(S)

    @jax.jit
    def loss(key):
        prompt = task.sample(key, 10_000)
        guess = nnx.merge(graph_of(spec), params)(*prompt[:3])
        return jnp.mean((guess - prompt.yq) ** 2)

    found = np.mean([loss(key) for key in jax.random.split(jax.random.key(0), 12)])
    reduced = predictors.reduced_loss(
        jnp.array([omega, -omega]), jnp.array([mu, -mu]), d=5, S=S, noise=noise
    )
    assert abs(float(reduced) / found - 1) < tolerance


def test_the_reduced_loss_has_its_minimum_where_it_says():
    kw = {"d": 5, "S": 40, "noise": 0.1}
    for omega in (jnp.array([0.4]), jnp.array([0.2, -0.3]), jnp.array([0.1, 0.3, -0.2])):
        mu = predictors.reduced_mu(omega, **kw)
        slope = jax.grad(predictors.reduced_loss, argnums=1)(omega, mu, **kw)
        np.testing.assert_allclose(slope, 0, atol=1e-4)
    # dL/dmu = -2 omega + 2 C mu, dL/domega_i = -2 mu_i + 2 mu_i (mu.omega) + 2 (1+s)/S d mu_i
    # sum_j mu_j omega_j exp(d omega_i omega_j)
    omega, mu = jnp.array([0.2, -0.3]), jnp.array([1.0, -2.0])
    got = jax.grad(predictors.reduced_loss)(omega, mu, **kw)
    e = np.exp(5 * np.outer(omega, omega))
    wanted = 2 * mu * (mu @ omega - 1 + 1.1 / 40 * 5 * (e @ (mu * omega)))
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    # One head: omega = 1/sqrt(d). Two: the limit of small omega.
    best = 5**-0.5
    for shift, sign in ((0.0, 0), (0.05, 1), (-0.05, 1)):
        omega = jnp.array([best + shift])
        value = predictors.reduced_loss(omega, predictors.reduced_mu(omega, **kw), **kw)
        least = predictors.reduced_optimum(1, **kw)
        assert (value > least + 1e-5) if sign else abs(value - least) < 1e-5
    omega = jnp.array([0.01, -0.01])
    mu = jnp.array([1.0, -1.0]) * predictors.debiased_step(5, 40, 0.1) / 0.02
    value = predictors.reduced_loss(omega, mu, **kw)
    assert abs(value - predictors.reduced_optimum(2, **kw)) < 1e-4
