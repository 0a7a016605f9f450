"""What numbers depend on: device, versions, commit; and how a run is made repeatable to the bit."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

import causal_jax

# read when XLA starts: slower GPU kernels whose sums have one order, chosen without stopwatches
_SETTLED = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


def make_deterministic() -> None:
    """Have the same program give the same bits in every process; before JAX has used a device.

    CPU and TPU programs do so anyway; on a GPU it costs speed.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_SETTLED}".strip()


def environment(*packages: str) -> dict[str, Any]:
    """Device, versions (of other packages too, where named), commit, load of the machine now."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "platform": device.platform,
        "cores": _cores(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "causal_jax": causal_jax.__version__,
        **_versions("jax", "jaxlib", "torch", "tokamax", *packages),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """Short hash of this package's checkout, with `+` when files differ from it."""
    folder = Path(causal_jax.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if git("rev-parse", "--show-toplevel") != str(folder.resolve().parent):
            return None  # installed, maybe into an environment inside another project
        head = git("rev-parse", "--short", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--", str(folder)) else "") or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "cpu"
