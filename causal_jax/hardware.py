"""Which kind of hardware programs are made for: that of this process, or one that is elsewhere."""

import contextlib
from collections.abc import Iterator

import jax

_TARGET: list[str] = []
_MEANT = {"gpu": ("gpu", "cuda"), "tpu": ("tpu",)}


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Choose for another platform than the one this process runs on.

    For programs traced here and compiled ahead of time for a machine that is elsewhere. Trace
    fresh functions inside: jit does not know this context, and remembers what it has traced.

    Args:
        platform: "cpu", "gpu" or "tpu".
    """
    _TARGET.append(platform)
    try:
        yield
    finally:
        _TARGET.pop()


def target() -> str:
    """The platform to choose for."""
    return _TARGET[-1] if _TARGET else jax.default_backend()


def elsewhere(kernel: str, platform: str = "") -> str | None:
    """Why a kernel for "gpu" or "tpu" cannot serve on a platform (the target), or None."""
    platform = platform or target()
    if platform in _MEANT[kernel]:
        return None
    return f"it needs a {kernel.upper()}, this is {platform}"
