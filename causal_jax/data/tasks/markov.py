"""Local language: symbols of a random Markov chain, each drawn by the few in front of it.

    x_t ~ P[x_{t-order} ... x_{t-1}],   every row of P from a Dirichlet distribution

Everything that can be known of the next symbol is in the last `order` ones, so a model that sees
so many can come down to the entropy rate and no model below it; one that sees a single symbol stays
at `entropy(1)`. Both are computed from P, exactly. A row begins with a context from the stationary
distribution. The setting of this project's check of GAM, arXiv 2509.00605.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from causal_jax.data.tasks._base import Task, tasks, uniforms


@tasks.register("markov")
@dataclass(frozen=True)
class Markov(Task):
    """A chain of some order over some symbols; every token but the first is asked for.

    Args:
        length: tokens of a row.
        symbols: different ones.
        order: how many determine the next.
        concentration: of the Dirichlet distribution; small: some symbols are far likelier.
        chain: which chain.
    """

    length: int = 96
    symbols: int = 8
    order: int = 3
    concentration: float = 0.3
    chain: int = 0

    def __post_init__(self):
        self.need(self.symbols >= 2, "symbols", "at least 2")
        self.need(self.order >= 1, "order", "at least 1")
        self.need(self.symbols**self.order <= 2**16, "order", "at most 65536 contexts")
        self.need(self.concentration > 0, "concentration", "above 0")
        self.need(self.length >= self.order, "length", f"at least order={self.order}")
        self.need(self.chain >= 0, "chain", "0 or more")

    @property
    def vocab(self) -> int:
        """The symbols."""
        return self.symbols

    @property
    def draws(self) -> int:
        """The first context, then one number per symbol."""
        return self.length + 2 - self.order

    @property
    def _powers(self) -> np.ndarray:
        return self.symbols ** np.arange(self.order)[None, ::-1]

    def table(self) -> Float[np.ndarray, "C V"]:
        """P: a row per context, the oldest symbol being the highest digit."""
        return _table(self.symbols, self.order, self.concentration, self.chain)

    def stationary(self) -> Float[np.ndarray, "C"]:
        """How often each context comes."""
        return _stationary(self.symbols, self.order, self.concentration, self.chain)

    def entropy(self, seen: int | None = None) -> float:
        """Nats of the next symbol given the last `seen` ones; None: all, the entropy rate.

        Raises:
            InputError: more than `order`.
        """
        seen = self.order if seen is None else seen
        self.need(0 <= seen <= self.order, "order", f"at least seen={seen}")
        joint = (self.stationary()[:, None] * self.table()).reshape(
            -1, self.symbols**seen, self.symbols
        )
        joint = joint.sum(0)
        own = joint.sum(1, keepdims=True)
        share = np.divide(joint, own, out=np.ones_like(joint), where=joint > 0)
        return float(-(joint * np.log(share)).sum())

    def sequences(
        self, u: Float[np.ndarray, "B draws"]
    ) -> tuple[Int[np.ndarray, "B T1"], Bool[np.ndarray, "B T1"]]:
        """See `Task.sequences`."""
        first = np.searchsorted(np.cumsum(self.stationary())[:-1], u[:, 0], side="right")
        limits, context, said = np.cumsum(self.table(), 1)[:, :-1], first, []
        for step in u[:, 1:].T:
            symbol = (step[:, None] >= limits[context]).sum(1)
            said.append(symbol)
            context = (context * self.symbols + symbol) % len(limits)
        digits = first[:, None] // self._powers % self.symbols
        return _all_but_first(np.concatenate([digits, np.stack(said, 1)], 1), np)

    def draw(
        self, key: jax.Array, rows: int, table: jax.Array, stationary: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Rows made on the device, of the chain whose arrays are given: (sequences, answers)."""
        keys = jax.random.split(key)
        first = jax.random.categorical(keys[0], jnp.log(stationary), shape=(rows,))
        limits = jnp.cumsum(table, 1)[:, :-1]

        def step(context, u):
            symbol = (u[:, None] >= limits[context]).sum(1)
            return (context * self.symbols + symbol) % len(table), symbol

        u = jax.random.uniform(keys[1], (self.draws - 1, rows))
        said = jax.lax.scan(step, first, u)[1]
        digits = first[:, None] // self._powers % self.symbols
        return _all_but_first(jnp.concatenate([digits, said.T], 1), jnp)


def _all_but_first(sequence: Any, xp: Any) -> tuple[Any, Any]:
    asked = xp.broadcast_to(xp.arange(sequence.shape[1])[None] > 0, sequence.shape)
    return sequence, asked


@functools.cache
def _table(symbols: int, order: int, concentration: float, chain: int) -> np.ndarray:
    from scipy.special import gammaincinv  # jax brings scipy

    # gamma variables by their quantile function: raw bits, which numpy never changes, decide all
    u = uniforms("markov.table", chain, range(symbols**order), symbols)
    drawn = gammaincinv(concentration, u) + 1e-30
    return drawn / drawn.sum(1, keepdims=True)


@functools.cache
def _stationary(symbols: int, order: int, concentration: float, chain: int) -> np.ndarray:
    table = _table(symbols, order, concentration, chain)
    pi = np.full(len(table), 1 / len(table))
    for _ in range(10_000):
        new = (pi[:, None] * table).reshape(symbols, -1).sum(0)
        done, pi = np.abs(new - pi).max() < 1e-13, new
        if done:
            break
    return pi
