"""The small nets of the subspace illusion: a feed-forward layer beside a stream with the class."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from causal_jax import plots
from causal_jax.interp import subspaces
from causal_jax.models import residual_mlp as net
from causal_jax.papers._base import Report, Row
from causal_jax.papers._harness import train
from causal_jax.training.optimizer import AdamW, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE = 8  # coordinates beside the feature
PARTS: tuple[str, ...] = ("full", "v", "row", "null", "random")
SPREAD = "spread along the row part, patched / natural"


def train_nets(
    settings: Any, kind: str, report: Report, span: tuple[float, float]
) -> dict[str, Any]:
    """Parameters of the nets of all seeds; `kind`: "dormant" or "used"."""

    def loss(params, key):
        keys = jax.random.split(key)
        x, target = _sample(keys[0], settings.batch)
        r0 = net.embed(params, x)
        h = net.hidden(params, r0)
        r1 = net.finish(params, r0, h)
        seen = r1
        if kind == "dormant":
            seen = net.finish(params, r0, h[jax.random.permutation(keys[1], settings.batch)])
        classes = _cross_entropy(net.logits(params, seen), _class(x))
        return (classes + jnp.square(net.value(params, r1) - target)).mean()

    def measure(params, key):
        x, target = _sample(key, 1000)
        r0 = net.embed(params, x)
        r1 = net.finish(params, r0, net.hidden(params, r0))
        right = net.logits(params, r1).argmax(-1) == _class(x)
        return {
            "accuracy": right.mean(),
            "value": jnp.square(net.value(params, r1) - target).mean(),
        }

    params, records = train(
        lambda key: net.init(key, 1 + NOISE, width=settings.width, hidden=settings.hidden),
        loss,
        AdamW(
            lr=settings.lr,
            schedule=Schedule(kind="constant", warmup=0),
            clip=None,
            weight_decay=settings.weight_decay,
            decays=".",
            b2=0.999,
        ),
        settings.steps,
        settings.seeds,
        measure=measure,
        report=report,
        span=span,
        text=kind,
    )
    return params | {f"last {k}": records[k][:, -1] for k in ("loss", "accuracy", "value")}


def audit(settings: Any, nets: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """A direction in the feed-forward layer and one in the residual stream, and their audit."""
    params = {k: jnp.asarray(v[seed]) for k, v in nets.items() if not k.startswith("last ")}
    keys = jax.random.split(jax.random.key(seed), 6)
    fit, test = (_pairs(k, params, settings.pairs) for k in keys[:2])

    def finish(pairs, h):
        return net.logits(params, net.finish(params, pairs["r0"], h))

    def difference(logits, pairs):
        rows = jnp.arange(len(logits))
        return logits[rows, pairs["class"]] - logits[rows, 1 - pairs["class"]]

    def flip(v, key):
        h = subspaces.subspace_patch(fit["h"], fit["source h"], v)
        return _cross_entropy(finish(fit, h), 1 - fit["class"]).mean()

    def flip_residual(v, key):
        r1 = subspaces.subspace_patch(fit["r1"], fit["source r1"], v)
        return _cross_entropy(net.logits(params, r1), 1 - fit["class"]).mean()

    options = {"steps": settings.fit_steps, "lr": settings.fit_lr}
    v, _ = subspaces.fit_subspace(flip, settings.hidden, key=keys[2], **options)
    u, _ = subspaces.fit_subspace(flip_residual, settings.width, key=keys[3], **options)
    layer = subspaces.audit(
        lambda h: difference(finish(test, h), test),
        test["h"],
        test["source h"],
        v,
        params["out"],
        keys[4],
    )
    residual = subspaces.audit(
        lambda r1: difference(net.logits(params, r1), test),
        test["r1"],
        test["source r1"],
        u,
        params["classes"],
        keys[5],
    )
    row, null = subspaces.split_row_null(v, params["out"])
    along = row / jnp.linalg.norm(row)
    patched = subspaces.subspace_patch(test["h"], test["source h"], v)
    h, source, d = test["h"][0], test["source h"][0], v[:, 0]
    moment = test["h"].T @ test["h"] / len(test["h"])
    a, b = subspaces.patch_to_edit(h, source, d, params["out"], moment, ridge=1e-4)
    edited = h @ (params["out"] + b[:, None] * a[None])
    return {
        "effects": np.array([layer.effects[k] for k in PARTS]),
        "residual": np.array([residual.effects[k] for k in PARTS]),
        "norms": np.array([layer.norms["row"], layer.norms["null"]]),
        "spread": layer.spreads["patched"] / layer.spreads["natural"],
        "verdict": np.array(layer.verdict),
        "residual verdict": np.array(residual.verdict),
        "null read": jnp.abs(null.T @ params["out"]).max(),
        "edit": jnp.abs(edited - patched[0] @ params["out"]).max(),
        "natural": (test["h"] @ along)[:, 0],
        "patched": (patched @ along)[:, 0],
        "accuracy": nets["last accuracy"][seed],
        "value error": nets["last value"][seed],
    }


def _sample(key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """x = (feature -1 or 1, eight normal coordinates z) and the target z1 z2 + |z3|."""
    keys = jax.random.split(key)
    z = jax.random.normal(keys[1], (batch, NOISE))
    x = jnp.concatenate([jax.random.rademacher(keys[0], (batch, 1), jnp.float32), z], 1)
    return x, z[:, 0] * z[:, 1] + jnp.abs(z[:, 2])


def _class(x: jax.Array) -> jax.Array:
    return (x[:, 0] > 0).astype(jnp.int32)


def _pairs(key: jax.Array, params: net.Params, count: int) -> dict[str, jax.Array]:
    """Base examples, and sources with the other feature and the coordinates of other examples."""
    keys = jax.random.split(key)
    x, _ = _sample(keys[0], count)
    shuffled = x[jax.random.permutation(keys[1], count), 1:]
    found = {"class": _class(x)}
    for name, inputs in {"": x, "source ": jnp.concatenate([-x[:, :1], shuffled], 1)}.items():
        r0 = net.embed(params, inputs)
        h = net.hidden(params, r0)
        found |= {f"{name}r0": r0, f"{name}h": h, f"{name}r1": net.finish(params, r0, h)}
    return found


def _cross_entropy(logits: jax.Array, answers: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers)


def illusion_rows(
    who: str, unit: str, effect: dict[str, Any], spread: Any, *, honest: float | None = None
) -> list[Row]:
    """An illusory direction by the card's thresholds: it works, and what gives it away.

    Args:
        who, unit: what is looked at, and in what the effects are.
        effect: of every part in `PARTS`, [seeds].
        spread: of the activations along the row part, patched / natural, [seeds].
        honest: the same spread where the layer is used.
    """
    of, layer = Row.of_seeds, float(effect["full"].mean())
    share, of_v = effect["row"] / effect["v"], "effect of the row part / effect of v"
    none = np.abs(effect["null"])
    return [
        of(f"{who}: a direction seems to work", unit, effect["v"], 40.0, paper="45.9",
           baseline=layer),
        of(f"{who}: its row part does not carry it", of_v, share, 0.5, "<=", paper="13.2 / 45.9"),
        of(f"{who}: its null part does nothing", unit, none, 0.1, "<=", paper="0.0"),
        of(f"{who}: patched activations are unnatural", SPREAD, spread, 3.0, baseline=honest),
    ]  # fmt: skip


def rows_of(dormant: dict, used: dict) -> list[Row]:
    """The card's thresholds, seed by seed."""
    effect = {k: dormant["effects"][:, i] for i, k in enumerate(PARTS)}
    honest = {k: used["effects"][:, i] for i, k in enumerate(PARTS)}
    of, unit = Row.of_seeds, "FLDD, % of the logit difference"
    both = np.abs(np.concatenate([effect["random"], honest["random"]]))
    edits = np.concatenate([dormant["edit"], used["edit"]])
    spread = used["spread"]
    illusory = (dormant["verdict"] == "illusory").astype(float)
    consistent = (used["verdict"] == "consistent").astype(float)
    return [
        of("dormant: the whole layer does nothing", unit, effect["full"], (-10.0, 10.0), "in",
           paper="-8.0 (MLP 8, GPT-2 small)"),
        *illusion_rows("dormant", unit, effect, dormant["spread"], honest=float(spread.mean())),
        of("dormant: the audit says illusory", "1 if so", illusory, 1.0),
        of("used: the row part carries the effect", "effect of the row part / effect of v",
           honest["row"] / honest["v"], 0.8),
        of("used: patched activations are natural", SPREAD, spread, 1.5, "<="),
        of("used: the audit says consistent", "1 if so", consistent, 1.0),
        of("a random direction clears neither", f"largest {unit}, dormant then used", both, 2.0,
           "<="),
        of("a patch is a rank-one edit", "largest difference of the outputs, dormant then used",
           edits, 1e-5, "<="),
    ]  # fmt: skip


def draw(found: dict) -> "Figure":
    """Effects of the patches, and where they put the activations."""
    fig, axes = plots.panels(4, columns=2)
    for ax, kind in zip(axes, found, strict=False):
        title = f"{kind}: effect of a patch in the layer"
        effects = {"": found[kind]["effects"]}
        plots.bars(ax, PARTS, effects, title=title, ylabel="FLDD, %")
    for ax, kind in zip(axes[2:], found, strict=False):
        for name in ("natural", "patched"):
            values = found[kind][name][0]
            ax.hist(values, bins=60, density=True, alpha=0.6, label=name)
        ax.set_title(f"{kind}: along the row part of v, seed 0", fontsize=9)
        ax.set_xlabel("projection", fontsize=8)
        ax.legend(fontsize=7, frameon=False)
    return fig
