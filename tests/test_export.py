"""What would bore a reader of 03b_export: bases that have no place in transformers, and what is left behind.

What transformers computes with an export is compared in test_hf.
"""

import json
import os
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from gemma_lora_sentiment import GemmaLoraClassifier, export
from gemma_lora_sentiment.adapter import RunError, new_adapter
from gemma_lora_sentiment.backend import ModelError, without_tensorflow
from gemma_lora_sentiment.cli import app
from gemma_lora_sentiment.export import _write_weights, export_checkpoint, merged_tensors, transformers_config
from gemma_lora_sentiment.gemma import gemma_config
from gemma_lora_sentiment.model import Base, keras_nlp, load_base, tiny_gemma

GEMMA = dict(
    vocabulary_size=32, num_layers=1, num_query_heads=2, num_key_value_heads=1, hidden_dim=8, intermediate_dim=16,
    head_dim=4,
)  # fmt: skip
GEMMA3 = dict(GEMMA, image_size=16, vision_encoder=None, use_query_key_norm=True, use_post_ffw_norm=True,
              use_post_attention_norm=True)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(tiny):
    return load_base(tiny, "float32")


@pytest.fixture(scope="module")
def adapter(base):
    start, rng = new_adapter(base, 2, alpha=4.0), np.random.default_rng(0)
    return replace(start, arrays={p: rng.normal(0, 0.2, a.shape).astype("float32") for p, a in start.arrays.items()})


@pytest.fixture
def pretended(monkeypatch):
    "As if torch and transformers were there; what they would do is replaced where a test needs it."
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[name].__spec__ = types.SimpleNamespace()
    monkeypatch.setattr(export, "_write_tokenizer", lambda folder, proto: None)
    monkeypatch.setattr(export, "_check_tokenizer", lambda folder, proto: None)


def of(family, arguments, base):
    """A base without arrays; its arguments are those that KerasHub's backbone says it has."""
    backbone = getattr(keras_nlp.models, f"{family}Backbone")(**arguments)
    config = {key: value for key, value in backbone.get_config().items() if key not in ("name", "trainable", "dtype")}
    return Base("odd", gemma_config(family, config), {}, base.tokenizer_proto, "float32", "", config)


@pytest.mark.parametrize("word, changes", [
    ("soft caps", dict(final_logit_soft_cap=30.0)), ("soft caps", dict(attention_logit_soft_cap=50.0)),
    ("sliding", dict(use_sliding_window_attention=True)), ("attention scale", dict(query_head_dim_normalize=False)),
    ("not after both", dict(use_post_ffw_norm=True)), ("not after both", dict(use_post_attention_norm=True)),
])  # fmt: skip
def test_gemma_that_transformers_does_not_know_is_refused(word, changes, base):
    with pytest.raises(ModelError, match=word) as error:
        transformers_config(of("Gemma", {**GEMMA, **changes}, base))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word, changes", [
    ("queries", dict(use_query_key_norm=False)),
    ("rotary", dict(local_rope_scaling_factor=2.0)),
    ("lacks", dict(use_post_ffw_norm=False, use_post_attention_norm=False)),
])  # fmt: skip
def test_gemma3_that_transformers_does_not_know_is_refused(word, changes, base):
    with pytest.raises(ModelError, match=word) as error:
        transformers_config(of("Gemma3", {**GEMMA3, **changes}, base))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    dict(use_bidirectional_attention=True),
    dict(is_embedding_model=True, pooling_intermediate_dim=8, embedding_dim=8),
])  # fmt: skip
def test_a_gemma3_that_reads_both_ways_is_no_base_at_all(changes, tmp_path):
    with without_tensorflow():
        keras_nlp.models.Gemma3Backbone(**{**GEMMA3, **changes}).save_to_preset(str(tmp_path))
    with pytest.raises(ModelError, match="embeds texts and cannot continue them") as error:
        load_base(tmp_path)
    assert "\n" not in str(error.value)


