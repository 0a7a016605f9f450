"""What `causal_jax.train` is made of: recipe, step, optimizers, sharding, checkpoints, loop."""
