"""What `causal_jax.train` is made of: recipe, state, step, optimizers, sharding, checkpoints, report."""
