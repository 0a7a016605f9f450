"""Titans, memory as gate (MAG), about 760 M parameters, as the paper trains (arXiv 2501.00663).

    python -m causal_jax.train --config configs/titans_mag_760m.py --config.data.source.path PATTERN
    python -m causal_jax.train --config configs/titans_mag_760m.py:smoke

Data: text files of your own, a byte-pair vocabulary trained on them. Accelerators only; nothing
about its loss has been measured here. The smoke runs on two CPU cores in under a minute.
"""

from causal_jax.papers._titans_recipes import recipe
from causal_jax.training.recipe import Recipe


def get_config(arg: str = "") -> Recipe:
    """`arg`: "" or "smoke"."""
    return recipe("mag", "760m", arg)
