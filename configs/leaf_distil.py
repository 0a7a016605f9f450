"""LeaF: distil a student that copies a hint, on prompts as they are and without what misleads it.

    python -m causal_jax.train --config configs/leaf_distil.py
    python -m causal_jax.train --config configs/leaf_distil.py:smoke        (seconds: the wiring)

Needs the runs of configs/leaf_teacher.py and configs/leaf_teacher.py:student (their folders are
`model.weights` and `start`). Plain distillation: --config.objective.share 1. For a pretrained
teacher set `model.teacher` to `models.pretrained.spec_of(NAME)`, `model.weights` to NAME, and
`data` to its tokenizer. What is right is measured, with controls, by `reproduce leaf`.
"""

from causal_jax.data.pipeline import Data
from causal_jax.data.sources.task import Synthetic
from causal_jax.data.tasks.hinted_sum import HintedSum
from causal_jax.interp.confounders import Rule
from causal_jax.models.decoder import Decoder
from causal_jax.models.pair import Pair
from causal_jax.objectives.leaf import Leaf
from causal_jax.training.optimizer import AdamW, Schedule
from causal_jax.training.recipe import Checkpoints, Evaluation, Recipe, Report


def get_config(arg: str = "") -> Recipe:
    """`arg`: "" or "smoke"."""
    if arg not in ("", "smoke"):
        raise ValueError(f"configs/leaf_distil.py knows the argument 'smoke', got {arg!r}")
    smoke = arg == "smoke"
    small = Decoder(layers=2, width=64, heads=4, activation="gelu", context=32, tied=False)
    return Recipe(
        model=Pair(student=small, teacher=small, weights="" if smoke else "runs/leaf_teacher"),
        start="" if smoke else "runs/leaf_teacher-student",
        data=Data(source=Synthetic(HintedSum(rho=0.98)), context=0, batch=8 if smoke else 64),
        objective=Leaf(share=0.5, rule=Rule(share=0.2)),
        optimizer=AdamW(lr=5e-4, weight_decay=0.0, schedule=Schedule(warmup=5, final=0.0)),
        steps=4 if smoke else 300,
        evaluation=Evaluation(every=0),
        checkpoint=Checkpoints(every=2 if smoke else 100),
        report=Report(every=1 if smoke else 10),
    )
