"""What would bore a reader of 00a_tables: every dialect there and back, files people really have, odd bytes."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import unicodedata
import zipfile
from pathlib import Path

import openpyxl
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from gemma_lora_sentiment import tables
from gemma_lora_sentiment.data import MISSING_LABELS, Reading, read_comments, read_table, write_table
from gemma_lora_sentiment.scale import read_chunks
from gemma_lora_sentiment.submission import sample_comments, write_submission
from gemma_lora_sentiment.tables import (
    DataError,
    Dialect,
    OpenTable,
    composed,
    find_delimiter,
    find_encoding,
    fold_whitespace,
    is_blank,
    json_rows,
    nested,
    packed,
    raw_cells,
    raw_objects,
    tab_records,
    unpacked,
    with_nested,
    without_html,
)

FILES = Path(__file__).parent / "fixtures" / "files"


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return Path(name)


def streamed(path, reading=None, rows=3):
    """The comments of a file as the reader of large files gives them."""
    chunks = list(read_chunks(path, rows, reading=reading))
    return [comment for chunk in chunks for comment in chunk.table["comment"]]


# --- files that went wrong: what is right ---------------------------------------------------------------------------

OWN = Reading(id_column="번호", comment_column="후기", label_column="감정")
TWO = ["국이 식었어요", "면발이 쫄깃해요"]
WITH_COMMA = ["국이 식었어요, 정말", "면발이 쫄깃해요"]
RIGHT = {  # file: (how to read it, ids, comments, labels, part of what is said)
    "comma.txt": (None, ["11", "12"], WITH_COMMA, [None, None], "','-separated UTF-8"),
    "bar.txt": (None, ["1", "2"], TWO, ["0", "1"], "'|'-separated UTF-8"),
    "semicolon.csv": (None, ["1", "2"], WITH_COMMA, ["0", "1"], "';'-separated UTF-8"),
    "excel_blank_rows.csv": (None, ["1", "2"], TWO, ["0", "1"], "2 empty rows left out"),
    "float_labels.csv": (None, ["1", "2"], TWO, ["0.0", "1.0"], "','-separated"),
    "own_columns.csv": (OWN, ["1", "2"], TWO, ["0", "1"], "','-separated"),
    "kaggle_test.csv": (None, ["7", "9"], WITH_COMMA, ["0", "0"], "','-separated"),
    "array.json": (None, [1, 2], TWO, ["0", "1"], "a JSON array, UTF-8"),
    "html.csv": (
        None, ["1", "2"], ["국이 식었어요. 다신 안 가요", "면발이 쫄깃해요 👍"], ["0", "1"], "2 comments freed of HTML",
    ),
    "nfd.csv": (
        None, ["1", "2", "3", "4"], [*TWO, "반찬이 모자랐어요", "또 오고 싶어요"], ["부정", "긍정"] * 2,
        "4 comments composed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_files_that_went_wrong_are_read_right(name):
    reading, ids, comments, labels, said = RIGHT[name]
    table = read_comments(FILES / name, labelled=labels[0] is not None, reading=reading)
    assert (table["id"].tolist(), table["comment"].tolist(), table["label"].tolist()) == (ids, comments, labels)
    assert said in table.attrs["reading"]["text"] and table.attrs["reading"]["text"].startswith(str(FILES / name))
    assert streamed(FILES / name, reading) == streamed(FILES / name, reading, 1) == comments


def test_mixed_labels_are_named_with_their_row():
    with pytest.raises(DataError, match=r"mixed_labels\.jsonl line 2: the label True is a truth value, that of line 1"):
        read_comments(FILES / "mixed_labels.jsonl")
    assert len(streamed(FILES / "mixed_labels.jsonl")) == 3  # who only predicts needs no labels


def test_columns_of_ones_own_are_asked_for():
    with pytest.raises(DataError, match="no comment column among '번호', '후기', '감정' .*comment_column=") as caught:
        read_comments(FILES / "own_columns.csv")
    assert "\n" not in str(caught.value)


# --- dialects -------------------------------------------------------------------------------------------------------

ROWS = [["1", "국이 식었어요, 정말; 또 | 그래요", "0"], ["2", "면발이 쫄깃해요", "1"], ["3", '"최고"라는 말', "1"]]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp949"])
@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_every_delimiter_in_every_text_file(quoting, delimiter, encoding, suffix):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\r\n")
    writer.writerows([["id", "comment", "label"], *ROWS])
    path = write(f"a{suffix}", text.getvalue().encode(encoding))
    table = read_comments(path)
    assert table[["id", "comment", "label"]].to_numpy().tolist() == ROWS
    name = {"utf-16": "UTF-16", "cp949": "CP949"}.get(encoding, "UTF-8")
    kind = "tab-separated" if delimiter == "\t" else f"{delimiter!r}-separated"
    assert table.attrs["reading"]["text"] == f"a{suffix}: read as {kind} {name}"
    assert streamed(path) == [row[1] for row in ROWS]
    assert len(raw_cells(path, read_table(path).attrs["dialect"])) == 4


@pytest.mark.parametrize(
    "text, kind, expected",
    [
        ("comment\n굿, 최고\n음\n", "txt", "\t"),
        ("굿\n음, 별로\n또, 또, 또\n", "txt", "none"),
        ("굿, 최고\n", "txt", "none"),
        ("id,review\n1,굿\n2,음, 별로\n", "txt", ","),
        ("a;b\n1;2\n", "csv", ";"),
        ("a,b;c\n1,2;3\n", "csv", ","),
        ("a\n1,5\n", "csv", ","),
        ("id\tcomment\n1\t굿, 음\n", "csv", "\t"),
        ("id,comment\n1,굿\n", "tsv", ","),
        ("id,target\n7,0\n", "txt", None),
    ],
)
def test_delimiters(text, kind, expected):
    def is_header(names):
        return bool({"comment", "review"} & set(names))

    lines = text.rstrip("\n").split("\n")
    if expected is None:
        with pytest.raises(DataError, match="may be a table parted by ',', or one comment a line"):
            find_delimiter(lines, kind, "a", is_header)
    else:
        assert find_delimiter(lines, kind, "a", is_header) == expected


def test_options_win():
    write("a.txt", "굿, 최고\n음, 별로\n")
    with pytest.raises(DataError, match="Pass delimiter=... with ',' or none"):
        read_comments("a.txt", labelled=False)
    assert read_comments("a.txt", labelled=False, delimiter="none")["comment"].tolist() == ["굿, 최고", "음, 별로"]
    own = read_comments("a.txt", labelled=False, delimiter="comma", comment_column="최고")
    assert own["comment"].tolist() == ["별로"]
    write("b.csv", "a:comment\n1:굿\n".encode("euc-kr"))
    assert read_comments("b.csv", labelled=False, delimiter=":", encoding="euc-kr")["comment"].tolist() == ["굿"]
    for wrong in ({"delimiter": "::"}, {"delimiter": '"'}, {"sheet": "1"}):
        with pytest.raises(DataError, match="^b.csv: ") as caught:
            read_comments("b.csv", **wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="a jsonl file has no delimiter"):
        read_comments(write("c.jsonl", '{"comment": "굿"}'), delimiter=",")


def test_table_that_has_review_and_text():
    write("a.csv", "review,text,label\n굿,메모,1\n")
    with pytest.raises(DataError, match="'review', 'text' could all be the comment. Pass comment_column="):
        read_comments("a.csv")
    assert read_comments("a.csv", comment_column="review")["comment"].tolist() == ["굿"]


@pytest.mark.parametrize(
    "lines, expected",
    [
        (['a\tb', '"x\t1'], ['"x', "1"]),
        (['a\tb', '"x"\t1'], ['"x"', "1"]),
        (['a\tb', '"""x"""\t1'], ['"x"', "1"]),
        (['a\tb', '"x', 'y"\t1'], ["x\ny", "1"]),
        (['a\tb', '1\t"x', 'y"'], ["1", "x\ny"]),
        (['a\tb', '1\t"x', "", 'y ""z"""'], ["1", 'x\n\ny "z"']),
        (['a\tb', '"x\ty"\t1'], ["x\ty", "1"]),
        (['a\tb', '1\t"x', '2\ty"'], ["1", '"x']),
        (['a\tb', '1\t"x', '2\ty', '3\tz"'], ["1", '"x']),
        (['a\tb\tc', '1\t"x', '2\ty"\t0'], ["1", '"x']),
        (['"a"\t"b"', '"x"\t"1"'], ["x", "1"]),
        (["a", '"x"'], ['"x"']),
        (['a\tb', '""\t1'], ['""', "1"]),
    ],
)  # fmt: skip
def test_quotes_in_tab_separated_text(lines, expected):
    if len(lines[0].split("\t")) == 3:  # a row that is too short is not made longer by eating the next one
        assert [fields for _, fields in tab_records(lines)][1] == ["1", '"x']
        return
    assert [fields for _, fields in tab_records(lines)][1] == expected


