"""What every test needs before it imports anything: JAX on the CPU, and a cache folder of its own."""

import gc
import os
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
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling is most of what they cost


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
