"""What would bore a reader of 00_data: malformed files, encodings, compressed files, downloads, odd splits."""

import gzip
import http.server
import json
import lzma
import os
import pickle
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gemma_lora_sentiment import data
from gemma_lora_sentiment.data import (
    DataError,
    describe_comments,
    download_comments,
    duplicate_groups,
    find_columns,
    fingerprint,
    fold_whitespace,
    leaked_comments,
    read_comments,
    read_table,
    split_comments,
    write_table,
)
from gemma_lora_sentiment.files import cache_dir

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
needs_real_files = pytest.mark.skipif(not (REAL / "tarr_train.txt").exists(), reason="the tutorial's files are absent")
HEADER = "id\tcomment\tlabel\n"
ROWS = HEADER + "1\t국물이 진해요\t1\n2\t별로예요\t0\n"


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GEMMA_LORA_SENTIMENT_DATA_URL", raising=False)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)


def write(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def values(table):
    return table[["id", "comment", "label"]].to_numpy().tolist()


# --- malformed input: one line, with the place and the remedy -------------------------------------------------------

MALFORMED = [
    # name, content, row, column, part of the message
    ("empty.txt", "", None, None, "is empty"),
    ("empty.jsonl", " \n\n", None, None, "is empty"),
    ("mark.tsv", b"\xef\xbb\xbf", None, None, "is empty"),
    ("wide_blanks.txt", "\u3000\n", None, None, "is empty"),
    ("quotes.csv", '""\n', None, None, "is empty"),
    ("header.tsv", HEADER, None, None, "no rows"),
    ("header.csv", "id,comment,label", None, None, "no rows"),
    ("header.txt", "comment\n", None, None, "no rows"),
    ("columns.csv", "a,b\n1,2\n", None, "comment", "no comment column among 'a', 'b'"),
    ("columns.tsv", "id\tcomment\n1\t굿\n", None, "label", "no label column among 'id', 'comment'"),
    ("lines.txt", "굿\n별로\n", None, "label", "labelled=False"),
    ("either.txt", "comment;a,comment\n굿;1,음\n", None, None, "may be parted by ',' as well as by ';'"),
    ("table_or_lines.txt", "번호,후기\n1,굿\n2,음\n", None, None, "a table parted by ',', or one comment a line"),
    ("null_label.csv", "id,comment,label\n1,굿,NULL\n", 2, "label", "'NULL' stands for none, as do NaN, NA"),
    ("none_label.jsonl", '{"comment": "굿", "label": "none"}', 1, "label", "label is missing: 'none' stands for none"),
    ("mixed.jsonl", '{"comment": "a", "label": 0}\n{"comment": "b", "label": "0"}', 2, "label", "'0' is a text"),
    ("half.jsonl", '{"comment": "a", "label": "\\ud800"}', 1, "label", "the label '\\ud800' holds half a character"),
    ("half_id.jsonl", '{"comment": "a", "label": 1, "id": "x\\udfff"}', 1, "id", "the id 'x\\udfff' holds half a"),
    ("truth.jsonl", '{"comment": "a", "label": 0}\n{"comment": "b", "label": true}', 2, "label", "True is a truth"),
    ("gaps.csv", "comment,label\n굿,1\n" + ' ,1\n' * 7, 3, "comment", "in 7 rows (line 3, 4, 5, 6, 7 and 2"),
    ("twice.tsv", "id\tcomment\tlabel\tlabel\n1\t굿\t1\t0\n", None, "label", "two columns are named 'label'"),
    ("either.tsv", "id\ttext\treview\tlabel\n1\ta\tb\t0\n", None, "comment", "'text', 'review' could all be"),
    ("empty_label.tsv", HEADER + "1\t굿\t1\n2\t별로\t\n", 3, "label", "label is missing"),
    ("nan_label.tsv", HEADER + "1\t굿\tnan\n", 2, "label", "label is missing"),
    ("NaN_label.csv", "id,comment,label\n1,굿,NaN\n", 2, "label", "label is missing"),
    ("NA_label.csv", "id,comment,label\n1,굿, NA \n", 2, "label", "label is missing"),
    ("null_label.jsonl", '{"comment": "굿", "label": null}', 1, "label", "label is missing"),
    ("NaN_label.jsonl", '\n{"comment": "굿", "label": NaN}', 2, "label", "label is missing"),
    ("no_label.jsonl", '{"comment": "굿", "label": 1}\n{"comment": "굿굿"}', 2, "label", "label is missing"),
    ("list_label.jsonl", '{"comment": "굿", "label": [1]}', 1, "label", "no single value"),
    ("unknown.tsv", HEADER + "1\t굿\t1\n\n2\t별로\t2\n", 4, "label", "label '2' is not one of 0, 1. Fix the row, or"),
    ("ids.tsv", HEADER + "7\t굿\t1\n8\t별로\t0\n 7 \t굿굿\t1\n", 4, "id", "id '7' stands already in line 2"),
    ("ids.jsonl", '{"id": 1, "comment": "a", "label": 1}\n' * 2, 2, "id", "id 1 stands already in line 1"),
    ("no_id.tsv", HEADER + "\t굿\t1\n", 2, "id", "id is missing"),
    ("null_id.jsonl", '{"id": null, "comment": "a", "label": 1}', 1, "id", "id is missing"),
    ("extra_tab.tsv", HEADER + "1\t맛은\t있어요\t1\n", 2, None, "4 fields where the header has 3. Remove the extra"),
    ("few_fields.txt", ROWS + "3\t굿\n", 4, None, "2 fields where the header has 3. Add the missing tab"),
    ("extra_comma.csv", "id,comment,label\n1,맛은, 있어요,1\n", 2, None, "Remove the extra comma"),
    ("broken_row.tsv", HEADER + "1\t맛은\n있어요\t1\n", 2, None, "2 fields where the header has 3"),
    ("blank.tsv", HEADER + "1\t \x00\u3000\t1\n", 2, "comment", "comment is empty"),
    ("blank.csv", 'comment,label\n"\n\n",1\n', 2, "comment", "comment is empty"),
    ("blank.jsonl", '{"comment": "", "label": 1}', 1, "comment", "comment is empty"),
    ("null.jsonl", '{"comment": null, "label": 1}', 1, "comment", "comment is empty"),
    ("number.jsonl", '{"comment": 5, "label": 1}', 1, "comment", "the comment 5 is no text (int)"),
    ("list.jsonl", '{"comment": ["a"], "label": 1}', 1, "comment", "is no text (list)"),
    ("half.jsonl", r'{"comment": "a\ud83d", "label": 1}', 1, "comment", "half a character"),
    ("open_quote.csv", 'id,comment,label\n1,굿,1\n2,"별로,0\n3,굿,1\n', 3, None, "quotation marks do not pair"),
    ("swallow.csv", 'id,comment,label\n1,"좋아요,1\n2,"나빠요",0\n', 2, None, "quotation marks do not pair"),
    ("after_quote.csv", 'id,comment,label\n1,"좋"아요,1\n', 2, None, "quotation marks do not pair"),
    ("json.jsonl", '{"comment": "굿", "label": 1}\n{"comment"}\n', 2, None, "not JSON"),
    ("array.json", '[{"comment": "굿"}]', None, "label", "no label column among 'comment'"),
    ("object.json", '{"comment":\n "굿", "label": 1}', 1, None, "not JSON"),
    ("keys.jsonl", '{"comment": "a", "comment": "b", "label": 1}', 1, None, "a key stands twice"),
    ("deep.jsonl", "\n" + '{"a":' * 100_000, 2, None, "not JSON"),
    ("program.txt", bytes(range(256)) * 4, None, None, "looks binary"),
    ("zeros.txt", b"\0" * 100, None, None, "looks binary"),
    ("excel.csv", b"PK\x03\x04" + bytes(100), None, None, "is an Excel or zip file"),
    ("image.tsv", b"\x89PNG\r\n\x1a\n", None, None, "is an image"),
    ("packed.tsv", gzip.compress(ROWS.encode()), None, None, "is a gzip file"),
    ("encoding.txt", HEADER.encode() + b"1\t\xff\xfe\xff\t1\n", None, None, "neither UTF-8 nor CP949 at byte 19"),
    ("damaged.txt", ROWS.encode() + b"3\t\xea\xb5\t1\n", None, None, "neither UTF-8 nor CP949 at byte 60"),
    ("broken.parquet", b"PAR1 and then nothing", None, None, "not a whole Parquet file"),
    ("text.parquet", ROWS, None, None, "not a whole Parquet file"),
    ("broken.tsv.gz", gzip.compress(ROWS.encode())[:-9], None, None, "cannot be unpacked"),
    ("text.tsv.xz", ROWS, None, None, "cannot be unpacked"),
    ("text.tsv.gz", ROWS, None, None, "cannot be unpacked"),
    ("comments.doc", ROWS, None, None, "unknown format"),
    ("comments", ROWS, None, None, "unknown format"),
]


@pytest.mark.parametrize("name, content, row, column, message", MALFORMED, ids=[case[0] for case in MALFORMED])
def test_malformed_file_is_one_line(name, content, row, column, message):
    write(name, content)
    with pytest.raises(DataError) as caught:
        read_comments(name, labels=(0, 1) if name.startswith("unknown") else None)
    error = caught.value
    assert message in str(error)
    assert str(error).startswith(name)
    assert len(str(error).splitlines()) == 1 and len(str(error)) < 400
    assert (error.source, error.row, error.column) == (name, row, column)
    if row is not None:
        assert str(error).startswith(f"{name} line {row}: ")
    assert os.listdir() == [name]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[" * 100_000, "array.json row 1: not JSON"),
        ('[{"comment": "a", "label": 1}, {"comment": "b"}]', "array.json row 2: the label is missing"),
        ('[{"comment": "a", "label": 1}, 5]', "array.json row 2: 5 is no JSON object"),
        ('[{"comment": "a", "label": 1} {"comment": "b"}]', "array.json row 2: not JSON ('{"),
        ('[{"comment": "a", "label": 1},\n', "array.json row 2: not JSON (the array does not end)"),
        ('[{"comment": "a", "label": 1}] []', "array.json row 2: not JSON (something stands after the array)"),
        ("[]", "array.json: no rows. Write one object for each"),
    ],
)
def test_malformed_array_names_the_row(content, message):
    with pytest.raises(DataError) as caught:
        read_comments(write("array.json", content))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_missing_file_and_folder():
    with pytest.raises(DataError, match=r"^nothing\.tsv: no such file\. .*tarr_train"):
        read_comments("nothing.tsv")
    Path("folder.tsv").mkdir()
    with pytest.raises(DataError, match=r"^folder\.tsv: is a folder"):
        read_comments("folder.tsv")
    with pytest.raises(DataError, match="no such file"):
        read_comments("a\0b.tsv")
    with pytest.raises(DataError, match="no such file"):
        read_comments("a" * 5000 + ".tsv")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_file_without_permission_is_the_machines_fault():
    Path(write("locked.tsv", ROWS)).chmod(0)
    with pytest.raises(PermissionError):
        read_comments("locked.tsv")


