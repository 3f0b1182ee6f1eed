"""What would bore a reader of 06d, 08a, 12 and 12a: refusals, hostile comments and paths, kills, real browsers."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import jax
import numpy as np
import pandas as pd
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from gemma_lora_sentiment import DataError, GemmaLoraClassifier, cli, read_comments
from gemma_lora_sentiment import service as service_room
from gemma_lora_sentiment.label_page import TEXTS, label_html
from gemma_lora_sentiment.labelling import Labelling, LabelTable, StaleError, retrain
from gemma_lora_sentiment.model import tiny_gemma
from gemma_lora_sentiment.service import Limits, ScoringService, api, decision_of, guarded
from gemma_lora_sentiment.web import label_table, web_app, write_like

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> 그저 \"그래요\" &amp;"
PHRASES = ("맛있어요", "별로예요", "또 갈게요", "실망했어요", "친절해요", "다시는 안 가요")
COMMENTS = [HOSTILE, *(f"{PHRASES[i % 6]} {i}번째" for i in range(59))]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SHELL = [sys.executable, "-c", "from gemma_lora_sentiment.cli import app; app()"]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a random base of two layers, a run of it that abstains on some comments, and comments."""
    folder = tmp_path_factory.mktemp("web")
    tiny = tiny_gemma(folder / "tiny")
    clf = GemmaLoraClassifier(preset=str(tiny), epochs=0, max_length=120).fit(["-", "-"], ["0", "1"])
    clf.save(folder / "run")
    sureness = np.sort(clf.predict_proba(COMMENTS[:4]).max(axis=1))
    decision = {"classes": ["0", "1"], "temperature": 1.0, "cost": None, "threshold": None}
    decision["confidence"] = float(sureness[1] + sureness[2]) / 2
    (folder / "run" / "metrics.json").write_text(json.dumps({"decision": decision}), encoding="utf-8")
    (folder / "run" / "report.html").write_text("<h1>the report</h1>", encoding="utf-8")
    escaped = HOSTILE.replace("<", "&lt;").replace(">", "&gt;")  # reading a file takes tags out, and these in
    table = pd.DataFrame({"id": range(26), "comment": [escaped, *COMMENTS[1:26]]})
    table.to_csv(folder / "comments.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def service(work):
    service = ScoringService(GemmaLoraClassifier.load(work / "run"), limits=Limits(rows=20, characters=500, body=9000))
    yield service
    service.close()


@pytest.fixture
def client(service):
    return TestClient(guarded(api(service)), base_url="http://localhost")


def shell(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, result.stderr.strip()


@contextmanager
def server(folder, *arguments, ends=signal.SIGTERM):
    """A command that serves, in a process of its own with a folder for temporary files: address and process."""
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    command = [*SHELL, *map(str, arguments), "--port", "0", "--quiet"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"listening on (\S+)", line):
                break
        else:
            raise AssertionError(f"{''.join(said)}{process.stderr.read()}")
        yield found[1], process
        if process.poll() is None:
            process.send_signal(ends)
            said, errors = process.communicate(timeout=30)
            assert "Traceback" not in errors, errors
            assert not any(comment in said + errors for comment in COMMENTS), "a comment was logged"
    finally:
        process.kill()
        process.wait()


@contextmanager
def browser(locale="ko-KR"):
    """Chromium with one context, which records what is fetched from elsewhere."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"there is no browser: {', '.join(BROWSERS)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        context = chromium.new_context(locale=locale, accept_downloads=True, viewport={"width": 1100, "height": 800})
        context.set_default_timeout(30_000)
        context.elsewhere = []
        context.on("request", lambda request: _note(context.elsewhere, request.url))
        try:
            yield context
        finally:
            chromium.close()


def _note(elsewhere, url):
    if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url):
        elsewhere.append(url)


# ---- for programs


def test_who_gives_up_waiting_does_not_end_the_service(service):
    """As `asyncio.wait_for` does on a timeout: it cancels the future that `submit` gave."""
    service.submit(["맛있어요"] * 3).cancel()
    assert len(service.submit(["또 갈게요"]).result(timeout=120).labels) == 1


def test_requests_together_are_what_they_are_alone(service, client):
    compiled = []

    def listen(name, *_, **__):
        compiled.extend([name] * (name == "/jax/core/compile/backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    texts = [*COMMENTS, "아주 " * 160]
    offline = service.clf.predict_proba(texts)
    replies, threads = {}, []
    try:
        for i in range(12):

            def ask(i=i):
                replies[i] = client.post("/predict", json={"comments": texts[i::12]}).json()

            threads.append(threading.Thread(target=ask))
            threads[-1].start()
        for thread in threads:
            thread.join()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == [], "a request compiled something"
    for i, reply in replies.items():
        assert reply["classes"] == ["0", "1"] and not any(reply["abstains"])
        np.testing.assert_allclose(reply["probabilities"], offline[i::12], atol=2e-4)
        assert reply["labels"] == [str(place) for place in np.argmax(reply["probabilities"], axis=1)]


def test_words_of_several_tokens_compile_nothing_later(work, tmp_path):
    words = {"a": "정말 아주 좋아요 그리고 또", "b": "나빠요"}
    clf = GemmaLoraClassifier(preset=str(work / "tiny"), epochs=0, label_words=words, max_length=200).fit(
        ["-", "-"], ["a", "b"]
    )
    assert not clf.words_.single_token
    service, compiled = ScoringService(clf), []

    def listen(name, *_, **__):
        compiled.extend([name] * (name == "/jax/core/compile/backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        service.submit(["짧아요"]).result()
        service.submit([*COMMENTS, "아주 " * 300]).result()  # lines of both lengths
        service.submit(["국물이 진하고 좋았어요"], explain=True).result()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        service.close()
    assert compiled == []


@pytest.mark.parametrize(
    "content, status, said",
    [
        (b"{", 400, "no JSON"),
        (b'{"comments": ["\xff"]}', 400, "no JSON in UTF-8"),
        (b"[" * 8000, 400, "no JSON"),
        (b"[]", 422, "must be"),
        (b'{"comments": ["a"], "more": 1}', 422, "nothing else"),
        (b'{"comments": "a"}', 422, "must be"),
        (b'{"comments": [1]}', 422, "comment 0 is no text"),
        (b'{"comments": ["a", "  "]}', 422, "comment 1 is no text"),
        (b'{"comments": ["\\ud800"]}', 422, "half a character"),
        (json.dumps({"comments": ["a"] * 21}).encode(), 422, "21 comments, and a request may hold 20"),
        (json.dumps({"comments": ["a" * 501]}).encode(), 422, "501 characters, and may have 500"),
        (json.dumps({"comments": ["a" * 9000]}).encode(), 413, "more than 9000 bytes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(client, content, status, said):
    reply = client.post("/predict", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status and list(reply.json()) == ["error"]
    assert said in reply.json()["error"] and "\n" not in reply.json()["error"]


def test_other_requests(service, client, work):
    for decision in (None, decision_of(work / "run")):
        service.decision = decision
        assert client.post("/predict", json={"comments": []}).json()["labels"] == []
    service.decision = None
    assert client.post("/predict", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.get("/predict").status_code == 405 and client.get("/report").status_code == 404
    assert client.get("/health", headers={"host": "evil.example:8000"}).status_code == 421
    assert client.get("/health", headers={"host": "127.0.0.1:8000"}).json()["status"] == "ok"
    assert client.get("/docs").headers["x-content-type-options"] == "nosniff"
    assert "http" not in re.sub(r"httpx", "", client.get("/docs").text), "no other site"
    described = client.get("/openapi.json").json()["paths"]["/predict"]["post"]
    assert described["requestBody"]["content"]["application/json"]["schema"]["required"] == ["comments"]


def test_too_many_that_wait_are_told_so(service, client, monkeypatch):
    monkeypatch.setattr(service, "limits", service.limits._replace(waiting=1))
    reply = client.post("/predict", json={"comments": ["a", "b"]})
    assert reply.status_code == 429 and "waiting already" in reply.json()["error"]


def test_one_bad_request_harms_no_other(service, monkeypatch):
    proper = service.clf.predict_proba

    def fails_on_bad(comments):
        if "bad" in comments:
            raise RuntimeError("not finite")
        return proper(comments)

    monkeypatch.setattr(service.clf, "predict_proba", fails_on_bad)
    futures = [service.submit([text]) for text in ("good", "bad", "fine")]
    assert len(futures[0].result().labels) == len(futures[2].result().labels) == 1
    with pytest.raises(RuntimeError, match="not finite"):
        futures[1].result()
    assert service.submit(["afterwards"]).result().probabilities.shape == (1, 2)


def test_without_gradio_one_line_says_how_to_get_it(work, monkeypatch):
    monkeypatch.setattr(service_room.importlib.util, "find_spec", lambda name: None)
    commands = [("serve", work / "run"), ("label", work / "comments.csv", "--labels", "0,1"),
                ("export", work / "run", "--to", work / "s", "--format", "space")]  # fmt: skip
    for command in commands:
        status, error = shell(*command)
        assert status == 2 and error.startswith("error: Gradio is not installed") and len(error.splitlines()) == 1


def test_mistakes_of_the_shell_are_one_line(work, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, error = shell("serve", work / "run", "--port", port)
        assert status == 1 and f"port {port} cannot be used" in error and len(error.splitlines()) == 1
    out = ("--out", tmp_path / "labels.tsv")
    for labels in ("0", "0,0", ","):
        assert shell("label", work / "comments.csv", "--labels", labels, *out)[0] == 2
    assert shell("label", work / "lost.csv", "--labels", "0,1", *out)[0] == 2
    assert shell("label", work / "comments.csv", "--labels", "0,1", "--out", tmp_path / "labels.csv")[0] == 2
    status, error = shell("export", work / "run", "--to", tmp_path / "space", "--format", "space")
    assert status == 2 and "on this machine, where a Space cannot read it" in error
    assert not list(tmp_path.iterdir()), "nothing half-written"


# ---- files


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".xlsx", ".parquet", ".txt"])
def test_a_file_comes_back_in_its_form(service, tmp_path, suffix):
    table = pd.DataFrame({"id": ["a", "b"], "comment": [HOSTILE, "=1+1 최고"], "label": ["0", "0"], "stars": [5, 1]})
    source = tmp_path / f"in{suffix}"
    if suffix == ".xlsx":
        table.assign(comment=["가", "나"]).to_excel(source, index=False)
    elif suffix == ".parquet":
        table.to_parquet(source)
    elif suffix == ".jsonl":
        table.to_json(source, orient="records", lines=True, force_ascii=False)
    elif suffix == ".txt":
        source.write_text("\n".join(table.comment), encoding="utf-8")
    else:
        table.to_csv(source, sep="\t" if suffix == ".tsv" else ",", index=False)
    told = []
    labelled = label_table(service, source, lambda part, rows: told.append(rows))
    made = write_like(labelled, source, tmp_path)
    assert made.suffix == (".tsv" if suffix == ".txt" else suffix) and told == [2]
    again = read_comments(made)
    assert again.label.astype(str).tolist() == labelled.label.tolist() and len(again) == 2
    if suffix != ".txt":
        assert again["id"].tolist() == ["a", "b"] and again.stars.astype(int).tolist() == [5, 1]
        assert "given_label" in again
    if suffix == ".xlsx":
        import openpyxl

        made = write_like(labelled.assign(comment=["=1+1", "나"]), source, tmp_path)
        cells = [cell.value for row in openpyxl.load_workbook(made).active.iter_rows() for cell in row]
        assert not [cell for cell in cells if isinstance(cell, str) and cell.startswith("=")], "no formula"


def test_a_file_of_too_many_rows_is_refused(service, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "limits", service.limits._replace(file_rows=3))
    (tmp_path / "in.txt").write_text("가나\n" * 4, encoding="utf-8")
    with pytest.raises(DataError, match="more than 3 rows"):
        label_table(service, tmp_path / "in.txt")


def test_no_path_of_the_machine_is_reached_through_the_page(service, work, tmp_path, monkeypatch):
    """By address, by a path in an upload's place, or through the server to another one."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    victim = tmp_path / "victim.csv"
    victim.write_text("id,comment\n1,비밀이에요\n", encoding="utf-8")
    with TestClient(web_app(service, work / "run" / "report.html"), base_url="http://localhost") as client:
        assert "the report" in client.get("/report").text
        places = ["/etc/passwd", "//etc/passwd", "../../../../etc/passwd", str(victim), "pyproject.toml",
                  str(work / "run" / "classifier.json"), "http://127.0.0.1:9/", "HTTP://127.0.0.1:9/"]  # fmt: skip
        for place in places:
            for quoted in (place, place.replace("/", "%2f"), place.replace("/", "%252f")):
                assert client.get(f"/gradio_api/file={quoted}").status_code in (400, 403, 404), quoted
        config = client.get("/config").json()
        by_inputs = {len(each["outputs"]): each["id"] for each in config["dependencies"] if each["inputs"]}
        for fn in (by_inputs[3], by_inputs[1]):  # of the file, of the text
            for number, place in enumerate((str(victim), "/etc/passwd", "http://127.0.0.1:9/x.csv", "\0", "")):
                data = [{"path": place, "meta": {"_type": "gradio.FileData"}}]
                asked = {"data": data, "fn_index": fn, "session_hash": f"s{fn}{number}"}
                assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
                told = client.get(f"/gradio_api/queue/data?session_hash=s{fn}{number}").text
                assert "비밀" not in told and "root:" not in told
                assert "Choose a file first" in told or "Write a comment first" in told or '"success":false' in told
        left = [path for path in (tmp_path / "uploads").rglob("*") if path.is_file() and path.stat().st_size]
        assert left == [], "nothing of the machine was copied where the page can fetch it"
        assert client.post("/gradio_api/upload", files={"files": ("a.csv", b"x" * (33 << 20))}).status_code == 413
    assert victim.exists(), "what was not uploaded is not removed"


# ---- labels


def test_labels_survive_a_kill_at_any_byte(tmp_path):
    comments = pd.DataFrame({"id": range(4), "comment": [HOSTILE, '"따옴표" 둘', "탭\t과 공백", "끝"]})
    path = tmp_path / "labels.tsv"
    table = LabelTable(path, comments, ["0", "1"])
    for row in range(4):
        table.append(row, str(row % 2))
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        again = LabelTable(path, comments, ["0", "1"])
        kept = max(0, sum(end - 1 <= size for end in ends) - 1)  # without its line end, a line is whole
        assert again.rows == table.rows[:kept], size
        if kept < 4:
            again.append(kept, "1")
    path.write_bytes(whole[:-1])  # as editors leave it
    assert len(LabelTable(path, comments, ["0", "1"]).rows) == 4 and path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    assert len(LabelTable(path, comments, ["0", "1", "10"]).rows) == 3, "a half 10, perhaps"
    path.write_bytes(whole)
    read = read_comments(path)
    assert read.label.tolist() == list("0101") and read.comment.tolist()[1:] == ['"따옴표" 둘', "탭 과 공백", "끝"]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    comments = pd.DataFrame({"id": range(4), "comment": list("가나다라")})
    job = Labelling(comments, ["0", "1"], tmp_path / "labels.tsv")
    job.label(job.version, "1")
    before, write = job.task(), os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:3]))
    with pytest.raises(OSError, match="disk is full"):
        job.label(job.version, "1")
    monkeypatch.undo()
    assert job.task() == before and len(job.rows()) == 1
    job.label(job.version, "0")
    assert Labelling(comments, ["0", "1"], tmp_path / "labels.tsv").rows().equals(job.rows())


