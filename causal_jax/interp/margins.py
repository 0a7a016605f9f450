"""Which linear map a loss prefers: margins, and the maps of least norm that reach margin one.

    h_{i,a'}(W) = (W z_i)[a_i] - (W z_i)[a']
    least nuclear norm:    min ||W||_*        s.t. h_{i,a'}(W) >= 1 for all i and all a' != a_i
    least Frobenius norm:  min ||W||_F^2 / 2  s.t. the same

Gradient flow on cross entropy from a small start converges in direction to the second program for a
matrix W that is trained as a whole, and to a stationary point of the first where W = A B^T is
trained by its factors: min (||A||_F^2 + ||B||_F^2) / 2 over all factorisations of W is ||W||_*.
Lyu and Li 2020 (arXiv 1906.05890); for fact recall, Huang et al. 2025 (arXiv 2506.10887).
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from causal_jax.shapes import Array, Float, Int

Norm = Literal["nuclear", "frobenius"]


def margins(
    w: Float[Array, "A D"], z: Float[Array, "M D"], answers: Int[Array, "M"]
) -> Float[Array, "M A"]:
    """h: by how much each item's answer beats every other one; 0 at the answer itself."""
    scores = z @ w.T
    return jnp.take_along_axis(scores, answers[:, None], 1) - scores


def nuclear_norm(w: Float[Array, "... A D"]) -> Float[Array, "..."]:
    """Sum of the singular values."""
    return jnp.linalg.svd(w, compute_uv=False).sum(-1)


def effective_rank(w: Float[Array, "... A D"]) -> Float[Array, "..."]:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007)."""
    s = jnp.linalg.svd(w, compute_uv=False)
    share = s / jnp.maximum(s.sum(-1, keepdims=True), 1e-30)
    return jnp.exp(-(share * jnp.log(jnp.maximum(share, 1e-30))).sum(-1))


def least_norm(
    z: Float[np.ndarray, "M D"],
    answers: Int[np.ndarray, "M"],
    outputs: int,
    norm: Norm,
    *,
    seed: int = 0,
) -> Float[np.ndarray, "A D"]:
    """The map of least norm with all margins at least one, in float64.

    The constraints become a penalty c sum max(0, 1 - h)^2, minimised by L-BFGS from the last
    solution for c = 10, 50, ..., 10 * 5^9; the nuclear norm by its factors, of full rank.

    Args:
        z: [M, D] what the map reads, item by item.
        answers: [M] rows of the map that should win.
        outputs: number of rows, A.
        norm: which norm is least.
        seed: of the factors' random start.

    Returns:
        W [A, D]; margins fall short of one by about 1e-6.
    """
    from scipy.optimize import minimize

    width, rows = z.shape[1], np.arange(len(z))
    inner = min(outputs, width) if norm == "nuclear" else 0

    def unpack(flat):
        if not inner:
            return flat.reshape(outputs, width), None, None
        a, b = np.split(flat, [outputs * inner])
        a, b = a.reshape(outputs, inner), b.reshape(width, inner)
        return a @ b.T, a, b

    def objective(flat, penalty):
        w, a, b = unpack(flat)
        scores = z @ w.T
        short = np.maximum(0.0, 1.0 - (scores[rows, answers][:, None] - scores))
        short[rows, answers] = 0.0
        pull = 2 * penalty * short
        pull[rows, answers] = -pull.sum(1)
        grad = pull.T @ z
        value = 0.5 * flat @ flat + penalty * (short**2).sum()
        if not inner:
            return value, (w + grad).ravel()
        return value, np.concatenate([(a + grad @ b).ravel(), (b + grad.T @ a).ravel()])

    size = outputs * width if not inner else inner * (outputs + width)
    flat = np.random.default_rng(seed).normal(size=size) * 0.1
    for power in range(10):
        options = {"maxiter": 5000, "maxfun": 20000, "maxcor": 30, "ftol": 1e-14, "gtol": 1e-8}
        args = (10.0 * 5.0**power,)
        flat = minimize(objective, flat, args, "L-BFGS-B", jac=True, options=options).x
    return unpack(flat)[0]


def least_norm_convex(
    z: Float[np.ndarray, "M D"], answers: Int[np.ndarray, "M"], outputs: int, norm: Norm
) -> Float[np.ndarray, "A D"]:
    """The same map by an interior-point solver (cvxpy with Clarabel), as a second opinion."""
    import cvxpy

    w = cvxpy.Variable((outputs, z.shape[1]))
    scores, own = z @ w.T, np.eye(outputs)[answers]
    right = cvxpy.sum(cvxpy.multiply(own, scores), axis=1, keepdims=True)
    size = cvxpy.normNuc(w) if norm == "nuclear" else cvxpy.sum_squares(w) / 2
    # the answer's margin against itself is 0: `own` lifts it over the bar
    constraints = [right @ np.ones((1, outputs)) - scores + own >= 1]
    gap = {"tol_gap_abs": 1e-7, "tol_gap_rel": 1e-7, "tol_feas": 1e-7}
    cvxpy.Problem(cvxpy.Minimize(size), constraints).solve(solver="CLARABEL", **gap)
    return np.asarray(w.value)
