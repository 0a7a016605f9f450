"""The language model that an analysis looks at: a pretrained one, or a toy for its smoke."""

import jax
import numpy as np

from causal_jax.data.tokenizers import Bytes, Tokenizer
from causal_jax.models.decoder import Decoder, DecoderModel

TOY = "toy"


def load_subject(model: str) -> tuple[DecoderModel, Tokenizer]:
    """(model, tokenizer) by the name that `--set model=` takes.

    Args:
        model: what `models.pretrained.load` takes, "smollm2" for instance; "toy" is a random
            decoder of three layers over bytes, on which everything runs and no claim holds.

    Raises:
        InputError: nothing there (with the command that installs it), or no tokenizer.
    """
    if model == TOY:
        spec = Decoder(vocab=258, layers=3, width=16, heads=4, kv_heads=2, context=4096)
        return spec.build(jax.random.key(0)), Bytes().train(())
    from causal_jax.models.pretrained import load_language_model

    return load_language_model(model)


def peak_gib() -> float:
    """The most memory this process has held so far, GiB."""
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return float(np.round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2))