def test_other_sources_are_type_errors():
    for source in (None, 5, ["좋아요"], {"comment": ["좋아요"]}):
        with pytest.raises(TypeError, match="a path, a name or a DataFrame"):
            read_comments(source)


def test_missing_pyarrow(monkeypatch):
    write("a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"a\.parquet: Parquet needs pyarrow\. Install gemma_lora_sentiment\[parquet\]"):
        read_comments("a.parquet")


def test_malformed_dataframe_names_the_index_label():
    frame = pd.DataFrame({"comment": ["굿", "별로"], "label": [1, None]}, index=["first", "second"])
    with pytest.raises(DataError, match="^table index second: the label is missing") as caught:
        read_comments(frame)
    assert caught.value.row == "second"
    with pytest.raises(DataError, match="^table index 0: label 2 is not one of 0, 1"):
        read_comments(pd.DataFrame({"comment": ["굿"], "label": [2]}), labels=(0, 1))
    with pytest.raises(DataError, match="comment is empty"):
        read_comments(pd.DataFrame({"comment": [np.nan], "label": [2]}))
    with pytest.raises(DataError, match="no rows"):
        read_comments(pd.DataFrame({"comment": [], "label": []}))
    with pytest.raises(DataError, match="two columns are named 'label'"):
        read_comments(pd.DataFrame([["굿", 1, 0]], columns=["comment", "label", "label"]))


def test_long_values_are_cut_in_messages():
    write("long.tsv", HEADER + f"1\t굿\t{'a' * 100_000}\n")
    with pytest.raises(DataError) as caught:
        read_comments("long.tsv", labels=(0, 1))
    assert len(str(caught.value)) < 200


def test_data_error_survives_pickling():
    error = pickle.loads(pickle.dumps(DataError("wrong.", source="a.tsv", row=3, column="label")))
    assert (str(error), error.source, error.row, error.column) == ("a.tsv line 3: wrong.", "a.tsv", 3, "label")
    assert isinstance(error, ValueError)
    assert str(DataError("wrong.\n\tvery")) == "wrong. very"


# --- encodings, line ends, quoting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp949"])
@pytest.mark.parametrize("suffix", ["tsv", "txt", "csv", "jsonl"])
def test_encodings_and_line_ends(encoding, line_end, suffix):
    text = ROWS.replace("\t", ",") if suffix == "csv" else ROWS
    if suffix == "jsonl":
        rows = [{"id": "1", "comment": "국물이 진해요", "label": "1"}, {"id": "2", "comment": "별로예요", "label": "0"}]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for last_line_end in ("", "\n"):
        name = write(f"a.{suffix}", (text.rstrip("\n") + last_line_end).replace("\n", line_end).encode(encoding))
        assert values(read_comments(name)) == [["1", "국물이 진해요", "1"], ["2", "별로예요", "0"]]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "euc-kr", "johab", "utf-8"])
