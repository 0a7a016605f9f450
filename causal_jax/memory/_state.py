"""What a memory carries from token to token, as a value: save it, hand it back, cut out rows."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Float, Int

Leaves = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
    """How strongly every token writes, and what it leaves of the past; float32, in log space.

    [B, T, N] from outside; cut into chunks, [n, B, N, C], inside the fast forms.

    Attributes:
        theta: step size, > 0.
        log_a: log of what stays of the memory, log(1 - alpha); None: no forgetting, a = 1.
        log_eta: log of what stays of the momentum; None: no momentum, eta = 0.
        gamma: weight of a token in the windows of the Omega rule; None: 1.
    """

    theta: Float[Array, "..."]
    log_a: Float[Array, "..."] | None = None
    log_eta: Float[Array, "..."] | None = None
    gamma: Any = None  # Float[Array, "..."] or None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemState:
    """A memory between two tokens. Every array's first axis is the row of the batch, B.

    The states of stacked layers may be one, with the layers L in front.

    Attributes:
        weights: the fast leaves of M, [B, N, ...], float32.
        momentum: S, the same shapes; None without momentum.
        anchor: weights at which the gradients of the current chunk are taken; None where they are
            taken at the running weights.
        pending: of memories that update once per gate chunk: `surprise` (sum of theta times
            gradient so far, leaves [B, N, ...]), `stored` (tokens in it, [B]) and, from the
            projections, `logits` [B, N, 2] and `count` [B] (sums of gate logits); else None.
        recent: last tokens of the current chunk for the Omega rule: `k`, `v` [B, c - 1, N, H] and
            `gamma` [B, c - 1, N], 0 where there is none; else None.
        conv: the last inputs of the projections' convolutions, `q`, `k`, `v` [B, W - 1, N H]; None
            without convolution.
        position: tokens read so far.
        segment: document of the last token; -1: none yet.
        bad: position of the first token whose surprise was not finite; -1: none.
        form: what the memory that made it is, as (field, value) pairs; static.
    """

    weights: Leaves
    momentum: Leaves | None
    anchor: Leaves | None
    pending: Any  # dict, or None
    recent: Any
    conv: Leaves | None
    position: Int[Array, "*L B"]
    segment: Int[Array, "*L B"]
    bad: Int[Array, "*L B"]
    form: tuple[tuple[str, Any], ...] = dataclasses.field(metadata={"static": True}, default=())

    def rows(self, index: slice | list[int] | Int[Array, "K"]) -> "MemState":
        """The state of some rows of the batch."""
        index = index if isinstance(index, slice) else jnp.asarray(index)
        return jax.tree.map(lambda a: a[index], self)

    def save(self, path: str | Path) -> None:
        """Write it to an `.npz` file; `MemorySpec.load_state` reads it."""
        leaves = jax.tree_util.tree_leaves_with_path(self)
        arrays = {jax.tree_util.keystr(at): np.asarray(leaf) for at, leaf in leaves}
        np.savez(path, **{"form": np.array(repr(self.form)), **arrays})  # pyright: ignore[reportArgumentType]

    def check(self) -> "MemState":
        """Itself; outside `jit` only.

        Raises:
            InputError: a surprise was not finite, with row and position.
        """
        for row, at in enumerate(jax.device_get(self.bad)):
            if at >= 0:
                raise InputError(
                    f"row {row}: the surprise of the token at position {at} is not finite; lower "
                    'theta_max, set clip, or nonfinite="skip"'
                )
        return self


def join(states: list[MemState]) -> MemState:
    """States of several batches as one, row after row.

    Raises:
        InputError: they were made by different memories.
    """
    if len({s.form for s in states}) != 1:
        raise InputError("states of different memories cannot be joined: " + describe(states))
    return jax.tree.map(lambda *a: jnp.concatenate(a), *states)


def describe(states: list[MemState]) -> str:
    """The forms of some states, for messages."""
    return "; ".join(", ".join(f"{k}={v}" for k, v in s.form) for s in states)
