"""What would bore a reader of 08_scale: killed processes, full disks, odd files, memory, simulated devices."""

import bz2
import errno
import gzip
import json
import lzma
import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gemma_lora_sentiment import GemmaLoraClassifier, read_comments, scale, scoring, tables
from gemma_lora_sentiment.backend import without_tensorflow
from gemma_lora_sentiment.data import DataError, write_table
from gemma_lora_sentiment.model import keras_nlp, tiny_gemma
from gemma_lora_sentiment.scale import predict_file, read_chunks

WORDS = ("국물이", "진하고", "맛있어요", "별로예요", "또", "갈게요", "실망했어요", "친절해요", "the", "coffee")


def comments(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 12))) + f" {i}" for i in range(n)]


def write_tsv(path, texts, first_id=1):
    lines = [f"{i}\t{text}\n" for i, text in enumerate(texts, start=first_id)]
    Path(path).write_text("id\tcomment\n" + "".join(lines), encoding="utf-8")
    return Path(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    clf = GemmaLoraClassifier(tiny_gemma(folder / "tiny"), epochs=1, lora_rank=2, learning_rate=1e-2)
    clf.fit(comments(16), list("01" * 8)).save(folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def clf(run):
    return GemmaLoraClassifier.load(run)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --- reading --------------------------------------------------------------------------------------------------------

TEXTS = {
    "plain.tsv": 'id\tcomment\n1\t"좋아요"\n2\ta, b\n\n3\tlast  one\n\n\n',
    "quoted.tsv": '"id"\t"comment"\n1\t"two\nlines"\n2\t"say ""hi"""\n',
    "quoted.csv": 'no,label,review\n1,0,"two\nlines, and more"\n\n2,1,"say ""hi"""\n3,,plain\n',
    "crlf.csv": "id,text\r\n1,하나\r\n2,둘\r\n\r\n",
    "mac.csv": "id,text\r1,하나\r2,둘\r",
    "stray.tsv": "comment\n하\r나\n둘\r\n",
    "lines.txt": "하나\n둘 셋\nfour\n\n  \n",
    "table.txt": "id\tcomment\n7\t하나\n8\t둘\n",
    "rows.jsonl": '{"text": "하나", "id": 1}\n\n{"id": 2.5, "more": [1], "text": "둘"}\n{"text": "셋", "id": "x"}\n',
    "unnumbered.jsonl": '{"text": "하나"}\n{"text": "둘"}\n{"text": "셋"}\n',
}


@pytest.mark.parametrize("pack", [None, ".gz", ".xz", ".bz2"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16"])
@pytest.mark.parametrize("name", TEXTS)
def test_chunks_hold_what_read_comments_reads(name, encoding, pack, tmp_path, monkeypatch):
    packers = {None: bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    path = tmp_path / f"{name}{pack or ''}"
    path.write_bytes(packers[pack](TEXTS[name].encode(encoding)))
    expected = read_comments(path, labelled=False)[["id", "comment"]]
    monkeypatch.setattr(tables, "_BLOCK", 5)  # characters and line ends are cut in two
    for rows in (1, 2, 100):
        chunks = list(read_chunks(path, rows))
        found = pd.concat([chunk.table for chunk in chunks], ignore_index=True)
        assert found.astype(object).equals(expected.astype(object)), rows
        assert [chunk.first for chunk in chunks] == list(np.cumsum([0, *(len(c.table) for c in chunks[:-1])]))
        assert 0.7 < chunks[-1].fraction <= 1 and (rows > 1 or chunks[0].fraction < chunks[-1].fraction)


def test_zstandard(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.CompressedOutputStream(str(tmp_path / "in.tsv.zst"), "zstd") as file:
        file.write(b"id\tcomment\n1\tgood\n2\tbad\n")
    (chunk,) = read_chunks(tmp_path / "in.tsv.zst")
    assert chunk.table.comment.tolist() == ["good", "bad"]
    (tmp_path / "bad.tsv.zst").write_bytes((tmp_path / "in.tsv.zst").read_bytes()[:12])
    with pytest.raises(DataError, match="unpacked|empty"):
        list(read_chunks(tmp_path / "bad.tsv.zst"))


def test_parquet_in_chunks_across_row_groups(tmp_path):
    table = pd.DataFrame({"text": comments(25), "wide": ["x"] * 25}, index=pd.RangeIndex(100, 125, name="no"))
    table.to_parquet(tmp_path / "in.parquet", row_group_size=7)
    found = [chunk.table for chunk in read_chunks(tmp_path / "in.parquet", 10)]
    assert [len(part) for part in found] == [10, 10, 5]
    expected = read_comments(tmp_path / "in.parquet", labelled=False)[["id", "comment"]]
    assert pd.concat(found, ignore_index=True).equals(expected)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", b"", "is empty"),
        ("a.tsv", b"id\tcomment\n", "no rows"),
        ("a.tsv", b"id\tcomment\n1\ta\n2\tb\n3\tc\td\n", "line 4: 3 fields where the header has 2"),
        ("a.tsv", b"id\tcomment\n1\ta\n2\tb\n3\t  \n", "line 4: the comment is empty"),
        ("a.csv", b'comment\na\nb\n"c\nd\n', "line 4: its quotation marks do not pair"),
        ("a.csv", b"id,name\n1,a\n", "no comment column"),
        ("a.csv", b"text,text\na,b\n", "two columns are named 'text'"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n{"text": 3}\n', "line 4: the comment 3 is no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"tekst": "c"}\n', "line 3: the comment is empty"),
        ("a.tsv.gz", gzip.compress(b"comment\n" + b"a\n" * 99, mtime=0)[:-12], "cannot be unpacked"),
        ("a.parquet", b"PAR1 and nothing else", "not a whole Parquet file"),
        ("a.xlsx", b"PK\x03\x04", "not a whole Excel file"),
        ("a.docx", b"comment\na\n", "unknown format"),
        ("a.tsv", b"PK\x03\x04", "an Excel or zip file"),
    ],
)
def test_bad_rows_are_named_when_they_are_reached(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(read_chunks(tmp_path / name, 2))


def test_bytes_that_are_no_text_far_into_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_BLOCK", 16)
    monkeypatch.setattr(tables, "_HEAD", 64)
    (tmp_path / "a.tsv").write_bytes(b"comment\n" + "좋아요\n".encode() * 1500 + b"\xff\xff\n")
    reading = read_chunks(tmp_path / "a.tsv", 10)
    assert len(next(reading).table) == 10
    with pytest.raises(DataError, match="line 1502: not utf-8"):
        list(reading)


# --- folders --------------------------------------------------------------------------------------------------------


def write_folder(folder, texts, suffix=".parquet", sizes=(25, 3, 40)):
    """Files of so many rows; ids go on from file to file, and the order of names is not that of writing."""
    folder.mkdir()
    table = pd.DataFrame({"id": [f"n{i}" for i in range(len(texts))], "comment": texts})
    stops = [0, *np.cumsum(sizes), len(texts)]
    for number in reversed(range(len(stops) - 1)):
        part = table[stops[number] : stops[number + 1]].reset_index(drop=True)
        write_table(part, folder / f"part-{number}{suffix}", suffix)
    return folder


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_folder_gives_the_rows_of_its_files_in_order(suffix, tmp_path, clf):
    texts = comments(90)
    folder = write_folder(tmp_path / "in", texts, suffix)
    for mark in ("_SUCCESS", ".part-0.crc"):  # as Spark leaves them
        (folder / mark).write_bytes(b"")
    assert predict_file(clf, folder, tmp_path / f"out{suffix}", chunk_rows=10) == 90
    write_folder(tmp_path / "one", texts, suffix, sizes=())
    predict_file(clf, tmp_path / "one" / f"part-0{suffix}", tmp_path / f"whole{suffix}", chunk_rows=10)
    found, whole = (read_comments(tmp_path / f"{name}{suffix}") for name in ("out", "whole"))
    assert found["id"].tolist() == [f"n{i}" for i in range(90)] and found.comment.tolist() == texts
    assert found.drop(columns=["p_0", "p_1"]).equals(whole.drop(columns=["p_0", "p_1"]))
    assert np.allclose(found[["p_0", "p_1"]].astype(float), whole[["p_0", "p_1"]].astype(float), atol=1e-5)


def test_chunks_of_a_folder(tmp_path):
    folder = write_folder(tmp_path / "in", comments(90))
    pd.DataFrame({"id": pd.Series([], dtype=object), "comment": []}).to_parquet(folder / "part-1a.parquet")  # no rows
    chunks = list(read_chunks(folder, 20))
    assert [(chunk.path.name, chunk.file, chunk.first, len(chunk.table)) for chunk in chunks] == [
        ("part-0.parquet", 0, 0, 20), ("part-0.parquet", 0, 20, 5), ("part-1.parquet", 1, 25, 3),
        ("part-2.parquet", 3, 28, 20), ("part-2.parquet", 3, 48, 20), ("part-3.parquet", 4, 68, 20),
        ("part-3.parquet", 4, 88, 2),
    ]  # fmt: skip
    fractions = [chunk.fraction for chunk in chunks]
    assert fractions == sorted(fractions) and 0 < fractions[0] < fractions[-1] == 1


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_rows_without_ids_are_numbered_through_the_folder(suffix, tmp_path, clf):
    (tmp_path / "in").mkdir()
    for name, texts in (("b", comments(7)), ("a", comments(5))):
        table = pd.DataFrame({"comment": texts})
        if suffix == ".txt":
            (tmp_path / "in" / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
        elif suffix == ".jsonl":
            table.to_json(tmp_path / "in" / f"{name}.jsonl", orient="records", lines=True, force_ascii=False)
        else:
            table.to_parquet(tmp_path / "in" / f"{name}.parquet")
    assert predict_file(clf, tmp_path / "in", tmp_path / "out.tsv", chunk_rows=4) == 12
    found = read_comments(tmp_path / "out.tsv")
    assert found["id"].tolist() == [str(i) for i in range(1, 13)]
    assert found.comment.tolist() == [*comments(5), *comments(7)]


def test_id_that_stands_in_two_files(tmp_path, clf):
    folder = write_folder(tmp_path / "in", comments(90))
    table = pd.read_parquet(folder / "part-3.parquet")
    table.loc[4, "id"] = "n26"
    table.to_parquet(folder / "part-3.parquet")
    with pytest.raises(DataError, match="part-3.parquet row 5: id 'n26' stands already in row 2 of part-1.parquet"):
        predict_file(clf, folder, tmp_path / "out.tsv", chunk_rows=20)
    table.loc[4, "id"] = "n72"
    table.to_parquet(folder / "part-3.parquet")
    assert predict_file(clf, folder, tmp_path / "out.tsv", chunk_rows=20, resume=True) == 90
    assert read_comments(tmp_path / "out.tsv")["id"].tolist() == [f"n{i}" for i in range(90)]


@contextmanager
def full_at(monkeypatch, number):
    """The disk is full when the part of this number is written."""
    real = scale._write_part

    def write(part, *rest):
        if number in part.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(part))
        real(part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(scale, "_write_part", write)
        yield


def test_folder_stopped_in_its_third_file_and_resumed(tmp_path, clf, monkeypatch):
    folder = write_folder(tmp_path / "in", comments(90))
    predict_file(clf, folder, tmp_path / "expected.tsv", chunk_rows=10)
    with full_at(monkeypatch, "000005"), pytest.raises(OSError, match="38 finished rows are kept"):
        predict_file(clf, folder, tmp_path / "out.tsv", chunk_rows=10)
    (folder / "part-1.parquet").rename(tmp_path / "aside")
    with pytest.raises(scale.RunError, match="part-2.parquet is not the input .* rows 1 to 10 differ"):
        predict_file(clf, folder, tmp_path / "out.tsv", chunk_rows=10, resume=True)
    (tmp_path / "aside").rename(folder / "part-1.parquet")
    assert predict_file(clf, folder, tmp_path / "out.tsv", chunk_rows=10, resume=True) == 90
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "expected.tsv").read_bytes()
    assert names(tmp_path) == ["expected.tsv", "in", "out.tsv"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "in: is a folder without files"),
        ({"_SUCCESS": b""}, "in: is a folder without files"),
        ({"a.tsv": b"comment\nx\n", "b.csv": b"comment\nx\n"}, "b.csv: is csv, and a.tsv is tsv"),
        ({"a.tsv": b"comment\nx\n", "notes.md": b"x"}, "notes.md: of unknown format"),
        ({"a.tsv": b"comment\nx\n", "b/a.tsv": b"comment\nx\n"}, "b: is a folder in a folder"),
        ({"a.tsv": b"id\tcomment\n1\tx\n", "b.tsv": b"id\ttext\n2\tx\n"}, "b.tsv: its columns are 'id', 'text'"),
        ({"a.csv": b"id,text\n1,x\n", "b.csv": b"id,text,label\n2,x,1\n"}, "b.csv: its columns are 'id', 'label'"),
        ({"a.jsonl": b'{"text": "x"}', "b.jsonl": b'{"id": 1, "text": "x"}'}, "b.jsonl: its columns are 'id', 'text'"),
        ({"a.tsv": b"comment\nx\n", "b.tsv": b""}, "b.tsv: is empty"),
        ({"a.tsv": b"comment\nx\n", "b.tsv": b"comment\n \nx\n"}, "b.tsv line 2: the comment is empty"),
        ({"a.tsv": b"comment\n", "b.tsv": b"comment\n"}, "in: its files have headers and no rows"),
    ],
)
def test_folders_that_cannot_be_used(files, said, tmp_path, clf):
    for name, content in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=said) as caught:
        predict_file(clf, tmp_path / "in", tmp_path / "out.tsv")
    assert "\n" not in str(caught.value) and names(tmp_path) == ["in"]


def test_output_into_the_folder_that_is_read(tmp_path, clf):
    folder = write_folder(tmp_path / "in", comments(90))
    with pytest.raises(DataError, match="lies in the folder that is read"):
        predict_file(clf, folder, folder / "out.parquet")
    assert "out.parquet" not in names(folder)


# --- output ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_small_files_give_the_bytes_of_a_whole_prediction(suffix, tmp_path, clf):
    path = write_tsv(tmp_path / "in.tsv", comments(30))
    rows = read_comments(path, labelled=False)
    probabilities = clf.predict_proba(rows.comment)
    table = rows[["id", "comment"]].assign(label=clf.classes_[probabilities.argmax(axis=1)])
    for column, label in enumerate(clf.classes_):
        table[f"p_{label}"] = probabilities[:, column]
    write_table(table, tmp_path / f"expected{suffix}", suffix)
    assert predict_file(clf, path, tmp_path / f"out{suffix}") == 30
    assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"expected{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_many_chunks_are_one_file_in_order(suffix, tmp_path, clf):
    texts = comments(130)
    path = write_tsv(tmp_path / "in.tsv", [*texts, *texts[:20]])
    assert predict_file(clf, path, tmp_path / f"out{suffix}", chunk_rows=40) == 150
    found = read_comments(tmp_path / f"out{suffix}")
    assert found.comment.tolist() == [*texts, *texts[:20]]
    assert found["id"].tolist() == [str(i) for i in range(1, 151)]
    assert np.allclose(found[["p_0", "p_1"]].astype(float), clf.predict_proba(found.comment), atol=1e-5)
    assert names(tmp_path) == ["in.tsv", f"out{suffix}"]


def test_few_shapes_and_no_comment_twice(tmp_path, clf, monkeypatch):
    scored = []
    real = scale.label_probabilities

    def counting(base, adapter, prompts, *rest, **named):
        result = real(base, adapter, prompts, *rest, **named)
        programs = scoring._hidden_program(base.config), scoring._sequence_program(base.config)
        scored.append((len(prompts), sum(program._cache_size() for program in programs)))
        return result

    scoring._hidden_program.cache_clear()
    scoring._sequence_program.cache_clear()
    monkeypatch.setattr(scale, "label_probabilities", counting)
    texts = comments(400)
    path = write_tsv(tmp_path / "in.tsv", [text for text in texts for _ in range(2)])
    predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=100)
    assert [n for n, _ in scored] == [50] * 8
    shapes = [count for _, count in scored]
    assert 1 <= shapes[0] == shapes[-1] <= 2, shapes


def test_scores_that_are_not_finite_are_no_answers(tmp_path):
    """In float16 a comment whose scores overflow would be given the first class."""
    folder = tiny_gemma(tmp_path / "large")
    with without_tensorflow():
        backbone = keras_nlp.models.Backbone.from_preset(folder, dtype="float32")
        (kernel,) = [v for v in backbone.variables if v.path == "decoder_block_0/ffw_linear/kernel"]
        kernel.assign(np.array(kernel.value) * 40_000)
        backbone.save_to_preset(folder)
    clf = GemmaLoraClassifier(folder, dtype="float16", epochs=0).fit(comments(4), [0, 1, 0, 1])
    path = write_tsv(tmp_path / "in.tsv", comments(20))
    with pytest.raises(
        scale.RunError, match="of 20 comments are not finite in float16. Fit again with dtype='bfloat16'"
    ):
        predict_file(clf, path, tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv").exists()


def test_ids_that_come_twice_in_different_chunks(tmp_path, clf):
    path = tmp_path / "in.jsonl"
    ids = [*range(25), "3", 3.0]
    path.write_text("".join(json.dumps({"id": name, "text": f"좋아요 {i}"}) + "\n" for i, name in enumerate(ids)))
    with pytest.raises(DataError, match="line 27: id 3.0 stands already in line 4.*20 finished rows are kept"):
        predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=10)
    path.write_text(path.read_text().replace("3.0", "33"))
    assert predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=10, resume=True) == 27