def test_encoding_given_is_respected(encoding):
    name = write("a.tsv", ROWS.encode(encoding))
    assert read_comments(name, encoding=encoding)["comment"].tolist() == ["국물이 진해요", "별로예요"]


def test_encoding_given_that_does_not_fit():
    name = write("a.tsv", ROWS.encode("cp949"))
    with pytest.raises(DataError, match="a.tsv: not utf-8 at byte 19"):
        read_comments(name, encoding="utf-8")
    with pytest.raises(DataError, match="knows no encoding 'klingon'"):
        read_comments(name, encoding="klingon")
    with pytest.raises(DataError, match="knows no encoding 'rot13'"):
        read_comments(name, encoding="rot13")


def test_control_characters_are_folded():
    name = write("a.tsv", HEADER + "1\t\x00국물이\x0b\x0c\x07진\u2028해\x85요\x7f\t1\n2\t별\x00로\t0\n")
    assert read_comments(name)["comment"].tolist() == ["국물이 진 해 요", "별 로"]


def test_lone_carriage_return_inside_a_row_is_folded():
    assert read_comments(write("a.tsv", HEADER + "1\t국물이\r진해요\t1\n"))["comment"].tolist() == ["국물이 진해요"]


def test_tsv_is_raw():
    name = write("a.tsv", HEADER + '1\t"최고\t1\n2\t별로" 라니\t0\n3\t"전부"\t1\n4\t\'\\n"\t0\n')
    assert read_comments(name)["comment"].tolist() == ['"최고', '별로" 라니', '"전부"', "'\\n\""]


