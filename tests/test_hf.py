"""Our model against transformers: checkpoints in its format give its label probabilities, adapters load in PEFT.

The fixtures and their numbers are made by `fixtures/make_hf_fixtures.py`. The live tests need the [hf] extra.
"""

import importlib.util
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from gemma_lora_sentiment import GemmaLoraClassifier
from gemma_lora_sentiment.adapter import load_adapter, new_adapter, save_adapter
from gemma_lora_sentiment.export import export_checkpoint, merged_tensors, transformers_config
from gemma_lora_sentiment.gemma import hidden_at, logits_of
from gemma_lora_sentiment.model import jax, load_base
from gemma_lora_sentiment.prompt import PromptTemplate, TextTokenizer, encode_prompts, label_words
from gemma_lora_sentiment.scoring import lend, log_softmax, score_labels

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = {"hf_gemma": "gemma", "hf_gemma2": "gemma2", "hf_gemma3": "gemma3_text"}
LABEL_SETS = ("one token each", "several tokens", "one begins another")
ALL_TARGETS = ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear")
TOLERANCE = 1e-4

each_family = pytest.mark.parametrize("folder", FAMILIES)
each_label_set = pytest.mark.parametrize("label_set", LABEL_SETS)


def expected_of(folder):
    return json.loads((FIXTURES / folder / "expected.json").read_text(encoding="utf-8"))


def prompts_of(base, comments):
    return encode_prompts(comments, TextTokenizer(base.tokenizer_proto), PromptTemplate(), 256, 8).token_ids


def words_of(base, words):
    return label_words(range(len(words)), TextTokenizer(base.tokenizer_proto), PromptTemplate(), dict(enumerate(words)))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@each_family
def test_token_ids_are_those_of_sentencepiece(folder):
    base, expected = load_base(FIXTURES / folder), expected_of(folder)
    assert [ids.tolist() for ids in prompts_of(base, expected["comments"])] == expected["prompt_ids"]
    for label_set in expected["label_sets"].values():
        assert [list(ids) for ids in words_of(base, label_set["words"]).word_ids] == label_set["word_ids"]


@each_family
def test_logits_over_the_vocabulary(folder):
    base, expected = load_base(FIXTURES / folder), expected_of(folder)
    chosen = [(expected["prompt_ids"][int(i)], logits) for i, logits in expected["logits"].items()]
    length = max(len(prompt) for prompt, _ in chosen) + 3
    token_ids, padding_mask = np.zeros((2, len(chosen), length), np.int32)
    for row, (prompt, _) in enumerate(chosen):
        token_ids[row, : len(prompt)], padding_mask[row, : len(prompt)] = prompt, 1
    positions = np.array([[len(prompt) - 1] for prompt, _ in chosen], np.int32)
    batch = {"token_ids": token_ids, "padding_mask": padding_mask, "positions": positions}
    with base.lock:
        program = jax.jit(hidden_at, static_argnums=3)
        hidden = program(base.arrays, lend(base, new_adapter(base)), batch, base.config)
        logits = logits_of(base.arrays, hidden, base.config)
    close(np.asarray(logits)[:, 0], [logits for _, logits in chosen])


@each_label_set
@each_family
def test_scores_batched_and_padded(folder, label_set):
    base, expected = load_base(FIXTURES / folder), expected_of(folder)
    prompts, label_set = prompts_of(base, expected["comments"]), expected["label_sets"][label_set]
    words = words_of(base, label_set["words"])
    scores = score_labels(base, new_adapter(base), prompts, words, buckets=(24, 48), batch_size=6)
    close(np.exp(log_softmax(scores)), label_set["probabilities"])
    if not words.single_token:
        close(scores, label_set["log_probabilities"])


@each_family
def test_scores_one_at_a_time(folder):
    base, expected = load_base(FIXTURES / folder), expected_of(folder)
    label_set = expected["label_sets"]["one token each"]
    words, longest = words_of(base, label_set["words"]), max(expected["prompt_ids"], key=len)
    row = expected["prompt_ids"].index(longest)
    prompt = np.array(longest, np.int32)
    scores = score_labels(base, new_adapter(base), [prompt], words, buckets=(len(prompt),), batch_size=1)
    close(np.exp(log_softmax(scores))[0], label_set["probabilities"][row])


