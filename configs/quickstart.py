"""A small language model of the Python language reference: two CPU cores, four to six minutes.

    python -m causal_jax.train --config configs/quickstart.py
    python -m causal_jax.train --config configs/quickstart.py:smoke     (seconds: checks the wiring,
    learns nothing)

Data: the interpreter's own language reference (about 0.46 MB of English), the last tenth held out;
nothing is downloaded. Prints validation bits per byte beside Witten-Bell n-gram models of orders
1-5 fitted to the same bytes, then a sample.
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
        raise ValueError(f"configs/quickstart.py knows the argument 'smoke', got {arg!r}")
    smoke = arg == "smoke"
    return Recipe(
        model=Decoder(
            layers=1 if smoke else 4, width=64 if smoke else 256, heads=4, context=256, dropout=0.1
        ),
        data=Data(
            source=Corpus(),
            tokenizer=BPE(vocab=512 if smoke else 1024),
            context=64 if smoke else 256,
            batch=8,
        ),
        optimizer=Muon(lr=4e-3, schedule=Schedule(warmup=10, final=0.02)),
        steps=4 if smoke else 280,
        evaluation=Evaluation(every=0 if smoke else 70),
        checkpoint=Checkpoints(every=2 if smoke else 140),
        report=Report(every=1 if smoke else 10),
        sample=Sample(prompt="The ", tokens=16 if smoke else 200),
    )
