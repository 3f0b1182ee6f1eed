"""Every tutorial from its first cell to its last, on a slice: few rows, one epoch, no credentials, no network."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_docs import TUTORIALS, name_of

ROOT = Path(__file__).resolve().parents[1]
# Many fits and rows enough for them, or whole texts of full length: by hand before a release.
# The Korean page is the English one: test_docs.test_both_languages_run_the_same_code compares them cell by cell.
SLOW = ("first_look_to_decision", "five_suggestions", "from_37_minutes", "fine_tune_on_colab_ko")
ROWS = {"first_look_to_decision": 24, "five_suggestions": 8}  # of each label and kind; 2 for the others
OF_LABEL = {"from_37_minutes": 2}  # of each label
SHORTER = {  # what a slice writes otherwise than the page: text of a cell -> what stands there instead
    "from_37_minutes": {"512": "128"},
    "your_own_labels": {
        '        "as it comes": {},\n': "",  # the English rows below are fitted as they come
        '"learning_rate": [3e-3], "epochs": [6], "batch_size": [4]': '"epochs": [1]'
    },
}

# Runs before the notebook's first cell. Bundled files have a few rows of each label and kind, recipes one epoch, rows
# one length, since most of the time is compilation; and no name but this machine's has an address.
SLICE = """
import dataclasses
import pathlib
import socket
import tempfile
import gemma_lora_sentiment.data as data
import gemma_lora_sentiment.training as training

whole_file_of = data.locate

def sliced_file(source):
    path = whole_file_of(source)
    if source not in data._BUNDLED_FILES:
        return path
    table = data.read_table(path).groupby({columns}, sort=False).head({rows})
    part = pathlib.Path(tempfile.mkdtemp()) / path.name
    data.write_table(table, part)
    return part

data.locate = sliced_file
for name, recipe in training.RECIPES.items():
    training.RECIPES[name] = dataclasses.replace(recipe, epochs=1)

training.choose_buckets = lambda lengths, *_, **__: (64 * -(-int(max(lengths)) // 64),)

address_of = socket.getaddrinfo

def local_address(host, *args, **kwargs):
    if host not in ("127.0.0.1", "::1", "localhost", None):
        raise socket.gaierror(socket.EAI_NONAME, f"no network in this test: {host}")
    return address_of(host, *args, **kwargs)

socket.getaddrinfo = local_address
"""


def parameters():
    for path in TUTORIALS:
        marks = [pytest.mark.slow] if path.stem in SLOW else []
        yield pytest.param(path, marks=marks, id=name_of(path))


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """One cache for all of them: what one tutorial has compiled, the next one need not."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def bare(programs, tmp_path, monkeypatch):
    """A machine without credentials: a home folder that is empty, and none of the variables that name some."""
    for name in list(os.environ):
        if name.startswith(("KAGGLE", "HF_", "HUGGING", "XDG")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_DATA_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", str(programs))
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def sliced(path):
    """The notebook without its outputs, with a cell before its first that makes it short."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    for text, instead in SHORTER.get(path.stem, {}).items():
        assert any(text in cell.source for cell in code), f"{text!r} is not in {path.name} any more"
        for cell in code:
            cell.source = cell.source.replace(text, instead)
    rows, columns = ROWS.get(path.stem, 2), ["label", "kind"]
    if path.stem in OF_LABEL:
        rows, columns = OF_LABEL[path.stem], ["label"]
    before = SLICE.replace("{rows}", str(rows)).replace("{columns}", str(columns))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
    return notebook


@pytest.mark.parametrize("path", parameters())
def test_tutorial_runs_to_its_end(path, bare):
    notebook = sliced(path)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(bare)}}
    ).execute()  # raises with the cell and its traceback
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "a cell was left out"
    assert any(cell.outputs for cell in code)
    assert not [file.name for file in bare.iterdir()], "a tutorial cleans up behind itself"
