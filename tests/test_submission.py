"""What would bore a reader of 07_submission: samples of all kinds, folders that cannot be written, the real sample."""

import os
import re
import unicodedata
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gemma_lora_sentiment import submission
from gemma_lora_sentiment.data import DataError, Reading
from gemma_lora_sentiment.submission import check_submission, sample_comments, write_submission

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
    assert labels_written(pd.Series([0, 1, 1]), sample) == ["1", "0", "1"]


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


def test_sample_in_another_encoding_becomes_utf8():
    Path("sample.txt").write_bytes(SAMPLE.encode("cp949"))
    assert written(BY_ID).startswith("id\tcomment\tlabel\n3\t굿\t1\n")


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
    def refuse(path, sample, **_):
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
    assert sample_comments("ids.csv", "lines.txt") == ["굿", "음"]
    Path("lines.txt").write_text("굿\n음\n또\n", encoding="utf-8")
    with pytest.raises(DataError, match="lines.txt: 3 comments for the 2 rows of ids.csv, and no ids"):
        sample_comments("ids.csv", "lines.txt")
    Path("texts.csv").write_text("번호,본문\n9,음\n7,굿\n", encoding="utf-8")
    reading = Reading(id_column="번호", comment_column="본문")
    with pytest.raises(DataError, match="no column '번호' among 'id', 'target'"):
        sample_comments("ids.csv", "texts.csv", reading)
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
