"""Chunks of a deep memory whose gradients are all taken at one anchor: lines XLA and kernels share.

Write: keys run through M at the anchor, X^1 = K, Z^l = X^l W^l, X^{l+1} = act(Z^l), and back,
G^l = d loss_i / d Z^l_i. No weight matrix is ever made for a token: with the coefficients of
`decay.py` the queries read

    Z_q^l = B * (X_q^l W^l) + d0 * (X_q^l S^l) + c0 * (X_q^l W_0^l) - (Theta * (X_q^l X^l^T)) G^l

and the chunk leaves W^l <- B_C W^l + d0_C S^l + c0_C W_0^l - X^l^T diag(Theta[C, :]) G^l. Theta is
D diag(theta); for the Omega rule D Gamma with Gamma[t, i] = theta_t gamma_i for 0 <= t - i < c.

Leaves are matrices [..., F, F'] and the norm's scale gamma, a row [..., 1, H]; any axes in front.
Titans, arXiv 2501.00663, section 3.2; the dual form of arXiv 2407.04620 with decay and momentum.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.memory_chunk.decay import HIGHEST, Decay, decay, turned
from pallas_kernels.memory_chunk.linear import Tokens
from pallas_kernels.memory_chunk.network import Network, normalised

Leaves = dict[str, jax.Array]


class Form(NamedTuple):
    """The static side of a deep memory.

    Attributes:
        net: shape of M.
        factor: on |M(k) - v|^2 / 2.
        to_init: forgetting leads to the initial weights instead of 0.
        read_at: "post" or "pre".
        clip: soft bound on the norm of a token's gradient, or None.
        omega: tokens whose losses every step sees.
    """

    net: Network
    factor: float = 1.0
    to_init: bool = False
    read_at: str = "post"
    clip: float | None = None
    omega: int = 1


class Surprise(NamedTuple):
    """Gradients of tokens in factors: of matrix l X^l_i^T G^l_i, of gamma G_i itself."""

    X: Leaves
    G: Leaves
    loss: jax.Array  # |M(k) - v|^2 / 2, [..., C]


def surprises(
    form: Form,
    anchor: Leaves,
    gamma: jax.Array | None,
    k: jax.Array,
    v: jax.Array,
    keep: jax.Array,
    later: jax.Array | None = None,
    initial: Leaves | None = None,
    remat: Callable = jax.checkpoint,
    kept: Callable = lambda x: x,
) -> Surprise:
    """Write pass.

    Args:
        anchor: the fast leaves where gradients are taken.
        gamma: the slow scale of the norm, where there is one.
        k, v: [..., C, H].
        keep: tokens whose gradients count, bool column [..., C, 1].
        later: tokens behind a document's beginning, bool column, or None: their gradients are taken
            at `initial`.
        remat: around what is cheaper made twice than kept for the gradient's gradient.
        kept: what names the products with weights for a caller that keeps them.
    """
    net = form.net

    def times(h, name, transposed=False):
        turn = turned if transposed else (lambda w: w)
        y = h @ turn(anchor[name])
        if later is None or initial is None:
            return kept(y)
        return kept(jnp.where(later, h @ turn(initial[name]), y))

    if "gamma" in anchor:
        gamma = anchor["gamma"]
        if later is not None and initial is not None:
            gamma = jnp.where(later, initial["gamma"], gamma)
    X, before, h, z = {}, [], k, k
    for i, name in enumerate(net.matrices):
        if i:
            before.append(z)
            h = remat(net.activate)(z)
        X[name], z = h, times(h, name)
    G = {}
    if net.around == "residual_ln":
        assert gamma is not None
        unit, inverse = normalised(z)
        error = k + unit * (1 + gamma) - v
        g = form.factor * error
        if "gamma" in anchor:
            G["gamma"] = g * unit
        g = g * (1 + gamma)
        mean = lambda y: jnp.mean(y, -1, keepdims=True)  # noqa: E731
        g = inverse * (g - mean(g) - unit * mean(g * unit))
    else:
        error = (k + z if net.around == "residual" else z) - v
        g = form.factor * error
    for i in reversed(range(net.depth)):
        name = net.matrices[i]
        G[name] = g
        if i:
            g = remat(net.slope)(before[i - 1], times(g, name, transposed=True))
    G = {name: jnp.where(keep, g, 0) for name, g in G.items()}
    if form.clip is not None:
        total = lambda x: jnp.sum(jnp.square(x), -1, keepdims=True)  # noqa: E731
        squares = [total(G[n]) * total(X[n]) if n in X else total(G[n]) for n in G]
        norm = jnp.sqrt(sum(squares) + 1e-30)
        G = {n: g * (form.clip * jnp.tanh(norm / form.clip) / norm) for n, g in G.items()}
    return Surprise(X, G, 0.5 * jnp.sum(jnp.square(error), -1))


def anchored_chunk(
    form: Form, W: Leaves, S: Leaves | None, anchor: Leaves, initial: Leaves,
    gamma: jax.Array | None, x: Tokens, weight: jax.Array | None, document: jax.Array | None,
    sums: Callable | None = None, remat: Callable = jax.checkpoint,
):  # fmt: skip
    """Write a chunk whose tokens each update the memory, and read with its queries.

    Args:
        W, S: before the chunk; S None without momentum.
        anchor, initial: where gradients are taken; where a document begins.
        gamma: the slow scale of the norm, or None.
        weight: of tokens in the windows of the Omega rule, a row; None without it.
        document, sums: as in `decay`.
        remat: as in `surprises`.

    Returns:
        (y, loss [..., C], W, S) after the chunk.
    """
    net = form.net
    at = decay(x.log_a, x.log_eta, x.stored, document, to_init=form.to_init, sums=sums)
    seen = at if form.read_at == "post" else at.before(x.new)
    keep = turned(x.stored) if weight is None else turned(weight > 0)
    later = None if document is None else turned(document) > 0
    s = surprises(form, anchor, gamma, x.k, x.v, keep, later, initial, remat)
    steps = x.theta if weight is None else _windows(form, x, weight, document)
    inside = _steps(seen.D, steps)

    def start(leaf):
        y = seen.B * leaf(W)
        if seen.d0 is not None and S is not None:
            y = y + seen.d0 * leaf(S)
        return y if seen.c0 is None else y + seen.c0 * leaf(initial)

    h = x.q
    for i, name in enumerate(net.matrices):
        if i:
            h = remat(net.activate)(h)
        own = inside * (h @ turned(s.X[name]))
        h = start(lambda w, h=h, n=name: h @ w[n]) - own @ s.G[name]
    if "gamma" in W:
        gamma = start(lambda w: w["gamma"]) - inside @ s.G["gamma"]
    y = net.finish(gamma, x.q, h)
    return y, s.loss, *_moved(at, W, S, initial, s, steps)


def _windows(form: Form, x: Tokens, weight: jax.Array, document: jax.Array | None) -> jax.Array:
    """Gamma [..., C, C] of the Omega rule."""
    C, lead = weight.shape[-1], weight.ndim - 2
    shape = (1,) * lead + (C, C)
    t, i = (jax.lax.broadcasted_iota(jnp.int32, shape, lead + n) for n in (0, 1))
    near = (t >= i) & (t - i < form.omega)
    if document is not None:
        near = near & (turned(document) == document)
    return jnp.where(near, turned(jnp.where(x.stored, x.theta, 0)) * weight, 0)


def _steps(D: jax.Array, steps: jax.Array) -> jax.Array:
    """D diag(theta), or D Gamma; D may be its last row."""
    square = steps.shape[-2] == steps.shape[-1] and steps.shape[-1] > 1
    return jnp.matmul(D, steps, precision=HIGHEST) if square else D * steps


def _moved(at: Decay, W: Leaves, S: Leaves | None, initial: Leaves, s: Surprise, steps: jax.Array):
    """(W, S) after a chunk; one product for both."""
    last = lambda c: c[..., -1:, :]  # noqa: E731
    to_W = turned(_steps(last(at.D), steps))
    to_S = None if at.H is None else turned(_steps(last(at.H), steps))
    out_W, out_S = {}, {}
    for name in W:
        g, width = s.G[name], W[name].shape[-1]
        both = to_W * g if to_S is None else jnp.concatenate([to_W * g, to_S * g], -1)
        if name in s.X:
            both = turned(s.X[name]) @ both
        else:
            both = jnp.sum(both, -2, keepdims=True)
        out_W[name] = last(at.B) * W[name] - both[..., :width]
        if at.c0 is not None:
            out_W[name] = out_W[name] + last(at.c0) * initial[name]
        if S is not None and at.d0 is not None and at.E is not None:
            out_W[name] = out_W[name] + last(at.d0) * S[name]
            out_S[name] = last(at.E) * S[name] - both[..., width:]
    return out_W, None if S is None else out_S
