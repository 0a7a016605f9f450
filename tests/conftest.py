"""Eight virtual devices, strict numerics, shapes checked, deterministic property tests."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do: a second run finds its programs here (child processes
# too).
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# LLVM at its first level compiles twice as fast, and so do fusions that are not emitted by way of
# MLIR; together that is half of a quick test. CAUSAL_JAX_TEST_OPTIMIZED=1: programs as users have
# them.
if not os.environ.get("CAUSAL_JAX_TEST_OPTIMIZED"):
    flags_before = os.environ.get("XLA_FLAGS", "")
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{quick} {flags_before}"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxtyping import install_import_hook  # noqa: E402

# Every annotation in the package is verified while the tests run; users never pay for it.
install_import_hook(["causal_jax", "pallas_kernels"], "beartype.beartype")

from absl import flags  # noqa: E402
from hypothesis import settings  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain reads an absl flag outside absl.app.run

settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("ci")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of a file are given up with it: kept, they take gigabytes in the end."""
    yield
    jax.clear_caches()
