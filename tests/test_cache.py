"""What is kept between processes: compiled programs and quantized bases, with disks that refuse and files that lie."""

import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gemma_lora_sentiment import cache

PROGRAM = """
import sys
from gemma_lora_sentiment.cache import use_compile_cache
folder = use_compile_cache()
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **more: events.append(name))
result = float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((16, 16))))
hits, misses = (sum(name.endswith(f"compilation_cache/cache_{kind}") for name in events) for kind in ("hits", "misses"))
print(result, folder is not None, misses, hits, jax.config.jax_compilation_cache_dir)
"""


def run(program: str = PROGRAM, **environment: str) -> list[str]:
    """What a fresh process prints, without this repository's own settings of JAX's cache."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    root = str(Path(__file__).resolve().parents[1])
    clean |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root, **environment}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cache" not in done.stderr.lower(), done.stderr  # no warning either
    return done.stdout.split()


def test_damaged_entries_are_made_again_and_read_by_the_next_process(tmp_path):
    there = {"GEMMA_LORA_SENTIMENT_CACHE": str(tmp_path)}
    cold = run(**there)
    assert cold[:2] == ["4096.0", "True"] and int(cold[2]) > 0 and cold[3] == "0"
    entries = sorted(tmp_path.glob("compiled/*/*.program"))
    assert len(entries) == int(cold[2])
    entries[0].write_bytes(entries[0].read_bytes()[:-7])  # a disk that was full
    for path in entries[1:]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    assert run(**there)[:4] == [*cold[:3], "0"]
    assert run(**there)[:4] == ["4096.0", "True", "0", cold[2]]


def test_the_users_own_choice_stands(tmp_path):
    there = {"GEMMA_LORA_SENTIMENT_CACHE": str(tmp_path / "ours")}
    own = run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"), **there)
    assert own[1] == "False" and own[4] == str(tmp_path / "own")
    assert run(JAX_ENABLE_COMPILATION_CACHE="false", **there)[1:4] == ["False", "0", "0"]
    assert run(GEMMA_LORA_SENTIMENT_COMPILE_CACHE="off", **there)[1:] == ["False", "0", "0", "None"]
    assert not (tmp_path / "ours").exists()
    choose = f"import jax\njax.config.update('jax_compilation_cache_dir', {str(tmp_path / 'late')!r})\n"
    late = PROGRAM.replace("import jax\n", choose + "assert use_compile_cache() is None\n", 1)
    assert int(run(late, **there)[2]) > 0
    assert list((tmp_path / "late").iterdir()) and not list((tmp_path / "ours").rglob("*.program"))


def test_it_can_be_switched_off_and_on(tmp_path):
    switched = PROGRAM.replace("import jax\n", "assert use_compile_cache(False) is None\nimport jax\n", 1)
    assert run(switched, GEMMA_LORA_SENTIMENT_CACHE=str(tmp_path))[2:] == ["0", "0", "None"]
    again = switched.replace("import jax\n", "assert use_compile_cache(True) == folder\nimport jax\n", 1)
    assert int(run(again, GEMMA_LORA_SENTIMENT_CACHE=str(tmp_path))[2]) > 0


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    assert run(GEMMA_LORA_SENTIMENT_CACHE=str(tmp_path / "file"))[:4] == ["4096.0", "False", "0", "0"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_asked_once(code, tmp_path, monkeypatch):
    programs, asked = cache._Programs(tmp_path), []

    def refuse(self, content):
        asked.append(self)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    programs.put("a", b"1")
    programs.put("b", b"2")
    assert len(asked) == 1 and programs.get("a") is None and not list(tmp_path.iterdir())


def test_an_entry_larger_than_the_limit_is_not_kept(tmp_path):
    programs = cache._Programs(tmp_path, limit=100)
    programs.put("large", bytes(101))
    assert not list(tmp_path.iterdir())


def test_the_longest_unused_goes_first(tmp_path):
    programs = cache._Programs(tmp_path, limit=250)
    for age, name in enumerate("abc"):
        programs.put(name, bytes(40))
        os.utime(tmp_path / f"{name}.program", (age + 1, age + 1))
    (tmp_path / ".left.partial").write_bytes(bytes(20))  # of a writer that was killed
    os.utime(tmp_path / ".left.partial", (0, 0))
    assert programs.get("a") is not None  # used now
    programs.put("d", bytes(40))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_kept_arrays_that_lie_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", str(tmp_path))
    arrays = {"a": np.arange(6, dtype=np.int8).reshape(2, 3), "b": np.zeros((0, 2), np.float32)}
    assert cache.keep_arrays("x", arrays, {"mode": "int8"})
    found, description = cache.kept_arrays("x")
    assert description == {"mode": "int8"} and {key: value.tolist() for key, value in found.items()} == {
        key: value.tolist() for key, value in arrays.items()
    }
    path = tmp_path / "quantized" / "x.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", whole.replace(b"int8", b"int9"), b"not a file of this kind"):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="x.safetensors in the cache folder is damaged .*; it is made again"):
            assert cache.kept_arrays("x") is None
        assert not path.exists()


def test_arrays_that_cannot_be_written_are_not_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", str(tmp_path / "file"))
    assert not cache.keep_arrays("x", {"a": np.zeros(2, np.float32)}, None)
    assert cache.kept_arrays("x") is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_kept_quantized_base_has_the_bits_of_a_fresh_one(mode, dtype, tmp_path, monkeypatch):
    from gemma_lora_sentiment import model
    from gemma_lora_sentiment.adapter import new_adapter
    from gemma_lora_sentiment.gemma import hidden_at, logits_of
    from gemma_lora_sentiment.model import jax, load_base, release_bases, tiny_gemma
    from gemma_lora_sentiment.scoring import lend

    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", str(tmp_path / "cache"))
    preset = tiny_gemma(tmp_path / "base")
    release_bases()
    fresh = load_base(preset, dtype, mode)
    release_bases()
    monkeypatch.setattr(model, "quantized_kernel", None)  # it is read, not made
    kept = load_base(preset, dtype, mode)
    assert kept is not fresh and kept.fingerprint == fresh.fingerprint and kept.nbytes == fresh.nbytes
    (ours, of_kept), (theirs, of_fresh) = (jax.tree.flatten(base.arrays) for base in (kept, fresh))
    assert of_kept == of_fresh
    for array, other in zip(ours, theirs, strict=True):
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        assert np.asarray(array).tobytes() == np.asarray(other).tobytes()
    ids = np.arange(3, 19, dtype=np.int32)[None]
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids), "positions": np.array([[15]], np.int32)}

    @partial(jax.jit, static_argnums=2)
    def logits_at(arrays, lora, config):
        return logits_of(arrays, hidden_at(arrays, lora, inputs, config), config)

    found = [logits_at(base.arrays, lend(base, new_adapter(base)), base.config) for base in (fresh, kept)]
    logits = [np.asarray(each) for each in found]
    assert logits[0].tobytes() == logits[1].tobytes()
    release_bases()
