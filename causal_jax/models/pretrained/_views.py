"""Arrays that are read when somebody asks, and only the part that is asked for.

A checkpoint offers each stored tensor as a `View`; the rules of a family turn and stack views, and
`jax.make_array_from_callback` reads from the result the block each device needs.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """An array of known shape behind a function that reads a block of it.

    Attributes:
        shape: of the whole.
        read: a slice (step 1) per axis -> the block, in whatever dtype is stored.
    """

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]

    def whole(self) -> np.ndarray:
        """Everything."""
        return self.read(tuple(slice(0, n) for n in self.shape))

    def transposed(self) -> "View":
        """Axes in reverse order; a block of it is a block of the original."""
        return View(self.shape[::-1], lambda index: self.read(index[::-1]).T)

    def columns(self, start: int, stop: int) -> "View":
        """Places start to stop of the last axis."""

        def read(index: Index) -> np.ndarray:
            low, high, _ = index[-1].indices(stop - start)
            return self.read((*index[:-1], slice(start + low, start + high)))

        return View((*self.shape[:-1], stop - start), read)

    def mapped(self, f: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]) -> "View":
        """f of the whole, which each block reads: for what moves values across the axes."""
        return View(tuple(shape), lambda index: f(self.whole())[index])

    def each(self, f: Callable[[np.ndarray], np.ndarray]) -> "View":
        """f entry by entry."""
        return View(self.shape, lambda index: f(self.read(index)))


def stacked(views: Sequence[View]) -> View:
    """Views of one shape along a new first axis."""
    views = tuple(views)

    def read(index: Index) -> np.ndarray:
        chosen = views[index[0]]
        first = chosen[0].read(index[1:])
        if len(chosen) == 1:
            return first[None]
        out = np.empty((len(chosen), *first.shape), first.dtype)
        out[0] = first
        for place, view in enumerate(chosen[1:], 1):
            out[place] = view.read(index[1:])
        return out

    return View((len(views), *views[0].shape), read)