def test_ids_that_change_their_type_on_the_way_to_parquet(tmp_path, clf):
    lines = [json.dumps({"id": i if i < 30 else f"x{i}", "text": text}) for i, text in enumerate(comments(40))]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="ids change their type"):
        predict_file(clf, tmp_path / "in.jsonl", tmp_path / "out.parquet", chunk_rows=10)
    assert predict_file(clf, tmp_path / "in.jsonl", tmp_path / "out.csv", chunk_rows=10) == 40


def test_another_input_run_or_option_is_refused(tmp_path, clf, monkeypatch):
    path = write_tsv(tmp_path / "in.tsv", comments(50))
    said = pytest.raises(OSError, match="No space left on device; 30 finished rows are kept")
    with full_at(monkeypatch, "000003"), said:
        predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=10)
    before = names(tmp_path / ".out.tsv.parts")
    other = GemmaLoraClassifier(clf.preset, epochs=1, lora_rank=2, learning_rate=1e-2, seed=1).fit(
        comments(16), list("01" * 8)
    )
    decision = {"classes": ["0", "1"], "temperature": 2.0, "cost": None, "threshold": None, "confidence": None}
    for who, more, said in (
        (clf, {"chunk_rows": 20}, "chunk_rows was 10 and is 20"),
        (clf, {"batch_size": 8}, "batch_size was 32 and is 8"),
        (clf, {"decision": decision}, "calibrated was null"),
        (other, {}, "adapter was"),
        (clf, {"resume": False}, "30 finished rows of an earlier run"),
    ):
        with pytest.raises(scale.RunError, match=said):
            predict_file(who, path, tmp_path / "out.tsv", **{"chunk_rows": 10, "resume": True, **more})
        assert names(tmp_path / ".out.tsv.parts") == before
    changed = comments(50)
    changed[15] += "!"
    write_tsv(path, changed)
    with pytest.raises(scale.RunError, match="lines 12 to 21 differ"):
        predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=10, resume=True)
    write_tsv(path, comments(25))
    with pytest.raises(scale.RunError, match="lines 22 to 26 differ"):
        predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=10, resume=True)
    write_tsv(path, comments(50))
    assert predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=10, resume=True) == 50
    assert names(tmp_path) == ["in.tsv", "out.tsv"]


