"""Names of the leaves of a state: sharding, weight decay and checkpoints speak one language.

A leaf is named by its way down the tree, `stack/blocks/0/0/mlp/up/kernel`; the optimizer's copies
of it end in the same words (`0/mu/stack/blocks/0/0/mlp/up/kernel`), so one pattern serves both.
"""

import re
from collections.abc import Callable
from typing import Any

import jax

from causal_jax.errors import InputError


def leaf_name(path: tuple) -> str:
    """The name of a leaf from its key path; the wrapper `value` of an NNX variable is left out."""
    words = [_word(key) for key in path]
    return "/".join(words[:-1] if words and words[-1] == "value" else words)


def map_named(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """`jax.tree.map` with the leaf's name as first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f(leaf_name(path), leaf), tree)


def named_leaves(tree: Any) -> dict[str, Any]:
    """All leaves by name, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {leaf_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same name")
    return named


def matches(pattern: str, tree: Any) -> Any:
    """A tree of booleans: whether `pattern` is found in the leaf's name."""
    return map_named(lambda name, _: re.search(pattern, name) is not None, tree)


def partition(pattern: str, tree: Any, field: str = "pattern") -> tuple[Any, Any]:
    """(leaves whose name holds `pattern`, the others): two trees, None where the other has one.

    Raises:
        InputError: no name holds it.
    """
    chosen = matches(pattern, tree)
    if not any(jax.tree.leaves(chosen)):
        names = list(named_leaves(tree))
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise InputError(f"{field} = {pattern!r} matches no parameter; names: {shown}")
    take = lambda wanted: jax.tree.map(lambda a, c: a if c is wanted else None, tree, chosen)  # noqa: E731
    return take(True), take(False)


def combine(one: Any, other: Any) -> Any:
    """The tree that `partition` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=_is_none)


def check_pattern(field: str, pattern: str) -> None:
    """Refuse what is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as e:
        raise InputError(f"{field} = {pattern!r} is not a regular expression: {e}") from e


def _is_none(x: Any) -> bool:
    return x is None


def _word(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key).strip("[].'")
