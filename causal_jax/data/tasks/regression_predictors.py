"""What one layer of attention could compute of a regression prompt, in closed form.

    plain GD       y = (eta/S) sum_l y_l  x_l . x_q            linear attention can do it
    debiased GD    y = (eta/S) sum_l y_l (x_l - mean x) . x_q  two opposite softmax heads can
    ridge          y = x_q' (X'X + noise P^-1)^-1 X'y          Bayes, coefficients ~ N(0, P)

All are one step from zero, or the solution, of least squares over the S pairs of the prompt. The
losses below are exact for finite S with x ~ N(0, I), coefficients ~ N(0, I/d), and include the
noise on the query.

arXiv 2503.12734. `plain_loss`, `debiased_loss` and `preconditioner` are derived for this project;
the paper has the limits of large S and d.
"""

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.data.tasks.linear_regression import LinearRegression, Prompt
from causal_jax.shapes import Array, Float


def gd(prompt: Prompt, eta: float) -> Float[Array, "B O"]:
    """One step of gradient descent from zero: (eta/S) sum_l y_l x_l . x_q."""
    return eta * _correlation(prompt.x, prompt)


def debiased_gd(prompt: Prompt, eta: float) -> Float[Array, "B O"]:
    """The same about the mean of the inputs: (eta/S) sum_l y_l (x_l - mean x) . x_q."""
    return eta * _correlation(prompt.x - prompt.x.mean(1, keepdims=True), prompt)


def preconditioned_gd(
    prompt: Prompt, weights: Float[Array | np.ndarray, "D D"]
) -> Float[Array, "B O"]:
    """One step with a matrix for a step size: (1/S) sum_l y_l x_l' W x_q."""
    return _correlation(prompt.x @ jnp.asarray(weights, jnp.float32), prompt)


def _correlation(x: Array, prompt: Prompt) -> Array:
    return jnp.einsum("bso,bsd,bd->bo", prompt.y, x, prompt.xq) / x.shape[1]


def ridge(
    prompt: Prompt, noise: float, prior: Float[Array | np.ndarray, "O D"]
) -> Float[Array, "B O"]:
    """The Bayes rule of `LinearRegression`.

    Args:
        noise: variance of the noise on y.
        prior: variance of each coefficient; 0 for those known to be 0.
    """
    root = jnp.sqrt(jnp.asarray(prior, jnp.float32))
    x = prompt.x[:, None] * root[None, :, None]  # [B, O, S, D], prior N(0, I)
    gram = jnp.einsum("bosi,bosj->boij", x, x) + noise * jnp.eye(x.shape[-1])[None, None]
    beta = _solved(gram, jnp.einsum("bosd,bso->bod", x, prompt.y))
    return jnp.einsum("bod,bod->bo", beta, prompt.xq[:, None] * root[None])


def _solved(a: Array, b: Array) -> Array:
    """x with a x = b for positive definite a [..., D, D], by elimination.

    Not `jnp.linalg.solve`: two of its batched calls in one program wait for each other for ever on
    a CPU of two cores (jax 0.10.2).
    """

    def eliminate(i, m):
        row = m[..., i, :] / m[..., i, i, None]
        rest = m - m[..., :, i, None] * row[..., None, :]
        return rest.at[..., i, :].set(row)

    m = jnp.concatenate([a, b[..., None]], axis=-1)
    return jax.lax.fori_loop(0, a.shape[-1], eliminate, m)[..., -1]


def plain_step(d: int, S: int, noise: float) -> float:
    """Best eta of plain GD, 1 / (1 + (d+1)/S + noise d/S)."""
    return 1 / (1 + (d + 1) / S + noise * d / S)


def plain_loss(d: int, S: int, noise: float) -> float:
    """Loss of plain GD at its best step: 1 + noise - eta."""
    return 1 + noise - plain_step(d, S, noise)


def debiased_step(d: int, S: int, noise: float) -> float:
    """Best eta of debiased GD, 1 / (1 + (1 + noise) d/S)."""
    return 1 / (1 + (1 + noise) * d / S)


def debiased_loss(d: int, S: int, noise: float) -> float:
    """Loss of debiased GD at its best step: 1 + noise - (S-1) / (S + d (1 + noise))."""
    return 1 + noise - (S - 1) / (S + d * (1 + noise))


def ridge_limit(d: int, S: int, noise: float) -> float:
    """Loss of ridge regression as d, S grow with xi = d/S fixed.

    (noise + (xi-1)/xi + sqrt(4 noise + (noise + (1-xi)/xi)^2)) / 2
    """
    xi = d / S
    inside = 4 * noise + (noise + (1 - xi) / xi) ** 2
    return 0.5 * (noise + (xi - 1) / xi + inside**0.5)


def preconditioner(task: LinearRegression) -> Float[np.ndarray, "D D"]:
    """Best W of `preconditioned_gd` for one output on all coordinates.

    W = ((1 + 1/S) Sigma + (tr Sigma + d noise)/S I)^-1
    """
    sigma, S, d = task.covariance, task.pairs, task.dim
    gamma = (1 + 1 / S) * sigma + (np.trace(sigma) + d * task.noise) / S * np.eye(d)
    return np.linalg.inv(gamma)


def misfit(a: Float[Array | np.ndarray, "I J"], b: Float[Array | np.ndarray, "I J"]) -> float:
    """How far a is from every multiple of b: min_c |a - c b| / |a| (Frobenius)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - (a * b).sum() / (b * b).sum() * b) / np.linalg.norm(a))


def reduced_loss(
    omega: Float[Array, "H"], mu: Float[Array, "H"], *, d: int, S: int, noise: float
) -> Float[Array, ""]:
    """Loss of a layer with KQ_h = omega_h I and OV_h = mu_h e_y, softmax close to uniform.

    1 + noise - 2 mu.omega + mu' [omega omega' + (1 + noise)/S exp(d omega omega')] mu

    It drops terms of order 1/S: at S = 40, d = 5 it reads about a tenth low.
    """
    return 1 + noise - 2 * mu @ omega + mu @ _curvature(omega, d, S, noise) @ mu


def reduced_mu(omega: Float[Array, "H"], *, d: int, S: int, noise: float) -> Float[Array, "H"]:
    """The mu that minimises `reduced_loss` given omega."""
    return jnp.linalg.solve(_curvature(omega, d, S, noise), omega[:, None])[:, 0]


def _curvature(omega: Array, d: int, S: int, noise: float) -> Array:
    outer = omega[:, None] * omega[None]
    return outer + (1 + noise) / S * jnp.exp(d * outer)


def reduced_optimum(heads: int, *, d: int, S: int, noise: float) -> float:
    """Least `reduced_loss` of one head, or of two and more (approached as omega -> 0).

    one: 1 + noise - 1/(1 + (1 + noise) e d/S)      two: 1 + noise - 1/(1 + (1 + noise) d/S)
    """
    factor = np.e if heads == 1 else 1.0
    return float(1 + noise - 1 / (1 + (1 + noise) * factor * d / S))


def correlation(a: Float[Array, "*B"], b: Float[Array, "*B"]) -> Float[Array, ""]:
    """Pearson correlation of all entries."""
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / jnp.sqrt((a * a).sum() * (b * b).sum())