def test_a_lone_quote_costs_no_time():
    lines = ["id\tcomment", *(f'{n}\t"x' for n in range(20_000))]
    assert len(list(tab_records(lines))) == 20_001


@pytest.mark.parametrize(
    "data, expected",
    [
        ("국이 식었어요".encode("cp949"), "cp949"),
        ("id,comment\n1,뷁 쌰 믜 꿻\n".encode("cp949"), "cp949"),
        ("café, naïve, déjà vu".encode("cp1252"), "either"),
        (b"plain ascii", "utf-8"),
        ("국이 식었어요".encode("utf-16"), "utf-16"),
        ("\ufeff국".encode(), "utf-8"),
    ],
)
def test_encodings(data, expected):
    if expected == "either":
        with pytest.raises(DataError, match="may be CP949 .Korean. as well as cp1252"):
            find_encoding(data, "a")
    else:
        assert find_encoding(data, "a") == expected


CHINESE = [  # our own sentences, in both scripts
    ("这家餐厅的菜很好吃，服务态度也不错", "這家餐廳的菜很好吃，服務態度也不錯"),
    ("等了一个小时，菜都凉了，我不会再来", "等了一個小時，菜都涼了，我不會再來"),
    ("味道一般，价格有点贵，但是老板很热情", "味道一般，價格有點貴，但是老闆很熱情"),
    ("外卖送得很快，汤也没有洒出来，给好评", "外送來得很快，湯也沒有灑出來，給好評"),
]
JAPANESE = [
    "この店の料理はとても美味しいです",
    "一時間も待たされて、スープがぬるくなっていました",
    "また家族と一緒に行きたいと思います",
]
KOREAN = [
    "국물이 진하고 맛있어요", "ㅋㅋㅋㅋ 또 갈게요 ㅠㅠ", "中國집 짬뽕은 여기가 最高", "國民 여러분의 協助를 바랍니다",
    "굿", "뷁 쌰 믜 꿻", "돌돌돌 줄줄줄 삼김", "ㅇㄱㄹㅇ ㅂㅂㅂㄱ", "大韓民國", "★★★★★ 강추！", "辛라면 맛",
]  # fmt: skip


@pytest.mark.parametrize("sentence", range(len(CHINESE)))
@pytest.mark.parametrize("encoding, script", [("gbk", 0), ("gb18030", 0), ("big5", 1)])
def test_chinese_is_no_korean(encoding, script, sentence):
    text = f"id,comment,label\n1,{CHINESE[sentence][script]},0\n"
    path = write("a.csv", text.encode(encoding))
    name = {"big5": "Big5 .traditional Chinese."}.get(encoding, "GBK .simplified Chinese.")
    codec = encoding if encoding == "big5" else "gbk"
    said = rf"^a\.csv: is no UTF-8, and may be {name} as well as CP949 .Korean.\. .*with {codec} or cp949"
    with pytest.raises(DataError, match=said) as caught:
        read_comments(path)
    assert "\n" not in str(caught.value)
    assert read_comments(path, encoding=codec)["comment"].tolist() == [CHINESE[sentence][script]]


@pytest.mark.parametrize("encoding", ["shift_jis", "euc_jp"])
@pytest.mark.parametrize("sentence", JAPANESE)
def test_japanese_is_no_korean(sentence, encoding):
    with pytest.raises(DataError, match=f"with {encoding} or cp949"):
        find_encoding(f"comment\n{sentence}".encode(encoding), "a")


def test_chinese_without_a_frequent_character_is_no_korean_either():
    text = "麻婆豆腐 宫保鸡丁 水煮牛肉 北京烤鸭 小笼包 糖醋排骨"  # a menu
    with pytest.raises(DataError, match="GBK"):
        find_encoding(text.encode("gbk"), "a")


def test_korean_is_taken_for_korean():
    for text in [*KOREAN, "\n".join(KOREAN)]:
        assert find_encoding(f"id,comment\n1,{text}\n".encode("cp949"), "a") == "cp949"
    for comment in [*read_comments("sample")["comment"], *read_comments("sample_test")["comment"]]:
        data = b"1" + comment.encode("cp949", "ignore")  # each by itself; the bytes of 짱짱 are sound UTF-8
        expected = "cp949" if "\ufffd" in data.decode("utf-8", "replace") else "utf-8"
        assert find_encoding(data, "a") == expected, comment


TABLE = "id,comment,label\n1,국이 식었어요,0\n2,면발이 쫄깃해요,1\n"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", TABLE),
        ("a.txt", TABLE.replace(",", "\t")),
        ("b.txt", "굿 가나\n음\n"),
        ("a.jsonl", '{"comment": "굿", "label": 1}\n'),
    ],
)
def test_utf16_without_a_mark(name, content, encoding):
    table = read_comments(write(name, content.encode(encoding)), labelled=name != "b.txt")
    assert "UTF-16 (" in table.attrs["reading"]["text"]
    assert table["comment"].tolist() == {"a.jsonl": ["굿"], "b.txt": ["굿 가나", "음"]}.get(name, TWO)
    assert read_comments(name, labelled=name != "b.txt", encoding="utf-16")["comment"].equals(table["comment"])


def test_what_may_be_utf16_of_either_kind_names_both():
    with pytest.raises(DataError, match=r"looks binary.*encoding=\.\.\. with utf-16-le or utf-16-be"):
        find_encoding(bytes(range(32)) * 10, "a")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "cp949"])
def test_a_file_longer_than_the_head(encoding, monkeypatch):
    monkeypatch.setattr(tables, "_HEAD", 4096)
    monkeypatch.setattr(tables, "_BLOCK", 1024)
    text = "id\tcomment\n" + "".join(f"{n}\t{n}번 손님이 또 왔어요\n" for n in range(999))
    comments = read_comments(write("a.tsv", text.encode(encoding)), labelled=False)["comment"].tolist()
    assert comments == [f"{n}번 손님이 또 왔어요" for n in range(999)]