@contextmanager
def changed(path, content):
    """The file holds something else for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(before)


@pytest.mark.parametrize("suffix", [".tsv", ".parquet"])
def test_a_part_that_is_not_as_it_was_written_is_not_joined(suffix, tmp_path, clf, monkeypatch):
    path, out = write_tsv(tmp_path / "in.tsv", comments(50)), tmp_path / f"out{suffix}"
    predict_file(clf, path, tmp_path / f"expected{suffix}", chunk_rows=10)
    with full_at(monkeypatch, "000003"), pytest.raises(OSError, match="30 finished rows are kept"):
        predict_file(clf, path, out, chunk_rows=10)
    parts = tmp_path / f".out{suffix}.parts"
    part, before = parts / f"part-000001{suffix}", names(parts)
    whole = part.read_bytes()
    for content, said in (
        (whole[:-5], f"{len(whole) - 5} bytes, {len(whole)} were written"), (b"", "it has 0 bytes"),
        (whole.replace("요".encode(), "효".encode(), 1), "its bytes are not those that were written"),
    ):  # fmt: skip
        with changed(part, content), pytest.raises(scale.RunError, match=f"{part.name} is damaged .*{said}") as error:
            predict_file(clf, path, out, chunk_rows=10, resume=True)
        assert "\n" not in str(error.value) and f"remove {parts} to start anew" in str(error.value)
        assert names(parts) == before and not out.exists()
    assert predict_file(clf, path, out, chunk_rows=10, resume=True) == 50
    assert out.read_bytes() == (tmp_path / f"expected{suffix}").read_bytes()


def test_a_journal_of_an_earlier_version_goes_on(tmp_path, clf, monkeypatch):
    path = write_tsv(tmp_path / "in.tsv", comments(50))
    predict_file(clf, path, tmp_path / "expected.tsv", chunk_rows=10)
    with full_at(monkeypatch, "000003"), pytest.raises(OSError, match="30 finished rows are kept"):
        predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=10)
    with sqlite3.connect(tmp_path / ".out.tsv.parts" / "journal.sqlite") as database:
        database.execute("DROP TABLE files")  # it had no sizes and digests of parts
    database.close()
    assert predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=10, resume=True) == 50
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "expected.tsv").read_bytes()


@pytest.mark.parametrize("sizes", [
    {"chunk_rows": 0}, {"chunk_rows": -1}, {"chunk_rows": "a"}, {"chunk_rows": 2.5}, {"chunk_rows": None},
    {"batch_size": 0}, {"batch_size": -4}, {"batch_size": "a"}, {"batch_size": True}, {"batch_size": np.arange(3)},
], ids=str)  # fmt: skip
def test_sizes_that_are_none_are_refused_in_one_line(sizes, tmp_path, clf):
    path, name = write_tsv(tmp_path / "in.tsv", comments(5)), next(iter(sizes))
    with pytest.raises(DataError, match=f"{name}=.* must be a whole number of at least 1") as error:
        predict_file(clf, path, tmp_path / "out.tsv", **sizes)
    assert "\n" not in str(error.value) and names(tmp_path) == ["in.tsv"]
    if name == "chunk_rows":
        with pytest.raises(DataError, match="rows=.* must be a whole number of at least 1"):
            next(read_chunks(path, sizes[name]))
    assert predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=np.int64(3), batch_size=np.int32(4)) == 5


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_that_fills_up_and_is_emptied(small_disk, tmp_path, clf):
    path = write_tsv(tmp_path / "in.tsv", comments(2000))
    predict_file(clf, path, tmp_path / "out.tsv", chunk_rows=200)
    with pytest.raises(OSError, match="finished rows are kept; go on with --resume"):
        predict_file(clf, path, small_disk / "out.tsv", chunk_rows=200)
    assert names(small_disk) == [".out.tsv.parts"]
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    predict_file(clf, path, small_disk / "out.tsv", chunk_rows=200, resume=True)
    assert (small_disk / "out.tsv").read_bytes() == (tmp_path / "out.tsv").read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        predict_file(clf, path, small_disk / "out.tsv", chunk_rows=200)
    assert names(small_disk) == ["out.tsv"]


# --- killed processes, memory ---------------------------------------------------------------------------------------

FORKS = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
from gemma_lora_sentiment import GemmaLoraClassifier
from gemma_lora_sentiment.scale import predict_file

def forked(run, source, out, **settings):  # before JAX has started a thread
    pid = os.fork()
    if pid:
        return pid
    try:
        rows = predict_file(GemmaLoraClassifier.load(run), source, out, **settings)
        print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
        os._exit(0)
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
        os._exit(1)
"""

