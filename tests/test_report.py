"""What would bore a reader of 06b_report: the page in a browser, and what `--no-comments` leaves in a run's folder."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from gemma_lora_sentiment import GemmaLoraClassifier, cli, read_comments
from gemma_lora_sentiment.model import tiny_gemma
from gemma_lora_sentiment.report import report_html

HOSTILE = (
    "<script>document.title = 'taken'</script> 국물 & 면",
    "</td></table><img src=x onerror=\"document.title='taken'\"> &amp; 그저 그래요",
    "\u202eabc\u202c \"따옴표\" 'x' &lt;b&gt; 최악이에요",
)
PHRASES = ("맛있어요", "별로예요", "또 갈게요", "실망했어요", "친절해요", "다시는 안 가요")
ROWS = [
    *((str(10 + i), f"{PHRASES[i % 6]} {i}번째", str(1 - i % 2)) for i in range(24)),
    *((f"h{i}", text, str(i % 2)) for i, text in enumerate(HOSTILE)),
    ("copy", f"{PHRASES[0]} 0번째", "0"),  # of the first, with the other label
]
COMMENTS = sorted({comment for _, comment, _ in ROWS})
NUMBERS = ("accuracy", "macro_f1", "roc_auc", "log_loss")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def done(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a random base of two layers and a file of comments, some of them hostile."""
    folder = tmp_path_factory.mktemp("report")
    tiny_gemma(folder / "tiny")
    lines = ["\t".join(row) for row in [("id", "comment", "label"), *ROWS]]
    (folder / "rows.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def made(work, name, *arguments):
    """A folder that a command wrote, made once."""
    if not (work / name).exists():
        done(*arguments, "--out", work / name, "--quiet")
    return work / name


def options(work):
    return "--preset", work / "tiny", "--epochs", 1, "--rank", 2


@pytest.fixture(scope="module")
def crossed(work):
    return made(work, "crossed", "cross-validate", work / "rows.tsv", *options(work), "--folds", 2)


@pytest.fixture(scope="module")
def crossed_quietly(work):
    arguments = ("cross-validate", work / "rows.tsv", *options(work), "--folds", 2, "--repeats", 2)
    return made(work, "crossed quietly", *arguments, "--no-comments")


@pytest.fixture(scope="module")
def trained_quietly(work):
    return made(work, "trained quietly", "train", work / "rows.tsv", *options(work), "--no-comments")


@pytest.fixture(scope="module")
def evaluated_quietly(work, trained_quietly):
    return made(work, "evaluated quietly", "evaluate", trained_quietly, work / "rows.tsv", "--no-comments")


class Page(HTMLParser):
    """Elements, the text, and each number with the term, or the row and column, that it stands under."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.cards, self.tables = [], "", {}, []
        self.inside = self.term = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append({"text": "", "numbers": []})
        elif tag == "data":
            number = float(attributes["value"])
            if self.inside == "dd":
                self.cards[self.term].append(number)
            elif self.inside == "table":
                self.tables[-1][-1][-1]["numbers"].append(number)
        if tag in ("style", "dt", "dd", "table"):
            self.inside = tag

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = None

    def handle_data(self, data):
        if self.inside == "style":
            return
        self.text += data
        if self.inside == "dt":
            self.term = data
            self.cards[data] = []
        elif self.inside == "table" and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1]["text"] += data


@pytest.fixture(scope="module")
def browser():
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"there is no browser on this machine: none of {', '.join(BROWSERS)} is on PATH")

    def opened(path, *flags):
        """The page at `path` after a browser has opened it, as text."""
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", *flags]
        command = [found[0], *flags, f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", path.as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=180)
        assert result.returncode == 0 and "</html>" in result.stdout, result.stderr[-2000:]
        return result.stdout

    return opened


# --- in a browser ---------------------------------------------------------------------------------------------------


def test_browser_shows_the_numbers_of_the_file(browser, crossed, tmp_path):
    path = Path(shutil.copy(crossed / "report.html", tmp_path / "report.html"))
    dom = browser(path)
    page = Page(dom)
    metrics = json.loads((crossed / "cv.json").read_text(encoding="utf-8"))
    shown = dict(zip(NUMBERS, page.cards.values(), strict=True))
    assert shown == {name: [metrics[name], *metrics["intervals"][name]] for name in NUMBERS}
    scores = {row[0]["text"]: [cell["numbers"] for cell in row[1:5]] for row in page.tables[0][1:]}
    names = {"baseline": "TF-IDF baseline", "most_frequent": "most frequent class"}
    for key, name in names.items():
        one = metrics["baselines"][key]
        assert scores[name] == [[one[number], *(one["intervals"][number] or ())] for number in NUMBERS]
    # What strangers wrote is text: it is all there, and none of it has become an element or has run.
    assert not [tag for tag, _ in page.elements if tag in ("script", "iframe", "link", "object")]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert re.search("<title>(.*?)</title>", dom)[1] == "rows.tsv"
    # as it stands: reading takes tags of web exports away
    wrong = pd.read_csv(crossed / "wrong.tsv", sep="\t", dtype=str, quoting=3, keep_default_na=False).comment
    assert len(wrong) and all(comment in page.text for comment in wrong.head(20))
    assert set(read_comments(crossed / "conflicts.tsv").id) == {"10", "copy"} and "Copies with different" in page.text
    sentence = metrics["comparison"]["sentence"]
    assert page.text.index("more accurate" if "equally" not in page.text else "equally") < page.text.index(sentence)


@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_the_screen(browser, crossed, tmp_path, width):
    """Nothing but the frames of tables scrolls sideways, every figure is drawn."""
    page = (crossed / "report.html").read_text(encoding="utf-8")
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>'
    measure = """onload = () => {
      const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
      const drawn = [...page.images].map((image) => image.complete && image.naturalWidth > 0);
      document.title = JSON.stringify([root.clientWidth, root.scrollWidth, drawn]);
    }"""
    (tmp_path / "frame.html").write_text(
        f"<!DOCTYPE html><html><head><title></title><script>{measure}</script></head><body>{frame}</body></html>",
        encoding="utf-8",
    )  # fmt: skip
    dom = browser(tmp_path / "frame.html", "--virtual-time-budget=20000", "--window-size=1400,1000")
    shown, needed, drawn = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert width - 20 <= shown <= width and needed <= shown
    assert len(drawn) == len(list((crossed / "figures").iterdir())) and all(drawn)


# --- without comments -----------------------------------------------------------------------------------------------


def texts_in(folder):
    """Everything a folder holds that could quote a comment: files as bytes, texts of the report, texts in figures."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes().decode("utf-8", errors="replace")
    page = Page(found["report.html"])
    found["report's text"] = page.text
    found["alt texts"] = "\n".join(attributes.get("alt") or "" for _, attributes in page.elements)
    for _, attributes in page.elements:
        if (attributes.get("src") or "").startswith("data:image/png"):
            data = base64.b64decode(attributes["src"].split(",")[1])
            for chunk in re.findall(rb"(?:tEXt|iTXt|zTXt)(.{0,400})", data, flags=re.DOTALL):
                found["texts of figures"] = found.get("texts of figures", "") + chunk.decode("utf-8", errors="replace")
    return found


def quoted(folder):
    return {(name, comment) for name, text in texts_in(folder).items() for comment in COMMENTS if comment in text}


def test_comments_are_found_where_they_may_be(crossed):
    """The search below can fail."""
    names = {name for name, _ in quoted(crossed)}
    assert {"report's text", "oof.tsv", "wrong.tsv", "conflicts.tsv"} <= names and "alt texts" not in names


@pytest.mark.parametrize("command", ["crossed", "trained", "evaluated"])
def test_no_comment_is_in_any_file(command, request):
    folder = request.getfixturevalue(f"{command}_quietly")
    assert quoted(folder) == set()
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "without the comments" in page.text and all(image["alt"] for tag, image in page.elements if tag == "img")
    wrong = pd.read_csv(folder / "wrong.tsv", sep="\t", dtype=str)
    assert list(wrong.columns) == ["id", "label", "prediction", "p_0", "p_1"]
    mistakes = next(table for table in page.tables if [cell["text"] for cell in table[0]][:2] == ["id", "label"])
    assert [row[0]["text"] for row in mistakes[1:]] == list(wrong.id[:20])


def test_without_comments_copies_still_count_once(crossed_quietly, work, tmp_path):
    oof = pd.read_csv(crossed_quietly / "oof.tsv", sep="\t", dtype=str)
    assert list(oof.columns)[:4] == ["id", "group", "label", "prediction"]
    groups = dict(zip(oof.id, oof.group, strict=True))
    assert groups["copy"] == groups["10"] and len(set(groups.values())) == len(ROWS) - 1
    folder = Path(shutil.copytree(crossed_quietly, tmp_path / "run"))
    assert "7 on '1'" in done("decide", folder, "--cost", "1=7").stdout
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "7 on '1'" in Page(page).text and "without the comments" in page and quoted(folder) == set()
    # Two such folders share rows only if they were measured on the same ones.
    other = made(work, "crossed", "cross-validate", work / "rows.tsv", *options(work), "--folds", 2)
    result = done("compare", folder, other, "--out", tmp_path / "compared")
    assert f"{len(ROWS)} rows in both" in result.stdout
    assert "comment" not in (tmp_path / "compared" / "differences.tsv").read_text(encoding="utf-8")
    content = json.loads((folder / "cv.json").read_text(encoding="utf-8"))
    (folder / "cv.json").write_text(json.dumps({**content, "fingerprint": "0"}), encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["compare", str(folder), str(other)])
    assert result.exit_code == 2 and "--rows FILE" in result.stderr


def test_decision_by_cross_validation(crossed, trained_quietly, work, tmp_path):
    run = Path(shutil.copytree(trained_quietly, tmp_path / "run"))
    done("decide", run, "--by", crossed, "--cost", "0=2")
    of_run, of_folds = (
        json.loads(path.read_text(encoding="utf-8")) for path in (run / "metrics.json", crossed / "cv.json")
    )
    assert of_run["decision"]["n"] == of_folds["n"] == len(ROWS) > of_run["n"]
    assert of_run["decision"]["temperature"] == pytest.approx(of_folds["decision"]["temperature"])
    assert "Tried on rows it was not chosen on, 28 comments" in (run / "report.html").read_text(encoding="utf-8")
    done("predict", run, work / "rows.tsv", "--calibrated", "--out", tmp_path / "out.tsv")
    content = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert content["settings"]["recipe"] == "auto" and content["settings"]["batch_size"] == "auto"

    def decided_with(**recipe):
        changed = {**content, "recipe": {**content["recipe"], **recipe}}
        (run / "run.json").write_text(json.dumps(changed), encoding="utf-8")
        return CliRunner().invoke(cli.app, ["decide", str(run), "--by", str(crossed)])

    by_rows = decided_with(batch_size=4, among_labels=0.9, label_smoothing=0.1)  # the rows decide these in each fit
    assert by_rows.exit_code == 0, by_rows.output
    other = decided_with(learning_rate=1.0)
    assert other.exit_code == 2 and "another recipe" in other.stderr


def test_explanations_quote_comments(trained_quietly, work, tmp_path):
    arguments = ["evaluate", trained_quietly, work / "rows.tsv", "--out", tmp_path / "out", "--explain", 2]
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--no-comments"])
    assert result.exit_code == 2 and "--explain" in result.stderr and not (tmp_path / "out").exists()
    done(*arguments)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "spoke against it" in page.text
    # The same command without them leaves nothing of its own behind; what others left is named.
    (tmp_path / "out" / "mine.tsv").write_text("id\tcomment\n1\t맛있어요\n", encoding="utf-8")
    result = done(*arguments[:-2], "--no-comments")
    assert not (tmp_path / "out" / "influence.tsv").exists()
    assert "mine.tsv" in result.stderr and result.stderr.count("holds comments") == 1
    assert {name for name, _ in quoted(tmp_path / "out")} <= {"mine.tsv"}


def test_report_says_which_class_a_figure_counts():
    """A figure counts classes whose letters no font has; the page is read in a browser, which has them."""
    metrics = {"accuracy": 0.5, "macro_f1": 0.5, "roc_auc": 0.5, "log_loss": 0.7, "n": 4}
    said = {}
    for classes in (["환불", "교환", "문의"], ["été", "hiver"], ["0", "1"]):
        page = report_html({**metrics, "classes": classes}, figures={"roc.svg": b"<svg/>"})
        said[classes[0]] = " ".join(Page(page).text.split())
    assert "Class 0 is 환불, class 1 is 교환, class 2 is 문의. A figure counts them so" in said["환불"]
    assert "fonts-nanum" in said["환불"]
    assert "Class 0 is été, class 1 is hiver." in said["été"] and "fonts-nanum" not in said["été"]
    assert "Class 0" not in said["0"]
    without = report_html({**metrics, "classes": ["환불", "교환"]})
    assert "Class 0" not in without  # no figure, nothing to explain


def test_report_says_that_there_is_nothing_to_explain():
    metrics = {"accuracy": 1.0, "macro_f1": 1.0, "roc_auc": 1.0, "log_loss": 0.1, "n": 4, "classes": ["0", "1"]}
    empty = pd.DataFrame(columns=["id", "comment", "label", "prediction", "spoke_for", "spoke_against"])
    assert "There is no wrong answer to explain." in report_html(metrics, tables={"influence": empty})
    assert "to explain" not in report_html(metrics)  # nobody asked


def test_report_tells_where_numbers_come_from(trained_quietly, evaluated_quietly):
    run = json.loads((trained_quietly / "run.json").read_text(encoding="utf-8"))
    text = Page((trained_quietly / "report.html").read_text(encoding="utf-8")).text
    for part in (run["versions"]["jax"], run["device"]["kind"], run["data"]["fingerprint"][:16], "rows.tsv"):
        assert part in text
    assert str(trained_quietly.parent) not in text  # the machine's folders are nobody's business
    assert "were held out" in text and "By epoch" in text
    assert "A saved run, judged on the 28 comments" in (evaluated_quietly / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_quickstart_without_comments(work, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_classifier", lambda *_: GemmaLoraClassifier(str(work / "tiny"), epochs=1, lora_rank=2))
    done("quickstart", "--out", tmp_path / "run", "--no-comments", "--quiet")
    sample = {*read_comments("sample_validation").comment, *read_comments("sample_test").comment}
    sample = {comment for comment in sample if len(comment) > 8}  # a shorter one may be an ordinary word
    texts = texts_in(tmp_path / "run").items()
    assert not [(name, comment) for name, text in texts for comment in sample if comment in text]
    assert len((tmp_path / "run" / "submission.txt").read_text().splitlines()) == 1 + len(read_comments("sample_test"))
