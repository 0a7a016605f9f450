"""The alphabet of array shapes in public signatures, and jaxtyping's types under one roof.

    B batch          T queries (time)       S keys (source)
    N query heads    K key/value heads      H head width
    D model width    F feed-forward width   V vocabulary       L layers
    Q, P             number of query tiles, number of tiles in a list

Shapes are checked at run time in the tests only (`tests/conftest.py`); users pay nothing.
"""

from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ["Array", "Bool", "Float", "Int", "Key"]
