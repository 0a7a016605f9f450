"""In-context linear regression: predict y of a query from noisy pairs of a problem never seen.

    x_l, x_q ~ N(0, Sigma)                   Sigma_ij = rho^|i-j|
    beta_t ~ N(0, I / d_t) on the d_t coordinates of output t, 0 on all others
    y_lt = beta_t . x_l + eps                eps ~ N(0, noise), on the query's y as well

Every row is another problem, made on the device from a key: a training loop draws its batch inside
the compiled step. The noise on the query makes `noise` the least loss that anything can reach.

Garg et al. 2022 (arXiv 2208.01066); several outputs and correlated inputs as in arXiv 2503.12734.
Deviation from the code of the latter: the noise has the same variance for every output.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Float, Key


class Prompt(NamedTuple):
    """A batch of problems: S pairs, a query and its noisy answer, O outputs.

    Attributes:
        x: [B, S, D]. y: [B, S, O]. xq: [B, D]. yq: [B, O].
    """

    x: Array
    y: Array
    xq: Array
    yq: Array


@dataclasses.dataclass(frozen=True)
class LinearRegression:
    """The distribution of problems.

    Attributes:
        pairs: pairs in the prompt, S.
        dim: coordinates of x, D.
        noise: variance of the noise on every y.
        rho: correlation of neighbouring coordinates of x; 0: none.
        supports: coordinates [start, end) that each output depends on; (): one output, on all.
    """

    pairs: int = 40
    dim: int = 5
    noise: float = 0.1
    rho: float = 0.0
    supports: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for name in ("pairs", "dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.noise >= 0:
            raise InputError(f"noise={self.noise}: expected a variance >= 0")
        if not -1 < self.rho < 1:
            raise InputError(f"rho={self.rho}: expected a correlation between -1 and 1")
        for start, end in self.supports:
            if not 0 <= start < end <= self.dim:
                raise InputError(
                    f"supports: [{start}, {end}) is no range of coordinates of 0..{self.dim}"
                )

    @property
    def outputs(self) -> int:
        """Number of outputs, O."""
        return len(self.supports) or 1

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Sigma."""
        lag = np.arange(self.dim)
        return np.power(self.rho, np.abs(lag[:, None] - lag[None])).astype(np.float64)

    @property
    def prior(self) -> Float[np.ndarray, "O D"]:
        """Variance of each coefficient: 1/d_t on the output's coordinates, else 0."""
        out = np.zeros((self.outputs, self.dim))
        for row, (start, end) in zip(out, self.supports or ((0, self.dim),), strict=True):
            row[start:end] = 1.0 / (end - start)
        return out

    def sample(self, key: Key[Array, ""], batch: int) -> Prompt:
        """Fresh problems, float32; same key, same problems. `batch` is static under jit."""
        S, D, O = self.pairs, self.dim, self.outputs
        # One draw for all: the generator is most of such a program, to compile and to run.
        draws = jax.random.normal(key, (batch, S * D + D + O * D + S * O + O))
        cuts = np.cumsum([S * D, D, O * D, S * O])
        x, xq, beta, noise, noise_q = jnp.split(draws, cuts, axis=1)
        x, noise = x.reshape(batch, S, D), noise.reshape(batch, S, O)
        beta = beta.reshape(batch, O, D) * jnp.asarray(np.sqrt(self.prior), jnp.float32)[None]
        if self.rho:
            root = jnp.asarray(np.linalg.cholesky(self.covariance).T, jnp.float32)
            x, xq = x @ root, xq @ root
        y = jnp.einsum("bsd,bod->bso", x, beta) + self.noise**0.5 * noise
        yq = jnp.einsum("bd,bod->bo", xq, beta) + self.noise**0.5 * noise_q
        return Prompt(x, y, xq, yq)