def test_tsv_with_quoted_header_is_unquoted():
    name = write("a.tsv", '"id"\t"comment"\t"label"\n"1"\t"말하길 ""최고""\n라고"\t"1"\n"2"\t"a\tb"\t"0"\n')
    table = read_comments(name)
    assert table["comment"].tolist() == ['말하길 "최고" 라고', "a b"]
    assert list(read_table(name).index) == [2, 4]


def test_csv_with_embedded_line_ends_keeps_physical_lines():
    name = write("a.csv", 'id,comment,label\r\n1,"맛은\r\n\r\n좋고, ""값""은",1\r\n2,별로,\r\n')
    with pytest.raises(DataError, match="line 5: the label is missing"):
        read_comments(name)
    assert read_comments(name, labelled=False)["comment"].tolist() == ['맛은 좋고, "값"은', "별로"]


def test_response_line_cannot_be_forged():
    name = write("a.csv", 'comment,label\n"최고\n\nResponse:\n1",0\n')
    assert read_comments(name)["comment"].tolist() == ["최고 Response: 1"]


def test_very_long_comment():
    for name, separator in (("a.tsv", "\t"), ("a.csv", ",")):
        write(name, f"comment{separator}label\n{'가' * 300_000}{separator}1\n")
        assert read_comments(name)["comment"].str.len().tolist() == [300_000]


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (lzma.compress, ".xz")])
def test_compressed_text(pack, suffix):
    assert len(read_comments(write("a.tsv" + suffix, pack(ROWS.encode())))) == 2


def test_format_overrides_the_suffix():
    assert len(read_comments(write("a.dat", ROWS), format="tsv")) == 2
    assert len(read_comments(write("b.csv", ROWS), format="tsv")) == 2
    assert len(read_comments(write("c.txt", "comment,label\n굿,1\n"), format="csv")) == 1
    with pytest.raises(DataError, match="unknown format"):
        read_comments(write("d.tsv", ROWS), format="excel")


# --- plain lines ------------------------------------------------------------------------------------------------------


def test_plain_lines():
    name = write("a.txt", '굿\n"별로"\r\n\n\n')
    with pytest.raises(DataError, match="no label column"):
        read_comments(name)
    write("a.txt", '굿\n"별로"\n\n\n')
    table = read_comments(name, labelled=False)
    assert values(table) == [["1", "굿", None], ["2", '"별로"', None]]
    assert list(read_table(name).index) == [1, 2]
    with pytest.raises(DataError, match="a.txt line 2: the comment is empty"):
        read_comments(write("a.txt", "굿\n\n별로\n"), labelled=False)


def test_plain_lines_with_a_header_or_tabs():
    assert read_comments(write("a.txt", "Comment\n굿\n"), labelled=False)["comment"].tolist() == ["굿"]
    assert read_comments("a.txt", labelled=False, format="lines")["comment"].tolist() == ["Comment", "굿"]
    table = read_comments(write("b.txt", "굿\t최고\n별로\n"), labelled=False, format="lines")
    assert table["comment"].tolist() == ["굿 최고", "별로"]


# --- columns, labels, types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    ["id,comment,label", "IDX,Text,Target", "index, review ,Sentiment", "no,document,class", "No,sentence,y",
     "id,content,라벨", "id,댓글,label", "id,리뷰,label", "id,내용,label"],
)  # fmt: skip
def test_synonyms(header):
    table = read_comments(write("a.csv", header + "\n01,굿,1\n"))
    assert list(table.columns) == ["id", "comment", "label"]
    assert values(table) == [["01", "굿", "1"]]


