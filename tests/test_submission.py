"""What would bore a reader of 07_submission: samples of all kinds, folders that cannot be written, the real sample."""

import gzip
import json
import os
import re
import unicodedata
import warnings
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gemma_lora_sentiment import submission
from gemma_lora_sentiment.data import DataError, Reading
from gemma_lora_sentiment.submission import (
    check_output,
    check_submission,
    reading_of_sample,
    sample_comments,
    write_submission,
)
from gemma_lora_sentiment.tables import Dialect, packed, unpacked

REAL = Path(__file__).parents[2] / "shared" / "data" / "tarr_sample_submit.txt"
needs_real_file = pytest.mark.skipif(not REAL.exists(), reason="the tutorial's sample file is absent")
SAMPLE = "id\tcomment\tlabel\r\n3\t굿\t0\r\n1\t별로\t0\r\n2\t\"처음\t0"


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sample.txt").write_bytes(SAMPLE.encode())


def written(predictions, sample="sample.txt", out="out.txt"):
    return write_submission(predictions, sample, out).read_bytes().decode()


def labels_written(predictions, sample="sample.txt"):
    return [line.split("\t")[-1] for line in written(predictions, sample).splitlines()[1:]]


BY_ID = {"3": 1, "1": 0, "2": 1}
FORMS = {
    "list": [1, 0, 1],
    "tuple": (1, 0, 1),
    "array": np.array([1, 0, 1]),
    "array of strings": np.array(["1", "0", "1"]),
    "array of objects": np.array([1, "0", True], dtype=object),
    "bools": [True, False, True],
    "numpy bools": np.array([True, False, True]),
    "floats": [1.0, 0.0, 1.0],
    "int8": np.array([1, 0, 1], dtype=np.int8),
    "generator": (label for label in (1, 0, 1)),
    "dict": BY_ID,
    "dict with int ids": {1: 0, 2: 1, 3: 1},
    "series in order": pd.Series([1, 0, 1]),
    "series by id": pd.Series({1: 0, 2: 1, 3: 1}),
    "series by text": pd.Series(BY_ID),
    "nullable series": pd.Series([1, 0, 1], dtype="Int64"),
    "categorical": pd.Series(["1", "0", "1"], dtype="category"),
    "table": pd.DataFrame({"id": ["1", "2", "3"], "label": ["0", "1", "1"]}),
    "table with float ids": pd.DataFrame({"id": [1.0, 2.0, 3.0], "label": [0, 1, 1]}),
    "table of predict": pd.DataFrame({"id": [1, 2, 3], "comment": list("abc"), "label": [0, 1, 1], "p_1": [0.1, 1, 1]}),
    "table with the ids as its index": pd.DataFrame({"label": [0, 1, 1]}, index=pd.Index([1, 2, 3], name="ID")),
    "table with the ids as its unnamed index": pd.DataFrame({"label": [0, 1, 1]}, index=[1, 2, 3]),
    "table in order with rows taken out": pd.DataFrame({"label": [1, 0, 1]}, index=[5, 8, 9]),
    "table without ids": pd.DataFrame({"label": [1, 0, 1]}),
}


@pytest.mark.parametrize("predictions", FORMS.values(), ids=FORMS)
def test_every_form_of_predictions_writes_the_same_file(predictions):
    assert written(predictions) == 'id\tcomment\tlabel\n3\t굿\t1\n1\t별로\t0\n2\t"처음\t1\n'
    assert sorted(os.listdir()) == ["out.txt", "sample.txt"]


MISFITS = {
    "too few": ([1, 0], "2 predictions for 3 rows of sample.txt"),
    "too many": ([1, 0, 1, 1], "4 predictions for 3 rows"),
    "none": ([], "0 predictions for 3 rows"),
    "missing id": ({1: 0, 2: 1}, "no prediction for id '3'"),
    "no table rows": (pd.DataFrame({"id": [], "label": []}), "no prediction for id '3', '1', '2'"),
    "extra id": ({**BY_ID, "9": 1}, "a prediction for unknown id '9'"),
    "many extra": (dict.fromkeys(range(100), 1), "unknown id '0', '4', '5', '6', '7' and 92 more"),
    "twice": (pd.DataFrame({"id": [1, 1, 2, 3], "label": 0}), "more than one prediction for id '1'"),
    "twice in types": ({1: 0, "1": 1, 2: 0, 3: 0}, "more than one prediction for id '1'"),
    "no label column": (pd.DataFrame({"id": [1, 2, 3], "p_1": [0, 1, 1]}), "no column label among id, p_1"),
    "probabilities": (np.zeros((3, 2)), "have the shape (3, 2)"),
    "scores": ([0.1, 0.9, 0.5], "prediction for id '3': label '0.1' does not fit the sample's labels (0)"),
    "words": (["positive", "0", "1"], "label 'positive' does not fit"),
    "None": ([1, None, 0], "prediction for id '1': the label is missing"),
    "NaN": ([1, 0, np.nan], "prediction for id '2': the label is missing"),
    "NA": (pd.array([1, pd.NA, 0], dtype="Int64"), "the label is missing"),
    "empty": (["1", "", "0"], "the label is missing"),
    "nested": ([[1], [0], [1]], "the label is missing"),
}


@pytest.mark.parametrize("predictions, message", MISFITS.values(), ids=MISFITS)
def test_misfits_are_one_line_and_leave_nothing(predictions, message):
    Path("out.txt").write_text("an earlier submission")
    with pytest.raises(DataError) as caught:
        write_submission(predictions, "sample.txt", "out.txt")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert Path("out.txt").read_text() == "an earlier submission"
    assert sorted(os.listdir()) == ["out.txt", "sample.txt"]


def test_what_is_no_sequence_is_a_type_error():
    for predictions in ("101", b"101", 5, None):
        with pytest.raises(TypeError, match="one a row"):
            write_submission(predictions, "sample.txt", "out.txt")