@pytest.mark.parametrize("mark", [";", ",", "|", "\t", ":"])
@pytest.mark.parametrize("line", ["sep={}", '"sep={}"', "SEP={}"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_separator_line_of_excel(encoding, line, mark):
    path = write("a.csv", f"{line.format(mark)}\r\n{TABLE.replace(',', mark)}".encode(encoding))
    table = read_table(path)
    assert table["comment"].tolist() == TWO and table.index.tolist() == [3, 4]
    assert table.attrs["dialect"].delimiter == mark and streamed(path) == TWO
    assert raw_cells(path, table.attrs["dialect"])[0] == ["id", "comment", "label"]
    assert read_comments(path, delimiter=mark)["comment"].tolist() == TWO
    with pytest.raises(DataError, match="is empty"):
        read_comments(write("b.csv", line.format(mark)))


@pytest.mark.parametrize(
    "content, comments",
    [
        (TABLE.replace("\n", "\r"), TWO),
        (TABLE.replace("\n", "\r\n"), TWO),
        ('comment,label\r"국이\n식었어요",0\r면발이 쫄깃해요,1\r', TWO),
        ("comment,label\n국이\r식었어요,0\n면발이 쫄깃해요,1\n", TWO),
        ("comment,label\r\n국이\r식었어요,0\r\n면발이 쫄깃해요,1", TWO),
    ],
)
def test_line_ends(content, comments):
    assert read_comments(write("a.csv", content))["comment"].tolist() == comments


@pytest.mark.parametrize("begin", [",,\n", " , ,\n", "\n,,\n\n,,\n", '"","",""\n'])
@pytest.mark.parametrize("suffix, mark", [(".csv", ","), (".csv", ";"), (".txt", "|"), (".tsv", "\t")])
def test_empty_rows_above_the_header(suffix, mark, begin):
    path = write(f"a{suffix}", (begin + TABLE).replace(",", mark))
    table = read_comments(path)
    assert table["comment"].tolist() == streamed(path) == TWO
    dialect = read_table(path).attrs["dialect"]
    assert [row[1] for row in raw_cells(path, dialect)] == ["comment", *TWO]


THREE = "1 field where the header has 3: that is parted by comma, this row by "
MIXED = {
    "header": ("id,comment,label\n1;굿;0\n", f"line 2: {THREE}semicolon"),
    "row": ("id,comment,label\n1,굿,0\n2;음;1\n", f"line 3: {THREE}semicolon"),
    "tabs": ("id,comment,label\n1\t굿\t0\n", f"line 2: {THREE}tab"),
    "names": ("id;comment,label\n1;굿,0\n", ": no comment column among 'id;comment', 'label': the header has ';'"),
}


@pytest.mark.parametrize("content, said", MIXED.values(), ids=MIXED)
def test_two_delimiters_in_one_file(content, said):
    with pytest.raises(DataError) as caught:
        read_comments(write("a.csv", content))
    assert str(caught.value).startswith("a.csv") and said in str(caught.value) and "\n" not in str(caught.value)
    assert "throughout" in str(caught.value)


@pytest.mark.parametrize("packing", [".gz", ".xz", ".bz2", ".zst", ".zip"])
def test_packed_files_there_and_back(packing):
    path = write(f"a.csv{packing}", packed(TABLE.encode(), packing, "a.csv"))
    assert unpacked(path) == TABLE.encode()
    assert read_comments(path)["comment"].tolist() == streamed(path, rows=1) == TWO
    with OpenTable(write("b", path.read_bytes()), Dialect("csv", packing=packing)) as table:
        assert next(table.batches()).column("comment") == TWO and table.fraction == 1.0
    for content in (b"", b"text", path.read_bytes()[:-9]):
        with pytest.raises(DataError, match=r"a\.csv.*(unpack|is empty|Save)") as caught:
            read_comments(write(f"a.csv{packing}", content))
        assert "\n" not in str(caught.value)


def test_archives_of_several_files_and_of_a_mac():
    with zipfile.ZipFile("a.csv.zip", "w") as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/a.csv", TABLE)
        archive.writestr("__MACOSX/folder/._a.csv", "x")
    assert read_comments("a.csv.zip")["comment"].tolist() == TWO
    with zipfile.ZipFile("a.csv.zip", "a") as archive:
        archive.writestr("b.csv", TABLE)
    with pytest.raises(DataError, match=r"a\.csv\.zip: 2 files in one archive\. Unpack it"):
        read_comments("a.csv.zip")


# --- web exports and forms of letters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a&nbsp;b", "a\xa0b"),
        ("&lt;br&gt;", "<br>"),
        ("&amp;nbsp;", "&nbsp;"),
        ("<p class='x'>굿</p>", " 굿 "),
        ('<a href="http://x.kr/?a=1&b=2">지도</a>', " 지도 "),
        ("<BR/>굿<br />", " 굿 "),
        ("&#44397;&#xAD6D;", "국국"),
        ("굿<!-- 광고 > 끝 -->임", "굿 임"),
        ('<script type="a">if (a < b) { c() }</script>굿<STYLE>p > b {}</style >', " 굿 "),
        ('<iframe src="a" allowfullscreen></iframe>굿<video controls loop>', "  굿 "),
        *((typed, typed) for typed in ("<3 a < b > c <eos> <bos> <pad> <맛>", "&copy &x; R&D <i think> <b", "5<6>")),
        *((typed, typed) for typed in ("<i open up>", "<!- 굿 ->", "<script> 굿")),
    ],
)  # fmt: skip
def test_html(text, expected):
    assert without_html(text) == expected
    path = write("a.jsonl", json.dumps({"comment": f"음 {text}", "label": 1}))
    assert read_comments(path)["comment"].tolist() == [fold_whitespace(f"음 {expected}")]
    handed_over = read_comments(pd.DataFrame({"comment": [text], "label": [1]}))
    assert handed_over["comment"].tolist() == [fold_whitespace(text)]


def test_decomposed_headers_and_labels():
    text = unicodedata.normalize("NFD", "댓글,라벨\n굿,긍정\n음,부정\n")
    write("a.csv", text)
    write("b.csv", "댓글,라벨\n굿,긍정\n음,부정\n")
    table = read_comments("a.csv", labels=("긍정", "부정"))
    assert table.equals(read_comments("b.csv"))
    assert read_comments("a.csv", comment_column="라벨", label_column="댓글")["comment"].tolist() == ["긍정", "부정"]
    (chunk,) = read_chunks("a.csv")
    assert chunk.as_written != chunk.table.comment.tolist() and list(map(composed, chunk.as_written)) == ["굿", "음"]


# --- JSON, Excel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize(
    "pack, suffix", [(bytes, ""), (gzip.compress, ".gz"), (lzma.compress, ".xz"), (bz2.compress, ".bz2")]
)
def test_arrays_of_any_layout(pack, suffix, indent):
    rows = [{"id": n, "data": {"text": f"{n}번 [{{,\n"}, "label": n % 2} for n in range(50)]
    path = write(f"a.json{suffix}", pack(json.dumps(rows, indent=indent).encode()))
    table = read_comments(path, comment_column="data.text")
    assert table["comment"].tolist() == [f"{n}번 [{{," for n in range(50)]
    assert streamed(path, Reading(comment_column="data.text"), 7) == table["comment"].tolist()
    with pytest.raises(DataError, match="no column 'data.txt' among 'id', 'data', 'label'"):
        read_comments(path, comment_column="data.txt")


def test_one_long_object_is_read_in_a_moment():
    lines = json.dumps([{"comment": "가" * 10, "more": list(range(200_000))}], indent=1).split("\n")
    assert len(list(json_rows(lines, True, "a"))) == 1


def book(name, **sheets):
    made = openpyxl.Workbook()
    made.remove(made.active)
    for title, rows in sheets.items():
        sheet = made.create_sheet(title)
        for row in rows:
            sheet.append(row)
        for cell in (cell for row in sheet.iter_rows() for cell in row if isinstance(cell.value, str)):
            cell.data_type = "s"  # openpyxl takes "=0" for a formula
    made.save(name)
    return Path(name)


