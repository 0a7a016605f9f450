"""causal_jax: who may attend to whom, how to compute it fast, and what happens when you intervene.

Nothing heavy is imported here: take what you need from its module, e.g.
`from causal_jax.attention import dense_attention` or `from causal_jax import masks`.
"""

__version__ = "0.1.0"
