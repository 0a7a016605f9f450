"""Items with labels: is the label of the last item in the weights, or in the context?

    item label item label ... item ?                      N pairs and a target, 2N + 1 tokens

A class k of K has a fixed random vector and label k mod L; an item is the vector of its class with
noise. In the weights: the class was met in training. In the context: the target's class is among
the pairs. Which of the two a network comes to use is decided by the dials:

    item of class k    (mu_k + eps eta) / sqrt(1 + eps^2)      mu_k, eta ~ N(0, I/D)
    frequency          f(k) ~ k^-alpha
    bursty row         N/B classes of different labels, B times each in any order; the target's
                       class is one of them; B = 0: all items independent, target too
    fresh row          classes that no other row has; the labels are the same L

A token is [one-hot position | content]; the row stands at a random place among the positions, so
that only relative positions mean anything. Rows are made on the device, from a key.

Splits: "train"; "weights": B = 0, known classes (the label is in the context by chance only);
"context": bursty, fresh classes; "swapped": bursty, known classes, every label moved on by one,
so that the context contradicts the weights.

Reddy 2023 (arXiv 2312.03002), after Chan et al. 2022 (arXiv 2205.05055). Deviation: fresh classes
are drawn for every row, not from a pool of 128 per batch.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Float, Int, Key

Split = Literal["train", "weights", "context", "swapped"]


class Prototypes(NamedTuple):
    """What stays the same during a run.

    Attributes:
        items: [K, D], the vectors of the classes. labels: [L, D], those of the labels.
    """

    items: Array
    labels: Array


class Rows(NamedTuple):
    """A batch.

    Attributes:
        tokens: [B, 2N+1, P+D]. label: [B], the answer.
        labels: [B, N], those of the pairs. match: [B, N], which pairs are of the target's class.
    """

    tokens: Array
    label: Array
    labels: Array
    match: Array


@dataclasses.dataclass(frozen=True)
class ItemLabels:
    """The dials.

    Attributes:
        classes: K, a multiple of `labels`.
        labels: L.
        dim: of the vectors, D.
        pairs: in the context, N.
        most_pairs: the most pairs that the positions leave room for; 0: as many as `pairs`.
        noise: eps, within-class noise.
        burst: B, a divisor of `pairs`, or 0.
        bursty: share of bursty rows, the others being independent.
        fresh: share of rows with fresh classes.
        zipf: alpha.
    """

    classes: int = 1024
    labels: int = 32
    dim: int = 63
    pairs: int = 8
    most_pairs: int = 0
    noise: float = 0.1
    burst: int = 1
    bursty: float = 1.0
    fresh: float = 0.0
    zipf: float = 0.0

    def __post_init__(self):
        for name in ("labels", "dim", "pairs"):
            self._need(getattr(self, name) >= 1, name, "at least 1")
        self._need(
            self.classes >= 1 and self.classes % self.labels == 0,
            "classes", f"a multiple of the {self.labels} labels",
        )  # fmt: skip
        self._need(
            self.burst == 0 or (self.burst > 0 and self.pairs % self.burst == 0),
            "burst", f"0 or a divisor of the {self.pairs} pairs",
        )  # fmt: skip
        self._need(
            self.burst == 0 or self.pairs // self.burst <= self.labels,
            "burst", f"at most {self.labels} different labels in a row of {self.pairs} pairs",
        )  # fmt: skip
        most = self.most_pairs
        self._need(most == 0 or most >= self.pairs, "most_pairs", f"0 or at least {self.pairs}")
        self._need(self.noise >= 0, "noise", "a number >= 0")
        self._need(self.zipf >= 0, "zipf", "a number >= 0")
        for name in ("bursty", "fresh"):
            self._need(0 <= getattr(self, name) <= 1, name, "a share from 0 to 1")

    def _need(self, ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise InputError(f"item labels: {field}={getattr(self, field)}: expected {expected}")

    @property
    def positions(self) -> int:
        """P."""
        return 2 * (self.most_pairs or self.pairs) + 1

    @property
    def width(self) -> int:
        """Of a token, P + D."""
        return self.positions + self.dim

    @property
    def length(self) -> int:
        """Tokens of a row, 2N + 1."""
        return 2 * self.pairs + 1

    def prototypes(self, key: Key[Array, ""]) -> Prototypes:
        """Vectors of all classes and labels, N(0, I/D)."""
        draws = jax.random.normal(key, (self.classes + self.labels, self.dim)) * self.dim**-0.5
        return Prototypes(draws[: self.classes], draws[self.classes :])

    def sample(
        self, known: Prototypes, key: Key[Array, ""], batch: int, split: Split = "train"
    ) -> Rows:
        """Rows of a split; same key, same rows. `batch` and `split` are static under jit."""
        one = dataclasses.replace
        task = {
            "train": self,
            "weights": one(self, burst=0, fresh=0.0),
            "context": one(self, burst=self.burst or 1, bursty=1.0, fresh=1.0),
            "swapped": one(self, burst=self.burst or 1, bursty=1.0, fresh=0.0),
        }[split]
        keys = jax.random.split(key, 4)
        classes, slots = task._classes(keys[0], batch)
        labels = classes % self.labels
        own = jax.random.bernoulli(keys[2], task.fresh, (batch, 1))
        vectors = known.items[classes] if task.fresh < 1 else jnp.zeros((*classes.shape, self.dim))
        if task.fresh > 0:
            new = jax.random.normal(keys[1], vectors.shape) * self.dim**-0.5
            vectors = jnp.where(own[..., None], new, vectors)
        if split == "swapped":
            labels = (labels + 1) % self.labels
        take = lambda x: jnp.take_along_axis(x, slots, axis=1)  # noqa: E731
        items = jnp.take_along_axis(vectors, slots[..., None], axis=1)
        tokens = self._tokens(keys[3], known, items, take(labels)[:, :-1])
        kind = jnp.where(own, slots, take(classes))  # every slot of a fresh row is another class
        return Rows(tokens, take(labels)[:, -1], take(labels)[:, :-1], kind[:, :-1] == kind[:, -1:])

    def _classes(self, key, batch: int) -> tuple[Int[Array, "B M"], Int[Array, "B N1"]]:
        """M classes per row, and which of them stands at each of the N pairs and the target."""
        keys = jax.random.split(key, 3)
        N, bursty = self.pairs, self.bursty if self.burst else 0.0
        alone = jnp.broadcast_to(jnp.arange(N + 1)[None], (batch, N + 1))
        if bursty == 0:
            return self._draw(keys[0], None, (batch, N + 1)), alone
        M = N // self.burst
        u = jax.random.uniform(keys[1], (batch, self.labels + N + 1))
        distinct = self._draw(keys[0], self._labels(u[:, : self.labels], M), (batch, M))
        order = jnp.argsort(u[:, self.labels : -1], axis=1)
        slots = jnp.concatenate([order // self.burst, (u[:, -1:] * M).astype(jnp.int32)], axis=1)
        if bursty == 1:
            return distinct, slots
        mixed, on = jax.random.split(keys[2])
        burst = jax.random.bernoulli(on, bursty, (batch, 1))
        free = self._draw(mixed, None, (batch, N + 1))
        padded = jnp.pad(distinct, ((0, 0), (0, N + 1 - M)))
        return jnp.where(burst, padded, free), jnp.where(burst, slots, alone)

    def _labels(self, u: Float[Array, "B L"], count: int) -> Int[Array, "B M"]:
        """`count` different labels, drawn one after another by the frequency of their classes."""
        weight = np.diff(self._ends[:: self.classes // self.labels])
        # The smallest of exponential times: a draw without replacement.
        times = -jnp.log1p(-u) / jnp.asarray(weight, jnp.float32)[None]
        return jax.lax.top_k(-times, count)[1]

    def _draw(self, key, labels: Int[Array, "B M"] | None, shape) -> Int[Array, "B M"]:
        """Classes by frequency: of the labels given, or of any."""
        u, per = jax.random.uniform(key, shape), self.classes // self.labels
        ends = jnp.asarray(self._ends, jnp.float32)
        if labels is None:
            at = u
        else:
            low, high = ends[labels * per], ends[(labels + 1) * per]
            at = low + u * (high - low)
        place = jnp.searchsorted(ends[1:], at, side="right")
        if labels is not None:  # rounding at the ends of a label's stretch
            place = jnp.clip(place, labels * per, (labels + 1) * per - 1)
        place = jnp.minimum(place, self.classes - 1)
        return place // per + self.labels * (place % per)

    @property
    def _ends(self) -> Float[np.ndarray, "K1"]:
        """Cumulative frequency, from 0 to 1, with the classes of a label side by side."""
        f = np.arange(1.0, self.classes + 1) ** -self.zipf
        f = f.reshape(-1, self.labels).T.reshape(-1) / f.sum()
        return np.concatenate([[0.0], np.cumsum(f)])

    def _tokens(self, key, known: Prototypes, items, labels: Int[Array, "B N"]):
        keys = jax.random.split(key, 2)
        batch, N = labels.shape
        noise = jax.random.normal(keys[0], items.shape) * self.dim**-0.5
        items = (items + self.noise * noise) / (1 + self.noise**2) ** 0.5
        pairs = jnp.stack([items[:, :-1], known.labels[labels]], axis=2)
        content = jnp.concatenate([pairs.reshape(batch, 2 * N, self.dim), items[:, -1:]], axis=1)
        start = jnp.zeros((batch,), jnp.int32)
        if self.positions > self.length:
            start = jax.random.randint(keys[1], (batch,), 0, self.positions - self.length + 1)
        place = start[:, None] + jnp.arange(self.length)[None]
        return jnp.concatenate([jax.nn.one_hot(place, self.positions), content], axis=-1)
