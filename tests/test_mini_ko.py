"""The bundled base and sample, and the whole job on them and on real comments."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gemma_lora_sentiment.data import duplicate_groups, read_comments
from gemma_lora_sentiment.model import load_base, resolve_preset, without_tensorflow
from gemma_lora_sentiment.prompt import PromptTemplate, TextTokenizer

FOLDER = Path(resolve_preset("mini_ko"))


def shell(*arguments: object, network: bool = True) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own, without any network where the machine allows it."""
    command = [sys.executable, "-c", "from gemma_lora_sentiment.cli import app; app()", *map(str, arguments)]
    if not network and shutil.which("unshare"):
        isolated = ["unshare", "--net", "--map-root-user"]
        if subprocess.run([*isolated, "true"], capture_output=True).returncode == 0:
            command = isolated + command
    return subprocess.run(command, capture_output=True, text=True)


def test_base_fits_in_the_wheel_and_is_16_bit():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 32_000_000
    base = load_base("mini_ko")
    assert 10e6 < base.parameter_count < 14e6
    assert (FOLDER / "model.weights.h5").stat().st_size < 2.05 * base.parameter_count


def test_base_loads_with_keras_nlp_as_it_is():
    import keras_nlp

    with without_tensorflow():
        causal_lm = keras_nlp.models.GemmaCausalLM.from_preset(str(FOLDER))
    tokenizer = causal_lm.preprocessor.tokenizer
    assert causal_lm.backbone.vocabulary_size == tokenizer.vocabulary_size() <= 16_384
    written = causal_lm.generate("Instruction:\n맛있어요\n\nResponse:\n", max_length=16)
    assert isinstance(written, str) and written


def test_tokenizer_has_gemmas_ids_and_template_pieces():
    tokenizer = TextTokenizer((FOLDER / "assets/tokenizer/vocabulary.spm").read_bytes())
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.processor.unk_id()) == (0, 1, 2, 3)
    template = PromptTemplate()
    assert [len(ids) for ids in tokenizer.encode([template.prefix, template.middle, "0", "1"])] == [1, 1, 1, 1]
    assert tokenizer.decode(tokenizer.encode(["뷁쉙 🦄 ㅋㅋ"])[0]) == "뷁쉙 🦄 ㅋㅋ"


def test_sample_is_balanced_and_does_not_leak():
    train, test = read_comments("sample"), read_comments("sample_test")
    assert len(train) >= 300 and len(test) >= 100
    for rows in (train, test):
        assert abs((rows.label == "1").mean() - 0.5) < 0.02 and rows.kind.nunique() >= 6
    together = pd.concat([train, test], ignore_index=True)
    assert len(np.unique(duplicate_groups(together.comment))) == len(together)


def test_sample_holds_nothing_of_the_real_files(shared_data):
    ours = set(read_comments("sample").comment) | set(read_comments("sample_test").comment)
    for name in ("tarr_train.txt", "tarr_sample_submit.txt"):
        assert not ours & set(read_comments(shared_data / name).comment)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return shell("quickstart", "--out", out, network=False), out


def test_quickstart_ends_in_a_table_offline(quickstart):
    result, out = quickstart
    assert result.returncode == 0, result.stderr
    assert "gemma + LoRA" in result.stdout and "TF-IDF baseline" in result.stdout and " s in all" in result.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["n"] == len(read_comments("sample_test"))
    assert {"accuracy", "macro_f1", "roc_auc", "log_loss", "classes", "baseline_accuracy", "seconds"} <= set(metrics)
    assert metrics["accuracy"] > metrics["baseline_accuracy"]


def test_quickstart_leaves_figures_and_a_submission(quickstart):
    _, out = quickstart
    figures = {path.name for path in (out / "figures").iterdir()}
    assert {"confusion_matrix.png", "roc.png", "training_curves.png"} <= figures
    written = read_comments(out / "submission.txt")
    sample = read_comments("sample_test")
    assert written[["id", "comment"]].equals(sample[["id", "comment"]]) and set(written.label) <= {"0", "1"}


def test_cross_validation_on_real_comments(shared_data, tmp_path):
    """Ten folds with default settings: at least 0.93, with the baseline in the same file."""
    result = shell("cross-validate", shared_data / "tarr_train.txt", "--folds", 10, "--out", tmp_path / "cv")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "cv" / "cv.json").read_text())
    assert metrics["n"] == 300 and metrics["accuracy"] >= 0.93
    assert 0.88 <= metrics["baseline_accuracy"] <= 0.93
    oof = pd.read_csv(tmp_path / "cv" / "oof.tsv", sep="\t", dtype=str, quoting=3)
    expected = ["id", "comment", "label", "prediction", "baseline_prediction", "fold", "p_0", "p_1"]
    assert list(oof.columns) == expected and oof.fold.nunique() == 10
    assert (oof.prediction == oof.label).mean() == pytest.approx(metrics["accuracy"])


def test_train_and_submit_on_real_files(shared_data, tmp_path):
    result = shell("train", shared_data / "tarr_train.txt", "--out", tmp_path / "run", "--epochs", 3)
    assert result.returncode == 0, result.stderr
    sample = shared_data / "tarr_sample_submit.txt"
    result = shell("submit", tmp_path / "run", sample, "--out", tmp_path / "submission.txt")
    assert result.returncode == 0, result.stderr
    written, expected = read_comments(tmp_path / "submission.txt"), read_comments(sample)
    assert len(written) == 100 and written[["id", "comment"]].equals(expected[["id", "comment"]])
    assert set(written.label) == {"0", "1"}