@pytest.mark.parametrize("label, said", [
    ("다시\t옴", "has a tab or a line break"), ("다시\n옴", "has a tab or a line break"),
    ("옴\r", "has a tab or a line break"), ("\ud800옴", "holds half a character"), (" ", "is blank"),
    ("", "is blank"), ("\u200b", "is blank"),
], ids=ascii)  # fmt: skip
def test_labels_that_a_line_cannot_hold_are_refused_before_there_is_a_file(label, said, tmp_path):
    comments = pd.DataFrame({"id": range(4), "comment": list("가나다라")})
    with pytest.raises(DataError, match=f"label .* {said}") as error:
        Labelling(comments, [label, "1"], tmp_path / "labels.tsv")
    assert "\n" not in str(error.value) and str(error.value).encode() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", [
    "5", "{}", "null", "[]", '"undo"', '{"do": "sing"}', '{"do": ["undo"]}', '{"do": "label", "id": "1"}',
    '{"do": "label", "id": ["1"], "judged": true}', '{"do": "label", "id": "1", "judged": "yes"}', '{"do": "skip"}',
])  # fmt: skip
def test_a_line_of_the_journal_that_is_no_event_is_named(line, tmp_path):
    comments = pd.DataFrame({"id": range(4), "comment": list("가나다라")})
    path, journal = tmp_path / "labels.tsv", tmp_path / "labels.tsv.journal"
    job = Labelling(comments, ["0", "1"], path)
    job.label(job.version, "1")
    job.skip(job.version)
    job.undo(job.version)
    whole = journal.read_bytes()
    journal.write_bytes(whole + line.encode() + b"\n")
    with pytest.raises(DataError, match=r"labels\.tsv\.journal line 4: .* is no event") as error:
        Labelling(comments, ["0", "1"], path)
    assert "\n" not in str(error.value)
    journal.write_bytes(whole)
    assert Labelling(comments, ["0", "1"], path).rows().equals(job.rows())


