"""A decoder of Llama-3.2-1B's shape (1.24 B parameters) for a TPU slice or a GPU node.

    python -m causal_jax.train --config configs/lm_1b.py --config.data.source.path "text/*.jsonl"
    python -m causal_jax.train --config configs/lm_1b.py:smoke          (two CPU cores, under a
    minute, embedded corpus)

Shape: 16 layers, width 2048, 32 query and 8 key/value heads of 64, feed-forward 8192, vocabulary
128 256, rope base 500 000 with Llama 3's scaling, tied embeddings. Parameters and optimizer state
over `fsdp`, everything recomputed but matrix products. 1 M tokens a step; 20 000 steps see 21 B.
Nothing about its loss has been measured here.
"""

from causal_jax.data.pipeline import Data
from causal_jax.data.sources import Corpus, Text
from causal_jax.data.tokenizers import BPE
from causal_jax.models.decoder import Decoder
from causal_jax.objectives.next_token import NextToken
from causal_jax.positions import Llama3, Rotary
from causal_jax.training.optimizer import AdamW, Schedule
from causal_jax.training.recipe import Checkpoints, Evaluation, Recipe, Report
from causal_jax.training.sharding import MeshSpec


def get_config(arg: str = "") -> Recipe:
    """`arg`: "" or "smoke"."""
    if arg not in ("", "smoke"):
        raise ValueError(f"configs/lm_1b.py knows the argument 'smoke', got {arg!r}")
    smoke = arg == "smoke"
    return Recipe(
        model=Decoder(
            layers=2 if smoke else 16,
            width=64 if smoke else 2048,
            heads=8 if smoke else 32,
            kv_heads=2 if smoke else 8,
            hidden=128 if smoke else 8192,
            norm_eps=1e-5,
            rotary=Rotary(
                base=500_000.0,
                scaling=Llama3(
                    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
                ),
            ),
            context=64 if smoke else 4096,
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(
            source=Corpus() if smoke else Text(),
            tokenizer=BPE(vocab=512 if smoke else 128_256),
            context=64 if smoke else 4096,
            batch=8 if smoke else 256,
        ),
        objective=NextToken(z_loss=1e-4),
        optimizer=AdamW(lr=4e-4, schedule=Schedule(warmup=2 if smoke else 2000)),
        mesh=MeshSpec(data=1, fsdp=-1),
        steps=4 if smoke else 20_000,
        evaluation=Evaluation(every=0 if smoke else 1000, batches=None if smoke else 10),
        checkpoint=Checkpoints(every=2 if smoke else 1000),
        report=Report(every=1 if smoke else 10),
    )
