"""Is a direction what it seems? Subspace patches, their split by what is read, and an audit.

    patch           x_p = x_b + (x_s - x_b) V V^T                  V [m, k] orthonormal
    split           v = v_row + v_null,  v_null W = 0              W [m, d]: what is read from x
    effect of v     ((x_s - x_b) v) (v_row W): v_null moves nothing, yet may supply the coefficient

A patch along v can flip the output although the model never uses v: v_null correlates with the
feature and is disconnected, v_row is connected and dormant, i.e. does not vary with the feature.
The patch carries the difference along the one into the other. Makelov et al. 2023
(arXiv 2311.17030). `audit` collects the evidence: what the row part alone does, what the whole
component does, and whether the patched activations are ones the model ever has.

An activation with several readers (a residual stream) has no W of its own: the split is relative to
the readers put into W, side by side, and approximate where a norm stands between.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from causal_jax.shapes import Array, Float, Int, Key

Vectors = Float[Array, "M k"]


def orthonormal(vectors: Vectors, tol: float = 1e-6) -> Float[Array, "M r"]:
    """A basis of what the columns span, r of them; not under jit, r depends on the values.

    Singular values below tol times the largest count as zero.
    """
    u, s, _ = jnp.linalg.svd(vectors, full_matrices=False)
    return u[:, s > tol * s[0]]


def random_subspace(key: Key[Array, ""], width: int, k: int = 1) -> Float[Array, "M k"]:
    """Orthonormal columns in uniformly random directions."""
    return jnp.linalg.qr(jax.random.normal(key, (width, k)))[0]


def subspace_patch(
    x: Float[Array, "... M"], source: Float[Array, "... M"], v: Vectors
) -> Float[Array, "... M"]:
    """x with its part in the span of v's orthonormal columns taken from the source."""
    return x + _dot(_dot(source - x, v), v.T)


def split_row_null(
    v: Vectors, w: Float[Array, "M D"], tol: float = 1e-6
) -> tuple[Float[Array, "M k"], Float[Array, "M k"]]:
    """The part of v that x W reads and the part it does not.

    Args:
        v: [M, k] columns.
        w: [M, D] of any rank; singular values below tol times the largest count as zero.

    Returns:
        row, null [M, k]: row + null = v, row.T @ null = 0 column by column, null.T @ W = 0.
    """
    u, s, _ = jnp.linalg.svd(w, full_matrices=False)
    basis = u * jnp.where(s > tol * s[0], 1.0, 0.0)[None]
    row = _dot(basis, _dot(basis.T, v))
    return row, v - row


def fit_subspace(
    loss: Callable[[Vectors, Key[Array, ""]], Float[Array, ""]],
    width: int,
    *,
    key: Key[Array, ""],
    k: int = 1,
    steps: int = 300,
    lr: float = 0.03,
    final: float = 1.0,
) -> tuple[Float[Array, "M k"], Float[Array, "steps"]]:
    """The subspace whose patch makes a loss small: DAS (arXiv 2303.02536) without a full rotation.

    Adam on an unconstrained matrix whose QR factor is V.

    Args:
        loss: (V [width, k] orthonormal, key of the step) -> scalar; usually cross entropy of the
            counterfactual answer, on a batch drawn by the key.
        width: of the activation, M.
        key: of the start and the batches.
        k: columns.
        steps, lr: of Adam; final: last learning rate over the first, linear in between.

    Returns:
        V and the loss at every step.
    """
    keys = jax.random.split(key, 2)
    tx = optax.adam(optax.linear_schedule(lr, lr * final, steps))

    def objective(raw, key):
        return loss(jnp.linalg.qr(raw)[0], key)

    def step(state, t):
        raw, opt = state
        value, grad = jax.value_and_grad(objective)(raw, jax.random.fold_in(keys[1], t))
        updates, opt = tx.update(grad, opt)
        return (raw + updates, opt), value

    start = random_subspace(keys[0], width, k)
    (raw, _), losses = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))
    return jnp.linalg.qr(jnp.asarray(raw))[0], losses


def fldd(clean: Float[Array, "B"], patched: Float[Array, "B"]) -> Float[Array, ""]:
    """Fractional logit-difference decrease in %: 0 no effect, 100 no preference, 200 reversed.

    100 (1 - mean patched / mean clean), of differences logit(base answer) - logit(other answer).
    """
    return 100.0 * (1.0 - patched.mean() / clean.mean())


def interchange_accuracy(logits: Float[Array, "B V"], target: Int[Array, "B"]) -> Float[Array, ""]:
    """Share of rows whose most likely token, of the whole vocabulary, is the source's answer."""
    return (logits.argmax(-1) == target).mean()


@dataclasses.dataclass(frozen=True)
class SubspaceReport:
    """What an audit found.

    Attributes:
        effects: FLDD in % of the patch along v, its `row` and `null` part (each a subspace of its
            own), the `full` activation, and the largest of `random` subspaces of the same rank.
        norms: lengths of the `row` and `null` part of v (k = 1: their squares add up to 1).
        spreads: standard deviation along the row part, `natural` and `patched`.
        verdict: "no effect"; "illusory": the row part does not carry the effect and at least one
            other sign agrees; "consistent": no sign of an illusion; "unclear": anything between.
        reasons: the signs of an illusion that were found.
    """

    effects: dict[str, float]
    norms: dict[str, float]
    spreads: dict[str, float]
    verdict: Literal["no effect", "illusory", "consistent", "unclear"]
    reasons: tuple[str, ...]