def test_excel_with_several_sheets():
    rows = [["id", "comment", "label"], [1, "국이 식었어요", 0], [], [None, "", None], [2, "굿\n굿", 1.0]]
    path = book("a.xlsx", first=rows, second=[["text", "y"], ["음", "x"], ["굿", "y"]])
    table = read_comments(path)
    assert table[["id", "comment", "label"]].to_numpy().tolist() == [[1, "국이 식었어요", 0], [2, "굿 굿", 1]]
    assert table.attrs["reading"]["text"] == "a.xlsx: read as sheet 'first' of 'first', 'second'; 2 empty rows left out"
    for sheet in ("second", "2", 2):
        assert read_comments(path, sheet=sheet)["comment"].tolist() == ["음", "굿"]
    assert streamed(path, Reading(Dialect(sheet="second")), 1) == ["음", "굿"]
    assert streamed(path, rows=1) == ["국이 식었어요", "굿 굿"]
    Path("b.xlsx.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_comments("b.xlsx.gz").equals(table)


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_sheets_and_nested_keys_in_either_form(form, other):
    def inform(text):
        return unicodedata.normalize(form, text)

    path = book("a.xlsx", **{"첫": [["comment"], ["음"]], inform("둘째"): [["comment"], ["굿"]]})
    asked = unicodedata.normalize(other, "둘째")
    assert read_comments(path, labelled=False, sheet=asked)["comment"].tolist() == ["굿"]
    row = {inform("자료"): {inform("본문"): "굿", inform("값"): 1}, "id": 7}
    names = {f"{role}_column": unicodedata.normalize(other, name)
             for role, name in (("comment", "자료.본문"), ("label", "자료.값"))}  # fmt: skip
    for name, content in (("a.jsonl", json.dumps(row)), ("a.json", json.dumps([row]))):
        table = read_comments(write(name, content), **names)
        assert (table["comment"].tolist(), table["label"].tolist()) == (["굿"], [1])
        assert streamed(Path(name), Reading(comment_column=names["comment_column"])) == ["굿"]
    filled = {**row, inform("자료"): {inform("본문"): "굿", inform("값"): 0}}
    assert with_nested(row, names["label_column"], 0) == filled


def test_fields_are_filled_where_they_are_read():
    for row, name in (({"data.x": 1, "data": {"x": 2}}, "data.x"), ({"data": {"y": {"x": 1}}}, "data.y.x"),
                      ({}, "data.x"), ({"data": None}, "data.x"), ({"x": 1}, "x")):  # fmt: skip
        before = json.dumps(row)
        assert nested(with_nested(row, name, 9), name) == 9 and json.dumps(row) == before
    assert with_nested({}, "data.x", 9) == {"data": {"x": 9}}
    with pytest.raises(ValueError, match="'data' is no object, and 'data.x' goes into one"):
        with_nested({"data": "text"}, "data.x", 9)


def test_objects_as_they_are_written():
    rows = [{"id": 1, "comment": "a\u2028b\x85c", "more": [{"x": None}]}, {"id": 2, "comment": "굿", "more": []}]
    for name, lines in (("a.jsonl", rows), ("a.json", [rows])):
        text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            for packing in ("", ".gz", ".zip"):
                path = write(f"{name}{packing}", packed(text.encode(encoding), packing, name))
                assert raw_objects(path, read_table(path).attrs["dialect"]) == (rows, name == "a.jsonl")


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "a.xlsx: is empty"),
        ([["comment", "label"]], r"a.xlsx: a header \('comment', 'label'\) and no rows"),
        ([["comment", "label"], ["굿", 1], ["음", 0, "x"]], "a.xlsx row 3: a cell beyond the 2 columns"),
        ([["comment", "label"], ["굿", 1], [5, 0]], r"a.xlsx row 3: the comment 5 is no text \(int\)"),
        ([["comment", "label"], [], ["굿", 1], [None, 0]], "a.xlsx row 4: the comment is empty"),
        ([["a", "label"], ["굿", 1]], "a.xlsx: no comment column among 'a', 'label'"),
    ],
)
def test_malformed_sheets_are_one_line(rows, said):
    with pytest.raises(DataError, match=said) as caught:
        read_comments(book("a.xlsx", only=rows))
    assert "\n" not in str(caught.value)


def test_excel_without_openpyxl(monkeypatch):
    path = book("a.xlsx", only=[["comment"], ["굿"]])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"a\.xlsx: Excel needs openpyxl\. Install gemma_lora_sentiment\[excel\]"):
        read_comments(path, labelled=False)


def test_what_only_looks_like_excel():
    for content in (b"", b"PK\x03\x04 nothing", b"text", (FILES / "comma.txt").read_bytes()):
        with pytest.raises(DataError, match="not a whole Excel file"):
            read_comments(write("a.xlsx", content))


# --- one reader -----------------------------------------------------------------------------------------------------


def test_blank_comments_are_counted_through_a_whole_file_and_can_be_left_out():
    rows = [f"{n},{'' if n % 100 == 50 else '굿'}" for n in range(1000)]
    path = write("a.csv", "\n".join(["id,comment", *rows]))
    said = r"a\.csv line 52: the comment is empty, as it is in 10 rows \(line 52, 152, 252, 352, 452 and 5 more\)"
    for read in (lambda: read_comments(path, labelled=False), lambda: streamed(path, rows=64)):
        with pytest.raises(DataError, match=said) as caught:
            read()
        assert "skip_blank=True" in str(caught.value) and "\n" not in str(caught.value)
    table = read_comments(path, labelled=False, skip_blank=True)
    assert len(table) == 990 and "10 rows with blank comments left out" in table.attrs["reading"]["text"]
    assert len(streamed(path, Reading(skip_blank=True), 64)) == 990
    lines = write("a.txt", "굿\n\n음\n")
    assert read_comments(lines, labelled=False, skip_blank=True)["id"].tolist() == ["1", "3"]


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_many_rows_come_in_batches_of_a_size(suffix, monkeypatch):
    n, mark = 200_000, "\t" if suffix == ".tsv" else ","
    monkeypatch.setattr(tables, "_HEAD", 1 << 20)
    with open(f"a{suffix}", "w", encoding="utf-8") as file:
        file.write(f"id{mark}comment\n")
        file.writelines(f"{i}{mark}국물이 진해요 {i}\n" for i in range(n))
    largest = 0
    assert os.path.getsize(f"a{suffix}") > 4 * tables._HEAD, "else all of it might be held"
    with OpenTable(Path(f"a{suffix}")) as table:
        rows = 0
        for batch in table.batches(8192):
            rows += len(batch.places)
            largest = max(largest, len(batch.places))
            assert batch.places[0] == rows - len(batch.places) + 2
            ahead = table._bytes.file.tell() / os.path.getsize(f"a{suffix}") - rows / n
            assert ahead * os.path.getsize(f"a{suffix}") < 2 * tables._HEAD  # no more than the head is held
        assert (rows, largest, table.fraction) == (n, 8192, 1.0)


# --- there and back -------------------------------------------------------------------------------------------------

# Hypothesis prints the seed of what fails. By hand: GEMMA_LORA_SENTIMENT_EXAMPLES=5000 pytest tests/test_tables.py
EXAMPLES = int(os.environ.get("GEMMA_LORA_SENTIMENT_EXAMPLES", 200))
LETTERS = st.one_of(
    st.sampled_from(list("가나다라국물 \"'\",;|\t\\.:<>&#ㅋㅠ👍é—{}[]")),
    st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="\ufeff\ufffe\uffff"),
)


def as_read(text):
    """What a comment is after it has been read from a file; a fixed point, so that it can be compared."""
    for _ in range(20):
        cleaned = composed(fold_whitespace(without_html(composed(fold_whitespace(text)))))
        if cleaned == text:
            return text
        text = cleaned
    return "굿"


def is_comment(text):
    """Of any format; an error of Excel is none in a sheet."""
    return not is_blank(text) and not (text.startswith("#") and text.lower() in MISSING_LABELS)


COMMENTS = st.lists(st.text(LETTERS, max_size=30).map(as_read).filter(is_comment), min_size=1, max_size=8)


def written_table(draw, folder):
    """A table in one of the ways in which it can be written, and how it has to be read."""
    comments = draw(COMMENTS)
    labels = draw(st.lists(st.sampled_from(["0", "1", "긍정", "02"]), min_size=len(comments), max_size=len(comments)))
    table = pd.DataFrame({"id": [f"n{n}" for n in range(len(comments))], "comment": comments, "label": labels})
    order = draw(st.permutations(["id", "comment", "label"]))
    table, way = table[list(order)], draw(st.sampled_from(["csv", "ours", "array", "xlsx", "parquet"]))
    path = folder / "a"
    if way == "csv":
        delimiter, quoting = draw(st.sampled_from("\t,;|")), draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp949"]))
        suffix = draw(st.sampled_from([".csv", ".txt", ".tsv"]))
        line_end = draw(st.sampled_from(["\n", "\r\n"]))
        begin = draw(st.sampled_from(["", f"sep={delimiter}{line_end}", 2 * delimiter + line_end]))
        text = begin + table.to_csv(sep=delimiter, quoting=quoting, index=False, lineterminator=line_end)
        try:
            data = text.encode(encoding)
        except UnicodeEncodeError:
            data, encoding = text.encode(), "utf-8"
        path = path.with_suffix(suffix)
        path.write_bytes(data)
        given = None if encoding in ("utf-8", "utf-8-sig", "utf-16") else encoding  # few odd letters tell none
        return table, path, Reading(Dialect(encoding=given))
    if way == "ours":
        suffix = draw(st.sampled_from([".csv", ".tsv", ".jsonl", ".txt"]))
        write_table(table, path.with_suffix(suffix), suffix)
        return table, path.with_suffix(suffix), Reading()
    if way == "array":
        path = path.with_suffix(".json")
        rows = table.to_dict("records")
        layout = {"ensure_ascii": draw(st.booleans()), "indent": draw(st.sampled_from([None, 2]))}
        path.write_text(json.dumps(rows, **layout), "utf-8")
        return table, path, Reading()
    path = path.with_suffix(f".{way}")
    if way == "parquet":
        table.to_parquet(path, index=False)
    else:
        try:
            book(path, only=[list(table), *table.to_numpy().tolist()])
        except openpyxl.utils.exceptions.IllegalCharacterError:
            table.to_parquet(path := path.with_suffix(".parquet"), index=False)
    return table, path, Reading()


