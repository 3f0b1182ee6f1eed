"""What would bore a reader of 11_cli: bad files, options and folders, full disks, Ctrl-C, what each command writes."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from gemma_lora_sentiment import GemmaLoraClassifier, __version__, cli, read_comments, split_comments
from gemma_lora_sentiment.cli import app
from gemma_lora_sentiment.model import release_bases, tiny_gemma
from gemma_lora_sentiment.tables import unpacked

COMMANDS = (
    *("quickstart", "train", "cross-validate", "evaluate", "compare", "decide", "predict", "suggest", "submit"),
    *("info", "pretrain", "export", "benchmark"),
)
METRICS = {"accuracy", "macro_f1", "roc_auc", "log_loss", "n", "classes", "baseline_accuracy", "seconds"}
PHRASES = ("맛있어요", "별로예요", "또 갈게요", "실망했어요", "친절해요", "다시는 안 가요")
ROWS = [(str(10 + i), f"{PHRASES[i % 6]} {i}", str(1 - i % 2)) for i in range(24)]


def tsv(rows, header=("id", "comment", "label")):
    return "".join("\t".join(row) + "\n" for row in [header, *rows])


def tree(folder):
    """Everything under a folder, hidden things too: the bytes of each file, None for a folder."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def call(*arguments):
    """Run a command in this process; what it does not turn into an exit status is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def one_error_line(result, status):
    """The error line of a run that said nothing else."""
    assert result.exit_code == status, (result.exit_code, result.stdout, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), result.stderr
    assert 20 < len(lines[0]) < 600 and "Traceback" not in lines[0], lines[0]
    assert result.stdout == ""
    return lines[0]


def fails(folder, out, *arguments, status=2):
    """Check that a command fails in one line and changes nothing under `folder`, whether `out` exists or not."""
    out = Path(out)
    before = tree(folder)
    line = one_error_line(call(*arguments, "--out", out), status)
    assert tree(folder) == before
    if out.suffix:  # a file
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b"\xff old")
    else:
        (out / "figures").mkdir(parents=True)
        for name in ("metrics.json", "run.txt", ".hidden", "figures/roc.png"):
            (out / name).write_bytes(b"\xff old " + name.encode())
    before = tree(folder)
    one_error_line(call(*arguments, "--quiet", "--out", out), status)
    assert tree(folder) == before
    return line


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random base of two layers."""
    return tiny_gemma(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A finished run, the file it was trained on, and what the command printed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.tsv").write_text(tsv(ROWS), encoding="utf-8")
    (folder / "new.tsv").write_text(tsv(ROWS[:7]), encoding="utf-8")
    result = done("train", folder / "train.tsv", "--out", folder / "run", "--preset", tiny, "--epochs", 2, "--rank", 2)
    (folder / "stdout.txt").write_text(result.stdout)
    (folder / "stderr.txt").write_text(result.stderr)
    return folder


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    """Whatever a command forgets in the current folder lies where the test looks."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.tsv"
    path.write_text(tsv(ROWS), encoding="utf-8")
    return path


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(trained / "run", tmp_path / "a run"))


def train_arguments(tiny, file, epochs=1):
    return ["train", file, "--preset", tiny, "--epochs", epochs, "--rank", 2]


def command_line(command, file, tiny, run):
    """A command over `file`, without its --out."""
    return {
        "train": train_arguments(tiny, file),
        "cross-validate": ["cross-validate", file, "--preset", tiny, "--epochs", 1, "--rank", 2, "--folds", 2],
        "evaluate": ["evaluate", run, file],
        "predict": ["predict", run, file],
        "submit": ["submit", run, file],
    }[command]


def out_of(command, folder):
    return folder / "new" / "out.tsv" if command in ("predict", "submit") else folder / "new" / "out"


# --- malformed files ------------------------------------------------------------------------------------------------

HEADER = "id\tcomment\tlabel\n"
BAD_FILES = {  # what is wrong: (file name, bytes, what the message must name)
    "missing file": ("none.tsv", None, "no such file"),
    "folder": ("folder.tsv", "folder", "is a folder"),
    "empty file": ("empty.tsv", b"", "is empty"),
    "blank file": ("blank.txt", b" \r\n\n \t\n", "is empty"),
    "header only": ("header.tsv", HEADER.encode(), "no rows"),
    "header only, txt": ("header.txt", HEADER.encode(), "no rows"),
    "header only, csv": ("header.csv", b"id,comment,label\r\n", "no rows"),
    "missing comment column": ("columns.tsv", tsv([("1", "x", "0")], ("id", "words", "label")).encode(), "comment"),
    "comment column twice": ("twice.csv", b"comment,comment,label\na,b,0\n", "two columns"),
    "empty comment": ("rows.tsv", (HEADER + "1\t굿\t0\n2\t \t1\n").encode(), "line 3"),
    "duplicate ids": ("rows.tsv", (HEADER + "7\t굿\t0\n8\t음\t1\n7\t별로\t1\n").encode(), "line 4"),
    "binary file": ("binary.tsv", bytes(range(256)) * 16, "binary"),
    "image": ("image.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "image"),
    "excel": ("table.csv", b"PK\x03\x04" + bytes(range(200)), "Excel"),
    "wrong encoding": ("latin.tsv", HEADER.encode() + "1\tcrème brûlée à la carte\t1\n".encode("latin-1"), "UTF-8"),
    "utf-32 without mark": ("utf32.tsv", (HEADER + "1\tgood\t1\n").encode("utf-32-le"), "binary"),
    "extra tabs": ("tabs.tsv", (HEADER + "1\t굿\t0\n2\t하나\t둘\t\t1\n").encode(), "line 3"),
    "missing tab": ("tabs.tsv", (HEADER + "1\t굿\t0\n2\t하나\n").encode(), "line 3"),
    "open quote": ("quote.csv", b'id,comment,label\n1,"open,0\n2,b,1\n', "line 2"),
    "not JSON": ("rows.jsonl", b'{"comment": "a", "label": 1}\n{"comment": \n', "line 2"),
    "JSON list": ("rows.jsonl", b"[1, 2]\n", "row 1"),
    "not Excel": ("rows.xlsx", b"PK\x03\x04 not really", "Excel"),
    "blank comments": ("rows.csv", "comment,label\n굿,0\n,1\n ,0\n음,1\n".encode(), "line 3, 4"),
    "either delimiter": ("rows.txt", "번호,후기\n1,굿\n2,음\n".encode(), "--delimiter"),
    "not Parquet": ("rows.parquet", b"PAR1 not really", "Parquet"),
    "unknown format": ("rows.docx", b"id\tcomment\tlabel\n", "unknown format"),
    "JSON": ("rows.txt", '{"comment": "굿", "label": 1}\n{"comment": "음", "label": 0}\n'.encode(), "Name it .json"),
    "web page": ("rows.csv", b"<!doctype html>\n<html><head><title>Sign in</title>", "a web page"),
    "second header": ("rows.tsv", (HEADER + "1\t굿\t0\n\ufeff" + HEADER + "2\t음\t1\n").encode(), "line 3"),
    "comment inside": ("rows.jsonl", b'{"data": {"text": "a"}, "label": 1}\n' * 2, "--comment-column with 'data.text'"),
    "cut archive": ("rows.tsv.gz", b"\x1f\x8b\x08\x00 cut", "unpacked"),
}
BAD_LABELS = {
    "mixed labels": ("rows.jsonl", b'{"comment": "a", "label": 0}\n{"comment": "b", "label": true}\n', "line 2"),
    "NULL label": ("null.csv", "comment,label\n굿,0\n음,NULL\n".encode(), "--keep-na"),
    "missing label column": ("columns.tsv", tsv([("1", "x")], ("id", "comment")).encode(), "label"),
    "plain lines": ("lines.txt", "굿\n별로\n".encode(), "label"),
    "NaN label": ("nan.tsv", (HEADER + "1\t굿\t0\n2\t음\tNaN\n3\t별로\t1\n").encode(), "line 3"),
    "blank label": ("nan.csv", "id,comment,label\n1,굿,0\n2,음,\n".encode(), "line 3"),
    "null label": ("nan.jsonl", b'{"comment": "a", "label": 1}\n{"comment": "b", "label": null}\n', "line 2"),
    "NaN in JSON": ("nan.jsonl", b'{"comment": "a", "label": 1}\n{"comment": "b", "label": NaN}\n', "line 2"),
}


def written(folder, name, data):
    path = folder / name
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("command", ["train", "cross-validate", "evaluate", "predict", "submit"])
@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_file(fault, command, tmp_path, tiny, trained):
    name, data, named = BAD_FILES[fault]
    file = written(tmp_path, name, data)
    line = fails(tmp_path, out_of(command, tmp_path), *command_line(command, file, tiny, trained / "run"))
    assert named in line and name in line


@pytest.mark.parametrize("command", ["train", "cross-validate", "evaluate"])
@pytest.mark.parametrize("fault", BAD_LABELS)
def test_bad_label(fault, command, tmp_path, tiny, trained):
    name, data, named = BAD_LABELS[fault]
    file = written(tmp_path, name, data)
    line = fails(tmp_path, out_of(command, tmp_path), *command_line(command, file, tiny, trained / "run"))
    assert named in line and name in line


def test_nan_label_in_parquet(tmp_path, tiny):
    pd.DataFrame({"comment": ["a", "b", "c"], "label": [0.0, float("nan"), 1.0]}).to_parquet(tmp_path / "nan.parquet")
    assert "row 2" in fails(tmp_path, tmp_path / "out", *train_arguments(tiny, tmp_path / "nan.parquet"))


@pytest.mark.parametrize("command", ["train", "cross-validate"])
def test_one_class_only(command, tmp_path, tiny):
    (tmp_path / "one.tsv").write_text(tsv([(i, comment, "1") for i, comment, _ in ROWS]), encoding="utf-8")
    line = fails(tmp_path, out_of(command, tmp_path), *command_line(command, tmp_path / "one.tsv", tiny, None))
    assert "'1'" in line and "two classes" in line


def test_one_row_of_a_class(tmp_path, tiny):
    (tmp_path / "rare.tsv").write_text(tsv([*ROWS, ("99", "드문 것", "2")]), encoding="utf-8")
    assert "'2' has 1 row" in fails(tmp_path, tmp_path / "out", *train_arguments(tiny, tmp_path / "rare.tsv"))


def test_unknown_label_in_evaluate(tmp_path, trained):
    (tmp_path / "unknown.tsv").write_text(tsv([*ROWS[:5], ("99", "좋아요", "positive")]), encoding="utf-8")
    line = fails(tmp_path, tmp_path / "out", "evaluate", trained / "run", tmp_path / "unknown.tsv")
    assert "'positive'" in line and "0, 1" in line


def test_evaluate_leaves_another_run_as_it_is(tmp_path, trained):
    shutil.copytree(trained / "run", tmp_path / "other")
    (tmp_path / "crossed").mkdir()
    (tmp_path / "crossed" / "cv.json").write_text("{}")
    (tmp_path / "rows.tsv").write_text(tsv(ROWS), encoding="utf-8")
    before = tree(tmp_path)
    for name in ("other", "crossed"):
        line = one_error_line(call("evaluate", trained / "run", tmp_path / "rows.tsv", "--out", tmp_path / name), 2)
        assert "holds another run" in line and "--out" in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("text", ["좋\0아요", "\x01맛\x02있\x1b[31m어요", "a\x7fb\x85c", "\x0b\x0c끝"], ids=repr)
def test_nul_and_control_characters_are_folded(text, tmp_path, trained):
    (tmp_path / "control.tsv").write_text(tsv([("1", "보통 댓글이에요", "0"), ("2", text, "1")]), encoding="utf-8")
    result = done("predict", trained / "run", tmp_path / "control.tsv", "--out", tmp_path / "out.tsv")
    assert "warning" not in result.stderr
    comment = read_comments(tmp_path / "out.tsv").comment[1]
    assert comment.isprintable() and comment == " ".join(re.split(r"[\s\x00-\x1f\x7f-\x9f]+", text)).strip()


def test_nul_and_control_characters_in_training(tmp_path, tiny):
    rows = [(i, f"{comment}\0\x1b[2J\x07{i}", label) for i, comment, label in ROWS]
    (tmp_path / "control.tsv").write_text(tsv(rows), encoding="utf-8")
    result = done(*train_arguments(tiny, tmp_path / "control.tsv"), "--out", tmp_path / "run")
    assert "warning" not in result.stderr and "\x1b" not in result.stderr + (tmp_path / "run/wrong.tsv").read_text()


# --- options that cannot work ---------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "template without response": (["--template", "댓글: {instruction}"], "{response}"),
    "template without instruction": (["--template", "{response}"], "{instruction}"),
    "template backwards": (["--template", "{response} {instruction}"], "response last"),
    "empty template": (["--template", ""], "{instruction}"),
    "same word twice": (["--label-word", "0=x", "--label-word", "1=x"], "same word"),
    "label word without =": (["--label-word", "positive"], "LABEL=WORD"),
    "empty label word": (["--label-word", "0=", "--label-word", "1=x"], "word"),
    "label without word": (["--label-word", "0=x"], "'1'"),
    "unknown preset": (["--preset", "gemma_3b"], "gemma_3b"),
    "preset without config.json": (["--preset", "."], "config.json"),
    "unknown recipe": (["--recipe", "best"], "tutorial"),
    "rank 0": (["--rank", 0], "lora_rank=0"),
    "epochs -1": (["--epochs", -1], "epochs=-1"),
    "learning rate 0": (["--learning-rate", 0], "learning_rate=0"),
    "learning rate nan": (["--learning-rate", "nan"], "learning_rate=nan"),
    "batch size 0": (["--batch-size", 0], "batch_size=0"),
    "too short": (["--max-length", 4], "max_length=4"),
    "unknown dtype": (["--dtype", "float8"], "float8"),
    "unknown quantization": (["--quantization", "int1"], "int1"),
    "unknown class weight": (["--class-weight", "even"], "even"),
    "seed -1": (["--seed", -1], "seed"),
    "seed of 33 bits": (["--seed", 2**32], "seed"),
}


@pytest.mark.parametrize("command", ["train", "cross-validate"])
@pytest.mark.parametrize("fault", BAD_OPTIONS)
def test_bad_option(fault, command, tmp_path, good, tiny):
    options, named = BAD_OPTIONS[fault]
    arguments = command_line(command, good, tiny, None)
    assert named in fails(tmp_path, out_of(command, tmp_path), *arguments, *options)


def test_patience_of_nothing(tmp_path, good, tiny):
    assert "patience=0" in fails(tmp_path, tmp_path / "out", *train_arguments(tiny, good), "--patience", 0)


def test_more_folds_than_rows_of_a_class(tmp_path, good, tiny):
    rows = [row for row in ROWS if row[2] == "0"] + [row for row in ROWS if row[2] == "1"][:4]
    good.write_text(tsv(rows), encoding="utf-8")
    arguments = ["cross-validate", good, "--preset", tiny, "--folds", 5]
    assert "4 rows" in fails(tmp_path, tmp_path / "out", *arguments)


@pytest.mark.parametrize("arguments", [[], ["--folds", "1"], ["--nonsense"]], ids=str)
def test_usage_mistakes(arguments, tmp_path, good):
    """The option parser tells these itself, with the usage line."""
    before = tree(tmp_path)
    result = call("cross-validate", good, *arguments)
    assert result.exit_code == 2 and "Error: " in result.stderr and "Traceback" not in result.stderr
    assert tree(tmp_path) == before


BAD_FROM = {
    "missing": None,
    "folder": "folder",
    "empty": b"",
    "binary": bytes(range(256)),
    "no JSON": b"settings: 1",
    "list": b"[]",
    "other JSON": b'{"accuracy": 1.0}',
    "settings are a list": b'{"settings": []}',
    "settings are text": b'{"settings": "mini_ko"}',
    "unknown setting": b'{"settings": {"colour": "red"}}',
    "setting of a wrong type": b'{"settings": {"epochs": "many"}}',
    "template of a wrong type": b'{"settings": {"template": 3}}',
    "targets of a wrong type": b'{"settings": {"target_layers": 3}}',
    "seed of a wrong type": b'{"settings": {"seed": "one"}}',
}


@pytest.mark.parametrize("fault", BAD_FROM)
def test_bad_from(fault, tmp_path, good, tiny):
    wrong = written(tmp_path, "run.json", BAD_FROM[fault])
    fails(tmp_path, tmp_path / "out", "train", good, "--preset", tiny, "--from", wrong)


# --- runs that cannot be used ---------------------------------------------------------------------------------------


def rewrite(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8"))
    for dotted, value in changes.items():
        *outer, last = dotted.split("__")
        inner = content
        for name in outer:
            inner = inner[name]
        inner[last] = value
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(json.dumps(content), encoding="utf-8")
    sums = path.parent / "SHA256SUMS"  # as someone would who edits on purpose, or the digest alone were refused
    if sums.is_file():
        sums.write_text(sums.read_text().replace(before, hashlib.sha256(path.read_bytes()).hexdigest()))


def with_classifier(**changes):
    return lambda run: rewrite(run / "classifier.json", **changes)


def with_config(**changes):
    return lambda run: rewrite(run / "adapter_config.json", **changes)


def with_bytes(name, data):
    return lambda run: (run / name).write_bytes(data)


def with_tensors(change):
    def damage(run):
        path = run / "adapter_model.safetensors"
        tensors = safetensors.numpy.load(path.read_bytes())
        path.write_bytes(safetensors.numpy.save(change(tensors)))

    return damage


def as_file(run):
    shutil.rmtree(run)
    run.write_bytes(b"a file")


def cut_adapter(run):
    path = run / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD_RUNS = {
    "missing folder": shutil.rmtree,
    "a file": as_file,
    "no classifier.json": lambda run: (run / "classifier.json").unlink(),
    "empty classifier.json": with_bytes("classifier.json", b""),
    "cut classifier.json": with_bytes("classifier.json", b'{"format": 1, "parameters": {"pres'),
    "binary classifier.json": with_bytes("classifier.json", bytes(range(256))),
    "classifier.json is a list": with_bytes("classifier.json", b"[]"),
    "classifier.json is a number": with_bytes("classifier.json", b"1"),
    "classifier.json lacks everything": with_bytes("classifier.json", b"{}"),
    "unknown parameter": with_classifier(parameters__colour="red"),
    "template of a wrong type": with_classifier(parameters__template=3),
    "recipe of a wrong type": with_classifier(recipe=3),
    "max_length of a wrong type": with_classifier(recipe__max_length="long"),
    "buckets of a wrong type": with_classifier(buckets=3),
    "words missing": with_classifier(words=["0"]),
    "words alike": with_classifier(words=["0", "0"]),
    "classes are no list": with_classifier(classes__values=3),
    "dtype of a wrong type": with_classifier(dtype=None),
    "another base": with_classifier(base_fingerprint="0" * 64),
    "base is gone": with_classifier(parameters__preset="gone/base"),
    "no adapter": lambda run: (run / "adapter_model.safetensors").unlink(),
    "empty adapter": with_bytes("adapter_model.safetensors", b""),
    "cut adapter": cut_adapter,
    "random adapter": with_bytes("adapter_model.safetensors", bytes(range(256)) * 8),
    "adapter not finite": with_tensors(lambda t: {name: array * np.float32("nan") for name, array in t.items()}),
    "adapter lacks a layer": with_tensors(lambda t: dict(list(t.items())[1:])),
    "adapter has a layer too many": with_tensors(lambda t: {**t, "other": np.zeros(1, np.float32)}),
    "adapter of another dtype": with_tensors(lambda t: {name: array.astype(np.float16) for name, array in t.items()}),
    "no adapter_config.json": lambda run: (run / "adapter_config.json").unlink(),
    "cut adapter_config.json": with_bytes("adapter_config.json", b'{"r": 2,'),
    "adapter_config.json is a list": with_bytes("adapter_config.json", b"[]"),
    "another rank": with_config(r=3),
    "rank missing": with_config(r=None),
    "rank of a wrong type": with_config(r="two"),
    "rank 0 saved": with_config(r=0),
    "alpha of a wrong type": with_config(lora_alpha=None),
    "unknown targets": with_config(target_modules=["q_proj", "lm_head"]),
    "targets of a wrong type": with_config(target_modules=3),
}


@pytest.mark.parametrize("fault", BAD_RUNS)
def test_bad_run(fault, tmp_path, good, run):
    BAD_RUNS[fault](run)
    line = fails(tmp_path, tmp_path / "out.tsv", "predict", run, good)
    assert "a run" in line or "base" in line  # it says where the fault is


@pytest.mark.parametrize("command", ["evaluate", "submit"])
@pytest.mark.parametrize("fault", ["missing folder", "cut classifier.json", "cut adapter", "another base"])
def test_bad_run_in_other_commands(fault, command, tmp_path, good, run):
    BAD_RUNS[fault](run)
    fails(tmp_path, out_of(command, tmp_path), *command_line(command, good, None, run))


def test_base_that_changed_under_a_run(tmp_path, good, tiny, run):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    rewrite(run / "classifier.json", parameters__preset=str(base))
    done("predict", run, good, "--out", tmp_path / "out.tsv", "--quiet")
    (tmp_path / "out.tsv").unlink()
    shutil.rmtree(base)
    tiny_gemma(base, seed=1)
    assert "base" in fails(tmp_path, tmp_path / "out.tsv", "predict", run, good)


def test_sample_whose_labels_are_of_another_kind(tmp_path, trained):
    (tmp_path / "sample.tsv").write_text(tsv([("1", "굿", "true"), ("2", "별로", "false")]), encoding="utf-8")
    result = call("submit", trained / "run", tmp_path / "sample.tsv", "--out", tmp_path / "out.tsv", "--quiet")
    if result.exit_code:  # a label that cannot be spelled is refused, one that can is written as the sample writes it
        one_error_line(result, 2)
    else:
        assert set(read_comments(tmp_path / "out.tsv").label) <= {"true", "false"}
    (tmp_path / "sample.tsv").write_text(tsv([("1", "굿", "good"), ("2", "별로", "bad")]), encoding="utf-8")
    (tmp_path / "out.tsv").write_bytes(b"old")
    before = tree(tmp_path)
    result = call("submit", trained / "run", tmp_path / "sample.tsv", "--out", tmp_path / "out.tsv", "--quiet")
    assert "good, bad" in one_error_line(result, 2)
    assert tree(tmp_path) == before


def test_sample_with_ids_of_every_type(tmp_path, trained):
    """Ids from typed files meet the predictions made from the same file."""
    table = pd.DataFrame({"id": [1.0, 2.0, 3.5], "comment": ["가", "나", "다"], "label": [0, 0, 0]})
    table.to_parquet(tmp_path / "sample.parquet")
    done("submit", trained / "run", tmp_path / "sample.parquet", "--out", tmp_path / "out.parquet")
    assert pd.read_parquet(tmp_path / "out.parquet").id.tolist() == [1.0, 2.0, 3.5]
    (tmp_path / "sample.jsonl").write_text('{"id": 1, "comment": "가"}\n{"id": "b", "comment": "나"}\n')
    done("submit", trained / "run", tmp_path / "sample.jsonl", "--out", tmp_path / "out.jsonl")
    assert read_comments(tmp_path / "out.jsonl").id.tolist() == [1, "b"]


# --- the machine's side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "cross-validate", "evaluate", "predict", "submit"])
@pytest.mark.parametrize("parent", ["a file", "/proc", "/proc/nowhere"])
def test_out_where_nothing_can_be_written(parent, command, tmp_path, good, tiny, trained):
    if parent == "a file":
        parent = tmp_path / "file"
        parent.write_bytes(b"a file")
    elif not Path("/proc/self").exists():
        pytest.skip("no /proc on this machine")
    before = tree(tmp_path)
    arguments = command_line(command, good, tiny, trained / "run")
    out = Path(parent) / out_of(command, tmp_path).name
    one_error_line(call(*arguments, "--quiet", "--out", out), 1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["train", "cross-validate", "evaluate"])
def test_out_that_is_a_file(command, tmp_path, good, tiny, trained):
    (tmp_path / "file").write_bytes(b"a file")
    before = tree(tmp_path)
    arguments = command_line(command, good, tiny, trained / "run")
    assert "is a file" in one_error_line(call(*arguments, "--quiet", "--out", tmp_path / "file"), 2)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["predict", "submit"])
def test_out_that_is_a_folder(command, tmp_path, good, tiny, trained):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_bytes(b"old")
    before = tree(tmp_path)
    arguments = command_line(command, good, tiny, trained / "run")
    assert "folder" in one_error_line(call(*arguments, "--quiet", "--out", tmp_path / "folder"), 2)
    assert tree(tmp_path) == before


@pytest.fixture
def locked(trained):
    """A folder where this process may read and not write: as root it becomes another user for the time of the test."""
    folder = Path(tempfile.mkdtemp(prefix="gemma_lora_sentiment_locked_"))
    folder.chmod(0o755)
    shutil.copytree(trained / "run", folder / "run")
    shutil.copy(trained / "train.tsv", folder)
    base = json.loads((folder / "run" / "classifier.json").read_text())["parameters"]["preset"]
    shutil.copytree(base, folder / "base")
    rewrite(folder / "run" / "classifier.json", parameters__preset=str(folder / "base"))
    (folder / "old.tsv").write_bytes(b"old")
    with tempfile.TemporaryDirectory() as other:  # everything that is loaded late is loaded now
        done("predict", folder / "run", folder / "train.tsv", "--out", Path(other) / "out.tsv", "--quiet")
    is_root = os.geteuid() == 0
    folder.chmod(0o755 if is_root else 0o555)
    if not is_root:
        (folder / "run").chmod(0o555)
    if is_root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        for path in (folder, folder / "run"):
            path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "submit"])
def test_out_in_a_folder_of_someone_else(command, locked):
    before = tree(locked)
    arguments = command_line(command, locked / "train.tsv", locked / "base", locked / "run")
    outs = [locked / "out.tsv", locked / "old.tsv"] if command in ("predict", "submit") else [
        locked / "out", locked / "deep" / "out", locked / "run"]  # fmt: skip
    for out in outs:
        line = one_error_line(call(*arguments, "--quiet", "--out", out), 1)
        assert "Permission denied" in line
        assert tree(locked) == before


@pytest.fixture
def full_disk(tmp_path, trained):
    """A file system without a free block, that holds a run and predictions."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        shutil.copytree(trained / "run", folder / "run")
        (folder / "old.tsv").write_bytes(b"old")
        (folder / "old.parquet").write_bytes(b"old")
        with pytest.raises(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_full_disk(full_disk, good, tiny, trained):
    before = tree(full_disk)
    for out in ("run", "new", "deep/new"):
        one_error_line(call(*train_arguments(tiny, good, 1), "--quiet", "--out", full_disk / out), 1)
        assert tree(full_disk) == before
    for command, out in (("predict", "old.tsv"), ("predict", "old.parquet"), ("predict", "new.csv"),
                         ("predict", "new.jsonl"), ("submit", "old.tsv"), ("evaluate", "new")):  # fmt: skip
        arguments = command_line(command, good, tiny, trained / "run")
        one_error_line(call(*arguments, "--quiet", "--out", full_disk / out), 1)
        assert tree(full_disk) == before, out


def test_no_network(tmp_path, tiny, trained, monkeypatch):
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_DATA_URL", "http://127.0.0.1:9/none")
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", str(tmp_path / "cache"))
    line = fails(tmp_path, tmp_path / "out", *train_arguments(tiny, "tarr_train"), status=1)
    assert "127.0.0.1:9" in line and "tarr_train.txt" in line
    fails(tmp_path, tmp_path / "sub.tsv", "submit", trained / "run", "tarr_submit", status=1)


# --- what the commands write ----------------------------------------------------------------------------------------


def adapter_bytes(run):
    return (run / "adapter_model.safetensors").read_bytes()


def test_train_writes_a_whole_run(trained):
    run = trained / "run"
    names = {name for name, data in tree(run).items() if data is not None}
    assert names == {
        "report.html",
        "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "classifier.json", "run.json", "metrics.json",
        "history.csv", "wrong.tsv", "predictions.tsv", "figures/confusion_matrix.png", "figures/precision_recall.png",
        "figures/reliability.png", "figures/roc.png", "figures/scores.png", "figures/training_curves.png",
    }  # fmt: skip
    assert all((run / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in names if name.endswith(".png"))
    assert len(pd.read_csv(run / "history.csv")) == 2
    assert run.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()} == {0o644}
    assert [path.name for path in trained.iterdir() if path.name.startswith(".")] == []


def test_metrics(trained):
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    assert METRICS <= set(metrics)
    assert metrics["n"] == 5 and metrics["classes"] == ["0", "1"] and metrics["seconds"] > 0
    assert all(0 <= metrics[name] <= 1 for name in ("accuracy", "macro_f1", "roc_auc", "baseline_accuracy"))
    assert math.isfinite(metrics["log_loss"])


def test_run_json_tells_what_was_done(trained, tiny):
    content = json.loads((trained / "run" / "run.json").read_text())
    assert content["command"] == "train" and content["refit"] is True and content["epochs"] == 2
    assert content["data"]["rows"] == 24 and len(content["data"]["fingerprint"]) == 64
    assert content["settings"]["preset"] == tiny and content["settings"]["epochs"] == 2
    assert content["settings"]["lora_rank"] == 2 and content["versions"]["gemma_lora_sentiment"] == __version__


def test_results_on_stdout_and_progress_on_stderr(trained):
    out, err = (trained / "stdout.txt").read_text(), (trained / "stderr.txt").read_text()
    assert "TF-IDF baseline" in out and "5 held-out rows" in out and "epoch" not in out
    assert "epoch 1:" in err and "epoch 2:" in err and "held-out rows" not in err


def test_saved_adapter_is_fitted_on_all_rows(trained, tiny):
    rows = read_comments(trained / "train.tsv")
    same = GemmaLoraClassifier(tiny, epochs=2, lora_rank=2, label_words=["0", "1"], batch_size=16)
    same.fit(rows.comment, rows.label)
    saved = GemmaLoraClassifier.load(trained / "run")
    assert same.adapter_.arrays.keys() == saved.adapter_.arrays.keys()
    assert all(np.array_equal(array, saved.adapter_.arrays[name]) for name, array in same.adapter_.arrays.items())


def test_no_refit_keeps_the_adapter_that_was_judged(tmp_path, good, tiny, trained):
    done(*train_arguments(tiny, good, 2), "--no-refit", "--out", tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(trained / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    first = json.loads((trained / "run" / "metrics.json").read_text())
    assert {**metrics, "seconds": 0} == {**first, "seconds": 0}
    _, held_out = split_comments(read_comments(good), 0.2, 0)
    clf = GemmaLoraClassifier.load(tmp_path / "run")
    assert (clf.predict(held_out.comment) == held_out.label).mean() == pytest.approx(metrics["accuracy"])
    of_label = clf.predict_proba(held_out.comment)[np.arange(5), held_out.label.astype(int)]
    assert -np.log(of_label).mean() == pytest.approx(metrics["log_loss"], rel=1e-4)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["refit"] is False


def test_resume_of_a_finished_run_does_nothing(run, good, tiny):
    def state():
        return {path: (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
                for path in [run, *run.rglob("*")]}  # fmt: skip

    before = state()
    result = done(*train_arguments(tiny, good), "--resume", "--out", run)
    assert "finished" in result.stdout and state() == before


def test_resume_with_nothing_to_resume_starts(tmp_path, good, tiny, trained):
    (tmp_path / "run").mkdir()
    result = done(*train_arguments(tiny, good, 2), "--resume", "--out", tmp_path / "run")
    assert "no checkpoint" in result.stderr and "from the beginning" in result.stderr
    assert "replaces" not in result.stderr and "going on" not in result.stderr
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(trained / "run")


def test_run_repeated_from_its_description(tmp_path, good, trained):
    done("train", good, "--from", trained / "run" / "run.json", "--out", tmp_path / "run")
    for name in ("adapter_model.safetensors", "adapter_config.json", "classifier.json", "wrong.tsv"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / "run" / name).read_bytes(), name


def test_a_recipe_that_cannot_be_repeated_is_named(tmp_path, good, run):
    content = json.loads((run / "run.json").read_text())
    recipe, now = dict(content["recipe"]), {"schedule": content["recipe"]["schedule"], "among_labels": 0.0}
    assert now["schedule"] == "linear" and recipe.pop("among_labels") == now["among_labels"]  # an old run lacks the key
    rewrite(run / "run.json", recipe={**recipe, "schedule": "constant", "global_clipnorm": 1.0})
    result = done("train", good, "--from", run / "run.json", "--quiet", "--out", tmp_path / "again")
    (line,) = result.stderr.splitlines()
    assert "the run's recipe had schedule constant, here linear; global_clipnorm 1.0, here 0.0: " in line
    assert "among_labels" not in line
    given = ["--preset", content["settings"]["preset"]]  # which says itself that it is another job
    assert done("train", good, "--from", run / "run.json", *given, "--quiet", "--out", tmp_path / "other").stderr == ""


def test_options_win_over_the_description(tmp_path, good, trained):
    arguments = ["train", good, "--from", trained / "run" / "run.json", "--epochs", 1, "--seed", 3]
    done(*arguments, "--out", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["epochs"], settings["seed"], settings["lora_rank"]) == (1, 3, 2)
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(trained / "run")
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 1


def test_training_over_an_earlier_run_replaces_it(tmp_path, good, tiny, run):
    (run / "notes.txt").write_text("my own")
    old, then = adapter_bytes(run), json.loads((run / "run.json").read_text())["finished"]
    result = done(*train_arguments(tiny, good, 1), "--seed", 5, "--out", run)
    said = f"this replaces the run of tiny on 24 rows of train.tsv, finished {then}, in {run}"
    assert result.stderr.splitlines().count(said) == 1
    assert adapter_bytes(run) != old and (run / "notes.txt").read_text() == "my own"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a run", "good.tsv"]


def test_zero_epochs_saves_the_base_as_it_is(tmp_path, good, tiny):
    done(*train_arguments(tiny, good, 0), "--out", tmp_path / "run")
    assert METRICS <= set(json.loads((tmp_path / "run" / "metrics.json").read_text()))
    done("predict", tmp_path / "run", good, "--out", tmp_path / "out.tsv")


def test_patience_finds_the_epochs(tmp_path, good, tiny):
    arguments = [*train_arguments(tiny, good, 4), "--patience", 1, "--learning-rate", 0.05]
    done(*arguments, "--out", tmp_path / "run")
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    best = int(history.epoch[history.val_loss.idxmin()])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["epochs"] == best


def test_three_classes(tmp_path, tiny):
    rows = [(i, comment, ("bad", "good", "so-so")[n % 3]) for n, (i, comment, _) in enumerate(ROWS)]
    (tmp_path / "three.csv").write_text(
        "id,comment,label\n" + "".join(",".join(row) + "\n" for row in rows), encoding="utf-8"
    )  # fmt: skip
    done(*train_arguments(tiny, tmp_path / "three.csv"), "--class-weight", "balanced", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["classes"] == ["bad", "good", "so-so"]
    done("predict", tmp_path / "run", tmp_path / "three.csv", "--out", tmp_path / "out.csv")
    table = pd.read_csv(tmp_path / "out.csv")
    assert list(table.columns) == ["id", "comment", "label", "p_bad", "p_good", "p_so-so"]
    probabilities = table[["p_bad", "p_good", "p_so-so"]].to_numpy()
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert [("bad", "good", "so-so")[i] for i in probabilities.argmax(axis=1)] == list(table.label)


def test_labels_and_template_stay_as_they_are_written(tmp_path, tiny):
    rows = [(i, comment, "0" + str(1 + int(label))) for i, comment, label in ROWS]
    (tmp_path / "train.tsv").write_text(tsv(rows), encoding="utf-8")
    template = r"{instruction}\n\nResponse:\n{response}"
    arguments = [*train_arguments(tiny, tmp_path / "train.tsv"), "--template", template]
    done(*arguments, "--label-word", "01=bad", "--label-word", "02=good=fine", "--out", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["template"] == "{instruction}\n\nResponse:\n{response}"
    assert settings["label_words"] == {"01": "bad", "02": "good=fine"}
    assert GemmaLoraClassifier.load(tmp_path / "run").words_.words == ("bad", "good=fine")
    done("predict", tmp_path / "run", tmp_path / "train.tsv", "--out", tmp_path / "out.tsv")
    lines = [line.split("\t") for line in (tmp_path / "out.tsv").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == ["id", "comment", "label", "p_01", "p_02"]
    assert [line[:2] for line in lines[1:]] == [list(row[:2]) for row in rows]
    assert {line[2] for line in lines[1:]} <= {"01", "02"}
    for number, sample in enumerate((tsv(rows), tsv([(i, comment, "01") for i, comment, _ in rows]))):
        (tmp_path / "sample.txt").write_text(sample, encoding="utf-8")
        done("submit", tmp_path / "run", tmp_path / "sample.txt", "--out", tmp_path / f"sub{number}.txt")
        written = read_comments(tmp_path / f"sub{number}.txt")
        assert list(written.label) == [line[2] for line in lines[1:]]
    done("train", tmp_path / "train.tsv", "--from", tmp_path / "run" / "run.json", "--out", tmp_path / "again")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "run")


def test_words_for_labels_that_are_numbers(tmp_path, tiny):
    """A typed file gives labels as numbers; on a command line every label is text."""
    lines = [json.dumps({"id": i, "text": comment, "label": int(label)}) for i, comment, label in ROWS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    arguments = [*train_arguments(tiny, tmp_path / "train.jsonl"), "--label-word", "0=bad", "--label-word", "1=good"]
    done(*arguments, "--out", tmp_path / "run")
    assert GemmaLoraClassifier.load(tmp_path / "run").words_.words == ("bad", "good")
    done("train", tmp_path / "train.jsonl", "--from", tmp_path / "run" / "run.json", "--out", tmp_path / "again")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "run")


def test_labels_that_are_numbers_or_truth_values(tmp_path, tiny):
    table = pd.DataFrame(ROWS, columns=["id", "comment", "label"]).assign(label=lambda t: t.label == "1")
    table.to_parquet(tmp_path / "train.parquet")
    done(*train_arguments(tiny, tmp_path / "train.parquet"), "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["classes"] == [False, True]
    done("predict", tmp_path / "run", tmp_path / "train.parquet", "--out", tmp_path / "out.parquet")
    assert list(pd.read_parquet(tmp_path / "out.parquet").columns)[-2:] == ["p_False", "p_True"]
    done("evaluate", tmp_path / "run", tmp_path / "train.parquet", "--out", tmp_path / "evaluation")


def test_cross_validate(tmp_path, tiny):
    rows = [*ROWS, ("98", ROWS[0][1], ROWS[0][2]), ("99", f" {ROWS[1][1]}!! ", ROWS[1][2])]
    (tmp_path / "rows.tsv").write_text(tsv(rows), encoding="utf-8")
    arguments = command_line("cross-validate", tmp_path / "rows.tsv", tiny, None)
    result = done(*arguments, "--out", tmp_path / "cv")
    assert "TF-IDF baseline" in result.stdout and "fold 2/2: baseline" in result.stderr
    assert "fold 1/2: ours" in result.stderr and "/4" not in result.stderr  # two folds of two classifiers are two folds
    metrics = json.loads((tmp_path / "cv" / "cv.json").read_text())
    assert METRICS <= set(metrics) and metrics["n"] == 26 and metrics["folds"] == 2 and metrics["seconds"] > 0
    assert metrics["baselines"]["most_frequent"]["roc_auc"] == 0.5
    oof = read_comments(tmp_path / "cv" / "oof.tsv")
    columns = ["id", "comment", "label", "prediction", "baseline_prediction", "fold", "p_0", "p_1"]
    assert (tmp_path / "cv" / "oof.tsv").read_text(encoding="utf-8").splitlines()[0].split("\t") == columns
    assert list(oof.id) == [row[0] for row in rows] and list(oof.label) == [row[2] for row in rows]
    assert oof.fold[0] == oof.fold[24] and oof.fold[1] == oof.fold[25] and set(oof.fold) == {"0", "1"}
    assert (oof.prediction == oof.label).mean() == pytest.approx(metrics["accuracy"])
    assert (oof.baseline_prediction == oof.label).mean() == pytest.approx(metrics["baseline_accuracy"])
    names = {path.name for path in (tmp_path / "cv").rglob("*.png")}
    assert names == {"confusion_matrix.png", "precision_recall.png", "roc.png", "scores.png", "reliability.png"}


def test_cross_validate_repeated_with_bad_labels(tmp_path, tiny):
    rows = [*ROWS, ("98", ROWS[0][1], ROWS[1][2])]  # a copy with the other label
    (tmp_path / "rows.tsv").write_text(tsv(rows), encoding="utf-8")
    done(*command_line("cross-validate", tmp_path / "rows.tsv", tiny, None), "--repeats", 2, "--out", tmp_path / "cv")
    metrics = json.loads((tmp_path / "cv" / "cv.json").read_text())
    assert metrics["n"] == 25 and metrics["repeats"] == 2
    assert len(read_comments(tmp_path / "cv" / "oof.tsv")) == 25
    oof = pd.read_csv(tmp_path / "cv" / "oof_repeats.tsv", sep="\t")
    assert len(oof) == 50 and list(oof["repeat"]) == [0] * 25 + [1] * 25
    assert (oof.prediction == oof.label).mean() == pytest.approx(metrics["accuracy"])
    assert list(pd.read_csv(tmp_path / "cv" / "conflicts.tsv", sep="\t", dtype=str).id) == [ROWS[0][0], "98"]
    suspects = pd.read_csv(tmp_path / "cv" / "label_errors.tsv", sep="\t", dtype={"id": str, "label": str})
    assert list(suspects.columns) == ["id", "comment", "label", "likely_label", "suspicion"]
    assert suspects.suspicion.is_monotonic_decreasing and (suspects.suspicion > 0).all()
    # The costs of a cross-validation can be stated afterwards.
    text = done("decide", tmp_path / "cv", "--cost", "1=5").stdout
    decision = json.loads((tmp_path / "cv" / "cv.json").read_text())["decision"]
    assert decision["cost"] == [1, 5] and decision["n"] == 25 and "5 on '1'" in text


# --- how sure, against what, and what to do -------------------------------------------------------------------------


def test_metrics_say_how_sure_they_are(trained):
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    assert set(metrics["baselines"]) == {"baseline", "frozen", "most_frequent", "zero_shot"}
    for one in (metrics, *metrics["baselines"].values()):
        assert set(one["intervals"]) == {"accuracy", "macro_f1", "roc_auc", "log_loss"}
        low, high = one["intervals"]["accuracy"]
        assert 0 <= low <= one["accuracy"] <= high <= 1
        assert one["comparison"]["sentence"].endswith(".")
    assert metrics["baseline"] == metrics["baselines"]["baseline"]
    assert metrics["comparison"] == metrics["baseline"]["comparison"]
    assert metrics["decision"]["temperature"] > 0 and metrics["decision"]["classes"] == ["0", "1"]
    first = (trained / "stdout.txt").read_text().splitlines()[0]
    assert ("baseline" in first) and ("more accurate" in first or "equally accurate" in first)
    table = read_comments(trained / "run" / "predictions.tsv")
    assert list(table.columns) == ["id", "comment", "label", "prediction", "baseline_prediction", "p_0", "p_1"]
    assert (table.prediction == table.label).mean() == pytest.approx(metrics["accuracy"])


def test_the_baseline_is_named_first_where_it_wins():
    from gemma_lora_sentiment.evaluation import compute_metrics
    from gemma_lora_sentiment.judge import add_analysis, comparison_text

    rows = pd.DataFrame(ROWS, columns=["id", "comment", "label"])
    right = np.array([[0.8, 0.2] if label == "0" else [0.2, 0.8] for label in rows.label])
    ours = right.copy()
    ours[:9] = ours[:9, ::-1]
    metrics = compute_metrics(rows.label, ours, ["0", "1"])
    add_analysis(metrics, rows, ["0", "1"], ours, {"baseline": right})
    lines = comparison_text(metrics).splitlines()
    assert lines[0].startswith("The TF-IDF baseline is more accurate than gemma + LoRA: 1.000 against 0.625")
    assert lines[1] == "The TF-IDF baseline is better than gemma + LoRA on 9 comments, worse on 0: p = 0.0039."


def test_the_terminal_says_of_the_base_what_the_report_says():
    """Where the base itself wins or ties, both have the one sentence of `evaluation.simpler_verdicts`."""
    from gemma_lora_sentiment.evaluation import compute_metrics, simpler_verdicts
    from gemma_lora_sentiment.judge import add_analysis, comparison_text
    from gemma_lora_sentiment.report import report_html

    rows = pd.DataFrame(ROWS, columns=["id", "comment", "label"])
    ours = np.array([[0.8, 0.2] if label == "0" else [0.2, 0.8] for label in rows.label])
    metrics = compute_metrics(rows.label, ours, ["0", "1"])
    theirs = {"baseline": ours[::-1], "frozen": ours[::-1], "zero_shot": ours}
    add_analysis(metrics, rows, ["0", "1"], ours, theirs)
    (sentence,) = simpler_verdicts(metrics)
    assert sentence.startswith("Fine-tuning gained nothing on these comments: the base itself has an accuracy of 1.000")
    assert sentence in comparison_text(metrics).splitlines() and sentence in report_html(metrics)


def test_compare(tmp_path, good, tiny, trained, run):
    other = tmp_path / "other"
    done(*train_arguments(tiny, good, 1), "--out", other)
    result = done("compare", trained / "run", other, "--out", tmp_path / "compared")
    assert "5 rows in both" in result.stdout and result.stderr == ""
    content = json.loads((tmp_path / "compared" / "compare.json").read_text())
    for folder in (trained / "run", other):
        expected = json.loads((folder / "metrics.json").read_text())
        assert content[str(folder)]["accuracy"] == expected["accuracy"]
    differences = pd.read_csv(tmp_path / "compared" / "differences.tsv", sep="\t", dtype=str)
    assert (differences["first"] != differences["second"]).all()
    assert "24 rows in both" in done("compare", run, other, "--rows", good).stdout


def test_compare_refuses(tmp_path, trained, run):
    one_error_line(call("compare", trained / "run", trained / "run"), 2)
    one_error_line(call("compare", trained / "run", tmp_path), 2)
    content = re.sub(r"^(\d+\t)", r"\1다른 ", (run / "predictions.tsv").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (run / "predictions.tsv").write_text(content, encoding="utf-8")
    assert "share no labelled row" in call("compare", trained / "run", run).stderr


def test_decide_and_predict_calibrated(tmp_path, run):
    before = json.loads((run / "metrics.json").read_text())
    done("decide", run, "--cost", "0=3", "--accuracy", 0.6)
    after = json.loads((run / "metrics.json").read_text())
    assert after["decision"]["cost"] == [3, 1] and after["decision"]["wanted_accuracy"] == 0.6
    assert after["decision"]["temperature"] == pytest.approx(before["decision"]["temperature"], rel=1e-3)
    assert {**after, "decision": 0} == {**before, "decision": 0}
    (tmp_path / "new.tsv").write_text(tsv(ROWS[:7]), encoding="utf-8")
    done("predict", run, tmp_path / "new.tsv", "--out", tmp_path / "out.tsv", "--calibrated")
    table = pd.read_csv(tmp_path / "out.tsv", sep="\t", dtype={"label": str})
    assert list(table.columns) == ["id", "comment", "label", "abstains", "p_0", "p_1"]
    assert ((table.label == "1") == (table.p_1 >= after["decision"]["threshold"])).all()
    done("predict", run, tmp_path / "new.tsv", "--out", tmp_path / "plain.tsv")
    plain = pd.read_csv(tmp_path / "plain.tsv", sep="\t")
    odds = [np.log(each.p_1 / each.p_0) for each in (plain, table)]
    assert np.allclose(odds[0] / after["decision"]["temperature"], odds[1], atol=1e-4)


@pytest.mark.parametrize("cost", ["1", "good=5", "1=dear", "1=-2"])
def test_decide_refuses(cost, run):
    before = tree(run)
    one_error_line(call("decide", run, "--cost", cost), 2)
    assert tree(run) == before


def test_decide_refuses_numbers_of_another_run(run):
    three = json.loads((run / "run.json").read_text())
    three["data"]["summary"]["rows of label 2"] = 4
    rewrite(run / "run.json", data=three["data"])  # as after `evaluate` of an earlier version with this folder as --out
    before = tree(run)
    line = one_error_line(call("decide", run), 2)
    assert "labels 0, 1," in line and "run.json" in line and "0, 1, 2" in line and tree(run) == before
    del three["data"]["summary"]["rows of label 2"]
    rewrite(run / "run.json", data=three["data"])
    text = (run / "predictions.tsv").read_text(encoding="utf-8")
    (run / "predictions.tsv").write_text(text.replace("\tp_1\n", "\tp_2\n"), encoding="utf-8")
    before = tree(run)
    line = one_error_line(call("decide", run), 2)
    assert "predictions" in line and "for 0, 2" in line and tree(run) == before
    (run / "predictions.tsv").write_text(text, encoding="utf-8")
    done("decide", run)


DAMAGE = {  # file of a run: what it holds then, from what it held
    "metrics.json": (lambda data: data[: len(data) // 2], lambda data: b"{}", lambda data: b"[1]", lambda data: b"null",
                     lambda data: b"\xff\xfe", lambda data: json.dumps({**json.loads(data), "decision": 5}).encode(),
                     lambda data: json.dumps({**json.loads(data), "decision": {"classes": ["0", "1"]}}).encode()),
    "run.json": (lambda data: data[: len(data) // 2], lambda data: b"[1]", lambda data: b'{"data": 5}'),
    "predictions.tsv": (lambda data: data[: len(data) // 2], lambda data: data[: data.rindex(b"\n", 0, -1) + 1],
                        lambda data: data.replace(b"\tprediction\t", b"\tguess\t"), lambda data: bytes(range(256)),
                        lambda data: data.replace(b"comment", b"words"), lambda data: b"",
                        lambda data: data.replace(b"0.", b"o.")),
    "wrong.tsv": (lambda data: data.rstrip(b"\n").rpartition(b"\t")[0], lambda data: bytes(range(256))),
    "history.csv": (lambda data: bytes(range(128, 256)), lambda data: data.replace(b"0.", b"o.")),
}  # fmt: skip


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in DAMAGE.items() for case in range(len(cases))])
def test_a_damaged_file_is_named_and_the_folder_left_as_it_was(name, case, run):
    if name == "wrong.tsv":  # with a row of it, whatever this random base got wrong
        (run / name).write_text("id\tcomment\tlabel\tprediction\tp_0\tp_1\n7\t굿\t1\t0\t0.6\t0.4\n", encoding="utf-8")
    (run / name).write_bytes(DAMAGE[name][case]((run / name).read_bytes()))
    before = tree(run)
    line = one_error_line(call("decide", run, "--cost", "0=5"), 2)
    assert f"{run / name} is damaged (" in line and "Restore it" in line
    assert tree(run) == before


def test_predict_names_a_damaged_decision(tmp_path, good, run):
    metrics = json.loads((run / "metrics.json").read_text())
    for decision in (5, {"classes": ["0", "1"]}):
        (run / "metrics.json").write_text(json.dumps({**metrics, "decision": decision}))
        line = fails(tmp_path, tmp_path / "new" / "out.tsv", "predict", run, good, "--calibrated")
        assert f"{run / 'metrics.json'} is damaged" in line and "decision" in line


def test_a_report_that_cannot_be_written_leaves_the_decision_as_it_was(run, monkeypatch):
    from gemma_lora_sentiment import judge

    before = tree(run)
    with monkeypatch.context() as patch:
        patch.setattr(judge, "report_html", lambda *_, **__: "\ud800")  # what no file can hold
        one_error_line(call("decide", run, "--cost", "0=5"), 2)
    assert tree(run) == before
    done("decide", run, "--cost", "0=5")
    assert tree(run)["metrics.json"] != before["metrics.json"] and tree(run)["report.html"] != before["report.html"]


def test_suggest(tmp_path, trained):
    (tmp_path / "new.txt").write_text("\n".join(f"{PHRASES[i % 6]} {i}" for i in range(30)), encoding="utf-8")
    result = done("suggest", trained / "run", tmp_path / "new.txt", "--out", tmp_path / "next.tsv", "--number", 4)
    table = pd.read_csv(tmp_path / "next.tsv", sep="\t")
    assert list(table.columns) == ["id", "comment", "margin", "p_0", "p_1"] and "4 of 30" in result.stdout
    assert len(table) == 4 and table.margin.is_monotonic_increasing
    one_error_line(call("suggest", trained / "run", tmp_path / "new.txt", "--out", tmp_path / "next.xls"), 2)


def test_evaluate_explains_mistakes(tmp_path, trained):
    turned = [(i, comment, "1" if label == "0" else "0") for i, comment, label in ROWS[:8]]
    arguments = ("evaluate", trained / "run", tmp_path / "turned.tsv", "--out", tmp_path / "out", "--explain", 2)
    rows = [*turned, *((f"x{row[0]}", *row[1:]) for row in ROWS[:8])]
    (tmp_path / "turned.tsv").write_text(tsv(rows), encoding="utf-8")
    done(*arguments)
    wrong = pd.read_csv(tmp_path / "out" / "wrong.tsv", sep="\t", dtype=str)
    table = pd.read_csv(tmp_path / "out" / "influence.tsv", sep="\t", dtype=str)
    assert len(wrong) == 8 and list(table.id) == list(wrong.id[:2])
    assert list(table.columns) == ["id", "comment", "label", "prediction", "spoke_for", "spoke_against"]


def test_evaluate_with_and_without_the_rows_of_training(tmp_path, good, tiny, run):
    rewrite(run / "run.json", data__source=str(good))
    new = tmp_path / "new.tsv"
    new.write_text(tsv([(i, comment + " 정말", label) for i, comment, label in ROWS[:9]]), encoding="utf-8")
    result = done("evaluate", run, new, "--out", tmp_path / "with")
    metrics = json.loads((tmp_path / "with" / "metrics.json").read_text())
    assert METRICS <= set(metrics) and metrics["n"] == 9 and 0 <= metrics["baseline_accuracy"] <= 1
    assert "TF-IDF baseline" in result.stdout and "no baseline" not in result.stderr
    assert (tmp_path / "with" / "wrong.tsv").is_file() and (tmp_path / "with" / "figures" / "roc.png").is_file()

    good.write_text(tsv(ROWS[:-1]), encoding="utf-8")
    assert "has changed" in done("evaluate", run, new, "--out", tmp_path / "changed").stderr
    good.unlink()
    result = done("evaluate", run, new, "--out", tmp_path / "without")
    without = json.loads((tmp_path / "without" / "metrics.json").read_text())
    assert without["baseline_accuracy"] is None and METRICS <= set(without)
    assert without["accuracy"] == metrics["accuracy"] and without["log_loss"] == metrics["log_loss"]
    assert "no baseline" in result.stderr and "accuracy" in result.stdout


def test_the_rows_of_a_run_are_found_from_another_folder(tmp_path, tiny, monkeypatch):
    (tmp_path / "train.tsv").write_text(tsv(ROWS), encoding="utf-8")
    new = tsv([("y", "처음 보는 말이에요", "1"), ("z", "또 다른 말", "0")])
    (tmp_path / "new.tsv").write_text(new, encoding="utf-8")
    done(*train_arguments(tiny, "train.tsv"), "--out", "run")
    data = json.loads(Path("run", "run.json").read_text(encoding="utf-8"))["data"]
    assert (data["source"], data["path"]) == ("train.tsv", str(tmp_path / "train.tsv"))
    assert str(tmp_path) not in Path("run", "report.html").read_text(encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "train.tsv").write_text(tsv(ROWS[:9]), encoding="utf-8")  # another file of the same name
    result = done("evaluate", "../run", "../new.tsv", "--out", "judged")
    assert "no baseline" not in result.stderr and "TF-IDF" in result.stdout
    done("train", "--from", "../run/run.json", "--out", "again")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "elsewhere" / "again")
    older = {name: value for name, value in data.items() if name != "path"}
    rewrite(tmp_path / "run" / "run.json", data={**older, "source": str(tmp_path / "train.tsv")})
    assert "no baseline" not in done("evaluate", "../run", "../new.tsv", "--out", "judged").stderr


def test_the_report_of_a_run_that_is_evaluated_in_its_folder_says_so(tmp_path, run):
    new = tsv([("y", "처음 보는 말이에요", "1"), ("z", "또 다른 말", "0")])
    (tmp_path / "new.tsv").write_text(new, encoding="utf-8")
    done("evaluate", run, tmp_path / "new.tsv", "--out", run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "A saved run, judged on the 2 comments of a file." in page and "were held out" not in page
    done("decide", run)
    assert "A saved run, judged on the 2 comments" in (run / "report.html").read_text(encoding="utf-8")


def test_evaluate_says_which_rows_the_run_was_trained_on(tmp_path, good, tiny, run):
    rewrite(run / "run.json", data__source=str(good))
    rows = [*ROWS[:6], ("x", ROWS[6][1].replace(" ", "  ") + "!!", ROWS[6][2]), ("y", "처음 보는 말이에요", "1")]
    (tmp_path / "mixed.tsv").write_text(tsv(rows), encoding="utf-8")
    result = done("evaluate", run, tmp_path / "mixed.tsv", "--out", tmp_path / "mixed")
    said = "7 of these 8 comments are training rows of the run"
    assert said in result.stderr and said in (tmp_path / "mixed" / "report.html").read_text(encoding="utf-8")
    caution = json.loads((tmp_path / "mixed" / "metrics.json").read_text())["caution"]
    assert caution.startswith(said) and "nothing about new comments" in caution
    (tmp_path / "new.tsv").write_text(tsv([rows[-1], ("z", "또 다른 말", "0")]), encoding="utf-8")
    result = done("evaluate", run, tmp_path / "new.tsv", "--out", tmp_path / "new")
    assert "training rows" not in result.stderr
    assert "caution" not in json.loads((tmp_path / "new" / "metrics.json").read_text())
    good.rename(tmp_path / "moved.tsv")  # by the fingerprint
    result = done("evaluate", run, tmp_path / "moved.tsv", "--out", tmp_path / "moved")
    assert "24 of these 24 comments are training rows" in result.stderr and "no baseline" in result.stderr
    done(*train_arguments(tiny, tmp_path / "moved.tsv"), "--no-refit", "--out", tmp_path / "part")
    result = done("evaluate", tmp_path / "part", tmp_path / "moved.tsv", "--out", tmp_path / "of part")
    assert "19 of these 24 comments are training rows" in result.stderr  # five were held out


def test_evaluate_on_rows_of_one_class(tmp_path, trained):
    (tmp_path / "one.tsv").write_text(tsv([row for row in ROWS if row[2] == "1"]), encoding="utf-8")
    done("evaluate", trained / "run", tmp_path / "one.tsv", "--out", tmp_path / "out", "--quiet")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["roc_auc"] is None


@pytest.mark.parametrize("suffix", [".tsv", ".txt", ".tab", ".csv", ".jsonl", ".ndjson", ".json", ".parquet", ".pq"])
def test_predictions_can_be_read_back(suffix, tmp_path, trained):
    """Whatever `read_comments` reads by its suffix, `predict` writes as that."""
    comments = ['"처음"이라 걱정', 'a, "b", c', "it's; fine", '"', "보통이에요"]
    table = pd.DataFrame({"id": list("abcde"), "comment": comments})
    table.to_json(tmp_path / "in.jsonl", orient="records", lines=True, force_ascii=False)
    out = tmp_path / f"out{suffix}"
    result = done("predict", trained / "run", tmp_path / "in.jsonl", "--out", out)
    assert "5 rows written" in result.stdout and "scoring" in result.stderr
    found = read_comments(out)
    assert list(found.columns) == ["id", "comment", "label", "p_0", "p_1"]
    assert list(found.comment) == comments and list(found.id) == list("abcde")
    expected = GemmaLoraClassifier.load(trained / "run").predict_proba(comments)
    assert np.allclose(found[["p_0", "p_1"]].astype(float), expected, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", out.name}


def test_predictions_of_an_unknown_format_are_refused(tmp_path, trained):
    """A table of tabs named .xlsx would open nowhere."""
    before = tree(tmp_path)
    result = call("predict", trained / "run", trained / "new.tsv", "--out", tmp_path / "out.xlsx", "--quiet")
    one_error_line(result, 2)
    assert tree(tmp_path) == before


def test_predict_reads_every_format(tmp_path, trained):
    comments = [comment for _, comment, _ in ROWS[:7]]
    (tmp_path / "lines.txt").write_text("\n".join(comments), encoding="utf-8")
    (tmp_path / "bom.txt").write_bytes("\ufeff".encode() + "\r\n".join(comments).encode())
    (tmp_path / "in.csv").write_text("review\n" + "\n".join(comments), encoding="cp949")
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": comment}) for comment in comments))
    pd.DataFrame({"comment": comments}).to_parquet(tmp_path / "in.parquet")
    (tmp_path / "in.tsv").write_text(tsv(ROWS[:7]), encoding="utf-8")
    tables = []
    for name in ("in.tsv", "lines.txt", "bom.txt", "in.csv", "in.jsonl", "in.parquet"):
        done("predict", trained / "run", tmp_path / name, "--out", tmp_path / "out.tsv", "--quiet")
        tables.append(read_comments(tmp_path / "out.tsv"))
        assert list(tables[-1].comment) == comments, name
        assert tables[-1][["p_0", "p_1"]].equals(tables[0][["p_0", "p_1"]]), name
    assert list(tables[0].id) == [row[0] for row in ROWS[:7]] and list(tables[1].id) == list("1234567")


def test_predict_reads_a_folder(tmp_path, trained):
    comments = [comment for _, comment, _ in ROWS[:7]]
    (tmp_path / "in").mkdir()
    for name, part in (("b", slice(4, 7)), ("a", slice(0, 4))):
        table = pd.DataFrame({"id": range(7), "comment": comments}).iloc[part]
        table.to_parquet(tmp_path / "in" / f"{name}.parquet", index=False)
    done("predict", trained / "run", tmp_path / "in", "--out", tmp_path / "out.tsv", "--quiet")
    table = read_comments(tmp_path / "out.tsv")
    assert list(table.comment) == comments and list(table.id) == list("0123456")
    before = tree(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "in" / "c.csv").write_text("id,comment\n8,x\n")
    for folder, said in (("empty", "empty: is a folder without files"), ("in", "c.csv: is csv, and a.parquet is par")):
        result = call("predict", trained / "run", tmp_path / folder, "--out", tmp_path / "new.tsv", "--quiet")
        assert said in one_error_line(result, 2)
    (tmp_path / "in" / "c.csv").unlink()
    (tmp_path / "empty").rmdir()
    result = call("predict", trained / "run", tmp_path / "in", "--out", tmp_path / "in" / "out.tsv", "--quiet")
    assert "lies in the folder that is read" in one_error_line(result, 2)
    assert tree(tmp_path) == before


def test_ids_of_mixed_types(tmp_path, trained):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "comment": "가"}\n{"id": "b", "comment": "나"}\n')
    for suffix in (".tsv", ".csv", ".jsonl"):
        done("predict", trained / "run", tmp_path / "in.jsonl", "--out", tmp_path / f"out{suffix}")
        assert [str(name) for name in read_comments(tmp_path / f"out{suffix}").id] == ["1", "b"]
    before = tree(tmp_path)  # a Parquet column has one type
    result = call("predict", trained / "run", tmp_path / "in.jsonl", "--out", tmp_path / "out.parquet", "--quiet")
    one_error_line(result, 2)
    assert tree(tmp_path) == before


def test_submit(tmp_path, good, trained):
    result = done("submit", trained / "run", good)
    (path,) = tmp_path.glob("tarr_my_submit_*")
    assert re.fullmatch(r"tarr_my_submit_\d{8}_\d{6}\.txt", path.name) and path.name in result.stdout
    done("submit", trained / "run", good, "--out", tmp_path / "sub.txt")
    assert (tmp_path / "sub.txt").read_bytes() == path.read_bytes()
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == ["id", "comment", "label"] and [tuple(line[:2]) for line in lines[1:]] == [r[:2] for r in ROWS]
    done("predict", trained / "run", good, "--out", tmp_path / "out.tsv")
    assert [line[2] for line in lines[1:]] == list(read_comments(tmp_path / "out.tsv").label)


LONG = "맛있어요 " * 20_000  # 100,000 characters


def truncation_warnings(result):
    return [line for line in result.stderr.splitlines() if line.startswith("warning: ") and "longer than" in line]


@pytest.mark.parametrize("command", ["predict", "submit", "evaluate"])
def test_very_long_comment(command, tmp_path, trained):
    assert len(LONG) == 100_000
    (tmp_path / "long.tsv").write_text(tsv([*ROWS[:3], ("99", LONG, "1")]), encoding="utf-8")
    out = out_of(command, tmp_path)
    out.parent.mkdir()
    result = done(*command_line(command, tmp_path / "long.tsv", None, trained / "run"), "--out", out)
    (line,) = truncation_warnings(result)
    assert "1 of 4 comments" in line and "max_length=256" in line
    if command == "predict":
        assert read_comments(out).comment[3] == LONG.strip()


def test_very_long_comment_in_training(tmp_path, tiny):
    (tmp_path / "long.tsv").write_text(tsv([*ROWS, ("99", LONG, "1")]), encoding="utf-8")
    result = done(*train_arguments(tiny, tmp_path / "long.tsv"), "--batch-size", 4, "--out", tmp_path / "run")
    assert truncation_warnings(result)


@pytest.mark.parametrize("command", ["train", "cross-validate", "evaluate", "predict", "submit", "info"])
def test_quiet(command, tmp_path, good, tiny, trained):
    if command == "info":
        arguments = ["info", "--preset", tiny]
    else:
        out = tmp_path / ("out.tsv" if command in ("predict", "submit") else "out")
        arguments = [*command_line(command, good, tiny, trained / "run"), "--out", out]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = done(*arguments, "--quiet")
    assert result.stderr == "" and result.stdout


def test_paths_with_spaces_and_korean(tmp_path, tiny):
    folder = tmp_path / "내 폴더 [1]"
    folder.mkdir()
    (folder / "댓글 파일.tsv").write_text(tsv(ROWS), encoding="utf-8")
    done(*train_arguments(tiny, folder / "댓글 파일.tsv"), "--out", folder / "첫 런")
    done("predict", folder / "첫 런", folder / "댓글 파일.tsv", "--out", folder / "답.tsv", "--quiet")
    assert len(read_comments(folder / "답.tsv")) == 24


# --- version, help, info --------------------------------------------------------------------------------------------


def test_version():
    assert done("--version").stdout == f"{__version__}\n"


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "gemma_lora_sentiment"]
    assert subprocess.run([*command, "--version"], capture_output=True, text=True).stdout == f"{__version__}\n"
    command += ["train", "lost.tsv", "--out", "run"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("error: lost.tsv: no such file.")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    result = done(command, "--help")
    assert result.stdout.startswith("Usage:") and "--quiet" in result.stdout and result.stderr == ""
    assert done(command, "-h").stdout == result.stdout


def test_help_lists_every_command():
    text = done("--help").stdout
    assert all(re.search(rf"^\s+{command}\s+\S", text, re.MULTILINE) for command in COMMANDS)


def test_info(tiny):
    text = done("info", "--preset", tiny).stdout
    assert re.search(r"^device: \d+ x .+", text, re.MULTILINE)
    assert re.search(r"^dtype: \w+ \(.{10,}\)$", text, re.MULTILINE)  # the reason in brackets
    assert re.search(r"^memory .*total \d+\.\d+ GB$", text, re.MULTILINE)
    assert all(name in text for name in ("keras ", "jax ", "python ", f"gemma_lora_sentiment {__version__}"))


def test_info_on_an_unknown_base():
    result = call("info", "--preset", "gemma_3b")
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


# --- in a process of its own ----------------------------------------------------------------------------------------

PROGRAM = [sys.executable, "-c", "from gemma_lora_sentiment.cli import app; app()"]


@pytest.fixture(autouse=True)
def package_on_the_path(monkeypatch):
    """A process started in another folder finds the package, installed or not."""
    root = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom gemma_lora_sentiment.cli import app\ntry:\n    app(['train', '--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "heavy = ('keras', 'jax', 'pandas', 'numpy', 'sklearn', 'matplotlib', 'tensorflow', 'keras_nlp')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]" and "Usage:" in result.stdout


def test_quiet_process_says_nothing_on_stderr(tmp_path, trained):
    """Nor do the libraries that it loads."""
    arguments = ["predict", trained / "run", trained / "new.tsv", "--out", tmp_path / "out.tsv", "--quiet"]
    result = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    done(*arguments[:-2], tmp_path / "here.tsv")
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "here.tsv").read_bytes()


def test_error_of_a_process_is_one_line(tmp_path, trained):
    (tmp_path / "bad.tsv").write_text(HEADER + "1\t굿\t0\n1\t별로\t1\n", encoding="utf-8")
    before = tree(tmp_path)
    arguments = ["predict", str(trained / "run"), "bad.tsv", "--out", "out.tsv"]
    result = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "" and tree(tmp_path) == before
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: bad.tsv line 3")


def test_a_signal_in_a_callback_of_the_collector_comes_again(monkeypatch):
    sent, came = [], threading.Event()
    monkeypatch.setattr(cli.os, "kill", lambda *call: (sent.append(call), came.set()))

    class Dying:
        def __del__(self):
            cli._terminated(signal.SIGTERM, sys._getframe())  # raised here, it would be lost

    Dying()
    assert came.wait(10) and sent == [(os.getpid(), signal.SIGTERM)]
    with pytest.raises(SystemExit):
        cli._terminated(signal.SIGTERM, sys._getframe())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_interrupted_training_leaves_only_its_checkpoint(sent, tmp_path, good, tiny, run):
    before = tree(tmp_path)
    arguments = [*map(str, train_arguments(tiny, good, 2_000)), "--out", str(run)]  # more take long to plan
    # A test run in the background passes on that Ctrl-C is ignored.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program = [*PROGRAM[:2], heeding + PROGRAM[2]]
    process = subprocess.Popen([*program, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    guard = threading.Timer(300, process.kill)
    guard.start()
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("epoch 1:"):
                break
        assert process.poll() is None, said
        time.sleep(0.2)
        process.send_signal(sent)
        said += process.stderr.readlines()
        status = process.wait()
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    after = [line for line in said if not line.startswith("epoch ")]
    assert not any("Traceback" in line for line in after), "".join(after)
    assert status in ((1, 130) if sent == signal.SIGINT else (1, 143, -signal.SIGTERM))
    assert "--resume" in "".join(after)
    left = tree(tmp_path)
    added = {name for name in left if name not in before}
    assert {name: data for name, data in left.items() if name in before} == before
    assert any(name.endswith("/checkpoint.json") for name in added)
    assert all(Path(name).parts[:2] == (run.name, "checkpoint") for name in added), added


# --- the real comments ----------------------------------------------------------------------------------------------


def test_real_files(shared_data, tmp_path, tiny):
    done(*train_arguments(tiny, shared_data / "tarr_train.txt"), "--out", tmp_path / "run")
    sample = shared_data / "tarr_sample_submit.txt"
    done("submit", tmp_path / "run", sample, "--out", tmp_path / "sub.txt")
    wanted = [line.split("\t") for line in sample.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").splitlines()]
    found = [line.split("\t") for line in (tmp_path / "sub.txt").read_bytes().decode().splitlines()]
    assert len(found) == 101 and found[0] == wanted[0]
    assert [line[:2] for line in found] == [line[:2] for line in wanted]
    assert {line[2] for line in found[1:]} <= {"0", "1"}


# --- files as people have them ----------------------------------------------------------------------------------------

FILES = Path(__file__).parent / "fixtures" / "files"
OWN_COLUMNS = ["--comment-column", "후기", "--id-column", "번호"]


@pytest.mark.parametrize(
    "name, options, ids",
    [
        ("comma.txt", [], ["11", "12"]),
        ("bar.txt", [], ["1", "2"]),
        ("semicolon.csv", [], ["1", "2"]),
        ("excel_blank_rows.csv", [], ["1", "2"]),
        ("own_columns.csv", OWN_COLUMNS, ["1", "2"]),
        ("array.json", [], ["1", "2"]),
        ("mixed_labels.jsonl", [], ["1", "2", "3"]),
        ("kaggle_test.csv", [], ["7", "9"]),
    ],
)
def test_predict_reads_what_people_have(name, options, ids, tmp_path, trained):
    result = done("predict", trained / "run", FILES / name, "--out", tmp_path / "out.tsv", *options)
    assert read_comments(tmp_path / "out.tsv")["id"].tolist() == ids
    (said,) = [line for line in result.stderr.splitlines() if "read as" in line]
    assert said.startswith(f"{FILES / name}: read as ")


@pytest.mark.parametrize("name, options", [("own_columns.csv", []), ("kaggle_sample_submission.csv", [])])
def test_messages_name_options_of_the_shell(name, options, tmp_path, trained):
    for command in ("predict", "submit", "suggest"):
        out = tmp_path / "new" / "out.csv"
        line = fails(tmp_path, out, command, trained / "run", FILES / name, *options)
        assert "--comment-column" in line and "comment_column" not in line
        shutil.rmtree(tmp_path / "new")


@pytest.mark.parametrize("name", ["comma.txt", "bar.txt", "semicolon.csv", "own_columns.csv", "kaggle_test.csv"])
def test_submit_writes_what_it_was_given(name, tmp_path, trained):
    options = [*OWN_COLUMNS, "--label-column", "감정"] if name == "own_columns.csv" else []
    out = tmp_path / f"sub{Path(name).suffix}"
    done("submit", trained / "run", FILES / name, "--out", out, *options)
    expected, found = ((path).read_text(encoding="utf-8").splitlines() for path in (FILES / name, out))
    if name == "comma.txt":  # it has no labels
        assert found[0] == "id,comment,label" and [line.rpartition(",")[0] for line in found[1:]] == expected[1:]
        return
    assert found[0] == expected[0] and [line[:-1] for line in found] == [line[:-1] for line in expected]


def test_submit_takes_comments_from_another_file(tmp_path, trained):
    sample, texts = FILES / "kaggle_sample_submission.csv", FILES / "kaggle_test.csv"
    done("submit", trained / "run", sample, "--text-from", texts, "--out", tmp_path / "sub.csv")
    rows = (tmp_path / "sub.csv").read_text().splitlines()
    assert rows[0] == "id,target" and [row.split(",")[0] for row in rows[1:]] == ["7", "9"]
    done("predict", trained / "run", texts, "--out", tmp_path / "out.tsv")
    assert [row.split(",")[1] for row in rows[1:]] == read_comments(tmp_path / "out.tsv")["label"].tolist()
    before = tree(tmp_path)
    other = ["submit", trained / "run", sample, "--text-from", FILES / "bar.txt", "--out", tmp_path / "no.csv"]
    assert "no comment for id '7', '9'" in one_error_line(call(*other, "--quiet"), 2)
    as_tabs = ["submit", trained / "run", sample, "--text-from", texts, "--out", tmp_path / "sub.tsv"]
    assert "the sample is ','-separated" in one_error_line(call(*as_tabs, "--quiet"), 2)
    assert tree(tmp_path) == before


GBK = "id,text\n7,这家餐厅的菜很好吃，服务也不错\n9,等了一个小时，菜都凉了\n".encode("gbk")
TEXTS = "id,text\n9,음\n7,굿\n"
NOT_TO_BE_SUBMITTED = {  # sample; file with the comments; output; options; part of the message
    "old Excel": ("id,target\n7,0\n9,0\n", TEXTS, "sub.xls", [], "no .xls is written. Give the file the suffix .csv."),
    "other format": ("id,target\n7,0\n9,0\n", TEXTS, "sub.json.gz", [], "the sample is ','-separated UTF-8"),
    "id twice": ("id,target\n7,0\n9,0\n", TEXTS + "9,또\n", "sub.csv", [], "line 4: id '9' stands already in line 2"),
    "other order": (
        "id,target\n7,0\n9,0\n", TEXTS.replace("id", "name"), "sub.csv", [],
        "column 'name' has the ids of", "in another order. Pass --id-column with it",
    ),
    "rows": ("id,target\n7,0\n", "굿\n음\n", "sub.csv", [], "2 comments for the 1 rows"),
    "one role": (
        "id,target\n7,0\n9,0\n", TEXTS, "sub.csv", ["--id-column", "id", "--label-column", "id"], "as id and as label",
    ),
    "Chinese": ("id,target\n7,0\n9,0\n", GBK, "sub.csv", [], "pass --encoding with gbk or cp949"),
    "delimiters": ("id,target\n7,0\n9,0\n", "id,text\n7;굿\n9;음\n", "sub.csv", [], "this row by semicolon"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_TO_BE_SUBMITTED)
def test_what_is_refused_rather_than_guessed(case, tmp_path, trained):
    sample, texts, out, options, *said = NOT_TO_BE_SUBMITTED[case]
    name = "t.txt" if case == "rows" else "t.csv"
    (tmp_path / "s.csv").write_text(sample, encoding="utf-8")
    (tmp_path / name).write_bytes(texts if isinstance(texts, bytes) else texts.encode())
    command = ["submit", trained / "run", tmp_path / "s.csv", "--text-from", tmp_path / name, *options]
    line = fails(tmp_path, tmp_path / "new" / out, *command)
    assert all(part in line for part in said), line


def test_submit_says_how_two_files_were_matched(tmp_path, trained):
    (tmp_path / "s.csv").write_bytes(b"id,target\n7,0\n9,0\n")
    (tmp_path / "t.txt").write_bytes("id:text\n9:음, 별로; 음\n8:\n7:굿, 최고; 굿\n".encode("cp949"))
    (tmp_path / "lines.txt").write_text("굿\n음\n", encoding="utf-8")
    submit = ["submit", trained / "run", tmp_path / "s.csv", "--out", tmp_path / "sub.csv", "--text-from"]
    result = done(*submit, tmp_path / "t.txt", "--delimiter", ":", "--encoding", "cp949", "--skip-blank")
    assert "t.txt: read as ':'-separated CP949; 1 row with a blank comment left out; matched with" in result.stderr
    assert f"{tmp_path / 's.csv'}: read as ','-separated" in result.stderr
    result = done(*submit, tmp_path / "lines.txt")
    assert "row by row, for there are no ids in" in result.stderr and "warning" not in result.stderr


@pytest.mark.parametrize("out", ["sub.csv", "sub.csv.gz", "sub.csv.zip", "sub.zip"])
def test_a_submission_in_cp949_and_packed(out, tmp_path, trained):
    (tmp_path / "s.csv").write_bytes("id,댓글,라벨\r\n7,\"굿, 최고\",0\r\n9,음,0\r\n".encode("cp949"))
    done("submit", trained / "run", tmp_path / "s.csv", "--out", tmp_path / out)
    lines = unpacked(tmp_path / out).decode("cp949").splitlines()
    assert [line[:-1] for line in lines] == ["id,댓글,라", '7,"굿, 최고",', "9,음,"]
    assert lines[0][-1] == "벨" and {line[-1] for line in lines[1:]} <= {"0", "1"}


@pytest.mark.parametrize("rows", [3, 20_000])
def test_a_json_of_predictions_is_one_array(rows, tmp_path, trained, monkeypatch):
    comments = [f"{n % 7}번 {{[\u2028" for n in range(rows)]
    pd.DataFrame({"comment": comments}).to_json(tmp_path / "in.jsonl", orient="records", lines=True)
    done("predict", trained / "run", tmp_path / "in.jsonl", "--out", tmp_path / "out.json", "--quiet")
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [row["id"] for row in found] == list(range(1, rows + 1))
    assert set(found[0]) == {"id", "comment", "label", "p_0", "p_1"}
    assert len(read_comments(tmp_path / "out.json")) == rows
    done("suggest", trained / "run", tmp_path / "in.jsonl", "--out", tmp_path / "next.json", "--number", 2, "--quiet")
    assert len(json.loads((tmp_path / "next.json").read_text("utf-8"))) == 2


@pytest.mark.parametrize("command", ["train", "cross-validate", "evaluate"])
@pytest.mark.parametrize(
    "content, said",
    [
        ('{"comment": "굿", "label": "\\ud800"}\n', "line 1: the label '\\ud800' holds half a character"),
        ('{"comment": "굿", "label": "0", "id": "\\udc00"}\n', "line 1: the id '\\udc00' holds half a character"),
    ],
)
def test_half_a_character_is_told_before_anything_is_trained(content, said, command, tmp_path, trained):
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    run = [trained / "run"] if command == "evaluate" else []
    assert said in fails(tmp_path, tmp_path / "new" / "out", command, *run, tmp_path / "a.jsonl")


def test_either_form_of_hangul_gets_the_same_probabilities_and_comes_out_as_it_was(tmp_path, trained):
    comments = ["국물이 진하고 좋았어요", "맛이 없어요", "또 갈게요"]
    tables = []
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, "\n".join(["댓글", *comments]))
        (tmp_path / f"{form}.csv").write_text(text, encoding="utf-8")
        result = done("predict", trained / "run", tmp_path / f"{form}.csv", "--out", tmp_path / f"{form}_out.csv")
        assert ("3 comments composed" in result.stderr) == (form == "NFD")
        assert (tmp_path / f"{form}_out.csv").read_bytes().startswith(b"\xef\xbb\xbf")
        tables.append(pd.read_csv(tmp_path / f"{form}_out.csv", dtype=str))
        assert tables[-1].comment.tolist() == [unicodedata.normalize(form, comment) for comment in comments]
    assert tables[0].drop(columns="comment").equals(tables[1].drop(columns="comment"))


def test_a_csv_of_ascii_has_no_mark(tmp_path, trained):
    (tmp_path / "in.csv").write_text("text\ngood\nbad\n")
    done("predict", trained / "run", tmp_path / "in.csv", "--out", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes().startswith(b"id,")


def test_web_exports_are_read_as_text_and_written_as_they_stood(tmp_path, trained):
    result = done("predict", trained / "run", FILES / "html.csv", "--out", tmp_path / "out.csv")
    assert "2 comments freed of HTML" in result.stderr
    (tmp_path / "plain.tsv").write_text("comment\n국이 식었어요. 다신 안 가요\n면발이 쫄깃해요 👍\n", encoding="utf-8")
    done("predict", trained / "run", tmp_path / "plain.tsv", "--out", tmp_path / "plain_out.csv")
    web, plain = (pd.read_csv(tmp_path / f"{name}.csv", dtype=str) for name in ("out", "plain_out"))
    assert web.comment[0] == "국이&nbsp;식었어요.<br>다신&nbsp;안 가요"
    assert web.drop(columns="comment").equals(plain.drop(columns="comment"))


def test_labels_of_spreadsheets_are_the_labels_of_the_run(tmp_path, tiny, trained):
    as_floats = [(i, comment, f"{label}.0") for i, comment, label in ROWS]
    (tmp_path / "floats.csv").write_text(tsv(as_floats).replace("\t", ","), encoding="utf-8")
    done("evaluate", trained / "run", tmp_path / "floats.csv", "--out", tmp_path / "judged")
    whole = json.loads((tmp_path / "judged" / "metrics.json").read_text())
    done("evaluate", trained / "run", trained / "train.tsv", "--out", tmp_path / "before")
    assert whole["accuracy"] == json.loads((tmp_path / "before" / "metrics.json").read_text())["accuracy"]
    done(*train_arguments(tiny, tmp_path / "floats.csv"), "--out", tmp_path / "run", "--label-word", "0=0",
         "--label-word", "1.0=1")  # fmt: skip
    saved = json.loads((tmp_path / "run" / "classifier.json").read_text())
    assert (saved["classes"]["values"], saved["words"]) == (["0.0", "1.0"], ["0", "1"])
    done("decide", tmp_path / "run", "--cost", "1=5")
    done("predict", tmp_path / "run", trained / "new.tsv", "--out", tmp_path / "out.tsv")
    assert set(read_comments(tmp_path / "out.tsv")["label"]) <= {"0.0", "1.0"}
    (tmp_path / "odd.csv").write_text("comment,label\n굿,0\n음,2\n")
    line = fails(tmp_path, tmp_path / "out", "evaluate", tmp_path / "run", tmp_path / "odd.csv")
    assert "odd.csv line 3: label '2' is not one of 0.0, 1.0" in line


def test_a_run_remembers_how_its_file_was_read(tmp_path, tiny):
    rows = [("번호", "후기", "감정"), *ROWS]
    text = "\n".join(";".join(row) for row in rows)
    (tmp_path / "own.txt").write_text(text, encoding="cp949")
    options = ["--comment-column", "후기", "--label-column", "감정", "--id-column", "번호", "--encoding", "cp949"]
    result = done(*train_arguments(tiny, tmp_path / "own.txt"), *options, "--out", tmp_path / "run")
    assert "own.txt: read as ';'-separated CP949" in result.stderr
    described = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["data"]
    assert described["reading"]["comment_column"] == "후기" and described["rows"] == 24
    done("train", "--from", tmp_path / "run" / "run.json", "--out", tmp_path / "again")
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "again")]
    assert adapters[0] == adapters[1]
    judged = done("evaluate", tmp_path / "run", tmp_path / "own.txt", *options, "--out", tmp_path / "judged")
    assert "no baseline" not in judged.stderr


def test_columns_are_named_once(tmp_path, tiny, monkeypatch):
    def own(name, rows, header="번호,문의,분류"):
        (tmp_path / name).write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")

    own("own.csv", ROWS)
    options = ["--comment-column", "문의", "--label-column", "분류", "--id-column", "번호"]
    line = one_error_line(call(*train_arguments(tiny, "own.csv"), "--out", "run", "--quiet"), 2)
    assert "no comment column" in line and "no label column" in line
    assert "--comment-column and --label-column" in line and "if these are no names" in line
    done(*train_arguments(tiny, "own.csv"), *options, "--out", "run")
    own("new.csv", [row[:2] for row in ROWS[:7]], "번호,문의")
    done("predict", "run", "new.csv", "--out", "out.tsv")
    assert pd.read_csv("out.tsv", sep="\t").id.tolist() == [int(row[0]) for row in ROWS[:7]]
    (tmp_path / "new.jsonl").write_text('{"문의": "맛있어요"}\n{"문의": "별로예요"}\n', encoding="utf-8")
    done("predict", "run", "new.jsonl", "--out", "out.jsonl")
    done("suggest", "run", "new.csv", "--out", "next.tsv", "--number", 2)
    late = '{"문의": "맛있어요", "label": 1}\n{"문의": "별로예요", "분류": 0, "label": 1}\n'  # not in the first object
    (tmp_path / "late.jsonl").write_text(late, encoding="utf-8")
    assert "the label is missing" in one_error_line(call("evaluate", "run", "late.jsonl", "--out", "late"), 2)
    done("evaluate", "run", "own.csv", "--out", "judged")
    described = json.loads(Path("judged", "metrics.json").read_text(encoding="utf-8"))["data"]
    assert described["reading"] == {"comment_column": "문의", "label_column": "분류", "id_column": "번호"}
    (tmp_path / "usual.tsv").write_text(tsv(ROWS[:7]), encoding="utf-8")  # another file's own columns
    done("predict", "run", "usual.tsv", "--out", "usual.csv")
    own("both.csv", [(*row, "별로예요") for row in ROWS[:7]], "번호,문의,분류,메모")
    done("predict", "run", "both.csv", "--comment-column", "메모", "--out", "memo.tsv")  # what is given counts
    assert set(pd.read_csv("memo.tsv", sep="\t").comment) == {"별로예요"}

    own("other.csv", ROWS[:7], "번호,글,분류")
    loaded = []
    monkeypatch.setattr(GemmaLoraClassifier, "load", lambda *_, **__: loaded.append(1))
    for command in ("predict", "evaluate", "suggest"):
        line = one_error_line(call(command, "run", "other.csv", "--out", f"{command}.tsv"), 2)
        assert "no comment column" in line and not loaded  # before the base, which takes its time


def test_a_damaged_description_of_a_run_does_not_stop_its_adapter(tmp_path, tiny, monkeypatch):
    rows = "".join(f"{row[1]},{row[2]}\n" for row in ROWS)
    (tmp_path / "own.csv").write_text(f"문의,label\n{rows}", encoding="utf-8")
    done(*train_arguments(tiny, "own.csv"), "--comment-column", "문의", "--out", "run")
    (tmp_path / "run" / "run.json").write_text("{", encoding="utf-8")
    told = done("predict", "run", "own.csv", "--comment-column", "문의", "--out", "out.tsv").stderr
    assert "the run's columns are not known" in told and "run.json is damaged" in told
    assert len(pd.read_csv("out.tsv", sep="\t")) == len(ROWS)


def test_columns_of_an_unfinished_run_are_those_it_goes_on_with(tmp_path, tiny, monkeypatch):
    from gemma_lora_sentiment import training

    lines = ["번호,문의,분류", *(",".join(row) for row in ROWS)]
    (tmp_path / "own.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    saves, save = [], training.save_checkpoint

    def stopping(*rest):
        save(*rest)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    options = ["--comment-column", "문의", "--label-column", "분류"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(training, "save_checkpoint", stopping)
        assert "--resume" in call(*train_arguments(tiny, "own.csv", 2), *options, "--out", "run").stderr
    result = done(*train_arguments(tiny, "own.csv", 2), "--resume", "--out", "run")
    assert "going on from" in result.stderr
    described = json.loads(Path("run", "run.json").read_text(encoding="utf-8"))["data"]
    assert described["reading"] == {"comment_column": "문의", "label_column": "분류"}


def test_words_for_missing_labels_can_be_labels(tmp_path, tiny):
    words = [(i, comment, "None" if label == "0" else "some") for i, comment, label in ROWS]
    (tmp_path / "words.tsv").write_text(tsv(words), encoding="utf-8")
    line = fails(tmp_path, tmp_path / "out", *train_arguments(tiny, tmp_path / "words.tsv"))
    assert "'None' stands for none" in line and "--keep-na" in line
    shutil.rmtree(tmp_path / "out")
    done(*train_arguments(tiny, tmp_path / "words.tsv"), "--keep-na", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "classifier.json").read_text())["classes"]["values"] == ["None", "some"]


def test_blank_comments_can_be_left_out(tmp_path, trained):
    rows = [*ROWS[:4], ("98", " ", "1"), *ROWS[4:6], ("99", "", "0")]
    (tmp_path / "gaps.tsv").write_text(tsv(rows), encoding="utf-8")
    line = fails(tmp_path, tmp_path / "new" / "out.tsv", "predict", trained / "run", tmp_path / "gaps.tsv")
    assert "2 rows (line 6, 9)" in line and "--skip-blank" in line
    result = done("predict", trained / "run", tmp_path / "gaps.tsv", "--out", tmp_path / "out.tsv", "--skip-blank")
    assert "2 rows with blank comments left out" in result.stderr and len(read_comments(tmp_path / "out.tsv")) == 6


def test_excel_in_the_shell(tmp_path, trained):
    rows = pd.DataFrame(ROWS[:5], columns=["id", "comment", "label"])
    with pd.ExcelWriter(tmp_path / "book.xlsx") as book:
        rows.head(2).to_excel(book, sheet_name="one", index=False)
        rows.to_excel(book, sheet_name="two", index=False)
    done("predict", trained / "run", tmp_path / "book.xlsx", "--out", tmp_path / "out.tsv")
    assert len(read_comments(tmp_path / "out.tsv")) == 2
    done("predict", trained / "run", tmp_path / "book.xlsx", "--sheet", "two", "--out", tmp_path / "out.tsv")
    assert len(read_comments(tmp_path / "out.tsv")) == 5
    done("submit", trained / "run", tmp_path / "book.xlsx", "--sheet", "two", "--out", tmp_path / "sub.xlsx")
    filled = pd.read_excel(tmp_path / "sub.xlsx", sheet_name="two", dtype=str)
    assert filled.comment.tolist() == rows.comment.tolist()
    assert pd.read_excel(tmp_path / "sub.xlsx", sheet_name="one").shape == (2, 3)
    third = ["predict", trained / "run", tmp_path / "book.xlsx", "--sheet", "3"]
    line = fails(tmp_path, tmp_path / "new" / "o.tsv", *third)
    assert "no sheet '3' among 'one', 'two'" in line and "--sheet" in line


def test_a_base_that_moved_is_given_with_preset(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "base")
    (tmp_path / "train.tsv").write_text(tsv(ROWS), encoding="utf-8")
    done("train", "train.tsv", "--out", "run", "--preset", "base", "--epochs", 1, "--rank", 2)
    for name, place in (("classifier.json", "parameters"), ("run.json", "settings")):
        saved = json.loads((tmp_path / "run" / name).read_text(encoding="utf-8"))
        assert saved[place]["preset"] == str(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    release_bases()
    for command, out in (("evaluate", "judged"), ("predict", "o.tsv"), ("submit", "s.tsv"), ("suggest", "n.tsv")):
        line = one_error_line(call(command, "run", "train.tsv", "--out", out, "--quiet"), 2)
        assert "--preset" in line and str(tmp_path / "base") in line and not Path(out).exists()
        done(command, "run", "train.tsv", "--out", out, "--preset", "moved")
        release_bases()
    assert str(tmp_path / "base") in one_error_line(call("compare", "run", "judged", "--rows", "train.tsv"), 2)
    shutil.copytree("run", "twin")
    compared = done("compare", "run", "twin", "--rows", "train.tsv", "--preset", "moved")
    assert "different answers on 0" in compared.stdout


def test_pretrain_reads_labelled_comments_as_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "corpus.tsv").write_text("rating\treview\n9\t좋아요\n1\t별로\n", encoding="utf-8")
    (tmp_path / "own.csv").write_text("글;점수\n국물이 좋아요;1\n다시 안 가요;0\n", encoding="cp949")
    command = ["pretrain", "corpus.tsv", "--out", "base", "--comments", "own.csv"]
    assert "--comment-column" in one_error_line(call(*command), 2)
    seen = []

    def pretrained(reviews, folder, comments, settings, **_):
        seen.append(comments)
        return {"parameters": 1, "held_out_accuracy": 1.0}

    monkeypatch.setattr("gemma_lora_sentiment.pretraining.pretrain_base", pretrained)
    done(*command, "--comment-column", "글", "--label-column", "점수", "--encoding", "cp949")
    assert seen[0].comment.tolist() == ["국물이 좋아요", "다시 안 가요"] and seen[0].label.tolist() == ["1", "0"]


def test_printing_never_fails_a_finished_command(tmp_path, trained):
    code = "import sys; from gemma_lora_sentiment.cli import app; app(sys.argv[1:])"
    arguments = ["predict", str(trained / "run"), str(trained / "new.tsv"), "--out", "예측.csv"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert b"7 rows written to \\uc608\\uce21.csv" in result.stdout and Path("예측.csv").exists()


# --- names that must not be written to --------------------------------------------------------------------------------


def test_the_comments_are_not_overwritten(run, tmp_path):
    own, sample = tmp_path / "own.csv", tmp_path / "sample.csv"
    own.write_text("id,comment\n1,굿\n2,별로\n", encoding="utf-8")
    sample.write_text("id,target\n1,\n2,\n", encoding="utf-8")
    before = tree(tmp_path)
    for arguments in (
        ["predict", run, own, "--out", tmp_path / "." / "own.csv"],
        ["suggest", run, own, "--out", own],
        ["submit", run, sample, "--text-from", own, "--out", own],
    ):
        result = call(*arguments)
        assert result.exit_code == 2 and "is the file with the comments" in result.stderr, result.stderr
    assert tree(tmp_path) == before
    done("submit", run, sample, "--text-from", own, "--out", sample)  # as the competition gave it, filled in
    assert [line.split(",")[0] for line in sample.read_text(encoding="utf-8").splitlines()] == ["id", "1", "2"]


@pytest.mark.parametrize("command", ["predict", "suggest", "submit"])
def test_a_folder_that_is_not_there_is_named(run, tmp_path, command):
    own = tmp_path / "own.csv"
    own.write_text("id,comment\n1,굿\n2,별로\n", encoding="utf-8")
    result = call(command, run, own, "--out", tmp_path / "nodir" / "p.csv")
    assert f"there is no folder {tmp_path / 'nodir'}. Make it" in one_error_line(result, 1)
