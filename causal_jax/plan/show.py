"""Estimates as text and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from causal_jax.bench.report import table
from causal_jax.plan.estimate import ASSUMPTIONS, Estimate
from causal_jax.plan.search import describe
from causal_jax.plots import COLOURS, panels


def text(one: Estimate) -> str:
    """The whole estimate of one program."""
    rows = [[f"  {name}", _gib(size)] for name, size in one.parts.items()]
    rows += [["temporaries", _gib(one.temporaries)], ["code", _gib(one.code)]]
    fresh = max(one.outputs - one.aliased, 0)
    rows += [["new outputs", _gib(fresh)]] if fresh > 2**20 else []
    rows += [["peak", _gib(one.peak)], ["available", _gib(one.capacity)]]
    verdict = "fits" if one.fits else "does NOT fit"
    share = 100 * one.peak / one.capacity
    lines = [
        f"{one.name} on {one.topology} ({one.chips} chips), mesh {one.mesh}: {verdict}, "
        f"{share:.0f} % of a chip's memory; compiled in {one.compile_seconds:.0f} s",
        table(["memory of one chip", "GiB"], [["arguments", _gib(one.arguments)], *rows]),
    ]
    if one.seconds:
        low, high = one.step
        times = [
            ["compute", f"{one.flops / 1e12:.3f} TFLOP", _ms(one.seconds["compute"])],
            ["memory", f"{one.traffic / 1e9:.2f} GB", _ms(one.seconds["memory"])],
        ]
        times += [
            [f"{kind} x {c['count']:.0f}", f"{c['bytes'] / 1e9:.3f} GB", _ms(c["seconds"])]
            for kind, c in one.collectives.items()
        ]
        mfu = "" if one.name == "decode" else (
            f", MFU {100 * one.mfu[1]:.0f}-{100 * one.mfu[0]:.0f} %"
        )  # fmt: skip
        lines += [
            table(["one step on one chip", "amount", "ms at best"], times),
            f"step: {_ms(low)} ms (all overlapped) to {_ms(high)} ms (nothing){mfu}",
        ]
    lines += [f"note: {line}" for line in one.advice]
    return "\n".join(lines)


def ranking(found: Sequence) -> str:
    """The result of a search as a table."""
    rows = [
        [
            describe(recipe, one),
            "yes" if one.fits else "no",
            _gib(one.peak),
            f"{_ms(one.step[0])}-{_ms(one.step[1])}" if one.fits else "-",
            f"{100 * one.mfu[1]:.0f}-{100 * one.mfu[0]:.0f}" if one.fits else "-",
        ]
        for recipe, one in found
    ]
    return table(["", "fits", "peak GiB", "step ms", "MFU %"], rows)


def assumptions() -> str:
    """What every estimate rests on."""
    return "assumed: " + "; ".join(ASSUMPTIONS)


def picture(found: Sequence[Estimate], path: Path, names: Sequence[str] = ()) -> None:
    """Bars: memory by term against what a chip has, and time by what bounds it."""
    figure, (left, right) = panels(2, title=found[0].topology, width=max(5.5, 1.1 * len(found)))
    names = [n.replace(" x ", "\n").replace(", ", "\n") for n in names] or [
        f"{e.name}\n{e.mesh}".replace(" x ", "\n") for e in found
    ]
    kinds = list(dict.fromkeys(k for e in found for k in e.parts))
    _stack(
        left,
        names,
        [*kinds, "temporaries", "code"],
        [{**e.parts, "temporaries": e.temporaries, "code": e.code} for e in found],
        2**30,
    )
    left.axhline(found[0].capacity / 2**30, color="#888888", linestyle="--", label="available")
    left.set_title("memory of one chip (GiB)", fontsize=9)
    _stack(right, names, ["compute", "memory", "network"], [e.seconds for e in found], 1e-3)
    right.set_title("milliseconds of a step, at best", fontsize=9)
    for ax in (left, right):
        ax.tick_params(labelsize=7)
        ax.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)  # fmt: skip


def _stack(ax, names, kinds, values, unit) -> None:
    floor = [0.0] * len(names)
    for i, kind in enumerate(kinds):
        heights = [v.get(kind, 0.0) / unit for v in values]
        if any(heights):
            ax.bar(range(len(names)), heights, 0.6, floor, label=kind, color=COLOURS[i % 8])
        floor = [a + b for a, b in zip(floor, heights)]
    ax.set_xticks(range(len(names)), names)


def _gib(size: int | float) -> str:
    return f"{size / 2**30:.3f}"


def _ms(seconds: int | float) -> str:
    return f"{1e3 * seconds:.4g}"
