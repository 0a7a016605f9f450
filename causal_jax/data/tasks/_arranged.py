"""Tasks whose rows are an arrangement of uniform numbers, by numpy or on the device by jax."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from causal_jax.data.tasks._base import Task


class Arranged(Task):
    """A task that defines `arranged`, and so has `sequences` and `draw`."""

    def arranged(self, u: Any, xp: Any) -> tuple[Any, Any]:
        """Uniform numbers [B, draws] as whole sequences and which of their tokens are answers.

        Args:
            u: in [0, 1).
            xp: `numpy`, or `jax.numpy` under a trace.
        """
        raise NotImplementedError

    def sequences(
        self, u: Float[np.ndarray, "B draws"]
    ) -> tuple[Int[np.ndarray, "B T1"], Bool[np.ndarray, "B T1"]]:
        """See `Task.sequences`."""
        return self.arranged(u, np)

    def draw(self, key: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        """Rows made on the device, for small trainings: (whole sequences, which are answers)."""
        return self.arranged(jax.random.uniform(key, (rows, self.draws)), jnp)


def written(sequence: Any, what: Iterable[tuple[Any, Any]], xp: Any) -> Any:
    """Sequences [B, T] with tokens [B, n] written over the places [B, n] of each pair, in order."""
    at = np.arange(sequence.shape[1])[None, None]
    for place, tokens in what:
        here = place[:, :, None] == at
        sequence = xp.where(here.any(1), (here * tokens[:, :, None]).sum(1), sequence)
    return sequence
