"""Entities whose attributes are known, and contexts that say the same or something else.

    bos          e a . e' a' . ... ? e            -> a         plain: as the model was pretrained
    bos <u>      e a . e' a' . ... ? e (IND) <a>  -> a         in a chat template
    bos          ? e                              -> a*        closed book: the known attribute

A context is "random" (attributes drawn anew), "agreeing" (the known ones: reading it is needless)
or "contradicting" (all others than the known). It makes the loss of context-awareness in
instruction tuning measurable (arXiv 2411.02688). Rows are padded in front, made on the device.

Ids: 0 padding, 1 bos, 2 <u>, 3 <a>, 4 "?", 5 ".", 6 IND, then the attributes, then the entities.
"""

import dataclasses

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Bool, Float, Int, Key

PAD, BOS, USER, ASSISTANT, ASK, STOP, IND = range(7)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts, padded in front.

    Attributes:
        tokens: [B, T]; the answer follows the last.
        start: [B] first real position.
        answer: [B].
        user: [B, T] the user's words (no marks, no bos).
    """

    tokens: Int[Array, "*S B T"]
    start: Int[Array, "*S B"]
    answer: Int[Array, "*S B"]
    user: Bool[Array, "*S B T"]


@dataclasses.dataclass(frozen=True)
class KnowledgeWorld:
    """The world.

    Attributes:
        entities, attributes: how many.
        facts: facts of a context.
    """

    entities: int = 64
    attributes: int = 16
    facts: int = 4

    def __post_init__(self):
        if not 1 <= self.facts <= self.entities:
            raise InputError(f"facts = {self.facts}: expected 1 to {self.entities}")
        if self.attributes < 2:
            raise InputError(f"attributes = {self.attributes}: expected at least 2")

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return 7 + self.attributes + self.entities

    @property
    def length(self) -> int:
        """Tokens of the longest prompt: bos <u> facts ? e IND <a>."""
        return 3 * self.facts + 6

    def known(self, entity: Int[Array, "..."]) -> Int[Array, "..."]:
        """The fixed attribute of each entity (0, 1, ...), as a number from 0."""
        return (entity * 7 + entity // self.attributes) % self.attributes

    def reading(
        self, key: Key[Array, ""], batch: int
    ) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """To learn to read from: random facts, then twice as many questions, each answered.

        A row has 1, 2, ... or `facts` different facts, in turn until there are `facts`: from those
        with few of them reading is learned long before it would be from many. A fact may be asked
        for several times, so that what has been asked says nothing about what comes (asked once
        each, the last can be told without reading).

        Returns:
            tokens, bos in front, no padding, no template; which of them are answers.
        """
        keys = jax.random.split(key, 4)
        shuffled = jax.vmap(jax.random.permutation, (0, None))
        entities = shuffled(jax.random.split(keys[0], batch), self.entities)[:, : self.facts]
        said = jax.random.randint(keys[1], entities.shape, 0, self.attributes)
        different = jax.random.randint(keys[3], (batch, 1), 1, self.facts + 1)
        turn = jnp.arange(self.facts)[None] % different
        entities, said = (jnp.take_along_axis(x, turn, 1) for x in (entities, said))
        order = jax.random.randint(keys[2], (batch, 2 * self.facts), 0, self.facts)
        facts = jnp.stack([7 + self.attributes + entities, 7 + said], -1)
        asked = jnp.take_along_axis(facts, order[..., None], 1)
        mark = lambda x, token: jnp.full_like(x[..., :1], token)  # noqa: E731
        told = jnp.concatenate([facts, mark(facts, STOP)], -1).reshape(batch, -1)
        asked = jnp.concatenate([mark(asked, ASK), asked], -1).reshape(batch, -1)
        tokens = jnp.concatenate([jnp.full((batch, 1), BOS), told, asked], 1)
        place = jnp.arange(tokens.shape[1]) - told.shape[1] - 1
        answers = (place >= 0) & (place % 3 == 2)
        return tokens, jnp.broadcast_to(answers[None], tokens.shape)

    def sample(
        self,
        key: Key[Array, ""],
        batch: int,
        *,
        contradict: float | Float[Array, ""] | Bool[Array, "B"] = 0.0,
        random: bool = False,
        closed: float = 0.0,
        template: bool = True,
        indicator: bool | Bool[Array, "B"] = False,
    ) -> Prompts:
        """Prompts drawn at random.

        Args:
            contradict: probability of a contradicting context, or which rows have one; the others
                agree.
            random: all attributes of the context are drawn anew instead.
            closed: probability that there is no context at all.
            template: whether <u> and <a> stand around the user's words.
            indicator: append IND to the user's words; or to which rows'.
        """
        keys = jax.random.split(key, 6)
        entities = jax.vmap(lambda k: jax.random.permutation(k, self.entities)[: self.facts])(
            jax.random.split(keys[0], batch)
        )
        known = self.known(entities)
        other = (known + jax.random.randint(keys[1], known.shape, 1, self.attributes)) % (
            self.attributes
        )
        on = jnp.asarray(contradict)
        on = on if on.dtype == bool else jax.random.uniform(keys[2], (batch,)) < on
        said = jnp.where(jnp.broadcast_to(on, (batch,))[:, None], other, known)
        if random:
            said = jax.random.randint(keys[1], known.shape, 0, self.attributes)
        asked = jax.random.randint(keys[3], (batch, 1), 0, self.facts)
        entity, attribute = (jnp.take_along_axis(x, asked, 1)[:, 0] for x in (entities, said))
        bare = jax.random.uniform(keys[4], (batch,)) < closed
        attribute = jnp.where(bare, self.known(entity), attribute)
        names = 7 + self.attributes
        facts = jnp.stack([names + entities, 7 + said, jnp.full_like(said, STOP)], -1)
        facts = facts.reshape(batch, -1)
        column = lambda token: jnp.full((batch, 1), token)  # noqa: E731
        parts = [
            (column(BOS), jnp.ones((batch, 1), bool), False),
            (column(USER), jnp.full((batch, 1), template), False),
            (facts, jnp.broadcast_to(~bare[:, None], facts.shape), True),
            (column(ASK), jnp.ones((batch, 1), bool), True),
            (names + entity[:, None], jnp.ones((batch, 1), bool), True),
            (column(IND), jnp.broadcast_to(jnp.asarray(indicator), (batch,))[:, None], False),
            (column(ASSISTANT), jnp.full((batch, 1), template), False),
        ]
        tokens = jnp.concatenate([t for t, _, _ in parts], 1)
        there = jnp.concatenate([h for _, h, _ in parts], 1)
        user = jnp.concatenate([jnp.full(t.shape, u) for t, _, u in parts], 1)
        order = jnp.argsort(there, axis=1, stable=True)  # padding to the front
        tokens, user = (
            jnp.where(jnp.sort(there, axis=1), jnp.take_along_axis(x, order, 1), 0)
            for x in (tokens, user)
        )
        start = (~there).sum(1)
        return Prompts(tokens, start, 7 + attribute, user > 0)