def test_whatever_is_done_another_process_goes_on_from_it(tmp_path):
    comments = pd.DataFrame({"id": range(40), "comment": [f"{i}번째 댓글" for i in range(40)]})
    rng, path = np.random.default_rng(0), tmp_path / "labels.tsv"
    job = Labelling(comments, ["0", "1"], path, every=3)
    for _ in range(120):
        what = rng.choice(["label", "label", "label", "skip", "undo"])
        try:
            job.label(job.version, str(rng.integers(2))) if what == "label" else getattr(job, what)(job.version)
        except DataError as error:
            assert re.search("nothing to undo|every comment", str(error))
        again = Labelling(comments, ["0", "1"], path, every=3)
        assert again.rows().equals(job.rows()) and again.rows(True).equals(job.rows(True))
        if what != "undo":  # another process does not know which comment was to be shown again
            assert again.task() == job.task()
        if rng.random() < 0.2:
            job = again
    judged = job.rows(judged=True)
    assert len(judged) and set(judged["row"]) <= set(job._aside)


def test_two_at_once_do_not_overwrite_each_other(tmp_path):
    comments = pd.DataFrame({"id": range(60), "comment": [f"{i}번째 댓글" for i in range(60)]})
    job, given = Labelling(comments, ["0", "1"], tmp_path / "labels.tsv"), []

    def labels(label):
        while True:
            version, task = job.version, job.task()
            if task is None:
                return
            try:
                job.label(version, label)
                given.append(label)
            except StaleError:
                pass
            except DataError:
                return

    threads = [threading.Thread(target=labels, args=(label,)) for label in "01"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = read_comments(tmp_path / "labels.tsv")
    assert len(rows) == 60 and rows.label.tolist() == given


def test_comments_that_judge_are_not_chosen_and_not_trained_on(tmp_path):
    rows = read_comments("sample_validation").head(300)
    truth = dict(zip(rows["id"], rows.label, strict=True))
    fitted = []

    class Notes:
        """Doubts most what is longest."""

        def get_params(self, deep=True):
            return {}

        def set_params(self, **_):
            return self

        def fit(self, comments, labels):
            fitted.append(comments)
            self.classes_ = np.unique(labels)
            return self

        def predict_proba(self, comments):
            share = np.array([0.5 + 0.4 / (1 + len(text)) for text in comments])
            return np.stack([1 - share, share], axis=1)

    job = Labelling(rows, ["0", "1", "2"], tmp_path / "labels.tsv", choose=True)
    drawn = list(job._aside)
    for number in range(1, 101):
        job.label(job.version, truth[job.task().id])
        if number % 20 == 0:
            retrain(job, Notes())
    judged = job.rows(judged=True)
    assert judged["row"].tolist() == drawn[: len(judged)] and len(judged) == 20
    assert not set(judged.comment) & set(fitted[-1]) and len(fitted[-1]) == 80
    chosen = job.rows(judged=False).comment.str.len()[20:]
    assert chosen.mean() > rows.comment.str.len().mean(), "the doubtful ones"
    assert "accuracy" not in job.estimate(), "20 judge nothing"


@pytest.mark.parametrize("comments, aside", [(145, 29), (146, 30), (500, 100)])
def test_the_page_says_how_many_labels_an_estimate_takes(tmp_path, comments, aside):
    """Thirty comments to judge by, and one label in five is of such a one: 150 labels, not 30."""
    rows = pd.DataFrame({"id": range(comments), "comment": [f"{number}번째 손님" for number in range(comments)]})
    job = Labelling(rows, ["0", "1"], tmp_path / "labels.tsv")
    assert len(job._aside) == aside
    for number in range(60):
        job.label(job.version, str(number % 2))
    job.update(job.candidates(), np.tile([0.4, 0.6], (len(job.candidates()), 1)), trained_on=48)
    found = job.estimate()
    assert (found["n"], found["needed"], "accuracy" in found) == (12, 30, False)
    said = {language: texts["judge" if found["labels"] else "few"].format(**found) for language, texts in TEXTS.items()}
    if comments < 146:  # it would never come
        assert said["en"] == "no estimate from so few comments: 29 are set aside to judge by, and it takes 30"
        assert "29개" in said["ko"] and "30개" in said["ko"]
    else:
        assert said["en"] == "12 of 30 comments to judge by, one in 5 labels: an estimate takes about 150 labels"
        assert said["ko"] == "평가용 댓글 30개 가운데 12개 (라벨 5개에 하나): 라벨이 150개쯤 되면 어림합니다"
    assert "e.labels ? T.judge : T.few" in label_html("en", "nonce")


# ---- in a browser


def _upload(page, path):
    with page.expect_response(lambda reply: "/upload?" in reply.url) as reply:
        page.set_input_files("#file input[type=file]", path)
    assert reply.value.status == 200
    page.locator("#file .file-preview", has_text=path.stem).wait_for()


def test_the_page_in_a_browser(work, tmp_path):
    (tmp_path / "in.csv").write_text(f"no;review\n1;맛있어요\n2;\"{COMMENTS[3]}\"\n", encoding="utf-8")
    with browser() as context, server(tmp_path, "serve", work / "run") as (address, process):
        page = context.new_page()
        dialogs = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        page.get_by_text("이 댓글들은 무슨 말을 하나요?").wait_for()  # computed by the server: the page is alive
        page.fill("#comments textarea", "\n".join(COMMENTS[:4]))
        page.get_by_role("button", name="분류하기").click()
        page.wait_for_selector(".gls article >> nth=3")
        assert page.locator(".gls article").count() == 4
        assert page.locator(".gls .ask").count() == 2 and "사람에게" in page.locator(".gls .ask").first.inner_text()
        assert HOSTILE.split()[0] in page.locator(".gls article").first.inner_text()
        assert page.locator(".gls img, .gls script").count() == 0 and "taken" not in page.title() and not dialogs
        assert page.locator(".gls mark, .gls u").count() > 3
        answers = httpx.post(f"{address}/predict", json={"comments": COMMENTS[:4]}).json()
        assert page.locator(".gls .say").all_inner_texts() == answers["labels"] and sum(answers["abstains"]) == 2

        _upload(page, tmp_path / "in.csv")
        page.get_by_role("button", name="파일에 라벨 달기").click()
        page.wait_for_selector("#result a")
        with page.expect_download() as download:
            page.locator("#result a").first.click()
        download.value.save_as(tmp_path / "out.csv")
        labelled = read_comments(tmp_path / "out.csv")
        assert labelled["id"].tolist() == ["1", "2"] and labelled.comment.tolist() == ["맛있어요", COMMENTS[3]]
        assert set(labelled.label) <= {"0", "1"} and "p_1" in labelled
        assert not list((tmp_path / "temporary").rglob("in.csv")), "the upload is gone"
        (tmp_path / "bad.csv").write_text("id,comment\n", encoding="utf-8")
        _upload(page, tmp_path / "bad.csv")
        page.get_by_role("button", name="파일에 라벨 달기").click()
        page.get_by_role("alert").wait_for()
        assert "/" not in page.get_by_role("alert").inner_text(), "no path of the server"
        with context.expect_page() as report:
            page.get_by_text("이 실행의 보고서").click()
        assert report.value.locator("h1").inner_text() == "the report"
        english = context.browser.new_page(locale="en-US")
        english.goto(address)
        english.get_by_role("button", name="Classify").wait_for()
        english.get_by_text("What do these comments say?").wait_for()
        assert context.elsewhere == [], "nothing is fetched from other sites"
        page.screenshot(path=tmp_path / "page.png")
    assert not list((tmp_path / "temporary").glob("gemma_lora_sentiment_*")), "uploads are removed with the server"


def _typed(page, key, until):
    """Press a key and wait until the page shows so many labels."""
    version = page.locator("body").get_attribute("data-version")
    page.keyboard.press(key)
    page.wait_for_selector(f"body[data-labelled='{until}']:not([data-version='{version}'])")


def test_labelling_in_a_browser(work, tmp_path):
    given = ("label", work / "comments.csv", "--labels", "0,1", "--label-word", "0=i", "--label-word", "1=요",
             "--preset", work / "tiny", "--out", tmp_path / "labels.tsv")  # fmt: skip
    with browser() as context:
        with server(tmp_path, *given) as (address, process):
            page = context.new_page()
            page.goto(address)
            page.wait_for_selector("body[data-version]")
            shown = []
            for number in range(1, 11):
                shown.append(page.locator("#comment").inner_text())
                _typed(page, str(1 + number % 2), number)
            assert page.locator(".label span").all_inner_texts() == ["0 (i) · 5", "1 (요) · 5"]
            _typed(page, "u", 9)
            assert page.locator("#comment").inner_text() == shown[-1], "undone, shown again"
            _typed(page, "s", 9)
            assert page.locator("#comment").inner_text() not in shown
            other = context.new_page()
            other.goto(address)
            other.wait_for_selector("body[data-version]")
            other.evaluate("ask = (f => (address, body) => address === 'state' ? null : f(address, body))(ask)")
            _typed(page, "1", 10)
            other.keyboard.press("2")  # it saw what was there before
            other.get_by_text("다른 창이 더 빨랐습니다").wait_for()
            assert len(read_comments(tmp_path / "labels.tsv")) == 10
            status, error = shell(*given, "--port", 0, "--quiet")
            assert status == 2 and "Another process is writing to" in error and len(error.splitlines()) == 1
            _typed(page, "2", 11)
            process.kill()
            process.wait()
        labelled = read_comments(tmp_path / "labels.tsv")
        assert labelled.comment.tolist()[:9] == shown[:9] and labelled.label.tolist()[:9] == list("101010101")
        assert labelled.label.tolist()[9:] == ["0", "1"] and shown[-1] not in labelled.comment.tolist()

        with server(tmp_path, *given) as (address, process):
            page = context.new_page()
            page.goto(address)
            page.wait_for_selector("body[data-labelled='11']")
            hostile = False
            for number in range(12, 26):
                hostile |= page.locator("#comment").inner_text().startswith("<img")
                assert page.locator("#comment *").count() == 0 and page.title() == "gemma_lora_sentiment"
                _typed(page, "12"[number % 2], number)
            assert hostile or any("<img" in comment for comment in labelled.comment)
            trained = "body[data-ended='true'][data-status='idle']:not([data-trained='0'])"
            page.wait_for_selector(trained, timeout=60_000)
            page.screenshot(path=tmp_path / "label.png")
            page.locator("#finish").click()
            page.wait_for_selector("body[data-status='finishing']")
            page.wait_for_selector("body:not([data-status='finishing'])", timeout=120_000)
            assert page.locator("#told").inner_text() == "" and page.locator("#report").is_visible()
            assert "gemma" in httpx.get(f"{address}/report").text
            submission = httpx.get(f"{address}/submission")
            assert submission.status_code == 200 and len(submission.text.splitlines()) == 27
            assert context.elsewhere == []
    run = tmp_path / "labels-run"
    assert (run / "run.json").is_file() and GemmaLoraClassifier.load(run).words_.words == ("i", "요")


# ---- a Space


@pytest.fixture
def space(tmp_path):
    clf = GemmaLoraClassifier(preset="mini_ko", epochs=0, max_length=64).fit(["-", "-"], ["0", "1"])
    clf.save(tmp_path / "run")
    (tmp_path / "run" / "wrong.tsv").write_text(f"id\tcomment\n1\t{COMMENTS[0]}\n", encoding="utf-8")
    assert shell("export", tmp_path / "run", "--to", tmp_path / "space", "--format", "space")[0] == 0
    return tmp_path / "space"


def test_a_space_holds_a_run_and_no_comment(space):
    assert {path.name for path in space.iterdir()} == {"app.py", "requirements.txt", "README.md", "run"}
    assert not [path for path in space.rglob("*") if path.is_file() and COMMENTS[0].encode() in path.read_bytes()]
    head = (space / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert "sdk: gradio\n" in head and "app_file: app.py\n" in head
    assert GemmaLoraClassifier.load(space / "run").predict(["맛있어요"]).tolist() == ["1"]


@pytest.mark.slow
def test_a_space_runs_as_it_stands(space):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                page = httpx.get(f"http://127.0.0.1:{port}/")
                break
            except httpx.TransportError:
                assert process.poll() is None, process.stderr.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert page.status_code == 200 and "gradio" in page.text
    finally:
        process.kill()
        process.wait()