@each_label_set
@each_family
def test_classifier_of_no_epochs(folder, label_set):
    expected = expected_of(folder)
    label_set, comments = expected["label_sets"][label_set], expected["comments"]
    n_labels = len(label_set["words"])
    clf = GemmaLoraClassifier(
        preset=str(FIXTURES / folder), epochs=0, label_words=dict(enumerate(label_set["words"])), dtype="float32"
    )
    clf.fit(comments, np.arange(len(comments)) % n_labels)
    probabilities = clf.predict_proba(comments)
    assert clf.classes_.tolist() == list(range(n_labels))
    close(probabilities, label_set["probabilities"])


# --- an adapter that PEFT trained, and the merged checkpoint; without torch


@each_label_set
@each_family
def test_adapter_of_peft_gives_peft_s_probabilities(folder, label_set):
    base, expected = load_base(FIXTURES / folder), expected_of(f"{folder}/peft")
    adapter = load_adapter(FIXTURES / folder / "peft", base)
    prompts, label_set = prompts_of(base, expected["comments"]), expected["label_sets"][label_set]
    words = words_of(base, label_set["words"])
    scores = score_labels(base, adapter, prompts, words, buckets=(48,), batch_size=8)
    close(np.exp(log_softmax(scores)), label_set["probabilities"])
    if not words.single_token:
        close(scores, label_set["log_probabilities"])


@each_family
def test_classifier_from_peft(folder, tmp_path):
    expected = expected_of(f"{folder}/peft")
    label_set = expected["label_sets"]["several tokens"]
    words = dict(zip("abc", label_set["words"], strict=True))
    clf = GemmaLoraClassifier.from_peft(
        FIXTURES / folder / "peft", labels="cab", preset=str(FIXTURES / folder), label_words=words, dtype="float32"
    )
    assert clf.classes_.tolist() == ["a", "b", "c"]
    close(clf.predict_proba(expected["comments"]), label_set["probabilities"])
    again = GemmaLoraClassifier.load(clf.save(tmp_path / "run"))
    close(again.predict_proba(expected["comments"]), label_set["probabilities"])
    assert (again.adapter_.rank, again.adapter_.alpha) == (clf.adapter_.rank, clf.adapter_.alpha)
    assert all(np.array_equal(again.adapter_.arrays[path], array) for path, array in clf.adapter_.arrays.items())
    saved = safetensors.numpy.load_file(tmp_path / "run" / "adapter_model.safetensors")
    theirs = safetensors.numpy.load_file(FIXTURES / folder / "peft" / "adapter_model.safetensors")
    assert saved.keys() == theirs.keys()
    assert {min(array.shape) for array in saved.values()} == {4}  # the largest of its ranks, for all
    assert again.generate(expected["comments"][0], max_new_tokens=2) == clf.generate(expected["comments"][0], 2)


@each_family
def test_adapter_of_peft_merged(folder):
    "W + scale x BA, from PEFT's own tensors."
    base = load_base(FIXTURES / folder, "float32")
    merged = dict(merged_tensors(base, load_adapter(FIXTURES / folder / "peft", base)))
    weights = safetensors.numpy.load_file(FIXTURES / folder / "model.safetensors")
    assert merged.keys() == weights.keys()
    lora = safetensors.numpy.load_file(FIXTURES / folder / "peft" / "adapter_model.safetensors")
    for name, weight in weights.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in lora:
            lora_a, lora_b = lora[f"{key}.lora_A.weight"], lora[f"{key}.lora_B.weight"]
            alpha = 9 if "o_proj" in name else 5
            weight = weight + alpha / lora_a.shape[0] * (lora_b @ lora_a)
        np.testing.assert_allclose(merged[name], weight, rtol=0, atol=2e-6)


@each_family
def test_checkpoint_merged_with_nothing_is_the_original(folder):
    base = load_base(FIXTURES / folder, "float32")
    merged = dict(merged_tensors(base, new_adapter(base)))
    weights = safetensors.numpy.load_file(FIXTURES / folder / "model.safetensors")
    assert merged.keys() == weights.keys() and all(np.array_equal(merged[name], weights[name]) for name in merged)
    ours, theirs = transformers_config(base), json.loads((FIXTURES / folder / "config.json").read_text())
    settings = set(ours) & set(theirs) - {"max_position_embeddings", "rope_theta", "torch_dtype"}
    assert len(settings) >= 15 and {name: ours[name] for name in settings} == {name: theirs[name] for name in settings}


