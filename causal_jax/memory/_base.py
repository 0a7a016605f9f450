"""The contract of every memory: a frozen spec that is its own config; parameters, state as values.

    params = memory.init(key, width=D, heads=N)             what the outer loop learns
    state  = memory.init_state(params, batch=B)             what changes while reading
    y, state = memory(params, x, state)                     x [B, T, D] -> y [B, T, D]
    state  = memory.write(params, state, x)                 the same without the reading
    y      = memory.read(params, state, x)                  a plain forward pass, nothing is written

A sequence cut anywhere and handed on by its state gives the same numbers; so does one token at a
time (T = 1): that is the decoding step, prefill is the call itself. Around the memory proper stand
projections, gates and the output (`_layer.py`); inside, `run` works on queries, keys and values:

    y, state = memory.run(leaves, state, q, k, v, gates)    q, k, v [B, T, N, H], as in attention

Every memory has a reference (`implementation="reference"`), token after token, and a form in chunks
that equals it.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.memory import _kernels, _layer, _reference
from causal_jax.memory._state import Gates, Leaves, MemState, describe
from causal_jax.registry import Registry
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import OFF, Tap
from pallas_kernels.memory_chunk.network import Network

memories = Registry("memory", "causal_jax.memory")


@dataclasses.dataclass(frozen=True)
class MemorySpec:
    """Base of all memories: hyperparameters only, hashable, comparable, never a pytree leaf.

    Attributes:
        conv: taps of the causal convolutions behind the three projections; 0: none.
        theta_max: step sizes lie below it; None: what the memory says is safe (`default_theta`).
        alpha_bias, eta_bias, theta_bias: where the gates' logits start.
        momentum, decay: whether there is S, whether anything is forgotten.
        decay_to: forgetting pulls the weights to 0 or to where they began.
        read_at: "post": a token reads what it has just written; "pre": what was there before it.
        silu_v: SiLU on values (then >= -0.28) as on queries and keys.
        output_gate: multiply what was read by SiLU(x W_gate).
        nonfinite: of a token whose key or value is not finite: "report" it (`state.check()`),
            or "skip" it, as if it were not stored.
    """

    conv: int = 4
    theta_max: float | None = None
    alpha_bias: float = -5.0
    eta_bias: float = 0.0
    theta_bias: float = 0.0
    momentum: bool = True
    decay: bool = True
    decay_to: Literal["zero", "init"] = "zero"
    read_at: Literal["post", "pre"] = "post"
    silu_v: bool = True
    output_gate: bool = True
    nonfinite: Literal["report", "skip"] = "report"

    # What the exact memories are; `Deep` has fields of these names.
    anchor: ClassVar[int | None] = 1
    gate_chunk: ClassVar[int] = 1
    omega: ClassVar[int] = 1
    clip: ClassVar[float | None] = None

    def __post_init__(self):
        if self.conv < 0:
            raise InputError(f"conv={self.conv}: expected taps >= 1, or 0 for no convolution")
        if self.theta_max is not None and not (0 < self.theta_max < math.inf):
            raise InputError(f"theta_max={self.theta_max}: expected a number > 0, or None")
        choices = {"decay_to": ("zero", "init"), "read_at": ("post", "pre")}
        for name, known in {**choices, "nonfinite": ("report", "skip")}.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r}: expected one of {known}")

    # ------------------------------------------------------------ what a memory must say

    @property
    def network(self) -> Network:
        """M."""
        raise NotImplementedError(type(self).__name__)

    @property
    def fast_leaves(self) -> tuple[str, ...]:
        """Names of the leaves of M that learn while reading."""
        return self.network.matrices

    @property
    def stability(self) -> float:
        """The largest step size at which one key, repeated for ever, does not diverge, at the
        gates' starting values."""
        a, eta = 1 - _sigmoid(self.alpha_bias), _sigmoid(self.eta_bias)
        return (1.0 + (a if self.decay else 1)) * (1.0 + (eta if self.momentum else 0))

    @property
    def default_theta(self) -> float:
        """`theta_max` where the user gives none."""
        return 1.0

    def cost(self, T: int, N: int, H: int) -> float:
        """Floating-point operations of writing and reading T tokens, one sequence: 12 per weight of
        M and token (forward 2, backward 4, carrying W and S 4, reading 2)."""
        leaves = jax.eval_shape(lambda: self.network.init(jax.random.key(0), N, H))
        return 12.0 * T * sum(math.prod(x.shape) for x in leaves.values())

    def run(
        self,
        leaves: Leaves,
        state: MemState,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T N H"],
        v: Float[Array, "B T N H"],
        gates: Gates,
        *,
        mask: Bool[Array, "B T"] | None = None,
        store: Bool[Array, "B T"] | None = None,
        new: Bool[Array, "B T"] | None = None,
        aligned: bool = False,
        tap: Tap = OFF,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "B T N H"], MemState]:
        """Write every token and read with every query.

        Args:
            leaves: M_0 [N, ...], `params["memory"]`: slow leaves, and where a document begins.
            state: from `init_state` or an earlier call.
            gates: theta, log a, log eta. With a gate chunk the values at a chunk's last token
                count for the chunk.
            mask: which tokens there are; the others read 0 and leave the memory as it is.
            store: which tokens are written; the others only read.
            new: where a document begins: the memory starts anew with that token.
            aligned: promise that `state.position` is a multiple of the anchor chunk, which saves a
                chunk's work (memories without one do not care).
            tap: site `surprise` [B, T, N], |M(k_t) - v_t|^2 / 2 at the anchor.
            implementation: None (the best known here: "chunked"), "chunked" (XLA), "reference", or
                a kernel by its name, "tpu" or "gpu".

        Returns:
            y in v's dtype, and the state after the last token.

        Raises:
            InputError: shapes or names that do not fit; a state of another memory.
            NotImplementedError: a named kernel cannot serve; the message says why.
        """
        if implementation not in (None, "chunked", "reference", *_kernels.NAMES):
            raise InputError(
                f"implementation={implementation!r}: expected None, 'chunked', 'reference', 'tpu' "
                "or 'gpu'"
            )
        if not q.shape == k.shape == v.shape or gates.theta.shape != q.shape[:3]:
            raise InputError(
                f"q {q.shape}, k {k.shape}, v {v.shape}, theta {gates.theta.shape}: expected three "
                "times [B, T, N, H] and [B, T, N]"
            )
        if (gates.log_eta is None) == self.momentum or (gates.log_a is None) == self.decay:
            raise InputError(
                f"momentum={self.momentum}, decay={self.decay}: expected gates with log_eta and "
                "log_a just where these are True"
            )
        state = self._known(state)
        stored = jnp.ones(q.shape[:2], bool) if store is None else store
        if mask is not None:
            stored, q = stored & mask, jnp.where(mask[..., None, None], q, 0)
        finite = jnp.isfinite(k).all((2, 3)) & jnp.isfinite(v).all((2, 3))
        wrong = stored & ~finite
        if self.nonfinite == "skip":
            stored, wrong = stored & finite, jnp.zeros_like(wrong)
        k, v = (jnp.where(stored[..., None, None], x, 0) for x in (k, v))
        T = q.shape[1]
        args = leaves, state, q, k, v, gates
        if implementation == "reference":
            y, state, ok = _reference.recurrence(self, *args, stored=stored, new=new)
        elif implementation in _kernels.NAMES:
            _kernels.check(implementation, tap)
            y, state, ok = self.on_kernel(*args, stored=stored, new=new, aligned=aligned)
        else:
            y, state, ok = self.chunked(*args, stored=stored, new=new, aligned=aligned, tap=tap)
        # the first token with a bad key or value, else the first tile that left a bad memory
        wrong = wrong | (
            jnp.repeat(~ok.T, -(-T // ok.shape[0]), axis=1)[:, :T] & ~wrong.any(1)[:, None]
        )
        first = jnp.where(wrong.any(1), state.position + jnp.argmax(wrong, 1).astype(jnp.int32), -1)
        state = dataclasses.replace(
            state,
            position=state.position + T,
            bad=jnp.where(state.bad < 0, first, state.bad),
        )
        y = y if mask is None else jnp.where(mask[..., None, None], y, 0)
        return y.astype(v.dtype), state

    def chunked(
        self, leaves: Leaves, state: MemState, q: Array, k: Array, v: Array, gates: Gates, *,
        stored: Array, new: Array | None, aligned: bool, tap: Tap,
    ) -> tuple[Array, MemState, Array]:  # fmt: skip
        """`run` in chunks, on cleaned input: (y, state with new weights, finite or not [n, B])."""
        raise NotImplementedError(type(self).__name__)

    def on_kernel(
        self, leaves: Leaves, state: MemState, q: Array, k: Array, v: Array, gates: Gates, *,
        stored: Array, new: Array | None, aligned: bool,
    ) -> tuple[Array, MemState, Array]:  # fmt: skip
        """`chunked` on the TPU's kernel.

        Raises:
            NotImplementedError: it cannot serve; the message says why.
        """
        raise NotImplementedError(f"tpu: no kernel for the memory {type(self).__name__}")

    # ------------------------------------------------------------ what all memories share

    def loss_scale(self, width: int) -> float:
        """Factor on |M(k) - v|^2 / 2."""
        return 1.0

    @property
    def form(self) -> tuple[tuple[str, Any], ...]:
        """What a state depends on; a state of another form is refused."""
        n = self.network
        return (
            ("memory", type(self).__name__),
            ("depth", n.depth), ("expansion", n.expansion), ("act", n.act), ("around", n.around),
            ("fast", self.fast_leaves), ("momentum", self.momentum), ("conv", self.conv),
            ("anchor", self.anchor), ("gate_chunk", self.gate_chunk), ("omega", self.omega),
        )  # fmt: skip

    def apply_head(self, leaves: Leaves, x: Array) -> Array:
        """M of one head on one token."""
        return self.network.apply(leaves, x[None])[0]

    def init(
        self, key: Key[Array, ""], *, width: int, heads: int, head_dim: int | None = None
    ) -> dict[str, Any]:
        """Parameters of projections, gates, output and M_0: a nested dict of float32 arrays.

        Args:
            width, heads: D, N.
            head_dim: H; None: D / N.

        Raises:
            InputError: D is not a multiple of N.
        """
        if head_dim is None and width % heads:
            raise InputError(f"heads={heads}: expected a divisor of width={width}, or a head_dim")
        theta = self.default_theta if self.theta_max is None else self.theta_max
        if theta > self.stability:
            warnings.warn(
                f"theta_max={theta:.4g} is above {self.stability:.4g}, where a repeated key begins "
                "to diverge at the gates' starting values",
                stacklevel=2,
            )
        return _layer.init(self, key, width, heads, head_dim or width // heads)

    def init_state(self, params: Mapping[str, Any], batch: int = 1) -> MemState:
        """The memory before the first token: M_0, no momentum, nothing in the convolutions."""
        return _layer.init_state(self, params, batch)

    def load_state(self, params: Mapping[str, Any], path: str | Path) -> MemState:
        """What `MemState.save` wrote.

        Raises:
            InputError: the state of another memory.
        """
        with np.load(path) as file:
            written = str(file["form"])
            if written != repr(self.form):
                raise InputError(f"{path}: state of another memory, {written}; here {self.form}")
            paths, tree = jax.tree_util.tree_flatten_with_path(self.init_state(params))
            names = [jax.tree_util.keystr(at) for at, _ in paths]
            return jax.tree.unflatten(tree, [jnp.asarray(file[n]) for n in names])

    def __call__(
        self,
        params: Mapping[str, Any],
        x: Float[Array, "B T D"],
        state: MemState | None = None,
        *,
        mask: Bool[Array, "B T"] | None = None,
        store: Bool[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        aligned: bool | None = None,
        tap: Tap = OFF,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "B T D"], MemState]:
        """Write and read every token: position t gets what the memory says to it at t.

        Args:
            x: the sequence, or its next T tokens.
            state: None: a fresh one.
            mask, store, implementation: as in `run`.
            segments: document ids; a document begins with a fresh memory and sees no convolution
                taps of another; below 0: padding.
            aligned: as in `run`; None: only if `state` is None.
            tap: sites `q`, `k`, `v`, `z` [B, T, N, H], `theta`, `log_a`, `log_eta`, `surprise`
                [B, T, N].

        Returns:
            y [B, T, D] in x's dtype, and the state after the last token.

        Raises:
            InputError: shapes that do not fit; a state of another memory.
        """
        aligned = state is None if aligned is None else aligned
        state = self.init_state(params, x.shape[0]) if state is None else self._known(state)
        live, new, segment = _layer.documents(state, x.shape[1], mask, segments)
        x = x if live is None else jnp.where(live[..., None], x, 0)
        (q, k, v), state = _layer.project(self, params, state, x, live, segments, tap)
        gates, state = _layer.gates(self, params, state, x, live, new, tap)
        z, state = self.run(
            params["memory"], state, q, k, v, gates, mask=live, store=store, new=new,
            aligned=aligned, tap=tap, implementation=implementation,
        )  # fmt: skip
        y = _layer.output(params, tap("z", z), x)
        return y, dataclasses.replace(state, segment=segment)

    def write(
        self, params: Mapping[str, Any], state: MemState, x: Float[Array, "B T D"], **kw
    ) -> MemState:
        """The state after x; keywords as in `__call__` (under `jit` the reading costs nothing)."""
        return self(params, x, state, **kw)[1]

    def read(
        self, params: Mapping[str, Any], state: MemState, x: Float[Array, "B T D"], tap: Tap = OFF
    ) -> Float[Array, "B T D"]:
        """What the memory as it is says to x; nothing is written, convolutions see what came.

        All positions read the same weights: M*(x) of the paper's MAC layer.
        """
        state = self._known(state)
        q = tap("q", _layer.query(self, params, state, x))
        z = self.read_head(params["memory"], state, q)
        return _layer.output(params, tap("z", z), x)

    def read_head(
        self, leaves: Leaves, state: MemState, q: Float[Array, "B T N H"]
    ) -> Float[Array, "B T N H"]:
        """M(q) at the state's weights, per head."""
        slow = {n: jnp.expand_dims(w, 0) for n, w in leaves.items() if n not in state.weights}
        wide = jnp.swapaxes(q.astype(jnp.float32), 1, 2)
        y = self.network.apply({**slow, **state.weights}, wide)
        return jnp.swapaxes(y, 1, 2).astype(q.dtype)

    def _known(self, state: MemState) -> MemState:
        if state.form != self.form:
            differ = [
                f"{name}={theirs} (expected {ours})"
                for (name, ours), (_, theirs) in zip(self.form, state.form)
                if ours != theirs
            ]
            raise InputError(f"state of another memory: {', '.join(differ) or describe([state])}")
        return state


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, for the contract tests ("test") or the benchmark ("bench").

    Attributes:
        shape: (B, T, N, H).
        spec: fields of the memory's dataclass.
        tags: who uses it.
    """

    shape: tuple[int, int, int, int]
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tags: tuple[str, ...] = ("test",)
