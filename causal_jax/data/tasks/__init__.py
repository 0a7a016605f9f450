"""Synthetic tasks, one file each: `tasks["recall"]`, `parse_tasks("recall:pairs=8,length=64")`."""

from causal_jax.data.tasks._base import Task, parse_tasks, tasks

__all__ = ["Task", "parse_tasks", "tasks"]
