"""Credentials and access: every answer of Kaggle and Hugging Face, given by a server on this machine."""

import errno
import io
import json
import logging
import os
import subprocess
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import pytest
import requests
from kagglesdk import kaggle_env

from gemma_lora_sentiment import credentials
from gemma_lora_sentiment.credentials import AccessError, access_explained, check_access, find_credentials

KEY, TOKEN, HF_TOKEN = "k3y-of-a-user", "KGAT-t0ken", "hf_t0ken"
SECRETS = (KEY, TOKEN, HF_TOKEN)
KAGGLE, HUB = "gemma_2b_en", "hf://google/gemma-2b"


class Answers(BaseHTTPRequestHandler):
    def answer(self):
        server = self.server
        length = int(self.headers.get("Content-Length") or 0)
        server.asked.append((self.path, self.headers.get("Authorization"), self.rfile.read(length)))
        status, headers, body = server.next.pop(0) if len(server.next) > 1 else server.next[0]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_HEAD = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, and an environment without credentials."""
    for name in list(os.environ):
        if name.startswith(("KAGGLE", "HF_", "HUGGING", "XDG")):
            monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    from huggingface_hub import constants
    from kagglehub import config

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    config.clear_kaggle_credentials()
    yield tmp_path
    config.clear_kaggle_credentials()


@pytest.fixture
def server(home, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.asked, server.next = [], [(200, {}, b"{}")]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, address)
    monkeypatch.setenv("HF_ENDPOINT", address)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def account(monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)


def refused(preset, error=AccessError):
    with pytest.raises(error) as caught:
        check_access(preset)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert not [secret for secret in SECRETS if secret in shown], "a secret is shown"
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- where they are


def test_none(home):
    assert find_credentials() == {"kaggle": None, "hugging_face": None}


def test_environment(home, account):
    assert find_credentials() == {"kaggle": "KAGGLE_USERNAME and KAGGLE_KEY", "hugging_face": "HF_TOKEN"}


def test_half_of_the_environment_is_none(home, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    monkeypatch.setenv("HF_TOKEN", " ")
    assert find_credentials() == {"kaggle": None, "hugging_face": None}


def test_kaggle_api_token(home, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    assert find_credentials()["kaggle"] == "KAGGLE_API_TOKEN"


def test_kaggle_access_token_file(home):
    (home / ".kaggle").mkdir()
    (home / ".kaggle" / "access_token").write_text(TOKEN)
    assert find_credentials()["kaggle"] == "~/.kaggle/access_token"


@pytest.mark.parametrize("folder", [".kaggle", ".config/kaggle", "."])
def test_kaggle_json(home, folder):
    from kagglehub.config import get_kaggle_credentials

    path = home / folder / "kaggle.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"username": "someone", "key": KEY}))
    assert find_credentials()["kaggle"].endswith("kaggle.json")
    assert get_kaggle_credentials().key == KEY, "kagglehub has them too"


def test_kaggle_config_dir_comes_first(home, monkeypatch):
    for folder in ("chosen", ".kaggle"):
        (home / folder).mkdir()
        (home / folder / "kaggle.json").write_text(json.dumps({"username": "someone", "key": KEY}))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(home / "chosen"))
    assert find_credentials()["kaggle"] == str(home / "chosen" / "kaggle.json")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"username": "someone"}', f'{{"key": "{KEY}"'])
def test_damaged_kaggle_json(home, text):
    (home / "kaggle.json").write_text(text)
    with pytest.raises(AccessError, match="not a Kaggle credentials file") as caught:
        find_credentials()
    assert KEY not in str(caught.value)


def test_hugging_face_token_file(home):
    (home / "hf").mkdir()
    (home / "hf" / "token").write_text(HF_TOKEN)
    assert find_credentials()["hugging_face"] == str(home / "hf" / "token")


class NotFound(Exception):
    pass


@pytest.fixture
def secrets(home, monkeypatch):
    """Secrets as Colab gives them: a missing one raises."""
    held = {}

    def get(name):
        if name not in held:
            raise NotFound(name)
        return held[name]

    userdata = ModuleType("google.colab.userdata")
    userdata.get = get
    colab = ModuleType("google.colab")
    colab.userdata = userdata
    for name, module in {"google": ModuleType("google"), "google.colab": colab, userdata.__name__: userdata}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("HF_TOKEN", "")
    return held


def test_colab_secrets_user_and_key_without_a_token(secrets):
    from kagglehub.config import get_kaggle_credentials

    secrets.update(KAGGLE_USERNAME="someone", KAGGLE_KEY=f"{KEY}\n")
    assert find_credentials()["kaggle"] == "the notebook's secrets KAGGLE_USERNAME and KAGGLE_KEY"
    assert get_kaggle_credentials().key == KEY


def test_colab_secret_tokens(secrets):
    from kagglehub.config import get_kaggle_credentials

    secrets.update(KAGGLE_API_TOKEN=TOKEN, HF_TOKEN=HF_TOKEN)
    assert find_credentials() == {
        "kaggle": "the notebook's secret KAGGLE_API_TOKEN",
        "hugging_face": "the notebook's secret HF_TOKEN",
    }
    assert get_kaggle_credentials().api_key == TOKEN
    assert os.environ["HF_TOKEN"] == HF_TOKEN


def test_kaggle_notebook_secret(home, monkeypatch):
    module = ModuleType("kaggle_secrets")
    module.UserSecretsClient = lambda: SimpleNamespace(get_secret={"HF_TOKEN": HF_TOKEN}.__getitem__)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    monkeypatch.setenv("HF_TOKEN", "")
    assert find_credentials() == {"kaggle": None, "hugging_face": "the notebook's secret HF_TOKEN"}


def test_kaggle_notebook_secrets_for_kaggle(home, monkeypatch):
    from kagglehub.config import get_kaggle_credentials

    held = {"KAGGLE_USERNAME": "someone", "KAGGLE_KEY": KEY}
    module = ModuleType("kaggle_secrets")
    module.UserSecretsClient = lambda: SimpleNamespace(get_secret=held.__getitem__)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    assert find_credentials()["kaggle"] == "the notebook's secrets KAGGLE_USERNAME and KAGGLE_KEY"
    assert get_kaggle_credentials().key == KEY
    del held["KAGGLE_KEY"]
    from kagglehub import config

    config.clear_kaggle_credentials()
    assert find_credentials()["kaggle"] is None


def test_a_secret_that_the_notebook_may_not_read(server, secrets, monkeypatch):
    """Colab raises its NotebookAccessError: there are no credentials, and the sentence names the right to read."""

    def refuse(name):
        raise NotFound(f"no access to {name}")

    monkeypatch.setattr(sys.modules["google.colab.userdata"], "get", refuse)
    server.next = [(403, {}, b"")]
    assert "secrets that the notebook may read" in refused(KAGGLE)


def test_half_of_the_environment_is_named(server, monkeypatch):
    server.next = [(403, {}, b"")]
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    assert "no credentials were found (KAGGLE_KEY is set, KAGGLE_USERNAME is not)." in refused(KAGGLE)
    assert "is not)" not in refused(HUB)


# ---- what needs none


def test_bundled_and_folder_make_no_request(server, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for preset in ("mini_ko", tmp_path):
        assert "on this machine" in check_access(preset)
    assert not server.asked


def test_unknown_name_and_scheme_make_no_request(server):
    assert check_access("gemma_3b").endswith("not checked")
    assert check_access("gs://bucket/gemma").endswith("not checked")
    assert not server.asked


def test_known_presets_are_kerashubs():
    import keras_nlp

    import gemma_lora_sentiment.model  # noqa: F401  it chooses the backend

    presets = credentials.known_presets()
    for family in ("Gemma", "Gemma3", "Gemma3n", "Gemma4"):
        for name, entry in getattr(keras_nlp.models, f"{family}Backbone").presets.items():
            if name in presets:
                assert presets[name] == (entry["kaggle_handle"], entry["metadata"]["params"])
    assert {"gemma_2b_en", "gemma2_2b_en", "gemma3_270m", "gemma3n_e2b", "gemma4_2b"} <= set(presets)


# ---- what the hosts answer


def test_granted(server, account):
    line = check_access(KAGGLE)
    assert line == "gemma_2b_en: Kaggle gives it, with KAGGLE_USERNAME and KAGGLE_KEY, 5.0 GB"
    assert len(server.asked) == 1 and b"config.json" in server.asked[0][2]
    check_access(KAGGLE)
    assert len(server.asked) == 1, "what is here is not asked for again"


def test_granted_by_the_hub(server, account):
    listed = json.dumps({"id": "google/gemma-2b", "siblings": [
        {"rfilename": "model.safetensors", "size": 2_000_000}, {"rfilename": "gemma-2b.gguf", "size": 10**18},
    ]}).encode()  # fmt: skip
    server.next = [(200, {}, b"{}"), (200, {"Content-Type": "application/json"}, listed)]
    assert check_access(HUB) == f"{HUB}: Hugging Face gives it, with HF_TOKEN, 0.0 GB"
    assert [path.split("?")[0].rsplit("/", 1)[1] for path, *_ in server.asked] == ["auth-check", "gemma-2b"]
    assert {authorization for _, authorization, _ in server.asked} == {f"Bearer {HF_TOKEN}"}


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("preset, headers", [(KAGGLE, {}), (HUB, {"X-Error-Code": "GatedRepo"})])
def test_no_credentials(server, preset, headers, status):
    server.next = [(status, headers, b"")]
    message = refused(preset)
    assert "no credentials were found" in message and "Accept the licence at https://" in message
    assert ("KAGGLE_API_TOKEN" if preset == KAGGLE else "HF_TOKEN") in message


@pytest.mark.parametrize("preset, page, headers", [
    (KAGGLE, "https://www.kaggle.com/models/keras/gemma,", {}),
    (HUB, "https://huggingface.co/google/gemma-2b,", {"X-Error-Code": "GatedRepo"}),
])  # fmt: skip
def test_no_consent(server, account, preset, page, headers):
    server.next = [(403, headers, b"")]
    message = refused(preset)
    assert "its licence is not accepted" in message and f"Open {page} accept it" in message
    assert ("fine-grained token" in message) == (preset == HUB)


@pytest.mark.parametrize("preset, headers", [
    (KAGGLE, {}), (HUB, {"X-Error-Message": "Invalid credentials in Authorization header"}), (HUB, {}),
])  # fmt: skip
def test_credentials_not_accepted(server, account, preset, headers):
    server.next = [(401, headers, b"")]
    assert "does not accept the credentials of" in refused(preset)


@pytest.mark.parametrize("preset, headers", [(KAGGLE, {}), (HUB, {"X-Error-Code": "RepoNotFound"})])
def test_not_there(server, account, preset, headers):
    server.next = [(404, headers, b"")]
    assert "(404). Look at https://" in refused(preset)


@pytest.mark.parametrize("preset", [KAGGLE, HUB])
@pytest.mark.parametrize("status, says", [(429, "too many requests"), (500, "answers 500"), (418, "answers 418")])
def test_host_cannot_serve_now(server, account, preset, status, says):
    server.next = [(status, {}, b"")]
    assert says in refused(preset, ConnectionError)


@pytest.mark.parametrize("preset", [KAGGLE, HUB])
def test_no_network(server, account, preset):
    server.shutdown()
    server.server_close()
    message = refused(preset, ConnectionError)
    assert "cannot be reached" in message and "mini_ko" in message


def test_kaggles_own_message_is_not_shown(server, account):
    body = json.dumps({"code": 403, "message": f"token {KEY} is not good"}).encode()
    server.next = [(403, {"Content-Type": "application/json"}, body)]
    refused(KAGGLE)


def test_no_room(server, account, monkeypatch):
    monkeypatch.setattr(credentials.shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000_000))
    for preset in (credentials.preset_handle(KAGGLE), KAGGLE):  # by address or by name
        message = refused(preset, OSError)
    assert "3.0 GB are free, and 5.0 GB are needed" in message and "KAGGLEHUB_CACHE" in message
    there = credentials._cache_of(credentials.preset_handle(KAGGLE))[0] / "model.weights.h5"
    with there.open("wb") as file:
        file.truncate(4_000_000_000)  # of an earlier download; sparse
    assert check_access(KAGGLE)


# ---- during the download


def test_errors_within_a_download(home):
    response = requests.Response()
    response.status_code = 403
    with pytest.raises(AccessError, match="no credentials"), access_explained(KAGGLE):
        try:
            raise requests.HTTPError(f"with {KEY}", response=response)
        except requests.HTTPError:
            raise FileNotFoundError("as KerasHub reports it")  # noqa: B904
    with pytest.raises(OSError, match="no room"), access_explained(KAGGLE):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConnectionError, match="cannot be reached"), access_explained(HUB):
        raise requests.exceptions.ReadTimeout
    with pytest.raises(KeyError, match="of ours"), access_explained(KAGGLE):
        raise KeyError("of ours")
    with pytest.raises(OSError, match="No space left"), access_explained("mini_ko"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_load_base_asks_first(server, account):
    from gemma_lora_sentiment.model import load_base

    server.next = [(403, {}, b"")]
    for preset in (KAGGLE, HUB):
        with pytest.raises(AccessError, match="licence is not accepted"):
            load_base(preset)
    assert len(server.asked) == 2


# ---- secrets stay secret


def test_nothing_is_logged_or_shown(server, account, caplog, capfd, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    loggers = [logging.getLogger(name) for name in (None, "kagglehub", "huggingface_hub", "urllib3", "kagglesdk")]
    with caplog.at_level(logging.DEBUG):
        for logger in loggers:
            logger.addHandler(handler)
            monkeypatch.setattr(logger, "level", logging.DEBUG)
        shown = repr(find_credentials()) + check_access(KAGGLE)
        server.next = [(401, {}, b"")]
        refused("gemma2_2b_en")
        refused(HUB)
        for logger in loggers:
            logger.removeHandler(handler)
    shown += stream.getvalue() + caplog.text + "".join(capfd.readouterr())
    assert len(shown) > 200 and not [secret for secret in SECRETS if secret in shown]


def test_the_room_is_light():
    code = "import sys, gemma_lora_sentiment.credentials as c; c.find_credentials(); c.known_presets(); print(" \
        "*sorted({'keras', 'jax', 'keras_hub', 'tensorflow', 'numpy'} & set(sys.modules)))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stderr