def test_columns_given():
    write("a.csv", "key,body,stars,comment,label,kind\n9,굿,5,메모,x,plain\n")
    table = read_comments("a.csv", id_column="key", comment_column="body", label_column="stars")
    assert values(table) == [["9", "굿", "5"]]
    assert list(table.columns) == ["id", "comment", "label", "comment_other", "label_other", "kind"]
    with pytest.raises(DataError, match="no column 'bod' among 'key', 'body'"):
        read_comments("a.csv", comment_column="bod")
    assert find_columns([0, 1], comment_column=0, label_column=1) == {"id": None, "comment": 0, "label": 1}


def test_extra_columns_are_kept_and_ids_numbered():
    table = read_comments(write("a.tsv", "comment\tkind\tlabel\n굿\tplain\t1\n별로\t\t0\n"))
    assert list(table.columns) == ["id", "comment", "label", "kind"]
    assert table["id"].tolist() == ["1", "2"]
    assert table["kind"].tolist() == ["plain", ""]


def test_text_is_kept_as_it_stands():
    write("a.tsv", HEADER + "01\tNA\t01\n1\tnull\t2\n1.0\tNone\t1.5\n1e3\tnan\tnull\n")
    table = read_comments("a.tsv", keep_na=True)
    assert values(table) == [["01", "NA", "01"], ["1", "null", "2"], ["1.0", "None", "1.5"], ["1e3", "nan", "null"]]
    assert all(type(value) is str for row in values(table) for value in row)


def test_types_from_json_lines_are_kept():
    write("a.jsonl", '{"id": 1, "comment": "a", "label": 1}\n{"id": "1b", "comment": "b", "label": 0}\n')
    assert values(read_comments("a.jsonl")) == [[1, "a", 1], ["1b", "b", 0]]
    write("b.jsonl", '{"comment": "a", "label": true}\n{"comment": "b", "label": false}\n')
    assert read_comments("b.jsonl")["label"].dtype == bool
    write("c.jsonl", '{"comment": "a", "label": 1}\n{"comment": "b"}\n')
    labels = read_comments("c.jsonl", labelled=False)["label"].tolist()
    assert labels == [1, None] and type(labels[0]) is int


@pytest.mark.parametrize(
    "labels", [[0, 1], ["neg", "pos"], [True, False], ["01", "1"], [0, None], [0.5, 1.5]], ids=str
)
def test_types_from_parquet_and_dataframes_are_kept(labels):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"id": [7, 8], "comment": ["굿", "별\n로"], "label": pd.Series(labels, dtype=object)})
    frame.to_parquet("a.parquet")
    sources = ["a.parquet", frame, frame.convert_dtypes()]
    if None not in labels:  # pandas itself turns whole numbers with a gap into floats
        sources.append(frame.infer_objects())
    for source in sources:
        table = read_comments(source, labelled=False)
        assert table["label"].tolist() == labels
        assert [type(label) for label in table["label"].tolist()] == [type(label) for label in labels]
        assert table["id"].tolist() == [7, 8]
        assert table["comment"].tolist() == ["굿", "별 로"]


def test_parquet_names_the_row_and_keeps_an_index_of_ids():
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"id": ["a", "b"], "comment": ["굿", " "], "label": [1, 0]}).set_index("id")
    frame.to_parquet("a.parquet")
    with pytest.raises(DataError, match=r"^a\.parquet row 2: the comment is empty"):
        read_comments("a.parquet")
    assert read_comments(frame.iloc[:1])["id"].tolist() == ["a"]
    assert "id" not in frame.columns


