"""The best model of the Python language reference that one hour of two CPU cores buys.

    python -m causal_jax.train --config configs/corpus_best.py
    python -m causal_jax.train --config configs/corpus_best.py:smoke

The same data as configs/quickstart.py (0.41 MB to learn from), so what limits it is the text, not
the time: many epochs, hence dropout, weight decay and an average over the last parameters.
"""

from causal_jax.data.pipeline import Data
from causal_jax.data.sources import Corpus
from causal_jax.data.tokenizers import BPE
from causal_jax.models.decoder import Decoder
from causal_jax.training.optimizer import Muon, Schedule
from causal_jax.training.recipe import Checkpoints, Evaluation, Recipe, Report, Sample


def get_config(arg: str = "") -> Recipe:
    """`arg`: "" or "smoke"."""
    if arg not in ("", "smoke"):
        raise ValueError(f"configs/corpus_best.py knows the argument 'smoke', got {arg!r}")
    smoke = arg == "smoke"
    return Recipe(
        model=Decoder(
            layers=1 if smoke else 6,
            width=64 if smoke else 256,
            heads=4,
            context=256,
            dropout=0.25,
        ),
        data=Data(
            source=Corpus(),
            tokenizer=BPE(vocab=512 if smoke else 1024),
            context=64 if smoke else 256,
            batch=8 if smoke else 16,
        ),
        optimizer=Muon(lr=3e-3, weight_decay=0.3, schedule=Schedule(warmup=50, final=0.0)),
        ema=0.99,
        steps=4 if smoke else 480,
        evaluation=Evaluation(every=0 if smoke else 120),
        checkpoint=Checkpoints(every=2 if smoke else 120),
        report=Report(every=1 if smoke else 20),
        sample=Sample(prompt="The ", tokens=16 if smoke else 300),
    )
