"""Several runs as the named steps of one: each begins with the weights the one before ended with.

    Stages((Stage("transfer", Recipe(...)), Stage("finetune", Recipe(...))))

    workdir/config.json   workdir/transfer/   workdir/finetune/        each a run folder of its own

The same command goes on wherever it was stopped: stages that are done are passed over.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
from flax import nnx

from causal_jax import config
from causal_jax.errors import InputError
from causal_jax.paths import named_leaves
from causal_jax.training import loop
from causal_jax.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step.

    Attributes:
        name: of its folder: letters, digits, "-" and "_".
        recipe: what it does. Its `workdir` stays empty, and its `start` too unless it begins with
            other weights than those of the stage before.
    """

    name: str
    recipe: Recipe

    def __post_init__(self):
        if not re.fullmatch(r"[\w-]+", self.name):
            raise InputError(f"stage name {self.name!r}: expected letters, digits, '-' and '_'")
        if self.recipe.workdir:
            raise InputError(
                f"stage {self.name}: workdir is {self.recipe.workdir!r}; set that of the whole"
            )


@dataclasses.dataclass(frozen=True)
class Stages:
    """A run in steps.

    Attributes:
        stages: in their order.
        workdir: the folder of all; empty for runs/<name of the config>.
    """

    stages: tuple[Stage, ...]
    workdir: str = ""

    def __post_init__(self):
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise InputError(f"stages {names}: expected at least one, each with a name of its own")


def train_stages(stages: Stages) -> loop.Result:
    """Do all stages, or what is left of them; a signal ends the run after saving, as ever.

    Raises:
        InputError: as `loop.train`; an order in which a stage would lose what an earlier one has
            trained.
    """
    if not stages.workdir:
        raise InputError("workdir is empty: name the run folder")
    check_order(stages)
    folder, before, result = Path(stages.workdir), "", None
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config.to_json(stages), indent=1)
        (folder / "config.json").write_text(text + "\n")
    for stage in stages.stages:
        own = str(folder / stage.name)
        print(f"stage {stage.name}", flush=True)
        start = stage.recipe.start or before
        result = loop.train(dataclasses.replace(stage.recipe, start=start, workdir=own))
        if result.stopped:
            break
        before = own
    assert result is not None
    return result


def check_order(stages: Stages) -> None:
    """Refuse an order in which a stage's model has no place for what was trained before it.

    Raises:
        InputError: naming stage and parameter.
    """
    trained: dict[str, str] = {}
    for stage in stages.stages:
        names = _parameters(stage.recipe)
        if stage.recipe.start:
            trained = {}  # other weights: nothing of the earlier stages is carried on
        for name, by in trained.items():
            if name not in names:
                raise InputError(
                    f"stage {stage.name} comes after {by}, but its model has no {name}, which {by} "
                    "trains: put the stages in another order"
                )
        pattern = stage.recipe.trained
        trained |= {name: stage.name for name, full in names.items() if re.search(pattern, full)}


def _parameters(recipe: Recipe) -> dict[str, str]:
    """{name without its place in the stack: a full name} of a recipe's model."""
    spec = recipe.model
    if not spec.vocab:
        spec = dataclasses.replace(spec, vocab=1)
    shapes = nnx.split(nnx.eval_shape(lambda: spec.build(jax.random.key(0))))[1]
    return {re.sub(r"^stack/blocks/\d+/\d+/", "", name): name for name in named_leaves(shapes)}
