"""Questions over several documents: their orders, chains of pairs, and chains told in English.

    order = permute(6, gold=(4, 1), order="forward")            # places of the documents, in order
    pairs, asked, answer = chain(key, batch=128)                # for a small net
    question = tell(seed=0, index=3, hops=2, documents=8)       # for a language model

After arXiv 2505.11754, which permutes the documents of MuSiQue.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.data.tasks._base import uniforms
from causal_jax.errors import InputError
from causal_jax.shapes import Array, Int, Key

ORDERS = ("original", "forward", "backward", "distance", "remove_first", "gold_only")


def permute(n: int, gold: Sequence[int], order: str, distance: int = 0) -> list[int]:
    """Places of documents 0..n-1 in a new order.

        original       as stored
        forward        the gold documents' places hold them in the order of the chain
        backward       ... in the reverse order
        distance       noise first; the last gold one at the end, `distance` noise between two gold
        remove_first   as stored, without the chain's first
        gold_only      the chain alone

    Args:
        n: documents stored.
        gold: those of the chain, in its order.
        order: one of `ORDERS`.
        distance: for "distance".

    Raises:
        InputError: unknown order, gold documents that are not there, or too little noise.
    """
    gold = [int(g) for g in gold]
    if not gold or len(set(gold)) != len(gold) or not all(0 <= g < n for g in gold):
        raise InputError(f"gold={gold}: expected different documents of 0..{n - 1}")
    noise = [d for d in range(n) if d not in gold]
    places = sorted(gold)
    if order == "original":
        return list(range(n))
    if order in ("forward", "backward"):
        new, chain_ = list(range(n)), gold if order == "forward" else gold[::-1]
        for place, document in zip(places, chain_):
            new[place] = document
        return new
    if order == "remove_first":
        return [d for d in range(n) if d != gold[0]]
    if order == "gold_only":
        return gold
    if order != "distance":
        raise InputError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
    between = distance * (len(gold) - 1)
    if not 0 <= between <= len(noise):
        raise InputError(
            f"distance={distance}: {len(gold)} gold documents need {between} others, there are "
            f"{len(noise)}"
        )
    new, rest = noise[: len(noise) - between], noise[len(noise) - between :]
    for i, document in enumerate(gold):
        new = [*new, document, *rest[i * distance : (i + 1) * distance]]
    return new


def chain(
    key: Key[Array, ""],
    batch: int,
    *,
    entities: int = 24,
    documents: int = 6,
    hops: int = 4,
    order: str = "random",
) -> tuple[Int[Array, "B n 2"], Int[Array, "B 2"], Int[Array, "B"]]:
    """Pairs (entity, next entity): `hops` of them chain up, the others lead nowhere.

    Args:
        order: "random", or "forward" / "backward" for the chain's pairs in their places.

    Returns:
        pairs [B, documents, 2]; the question (first entity, h) with h in 1..hops; the entity h
        steps on.
    """
    if not 0 < hops <= documents < entities:
        raise InputError(f"chain: hops={hops} of documents={documents}, entities={entities}")

    def one(key):
        keys = jax.random.split(key, 4)
        path = jax.random.permutation(keys[0], entities)
        first = path[: documents + 1]  # e_0 -> e_1 -> ... -> e_hops; the rest are noise keys
        noise = path[hops + 1 : documents + 1]
        lead = jax.random.choice(keys[1], path, (documents - hops,))
        gold = jnp.stack([first[:hops], first[1 : hops + 1]], 1)
        pairs = jnp.concatenate([gold, jnp.stack([noise, lead], 1)])
        places = jax.random.permutation(keys[2], documents)
        if order in ("forward", "backward"):
            slots = jnp.sort(places[:hops])
            places = places.at[:hops].set(slots if order == "forward" else slots[::-1])
        pairs = jnp.zeros_like(pairs).at[places].set(pairs)
        h = jax.random.randint(keys[3], (), 1, hops + 1)
        return pairs, jnp.stack([path[0], h]), path[h]

    if order not in ("random", "forward", "backward"):
        raise InputError(f"order={order!r}: expected 'random', 'forward' or 'backward'")
    return jax.vmap(one)(jax.random.split(key, batch))


@dataclasses.dataclass(frozen=True)
class Question:
    """A question whose answer takes several documents.

    Attributes:
        documents: (title, text) each.
        gold: those that chain up to the answer, in that order.
        text: the question. opening: how an answer to it begins. answer: how it goes on.
    """

    documents: tuple[tuple[str, str], ...]
    gold: tuple[int, ...]
    text: str
    opening: str
    answer: str

    def ordered(self, order: Sequence[int]) -> tuple[tuple[str, str], ...]:
        """The documents in another order (of `permute`, or any permutation)."""
        return tuple(self.documents[i] for i in order)


_NAMES = (
    *("Anna", "Brian", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Kevin"),
    *("Laura", "Martin", "Nora", "Oscar", "Paula", "Robert", "Sarah", "Thomas", "Victor", "Wendy"),
)
_CITIES = (
    *("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Oslo", "Athens"),
    *("Prague", "Moscow", "Tokyo", "Boston", "Chicago", "Denver", "Sydney"),
)


def tell(seed: int, index: int, *, hops: int = 2, documents: int = 8) -> Question:
    """Question `index` of stream `seed`: who teaches whom, and who lives where.

    The chain is hops - 1 teachers and a city; the noise tells of other people's teachers and
    cities, half and half.

    Raises:
        InputError: fewer documents than hops, or more than there are names for.
    """
    if not 2 <= hops <= documents or documents + hops > len(_NAMES) - 2:
        raise InputError(f"tell: hops={hops}, documents={documents}: 2 <= hops <= documents <= 16")
    u = uniforms("multihop", seed, [index], len(_NAMES) + len(_CITIES) + documents)[0]
    a, b = len(_NAMES), len(_NAMES) + len(_CITIES)
    names = [_NAMES[i] for i in np.argsort(u[:a])]
    cities = [_CITIES[i] for i in np.argsort(u[a:b])]
    people, others = names[:hops], names[hops:]
    texts = [(p, f"{p}'s teacher is {q}.") for p, q in itertools.pairwise(people)]
    texts.append((people[-1], f"{people[-1]} lives in {cities[0]}."))
    for i in range(documents - hops):
        p, q = others[i], others[(i + 1) % len(others)]
        lives = (p, f"{p} lives in {cities[1 + i]}.")
        texts.append(lives if i % 2 == 0 else (p, f"{p}'s teacher is {q}."))
    places = np.argsort(u[b:])  # places[j]: which text stands at j
    stored = tuple(texts[i] for i in places)
    gold = tuple(int(np.flatnonzero(places == i)[0]) for i in range(hops))
    who = people[0]
    for _ in range(hops - 1):
        who = f"the teacher of {who}"
    return Question(stored, gold, f"Where does {who} live?", f"{_upper(who)} lives in", cities[0])


def exact_match(prediction: str, answer: str) -> bool:
    """The normalised prediction is the answer."""
    return _normal(prediction) == _normal(answer)


def contains(prediction: str, answer: str) -> bool:
    """The normalised prediction has the answer in it: the paper's "accuracy"."""
    return _normal(answer) in _normal(prediction)


def _normal(text: str) -> str:
    kept = "".join(c for c in text.lower() if c.isalnum() or c == " ")
    return " ".join(kept.split())


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]
