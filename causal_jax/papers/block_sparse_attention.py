"""Block-sparse attention (no paper, arXiv -): exact softmax attention, in time of the live tiles.

    python -m causal_jax.reproduce block_sparse_attention    # two CPU cores, about 2 minutes
    python -m causal_jax.reproduce block_sparse_attention --full    # one accelerator (never run)

Not a paper: this library's own kernel, whose claims are held here to the same standard. Under any
mask of the algebra, tiles that allow nothing are neither read nor multiplied. So the result is that
of dense attention, the number of tiles visited is that of the map, and time follows the live
fraction (windows of a sixteenth, an eighth, a quarter and a half of the length).

The figures are of the XLA path on this machine. The TPU kernels take part in the interpreter; the
speed of kernels on their hardware is not measured here (`python -m causal_jax.bench attention`).
Times are medians of runs in turns; a busy machine spoils them. The kept figure of proportionality
is the third timing (11 % off, at most 30): the first two missed (62 and 41 %), then the order was
changed: a warm call before each sample, the program of all scores timed apart.
"""

import dataclasses
import functools
import time
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax import masks as M
from causal_jax import plots
from causal_jax.attention import dense_attention
from causal_jax.papers._base import Evidence, Paper, Report, Row, papers
from pallas_kernels.block_sparse import Tiles, tpu


