"""Facts and what they imply: every subject has a fact, and the fact an implication.

    (s, r1) -> b_i     (s, r2) -> c_i        for every subject s of group i

    noise noise  s  noise  r  noise ... end | answer

Subject and relation stand at two random places, in this order, among noise; the answer follows the
last token. Trained on are facts and implications of the `train` subjects of each group and the
facts of its `test` subjects. What is asked are implications of the latter, which no training row
shows: a model that answers has associated the implication with the fact.

Ids: 0, 1 the relations; then n facts b, n implications c, the subjects group by group (training
subjects first), the noise tokens, and the end token. Rows are made on the device from a key.

Huang et al. 2025 (arXiv 2506.10887), section on symbolic factual recall.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Int, Key

Kind = Literal["train_fact", "train_implication", "test_fact", "test_implication"]


@dataclasses.dataclass(frozen=True)
class FactRecall:
    """The facts.

    Attributes:
        groups: pairs of a fact and an implication, n.
        train: subjects of each group whose implication is shown.
        test: subjects of each group whose implication is asked.
        noise: different noise tokens.
        length: tokens of a row, T, the end token included.
    """

    groups: int = 20
    train: int = 1
    test: int = 3
    noise: int = 5
    length: int = 16

    def __post_init__(self):
        for name, least in {"groups": 2, "train": 1, "test": 1, "noise": 0, "length": 3}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least {least}")
        if self.length > 3 and not self.noise:
            raise InputError(f"noise = 0: rows of {self.length} tokens need something to hold")

    @property
    def subjects(self) -> int:
        """Number of subjects."""
        return self.groups * (self.train + self.test)

    @property
    def vocab(self) -> int:
        """Number of ids."""
        return 2 + 2 * self.groups + self.subjects + self.noise + 1

    @property
    def facts(self) -> slice:
        """Ids of the answers b."""
        return slice(2, 2 + self.groups)

    @property
    def implications(self) -> slice:
        """Ids of the answers c."""
        return slice(2 + self.groups, 2 + 2 * self.groups)

    def items(self, kind: Kind) -> Int[np.ndarray, "M 3"]:
        """All items of a kind: [M, 3] ids of subject, relation and answer."""
        if kind not in get_args(Kind):
            raise InputError(f"kind {kind!r}: expected one of {', '.join(get_args(Kind))}")
        part, what = kind.split("_")
        size = self.train + self.test
        within = np.arange(self.train) if part == "train" else np.arange(self.train, size)
        group = np.repeat(np.arange(self.groups), len(within))
        subject = 2 + 2 * self.groups + group * size + np.tile(within, self.groups)
        implied = what == "implication"
        answer = group + (self.implications if implied else self.facts).start
        return np.stack([subject, np.full_like(subject, int(implied)), answer], 1)

    def sample(
        self, key: Key[Array, ""], kind: Kind, batch: int
    ) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """Random rows of random items of a kind.

        Args:
            key: randomness; same key, same rows.
            kind: which items.
            batch: rows, static under jit.

        Returns:
            tokens [B, T], the last of them the end token, and the answer that follows [B]; int32.
        """
        return self.rows(key, self._draw(jax.random.fold_in(key, 0), kind, batch))

    def training(
        self, key: Key[Array, ""], batch: int
    ) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """A training batch: one third each of train facts, train implications, test facts."""
        if batch % 3:
            raise InputError(f"batch = {batch}: expected a multiple of 3, a third of each kind")
        kinds: tuple[Kind, ...] = ("train_fact", "train_implication", "test_fact")
        keys = jax.random.split(key, 4)
        items = [self._draw(k, kind, batch // 3) for k, kind in zip(keys, kinds, strict=False)]
        return self.rows(keys[3], jnp.concatenate(items))

    def rows(
        self, key: Key[Array, ""], items: Int[Array, "B 3"]
    ) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """One row of every given item (ids of subject, relation, answer), as `sample` gives."""
        batch, places = len(items), self.length - 1
        keys = jax.random.split(key, 3)
        one = jax.random.randint(keys[0], (batch,), 0, places)
        two = jax.random.randint(keys[1], (batch,), 0, places - 1)
        two += two >= one
        at = jnp.arange(self.length)[None]
        first, second = jnp.minimum(one, two)[:, None], jnp.maximum(one, two)[:, None]
        begin = self.vocab - 1 - self.noise
        tokens = jax.random.randint(
            keys[2], (batch, self.length), begin, begin + max(self.noise, 1)
        )
        tokens = jnp.where(at == first, items[:, :1], tokens)
        tokens = jnp.where(at == second, items[:, 1:2], tokens)
        return jnp.where(at == places, self.vocab - 1, tokens), items[:, 2]

    def _draw(self, key: Key[Array, ""], kind: Kind, batch: int) -> Int[Array, "B 3"]:
        items = jnp.asarray(self.items(kind), jnp.int32)
        return items[jax.random.randint(key, (batch,), 0, len(items))]
