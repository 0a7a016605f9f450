"""AdamW (arXiv 1412.6980, 1711.05101)."""

import dataclasses

import optax

from causal_jax.errors import InputError
from causal_jax.training.optimizer._base import Optimizer, optimizers


@optimizers.register("adamw")
@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """direction = m_hat / (sqrt(v_hat) + eps).

    Attributes:
        b1, b2: decay of the first and second moment.
        eps: floor of the denominator.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.eps > 0:
            raise InputError(f"optimizer.eps must be positive, got {self.eps}")

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
