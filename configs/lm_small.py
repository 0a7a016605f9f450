"""A GPT-2-small class decoder (124 M parameters, Llama-shaped) on one accelerator or a handful.

    python -m causal_jax.train --config configs/lm_small.py --config.data.source.path
    "books/**/*.txt" python -m causal_jax.train --config configs/lm_small.py:smoke       (two CPU
    cores, under a minute, embedded corpus)

Data: text files of your own (UTF-8; a file, a folder, a pattern or JSON lines), a byte-pair
vocabulary trained on them. 10 000 steps of 512 x 1024 tokens, about 5.2 B: hours on 8 accelerators
of 2024 or later. Nothing about its loss has been measured here.
"""

from causal_jax.data.pipeline import Data
from causal_jax.data.sources import Corpus, Text
from causal_jax.data.tokenizers import BPE
from causal_jax.models.decoder import Decoder
from causal_jax.objectives.next_token import NextToken
from causal_jax.training.optimizer import Muon, Schedule
from causal_jax.training.recipe import Checkpoints, Evaluation, Recipe, Report, Sample
from causal_jax.training.sharding import MeshSpec


def get_config(arg: str = "") -> Recipe:
    """`arg`: "" or "smoke"."""
    if arg not in ("", "smoke"):
        raise ValueError(f"configs/lm_small.py knows the argument 'smoke', got {arg!r}")
    smoke = arg == "smoke"
    return Recipe(
        model=Decoder(
            layers=2 if smoke else 12,
            width=64 if smoke else 768,
            heads=4 if smoke else 12,
            qk_norm=True,
            context=64 if smoke else 1024,
            dtype="bfloat16",
        ),
        data=Data(
            source=Corpus() if smoke else Text(),
            tokenizer=BPE(vocab=512 if smoke else 50_304),
            context=64 if smoke else 1024,
            batch=16 if smoke else 512,
        ),
        objective=NextToken(z_loss=1e-4),
        optimizer=Muon(
            lr=2e-3, schedule=Schedule(kind="wsd", warmup=2 if smoke else 250, final=0.0)
        ),
        mesh=MeshSpec(data=-1),
        steps=4 if smoke else 10_000,
        accumulate=2,
        evaluation=Evaluation(every=0 if smoke else 500, batches=None if smoke else 20),
        checkpoint=Checkpoints(every=2 if smoke else 1000),
        report=Report(every=1 if smoke else 20),
        sample=Sample(prompt="The ", tokens=16 if smoke else 200),
    )