KILL = (
    FORKS
    + """
run, source, out, times, seed = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
random.seed(seed)
parts, killed = Path(out).parent / ("." + Path(out).name + ".parts"), 0
while True:
    pid, before, wanted = forked(run, source, out, chunk_rows=50, resume=True), None, random.randint(1, 3)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        number = len(list(parts.glob("part-*")))
        before = number if before is None else before
        if killed < times and number >= before + wanted:
            time.sleep(random.random() / 20)
            os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, 0)[1] == signal.SIGKILL:
                killed += 1
            break
        time.sleep(0.002)
    else:
        break
    if not parts.exists() and Path(out).exists():
        break
print("killed", killed)
"""
)

MEMORY = (
    FORKS
    + """
for source in sys.argv[2:]:
    os.waitpid(forked(sys.argv[1], source, source + ".out.tsv", chunk_rows=250), 0)
"""
)


def python(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("times", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed(times, tmp_path, clf, run):
    path = write_tsv(tmp_path / "in.tsv", comments(500 * times))
    predict_file(clf, path, tmp_path / "expected.tsv", chunk_rows=50)
    said = python(KILL, run, path, tmp_path / "out.tsv", times, 7)
    assert f"killed {times}" in said, said
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "expected.tsv").read_bytes()
    assert names(tmp_path) == ["expected.tsv", "in.tsv", "out.tsv"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux gives it, in KiB")
@pytest.mark.slow
def test_memory_is_flat(tmp_path, run):
    sources = [write_tsv(tmp_path / f"{n}.tsv", comments(n)) for n in (10_000, 30_000)]
    small, large = (line.split() for line in python(MEMORY, run, *sources).splitlines())
    assert (small[0], large[0]) == ("10000", "30000")
    grown = (int(large[1]) - int(small[1])) / 1024
    assert grown < 24, f"{grown:.1f} MiB more for three times the rows ({small[1]} and {large[1]} KiB at most)"


def test_one_process_at_a_time(tmp_path, clf):
    path = write_tsv(tmp_path / "in.tsv", comments(20))
    with scale.hold(tmp_path / ".out.tsv.lock", "it"), pytest.raises(scale.RunError, match="Another process"):
        predict_file(clf, path, tmp_path / "out.tsv")


# --- several devices ------------------------------------------------------------------------------------------------

DEVICES = """
import json, os, sys, tempfile, warnings
import jax, keras, numpy as np
from pathlib import Path
from gemma_lora_sentiment import GemmaLoraClassifier
from gemma_lora_sentiment.model import load_base

assert jax.device_count() == 8
preset, folder, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
words = "국물이 진하고 맛있어요 별로예요 또 갈게요 실망했어요 친절해요".split()
rng = np.random.default_rng(0)
comments = [" ".join(rng.choice(words, rng.integers(4, 6))) for _ in range(42)]
labels = [i % 2 for i in range(42)]
common = dict(preset=preset, epochs=2, lora_rank=2, learning_rate=5e-3, batch_size=6, validation_fraction=0.2)
loose = dict(rtol=2e-4, atol=2e-5)

def fitted(**more):
    return GemmaLoraClassifier(**common, **more).fit(comments, labels)

def same(a, b):
    for path, array in a.adapter_.arrays.items():
        assert np.allclose(array, b.adapter_.arrays[path], **loose), path
    assert np.allclose(a.history_.loss, b.history_.loss, **loose)
    assert np.allclose(a.history_.accuracy, b.history_.accuracy)
    assert np.allclose(a.history_.val_loss, b.history_.val_loss, **loose)
    assert np.allclose(a.predict_proba(comments), b.predict_proba(comments), **loose)
"""

EQUAL = (
    DEVICES
    + """
one = fitted()
for devices, strategy, *others in cases:
    several = fitted(devices=devices, strategy=strategy)
    same(one, several)
    assert keras.distribution.distribution() is None
    base = several.fitted_base()
    whole, cut = base.nbytes, sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(base.arrays))
    assert (cut < 0.7 * whole) if strategy == "model" else cut == whole, (cut, whole)
    assert base.fingerprint == one.base_fingerprint_
    assert several.generate(comments[0], 4) == one.generate(comments[0], 4)
    several.save(folder / strategy)
    loaded = GemmaLoraClassifier.load(folder / strategy)
    assert loaded.devices is None
    expected = several.predict_proba(comments)
    assert np.allclose(loaded.predict_proba(comments), expected, **loose)
    for other in others:
        loaded = GemmaLoraClassifier.load(folder / strategy, devices=other, strategy=strategy)
        assert np.allclose(loaded.predict_proba(comments), expected, **loose)
print("equal")
"""
)

RESUMED = """
class Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if os.environ.get("STOP") and int(os.environ["STOP"]) == batch and self.epoch == 1:
            raise KeyboardInterrupt

from gemma_lora_sentiment import training
training.CHECKPOINT_SECONDS = 0  # at every step
whole = fitted(callbacks=[Stop()])
for number, (before, after) in enumerate(json.loads(sys.argv[4])):
    before, after = (dict(zip(("devices", "strategy"), each)) for each in (before, after))
    os.environ["STOP"] = "2"
    try:
        fitted(callbacks=[Stop()], checkpoint_dir=folder / f"{number}", **before)
        raise SystemExit("it was not stopped")
    except KeyboardInterrupt:
        del os.environ["STOP"]
    assert keras.distribution.distribution() is None
    assert len(list((folder / f"{number}").glob("fit-*/checkpoint.json"))) == 1
    again = fitted(callbacks=[Stop()], checkpoint_dir=folder / f"{number}", **after)
    assert len(list((folder / f"{number}").glob("fit-*/checkpoint.json"))) == 1
    same(whole, again)
print("resumed")
"""


def on_devices(code, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("bases") / "tiny")


def equal_and_resumed(tiny, folder, equal, resumed):  # in one process, which compiles each program once
    said = on_devices(EQUAL + RESUMED, tiny, folder, json.dumps(equal), json.dumps(resumed))
    assert "equal" in said and "resumed" in said


def test_eight_devices_equal_one_and_checkpoints_go_on_on_others(tiny, tmp_path):
    resumed = [((8, "data"), (2, "model")), ((2, "model"), (2, "model"))]
    equal_and_resumed(tiny, tmp_path, [(8, "data"), (2, "model")], resumed)


@pytest.mark.slow
def test_other_numbers_of_devices(tiny, tmp_path):
    equal = [(5, "data", 8), (8, "model", 2), (["cpu:3", "cpu:5", "cpu:6"], "auto", 4)]
    equal_and_resumed(tiny, tmp_path, equal, [((4, "data"), (4, "data")), ((2, "model"), ()), ((), (8, "data"))])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_other_families_on_eight_devices(family, tmp_path):
    preset = tiny_gemma(tmp_path / family, family)
    assert "equal" in on_devices(EQUAL, preset, tmp_path, json.dumps([(8, "data"), (2, "model")]))


# --- several hosts --------------------------------------------------------------------------------------------------

HOSTS = (
    """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[5], 2, int(sys.argv[4]))
"""
    + DEVICES.replace("jax.device_count() == 8", "jax.device_count() == 4 and jax.local_device_count() == 2")
    + """
from gemma_lora_sentiment import scale, training
from gemma_lora_sentiment.training import BatchSequence

rank, given = jax.process_index(), []
own, first = folder / f"host{rank}", folder / "host0"  # a disk that the other host does not see
real = BatchSequence.__getitem__

def watched(self, index):
    batch = real(self, index)
    given.append(len(batch[1]))
    return batch

BatchSequence.__getitem__ = watched
one = fitted()
assert len(set(given)) == 1
for strategy in cases:
    given.clear()
    several = fitted(strategy=strategy)
    parts = {"data": 2, "model": 1}[strategy]  # devices of a host that have lines of their own
    assert len(set(given)) == 1 and given[0] % parts == 0, given  # each host feeds its half of every batch
    same(one, several)
    base = several.fitted_base()
    cut = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(base.arrays))
    assert (cut < 0.7 * base.nbytes) if strategy == "model" else cut == base.nbytes, (cut, base.nbytes)
    assert base.processes == 2 and base.fingerprint == one.base_fingerprint_
    assert len(cases) == 1 or several.generate(comments[0], 4) == one.generate(comments[0], 4)
    several.save(own / strategy)  # returns when the first has written
    assert (own / strategy).exists() == (rank == 0)
    loaded = GemmaLoraClassifier.load(first / strategy, strategy=strategy)
    assert np.allclose(loaded.predict_proba(comments), one.predict_proba(comments), **loose)

if len(cases) == 1:
    print("hosts", rank)
    raise SystemExit

class Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if os.environ.get("STOP") and batch == 2 and self.epoch == 1:
            raise KeyboardInterrupt

training.CHECKPOINT_SECONDS = 0  # at every step
os.environ["STOP"] = "yes"
try:
    fitted(strategy="data", callbacks=[Stop()], checkpoint_dir=own / "fits")
    raise SystemExit("it was not stopped")
except KeyboardInterrupt:
    del os.environ["STOP"]
assert len(list((first / "fits").glob("fit-*/checkpoint.json"))) == 1
given.clear()
same(one, fitted(strategy="data", callbacks=[Stop()], checkpoint_dir=own / "fits"))
assert 0 < len(given) < 8, given  # it went on, on both
assert rank == 0 or not (own / "fits").exists()

if rank == 0:
    (own / "file").touch()
for call, said in (
    (lambda: fitted(strategy="data", checkpoint_dir=own / "file" / "fits"), OSError),  # of the first, on both
    (lambda: fitted(devices=2, strategy="data"), ValueError),
    (lambda: scale.predict_file(loaded, sys.argv[6], own / "out.tsv"), scale.RunError),
):
    try:
        call()
        raise SystemExit("no error")
    except said as error:
        print(rank, error)
print("hosts", rank)
"""
)


@pytest.mark.parametrize("cases", [["data"], pytest.param(["data", "model"], marks=pytest.mark.slow)])
def test_two_hosts_equal_one_device(cases, tiny, tmp_path):
    path = write_tsv(tmp_path / "in.tsv", comments(10))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    (tmp_path / "host0").mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOSTS, tiny, str(tmp_path), json.dumps(cases), str(rank), address, str(path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0 and f"hosts {rank}" in said[rank], said[rank][-3000:]
        if len(cases) > 1:
            assert "leaves out some of the 4 devices of 2 processes" in said[rank]
            assert "A file is scored by one process" in said[rank]
    assert names(tmp_path / "host0") == (["data"] if len(cases) == 1 else ["data", "file", "fits", "model"])
    assert names(tmp_path) == ["host0", "in.tsv"]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"devices": 0}, "devices=0"),
        ({"devices": 10_000}, "JAX sees"),
        ({"devices": "cpu:0"}, "must be None, a number, or a list"),
        ({"devices": ["tpu:77"]}, "'tpu:77' is not there"),
        ({"devices": []}, "none is"),
        ({"devices": ["cpu:0", "cpu:0"]}, "named twice"),
        ({"strategy": "pipeline"}, "'auto', 'data', 'model'"),
    ],
)
def test_devices_that_cannot_be_used(parameters, said, tiny):
    with pytest.raises(ValueError, match=said):
        GemmaLoraClassifier(tiny, epochs=1, **parameters).fit(comments(4), [0, 1, 0, 1])


