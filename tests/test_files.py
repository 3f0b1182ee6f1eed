"""What would bore a reader of the notebook on files: full disks, interrupted writers, locks that are held or fail."""

import ast
import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_project import MODULES, name_of

from gemma_lora_sentiment import files
from gemma_lora_sentiment.files import (
    RunError,
    cache_dir,
    check_files,
    digest,
    file_digest,
    hold,
    new_folder,
    save_files,
    sync_folder,
    whole_file,
    write_atomically,
)

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX alone")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", "~/there")
    assert cache_dir() == Path.home() / "there"
    monkeypatch.delenv("GEMMA_LORA_SENTIMENT_CACHE")
    assert cache_dir().name == "gemma_lora_sentiment" and cache_dir().is_absolute()


def test_whole_file_keeps_the_old_file_when_interrupted():
    Path("a.txt").write_text("old")
    for failure in (OSError("disk is full"), KeyboardInterrupt()):
        with pytest.raises(type(failure)), whole_file("a.txt") as partial:
            partial.write_text("ne")
            raise failure
    assert Path("a.txt").read_text() == "old" and os.listdir() == ["a.txt"]
    with pytest.raises(FileNotFoundError), whole_file("nowhere/a.txt") as partial:
        partial.write_text("new")


def test_a_write_that_fails_leaves_the_previous_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "a.txt", "before")

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace", "chmod"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                write_atomically(path, "after")
        assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert write_atomically(path, "뒤".encode()).read_text(encoding="utf-8") == "뒤"
    assert path.stat().st_mode & 0o777 == 0o644


def test_files_without_a_digest_are_not_vouched_for(tmp_path):
    save_files(tmp_path, {"a": "1"})
    (tmp_path / "b").write_text("2")
    check_files(tmp_path, ["a"])
    with pytest.raises(RunError, match="no digest of b"):
        check_files(tmp_path, ["b"])


def test_a_folder_that_fails_leaves_no_folder_above_it(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "there" / "a" / "b") as folder:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["there"] and os.listdir(tmp_path / "there") == []
    (tmp_path / "there" / "file").touch()
    for taken in (tmp_path / "there", tmp_path / "there" / "file"):
        with pytest.raises(RunError, match="exists already. Give a folder that does not, or is empty"):
            new_folder(taken).__enter__()


def test_digests_of_parts_are_those_of_the_whole(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    whole = hashlib.sha256("맛".encode() + array.tobytes() + b"\x00").hexdigest()
    assert digest(["맛", array.reshape(-1).view(np.uint8), b"\x00"]) == whole
    assert digest(part for part in ("맛", array.tobytes(), b"", b"\x00")) == whole
    (tmp_path / "a").write_bytes("맛".encode() + array.tobytes() + b"\x00")
    assert file_digest(tmp_path / "a") == digest((tmp_path / "a").read_bytes()) == whole


def test_a_folder_that_cannot_be_synced_is_no_reason_to_stop(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    assert sync_folder(tmp_path) is None and sync_folder(tmp_path / "absent") is None


def test_a_lock_is_held_once_and_let_go(tmp_path):
    with hold(tmp_path / "lock", "it"):
        with pytest.raises(RunError, match="is writing to it"), hold(tmp_path / "lock", "it"):
            pass
        assert (tmp_path / "lock").exists()
    with pytest.raises(KeyError), hold(tmp_path / "lock", "it"):
        raise KeyError
    assert not (tmp_path / "lock").exists()


@posix
def test_a_folder_without_locks_works_with_a_warning(tmp_path, monkeypatch):
    def unsupported(*rest):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="No locks available"), hold(tmp_path / "lock", "it"):
        pass


@posix
def test_a_lock_ends_with_its_process(tmp_path):
    code = "import os, sys; from gemma_lora_sentiment.files import hold\nwith hold(sys.argv[1], 'it'): os._exit(9)"
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], env=environment)
    assert done.returncode == 9 and (tmp_path / "lock").exists()
    with hold(tmp_path / "lock", "it"):
        pass
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem != "files"], ids=name_of)
def test_no_other_room_locks_hashes_or_renames_into_place(path):
    """`files` is the owner; `run` moves what a whole folder of a run holds, file by file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name in ("hashlib", "fcntl", "msvcrt", "filelock")]
        elif isinstance(node, ast.Attribute):
            found += [name for name in [ast.unparse(node)] if name in ("os.replace", "os.rename", "tempfile.mkstemp")]
    assert not found, f"{path.name} uses {', '.join(found)}: ask `files`"
