"""The arithmetic of titans-pytorch (0.5), for its checkpoints and for measuring beside it.

    h = RMSNorm(x)    k, v = h W_k, h W_v    q = RMSNorm'(x) W_q
    theta = theta_max sigmoid(h w + b)
    g_c = sum_{i in chunk c} theta_i grad l_i(W_anchor)      l: mean over channels of (M(k) - v)^2
    S_c = eta_c S_{c-1} - g_c    W_c = (1 - alpha_c) W_{c-1} + S_c
    M(x) = x + LN(MLP(x)) (1 + gamma)

alpha_c, eta_c come from the chunk's mean input, all of M is fast, and the anchor is the state at
the start of the call, or every `batch_size` tokens. Token t reads what floor((t + 1) / chunk)
chunks left. It is `Deep(gate_chunk=chunk, anchor=batch_size, fast="all", mean_loss=True)` behind
other projections.

Deviation: its soft clamp of a chunk's gradient norm, momenta of higher order, per-layer step sizes,
attention pooling and Newton-Schulz steps are not here.
Source: lucidrains/titans-pytorch, `neural_memory.py`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.linear_maps import matmul
from causal_jax.memory import _layer
from causal_jax.memory._state import Gates, MemState
from causal_jax.memory.deep import Deep
from causal_jax.shapes import Array, Bool, Float

EPS = float(np.finfo(np.float32).eps)  # of torch.nn.RMSNorm


def parity_spec(
    *, chunk: int, batch_size: int | None = None, depth: int = 2, expansion: int = 4,
    max_lr: float = 1.0, momentum: bool = True,
) -> Deep:  # fmt: skip
    """The memory that `NeuralMemory(chunk_size=chunk, batch_size=batch_size, ...)` is."""
    return Deep(
        depth=depth, expansion=expansion, fast="all", anchor=batch_size, gate_chunk=chunk,
        mean_loss=True, theta_max=max_lr, momentum=momentum, conv=0, output_gate=False,
        silu_v=False,
    )  # fmt: skip


def parity_params(state_dict: Mapping[str, Any], heads: int = 1) -> dict[str, Any]:
    """Parameters from `NeuralMemory.state_dict()` (arrays or CPU tensors).

    Raises:
        InputError: parameters of an option that is not served here.
    """
    w = {n: np.asarray(x, np.float32) for n, x in state_dict.items()}
    take = lambda name: jnp.asarray(w.pop(name))  # noqa: E731
    linear = lambda name: {"w": take(f"{name}.0.weight").T, "b": take(f"{name}.0.bias")}  # noqa: E731
    params: dict[str, Any] = {
        "store_norm": take("store_norm.weight"),
        "read_norm": take("retrieve_norm.weight"),
        "gates": {"theta": linear("to_adaptive_step"), "alpha": linear("to_decay_factor")},
    }
    for name, theirs in (("q", "to_queries"), ("k", "to_keys"), ("v", "to_values")):
        key = f"{theirs}.weight" if f"{theirs}.weight" in w else f"{theirs}.0.weight"
        params[name] = take(key).T
    if "to_momentum.0.weight" in w:
        params["gates"]["eta"] = linear("to_momentum")
    if heads > 1:
        params["combine"] = take("combine_heads.weight").T
        params["read_gate"] = take("retrieve_gate.0.weight").T
    memory = {"gamma": take("memory_model_parameters.0")}
    for i in range(sum(n.startswith("memory_model_parameters.") for n in w)):
        memory[f"w{i}"] = take(f"memory_model_parameters.{i + 1}")
    # the module also keeps the one-head model that the heads' copies were made of
    rest = sorted(n for n in w if not n.startswith("memory_model."))
    if rest or memory["gamma"].shape[0] != heads:
        raise InputError(
            f"titans-pytorch parameters {', '.join(rest) or memory['gamma'].shape}: not served here"
        )
    params["memory"] = memory
    params["norm"] = jnp.ones(memory["gamma"].shape, jnp.float32)  # [N, H], of `init_state`
    return params


def parity_memory(
    spec: Deep,
    params: Mapping[str, Any],
    x: Float[Array, "B T D"],
    state: MemState | None = None,
    *,
    store: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], MemState]:
    """`NeuralMemory.forward(x, state, store_mask=store)`: what was read, and the state."""
    aligned = state is None
    state = spec.init_state(params, x.shape[0]) if state is None else state
    heads = lambda y: y.reshape(*y.shape[:2], *params["norm"].shape)  # noqa: E731
    # the norms' scales go into the weights: few numbers there, one per token and channel before
    unit = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPS)
    store_scale, read_scale = (params[f"{n}_norm"][:, None] for n in ("store", "read"))
    q, k, v = (
        heads(matmul(unit, scale * params[n]))
        for n, scale in (("q", read_scale), ("k", store_scale), ("v", store_scale))
    )
    logits = {n: {**g, "w": store_scale * g["w"]} for n, g in params["gates"].items()}
    given = {**params, "gates": logits}
    gates, state = _layer.gates(spec, given, state, unit, None, None, tap=lambda _, g: g)
    gates = Gates(gates.theta, gates.log_a, gates.log_eta)
    y, state = spec.run(
        params["memory"], state, q, k, v, gates, store=store, aligned=aligned,
        implementation=implementation,
    )  # fmt: skip
    if "read_gate" in params:
        y = y * jax.nn.sigmoid(matmul(unit, read_scale * params["read_gate"]))[..., None]
    y = y.reshape(*x.shape[:2], -1)
    return matmul(y, params["combine"]) if "combine" in params else y, state