def test_series_whose_index_is_the_ids():
    sample = pd.DataFrame({"id": [2, 0, 1], "comment": list("abc"), "label": [0, 0, 0]})
    assert labels_written(pd.Series([0, 1, 1], index=[0, 1, 2]), sample) == ["1", "0", "1"]
    named = pd.Series([0, 1, 1], index=pd.RangeIndex(3, name="id"))
    assert labels_written(named, sample) == ["1", "0", "1"]


def test_what_pandas_numbers_by_itself_are_no_ids():
    """Most often it is `pd.Series(clf.predict(...))`, in the sample's order."""
    sample = pd.DataFrame({"id": [2, 0, 1], "comment": list("abc"), "label": [0, 0, 0]})
    assert labels_written(pd.Series([0, 1, 1]), sample) == ["0", "1", "1"]
    assert labels_written(pd.Series([1, 1, 0, 1, 1])[2:], sample.assign(id=[4, 2, 3])) == ["1", "0", "1"]


@pytest.mark.parametrize(
    "sample_labels, predictions, expected",
    [
        ([0, 0, 0], [1, 0, 1], ["1", "0", "1"]),
        ([False, False, False], [1, 0, True], ["True", "False", "True"]),
        ([0.0, 0.0, 0.0], [1, 0, "1"], ["1.0", "0.0", "1.0"]),
        (["00", "00", "00"], [1, 0, 12], ["01", "00", "12"]),
        (["1", "01", "10"], [1, 10, "01"], ["1", "10", "01"]),
        (["부정", "부정", "부정"], ["긍정", "부정", "긍정"], ["긍정", "부정", "긍정"]),
        (["neg", "pos", "neg"], ["POS", "neg", "pos "], ["pos", "neg", "pos"]),
        ([None, None, None], ["a", 1, True], ["a", "1", "True"]),
        (["-1", "1", "1"], [-1, 1, 1.0], ["-1", "1", "1"]),
        (["0", "0", "0"], ["0.0", "1.0", "1.00"], ["0", "1", "1"]),
        (["0.0", "1.0", "0.0"], ["0", 1, "1.0"], ["0.0", "1.0", "1.0"]),
        (["True", "False", "True"], ["1.0", "0.0", "0"], ["True", "False", "False"]),
        (["부정", "긍정", "부정"], [unicodedata.normalize("NFD", "긍정"), "부정", "긍정"], ["긍정", "부정", "긍정"]),
    ],
    ids=str,
)
def test_labels_as_the_sample_writes_them(sample_labels, predictions, expected):
    labels = pd.Series(sample_labels, dtype=object)
    sample = pd.DataFrame({"id": [1, 2, 3], "comment": list("abc"), "label": labels})
    assert labels_written(predictions, sample) == expected
    if None not in sample_labels:
        assert labels_written(predictions, sample.infer_objects()) == expected


def test_header_order_and_further_columns_are_the_samples():
    sample = 'Label,kind,Text,Idx\n0,x,"맛은\n좋고,\t또 ""올게""요",07\n1, y ,  굿  ,8\n'
    Path("a.csv").write_text(sample, encoding="utf-8")
    assert written({"07": 1, 8: 0}, "a.csv") == sample.replace("\n0,x", "\n1,x").replace("\n1, y", "\n0, y")


def test_comments_are_written_as_they_stand():
    odd = "a\u2028b\x85c  d\x0b\"e\\n'f 👍\u200d"
    Path("a.tsv").write_bytes(f"id\tcomment\tlabel\n1\t{odd}\t0\n".encode())
    assert written([1], "a.tsv") == f"id\tcomment\tlabel\n1\t{odd}\t1\n"


def test_samples_without_ids_or_labels():
    Path("lines.txt").write_text("굿\n별로\n", encoding="utf-8")
    assert written([1, 0], "lines.txt") == "comment\tlabel\n굿\t1\n별로\t0\n"
    assert written({1: 1, 2: 0}, "lines.txt") == "comment\tlabel\n굿\t1\n별로\t0\n"
    Path("ids.tsv").write_text("id\ttext\n5\t굿\n", encoding="utf-8")
    assert written(["pos"], "ids.tsv") == "id\ttext\tlabel\n5\t굿\tpos\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["s.txt", "s.csv", "s.jsonl", "s.json"])
def test_a_submission_is_in_the_encoding_of_its_sample(name, encoding):
    text = {
        "s.txt": "id\tcomment\ty\n7\t굿\t0\n9\t음\t0\n", "s.csv": "id;comment;y\n7;굿;0\n9;음;0\n",
        "s.jsonl": '{"id": 7, "comment": "굿", "y": 0}\n{"id": 9, "comment": "음", "y": 0}\n',
        "s.json": '[{"id": 7, "comment": "굿", "y": 0}, {"id": 9, "comment": "음", "y": 0}]\n',
    }[name]  # fmt: skip
    Path(name).write_bytes(text.encode(encoding))
    out = f"o{Path(name).suffix}"
    write_submission([0, 1], name, out)
    assert Path(out).read_bytes() == ("1".join(text.rsplit("0", 1))).encode(encoding)
    assert check_submission(out, name)["value"].tolist() == [2, 1, 1]


