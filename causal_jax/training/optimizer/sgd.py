"""Plain gradient descent with optional (Nesterov) momentum."""

import dataclasses

import optax

from causal_jax.errors import InputError
from causal_jax.training.optimizer._base import Optimizer, optimizers


@optimizers.register("sgd")
@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """direction = m, with m <- momentum m + g.

    Attributes:
        momentum: 0 for none.
        nesterov: look ahead along m.
    """

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.momentum < 1.0:
            raise InputError(f"optimizer.momentum must be in [0, 1), got {self.momentum}")

    def direction(self) -> optax.GradientTransformation:
        if self.momentum == 0.0:
            return optax.identity()
        return optax.trace(decay=self.momentum, nesterov=self.nesterov)
