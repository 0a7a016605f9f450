"""The optimizer contract and the learning-rate schedule."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from causal_jax.errors import InputError
from causal_jax.paths import check_pattern, matches
from causal_jax.registry import Registry

optimizers = Registry("optimizer", "causal_jax.training.optimizer")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate over a run, as a multiple of its peak.

        warm(t) = min(1, (t + 1) / warmup),   p = (t - warmup) / (steps - warmup) clipped to [0, 1]
        cosine: final + (1 - final) (1 + cos(pi p)) / 2       linear: 1 - (1 - final) p
        constant: 1     wsd: 1, then linear to `final` over the last `decay` of all steps

    Attributes:
        kind: shape after the warm-up.
        warmup: steps of linear warm-up, 0 for none.
        final: multiple of the peak at the last step.
        decay: wsd only: the share of all steps spent decaying.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: int = 100
    final: float = 0.1
    decay: float = 0.2

    def __post_init__(self):
        if self.kind not in ("cosine", "linear", "constant", "wsd"):
            raise InputError(
                f"schedule.kind must be cosine, linear, constant or wsd, got {self.kind!r}"
            )
        if self.warmup < 0:
            raise InputError(f"schedule.warmup must not be negative, got {self.warmup}")
        if not 0.0 <= self.final <= 1.0:
            raise InputError(f"schedule.final must be in [0, 1], got {self.final}")
        if not 0.0 < self.decay <= 1.0:
            raise InputError(f"schedule.decay must be in (0, 1], got {self.decay}")

    def __call__(self, step: jax.Array | int, steps: int) -> jax.Array:
        """The multiple of the peak at update `step` (from 0) of `steps`; float32 scalar."""
        t = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(1.0, (t + 1.0) / max(self.warmup, 1))
        if self.kind == "constant":
            return warm
        if self.kind == "wsd":
            length = max(self.decay * steps, 1.0)
            p = jnp.clip((t - (steps - length)) / length, 0.0, 1.0)
        else:
            p = jnp.clip((t - self.warmup) / max(steps - self.warmup, 1), 0.0, 1.0)
        shape = 0.5 * (1.0 + jnp.cos(jnp.pi * p)) if self.kind == "cosine" else 1.0 - p
        return warm * (self.final + (1.0 - self.final) * shape)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Base: theta <- theta - lr(t) (direction(clip(g)) + weight_decay * theta).

    Weight decay is decoupled (arXiv 1711.05101) and follows the learning rate.

    Attributes:
        lr: peak learning rate.
        schedule: its course over the run.
        clip: largest global gradient norm, None for no clipping.
        weight_decay: strength.
        decays: which parameters decay: a pattern searched for in their names; matrices and tables
            by default, never norm scales or biases.
    """

    lr: float = 3e-4
    schedule: Schedule = Schedule()
    clip: float | None = 1.0
    weight_decay: float = 0.1
    decays: str = r"(kernel|table)$"

    def __post_init__(self):
        if not self.lr > 0:
            raise InputError(f"optimizer.lr must be positive, got {self.lr}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"optimizer.clip must be positive or None, got {self.clip}")
        if self.weight_decay < 0:
            raise InputError(
                f"optimizer.weight_decay must not be negative, got {self.weight_decay}"
            )
        check_pattern("optimizer.decays", self.decays)

    def direction(self) -> optax.GradientTransformation:
        """Gradient to direction, learning rate 1; what a subclass is about."""
        raise NotImplementedError

    def transformation(self) -> optax.GradientTransformation:
        """Clipping, direction and weight decay: everything but the learning rate and the sign."""
        parts = [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
        parts.append(self.direction())
        if self.weight_decay:
            decays = self.decays
            parts.append(
                optax.add_decayed_weights(self.weight_decay, mask=lambda p: matches(decays, p))
            )
        return optax.chain(*parts)

    def learning_rate(self, step: jax.Array | int, steps: int) -> jax.Array:
        """lr(t) for update `step` (from 0) of `steps`."""
        return self.lr * self.schedule(step, steps)