# --- with torch


@pytest.fixture(scope="module")
def hf():
    "The script that made the fixtures, as a module, with all of the [hf] extra at hand."
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason=f"{name} is absent: install the [hf] extra for the live tests")
    spec = importlib.util.spec_from_file_location("make_hf_fixtures", FIXTURES / "make_hf_fixtures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.transformers.utils.logging.disable_progress_bar()
    return module


def fresh_checkpoint(hf, tmp_path, folder, **changes):
    proto = (FIXTURES / folder / "tokenizer.model").read_bytes()
    return hf.make_checkpoint(tmp_path / "checkpoint", FAMILIES[folder], proto, seed=7, **changes)


def live_log_probabilities(hf, model, prompts, words, eos_id=1):
    word_ids = [list(ids) for ids in words.word_ids]
    return np.array([hf.log_probabilities(model, prompt.tolist(), word_ids, eos_id) for prompt in prompts])


@each_family
def test_live_fixtures_are_what_transformers_computes(hf, folder):
    now, stored = hf.expected(hf.load(FIXTURES / folder), FIXTURES / folder), expected_of(folder)
    assert now["prompt_ids"] == stored["prompt_ids"]
    for name in LABEL_SETS:
        close(now["label_sets"][name]["log_probabilities"], stored["label_sets"][name]["log_probabilities"])


LIVE_CHECKPOINTS = {
    "gemma": ("hf_gemma", {}),
    "gemma with as many key as query heads, as 7B": ("hf_gemma", dict(num_key_value_heads=2)),
    "gemma2": ("hf_gemma2", {}),
    "gemma2 scaled by hidden size and heads, as 27B": ("hf_gemma2", dict(query_pre_attn_scalar=8)),
    "gemma3": ("hf_gemma3", {}),
    "gemma3 with scaled rope, as 4B": ("hf_gemma3", dict(rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    })),
    "gemma3 scaled by hidden size and heads, as 27B": ("hf_gemma3", dict(head_dim=8)),
}  # fmt: skip


def compare_live(hf, base, model, adapter, comments, label_set):
    "Our scores and transformers' own, one batch of one length."
    words = words_of(base, hf.WORD_SETS[label_set])
    prompts = prompts_of(base, comments)
    theirs = live_log_probabilities(hf, model, prompts, words)
    scores = score_labels(base, adapter, prompts, words, buckets=(48,), batch_size=8)
    probabilities = np.exp(log_softmax(scores))
    close(probabilities, np.exp(log_softmax(theirs)))
    if not words.single_token:
        close(scores, theirs)
    return probabilities


@pytest.mark.parametrize("checkpoint", LIVE_CHECKPOINTS)
def test_live_fresh_checkpoint(hf, tmp_path, checkpoint):
    folder, changes = LIVE_CHECKPOINTS[checkpoint]
    path = fresh_checkpoint(hf, tmp_path, folder, **changes)
    base, model = load_base(path), hf.load(path)
    for label_set in ("one token each", "several tokens"):
        compare_live(hf, base, model, new_adapter(base), expected_of(folder)["comments"], label_set)


@each_family
def test_live_bfloat16_in_shards(hf, tmp_path, folder):
    "As Google publishes them."
    model = hf.load(fresh_checkpoint(hf, tmp_path, folder)).bfloat16()
    model.save_pretrained(tmp_path / "published", max_shard_size="40KB")
    (tmp_path / "published" / "tokenizer.model").write_bytes((FIXTURES / folder / "tokenizer.model").read_bytes())
    assert len(list((tmp_path / "published").glob("*.safetensors"))) > 1
    rounded = hf.load(tmp_path / "checkpoint")
    with hf.torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16().float())
    base = load_base(tmp_path / "published", dtype="float32")
    compare_live(hf, base, rounded, new_adapter(base), expected_of(folder)["comments"], "one token each")


def random_adapter(base, rank, targets, alpha, seed=3):
    rng, start = np.random.default_rng(seed), new_adapter(base, rank, targets, alpha)
    arrays = {path: rng.normal(0, 0.15, array.shape).astype(np.float32) for path, array in start.arrays.items()}
    return replace(start, arrays=arrays)