def test_shards_hold_what_one_file_holds(base, adapter, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, size in ((whole, 2**30), (parts, 10_000)):
        folder.mkdir()
        _write_weights(folder, merged_tensors(base, adapter), "float16", size)
    one = safetensors.numpy.load_file(whole / "model.safetensors")
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert sorted({*index["weight_map"].values(), "model.safetensors.index.json"}) == sorted(os.listdir(parts))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert index["weight_map"].keys() == one.keys() and len(os.listdir(parts)) > 3
    for name, file in index["weight_map"].items():
        assert np.array_equal(safetensors.numpy.load_file(parts / file)[name], one[name])


def test_bases_that_are_not_float32_are_refused(tiny, adapter, tmp_path, pretended):
    for settings in (dict(dtype="bfloat16"), dict(dtype="float32", quantization="int8")):
        with pytest.raises(ModelError, match="float32"):
            export_checkpoint(tmp_path / "x", load_base(tiny, **settings), adapter)
    assert os.listdir(tmp_path) == []


def test_a_folder_in_use_is_left_alone(base, adapter, tmp_path, pretended):
    (tmp_path / "file").write_text("mine")
    for to in (tmp_path, tmp_path / "file"):
        with pytest.raises(RunError, match="exists already"):
            export_checkpoint(to, base, adapter)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("fault", ["other logits", "not a number", "disk full", "interrupted", "no room"])
def test_nothing_is_left_of_an_export_that_fails(fault, base, adapter, tmp_path, pretended, monkeypatch):
    real = export._adapted_logits(base, adapter, [np.array([2, 5, 6], np.int32)])
    kind = {"disk full": OSError, "no room": OSError, "interrupted": KeyboardInterrupt}.get(fault, RunError)

    def reloaded(folder, prompts):
        assert (folder / "model.safetensors").is_file()
        if fault == "interrupted":
            raise KeyboardInterrupt
        logits = export._adapted_logits(base, adapter, prompts)
        logits[0] = logits[0] + (np.nan if fault == "not a number" else 3e-2)
        return logits

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_reloaded_logits", reloaded)
    if fault == "disk full":
        monkeypatch.setattr(safetensors.numpy, "save_file", full)
    if fault == "no room":
        monkeypatch.setattr(export.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(kind) as error:
        export_checkpoint(tmp_path / "a" / "merged", base, adapter)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == [] and len(real) == 1


def test_an_export_without_its_adapter_would_be_noticed(base, adapter, tmp_path, pretended, monkeypatch):
    "The mistake of KerasHub's own exporter."
    untrained = new_adapter(base, 2)
    monkeypatch.setattr(export, "_reloaded_logits", lambda _, prompts: export._adapted_logits(base, untrained, prompts))
    with pytest.raises(RunError, match="other logits"):
        export_checkpoint(tmp_path / "merged", base, adapter)


@pytest.mark.parametrize("preset, vocabulary, google", [
    ("mini_ko", 24_000, False), ("gemma_2b_en", 256_000, True), ("hf://google/gemma-3-270m", 262_144, True),
    (".", 300, False), (".", 256_000, True), ("kaggle://keras/gemma2/keras/gemma2_2b_en", 256_000, True),
])  # fmt: skip
def test_exports_of_google_s_bases_carry_the_notice(preset, vocabulary, google, tmp_path):
    base = types.SimpleNamespace(preset=preset, config=types.SimpleNamespace(vocabulary_size=vocabulary))
    export.write_notices(tmp_path, base, "the card")
    readme = (tmp_path / "README.md").read_text()
    notice = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    assert (notice in readme) == ("license: gemma" in readme) == (tmp_path / "NOTICE").is_file() == google
    assert ("license: apache-2.0" in readme) == (preset == "mini_ko")
    assert "were modified" in readme and "the card" in readme
    if google:
        text = (tmp_path / "NOTICE").read_text()
        assert notice in text and "were modified" in text


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    clf = GemmaLoraClassifier(preset=tiny, epochs=0, max_length=48).fit(["맛있어요", "별로예요"], [1, 0])
    return clf.save(tmp_path_factory.mktemp("run"))


def test_without_the_extra_the_command_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "merged")])
    assert result.exit_code == 1 and len(result.stderr.strip().splitlines()) == 1
    assert "gemma_lora_sentiment[hf]" in result.stderr and os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments, word", [
    (["--to", "FULL"], "exists already"), (["--to", "new", "--dtype", "int8"], "not one of"),
])  # fmt: skip
def test_mistakes_of_the_command_are_one_line(arguments, word, run, tmp_path, pretended):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "x").write_text("mine")
    arguments = [str(tmp_path / a) if a in ("FULL", "new") else a for a in arguments]
    result = CliRunner().invoke(app, ["export", str(run), "--quiet", *arguments])
    assert result.exit_code == 2 and word in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == ["FULL"] and os.listdir(tmp_path / "FULL") == ["x"]


def test_beside_the_checkpoint_lie_its_labels_and_the_commands(run, tmp_path, pretended, monkeypatch):
    clf = GemmaLoraClassifier.load(run)
    monkeypatch.setattr(
        export, "_reloaded_logits", lambda _, prompts: export._adapted_logits(clf.fitted_base(), clf.adapter_, prompts)
    )
    result = CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "Mine"), "--quiet"])
    assert result.exit_code == 0, result.output
    labels = json.loads((tmp_path / "Mine" / "labels.json").read_text())["labels"]
    assert [label["label"] for label in labels] == clf.classes_.tolist()
    readme = (tmp_path / "Mine" / "README.md").read_text()
    assert "vllm serve . --served-model-name mine" in readme and "vllm serve BASE --enable-lora" in readme


@pytest.mark.parametrize("preset", ["tiny", "mini_ko"])
def test_live_command(preset, tiny, tmp_path):
    transformers = pytest.importorskip("transformers", reason="install the [hf] extra for the live tests")
    pytest.importorskip("torch", reason="install the [hf] extra for the live tests")
    words = {1: "good", 0: "bad"}
    clf = GemmaLoraClassifier(preset=tiny if preset == "tiny" else preset, epochs=1, max_length=48, label_words=words)
    clf.fit(["맛있어요", "별로예요"] * 4, [1, 0] * 4).save(tmp_path / "run")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--to", str(tmp_path / "merged"), "--quiet"])
    assert result.exit_code == 0, result.output
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"} < set(
        os.listdir(tmp_path / "merged")
    )
    assert not (tmp_path / "merged" / "NOTICE").exists() and not list(tmp_path.glob(".*"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    prompt = "Instruction:\n국물이 진하고 좋았어요 또 갈게요\n\nResponse:\n"
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = clf.encode(["국물이 진하고 좋았어요 또 갈게요"])[0]
    assert inputs["input_ids"][0].tolist() == ids.tolist()  # asked as the card says, it is asked as the run asks
    written = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, len(ids) :], skip_special_tokens=True
    )
    assert written == clf.generate("국물이 진하고 좋았어요 또 갈게요", max_new_tokens=4)
