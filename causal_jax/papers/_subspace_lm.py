"""The language-model part of the subspace illusion: indirect objects in a pretrained decoder.

Everything happens at the last token. Its activation at layer l is patched, so only that token has
to run through the layers after l: what it reads of the prompt lies in the cache.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from causal_jax import masks, plots
from causal_jax.data.tasks.indirect_object import Pairs
from causal_jax.errors import InputError
from causal_jax.interp import subspaces
from causal_jax.models.decoder import Cache, DecoderModel
from causal_jax.nn.stack import segments_of
from causal_jax.papers._base import Row
from causal_jax.papers._subspace_nets import PARTS, illusion_rows
from causal_jax.taps import run, site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SITES = ("resid_post", "mlp_act")


class Side:
    """One side of the pairs: the cache of the prompts but for their last token, and that token."""

    def __init__(self, model: DecoderModel, tokens: np.ndarray):
        graph, params = nnx.split(model)

        @jax.jit
        def prefill(params, tokens):
            model = nnx.merge(graph, params)
            cache = model.init_cache(len(tokens), tokens.shape[1] + 1)
            return model.extend_hidden(tokens, cache)[1]

        @jax.jit
        def step(params, cache, last):
            model = nnx.merge(graph, params)
            (logits, _), acts = run(model.extend, last, cache, capture=SITES)
            return logits[:, -1], acts

        self.cache, self.last = prefill(params, tokens[:, :-1]), jnp.asarray(tokens[:, -1:])
        self.logits, self.acts = step(params, self.cache, self.last)


def layer_map(model: DecoderModel, base: Side, source: Side, pairs: Pairs) -> dict[str, np.ndarray]:
    """FLDD of patching the whole activation at each layer: {site: [L]}."""
    graph, params = nnx.split(model)

    @functools.partial(jax.jit, static_argnums=0)
    def patched(name, params, cache, value, layer):
        model = nnx.merge(graph, params)
        edit = site(name, layer=layer).set(value)
        return run(model.extend, base.last, cache, edits=[edit])[0][0][:, -1]

    def effect(name, layer):
        logits = patched(name, params, base.cache, source.acts[name][layer], jnp.int32(layer))
        return subspaces.fldd(difference(base.logits, pairs), difference(logits, pairs))

    layers = range(len(base.acts["mlp_act"]))
    return {name: np.array([effect(name, layer) for layer in layers]) for name in SITES}


def difference(logits: jax.Array, pairs: Pairs) -> jax.Array:
    """logit(answer) - logit(other) [B]."""
    rows = jnp.arange(len(logits))
    return logits[rows, pairs.answer] - logits[rows, pairs.other]


def rest(model: DecoderModel, layer: int) -> tuple[Callable, Any]:
    """The model after a layer, for models whose layers are all alike.

    Returns:
        (parameters, resid_post of the layer [B, D] at the next position, `later` cache) -> logits
        [B, V], and the parameters.

    Raises:
        InputError: the layers differ, or norms stand behind them.
    """
    segment, blocks = model.stack.segments[0], model.stack.blocks[0]
    if len(model.stack.segments) > 1 or len(blocks) > 1 or blocks[0].mlp_post is not None:
        raise InputError(
            "model: expected one whose layers are all alike, without norms behind them"
        )
    block, stacked = nnx.split(blocks[0])
    part = nnx.merge(*nnx.split(model))
    part.stack.segments = segments_of(segment.specs * (segment.repeats - layer - 1))
    sliced = jax.tree.map(lambda a: a[layer + 1 :], stacked)
    part.stack.blocks = nnx.List([nnx.List([nnx.merge(block, sliced)])])
    graph, params = nnx.split(part)

    def after(params, x, cache):
        model = nnx.merge(graph, params)
        at = jnp.broadcast_to(cache.length, (len(x), 1))
        out, _ = model.stack.extend(
            x[:, None], cache.layers, length=cache.length, mask=masks.Causal(), positions=at
        )
        return model.unembed(model.norm(out))[:, 0]

    return after, params


def later(cache: Cache, layer: int) -> Cache:
    """The cache of the layers after one."""
    layers = jax.tree.map(lambda a: a[layer + 1 :], cache.layers)
    return dataclasses.replace(cache, layers=layers)


def find(
    model: DecoderModel,
    layer: int,
    sides: tuple[Side, Side],
    pairs: Pairs,
    test_sides: tuple[Side, Side],
    test_pairs: Pairs,
    *,
    where: str,
    seed: int,
    steps: int,
    lr: float,
    batch: int,
) -> dict[str, Any]:
    """Fit a direction at `layer` on pairs, audit it on others; `where`: "mlp_act", "resid_post"."""
    after, params = rest(model, layer)
    down = model.stack.blocks[0][0].mlp.down.kernel[...][layer]

    def gather(sides, pairs):
        base, source = sides
        return {
            "base": base.acts[where][layer][:, 0],
            "source": source.acts[where][layer][:, 0],
            "post": base.acts["resid_post"][layer][:, 0],
            "cache": later(base.cache, layer),
            "other": jnp.asarray(pairs.other),
        }

    def output(params, down, data, x):
        if where == "mlp_act":  # the layer's output is linear in it
            x = data["post"] + (x - data["base"]) @ down
        return after(params, x, data["cache"])

    @jax.jit
    def fit(params, down, data, key):
        def loss(v, key):
            rows = jax.random.choice(key, len(pairs.other), (batch,), replace=False)
            some = {k: x[rows] for k, x in data.items() if k != "cache"}
            layers = jax.tree.map(lambda a: a[:, rows], data["cache"].layers)
            some["cache"] = dataclasses.replace(data["cache"], layers=layers)
            x = subspaces.subspace_patch(some["base"], some["source"], v)
            logits = output(params, down, some, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, some["other"]).mean()

        width = data["base"].shape[-1]
        return subspaces.fit_subspace(loss, width, key=key, steps=steps, lr=lr, final=0.1)

    keys = jax.random.split(jax.random.key(seed), 2)
    v, losses = fit(params, down, gather(sides, pairs), keys[0])
    data, of_test = gather(test_sides, test_pairs), jax.jit(output)
    report = subspaces.audit(
        lambda x: difference(of_test(params, down, data, x), test_pairs),
        data["base"],
        data["source"],
        v,
        down if where == "mlp_act" else jnp.eye(len(v)),
        keys[1],
    )
    patched = subspaces.subspace_patch(data["base"], data["source"], v)
    logits = of_test(params, down, data, patched)
    return {
        "effects": np.array([report.effects[k] for k in PARTS]),
        "norms": np.array([report.norms["row"], report.norms["null"]]),
        "spread": report.spreads["patched"] / report.spreads["natural"],
        "verdict": np.array(report.verdict),
        "accuracy": subspaces.interchange_accuracy(logits, data["other"]),
        "losses": losses,
        "v": v,
    }


def rows_of(found: dict[str, Any], effects: dict[str, Any], layer: int) -> list[Row]:
    """The claims about the model, judged by the card's thresholds for nets with a dormant layer."""
    mlp = dict(zip(PARTS, found["mlp_act"]["effects"].T, strict=True))
    resid = dict(zip(PARTS, found["resid_post"]["effects"].T, strict=True))
    of, unit = Row.of_seeds, "FLDD at the last token, %"
    where = f"feed-forward layer {layer}"
    return [
        of(
            f"language model: the whole {where} does not carry the answer",
            unit,
            mlp["full"],
            10.0,
            "<=",
            paper="-8.0 (MLP 8, GPT-2 small)",
            baseline=float(effects["resid_post"][layer]),
            note="one-sided: patching the whole layer may strengthen the original answer; "
            "baseline: the whole residual stream there",
        ),
        *illusion_rows("language model", unit, mlp, found["mlp_act"]["spread"]),
        of(
            "language model: a direction in the residual stream works",
            unit,
            resid["v"],
            100.0,
            ">=",
            paper="138.9",
            baseline=float(resid["full"].mean()),
            note="100: no preference left; the whole stream does as much",
        ),
    ]


def draw(effects: dict[str, Any], found: dict[str, Any], layer: int) -> "Figure":
    """The map over layers, and the two directions at the chosen one."""
    fig, (left, right) = plots.panels(2, width=5.5, title="Indirect objects, last token")
    lines = {"residual stream": effects["resid_post"], "feed-forward": effects["mlp_act"]}
    plots.curves(
        left,
        np.arange(len(effects["mlp_act"])),
        lines,
        title="the whole activation patched",
        xlabel="layer",
        ylabel="FLDD, %",
        levels={"no preference": 100.0},
    )
    both = {"feed-forward": found["mlp_act"], "residual stream": found["resid_post"]}
    series = {name: f["effects"] for name, f in both.items()}
    plots.bars(right, PARTS, series, title=f"directions at layer {layer}", ylabel="FLDD, %")
    return fig
