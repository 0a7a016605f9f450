"""The training of the Titans paper, for every kind and size: one factory behind `configs/titans_*`.

AdamW, cosine, weight decay 0.1, half a million tokens a step in rows of 4096; peak learning rates
of arXiv 2504.13173. 15 B tokens are 29 000 steps (760 M: 30 B).
"""

import dataclasses

from causal_jax.data.pipeline import Data
from causal_jax.data.sources import Corpus, Text
from causal_jax.data.tokenizers import BPE
from causal_jax.errors import InputError
from causal_jax.memory import Delta
from causal_jax.models.titans import Kind, Size, layer, titans
from causal_jax.objectives.next_token import NextToken
from causal_jax.training.optimizer import AdamW, Schedule
from causal_jax.training.recipe import Checkpoints, Evaluation, Recipe, Report, Sample
from causal_jax.training.sharding import MeshSpec

_LR = {"170m": 3e-3, "340m": 1.5e-3, "400m": 1.5e-3, "760m": 1.25e-3}


def recipe(kind: Kind, size: Size, arg: str = "") -> Recipe:
    """`arg`: "" or "smoke".

    Raises:
        InputError: another argument.
    """
    if arg not in ("", "smoke"):
        raise InputError(f"titans_{kind}_{size} knows the argument 'smoke', got {arg!r}")
    full = Recipe(
        model=titans(kind, size, dtype="bfloat16", remat="full"),
        data=Data(source=Text(), tokenizer=BPE(vocab=32_000), context=4096, batch=128),
        objective=NextToken(),
        optimizer=AdamW(lr=_LR[size], schedule=Schedule(warmup=500)),
        mesh=MeshSpec(data=-1),
        steps=58_000 if size == "760m" else 29_000,
        evaluation=Evaluation(every=1000, batches=20),
        checkpoint=Checkpoints(every=1000),
        report=Report(every=20),
        sample=Sample(prompt="The "),
    )
    if not arg:
        return full
    small = layer(kind, Delta(tile=16), window=16, persistent=2)
    return dataclasses.replace(
        full,
        model=dataclasses.replace(
            full.model, layers=2, width=32, heads=2, context=32, attention=(small,), remat="none"
        ),
        data=Data(source=Corpus(), tokenizer=BPE(vocab=512), context=32, batch=8),
        steps=4,
        evaluation=Evaluation(every=0, final_batches=1),
        checkpoint=Checkpoints(every=2),
        report=Report(every=1),
        mesh=MeshSpec(data=1),
        sample=None,
    )