def audit(
    metric: Callable[[Float[Array, "B M"]], Float[Array, "B"]],
    base: Float[Array, "B M"],
    source: Float[Array, "B M"],
    v: Vectors,
    w: Float[Array, "M D"],
    key: Key[Array, ""],
    *,
    controls: int = 4,
    least: float = 10.0,
    share: float = 0.5,
    spread: float = 2.0,
) -> SubspaceReport:
    """Does the effect of a subspace patch ride on a dormant path?

    Args:
        metric: activations at the site -> logit difference (base answer minus source answer), the
            rest of the model being that of the base prompts.
        base, source: activations on the two sides, row by row.
        v: [M, k] orthonormal.
        w: [M, D] what is read from the activation.
        key: of the random controls.
        controls: how many.
        least: smallest FLDD in % that counts as an effect.
        share: of v's effect that the row part, and the whole component, must at least have.
        spread: times its natural standard deviation that the patch may spread the row part.

    Returns:
        The evidence and a verdict. A verdict "consistent" is not proof: a feature may be
        distributed, and readers may have been forgotten in w.
    """
    row, null = split_row_null(v, w)
    parts = {"v": v, "row": orthonormal(row), "null": orthonormal(null)}
    clean = metric(base)
    effects = {"full": float(fldd(clean, metric(source)))}
    for name, part in parts.items():
        effects[name] = float(fldd(clean, metric(subspace_patch(base, source, part))))
    found = []
    for k in jax.random.split(key, controls):
        part = random_subspace(k, *v.shape)
        found.append(float(fldd(clean, metric(subspace_patch(base, source, part)))))
    effects["random"] = max(found, key=abs)

    natural = _spread(_dot(base, parts["row"]))
    patched = _spread(_dot(subspace_patch(base, source, v), parts["row"]))
    of_v = f"of the {effects['v']:.1f} % of the direction"
    signs = (
        (effects["row"] < share * effects["v"], f"the row part has {effects['row']:.1f} {of_v}"),
        (effects["full"] < share * effects["v"], f"the component has {effects['full']:.1f} {of_v}"),
        (
            patched > spread * natural,
            f"patched activations spread {patched / natural:.1f} times as far as natural ones",
        ),
    )
    reasons = tuple(text for sign, text in signs if sign)
    if effects["v"] < least:
        verdict = "no effect"
    elif not reasons:
        verdict = "consistent"
    else:
        verdict = "illusory" if signs[0][0] and len(reasons) > 1 else "unclear"
    norms = {"row": float(jnp.linalg.norm(row)), "null": float(jnp.linalg.norm(null))}
    return SubspaceReport(
        effects, norms, {"natural": natural, "patched": patched}, verdict, reasons
    )


def patch_to_edit(
    x: Float[Array, "M"],
    source: Float[Array, "M"],
    v: Float[Array, "M"],
    w: Float[Array, "M D"],
    second_moment: Float[Array, "M M"],
    ridge: float = 0.0,
) -> tuple[Float[Array, "D"], Float[Array, "M"]]:
    """The rank-one change of W that does to x what the patch along v does.

        a = ((x_s - x) v) (v W),   b = S^-1 x / (x S^-1 x):   x (W + b a^T) = x_p W,   b x = 1

    Args:
        x, source, v: activation, source activation, unit direction [M].
        w: [M, D].
        second_moment: S [M, M], uncentred, of the activations that should be disturbed least.
        ridge: added to the diagonal of S, as a share of its mean.

    Returns:
        a [D], b [M]; any other activation h moves by (h b) a.
    """
    a = jnp.vdot(source - x, v) * _dot(v, w)
    eye = jnp.eye(len(x), dtype=x.dtype)
    b = jnp.linalg.solve(second_moment + ridge * jnp.trace(second_moment) / len(x) * eye, x)
    return a, b / jnp.vdot(b, x)


def edit_to_patch(
    a: Float[Array, "D"],
    x: Float[Array, "M"],
    source: Float[Array, "M"],
    w: Float[Array, "M D"],
    tol: float = 1e-6,
) -> Float[Array, "M"]:
    """A unit direction whose patch does to x what a rank-one edit does: x_p W = x W + a.

    v = alpha r + beta n with r W = a of least length and n the direction of x_s - x that W does not
    read; of the two solutions the one with the smaller alpha. NaN where there is none: the edit is
    too large for the difference between source and x.
    """
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    inverse = jnp.where(s > tol * s[0], 1.0 / jnp.where(s > tol * s[0], s, 1.0), 0.0)
    r = _dot(u * inverse[None], _dot(vt, a))
    difference = source - x
    null = split_row_null(difference[:, None], w, tol)[1][:, 0]
    reach, along, length = jnp.vdot(null, null), jnp.vdot(difference, r), jnp.vdot(r, r)
    # alpha (alpha along + beta sqrt(reach)) = 1 and alpha^2 length + beta^2 = 1: quadratic in
    # alpha^2
    half = 2.0 * along + reach
    root = jnp.sqrt(half**2 - 4.0 * (along**2 + reach * length))
    square = 2.0 / (half + root)
    alpha = jnp.sqrt(square)
    beta = (1.0 - square * along) / (alpha * jnp.sqrt(reach))
    return alpha * r + beta * null / jnp.sqrt(reach)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _spread(x: Float[Array, "B r"]) -> float:
    return float(jnp.sqrt(jnp.var(x, axis=0).mean()))
