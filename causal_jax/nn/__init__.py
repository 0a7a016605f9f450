"""Thin NNX owners of parameters around the pure functions."""