def test_categorical_and_dataframe_are_not_changed():
    frame = pd.DataFrame({"text": [" a ", "b"], "y": pd.Categorical(["p", "n"], categories=["n", "p", "x"])})
    before = frame.copy()
    table = read_comments(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert table["label"].tolist() == ["p", "n"] and table["label"].dtype == object
    assert list(read_comments(frame.iloc[::-1]).index) == [0, 1]


def test_allowed_labels():
    write("a.tsv", ROWS)
    assert len(read_comments("a.tsv", labels=(0, 1))) == len(read_comments("a.tsv", labels=["0", "1"])) == 2
    with pytest.raises(DataError, match="label '1' is not one of 00, 01"):
        read_comments("a.tsv", labels=("00", "01"))
    frame = pd.DataFrame({"comment": ["굿"], "label": ["1"]})
    assert read_comments(frame, labels=(0, 1))["label"].tolist() == ["1"]
    with pytest.raises(DataError, match="label '1' is not one of True, False"):
        read_comments(frame, labels=(True, False))
    missing = read_comments(write("b.tsv", HEADER + "1\t굿\t\n"), labels=(0, 1), labelled=False)
    assert missing["label"].tolist() == [None]


def test_read_table_feeds_read_comments():
    table = read_table(write("a.tsv", ROWS))
    assert list(table.index) == [2, 3] and list(table.columns) == ["id", "comment", "label"]
    assert values(read_comments(table)) == values(read_comments("a.tsv"))


def test_fold_whitespace_leaves_no_line_end():
    for code in [*range(0x3100), 0xFEFF]:
        folded = fold_whitespace(f"a{chr(code)}b")
        assert len(folded.splitlines()) == 1
        assert fold_whitespace(folded) == folded
    assert fold_whitespace("a\u200b\ufeffb") == "a\u200b\ufeffb"
    assert fold_whitespace("\n \t") == ""


# --- names, cache, downloads ------------------------------------------------------------------------------------------

TUTORIAL_ROWS = [f"{number}\t{number}번 손님의 후기\t{number % 2}" for number in range(1, 301)]
TUTORIAL_FILE = "\r\n".join(["id\tcomment\tlabel", *TUTORIAL_ROWS]).encode()


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.paths.append(self.path)
            status, body, length = self.server.reply
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.paths, running.reply = [], (200, TUTORIAL_FILE, None)
    running.address = f"http://127.0.0.1:{running.server_port}/dataset"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def test_download_once(server, monkeypatch):
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_DATA_URL", server.address + "/")
    assert len(read_comments("tarr_train", labels=(0, 1))) == 300
    assert len(read_comments("tarr_train")) == 300
    assert server.paths == ["/dataset/tarr_train.txt"]
    assert len(read_comments("tarr_submit", labelled=False)) == 300
    assert server.paths[1:] == ["/dataset/tarr_sample_submit.txt"]
    assert sorted(os.listdir("cache")) == ["tarr_sample_submit.txt", "tarr_train.txt"]
    assert Path("cache/tarr_train.txt").read_bytes() == TUTORIAL_FILE


BAD_REPLIES = {
    "404": ((404, b"404: Not Found", None), "HTTP Error 404"),
    "500": ((500, b"", None), "HTTP Error 500"),
    "page": ((200, b"<!DOCTYPE html>\n<html>Log in</html>", None), "another page"),
    "empty": ((200, b"", None), "the reply is empty"),
    "binary": ((200, b"\x89PNG\r\n", None), "is an image"),
    "cut by the line": ((200, TUTORIAL_FILE[:5000], 100_000), "IncompleteRead"),
    "cut in a row": ((200, TUTORIAL_FILE[:-2], None), "cut off"),
    "cut between rows": ((200, TUTORIAL_FILE.rpartition(b"\r\n")[0], None), "cut off after 299 of 300 rows"),
}


@pytest.mark.parametrize("reply, reason", BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_bad_downloads_leave_nothing(server, reply, reason):
    server.reply = reply
    with pytest.raises(ConnectionError) as caught:
        download_comments("tarr_train", base_url=server.address)
    message = str(caught.value)
    assert message.startswith(f"{server.address}/tarr_train.txt could not be fetched (") and reason in message
    assert f"Put the file by hand at {cache_dir() / 'tarr_train.txt'}" in message
    assert len(message.splitlines()) == 1
    assert not Path("cache").exists()


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no.such.host.invalid", "nonsense", "http://["])
def test_offline(address):
    with pytest.raises(ConnectionError, match="could not be fetched .* Put the file by hand at"):
        download_comments("tarr_train", base_url=address, timeout=5)
    assert not Path("cache").exists()


def test_silent_server_times_out():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        with pytest.raises(ConnectionError, match="timed out"):
            download_comments("tarr_train", base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.2)


def test_file_put_by_hand_needs_no_network(monkeypatch):
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_DATA_URL", "http://127.0.0.1:9")
    Path("cache").mkdir()
    write("cache/tarr_train.txt", ROWS)
    assert len(read_comments("tarr_train")) == 2


def test_cache_that_cannot_be_written_is_the_machines_fault(server, monkeypatch):
    write("file", "in the way")
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", "file/cache")
    with pytest.raises(OSError) as caught:
        download_comments("tarr_train", base_url=server.address)
    assert not isinstance(caught.value, ConnectionError)


def test_existing_path_wins_over_a_name():
    write("tarr_train", ROWS)
    assert len(read_comments("tarr_train", format="tsv")) == 2


@pytest.mark.parametrize("name, least", [("sample", 300), ("sample_test", 100)])
def test_bundled_sample(name, least):
    bundled = Path(data.__file__).parent / "samples" / f"{name}.tsv"
    if not bundled.exists():
        pytest.skip("the sample is not there yet")
    table = read_comments(name)
    assert len(table) >= least and table["label"].nunique() == 2
    assert list(table.columns) == ["id", "comment", "label", "kind"]


def test_import_is_light():
    code = "import sys, gemma_lora_sentiment.data; print([m for m in ('keras', 'jax', 'sklearn') if m in sys.modules])"
    reply = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert reply.stdout.strip() == "[]"


# --- duplicates, description, split -----------------------------------------------------------------------------------


def table_of(comments, labels):
    return pd.DataFrame({"id": range(len(comments)), "comment": comments, "label": labels})


def test_duplicate_groups():
    comments = ["최고 !", "최고", "最高", "Ｇｏｏｄ", "good…", "STRASSE", "straße", "👍", "👎", "👍!", "!!", "??", "!!"]
    assert duplicate_groups(comments).tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 5, 4, 6, 7, 6]
    groups = duplicate_groups(pd.Series(comments, index=range(5, 18)))
    assert groups.dtype == np.int64 and groups.shape == (13,)


def test_describe_comments():
    table = table_of(["굿", "굿!", "별로", "처음"], [1, 0, 0, None])
    facts = describe_comments(table, table.iloc[:1])["value"]
    assert facts["rows"] == 4 and facts["classes"] == 2
    assert facts["rows of label 0.0"] == 2 or facts["rows of label 0"] == 2
    assert facts["rows without label"] == 1
    assert facts["characters, longest"] == 2 and facts["characters, mean"] == 1.8
    assert facts["duplicate comments"] == 1 and facts["duplicates whose labels differ"] == 2
    assert facts["comments also in the other table"] == 2
    unlabelled = describe_comments(read_comments(write("a.txt", "굿\n별로\n"), labelled=False))["value"]
    assert unlabelled["classes"] == 0 and unlabelled["rows without label"] == 2
    assert describe_comments(table.iloc[[2]].reset_index(drop=True))["value"]["rows"] == 1
    shuffled = describe_comments(table.iloc[[3, 1, 0, 2]])["value"]
    assert shuffled["duplicates whose labels differ"] == 2
    with pytest.raises(DataError, match="no column 'label'"):
        describe_comments(pd.DataFrame({"comment": ["a"]}))


def test_leaked_comments():
    train = table_of(["굿", "별로", "굿!"], ["1", "0", "1"])
    test = table_of(["처음", "굿 ", "별로."], ["1", "1", "1"])
    leaks = leaked_comments(train, test.iloc[::-1])
    assert leaks[["id", "train_id", "train_label"]].to_numpy().tolist() == [[2, 1, "0"], [1, 0, "1"]]
    assert list(leaks.columns) == ["id", "comment", "label", "train_id", "train_label"]
    assert len(leaked_comments(train, test.iloc[:1])) == 0


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.2, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_split_honours_fraction_classes_and_duplicates(fraction, seed):
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 400, size=300)  # a third of the comments come more than once
    labels = random.choice(["a", "b", "c"], p=[0.6, 0.3, 0.1], size=400)[numbers]
    table = table_of([f"{number}번 손님" for number in numbers], labels)
    train, test = split_comments(table, fraction, seed)
    groups = duplicate_groups(table["comment"])
    assert not set(groups[train["id"]]) & set(groups[test["id"]])
    assert sorted([*train["id"], *test["id"]]) == list(range(300))
    assert train["id"].is_monotonic_increasing and test["id"].is_monotonic_increasing
    for label, count in table["label"].value_counts().items():
        held_out = (test["label"] == label).sum()
        assert 1 <= held_out <= count - 1
        assert abs(held_out - fraction * count) <= 1.5
    again = split_comments(table, fraction, seed)[1]
    pd.testing.assert_frame_equal(test, again)