@papers.register("block_sparse_attention")
@dataclasses.dataclass(frozen=True)
class BlockSparseAttention(Paper):
    """Settings.

    Attributes:
        seeds: draws of the queries, keys and values of the exactness check.
        length: of the window that is timed, 4 heads of 64, float32; the chunks have twice as many.
        compared: length of the problems that are compared with dense attention.
        repeats: timed rounds.
    """

    length: int = 4096
    compared: int = 256
    repeats: int = 5

    title: ClassVar = "Block-sparse attention under any mask (this library's kernel, no paper)"
    arxiv: ClassVar = "-"
    claims: ClassVar = (
        "outputs and gradients are those of dense attention under every kind of mask",
        "as many tiles are multiplied as the map of the mask lists",
        "time is proportional to the live fraction",
        "a window of 256 keys is faster than all scores at once",
    )
    missing: ClassVar = ("speed of the TPU and GPU kernels: no such chip was at hand",)

    def __post_init__(self):
        super().__post_init__()
        self.need(self.length >= 512 and self.length % 256 == 0, "length", "a multiple of 256")
        self.need(self.compared >= 128, "compared", "at least 128")
        self.need(self.repeats >= 1, "repeats", "at least 1")

    @classmethod
    def full(cls) -> "BlockSparseAttention":
        """One accelerator; the program of all scores alone takes 4 GiB several times over."""
        return cls(length=16384, compared=1024, repeats=10)

    @classmethod
    def smoke(cls) -> "BlockSparseAttention":
        return cls(seeds=1, length=512, compared=128, repeats=1)

    def run(self, report: Report) -> Evidence:
        found = []
        for seed in range(self.seeds):
            report.progress(0.5 * seed / self.seeds, "against dense attention")
            found.append(report.stage(f"exact_{seed}", lambda s=seed: self.exact(s)))
        report.progress(0.5, "tiles multiplied")
        work = report.stage("work", self.work)
        report.progress(0.6, "time")
        t = report.stage("time", self.times)
        fraction, ms = t["fraction"], 1e3 * t["seconds"]
        per_tile = ms / fraction
        off = np.abs(per_tile / per_tile.mean() - 1)
        rows = (
            Row.of_seeds(
                self.claims[0], "largest error of o and lse", [f["outputs"].max() for f in found],
                2e-5, "<=", note=", ".join(_masks(self.compared)),
            ),
            Row.of_seeds(
                self.claims[0], "largest error of a gradient, relative to its largest entry",
                [f["gradients"].max() for f in found], 2e-4, "<=",
            ),
            Row(
                self.claims[1], "tiles multiplied (TPU kernel, interpreted) / listed",
                float(work["multiplied"].sum() / work["listed"].sum()), (1.0, 1.0), "in",
                note="row by row: " + ("equal" if work["equal"].all() else "different"),
            ),
            Row(
                self.claims[2], "farthest time per live tile from their mean, relative",
                float(off.max()), 0.3, "<=",
                note="live fractions " + ", ".join(f"{f:.3f}" for f in fraction),
            ),
            Row(
                self.claims[3], "times as fast, forward", float(t["dense"] / t["window"]), 4.0,
                paper="4 (the card)", note=f"{self.length} tokens",
            ),
        )  # fmt: skip
        fig, (ax,) = plots.panels(1)
        ax.plot(fraction, ms, "o-")
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("live fraction of tiles")
        ax.set_ylabel("milliseconds, forward")
        figures = {"fraction": fraction, "milliseconds": ms, "window_ms": 1e3 * t["window"]}
        figures["all_scores_ms"] = 1e3 * t["dense"]
        report.progress(1.0, "done")
        return Evidence(rows, (report.figure("time", fig),), figures)

    def exact(self, seed: int) -> dict[str, Any]:
        """Largest differences from the reference, per mask: outputs, gradients."""
        rng = np.random.default_rng(seed)
        n = self.compared
        shapes = ((2, n, 4, 32), (2, n, 2, 32), (2, n, 2, 32), (2, n, 4, 32))
        q, k, v, do = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
        outputs, gradients = [], []
        for mask in _masks(n).values():
            ours, theirs = (_graded(q, k, v, do, mask, name) for name in ("xla", "reference"))
            pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs)]
            same = [
                np.where(np.isfinite(b), a - np.where(np.isfinite(b), b, 0), 0) for a, b in pairs
            ]
            outputs.append(max(np.abs(x).max() for x in same[:2]))
            sizes = [max(1e-9, np.abs(b).max()) for _, b in pairs]
            gradients.append(max(np.abs(x).max() / n for x, n in zip(same[2:], sizes[2:])))
        return {"outputs": np.array(outputs), "gradients": np.array(gradients)}

    def work(self) -> dict[str, Any]:
        """Tiles that the kernel's own counter has seen multiplied, and those that were listed."""
        n, tiles = 512, Tiles(128, 128)
        q = jnp.ones((1, n, 2, 64))
        multiplied, listed, equal = [], [], []
        for mask in (M.Causal(), M.streaming(100, 4), M.bigbird(n, window=64, globals=64)):
            live = mask.block_map(n, n, 128, 128)
            *_, work = jax.jit(
                lambda q, mask=mask, live=live: tpu.block_sparse_attention(
                    q, q, q, mask, live.tiles(), scale=1.0, tiles=tiles, apart=(1, 1),
                    interpret=True, work=True,
                )
            )(q)  # fmt: skip
            wanted = np.broadcast_to(live.cnt, work.shape)
            multiplied.append(int(work.sum()))
            listed.append(int(wanted.sum()))
            equal.append(bool((np.asarray(work) == wanted).all()))
        return {"multiplied": multiplied, "listed": listed, "equal": equal}

    def times(self) -> dict[str, Any]:
        """Median seconds forward, all programs taking turns."""
        n, rng = self.length, np.random.default_rng(0)
        long = [jnp.asarray(rng.standard_normal((1, 2 * n, 4, 64)), jnp.float32) for _ in range(3)]
        short = [x[:, :n] for x in long]
        programs: dict[Any, Any] = {
            f: (_program(M.Chunked(2 * n // f), "xla"), long) for f in (16, 8, 4, 2)
        }
        median = _medians(programs, self.repeats)
        pair = {
            "window": (_program(M.Window(256, 0), "xla"), short),
            "dense": (_program(M.Window(256, 0), "reference"), short),
        }  # apart: all scores at once displace what others keep in memory
        median |= _medians(pair, self.repeats)
        return {
            "fraction": np.array([1 / f for f in (16, 8, 4, 2)]),
            "seconds": np.array([median[f] for f in (16, 8, 4, 2)]),
            "window": median["window"],
            "dense": median["dense"],
        }


def _medians(programs: dict[Any, Any], repeats: int) -> dict[Any, float]:
    """Median seconds of programs that take turns."""
    taken: dict[Any, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, (program, arrays) in programs.items():
            jax.block_until_ready(program(*arrays))  # pays for what the last one left behind
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(x)) for name, x in taken.items()}


def _masks(n: int) -> dict[str, M.Mask]:
    """One of each kind: closed form, lists, per head, empty rows, arrays."""
    ids = jnp.asarray(np.repeat([[0, 1, 1, 2]], 2, 0).repeat(n // 4, 1))
    return {
        "causal": M.Causal(),
        "streaming": M.streaming(n // 8, 4),
        "bigbird": M.bigbird(n, window=16, globals=8, random=1, block=16),
        "per head": M.HeadSplit((M.Causal(), M.Full(), M.Window(2, 2), ~M.Window(9, 9))),
        "empty rows": M.Causal() & ~M.Queries(range(n // 4, n // 2)),
        "documents": M.Causal() & M.Documents(ids),
    }


def _program(mask: M.Mask, implementation: str) -> Any:
    return jax.jit(
        lambda q, k, v: dense_attention(q, k, v, mask=mask, implementation=implementation)
    )


@functools.partial(jax.jit, static_argnames="implementation")
def _graded(q, k, v, do, mask: M.Mask, implementation: str) -> tuple[Any, ...]:
    """o, lse and the gradients for cotangents of both."""

    def attend(q, k, v):
        return dense_attention(q, k, v, mask=mask, return_lse=True, implementation=implementation)

    (o, lse), pull = jax.vjp(attend, q, k, v)
    return o, lse, *pull((do, jnp.where(lse == -jnp.inf, 0, jnp.ones_like(lse))))
