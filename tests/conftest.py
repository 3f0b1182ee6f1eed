"""What every test needs before it imports anything: JAX on the CPU, and a cache folder of its own."""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda pytest runs the same tests on a GPU
# The user's downloads must neither help a test nor be touched by one. Removed when the session ends.
_cache = tempfile.TemporaryDirectory(prefix="gemma_lora_sentiment_", ignore_cleanup_errors=True)
os.environ["GEMMA_LORA_SENTIMENT_CACHE"] = _cache.name
# One compilation of a program is enough for all tests and their subprocesses.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["GEMMA_LORA_SENTIMENT_CACHE"] + "/jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _known_to_xla(flags: str) -> bool:
    """XLA ends the process at a flag that it does not know, so one is asked that is no loss."""
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    asked = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(asked, env=environment, capture_output=True).returncode == 0


# Compiling is most of what they cost: the first flag makes it three times as fast, the second twice as fast again.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "xla_cpu_use_fusion_emitters" not in os.environ["XLA_FLAGS"]:
    _flags = f"{os.environ['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = _flags if _known_to_xla(_flags) else os.environ["XLA_FLAGS"]


def pytest_collection_finish():
    """Keras collects garbage for every variable it removes: leave out what importing made, 0.25 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real comments that may lie beside the repository; they are not ours to distribute."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "tarr_train.txt").is_file():
        pytest.skip(f"the real comments are not on this machine: no {folder}")
    return folder