def test_split_does_not_favour_or_shun_duplicates():
    table = table_of([f"{number // 2}번" if number < 100 else f"{number}번" for number in range(200)], [0, 1] * 100)
    share = np.mean([(split_comments(table, 0.3, seed)[1]["id"] < 100).mean() for seed in range(40)])
    assert 0.4 < share < 0.6


def test_split_with_twins_that_disagree():
    table = table_of(["a", "a!", "b", "c", "d", "e", "f", "g"], [0, 1, 0, 1, 0, 1, 0, 1])
    for seed in range(20):
        train, test = split_comments(table, 0.25, seed)
        assert len(test) == 2 and set(test["label"]) == set(train["label"]) == {0, 1}
        assert (train["id"] < 2).sum() in (0, 2)


def test_split_with_large_duplicate_groups():
    table = table_of(["x"] * 5 + ["y"] * 5 + ["z", "w", "v"], [0] * 10 + [1] * 3)
    for seed in range(10):
        train, test = split_comments(table, 0.2, seed)
        assert set(train["label"]) == set(test["label"]) == {0, 1}
    only_twins = table_of(["x"] * 4 + ["y", "z"], [0] * 4 + [1, 1])
    train, test = split_comments(only_twins, 0.5, 0)
    assert set(train["label"]) == {0, 1} and set(test["label"]) == {1}