@pytest.mark.parametrize("given", ["utf-8", "utf-8-sig", "UTF8"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_there_where_it_was(mark, given):
    Path("s.csv").write_text(f"{mark}id,댓글,y\n7,굿,0\n", encoding="utf-8")
    write_submission([1], "s.csv", "o.csv", reading=Reading(Dialect(encoding=given)))
    assert Path("o.csv").read_text("utf-8") == f"{mark}id,댓글,y\n7,굿,1\n"


def test_a_label_that_the_encoding_of_the_sample_does_not_have():
    Path("s.csv").write_bytes("id,댓글,label\n7,굿,\n".encode("cp949"))
    with pytest.raises(DataError, match=r"s\.csv: '👍' cannot be written in cp949.*Map the labels"):
        write_submission(["👍"], "s.csv", "o.csv")
    Path("s.jsonl").write_bytes('{"id": 7, "댓글": "굿\\ud83d\\udc4d", "label": null}\n'.encode("cp949"))
    write_submission(["👍"], "s.jsonl", "o.jsonl")  # JSON has another way to write it
    assert json.loads(Path("o.jsonl").read_bytes().decode("cp949")) == {"id": 7, "댓글": "굿👍", "label": "👍"}
    assert not Path("o.csv").exists()


def test_bad_sample():
    with pytest.raises(DataError, match="no such file"):
        write_submission([1], "nothing.txt", "out.txt")
    Path("twice.txt").write_text("id\tcomment\tlabel\n1\ta\t0\n1\tb\t0\n")
    with pytest.raises(DataError, match="twice.txt line 3: id '1' stands already in line 2"):
        write_submission([1, 1], "twice.txt", "out.txt")
    assert not Path("out.txt").exists()


def test_default_name_is_the_tutorials():
    path = write_submission(BY_ID, "sample.txt", now=datetime(2024, 3, 9, 1, 2, 3))
    assert path == Path("tarr_my_submit_20240309_010203.txt") and path.exists()
    assert re.fullmatch(r"tarr_my_submit_\d{8}_\d{6}\.txt", write_submission(BY_ID, "sample.txt").name)


def test_folders_that_cannot_be_written():
    Path("folder").mkdir()
    before = sorted(os.listdir())
    for out in ("folder", "nowhere/out.txt", "sample.txt/out.txt", "/proc/out.txt"):
        with pytest.raises(OSError):
            write_submission(BY_ID, "sample.txt", out)
    assert sorted(os.listdir()) == before and os.listdir("folder") == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_locked_folder():
    Path("locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        write_submission(BY_ID, "sample.txt", "locked/out.txt")


def test_interrupted_rename_keeps_the_earlier_file(monkeypatch):
    Path("out.txt").write_text("an earlier submission")

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma_lora_sentiment.data.os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_submission(BY_ID, "sample.txt", "out.txt")
    assert Path("out.txt").read_text() == "an earlier submission"
    assert sorted(os.listdir()) == ["out.txt", "sample.txt"]


def test_the_file_is_checked_before_it_gets_its_name(monkeypatch):
    def refuse(path, sample, **more):
        assert more["packing"] == ""
        assert Path(path).read_text(encoding="utf-8").count("\n") == 4
        raise DataError("refused.")

    monkeypatch.setattr(submission, "check_submission", refuse)
    with pytest.raises(DataError, match="refused"):
        write_submission(BY_ID, "sample.txt", "out.txt")
    assert os.listdir() == ["sample.txt"]


def test_file_mode_is_that_of_other_files():
    Path("other.txt").write_text("")
    path = write_submission(BY_ID, "sample.txt", "out.txt")
    assert path.stat().st_mode == Path("other.txt").stat().st_mode


def test_sample_can_be_overwritten_by_its_submission():
    assert written(BY_ID, out="sample.txt") == 'id\tcomment\tlabel\n3\t굿\t1\n1\t별로\t0\n2\t"처음\t1\n'


FORMS_OF_SAMPLES = {  # name: (text of the sample, its text with the labels 1 and 0)
    "comma.csv": ('id,text,target\n7,"국, 정말",0\n9,굿,0\n', 'id,text,target\n7,"국, 정말",1\n9,굿,0\n'),
    "bom.csv": ("\ufeffid,target\r\n7,0\r\n9,0", "\ufeffid,target\n7,1\n9,0\n"),
    "all.csv": ('"id";"y"\n"7";"0"\n"9";"0"\n', '"id";"y"\n"7";"1"\n"9";"0"\n'),
    "order.txt": ("target|id\n0|7\n0|9\n", "target|id\n1|7\n0|9\n"),
    "quoted.tsv": ('id\ttext\ty\n7\t"두\n줄 ""x"""\t0\n9\t"굿\t0\n', 'id\ttext\ty\n7\t"두\n줄 ""x"""\t1\n9\t"굿\t0\n'),
    "added.csv": ('id,"text"\n7,굿\n9,음\n', 'id,"text",label\n7,굿,1\n9,음,0\n'),
    "gaps.csv": ("id,target\n7,0\n\n,\n9,0\n", "id,target\n7,1\n9,0\n"),
    "array.json": ('[{"id": 7, "y": 0}, {"id": 9, "y": 0}]', '[{"id": 7, "y": 1}, {"id": 9, "y": 0}]\n'),
    "truth.jsonl": (
        '{"y": false, "id": "7"}\n{"y": true, "id": "9"}\n', '{"y": true, "id": "7"}\n{"y": false, "id": "9"}\n'
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS_OF_SAMPLES)
def test_a_submission_has_the_form_of_its_sample(name):
    text, expected = FORMS_OF_SAMPLES[name]
    Path(name).write_bytes(text.encode())
    out = f"out{Path(name).suffix}"
    for predictions in ([1, 0], {"7": 1, "9": 0}):
        path = write_submission(predictions, name, out)
        assert path.read_bytes().decode() == expected
        assert check_submission(path, name)["value"]["rows"] == 2
    Path(out).write_bytes(expected.replace("7", "8").encode())
    with pytest.raises(DataError, match=f"^{re.escape(out)} (line|row) .*'8' where {name} has '7'"):
        check_submission(out, name)


@pytest.mark.parametrize("suffix", [".xlsx", ".parquet"])
def test_typed_samples_keep_their_types_and_columns(suffix):
    table = pd.DataFrame({"id": [7, 9], "extra": ["a", None], "label": [0, 0]})
    writer, reader = (f"to_{suffix[1:]}", pd.read_parquet) if suffix == ".parquet" else ("to_excel", pd.read_excel)
    getattr(table, writer)(f"sample{suffix}", index=False)
    path = write_submission(["1", "0"], f"sample{suffix}", f"out{suffix}")
    found = reader(path)
    assert found.astype(object).where(found.notna(), None).to_numpy().tolist() == [[7, "a", 1], [9, None, 0]]
    with pytest.raises(DataError, match="Give the file the sample's suffix"):
        write_submission(["1", "0"], f"sample{suffix}", "out.csv")
    assert not Path("out.csv").exists()


def test_a_name_that_promises_another_format_is_refused():
    Path("s.csv").write_text("id,target\n7,0\n")
    assert write_submission([1], "s.csv", now=datetime(2024, 1, 1)).name == "tarr_my_submit_20240101_000000.csv"
    for out in ("o.tsv", "o.jsonl", "o.parquet", "o.xlsx", "o.tab"):
        with pytest.raises(DataError, match=f"^{out}: the sample is ','-separated UTF-8"):
            write_submission([1], "s.csv", out)
    for out in ("o.csv", "o.txt", "o", "o.sub"):
        assert write_submission([1], "s.csv", out).read_text() == "id,target\n7,1\n"
    assert sorted(os.listdir()) == sorted(
        ["o", "o.csv", "o.sub", "o.txt", "s.csv", "sample.txt", "tarr_my_submit_20240101_000000.csv"]
    )


def test_comments_of_another_file_by_order():
    Path("ids.csv").write_text("id,target\n7,0\n9,0\n")
    Path("lines.txt").write_text("굿\n음\n", encoding="utf-8")
    assert sample_comments("ids.csv", "lines.txt", say=print) == ["굿", "음"]
    Path("lines.txt").write_text("굿\n음\n또\n", encoding="utf-8")
    with pytest.raises(DataError, match="lines.txt: 3 comments for the 2 rows of ids.csv, and no ids"):
        sample_comments("ids.csv", "lines.txt")
    Path("texts.csv").write_text("번호,본문\n9,음\n7,굿\n", encoding="utf-8")
    reading = Reading(id_column="번호", comment_column="본문")
    assert sample_comments("ids.csv", "texts.csv", reading) == ["굿", "음"]  # the id column is that of one file
    with pytest.raises(DataError, match="no column '본문' among 'id', 'target'"):
        sample_comments("ids.csv", "texts.csv", reading._replace(label_column="본문"))
    with pytest.raises(DataError, match="no column '숫자' among 'id', 'target'"):
        sample_comments("ids.csv", "texts.csv", reading._replace(id_column="숫자"))
    Path("own.csv").write_text("번호,target\n7,0\n9,0\n", encoding="utf-8")
    assert sample_comments("own.csv", "texts.csv", reading) == ["굿", "음"]


WRONG_FILES = {
    "header": ("ID\tcomment\tlabel\n3\t굿\t1\n", "line 1: the columns are ID, comment, label where sample.txt has id,"),
    "columns": ("id\tlabel\n3\t1\n", "line 1: the columns are id, label"),
    "order": ("id\tcomment\tlabel\n1\t별로\t0\n3\t굿\t1\n", "line 2: id '1' where sample.txt has '3'"),
    "comment": ('id\tcomment\tlabel\n3\t굿\t1\n1\t별로!\t0\n2\t"처음\t1', "line 3: comment '별로!' where sample.txt"),
    "rows": ("id\tcomment\tlabel\n3\t굿\t1\n", "1 rows where sample.txt has 3"),
    "more": (SAMPLE + "\n4\t또\t1\n", "4 rows where sample.txt has 3"),
    "label": (SAMPLE[:-1] + "긍정", "line 4: label '긍정' does not fit the sample's labels (0)"),
    "float": (SAMPLE[:-1] + "1.0", "line 4: label '1.0' does not fit"),
    "empty label": (SAMPLE[:-1], "line 4: the label is missing"),
    "index": ("\tid\tcomment\tlabel\n0\t3\t굿\t1\n", "line 1: the columns are column 1, id, comment, label"),
    "commas": ("id,comment,label\n3,굿,1\n", "line 1: the columns are id,comment,label where"),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize("text, message", WRONG_FILES.values(), ids=WRONG_FILES)
def test_check_finds_what_differs(text, message):
    Path("mine.txt").write_bytes(text.encode())
    with pytest.raises(DataError) as caught:
        check_submission("mine.txt", "sample.txt")
    assert message in str(caught.value) and str(caught.value).startswith("mine.txt")
    assert len(str(caught.value).splitlines()) == 1


def test_check_wants_utf8_and_accepts_crlf():
    table = check_submission("sample.txt", "sample.txt")
    assert table["value"].to_dict() == {"rows": 3, "rows of label 0": 3}
    Path("mine.txt").write_bytes(SAMPLE.encode("cp949"))
    with pytest.raises(DataError, match="mine.txt: not utf-8 at byte"):
        check_submission("mine.txt", "sample.txt")


@needs_real_file
def test_real_sample():
    predictions = np.arange(100) % 2
    path = write_submission(predictions, REAL, "out.txt")
    sample_rows = REAL.read_bytes().decode().split("\r\n")
    rows = path.read_bytes().decode().split("\n")
    assert rows[0] == sample_rows[0] and rows[-1] == "" and len(rows) == 102
    assert [row.rpartition("\t")[0] for row in rows[1:-1]] == [row.rpartition("\t")[0] for row in sample_rows[1:]]
    assert [row.rpartition("\t")[2] for row in rows[1:-1]] == [str(label) for label in predictions]
    assert check_submission(path, REAL)["value"].tolist() == [100, 50, 50]
    assert len(pd.read_csv(path, sep="\t")) == 100


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_comments_of_another_file_are_matched_by_an_id_of_any_unicode_form(form, tmp_path):
    (tmp_path / "s.csv").write_text("번호,target\n7,0\n9,0\n", encoding="utf-8")
    (tmp_path / "t.csv").write_text("번호,댓글\n9,구번\n7,칠번\n", encoding="utf-8")
    reading = Reading(id_column=unicodedata.normalize(form, "번호"))
    assert sample_comments(tmp_path / "s.csv", tmp_path / "t.csv", reading) == ["칠번", "구번"]


# --- what the name of the output promises ---------------------------------------------------------------------------

TABLE = pd.DataFrame({"id": [7, 9], "comment": ["=1+1, 굿", "음"], "label": [0, 0]})
PACKINGS = [".gz", ".xz", ".bz2", ".zst", ".zip"]


def inside(path):
    """The bytes of a packed file by the standard library where it can, and the name inside an archive."""
    if Path(path).suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            (name,) = archive.namelist()
            return archive.read(name), name
    return (gzip.decompress(Path(path).read_bytes()) if Path(path).suffix == ".gz" else unpacked(Path(path))), None


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["file", "table", "lines"])
def test_packed_names_get_packed_files(kind, packing):
    Path("s.csv").write_text("id,target\n7,0\n9,0\n")
    Path("l.txt").write_text("굿\n음\n", encoding="utf-8")
    sample = {"file": "s.csv", "table": TABLE[["id", "label"]], "lines": "l.txt"}[kind]
    for begin in ("o.csv", "o"):
        path = write_submission([1, 0], sample, begin + packing)
        content, name = inside(path)
        usual = ".csv" if begin == "o.csv" or kind == "file" else ".txt"
        assert name in (None, f"o{usual}")
        mark = "," if usual == ".csv" else "\t"
        assert content.decode("utf-8-sig").splitlines()[1].endswith(f"{mark}1")
        format = {".csv": "csv", ".txt": "tsv"}[usual] if kind != "file" else None
        assert check_submission(path, sample, format=format)["value"]["rows"] == 2


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".xlsx", ".parquet"])
def test_samples_that_are_packed(suffix, packing):
    plain = Path(f"plain{suffix}")
    write_submission([0, 0], TABLE, plain)
    Path(f"s{suffix}{packing}").write_bytes(packed(plain.read_bytes(), packing, plain.name))
    for out in (f"o{suffix}{packing}", f"o{suffix}"):
        path = write_submission([1, 0], f"s{suffix}{packing}", out)
        Path("again" + suffix).write_bytes(unpacked(path))
        if suffix == ".xlsx":
            assert pd.read_excel(f"again{suffix}")["label"].tolist() == [1, 0]
        elif suffix == ".parquet":
            assert pd.read_parquet(f"again{suffix}")["label"].tolist() == [1, 0]
        else:
            assert check_submission(f"again{suffix}", plain)["value"].tolist() == [2, 1, 1]
    assert write_submission([1, 0], f"s{suffix}{packing}").suffix == (".txt" if suffix == ".tsv" else suffix)


def test_a_table_becomes_what_the_name_says():
    write_submission([1, 0], TABLE, "o.json")
    assert json.loads(Path("o.json").read_text("utf-8")) == TABLE.assign(label=[1, 0]).to_dict("records")
    write_submission([1, 0], TABLE, "o.jsonl")
    assert [json.loads(line)["label"] for line in Path("o.jsonl").read_text("utf-8").splitlines()] == [1, 0]
    write_submission(["긍정", "부정"], TABLE.drop(columns="label"), "o.xlsx")
    assert pd.read_excel("o.xlsx").to_numpy().tolist() == [[7, "=1+1, 굿", "긍정"], [9, "음", "부정"]]
    write_submission([1, 0], TABLE, "o.parquet")
    assert pd.read_parquet("o.parquet")["label"].tolist() == [1, 0]
    Path("l.txt").write_text("굿\n음\n", encoding="utf-8")
    for out in ("l.json", "l.xlsx", "l.parquet", "l.jsonl", "l.csv", "l.tsv", "l", "l.sub"):
        write_submission(["1", "0"], "l.txt", out)
    rows = [{"comment": "굿", "label": "1"}, {"comment": "음", "label": "0"}]
    assert json.loads(Path("l.json").read_text("utf-8")) == rows
    assert pd.read_excel("l.xlsx", dtype=str)["label"].tolist() == ["1", "0"]
    assert Path("l.sub").read_bytes() == Path("l.tsv").read_bytes() == Path("l").read_bytes()


@pytest.mark.parametrize("out", ["o.xls", "o.xlsm", "o.ods", "o.7z", "o.tar", "o.html", "o.XLS", "o.xls.gz"])
def test_names_of_formats_that_are_not_written_are_refused(out):
    Path("s.csv").write_text("id,target\n7,0\n9,0\n")
    Path("l.txt").write_text("굿\n음\n", encoding="utf-8")
    before = sorted(os.listdir())
    said = rf"^{re.escape(out)}: no \.\w+ is written\. Give the file the suffix \.\w+"
    for sample, labels in (("s.csv", [1, 0]), (TABLE, [1, 0]), ("l.txt", [1, 0]), ("sample.txt", [1, 0, 1])):
        for refuse in (lambda: write_submission(labels, sample, out), lambda: check_output(out, sample)):  # noqa: B023
            with pytest.raises(DataError, match=said):
                refuse()
    assert sorted(os.listdir()) == before


def test_json_lines_and_arrays_are_two_formats():
    Path("s.jsonl").write_text('{"id": 7, "label": 0}\n')
    Path("s.json").write_text('[{"id": 7, "label": 0}]')
    Path("lines.json").write_text('{"id": 7, "label": 0}\n')
    for sample, out in (("s.jsonl", "o.json"), ("s.json", "o.jsonl"), ("s.json", "o.ndjson")):
        with pytest.raises(DataError, match=f"^{out}: the sample is (a JSON array|JSON lines), UTF-8. Give the file"):
            write_submission([1], sample, out)
    assert json.loads(write_submission([1], "lines.json", "o.json").read_text())["label"] == 1  # as it was given
    assert write_submission([1], "s.jsonl", "o.ndjson").read_text() == '{"id": 7, "label": 1}\n'


# --- labels with types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_nested_label_is_filled_where_it_stands(suffix, form):
    rows = [{"id": n, "data": {"text": "굿", "값": 0, "more": [1]}} for n in (7, 9)]
    text = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)
    Path(f"s{suffix}").write_text(text, encoding="utf-8")
    reading = Reading(comment_column="data.text", label_column=unicodedata.normalize(form, "data.값"))
    path = write_submission({7: 1, 9: 0}, f"s{suffix}", f"o{suffix}", reading=reading)
    found = path.read_text("utf-8")
    found = json.loads(found) if suffix == ".json" else [json.loads(line) for line in found.splitlines()]
    rows[0]["data"]["값"] = 1
    assert found == rows
    assert sample_comments(f"s{suffix}", reading=reading) == ["굿", "굿"]
    assert check_submission(path, f"s{suffix}", reading=reading)["value"]["rows of label 1"] == 1


def test_a_nested_label_that_has_no_place():
    Path("s.jsonl").write_text('{"id": 7, "data": {"label": 0}}\n{"id": 9, "data": "x"}\n')
    with pytest.raises(DataError, match=r"s\.jsonl line 2: the label has no place: 'data' is no object"):
        write_submission([1, 0], "s.jsonl", "o.jsonl", reading=Reading(label_column="data.label"))
    Path("s.jsonl").write_text('{"id": 7, "data": {"label": 0}}\n{"id": 9, "data": null}\n')
    path = write_submission([1, 0], "s.jsonl", "o.jsonl", reading=Reading(label_column="data.label"))
    assert [json.loads(line)["data"] for line in path.read_text().splitlines()] == [{"label": 1}, {"label": 0}]


def test_objects_of_json_with_their_keys_in_any_order():
    Path("s.jsonl").write_text('{"id": 7, "label": 0}\n{"x": 1, "id": 9}\n{"label": 0, "id": 8}\n')
    path = write_submission([1, 0, 1], "s.jsonl", "o.jsonl")
    assert [json.loads(line)["label"] for line in path.read_text().splitlines()] == [1, 0, 1]
    Path("s.jsonl").write_text('{"id": 7}\n{"label": 0, "id": 9}\n{"id": 8, "more": 1}\n')
    path = write_submission([1, 0, 1], "s.jsonl", "o.jsonl")
    assert path.read_text() == '{"id": 7, "label": 1}\n{"label": 0, "id": 9}\n{"id": 8, "more": 1, "label": 1}\n'


def test_comments_of_json_hold_what_ends_a_line_elsewhere():
    rows = [{"id": 7, "comment": "a\u2028b\x85c\x0b", "label": 0}, {"id": 9, "comment": "음", "label": 0}]
    for name, parts in (("s.jsonl", rows), ("s.json", [rows])):
        text = "\n".join(json.dumps(part, ensure_ascii=False) for part in parts) + "\n"
        Path(name).write_text(text, encoding="utf-8")
        out = write_submission([1, 0], name, f"o{Path(name).suffix}")
        assert out.read_text("utf-8") == text.replace('"label": 0', '"label": 1', 1)


EMPTY = {  # labels as they were predicted, as they are written where the sample shows none
    "numbers": ([1, 0], [1, 0]),
    "numbers of NumPy": (np.array([1, 0]), [1, 0]),
    "floats": ([1.0, 0.5], [1, 0.5]),
    "words": (["1", "0"], ["1", "0"]),
    "truth values": (np.array([True, False]), [True, False]),
}


@pytest.mark.parametrize("predictions, expected", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("empty", [None, "", " "])
def test_empty_cells_get_the_type_of_the_label(empty, predictions, expected):
    rows = [{"id": n, "comment": "굿", "label": empty} for n in (7, 9)]
    Path("s.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_excel("s.xlsx", index=False)
    found = json.loads(write_submission(predictions, "s.json", "o.json").read_text())
    assert [(type(row["label"]), row["label"]) for row in found] == [(type(each), each) for each in expected]
    excel = pd.read_excel(write_submission(predictions, "s.xlsx", "o.xlsx"), dtype=object)["label"].tolist()
    assert [(type(label), label) for label in excel] == [(type(each), each) for each in expected]


@pytest.mark.parametrize(
    "sample, predictions, expected",
    [
        ([0, None], ["1", "0"], [1, 0]),
        ([0.5, 1.0], ["0.5", 1], [0.5, 1.0]),
        ([0, 0.5], [0.5, 1], [0.5, 1]),
        (["0", None], [1, 0], ["1", "0"]),
        ([False, ""], ["1", 0], [True, False]),
    ],
)
def test_types_follow_the_sample_where_it_has_any(sample, predictions, expected):
    Path("s.json").write_text(json.dumps([{"id": n, "label": label} for n, label in enumerate(sample)]))
    found = [row["label"] for row in json.loads(write_submission(predictions, "s.json", "o.json").read_text())]
    assert [(type(label), label) for label in found] == [(type(each), each) for each in expected]


def arrow_types():
    import pyarrow as pa

    return {
        "null": (pa.nulls(2), [1, 0], [1, 0]), "null, words": (pa.nulls(2), ["긍정", "부정"], ["긍정", "부정"]),
        "int8": (pa.array([0, 0], pa.int8()), ["1", "0"], [1, 0]),
        "uint8 without values": (pa.nulls(2, pa.uint8()), ["1", 0], [1, 0]),
        "int64 without values": (pa.nulls(2, pa.int64()), ["1", "0"], [1, 0]),
        "float32": (pa.nulls(2, pa.float32()), ["0.5", 1], [0.5, 1.0]),
        "bool": (pa.array([False, False]), [1, "0"], [True, False]),
        "large_string": (pa.nulls(2, pa.large_string()), [1, 0], ["1", "0"]),
        "dictionary": (pa.array(["b", "a"]).dictionary_encode(), ["a", "b"], ["a", "b"]),
        "decimal": (pa.array([0, 0], pa.decimal128(5, 2)), ["1", 0], [1, 0]),
    }  # fmt: skip


@pytest.mark.parametrize("name", arrow_types())
def test_label_columns_of_parquet(name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    column, predictions, expected = arrow_types()[name]
    pq.write_table(pa.table({"id": [7, 9], "label": column}), "s.parquet")
    found = pq.read_table(write_submission(predictions, "s.parquet", "o.parquet"))["label"]
    assert found.to_pylist() == expected
    assert found.type == column.type or pa.types.is_null(column.type)


def test_labels_that_do_not_go_into_a_column_of_parquet():
    import pyarrow as pa
    import pyarrow.parquet as pq

    before = sorted([*os.listdir(), "s.parquet"])
    misfits = [
        (pa.array([0, 0], pa.int8()), [300, 0]),
        (pa.nulls(2, pa.int64()), ["긍정", "부정"]),
        (pa.nulls(2, pa.date32()), [1, 0]),
        (pa.nulls(2, pa.decimal128(3, 2)), [99, 0]),
    ]
    for column, predictions in misfits:
        pq.write_table(pa.table({"id": [7, 9], "label": column}), "s.parquet")
        with pytest.raises(DataError, match=r"s\.parquet: labels .* do not all go into a column of type") as caught:
            write_submission(predictions, "s.parquet", "o.parquet")
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir()) == before


def test_results_of_formulas_stay():
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["id", "label", "text"], [7, 0, "=A2"], [9, 0, "굿"]):
        book.active.append(row)
    book.active["C2"].data_type = "s"
    book.save("s.xlsx")
    path = write_submission(["1", "0"], "s.xlsx", "o.xlsx")
    assert pd.read_excel(path).to_numpy().tolist() == [[7, 1, "=A2"], [9, 0, "굿"]]


def test_a_sample_of_one_column_with_a_blank_row():
    Path("s.csv").write_text("label\n0\n\n0\n")
    assert write_submission([1, 0, 1], "s.csv", "o.csv").read_text() == "label\n1\n0\n1\n"
    Path("s.csv").write_text('\n"comment"\n굿\n\n음\n', encoding="utf-8")
    expected = '"comment","label"\n굿,1\n,0\n음,1\n'
    assert write_submission([1, 0, 1], "s.csv", "o.csv").read_text("utf-8") == expected


def test_a_separator_line_is_written_again():
    Path("s.csv").write_text("sep=;\n;\nid;target\n7;0\n", encoding="utf-16")
    assert write_submission([1], "s.csv", "o.csv").read_text("utf-16") == "sep=;\nid;target\n7;1\n"


def test_a_column_named_label_that_holds_the_comments():
    Path("s.csv").write_text("id,label\n7,굿\n", encoding="utf-8")
    with pytest.raises(DataError, match="column 'label' is another one, and there is none for the labels"):
        write_submission([1], "s.csv", "o.csv", reading=Reading(id_column="label"))


# --- two files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("t.csv", "id,text\n7,굿\n9,음\n7,또\n", "t.csv line 4: id '7' stands already in line 2"),
        ("t.jsonl", '{"id": 7, "text": "굿"}\n{"id": 9, "text": "음"}\n{"id": "7", "text": "또"}\n',
         "t.jsonl line 3: id '7' stands already in line 1"),
        ("t.json", '[{"id": 7, "text": "굿"}, {"id": 9, "text": "음"}, {"id": 7.0, "text": "또"}]',
         "t.json row 3: id .* stands already in row 1"),
    ],
)  # fmt: skip
def test_an_id_that_stands_twice_among_the_comments(name, text, said):
    Path("s.csv").write_text("id,target\n7,0\n9,0\n")
    Path(name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"^{said}"):
        sample_comments("s.csv", name)


