"""A run folder read back: its recipe, its tokenizer, its model with the trained parameters.

config.json   tokenizer/   checkpoints/      all that generating and evaluating need
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from causal_jax import config
from causal_jax.data.tokenizers import Tokenizer, load_tokenizer
from causal_jax.errors import InputError
from causal_jax.training.checkpoint import Store, Unreadable
from causal_jax.training.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """A trained model and where it came from.

    Attributes:
        folder: the run folder.
        recipe: as resolved when the run began.
        model: the module with the parameters of `step` (their average, where the run keeps one).
        tokenizer: the run's own.
        step: optimizer steps behind these parameters.
    """

    folder: Path
    recipe: Recipe
    model: Any
    tokenizer: Tokenizer
    step: int


def load_run(folder: Path | str, checkpoint: str | int = "latest") -> Run:
    """Read a run folder; nothing in it is changed.

    Args:
        folder: as training made it.
        checkpoint: "latest", "best" (lowest validation loss) or a step.

    Returns:
        the run, its parameters on the first device.

    Raises:
        InputError: no run folder, no such checkpoint, or one that cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        raise InputError(f"--run {folder}: {what}; give the folder that training made")
    recipe = config.load(str(folder))
    if not isinstance(recipe, Recipe):
        raise InputError(
            f"--run {folder}: its config is a {type(recipe).__name__}, no training run"
        )
    tokenizer = load_tokenizer(folder / "tokenizer")
    spec = recipe.model
    if not spec.vocab:
        spec = dataclasses.replace(spec, vocab=tokenizer.vocab)
        recipe = dataclasses.replace(recipe, model=spec)
    step, params = _parameters(folder, checkpoint, spec, "params" if recipe.ema is None else "ema")
    graph = nnx.split(nnx.eval_shape(lambda: spec.build(jax.random.key(0))))[0]
    return Run(folder, recipe, nnx.merge(graph, params), tokenizer, step)


def load_run_or_model(
    run: Path | str | None, model: str | None, checkpoint: str | int = "latest"
) -> tuple[Any, Tokenizer]:
    """(model, tokenizer) of a run folder, or of pretrained weights where `model` is given.

    Raises:
        InputError: as `load_run`; as `models.pretrained.load`; weights without tokenizer; a
            checkpoint asked of pretrained weights.
    """
    if model is None:
        found = load_run(run or "", checkpoint)
        return found.model, found.tokenizer
    from causal_jax.models.pretrained import load_language_model

    if checkpoint != "latest":
        raise InputError(f"--checkpoint {checkpoint}: only a run (--run) has checkpoints")
    return load_language_model(model)


def _parameters(folder: Path, which: str | int, spec: Any, part: str) -> tuple[int, Any]:
    store = Store(folder / "checkpoints")
    step = store.find(which)
    here = SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda key: nnx.split(spec.build(key))[1], jax.random.key(0))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes
    )
    try:
        return step, store.load(step, {part: abstract})[part]
    except Unreadable as e:
        others = [s for s in store.steps() if s != step]
        remedy = f"--checkpoint {others[-1]} is the next older" if others else "there is no other"
        raise InputError(f"checkpoint {step} of {folder} cannot be read: {e}; {remedy}") from e
