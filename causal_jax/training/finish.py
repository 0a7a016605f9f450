"""What is printed when training ends: n-gram baselines beside the result, and a sample."""

from typing import Any

import jax
from flax import nnx

from causal_jax.training.recipe import Recipe
from causal_jax.training.state import State, averaged

_MOST_BYTES = 16 << 20  # counting n-grams of more text takes minutes


def baselines(recipe: Recipe, prepared: Any, figures: dict[str, float]) -> list[str]:
    """Bits per byte of Witten-Bell n-gram models fitted to the same training bytes.

    Returns:
        lines to print: one per order up to `evaluation.ngrams`, and the model's own.
    """
    orders, own = recipe.evaluation.ngrams, figures.get("bits_per_byte")
    if not orders or own is None or jax.process_index() != 0:
        return []
    from causal_jax.data.ngram import WittenBell

    source = prepared.config.source
    train = [text.encode() for text in source.documents("train")]
    if sum(map(len, train)) > _MOST_BYTES:
        return [f"n-gram baselines left out: more than {_MOST_BYTES >> 20} MiB of text to count"]
    held_out = [text.encode() for text in source.documents("validation")]
    bits = WittenBell(orders).fit(train).bits_per_byte(held_out)
    lines = [f"validation bits per byte, of {sum(map(len, held_out)):,} bytes held out:"]
    lines += [f"  {n}-gram (Witten-Bell)   {b:.3f}" for n, b in enumerate(bits, 1)]
    beaten = sum(own < b for b in bits)
    verdict = f"beats {beaten} of {orders}"
    return [*lines, f"  this model              {own:.3f}   {verdict}"]


def sample(recipe: Recipe, prepared: Any, graph: Any, state: State) -> list[str]:
    """A continuation of `recipe.sample.prompt`, as lines to print."""
    wanted = recipe.sample
    if wanted is None:
        return []
    if jax.process_count() > 1:
        return ["sample left out: several processes (python -m causal_jax.generate makes one)"]
    from causal_jax.generate import complete
    from causal_jax.sampling import Sampling

    model = nnx.merge(graph, averaged(state))
    (made,) = complete(
        model,
        prepared.tokenizer,
        [wanted.prompt],
        max_tokens=wanted.tokens,
        sampling=Sampling(temperature=wanted.temperature, top_p=wanted.top_p),
        seed=recipe.seed,
    )
    return ["", f"sample (temperature {wanted.temperature}):", wanted.prompt + made.text, ""]
