"""Judging candidates: which of the documents has the largest sum of digits?

    BOS | id d d | id d d | ... | query        -> the id of the best document

The best is unique, and in training it mostly stands first: a model has two ways to be right, to
compare and to look at the place, and learns a mixture. That is position bias, made to measure.

Ids: 0 BOS, 1 the query mark, then the names, then the ten digits. Rows are made on the device from
a key. PINE (arXiv 2407.01100) is measured on it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Float, Int, Key

DRAWS = 16  # of digits; the first without a tie is taken


@dataclasses.dataclass(frozen=True)
class Judge:
    """The task.

    Attributes:
        documents: documents in a row, M.
        names: different names.
    """

    documents: int = 3
    names: int = 20

    def __post_init__(self):
        if self.documents < 2:
            raise InputError(f"documents = {self.documents}: expected at least 2")
        if self.names < self.documents:
            raise InputError(f"names = {self.names}: expected at least {self.documents}, one each")

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return 2 + self.names + 10

    def sample(
        self, key: Key[Array, ""], batch: int, first: float | Float[Array, ""] = 0.0
    ) -> tuple[Int[Array, "B M 3"], Int[Array, "B"]]:
        """Documents of `batch` rows, and which of them is the best.

        Args:
            first: probability that the best is put first, whatever place it has drawn.
        """
        keys = jax.random.split(key, 3)
        digits = jax.random.randint(keys[0], (DRAWS, batch, self.documents, 2), 0, 10)
        totals = digits.sum(-1)
        unique = (totals == totals.max(-1, keepdims=True)).sum(-1) == 1
        rows = jnp.arange(batch)
        digits = digits[unique.argmax(0), rows]
        names = jax.vmap(lambda k: jax.random.permutation(k, self.names)[: self.documents])(
            jax.random.split(keys[1], batch)
        )
        documents = jnp.concatenate([2 + names[..., None], 2 + self.names + digits], -1)
        best = digits.sum(-1).argmax(-1)
        moved = jax.random.uniform(keys[2], (batch,)) < first
        order = jnp.where(moved[:, None], self.led_by(best), jnp.arange(self.documents)[None])
        return jnp.take_along_axis(documents, order[..., None], 1), jnp.where(moved, 0, best)

    def led_by(self, best: Int[Array, "B"]) -> Int[Array, "B M"]:
        """The order of documents that exchanges the best with the first."""
        places = jnp.arange(self.documents)[None]
        there = jnp.where(places == best[:, None], 0, places)
        return jnp.where(places == 0, best[:, None], there)

    def prompt(self, documents: Int[Array, "B M 3"]) -> Int[Array, "B T"]:
        """BOS, the documents in this order, the query: T = 3 M + 2."""
        rows = len(documents)
        mark = lambda token: jnp.full((rows, 1), token)  # noqa: E731
        return jnp.concatenate([mark(0), documents.reshape(rows, -1), mark(1)], 1)

    def answer(self, documents: Int[Array, "B M 3"], best: Int[Array, "B"]) -> Int[Array, "B"]:
        """The name of the best document."""
        return jnp.take_along_axis(documents[..., 0], best[:, None], 1)[:, 0]
