"""Kernels: one folder per operation. This package imports jax only, never causal_jax."""