def test_one_device_is_what_it_always_was(tiny):
    plain = GemmaLoraClassifier(tiny, epochs=1, lora_rank=2).fit(comments(8), [0, 1] * 4)
    named = GemmaLoraClassifier(tiny, epochs=1, lora_rank=2, devices=1, strategy="model").fit(comments(8), [0, 1] * 4)
    assert plain.fitted_base() is named.fitted_base()


# --- Ray ------------------------------------------------------------------------------------------------------------

RAY = """
import os, signal, sys
from pathlib import Path
from gemma_lora_sentiment import GemmaLoraClassifier, scale
import ray

folder, marker = Path(sys.argv[1]), Path(sys.argv[2]) / "killed"

class Dying(scale._RayWorker):
    def score(self, comments):
        if comments[0].endswith(" 120") and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(comments)

scale._RayWorker = Dying
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
rows = scale.predict_file(
    GemmaLoraClassifier.load(folder), Path(sys.argv[2]) / "in.tsv", Path(sys.argv[2]) / "ray.tsv", chunk_rows=40,
    score=scale.ray_workers(2),
)
more = scale.predict_file(
    GemmaLoraClassifier.load(folder), Path(sys.argv[2]) / "in", Path(sys.argv[2]) / "folder.tsv", chunk_rows=20,
    score=scale.ray_workers(2),
)
ray.shutdown()
print("rows", rows, more)
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_with_a_killed_worker_gives_the_same_bytes(tmp_path, clf, run):
    path = write_tsv(tmp_path / "in.tsv", comments(400))
    predict_file(clf, path, tmp_path / "here.tsv", chunk_rows=40)
    predict_file(clf, write_folder(tmp_path / "in", comments(90)), tmp_path / "folder_here.tsv", chunk_rows=20)
    assert "rows 400 90" in python(RAY, run, tmp_path)
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "ray.tsv").read_bytes() == (tmp_path / "here.tsv").read_bytes()
    assert (tmp_path / "folder.tsv").read_bytes() == (tmp_path / "folder_here.tsv").read_bytes()
    assert names(tmp_path) == ["folder.tsv", "folder_here.tsv", "here.tsv", "in", "in.tsv", "killed", "ray.tsv"]


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_ray_that_is_not_installed_is_one_line(tmp_path, clf):
    with pytest.raises(scale.RunError, match=r"Install gemma_lora_sentiment\[ray\]"):
        scale.ray_workers()
