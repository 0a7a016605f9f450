"""Questions with a likely answer: is the class in the report, or only usually in such reports?

    slot slot ... slot  question c  ->  yes | no

A report of noisy slots mentions the classes that are present; the first half of the classes usually
is, the second half usually is not. Some reports are blank, so that a model also knows what to say
without looking: the prior. Where the truth is unlikely ("adversarial"), looking and prior disagree.

Ids: 0 an empty slot, then the mentions of each class, then the questions, then yes, no. Rows are
made on the device from a key. The language-only counterpart of the synthetic object-presence task
of CausalMM (arXiv 2410.04780), in which the report is an image.
"""

import dataclasses

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Bool, Int, Key

SPLITS = ("train", "train-like", "adversarial", "balanced")


@dataclasses.dataclass(frozen=True)
class PriorQuestions:
    """The task.

    Attributes:
        classes: number of classes, even.
        slots: of a report, at least as many as classes.
        likely: probability that a class of the first half is present (of the second half: 1 -
            likely), in a share `skewed` of the reports; 1/2 in the others.
        skewed: see likely.
        miss: probability that a class that is present is not mentioned.
        false: probability that a slot without a mention shows a random class.
        blank: share of the training reports that are empty.
    """

    classes: int = 12
    slots: int = 16
    likely: float = 0.85
    skewed: float = 0.7
    miss: float = 0.3
    false: float = 0.36
    blank: float = 0.3

    def __post_init__(self):
        if self.classes < 2 or self.classes % 2:
            raise InputError(f"classes = {self.classes}: expected an even number, at least 2")
        if self.slots < self.classes:
            raise InputError(f"slots = {self.slots}: expected at least {self.classes}, one each")
        for name in ("likely", "skewed", "miss", "false", "blank"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected a probability")

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return 2 * self.classes + 3

    @property
    def yes(self) -> int:
        """The id of yes; no is the next."""
        return 2 * self.classes + 1

    def sample(
        self, key: Key[Array, ""], batch: int, split: str = "train"
    ) -> tuple[Int[Array, "B T"], Bool[Array, "B"], Bool[Array, "B"]]:
        """Rows, whether yes is right, and whether yes is what the prior says; T = slots + 1.

        Args:
            split: "train" has blank reports; "train-like" has none; in "adversarial" the truth is
                always the unlikely one; in "balanced" both are equally frequent.

        Raises:
            InputError: unknown split.
        """
        if split not in SPLITS:
            raise InputError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        keys = jax.random.split(key, 8)
        C, rows = self.classes, jnp.arange(batch)
        asked = jax.random.randint(keys[0], (batch,), 0, C)
        usual = asked < C // 2
        skew = jax.random.uniform(keys[1], (batch, 1)) < self.skewed
        p = jnp.where(jnp.arange(C)[None] < C // 2, self.likely, 1 - self.likely)
        present = jax.random.uniform(keys[2], (batch, C)) < jnp.where(skew, p, 0.5)
        if split == "adversarial":
            present = present.at[rows, asked].set(~usual)
        elif split == "balanced":
            coin = jax.random.uniform(keys[3], (batch,)) < 0.5
            present = present.at[rows, asked].set(coin)
        told = present & (jax.random.uniform(keys[4], (batch, C)) >= self.miss)
        noise = jax.random.randint(keys[5], (batch, self.slots), 1, C + 1)
        shown = jax.random.uniform(keys[6], (batch, self.slots)) < self.false
        order = jax.vmap(lambda k: jax.random.permutation(k, self.slots))(
            jax.random.split(keys[7], batch)
        )[:, :C]
        report = jnp.where(shown, noise, 0)
        there = jnp.take_along_axis(report, order, 1)
        mention = jnp.where(told, jnp.arange(1, C + 1)[None], there)
        report = report.at[rows[:, None], order].set(mention)
        if split == "train":
            empty = jax.random.uniform(jax.random.fold_in(key, 8), (batch, 1)) < self.blank
            report = jnp.where(empty, 0, report)
        tokens = jnp.concatenate([report, (1 + C + asked)[:, None]], 1)
        return tokens, present[rows, asked], usual

    def blanked(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """The same questions about empty reports."""
        return tokens.at[:, : self.slots].set(0)