@settings(
    max_examples=EXAMPLES, deadline=None, print_blob=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_what_is_written_is_read(data, tmp_path):
    table, path, reading = written_table(data.draw, tmp_path)
    packing = data.draw(st.sampled_from(["", "", "", ".gz", ".xz", ".bz2", ".zst", ".zip"]))
    plain, path = path, path.with_name(path.name + packing)
    path.write_bytes(packed(plain.read_bytes(), packing, plain.name))
    note(f"{path.name}: {path.read_bytes()[:400]!r}")
    try:
        found = read_comments(path, reading=reading)
        for name in ("id", "comment", "label"):
            assert found[name].tolist() == table[name].tolist(), found.attrs
        assert streamed(path, reading, data.draw(st.integers(1, 4))) == table["comment"].tolist()
        dialect = read_table(path, reading=reading).attrs["dialect"]
        if dialect.delimiter not in (None, "none"):
            raw = raw_cells(path, dialect)
            assert len(raw) == len(table) + 1 and {len(row) for row in raw} == {3}
    finally:
        path.unlink()
        plain.unlink(missing_ok=True)


@settings(
    max_examples=EXAMPLES // 2, deadline=None, print_blob=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_what_is_given_is_given_back(data, tmp_path):
    table, path, reading = written_table(data.draw, tmp_path)
    labels = data.draw(st.lists(st.sampled_from(sorted(table["label"])), min_size=len(table), max_size=len(table)))
    out = path.with_name(f"out{path.suffix}")
    note(f"{path.name}: {path.read_bytes()[:400]!r}")
    try:
        write_submission(labels, path, out, reading=reading)
        before, after = (read_table(each, reading=reading) for each in (path, out))
        assert list(after) == list(before) and after["label"].tolist() == labels
        assert after[["id", "comment"]].to_numpy().tolist() == before[["id", "comment"]].to_numpy().tolist()
        assert after.attrs["dialect"]._replace(sheets=()) == before.attrs["dialect"]._replace(sheets=())
    finally:
        path.unlink()
        out.unlink(missing_ok=True)


def test_an_excel_file_that_openpyxl_stumbles_over_is_refused_in_one_line(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["comment", "label"])
    book.active.append(["국물이 좋아요", "1"])
    book.create_chartsheet("차트", 0)
    book.save(tmp_path / "chart.xlsx")
    with pytest.raises(DataError, match="Save the sheet as CSV") as error:
        read_comments(tmp_path / "chart.xlsx")
    assert "\n" not in str(error.value)


# --- what is no table -----------------------------------------------------------------------------------------------

JSON_LINES = '{"comment": "국이 식었어요", "label": 0}\n{"comment": "굿", "label": 1}\n'
OTHER_FORMATS = {  # what is said: content
    r"is a web page \(HTML\).*Download the file itself": "<!doctype html>\n<html>\n<body>로그인</body></html>\n",
    "is a web page": "\ufeff<HTML lang='ko'>\n<head><title>로그인</title>\n",
    "is a web page .HTML., not a table": "<table border=1><tr><td>id<td>comment\n<tr><td>1<td>굿</table>",
    "is an RTF document.*Save it as plain text": "{\\rtf1\\ansi\\ansicpg949\n\\f0 굿\\par\n}",
    "is a Git LFS pointer.*git lfs pull": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
    "is an XML file": '<?xml version="1.0"?>\n<rows><row>굿</row></rows>\n',
    r"is JSON.*Name it \.json or \.jsonl": JSON_LINES,
    r"is JSON.*Name it": json.dumps([{"comment": "굿"}, {"comment": "음"}], ensure_ascii=False, indent=1),
    r"is JSON": json.dumps({"data": [{"comment": "굿"}]}, ensure_ascii=False, indent=1),
}


@pytest.mark.parametrize("said", OTHER_FORMATS)
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp949"])
def test_text_of_another_format_is_no_table(encoding, suffix, said):
    path = write(f"a{suffix}", OTHER_FORMATS[said].encode(encoding, "ignore"))
    for own in (None, encoding):
        for act in (lambda own=own: read_comments(path, labelled=False, encoding=own), lambda: streamed(path)):
            with pytest.raises(DataError, match=rf"^a\{suffix}: {said}") as caught:
                act()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        ["[배송] 빨라요", "{굿}", '{"a": 1'],
        [*JSON_LINES.splitlines(), "굿"],
        ["[1]", "[2]"],
        ["<html> 태그를 배웠어요", "<!doctype html> 이 뭐죠"],
        ["[{맛집}] 인정"],
        ["version https://git-lfs.github.com/spec/v1 이 뭐죠"],
    ],
)
def test_comments_that_begin_like_another_format_are_read(lines):
    path = write("a.txt", "\n".join(lines))
    table = read_comments(path, labelled=False, delimiter=None)
    assert table["comment"].tolist() == streamed(path) == [fold_whitespace(without_html(line)) for line in lines]


def test_lines_of_json_are_comments_where_one_says_so():
    path = write("a.txt", JSON_LINES)
    assert len(read_comments(path, labelled=False, delimiter="none")) == len(read_comments(path, format="jsonl")) == 2
    with pytest.raises(DataError, match="is a web page"):
        read_comments(write("a.jsonl", "<!doctype html><html>"))


SECOND = "id,comment,label\n3,국이 짜요,0\n"