def test_pairs_by_order_are_told():
    Path("s.csv").write_text("id,target\n7,0\n9,0\n")
    Path("t.csv").write_text("name,text\nb,굿\na,음\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="t.csv: paired with s.csv row by row, for there are no ids in t.csv"):
        assert sample_comments("s.csv", "t.csv") == ["굿", "음"]
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_comments("s.csv", "t.csv", say=said.append)
        Path("t.csv").write_text("id,text\n9,음\n7,굿&nbsp;굿\n", encoding="utf-8")
        assert sample_comments("s.csv", "t.csv", say=said.append) == ["굿 굿", "음"]
    by_order = "t.csv: read as ','-separated UTF-8; paired with s.csv row by row, for there are no ids in t.csv"
    by_id = "t.csv: read as ','-separated UTF-8; 1 comment freed of HTML; matched with s.csv by id"
    assert said == [by_order, by_id]
    Path("l.csv").write_text("target\n0\n0\n")
    sample_comments("l.csv", "t.csv", say=said.append)
    assert said[-1].endswith("paired with l.csv row by row, for there are no ids in l.csv")


def test_ids_under_a_name_that_nobody_knows():
    Path("s.csv").write_text("id,target\n7,0\n9,0\n")
    Path("t.csv").write_text("name,text\n9,음\n7,굿\n", encoding="utf-8")
    said = "t.csv: column 'name' has the ids of s.csv in another order. Pass id_column"
    with pytest.raises(DataError, match=said):
        sample_comments("s.csv", "t.csv")
    Path("t.csv").write_text("name,text\n7,굿\n9,음\n", encoding="utf-8")
    assert sample_comments("s.csv", "t.csv", say=print) == ["굿", "음"]
    Path("t.csv").write_text("name,text\n9,음\n7,굿\n", encoding="utf-8")
    Path("own.csv").write_text("name,target\n7,0\n9,0\n", encoding="utf-8")
    assert sample_comments("own.csv", "t.csv", Reading(id_column="name"), say=print) == ["굿", "음"]


def test_options_of_reading_hold_for_the_comments():
    Path("s.csv").write_text("id,target\n7,0\n9,0\n")
    Path("t.txt").write_bytes("id:text\n9:음, 또; 또\n8:\n7:굿, 또; 또\n".encode("cp949"))
    reading = Reading(Dialect(delimiter=":", encoding="cp949"), skip_blank=True)
    assert sample_comments("s.csv", "t.txt", reading) == ["굿, 또; 또", "음, 또; 또"]
    assert reading_of_sample("s.csv", "t.txt", reading).dialect == Dialect(encoding="cp949")
    assert reading_of_sample("s.csv", None, reading) == reading
    with pytest.raises(DataError, match="t.txt line 3: the comment is empty"):
        sample_comments("s.csv", "t.txt", reading._replace(skip_blank=False))
    with pd.ExcelWriter("t.xlsx") as book:
        pd.DataFrame({"note": ["x"]}).to_excel(book, sheet_name="읽기", index=False)
        pd.DataFrame({"id": [9, 7], "text": ["음", "굿"]}).to_excel(book, sheet_name="자료", index=False)
    reading = Reading(Dialect(sheet="자료"))
    assert sample_comments("s.csv", "t.xlsx", reading) == ["굿", "음"]
    assert reading_of_sample("s.csv", "t.xlsx", reading) == Reading()
    Path("t.jsonl").write_text('{"key": {"n": 9}, "data": {"text": "음"}}\n{"key": {"n": 7}, "data": {"text": "굿"}}\n')
    Path("k.csv").write_text("key.n,target\n7,0\n9,0\n")
    reading = Reading(id_column="key.n", comment_column="data.text")
    assert sample_comments("k.csv", "t.jsonl", reading) == ["굿", "음"]


def test_an_option_that_fits_neither_file_is_refused():
    Path("s.csv").write_text("id,target\n7,0\n9,0\n")
    Path("t.csv").write_text("id,text\n9,음\n7,굿\n", encoding="utf-8")
    Path("t.jsonl").write_text('{"id": 9, "text": "음"}\n{"id": 7, "text": "굿"}\n')
    for text_from, given, said in (
        ("t.csv", Dialect(encoding="utf-99"), "t.csv: Python knows no encoding 'utf-99'"),
        ("t.csv", Dialect(delimiter="::"), "t.csv: delimiter '::' is no single character"),
        ("t.csv", Dialect(delimiter=";"), "t.csv: no comment column among 'id,text'"),
        ("t.csv", Dialect(encoding="utf-16"), "t.csv: not utf-16"),
        ("t.jsonl", Dialect(sheet="2"), r"t.jsonl: only an .xlsx file has sheets"),
    ):
        with pytest.raises(DataError, match=f"^{said}") as caught:
            sample_comments("s.csv", text_from, Reading(given))
        assert "\n" not in str(caught.value)
    assert sample_comments("s.csv", "t.jsonl", Reading(Dialect(delimiter=","))) == ["굿", "음"]  # of the sample
    table = pd.DataFrame({"id": [7, 9], "target": [0, 0]})
    assert sample_comments(table, "t.csv", Reading(id_column="id")) == ["굿", "음"]


def test_a_submission_has_every_row_of_its_sample():
    Path("s.csv").write_text("id,comment\n7,굿\n8,\n9,음\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"s\.csv: 1 row without a comment, and a submission has every row"):
        sample_comments("s.csv", reading=Reading(skip_blank=True))


def test_a_check_names_the_file_that_was_to_be(monkeypatch):
    def wrong(*_):
        return b"id\tcomment\tlabel\n"

    monkeypatch.setattr(submission, "_text_of", wrong)
    with pytest.raises(DataError, match="^out.txt: ") as caught:
        write_submission(BY_ID, "sample.txt", "out.txt")
    assert "partial" not in str(caught.value) and os.listdir() == ["sample.txt"]


# --- the answer column by another name -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, sample, expected",
    [
        ("a.csv", "ID,감정\nT0,0\nT1,0\n", "ID,감정\nT0,1\nT1,0\n"),
        ("a.csv", "ID,answer\nT0,\nT1,\n", "ID,answer\nT0,1\nT1,0\n"),
        ("a.csv", "id,comment,정답\nT0,굿,\nT1,별로,\n", "id,comment,정답\nT0,굿,1\nT1,별로,0\n"),
        ("a.csv", "id,comment,지점\nT0,굿,강남\nT1,별로,\n", "id,comment,지점,label\nT0,굿,강남,1\nT1,별로,,0\n"),
        ("a.csv", "id,지점,정답\nT0,강남,\nT1,서초,\n", "id,지점,정답\nT0,강남,1\nT1,서초,0\n"),
        ("a.txt", "ID\nT0\nT1\n", "ID\tlabel\nT0\t1\nT1\t0\n"),
        ("a.jsonl", '{"id": "T0", "감정": null}\n{"id": "T1", "감정": null}\n',
         '{"id": "T0", "감정": 1}\n{"id": "T1", "감정": 0}\n'),
    ],
)  # fmt: skip
def test_the_column_that_waits_for_labels(name, sample, expected):
    Path(name).write_text(sample, encoding="utf-8")
    assert written([1, 0], name, f"out{Path(name).suffix}") == expected


def test_two_columns_that_may_wait_for_labels():
    Path("a.csv").write_text("id,first,second\nT0,0,0\nT1,0,0\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv: .*first.*second.* Pass label_column"):
        write_submission([1, 0], "a.csv", "out.csv")
    assert not Path("out.csv").exists()
    write_submission([1, 0], "a.csv", "out.csv", reading=Reading(label_column="second"))
    assert Path("out.csv").read_text() == "id,first,second\nT0,0,1\nT1,0,0\n"


def test_merged_cells_for_the_labels_are_refused():
    import openpyxl

    book = openpyxl.Workbook()
    for row in [["id", "label"], ["T0", 0], ["T1", None]]:
        book.active.append(row)
    book.active.merge_cells("B2:B3")
    book.save("merged.xlsx")
    with pytest.raises(DataError, match=r"merged\.xlsx row 3: the cell is merged .* Unmerge them\."):
        write_submission([1, 0], "merged.xlsx", "out.xlsx")
    assert not Path("out.xlsx").exists()
