"""Every tutorial from its first cell to its last, on a slice: few rows, one epoch, no credentials, no network."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_docs import TUTORIALS, name_of

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("first_look_to_decision", "five_suggestions")  # many fits, and rows enough for them: by hand before a release
ROWS = {"first_look_to_decision": 24, "five_suggestions": 8}  # of each label and kind; 3 for the others
OF_LABEL = {"from_37_minutes": 2}  # of each label: and 128 tokens for 512: whole text takes seconds a row

# Runs before the notebook's first cell. Bundled files have a few rows of each label and kind, recipes one epoch.
SLICE = """
import dataclasses
import gemma_lora_sentiment.data as data
import gemma_lora_sentiment.training as training

whole_table = data._load

def sliced_table(source, *args):
    table = whole_table(source, *args)
    if source not in data._BUNDLED_FILES:
        return table
    return table._replace(cells=table.cells.groupby({columns}, sort=False).head({rows}))

data._load = sliced_table
for name, recipe in training.RECIPES.items():
    training.RECIPES[name] = dataclasses.replace(recipe, epochs=1)
"""


def parameters():
    for path in TUTORIALS:
        marks = [pytest.mark.slow] if path.stem in SLOW else []
        yield pytest.param(path, marks=marks, id=name_of(path))


@pytest.mark.parametrize("path", parameters())
def test_tutorial_runs_to_its_end(path, tmp_path, monkeypatch):
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_DATA_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.outputs = [] if cell.cell_type == "code" else cell.get("outputs", [])
    for cell in notebook.cells if path.stem in OF_LABEL else []:
        cell.source = cell.source.replace("512", "128") if cell.cell_type == "code" else cell.source
    rows, columns = ROWS.get(path.stem, 3), ["label", "kind"]
    if path.stem in OF_LABEL:
        rows, columns = OF_LABEL[path.stem], ["label"]
    before = SLICE.replace("{rows}", str(rows)).replace("{columns}", str(columns))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
    folder = tmp_path / "here"
    folder.mkdir()
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()  # raises with the cell and its traceback
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "a cell was left out"
    assert not [file.name for file in folder.iterdir()], "a tutorial cleans up behind itself"