@pytest.mark.parametrize("mark", ["", "\ufeff", "\ufeff\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("second", [SECOND, SECOND.replace("id,comment,label", "comment,label,id")])
def test_a_second_header_is_named_with_its_line(second, quote, delimiter, mark):
    text = TABLE + mark + second
    if quote:
        fields = [line.lstrip("\ufeff").split(",") for line in text.splitlines()]
        lines = [",".join(f'"{field}"' for field in row) for row in fields]
        lines[3] = mark + lines[3]
        text = "\n".join(lines)
    path = write("a.csv", text.replace(",", delimiter))
    said = r"^a\.csv line 4: the header stands here again.* Remove this line"
    for act in (lambda: read_comments(path), lambda: streamed(path, rows=2), lambda: streamed(path, rows=100)):
        with pytest.raises(DataError, match=said):
            act()


def test_a_second_header_in_excel_and_words_that_are_none():
    book = openpyxl.Workbook()
    for row in (["id", "comment"], [1, "굿"], ["id", "comment"], [2, "음"]):
        book.active.append(row)
    book.save("a.xlsx")
    with pytest.raises(DataError, match=r"^a\.xlsx row 3: the header stands here again.* Remove this row"):
        read_comments("a.xlsx", labelled=False)
    write("a.txt", "comment\n")  # a header without rows, not a comment
    lines = write("b.txt", "굿\ncomment\n음\ncomment\n")
    assert len(read_comments(lines, labelled=False, delimiter="none")) == 4
    columns = write("c.csv", "id,comment\nid,굿\n1,comment\n")
    assert read_comments(columns, labelled=False)["comment"].tolist() == ["굿", "comment"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl", "a.json"])
def test_two_byte_order_marks_are_none(name, encoding, monkeypatch):
    content = {"a.jsonl": JSON_LINES, "a.json": f"[{','.join(JSON_LINES.splitlines())}]"}.get(name, TABLE)
    path = write(name, ("\ufeff\ufeff" + content).encode(encoding))
    table = read_comments(path)
    assert table["comment"].tolist() == streamed(path)
    assert list(table.columns) == ["id", "comment", "label"] and len(table) == 2
    assert read_comments(path, encoding=encoding)["comment"].equals(table["comment"])
    monkeypatch.setattr(tables, "_BLOCK", 3)  # a mark of its own in each of the first blocks
    assert read_comments(path)["comment"].equals(table["comment"])
    with pytest.raises(DataError, match="is empty"):
        read_comments(write(name, "\ufeff\ufeff\n".encode(encoding)))


HALF = [
    r'"id": 1, "comment": "굿", "memo": "x\ud800"',
    r'"id": 1, "comment": "굿", "m\udc00": 1',
    r'"id": 1, "comment": "굿", "memo": {"a": [1, {"b": "\udbff"}]}',
    r'"id": 1, "comment": "굿\ud800"',
]


@pytest.mark.parametrize("fields", HALF)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_anywhere_in_json(name, fields):
    rows = [r'{"id": 0, "comment": "\ud83d\udc4d", "label": 0}', f'{{{fields}, "label": 0}}']
    path = write(name, "\n".join(rows) if name == "a.jsonl" else f"[{','.join(rows)}]")
    said = rf"^{name} {'line' if name == 'a.jsonl' else 'row'} 2: the (memo|key|b|comment) .*holds half a character"
    whole = [lambda: read_comments(path), lambda: streamed(path, rows=1)]
    for act in [*whole, lambda: write_submission([1, 1], path, f"out{Path(name).suffix}")]:
        with pytest.raises(DataError, match=said) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert os.listdir() == [name]


def test_half_a_character_in_a_sample_of_python():
    sample = pd.DataFrame({"id": ["1", "2"], "memo": ["굿", "x\ud800"], "label": ["0", "0"]}, dtype=object)
    for out in ("out.txt", "out.csv", "out.jsonl", "out.xlsx"):
        with pytest.raises(DataError, match="the sample index 1: the memo .* holds half a character"):
            write_submission([1, 1], sample, out)
        with pytest.raises(DataError, match="name of the column .* holds half a character"):
            write_submission([1, 1], sample.set_axis(pd.Index(["id", "m\udc00", "label"], dtype=object), axis=1), out)
        with pytest.raises(DataError, match="prediction for id '2': the label .* holds half a character"):
            write_submission(["good", "x\ud800"], sample.assign(memo="", label=""), out)
    assert os.listdir() == []


def workbook(path, *rows, **sheets):
    """An Excel file; the rows of the first sheet, or sheets by their names."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, cells in (sheets or {"Sheet": rows}).items():
        sheet = book.create_sheet(title)
        for row in cells:
            sheet.append(row)
    book.save(path)
    return Path(path)


def test_escapes_of_excel_are_the_characters_they_stand_for():
    text = "두_x000D_\n줄"
    path = workbook("a.xlsx", ["id", "comment_x000D_", "label"], [1, text, 0], [2, "_x005F_x000D_ _xD83D_", 1])
    table = read_comments(path)
    assert table["comment"].tolist() == streamed(path) == ["두 줄", "_x000D_ _xD83D_"]
    write_submission([1, 0], path, "out.xlsx")
    assert openpyxl.load_workbook("out.xlsx").active["B2"].value == text  # handed through as it stood
    sample = pd.DataFrame({"id": ["1"], "memo": ["_x000D_"], "label": [""]})
    write_submission(["_x0041_"], sample, "own.xlsx")
    assert read_table("own.xlsx").to_numpy().tolist() == [["1", "_x000D_", "_x0041_"]]


UNSEEN = ["\u200b", "\u2060", "\ufeff", "\u200b \ufeff", "\u3164", "\u200d\u200b", "\u3000\u200b", "&#8203;"]


@pytest.mark.parametrize("comment", UNSEEN)
def test_comments_of_what_cannot_be_seen_are_blank(comment):
    path = write("a.csv", f"id,comment,label\n1,굿,1\n2,{comment},0\n3,\u200b음,0\n")
    with pytest.raises(DataError, match=r"^a\.csv line 3: the comment is empty"):
        read_comments(path)
    with pytest.raises(DataError, match="line 3: the comment is empty"):
        streamed(path, rows=1)
    reading = Reading(skip_blank=True)
    assert read_comments(path, reading=reading)["comment"].tolist() == streamed(path, reading) == ["굿", "\u200b음"]
    if comment[0] not in "&<":
        with pytest.raises(DataError, match="table index 0: the comment is empty"):
            read_comments(pd.DataFrame({"comment": [comment]}), labelled=False)


def test_labels_and_names_without_what_stands_around_them_unseen():
    rows = "1,굿,\u200b긍정\n2,굿굿,긍정\u2060\n3,음,부정\n4,음음, \ufeff부정 \n"
    path = write("a.csv", f"id,\u200bcomment,label\ufeff\n{rows}")
    assert read_comments(path)["label"].tolist() == ["긍정", "긍정", "부정", "부정"]
    assert read_comments(path, labels=["긍정", "\u200b부정"])["label"].nunique() == 2
    with pytest.raises(DataError, match="line 2: the label is missing"):
        read_comments(write("b.csv", "comment,label\n굿,\u200b\n"))
    write_submission(["긍정", "부정", "부정", "긍정"], path, "out.csv")
    assert read_comments("out.csv")["label"].tolist() == ["긍정", "부정", "부정", "긍정"]


@pytest.mark.parametrize("inner, name", [("train.csv", "data.zip"), ("train.txt", "a.v2.zip"), ("a/b.jsonl", "A.ZIP")])
def test_a_zip_is_what_the_file_in_it_is(name, inner):
    path = write(name, packed((JSON_LINES if inner.endswith("l") else TABLE).encode(), ".zip", inner))
    table = read_comments(path)
    assert table["comment"].tolist() == streamed(path) and len(table) == 2
    out = write_submission([1, 1], path)
    assert out.suffix == {"train.csv": ".csv", "train.txt": ".txt", "a/b.jsonl": ".jsonl"}[inner]
    write_submission([1, 1], path, "out.zip")
    assert read_comments("out.zip")["label"].tolist() in (["1", "1"], [1, 1])
    os.mkdir("folder")
    Path("folder/a.zip").write_bytes(path.read_bytes())
    assert streamed(Path("folder")) == table["comment"].tolist()
    with pytest.raises(DataError, match="b.zip: of unknown format"):
        read_comments(write("b.zip", packed(b"a", ".zip", "a.dat")))


@pytest.mark.parametrize("suffix", [".xlsx", ".parquet"])
def test_an_encoding_is_of_text(suffix):
    path = Path(f"a{suffix}")
    frame = pd.DataFrame({"id": [1, 2], "comment": TWO, "label": [0, 1]})
    frame.to_excel(path, index=False) if suffix == ".xlsx" else frame.to_parquet(path, index=False)
    reading = Reading(Dialect(encoding="cp949"))
    for act in (lambda: read_comments(path, encoding="cp949"), lambda: streamed(path, reading)):
        with pytest.raises(DataError, match=rf"^a\{suffix}: the encoding stands in .* Leave out encoding="):
            act()
    text = write("b.csv", TABLE.encode("cp949"))  # of two files it is for the one that is text
    assert sample_comments(path, text, reading) == sample_comments(text, path, reading) == TWO


def test_excel_behind_a_password_and_what_is_no_excel():
    ole = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)
    for content, said in (
        (ole + "EncryptedPackage".encode("utf-16-le") + bytes(600), "is encrypted. Save it in Excel without a pass"),
        (ole, "is an old Excel file .*Save it as .xlsx"),
        (b"PAR1" + bytes(20), "is a Parquet file"),
        (OTHER_FORMATS["is a Git LFS pointer.*git lfs pull"], "is a Git LFS pointer"),
        (OTHER_FORMATS["is a web page"], "is a web page"),
        ("id,comment\n1,굿\n", "not a whole Excel file"),
    ):
        path = write("a.xlsx", content)
        for act in (lambda path=path: read_comments(path), lambda path=path: streamed(path)):
            with pytest.raises(DataError, match=rf"^a\.xlsx: {said}") as caught:
                act()
            assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"^a\.parquet: is a Git LFS pointer"):
        read_comments(write("a.parquet", OTHER_FORMATS["is a Git LFS pointer.*git lfs pull"]))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv"])
@pytest.mark.parametrize("mark", ["::", "@@", "^^"])
@pytest.mark.parametrize("header", [True, False])
def test_separators_of_several_characters_are_named(header, mark, name):
    text = TABLE.replace(",", mark) if header else "1::굿, 굿::1\n2::음::0\n".replace("::", mark)
    path = write(name, text)
    if not header and mark != "::":
        return  # `^^` is a face
    said = rf"^a\.\w+: is parted by '{re.escape(mark)}', .*Replace it by a tab"
    for act in (lambda: read_comments(path), lambda: streamed(path)):
        with pytest.raises(DataError, match=said):
            act()
    assert len(streamed(path, Reading(Dialect(delimiter="none")))) == text.count("\n")


def test_faces_are_no_separators():
    for lines in (["굿^^", "음^^"], ["굿~~", "음~~"], ["굿::", "음"], ["a::b"], ["리뷰~~", "굿~~"], ["리뷰^^굿", "음"]):
        assert read_comments(write("a.txt", "\n".join(lines)), labelled=False)["comment"].tolist() == lines


def test_formulas_without_a_result_are_handed_through():
    rows = (["id", "comment", "memo", "label"], [1, "굿", "=A2+1", "=1-1"], [2, "음", "=SUM(A2:A3)", None])
    path = workbook("a.xlsx", Sheet=rows, Other=[["=Sheet!A2*2"], [7]])
    write_submission([1, 0], path, "out.xlsx")
    book = openpyxl.load_workbook("out.xlsx")
    right = [rows[0], [1, "굿", "=A2+1", 1], [2, "음", "=SUM(A2:A3)", 0]]
    assert [list(row) for row in book["Sheet"].values] == right
    assert book["Other"]["A1"].value == "=Sheet!A2*2"
    with zipfile.ZipFile("a.xlsx") as archive:  # as Excel leaves it, with the result
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet = parts["xl/worksheets/sheet1.xml"].decode()
    assert sheet.count("<v />") + sheet.count("<v></v>") >= 2
    parts["xl/worksheets/sheet1.xml"] = sheet.replace("<f>A2+1</f><v />", "<f>A2+1</f><v>2</v>").replace(
        "<f>A2+1</f><v></v>", "<f>A2+1</f><v>2</v>"
    ).encode()
    with zipfile.ZipFile("b.xlsx", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    write_submission([1, 0], "b.xlsx", "out.xlsx")
    book = openpyxl.load_workbook("out.xlsx")
    assert [book["Sheet"][cell].value for cell in ("C2", "C3")] == [2, "=SUM(A2:A3)"]


SPACED = 'id, "comment", "label"\n1, "국이 식었어요, 정말", "0"\n2, 면발이 쫄깃해요, 1\n3, "두\n줄; ""굿""", 1\n'


@pytest.mark.parametrize("delimiter", [",", ";", "|"])
@pytest.mark.parametrize("given_delimiter", [True, False])
@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_spaces_before_quotation_marks(name, given_delimiter, delimiter):
    path = write(name, SPACED.replace(",", delimiter).replace("줄;", "줄"))
    reading = Reading(Dialect(delimiter=delimiter)) if given_delimiter else None
    table = read_comments(path, reading=reading)
    right = [f"국이 식었어요{delimiter} 정말", "면발이 쫄깃해요", '두 줄 "굿"']
    assert table["comment"].tolist() == streamed(path, reading) == streamed(path, reading, 1) == right
    assert table["label"].tolist() == ["0", "1", "1"] and list(table.columns) == ["id", "comment", "label"]
    out = write_submission(["1", "0", "0"], path, f"out{path.suffix}")
    written = 'id, "comment", "label"\n1, "국이 식었어요, 정말","1"\n2, 면발이 쫄깃해요,0\n'.replace(",", delimiter)
    assert out.read_text("utf-8").startswith(written) and read_comments(out)["comment"].tolist() == right


@pytest.mark.parametrize(
    "row, comment",
    [
        ('1, "최고" 라니, 1', '"최고" 라니'),
        ('1, 최고 "라니", 1', '최고 "라니"'),
        ('1,"a, ""b""", 1', 'a, "b"'),
        ('1, "최고", 1', "최고"),
        ('1, "최고, 1', '"최고'),
    ],
)
def test_quotation_marks_after_a_space_that_are_the_comment_s_own(row, comment):
    assert read_comments(write("a.csv", f"id,comment,label\n{row}\n"))["comment"].tolist() == [comment]


def test_a_space_before_a_quotation_mark_where_no_reading_fits():
    path = write("a.csv", 'id,comment,label\n1, "a, b", 1\n2, "최고" 라니, 1\n')
    with pytest.raises(DataError, match=r"^a\.csv line 2: 4 fields where the header has 3"):
        read_comments(path)
    late = "".join(f'{n}, "굿, {n}", 1\n' for n in range(1500))
    path = write("b.csv", f'id,comment,label\n{late}9999, "최고" 라니, 1\n')
    for act in (lambda: read_comments(path), lambda: streamed(path)):
        with pytest.raises(DataError, match=r"^b\.csv line 1502: its quotation marks do not pair"):
            act()


@pytest.mark.parametrize("one, other", [("1", "１"), ("0", "00"), ("7", "007"), ("good", "ｇｏｏｄ"), ("０１", "1")])
def test_labels_that_only_look_alike_are_no_two_classes(one, other):
    path = write("a.csv", f"id,comment,label\n1,굿,{one}\n2,음,x\n3,굿굿,{one}\n4,음음,{other}\n")
    said = rf"^a\.csv line 5: the label '{other}' differs from '{one}' in line 2 only by the width .*Write both alike"
    with pytest.raises(DataError, match=said) as caught:
        read_comments(path)
    assert "\n" not in str(caught.value) and caught.value.column == "label"
    of_python = read_comments(pd.DataFrame({"comment": ["굿", "음"], "label": [one, other]}))
    assert of_python["label"].tolist() == [one, other]
    assert len(read_comments(path, labelled=False)) == len(streamed(path)) == 4


def test_labels_of_one_form_stay_as_they_are():
    for labels in (["01", "02", "10"], ["１", "２", "３"], ["0", "1", "-1"], ["½", "1⁄2", "①"], ["0", "0.0", "1"]):
        rows = "".join(f"굿{n},{label}\n" for n, label in enumerate(labels))
        found = read_comments(write("a.csv", f"comment,label\n{rows}"))["label"].tolist()
        assert found == ["0", "0", "1"] if "0.0" in labels else found == labels


GOOD = [["id", "comment", "label"], [1, "국이 식었어요", 0], [2, "면발이 쫄깃해요", 1]]
COVERS = {  # the first sheet
    "title": [["2024년 후기"], ["만든 사람", "김", None, "x"], [], ["끝"]],
    "empty": [],
    "line": [["2024년 후기"]],
    "column": [["2024년 후기"], ["굿"], ["음"]],
}


@pytest.mark.parametrize("cover", COVERS)
def test_a_cover_sheet_is_named_with_the_sheets_behind_it(cover):
    path = workbook("a.xlsx", 표지=COVERS[cover], 메모=[["메모"]], 자료=GOOD)
    said = r"^a\.xlsx.*: .*Sheet '표지' was read, of '표지', '메모', '자료'\. Pass sheet=\.\.\. with '자료'\.$"
    for act in (lambda: read_comments(path), lambda: streamed(path)):
        with pytest.raises(DataError, match=said) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert read_comments(path, sheet="자료")["comment"].tolist() == TWO


@pytest.mark.parametrize("title", [[["2024년 후기"]], [["2024년 후기"], []], [["후기", "1월"], ["김", None]]])
def test_a_title_above_the_header_is_named(title):
    path = workbook("a.xlsx", *title, *GOOD)
    rows = "row 1" if len(title) == 1 else "rows 1 to 2"
    said = f"Row 1 was taken for the header, which seems to stand in row {len(title) + 1}. Remove {rows} above it"
    for act in (lambda: read_comments(path), lambda: streamed(path)):
        with pytest.raises(DataError, match=said):
            act()
    path = workbook("b.xlsx", *title, ["comment"], ["굿"])
    with pytest.raises(DataError, match=said):
        read_comments(path, labelled=False)
    path = workbook("c.xlsx", *title, ["번호", "의견", "느낌"], [1, "굿", 0])
    with pytest.raises(DataError, match=r"a cell beyond the . columns .* Where row 1 is a title, remove it"):
        read_comments(path)
    with pytest.raises(DataError, match=said):
        read_comments(path, comment_column="의견")


ROWS_OF_JSON = [{"id": 1, "comment": "굿", "label": 1}, {"id": 2, "comment": "음", "label": 0}]
WRAPPED = {
    "data": ({"data": ROWS_OF_JSON}, "whose rows stand under 'data'. Write that array alone"),
    "deep": ({"count": 2, "result": {"items": ROWS_OF_JSON}}, "whose rows stand under 'result.items'"),
    "columns": (
        {"comment": {"0": "굿", "1": "음"}, "label": {"0": 1, "1": 0}},
        r"of columns \('comment', 'label'\).*to_json\(orient=\"records\"\)",
    ),
    "one column": ({"comment": {"0": "굿"}}, r"of columns \('comment'\)"),
    "lists": ({"comment": ["굿", "음"], "label": [1, 0]}, "of columns"),
    "split": ({"columns": ["comment"], "index": [0, 1], "data": [["굿"], ["음"]]}, "of columns"),
    "nothing": ({}, "holds one empty JSON object"),
    "no row": ([], r"no rows\. Write one object for each"),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_that_is_no_rows_is_told_by_what_it_is(indent, name, kind):
    value, said = WRAPPED[kind]
    path = write(name, "\n" + json.dumps(value, ensure_ascii=False, indent=indent) + "\n\n")
    for act in (lambda: read_comments(path, labelled=False), lambda: streamed(path), lambda: read_table(path)):
        with pytest.raises(DataError, match=rf"^{name}: .*{said}") as caught:
            act()
        assert "\n" not in str(caught.value) and str(caught.value).count(name) == 1


def test_rows_of_one_object_are_rows():
    for row, reading in (
        ({"comment": "굿", "replies": [{"text": "네"}]}, None),
        ({"comment": "굿", "by": {"name": "김"}}, None),
        ({"data": {"text": "굿"}}, Reading(comment_column="data.text")),
    ):
        path = write("a.jsonl", "\n" + json.dumps(row, ensure_ascii=False))
        assert read_comments(path, labelled=False, reading=reading)["comment"].tolist() == ["굿"]
        assert streamed(path, reading) == ["굿"]


def test_a_comment_inside_of_an_object_is_found_and_told():
    path = write("a.jsonl", '{"id": 1, "data": {"text": "굿", "by": "김"}, "label": 1}\n' * 2)
    said = r"^a\.jsonl: no comment column among 'id', 'data', 'label' .*Pass comment_column=\.\.\. with 'data.text'"
    for act in (lambda: read_comments(path), lambda: streamed(path)):
        with pytest.raises(DataError, match=said):
            act()
    with pytest.raises(DataError, match=r"Pass text_from=\.\.\. .*, or comment_column=\.\.\. with 'data\.text'"):
        sample_comments(path)
    path = write("b.json", '[{"data": {"후기": "굿"}}]')
    with pytest.raises(DataError, match="Inside of objects stand 'data.후기', which can be named so"):
        read_comments(path)
    path = write("c.jsonl", '{"comment": {"text": "굿"}, "label": 1}\n{"comment": {"text": "음"}, "label": 0}')
    with pytest.raises(DataError, match=r"line 1: the comment is no text, but an object with 'text'\. .*data\.text"):
        read_comments(path)
    assert read_comments(path, comment_column="comment.text")["comment"].tolist() == ["굿", "음"]


def test_a_parquet_column_of_structs_is_named():
    frame = pd.DataFrame({"id": [1, 2], "data": [{"text": "굿", "by": "김"}, {"text": "음", "by": "박"}]})
    frame.to_parquet("a.parquet")
    said = r"^a\.parquet: no comment column among 'id', 'data' .*Inside of columns stand 'data.text', 'data.by'"
    for act in (lambda: read_comments("a.parquet"), lambda: streamed(Path("a.parquet"))):
        with pytest.raises(DataError, match=said) as caught:
            act()
        assert "\n" not in str(caught.value)
    frame.rename(columns={"data": "comment"}).to_parquet("b.parquet")
    with pytest.raises(DataError, match="row 1: the comment is no text, but an object with 'text', 'by'"):
        read_comments("b.parquet", labelled=False)


def test_a_label_that_is_added_is_quoted_as_the_header_is():
    for text, right in (
        ('id,comment\n1,"국이 식었어요, 정말"\n2,굿\n', 'id,comment,label\n1,"국이 식었어요, 정말",0\n2,굿,1\n'),
        ('"id","comment"\n"1","굿"\n"2","음"\n', '"id","comment","label"\n"1","굿","0"\n"2","음","1"\n'),
    ):
        assert write_submission(["0", "1"], write("a.csv", text), "out.csv").read_text("utf-8") == right


# --- what spreadsheets and dumps leave behind -------------------------------------------------------------------------


def test_an_error_of_excel_is_no_comment(tmp_path):
    book = openpyxl.Workbook()
    for row in (("id", "comment", "label"), (1, "좋아요", 1), (2, "#NAME?", 0)):
        book.active.append(row)
    assert book.active["B3"].data_type == "e"
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"a\.xlsx row 3: .*an error of Excel.*with ' before it"):
        read_comments(tmp_path / "a.xlsx")
    (tmp_path / "a.csv").write_text("id,comment,label\n1,#NAME?,1\n2,좋아요,0\n", encoding="utf-8")  # a person's own
    assert read_comments(tmp_path / "a.csv").comment[0] == "#NAME?"


@pytest.mark.parametrize("label", [r"\N", "#DIV/0!", "#VALUE!", "NaT", "-nan"])
def test_words_for_no_label_of_databases_and_spreadsheets(label, tmp_path):
    (tmp_path / "a.tsv").write_text(f"id\tcomment\tlabel\n1\t좋아요\t1\n2\t별로\t{label}\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 3: the label is missing"):
        read_comments(tmp_path / "a.tsv")
    assert read_comments(tmp_path / "a.tsv", keep_na=True).label.tolist() == ["1", label]


def test_a_hidden_sheet_is_not_the_first(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(("text", "y"))
    book.active.append(("숨은 글", 1))
    book.active.sheet_state = "hidden"
    own = book.create_sheet("자료")
    for row in (("id", "comment", "label"), (1, "좋아요", 1), (2, "별로", 0)):
        own.append(row)
    book.active = 1
    book.save(tmp_path / "a.xlsx")
    assert read_comments(tmp_path / "a.xlsx").comment.tolist() == ["좋아요", "별로"]
    assert read_comments(tmp_path / "a.xlsx", reading=Reading(Dialect(sheet="Sheet"))).comment.tolist() == ["숨은 글"]


def test_other_columns_of_the_names_of_ours_are_kept(tmp_path):
    (tmp_path / "a.csv").write_text("no,review,label,label_other,id\n7,좋아요,1,a,x\n8,별로,0,b,y\n", encoding="utf-8")
    table = read_comments(tmp_path / "a.csv", reading=Reading(id_column="no"))
    assert table.id.tolist() == ["7", "8"] and table.id_other.tolist() == ["x", "y"]
    assert table.label_other.tolist() == ["a", "b"]
