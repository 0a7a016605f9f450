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
    """What stays the same during a run; the dials in it may differ within one program.

    Attributes:
        items: [K, D], the vectors of the classes. labels: [L, D], those of the labels.
        ends: [K+1], cumulative frequency from 0 to 1, with the classes of a label side by side.
        noise: [], eps.
    """

    items: Array
    labels: Array
    ends: Array
    noise: Array


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

    def prototypes(self, key: Key[Array, ""], room: int = 0) -> Prototypes:
        """Vectors of all classes and labels, N(0, I/D), and the dials `classes`, `zipf`, `noise`.

        Args:
            room: classes in the arrays, those beyond K of frequency 0, so that tasks of different
                K fit one program; 0: K.
        """
        room = room or self.classes
        if room < self.classes or room % self.labels:
            raise InputError(
                f"room={room}: expected 0 or a multiple of {self.labels}, >= {self.classes}"
            )
        draws = jax.random.normal(key, (room + self.labels, self.dim)) * self.dim**-0.5
        ends = jnp.asarray(self.frequencies(room), jnp.float32)
        return Prototypes(draws[:room], draws[room:], ends, jnp.float32(self.noise))

    def frequencies(self, room: int) -> Float[np.ndarray, "K1"]:
        """`Prototypes.ends` of `room` classes."""
        f = np.arange(1.0, room + 1) ** -self.zipf * (np.arange(room) < self.classes)
        f = f.reshape(-1, self.labels).T.reshape(-1)
        return np.concatenate([[0.0], np.cumsum(f) / f.sum()])

    def sample(
        self, known: Prototypes, key: Key[Array, ""], batch: int, split: Split = "train"
    ) -> Rows:
        """Rows of a split; same key, same rows. `batch` and `split` are static under jit.

        `classes`, `zipf` and `noise` are those of `known`.
        """
        kinds = {
            "train": (self.bursty if self.burst else 0.0, self.fresh, 0),
            "weights": (0.0, 0.0, 0),
            "context": (1.0, 1.0, 0),
            "swapped": (1.0, 0.0, 1),
        }
        return self._rows(known, key, batch, *kinds[split])

    def tests(self, known: Prototypes, key: Key[Array, ""], batch: int) -> dict[str, Rows]:
        """`batch` rows of "context", "weights" and "swapped" each, from one draw."""
        third = np.repeat(np.arange(3), batch)[:, None]
        rows = self._rows(known, key, 3 * batch, third != 1, third == 0, third == 2)
        names = ("context", "weights", "swapped")
        parts = (Rows(*(x[i * batch : (i + 1) * batch] for x in rows)) for i in range(3))
        return dict(zip(names, parts))

    def _rows(self, known: Prototypes, key, batch: int, bursty, fresh, shift) -> Rows:
        """Rows that are bursty and fresh with these probabilities, alike or [batch, 1] by row."""
        keys, N = jax.random.split(key), self.pairs
        # One draw of each kind: the generator is most of the program, to compile and to run.
        u = jax.random.uniform(keys[0], (batch, self.labels + 3 * (N + 1) + 3))
        switch = u[:, -3:, None]
        classes, slots = self._classes(known.ends, u[:, :-3], switch[:, 0], bursty)
        M, own = classes.shape[1], switch[:, 1] < fresh
        extra = M if np.any(fresh) else 0
        draws = jax.random.normal(keys[1], (batch, N + 1 + extra, self.dim)) * self.dim**-0.5
        vectors = draws[:, N + 1 :]
        if not np.all(np.equal(fresh, 1)):
            met = known.items[classes]
            vectors = jnp.where(own[..., None], vectors, met) if extra else met
        labels = (classes + shift) % self.labels
        take = lambda x: jnp.take_along_axis(x, slots, axis=1)  # noqa: E731
        items = jnp.take_along_axis(vectors, slots[..., None], axis=1)
        items = (items + known.noise * draws[:, : N + 1]) / jnp.sqrt(1 + known.noise**2)
        tokens = self._tokens(items, known.labels[take(labels)[:, :-1]], switch[:, 2])
        kind = jnp.where(own, slots, take(classes))  # every slot of a fresh row is another class
        return Rows(tokens, take(labels)[:, -1], take(labels)[:, :-1], kind[:, :-1] == kind[:, -1:])

    def _classes(
        self, ends: Array, u: Float[Array, "B U"], switch: Float[Array, "B 1"], bursty
    ) -> tuple[Int[Array, "B M"], Int[Array, "B N1"]]:
        """M classes per row, and which of them stands at each of the N pairs and the target."""
        N, copies = self.pairs, self.burst or 1
        cuts = self.labels + np.arange(3) * (N + 1)
        u_label, u_slot, u_class, u_free = jnp.split(u, cuts, axis=1)
        alone = jnp.broadcast_to(jnp.arange(N + 1)[None], u_free.shape)
        if not np.any(bursty):
            return self._draw(ends, u_free), alone
        M = N // copies
        classes = self._draw(ends, u_class[:, :M], self._labels(ends, u_label, M))
        order = jnp.argsort(u_slot[:, :-1], axis=1)
        slots = jnp.concatenate([order // copies, (u_slot[:, -1:] * M).astype(jnp.int32)], axis=1)
        if np.all(np.equal(bursty, 1)):
            return classes, slots
        burst = switch < bursty
        padded = jnp.pad(classes, ((0, 0), (0, N + 1 - M)))
        return jnp.where(burst, padded, self._draw(ends, u_free)), jnp.where(burst, slots, alone)

    def _labels(self, ends: Array, u: Float[Array, "B L"], count: int) -> Int[Array, "B M"]:
        """`count` different labels, drawn one after another by the frequency of their classes."""
        weight = jnp.diff(ends[:: (ends.size - 1) // self.labels])
        # The smallest of exponential times: a draw without replacement.
        return jax.lax.top_k(jnp.log1p(-u) / weight[None], count)[1]

    def _draw(
        self, ends: Array, u: Float[Array, "B M"], labels: Int[Array, "B M"] | None = None
    ) -> Int[Array, "B M"]:
        """Classes by frequency: of the labels given, or of any."""
        per = (ends.size - 1) // self.labels
        if labels is not None:
            low, high = ends[labels * per], ends[(labels + 1) * per]
            u = jnp.minimum(low + u * (high - low), jnp.nextafter(high, low))
        place = jnp.searchsorted(ends[1:], u, side="right")  # passes over classes of frequency 0
        return place // per + self.labels * (place % per)

    def _tokens(self, items: Array, labels: Array, u: Array) -> Array:
        batch, N, D = labels.shape
        pairs = jnp.stack([items[:, :-1], labels], axis=2).reshape(batch, 2 * N, D)
        content = jnp.concatenate([pairs, items[:, -1:]], axis=1)
        start = (u * (self.positions - self.length + 1)).astype(jnp.int32)
        place = start + jnp.arange(self.length)[None]
        return jnp.concatenate([jax.nn.one_hot(place, self.positions), content], axis=-1)