@pytest.mark.parametrize("targets", [("query", "value"), ALL_TARGETS], ids=["query and value", "all seven"])
@each_family
def test_live_peft_computes_with_our_adapter(hf, tmp_path, folder, targets):
    import peft

    base = load_base(FIXTURES / folder)
    adapter = random_adapter(base, 3, targets, alpha=6.0)
    save_adapter(tmp_path / "run", adapter, str(FIXTURES / folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # how PEFT says that tensors are missing
        model = peft.PeftModel.from_pretrained(hf.load(FIXTURES / folder), tmp_path / "run").eval()

    layers = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert len(layers) == len(targets) * len(base.config.layers)
    expected = expected_of(folder)
    probabilities = compare_live(hf, base, model, adapter, expected["comments"], "several tokens")
    untrained = expected["label_sets"]["several tokens"]["probabilities"]
    assert np.abs(probabilities - untrained).max() > 0.05  # the adapter does something

    back = load_adapter(tmp_path / "run", base)
    assert back.rank == 3
    for path, array in adapter.arrays.items():
        np.testing.assert_array_equal(back.arrays[path], array)


SHAPES = {
    "gemma, heads of its own": ("hf_gemma", dict(num_key_value_heads=2)),
    "gemma, one head": ("hf_gemma", dict(num_attention_heads=1, num_key_value_heads=1)),
    "gemma2, groups": ("hf_gemma2", dict(num_attention_heads=8, num_key_value_heads=4)),
    "gemma3, groups": ("hf_gemma3", dict(num_attention_heads=4, num_key_value_heads=2)),
}
SETTINGS = {
    "all seven": dict(r=4, lora_alpha=6, target_modules="all-linear"),
    "rslora": dict(r=5, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    "patterns": dict(
        r=2, lora_alpha=6, target_modules=["q_proj", "k_proj", "o_proj", "gate_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 7, "gate_proj": 1}, alpha_pattern={"layers.1.mlp.gate_proj": 2},
    ),
    "some layers by regex": dict(r=3, lora_alpha=9, target_modules=r".*layers\.1\..*(k_proj|up_proj)"),
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_live_adapter_of_peft_there_and_back(hf, tmp_path, shape, settings):
    folder, changes = SHAPES[shape]
    path = fresh_checkpoint(hf, tmp_path, folder, **changes)
    model = hf.make_peft_adapter(path, tmp_path / "peft", seed=5, **SETTINGS[settings])
    base = load_base(path, "float32")
    adapter = load_adapter(tmp_path / "peft", base)
    comments = expected_of(folder)["comments"]
    compare_live(hf, base, model, adapter, comments, "several tokens")

    save_adapter(tmp_path / "ours", adapter, str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = hf.peft.PeftModel.from_pretrained(hf.load(path), tmp_path / "ours").eval()
    for ids in expected_of(folder)["prompt_ids"][:3]:
        close(hf.logits_of(again, ids).numpy(), hf.logits_of(model, ids).numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("checkpoint", LIVE_CHECKPOINTS)
def test_live_export(hf, tmp_path, checkpoint, dtype):
    folder, changes = LIVE_CHECKPOINTS[checkpoint]
    base = load_base(fresh_checkpoint(hf, tmp_path, folder, **changes), "float32")
    adapter = random_adapter(base, 2, ALL_TARGETS, alpha=4.0)
    found = export_checkpoint(tmp_path / "merged", base, adapter, prompts_of(base, ["맛있어요"]), dtype)
    assert found["transformers"] < TOLERANCE and (found["rounding"] == 0) == (dtype == "float32")
    if dtype == "float32":
        model = hf.load(tmp_path / "merged")
        probabilities = compare_live(hf, base, model, adapter, expected_of(folder)["comments"], "several tokens")
        reloaded = load_base(tmp_path / "merged", "float32")  # KerasHub reads it as well
        untrained = new_adapter(reloaded)
        again = compare_live(hf, reloaded, model, untrained, expected_of(folder)["comments"], "several tokens")
        close(probabilities, again)


def test_live_export_of_peft_s_adapter(hf, tmp_path):
    for folder in FAMILIES:
        base = load_base(FIXTURES / folder, "float32")
        adapter = load_adapter(FIXTURES / folder / "peft", base)
        assert export_checkpoint(tmp_path / folder, base, adapter)["transformers"] < TOLERANCE