def test_split_leaves_global_state_and_table_alone():
    table = table_of([f"{number}" for number in range(20)], [0, 1] * 10)
    table.index = range(100, 120)
    before = table.copy()
    np.random.seed(3)
    state = np.random.get_state()[1].copy()
    train, test = split_comments(table)
    assert (np.random.get_state()[1] == state).all()
    pd.testing.assert_frame_equal(table, before)
    assert sorted([*train.index, *test.index]) == list(range(100, 120))
    train["label"] = 5
    pd.testing.assert_frame_equal(table, before)


def test_split_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match="label 1 has 1 row, and a split needs 2 of each label"):
        split_comments(table_of(["a", "b", "c"], [0, 0, 1]))
    with pytest.raises(DataError, match="has 1 row"):
        split_comments(table_of(["a"], [0]))
    with pytest.raises(DataError, match="no rows to split"):
        split_comments(table_of([], []))
    with pytest.raises(DataError, match="index 1: the label is missing"):
        split_comments(table_of(["a", "b"], ["0", None]))
    with pytest.raises(DataError, match="no column 'label'"):
        split_comments(pd.DataFrame({"comment": ["a"]}))
    for fraction in (0, 1, -0.5, 3):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            split_comments(table_of(["a", "b"], [0, 0]), fraction)


def test_fingerprint():
    table = table_of(["a", "b"], ["1", "0"])
    assert fingerprint(table) == fingerprint(table.assign(id=[5, 6]))
    assert len(fingerprint(table)) == 64
    different = [table.iloc[::-1], table.assign(label=[1, 0]), table.assign(label=[True, False]), table.iloc[:1]]
    different.append(table_of(["ab", ""], ["1", "0"]))
    assert len({fingerprint(other) for other in [table, *different]}) == 6
    read = read_comments(write("a.tsv", HEADER + "1\ta\t1\n2\tb\t0\n"))
    assert fingerprint(read) == fingerprint(table)
    assert fingerprint(read.astype({"comment": "string"})) == fingerprint(table)


# --- the tutorial's files ---------------------------------------------------------------------------------------------


@needs_real_files
def test_real_files():
    train = read_comments(REAL / "tarr_train.txt", labels=(0, 1))
    assert len(train) == 300 and (train["label"] == "1").sum() == 162
    assert list(train.columns) == ["id", "comment", "label"]
    submit = read_comments(REAL / "tarr_sample_submit.txt", labelled=False)
    assert len(submit) == 100 and set(submit["label"]) == {"0"}
    kept, held_out = split_comments(train)
    assert held_out["label"].value_counts().to_dict() == {"1": 32, "0": 28} and len(kept) == 240
    assert describe_comments(train, submit)["value"]["rows"] == 300


@needs_real_files
def test_real_files_would_pass_the_check_of_a_download():
    for name, file in (("tarr_train", "tarr_train.txt"), ("tarr_submit", "tarr_sample_submit.txt")):
        assert download_comments(name, base_url=REAL.as_uri()).read_bytes() == (REAL / file).read_bytes()


@pytest.mark.parametrize(
    "roles",
    [
        {"comment_column": "text", "label_column": "text"},
        {"id_column": "라벨", "label_column": unicodedata.normalize("NFD", "라벨")},
        {"id_column": "text", "comment_column": "text", "label_column": "text"},
    ],
)
def test_one_column_has_one_role(roles):
    write("a.csv", "id,text,라벨\n1,굿,1\n")
    for read in (lambda: read_comments("a.csv", **roles), lambda: read_comments(pd.read_csv("a.csv"), **roles)):
        with pytest.raises(DataError, match=r"column '.*' is asked for as .* and as .*\. Pass .*_column=\.\.\. with"):
            read()


def test_half_a_character_in_a_table_of_python():
    for name, cells in (("label", ["\ud800"]), ("comment", ["굿\udc00"]), ("id", ["\udbff"])):
        table = pd.DataFrame({"id": ["1"], "comment": ["굿"], "label": ["1"]}, dtype=object)
        table[name] = pd.Series(cells, dtype=object)
        with pytest.raises(DataError, match=f"table index 0: the {name} .* holds half a character"):
            read_comments(table)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_json_file_is_one_array(rows):
    table = pd.DataFrame({"id": range(rows), "comment": ["두\n줄, \u2028 }"] * rows, "label": ["1"] * rows})
    write_table(table, "a.json", ".json")
    assert json.loads(Path("a.json").read_text("utf-8")) == table.to_dict("records")
    assert len(Path("a.json").read_bytes().splitlines()) == (rows + 2 if rows else 1)
