"""What a run says while it runs: a line and a JSON record every few steps, curves at the end.

metrics.jsonl is the record of truth, one object per line:
    {"split": "train", "step": 20, "loss": ..., "accuracy": ..., "grad_norm": ..., "lr": ..., ...}
    {"split": "validation", "step": 200, "loss": ..., "bits_per_byte": ...}
Averages are over all targets since the record before. A resumed run first drops records of steps it
is going to make again.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.training.recipe import Report

# Peak dense bfloat16 FLOP/s of one device, by a part of JAX's device_kind; makers' data sheets.
PEAK_FLOPS = {
    "tpu v2": 22.5e12,
    "tpu v3": 61.5e12,
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5p": 459e12,
    "tpu v5": 459e12,
    "tpu v6": 918e12,
    "v100": 125e12,
    "a100": 312e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "h200": 989e12,
    "b200": 2250e12,
    "l40s": 362e12,
    "l4": 121e12,
    "t4": 65e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device, or None; of a CPU what float32 products are measured to reach."""
    if device.platform == "cpu":
        return _measured_flops() / len(jax.local_devices(backend="cpu"))
    kind = device.device_kind.lower()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in kind), None)


def _measured_flops(size: int = 1024, repeats: int = 3) -> float:
    """FLOP/s of the host's best of a few float32 matrix products (about 0.2 s, most to compile)."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


class Reporter:
    """Collects step reports and writes lines and records; silent in all processes but the first.

    Args:
        folder: the run folder.
        settings: cadence and sinks.
        start, total: the first step of this process, and the last of the run.
        tokens: tokens per step.
        flops: floating-point operations per step, forward and backward.
        bytes_per_token: of the text, to turn nats per token into bits per byte; None if unknown.
        devices: their number; peak: FLOP/s of all of them, None if unknown.
    """

    def __init__(
        self,
        folder: Path,
        settings: Report,
        *,
        start: int,
        total: int,
        tokens: int,
        flops: float,
        bytes_per_token: float | None,
        peak: float | None,
    ):
        self.folder, self.settings, self.start, self.total = folder, settings, start, total
        self.tokens, self.flops, self.peak = tokens, flops, peak
        self.bytes_per_token = bytes_per_token
        self.primary = jax.process_index() == 0
        self.last: dict[str, float] = {}
        self._sums: dict[str, list[float]] = {}
        self._skipped = 0
        self._clock = self._first = time.perf_counter()
        self._away = 0.0
        self._since = start
        if self.primary:
            keep_until(folder / "metrics.jsonl", start)
            self._jsonl = (folder / "metrics.jsonl").open("a")
            self._board = _tensorboard(folder, start) if settings.tensorboard else None

    def step(self, step: int, report: dict[str, Any]) -> bool:
        """Take in a step's report, fetched from the device; returns whether it was finite."""
        report = jax.device_get(report)
        finite = bool(report["finite"])
        if step == self.start + 1:  # it waited for compilation: no throughput before it
            self._clock = self._first = time.perf_counter()
            self._away, self._since = 0.0, step
        if finite:
            for name, (total, count) in report["metrics"].items():
                sums = self._sums.setdefault(name, [0.0, 0.0])
                sums[0] += float(total)
                sums[1] += float(count)
        else:
            self._skipped += 1
        self.last = {"grad_norm": float(report["grad_norm"]), "lr": float(report["lr"])}
        if step % self.settings.every == 0 or step == self.total:
            self._emit(step)
        return finite

    def _emit(self, step: int) -> None:
        values: dict[str, float | int] = {
            n: t / c if c else math.nan for n, (t, c) in self._sums.items()
        }
        values |= self.last
        if self._skipped:
            values["skipped"] = self._skipped
        now = time.perf_counter()
        spent = now - self._clock - self._away
        if step > self._since and spent > 0:
            rate = (step - self._since) / spent
            values["tokens_per_s"] = self.tokens * rate
            values["flops_per_s"] = self.flops * rate
            if self.peak:
                values["mfu"] = self.flops * rate / self.peak
        whole = (now - self._first) / max(step - self.start - 1, 1)
        self._write("train", step, values)
        self._say_step(step, values, whole * (self.total - step))
        self._sums, self._skipped = {}, 0
        self._clock, self._away, self._since = now, 0.0, step

    def _say_step(self, step: int, values: dict[str, float | int], eta: float) -> None:
        parts = [f"step {step:>{len(str(self.total))}}/{self.total}"]
        if "loss" in values:
            parts.append(f"loss {values['loss']:.4f}")
            bits = self.bits_per_byte(values["loss"])
            parts += [f"bits/byte {bits:.3f}"] if bits is not None else []
        parts.append(f"lr {values['lr']:.2e}")
        parts.append(f"grad {values['grad_norm']:.2f}")
        if "tokens_per_s" in values:
            parts.append(f"{_si(values['tokens_per_s'])}tok/s")
            mfu = values.get("mfu")
            speed = f"{_si(values['flops_per_s'])}FLOP/s"
            parts.append(f"mfu {100 * mfu:.1f} %" if mfu is not None else f"{speed} (mfu n/a)")
            parts.append(f"eta {_duration(eta)}")
        if "skipped" in values:
            parts.append(f"skipped {values['skipped']}")
        self.say("  ".join(parts))

    def validation(self, step: int, values: dict[str, float | int], *, final: bool = False) -> None:
        """Record a validation."""
        self._write("final" if final else "validation", step, values)
        shown = [f"validation loss {values['loss']:.4f}"]
        for name, label in (("bits_per_byte", "bits/byte"), ("accuracy", "accuracy")):
            if name in values:
                shown.append(f"{label} {values[name]:.4f}")
        self.say(f"step {step:>{len(str(self.total))}}/{self.total}  " + "  ".join(shown))

    def bits_per_byte(self, loss: float) -> float | None:
        """Nats per token to bits per byte of text."""
        return loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    def away(self, seconds: float) -> None:
        """Time spent on something else than training steps; it is not counted against them."""
        self._away += seconds

    def say(self, text: str) -> None:
        """Print, and keep in log.txt."""
        if self.primary:
            say(self.folder, text)

    def _write(self, split: str, step: int, values: dict[str, float | int]) -> None:
        if not self.primary:
            return
        record = {"split": split, "step": step} | {k: _plain(v) for k, v in values.items()}
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Close the files and draw the curves."""
        if not self.primary:
            return
        self._jsonl.close()
        if self._board is not None:
            self._board.close()
        if self.settings.plot:
            plot(self.folder / "metrics.jsonl", self.folder / "loss.png")


class Profiler:
    """The JAX profiler around some steps of a run.

    Args:
        folder: where the trace goes (open it with xprof or TensorBoard).
        steps: (first, last), or () for none.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...]):
        self.folder, self.steps, self.tracing = folder, steps, False

    def before(self, step: int, state: Any) -> None:
        """To be called before a step is dispatched."""
        if self.steps and step == self.steps[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.tracing = True

    def after(self, step: int, state: Any) -> bool:
        """To be called after it was; whether the trace was written now."""
        if not self.tracing or step < self.steps[1]:
            return False
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self.tracing = False
        return True


def say(folder: Path, text: str) -> None:
    """Print, and keep in the run's log.txt; only the first process speaks."""
    if jax.process_index() == 0:
        print(text, flush=True)
        with (folder / "log.txt").open("a") as f:
            f.write(text + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a half-written last line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def keep_until(path: Path, step: int) -> None:
    """Drop records after `step`, and what a killed process left half-written."""
    if not path.exists():
        return
    lines = [
        json.dumps(r) for r in read(path) if r.get("step", 0) <= step and r["split"] != "final"
    ]
    text = "".join(line + "\n" for line in lines)
    if text != path.read_text(errors="replace"):
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)


def plot(metrics: Path, image: Path) -> None:
    """Draw the loss curves of a metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    records = [r for r in read(metrics) if r.get("loss") is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for split, style in (("train", "-"), ("validation", "o-"), ("final", "s")):
        points = [(r["step"], r["loss"]) for r in records if r["split"] == split]
        if points:
            axes.plot(*zip(*points), style, label=split, markersize=3, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=metrics.parent.name)
    axes.grid(alpha=0.3)
    if records:
        axes.legend()
    figure.savefig(image, dpi=120)


def check_tensorboard() -> None:
    """Refuse early where TensorBoard files are wanted and cannot be written."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as e:
        raise InputError(
            "report.tensorboard = True needs tensorboardX: pip install 'causal_jax[logging]'"
        ) from e


def _tensorboard(folder: Path, start: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)


def _plain(value: float | int) -> float | int | None:
    return value if isinstance(value, int) or math.isfinite(value) else None


def _si(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
