"""Published systems, one file each: `papers["titans"]`; `python -m causal_jax.reproduce titans`."""

from causal_jax.papers._base import Evidence, Paper, Report, Row, papers, require

__all__ = ["Evidence", "Paper", "Report", "Row", "papers", "require"]
