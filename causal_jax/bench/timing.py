"""Stopwatch: candidates take turns in one run; a sample ends when the device has finished.

On a shared or throttling machine two runs one after another cannot be compared. So all candidates
are compiled first, then take turns (A B C A B C ...), and only ratios within one run are claimed.
Compilation is timed apart and never enters a sample.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        name: how the report calls it.
        call: starts the work and returns its result, perhaps before the device has finished.
        wait: returns when a result of `call` is really there.
        compile_s: seconds spent on tracing and compiling, apart from the samples.
        temp_bytes: temporaries of the compiled program, where the compiler tells.
        collect: a result of `call` as numpy arrays in the common layout, for comparing candidates.
    """

    name: str
    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    compile_s: float = 0.0
    temp_bytes: int | None = None
    collect: Callable[[Any], list[np.ndarray]] | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one number per round."""

    name: str
    seconds: tuple[float, ...]
    calls_per_sample: int
    compile_s: float
    temp_bytes: int | None = None
    rss_bytes: int | None = None

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median: how far the machine is to be trusted."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def record(self) -> dict[str, Any]:
        """The numbers as one JSON object."""
        return {
            "name": self.name,
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "spread": self.spread,
            "samples": len(self.seconds),
            "calls_per_sample": self.calls_per_sample,
            "compile_s": self.compile_s,
            "temp_bytes": self.temp_bytes,
            "rss_bytes": self.rss_bytes,
        }


def jax_candidate(name: str, f: Callable, *args: Any, collect: Callable | None = None) -> Candidate:
    """`f(*args)` jitted and compiled ahead of time.

    Raises:
        NotImplementedError: the program's temporaries do not fit into the memory that is free now.
    """
    start = time.perf_counter()
    compiled = jax.jit(f).lower(*args).compile()
    seconds = time.perf_counter() - start
    needed = temp_bytes(compiled)
    refuse_if_too_large(needed)
    return Candidate(
        name, lambda: compiled(*args), jax.block_until_ready, seconds, needed, collect=collect
    )


def temp_bytes(compiled: Any) -> int | None:
    """Temporaries of a compiled program in bytes, None where the backend does not tell."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def refuse_if_too_large(needed: int | None) -> None:
    """Stop a program that would be killed for its memory before it starts."""
    free = free_bytes()
    if needed is not None and free is not None and needed > 0.9 * free:
        raise NotImplementedError(
            f"needs {needed / 2**30:.1f} GiB of temporaries, {free / 2**30:.1f} GiB are free"
        )


def free_bytes() -> int | None:
    """Bytes still to be had on the default device, None where unknown."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    return _proc("/proc/meminfo", "MemAvailable")


def measure(
    candidates: Sequence[Candidate],
    *,
    repeats: int = 7,
    sample_s: float = 0.02,
    pause_s: float = 0.002,
    rss: bool = False,
) -> list[Timing]:
    """Time all candidates in turns.

    Args:
        candidates: compiled and ready; each is called once here before anything is timed.
        repeats: rounds, one sample of every candidate per round.
        sample_s: a sample is made of as many calls as fill this time (at least one).
        pause_s: rest between candidates, so that one library's idle threads stop spinning.
        rss: also measure how far one call raises the process's resident memory (Linux).

    Returns:
        one Timing per candidate, in order.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    calls, peaks = [], []
    for c in candidates:
        c.wait(c.call())
        seconds = _sample(c, 1)
        calls.append(max(1, min(1000, round(sample_s / max(seconds, 1e-9)))))
        peaks.append(rss_of(c) if rss else None)
    samples: list[list[float]] = [[] for _ in candidates]
    for _ in range(repeats):
        for c, n, out in zip(candidates, calls, samples):
            time.sleep(pause_s)
            if n > 1:  # a short call first pays for the caches its predecessor has filled
                c.wait(c.call())
            out.append(_sample(c, n))
    return [
        Timing(c.name, tuple(s), n, c.compile_s, c.temp_bytes, peak)
        for c, s, n, peak in zip(candidates, samples, calls, peaks)
    ]


def _sample(candidate: Candidate, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = candidate.call()
    candidate.wait(result)
    return (time.perf_counter() - start) / calls


def rss_of(candidate: Candidate) -> int | None:
    """Bytes by which one call raises this process's peak resident memory; None off Linux."""
    gc.collect()
    try:
        import ctypes

        # Memory that was freed but kept by the allocator would hide what the call needs.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return None
    before = _proc("/proc/self/status", "VmRSS")
    candidate.wait(candidate.call())
    peak = _proc("/proc/self/status", "VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def peak_rss() -> int | None:
    """Bytes this process's resident memory has reached (Linux, else None).

    Not `ru_maxrss`, which a new process inherits from the one that started it.
    """
    return _proc("/proc/self/status", "VmHWM")


def _proc(path: str, field: str) -> int | None:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _matmul_size() -> int:
    return 1024 if jax.default_backend() == "cpu" else 8192


def matmul(dtype: str) -> Candidate:
    """A plain matrix product: the rate no attention on this device can exceed by much."""
    n = _matmul_size()
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(dtype)) for i in (0, 1))
    return jax_candidate("matmul", lambda a, b: a @ b, a, b)


def matmul_flops() -> float:
    """Operations of `matmul`."""
    return 2.0 * _matmul_size() ** 3
