"""Thin NNX owners of parameters around the pure functions.

Modules hold `nnx.Param`s and static settings, nothing else: no random state, no buffers, no
sharding metadata. A model is therefore a graph plus one tree of arrays, and every transformation
used on it is plain JAX.
"""
