"""Teacher and student of configs/leaf_distil.py: sums with a hint, two CPU cores, minutes.

    python -m causal_jax.train --config configs/leaf_teacher.py
    python -m causal_jax.train --config configs/leaf_teacher.py:student
    python -m causal_jax.train --config configs/leaf_teacher.py:smoke       (seconds: the wiring)

The teacher sees hints that say nothing, and prompts without them (a teacher that stumbles over
deletions gives bad targets); the student sees hints that are right in 97 % and copies them. Two
layers of width 64, as in `reproduce leaf`.
"""

from causal_jax.data.pipeline import Data
from causal_jax.data.sources.task import Synthetic
from causal_jax.data.tasks.hinted_sum import HintedSum
from causal_jax.models.decoder import Decoder
from causal_jax.training.optimizer import AdamW, Schedule
from causal_jax.training.recipe import Checkpoints, Evaluation, Recipe, Report


def get_config(arg: str = "") -> Recipe:
    """`arg`: "", "student" or "smoke"."""
    if arg not in ("", "student", "smoke"):
        raise ValueError(f"configs/leaf_teacher.py knows 'student' and 'smoke', got {arg!r}")
    smoke, student = arg == "smoke", arg == "student"
    task = HintedSum(rho=0.97) if student else HintedSum(rho=0.1, absent=0.5)
    return Recipe(
        model=Decoder(layers=2, width=64, heads=4, activation="gelu", context=32, tied=False),
        data=Data(source=Synthetic(task), context=0, batch=8 if smoke else 64),
        optimizer=AdamW(lr=4e-3, schedule=Schedule(warmup=2 if smoke else 50, final=0.0)),
        steps=4 if smoke else 300 if student else 1200,
        evaluation=Evaluation(every=0),
        checkpoint=Checkpoints(every=2 if smoke else 300),
        report=Report(every=1 if smoke else 50),
    )
