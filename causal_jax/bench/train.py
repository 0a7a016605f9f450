"""`bench train`: one optimisation step of a config's model, beside the same model in torch."""

import argparse
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from causal_jax.bench import recipes
from causal_jax.bench.options import pick, words
from causal_jax.bench.peers import need_torch, torch_device, torch_wait
from causal_jax.bench.report import Record, Writer, add_ratios, case_table
from causal_jax.bench.timing import (
    Candidate,
    matmul,
    matmul_flops,
    measure,
    refuse_if_too_large,
    temp_bytes,
)
from causal_jax.errors import InputError
from causal_jax.training.recipe import Recipe
from causal_jax.training.sharding import make_mesh, put_batch
from causal_jax.training.state import graph_of, new_state, state_of
from causal_jax.training.step import step_of

PEERS = ("torch", "torch-compile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group; `--config F[:arg] --config.a.b V` is read before argparse."""
    parser.add_argument(
        "--peers",
        default="torch",
        metavar="LIST",
        help=f"the same model elsewhere: {', '.join(PEERS)}, or none",
    )
    parser.epilog = (
        f"--config F[:arg] (default {recipes.DEFAULT}) and --config.a.b V choose the model"
    )


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Time one step here and there, in turns, from the same weights."""
    recipe = recipes.load(args)
    names = [] if args.peers == "none" else words(args.peers, "peers")
    pick(names, PEERS, "peer")
    baselines = words(args.baseline, "baseline") if args.baseline else names
    pick(baselines, ["causal_jax", *names], "baseline in this run")
    batch = recipes.random_batch(recipe, args.seed)
    candidates, refused, losses = [], [], {}
    own, weights, losses["causal_jax"] = our_step(recipe, batch)
    candidates.append(own)
    for name in names:
        try:
            peer, losses[name] = torch_step(name, recipe, batch, weights)
            candidates.append(peer)
        except NotImplementedError as e:
            refused.append({"name": name, "note": str(e)})
    check_same_loss(losses)
    del weights
    ceiling = matmul("float32")
    *timings, top = measure([*candidates, ceiling], repeats=args.repeats, rss=args.rss)
    tokens = batch["tokens"].size
    flops = recipe.model.flops_per_token(recipes.context(recipe)) * tokens
    per_second = matmul_flops() / min(top.seconds)
    common = describe(args, recipe)
    records: list[Record] = [
        common
        | t.record()
        | {
            "tokens_per_s": tokens / t.median,
            "flops_per_s": flops / t.median,
            "of_matmul": flops / t.median / per_second,
            "matmul_flops_per_s": per_second,
            "first_loss": losses[t.name],
        }
        for t in timings
    ]
    records += [common | r for r in refused]
    add_ratios(records, baselines)
    writer.add(records)
    shown = ", ".join(f"{k} {v:.5f}" for k, v in losses.items())
    print(f"\n{_title(common)}\nloss before the first step: {shown}")
    print(case_table(records, baselines), flush=True)


def our_step(recipe: Recipe, batch: dict[str, np.ndarray]) -> tuple[Candidate, Any, float]:
    """The compiled step of `training/step.py`; its starting weights; the loss at them."""
    mesh = make_mesh(recipe.mesh)
    tx, spec = recipe.optimizer.transformation(), recipe.model
    if recipe.trainable or getattr(spec, "lora", None) is not None:
        raise InputError(
            f"trainable = {recipe.trainable!r}, model.lora = {getattr(spec, 'lora', None)}: the "
            "peers train everything and have no adapters; leave both empty"
        )
    abstract, _ = state_of(recipe, mesh)
    graph, step = graph_of(spec), step_of(recipe, abstract, mesh)
    held = {"state": new_state(spec, tx, abstract, recipe.seed)}
    weights = nnx.merge(graph, jax.tree.map(np.asarray, held["state"]["params"]))
    rows, key = put_batch(mesh, batch), jax.random.key(recipe.seed)
    start = time.perf_counter()
    compiled = step.lower(held["state"], rows, key).compile()  # pyright: ignore[reportFunctionMemberAccess]
    seconds, needed = time.perf_counter() - start, temp_bytes(compiled)
    refuse_if_too_large(needed)

    def call():
        held["state"], report = compiled(held["state"], rows, key)
        return held["state"], report

    _, report = call()
    total, count = report["metrics"]["loss"]
    candidate = Candidate("causal_jax", call, jax.block_until_ready, seconds, needed)
    return candidate, weights, float(total / count)


def torch_step(
    name: str, recipe: Recipe, batch: dict[str, np.ndarray], weights: Any
) -> tuple[Candidate, float]:
    """The same step in torch from the same weights, and the loss at them."""
    torch = need_torch()
    from causal_jax.bench import torch_decoder

    device = torch_device(torch)
    step = torch_decoder.TrainStep(recipe, weights, batch, device, compiled=name == "torch-compile")
    start = time.perf_counter()
    first = step().item()
    seconds = time.perf_counter() - start if name == "torch-compile" else 0.0
    return Candidate(name, step, torch_wait(torch, device), seconds), first


def check_same_loss(losses: dict[str, float]) -> None:
    """Two programs that disagree about the loss at the same weights are not the same model."""
    values = list(losses.values())
    if max(values) - min(values) > 1e-3 * abs(values[0]):
        raise RuntimeError(f"not the same model: losses from the same weights are {losses}")


def describe(args: argparse.Namespace, recipe: Recipe) -> Record:
    """The case as one JSON object."""
    return {
        "group": "train",
        "config": args.config or recipes.DEFAULT,
        "overrides": list(args.overrides),
        "params": recipe.model.param_count(),
        "vocab": recipe.model.vocab,
        "batch": recipe.data.batch,
        "seq": recipes.context(recipe),
        "accumulate": recipe.accumulate,
        "dtype": getattr(recipe.model, "dtype", None),
    }


def _title(r: Record) -> str:
    return (
        f"one training step of {' '.join([r['config'], *r['overrides']])}: "
        f"{r['params'] / 1e6:.2f} M parameters, {r['batch']} x {r['seq']} tokens, {r['dtype']}"
    )
