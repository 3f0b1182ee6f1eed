"""What would bore a reader of 03_adapter: files that are cut, flipped, swapped or of another model."""

import hashlib
import json
import os
import shutil
import struct
from copy import copy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

# One compilation of a program is enough for all tests and their subprocesses.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["GEMMA_LORA_SENTIMENT_CACHE"] + "/jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling is most of what they cost

from gemma_lora_sentiment import GemmaLoraClassifier
from gemma_lora_sentiment.adapter import (
    Adapter,
    RunError,
    from_peft,
    from_textbook,
    load_adapter,
    new_adapter,
    save_adapter,
    save_files,
    to_peft,
    to_textbook,
)
from gemma_lora_sentiment.checkpoint import load_checkpoint, save_checkpoint
from gemma_lora_sentiment.gemma import gemma_config
from gemma_lora_sentiment.model import load_base, tiny_gemma

ALL_TARGETS = ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear")
RANK, ALPHA = 3, 6.0
CONFIG, TENSORS, SUMS = "adapter_config.json", "adapter_model.safetensors", "SHA256SUMS"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(tiny_gemma(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def trained(base):
    rng = np.random.default_rng(0)
    start = new_adapter(base, RANK, ALL_TARGETS, ALPHA)
    arrays = {path: rng.normal(size=array.shape).astype(np.float32) for path, array in start.arrays.items()}
    return Adapter(arrays, start.rank, start.alpha, start.targets)


@pytest.fixture
def whole(trained, tmp_path):
    return save_adapter(tmp_path / "run", trained, "tiny")


@pytest.fixture
def folder(whole):
    "As an adapter of PEFT's own: no digests, so damage has to be seen in the files themselves."
    (whole / SUMS).unlink()
    return whole


def assert_refused(folder, base):
    with pytest.raises(RunError) as error:
        load_adapter(folder, base)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def assert_refused_or_whole(folder, base, trained):
    """A flipped bit may hit a byte without meaning; then what is loaded must be what was saved."""
    try:
        loaded = load_adapter(folder, base)
    except RunError as error:
        assert "\n" not in str(error)
        return 0
    assert set(loaded.targets) == set(trained.targets)
    if (loaded.rank, loaded.alpha) == (trained.rank, trained.alpha):
        assert all(np.array_equal(loaded.arrays[path], array) for path, array in trained.arrays.items())
    else:  # the bit was in the note: what is added to the weights is the same
        now, before = deltas(loaded), deltas(trained)
        assert now.keys() == before.keys()
        for path in before:
            np.testing.assert_allclose(now[path], before[path], atol=1e-4)
    return 1


def change_config(folder, **changes):
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder, change):
    path = folder / TENSORS
    tensors = safetensors.numpy.load_file(path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    path.write_bytes(safetensors.numpy.save(change(tensors, name)))


# --- there and back


@pytest.mark.parametrize("rank, alpha, targets", [
    (1, 1.0, ("query",)), (4, 8.0, ("query", "value")), (3, 0.5, ALL_TARGETS), (2, 2.0, ("value", "query")),
    (5, 16.0, ("ffw_linear", "attention_output")),
])  # fmt: skip
def test_an_adapter_comes_back_bit_by_bit(rank, alpha, targets, base, tmp_path):
    rng = np.random.default_rng(rank)
    start = new_adapter(base, rank, targets, alpha, seed=5)
    arrays = {path: rng.normal(size=array.shape).astype(np.float32) for path, array in start.arrays.items()}
    save_adapter(tmp_path, Adapter(arrays, rank, alpha, targets), "tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == [SUMS, CONFIG, TENSORS]
    loaded = load_adapter(tmp_path, base)
    assert (loaded.rank, loaded.alpha, loaded.targets) == (rank, alpha, targets)
    assert list(loaded.arrays) == list(arrays)
    assert all(np.array_equal(loaded.arrays[path], arrays[path]) for path in arrays)


@pytest.mark.parametrize("rank, alpha", [(2, 2.0), (3, 6.0), (3, 0.5), (5, 16.0)])
def test_every_reader_sees_one_rank_and_no_scale(rank, alpha, base, tmp_path):
    rng = np.random.default_rng(rank)
    start = new_adapter(base, rank, ALL_TARGETS, alpha)
    arrays = {path: rng.normal(size=array.shape).astype(np.float32) for path, array in start.arrays.items()}
    saved = save_adapter(tmp_path, Adapter(arrays, rank, alpha, ALL_TARGETS), "tiny")
    assert_one_rank_and_no_scale(saved)
    assert json.loads((saved / CONFIG).read_text())["r"] == 2 * rank  # two heads
    for path, delta in deltas(Adapter(arrays, rank, alpha, ALL_TARGETS)).items():
        lora_a, lora_b = padded_of(saved)[path]
        np.testing.assert_allclose(lora_b.astype("f8") @ lora_a, delta, rtol=1e-5, atol=1e-5)
    size = (saved / TENSORS).stat().st_size
    save_adapter(tmp_path, Adapter(arrays, rank, float(rank), ALL_TARGETS), "tiny")
    assert size < 1.15 * (saved / TENSORS).stat().st_size  # what other scales than powers of two cost


def test_numbers_too_small_to_be_scaled_come_back(base, tmp_path):
    arrays = {path: np.full_like(array, 1e-44) for path, array in new_adapter(base, 3).arrays.items()}
    arrays["decoder_block_0/attention/query/lora_kernel_b"][:] = -0.0
    save_adapter(tmp_path, Adapter(arrays, 3, 0.5, ("query", "value")), "tiny")
    loaded = load_adapter(tmp_path, base)
    assert all(loaded.arrays[path].tobytes() == array.tobytes() for path, array in arrays.items())


def test_files_of_before_with_patterns_still_load(trained, base, tmp_path):
    "Per head, rank and alpha by module, as they were written until one rank was."
    tensors, modules = {}, dict(zip(ALL_TARGETS, ALL_MODULES, strict=True))
    for path, a in trained.arrays.items():
        if path.endswith("a"):
            block, *_, layer, _ = path.split("/")
            part = "mlp" if "ffw" in layer else "self_attn"
            name = f"base_model.model.model.layers.{block[-1]}.{part}.{modules[layer]}"
            pair = to_peft(layer, a, trained.arrays[path[:-1] + "b"])
            tensors |= {f"{name}.lora_{which}.weight": array for which, array in zip("AB", pair, strict=True)}
    config = dict(r=RANK, lora_alpha=ALPHA, target_modules=ALL_MODULES, peft_type="LORA", task_type="CAUSAL_LM",
                  rank_pattern={"q_proj": 2 * RANK}, alpha_pattern={"q_proj": 2 * ALPHA})  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / TENSORS).write_bytes(safetensors.numpy.save(tensors))
    loaded = load_adapter(tmp_path, base)
    assert (loaded.rank, loaded.alpha, loaded.targets) == (RANK, ALPHA, ALL_TARGETS)
    assert all(np.array_equal(loaded.arrays[path], array) for path, array in trained.arrays.items())


def test_without_its_note_an_adapter_adds_the_same(folder, base, trained):
    change_tensors(folder, lambda tensors, name: tensors)  # safetensors forgets the metadata
    loaded = load_adapter(folder, base)
    assert isinstance(loaded.rank, dict)
    for path, delta in deltas(trained).items():
        np.testing.assert_allclose(deltas(loaded)[path], delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("note", ["", "{", "null", "[]", "{}", '{"rank": 3}', '{"rank": 3, "alpha": 0}',
                                  '{"rank": 6, "alpha": 6.0}', '{"rank": "3", "alpha": 6.0}',
                                  '{"rank": {"x": [3, 3]}, "alpha": 6.0}', '{"rank": -3, "alpha": 6.0}',
                                  '{"rank": 3, "alpha": 6.0, "last_bits": "0"}', '{"rank": 3, "alpha": 1e999}',
                                  '{"rank": true, "alpha": 6.0}', "[" * 9999])  # fmt: skip
def test_a_note_that_does_not_fit_is_refused(note, folder, base, trained):
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    (folder / TENSORS).write_bytes(safetensors.numpy.save(tensors, {"gemma_lora_sentiment": note}))
    if note:
        with pytest.raises(RunError, match="the note in it do not agree") as error:
            load_adapter(folder, base)
        assert "\n" not in str(error.value)
    else:
        assert isinstance(load_adapter(folder, base).rank, dict)


def test_a_scale_that_was_edited_counts(folder, base, trained):
    change_config(folder, lora_alpha=4 * RANK)  # twice what was written
    for path, delta in deltas(load_adapter(folder, base)).items():
        np.testing.assert_allclose(delta, 2 * deltas(trained)[path], rtol=1e-5, atol=1e-5)


def test_a_pickle_alone_is_refused_by_name(folder, base):
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(RunError, match="adapter_model.bin alone, a pickle.*safe_serialization=True"):
        load_adapter(folder, base)


def test_saving_over_a_saved_adapter_replaces_it(folder, base):
    other = new_adapter(base, RANK, ALL_TARGETS, ALPHA, seed=9)
    save_adapter(folder, other, "tiny")
    loaded = load_adapter(folder, base)
    assert all(np.array_equal(loaded.arrays[path], other.arrays[path]) for path in other.arrays)
    assert sorted(path.name for path in folder.iterdir()) == [SUMS, CONFIG, TENSORS]


def test_arrays_that_lie_otherwise_in_memory_are_saved_as_they_are_read(trained, base, tmp_path):
    """safetensors 0.8.0 writes a transposed array in the order of its memory, without a word."""
    turned = {path: np.asfortranarray(array) for path, array in trained.arrays.items()}
    folder = save_adapter(tmp_path / "turned", Adapter(turned, trained.rank, trained.alpha, trained.targets), "tiny")
    loaded = load_adapter(folder, base)
    assert all(np.array_equal(loaded.arrays[path], array) for path, array in trained.arrays.items())
    save_checkpoint(tmp_path / "fit", {"rate": 1}, turned, {"epoch": 0})
    arrays, _ = load_checkpoint(tmp_path / "fit", {"rate": 1})
    assert all(np.array_equal(arrays[path], array) for path, array in trained.arrays.items())


@pytest.mark.parametrize("layer, a_shape, outputs", [
    ("query", (4, 32, 3), 16), ("key", (1, 32, 3), 16), ("value", (2, 32, 5), 8), ("attention_output", (4, 16, 3), 32),
    ("ffw_gating", (32, 3), 64), ("ffw_linear", (64, 1), 32),
])  # fmt: skip
def test_peft_s_pair_has_the_same_product(layer, a_shape, outputs):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=a_shape).astype("f4"), rng.normal(size=(a_shape[-1], outputs)).astype("f4")
    lora_a, lora_b = to_peft(layer, a, b)
    assert lora_a.dtype == lora_b.dtype == np.float32 and lora_a.flags.c_contiguous and lora_b.flags.c_contiguous
    delta = np.einsum("...r,ro->...o", a, b)  # as Keras adds it to the kernel
    if layer in ("query", "key", "value"):  # (heads, inputs, head size) -> (heads x head size, inputs)
        expected = delta.transpose(0, 2, 1).reshape(-1, a_shape[1])
    else:  # (..., outputs) -> (outputs, inputs)
        expected = delta.reshape(-1, outputs).T
    np.testing.assert_allclose(lora_b @ lora_a, expected, atol=1e-5)
    back = from_peft(layer, lora_a, lora_b, a_shape)
    assert np.array_equal(back[0], a) and np.array_equal(back[1], b)


def test_a_new_adapter_changes_nothing_and_depends_on_its_seed_alone(base):
    first, second, third = (new_adapter(base, RANK, ALL_TARGETS, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first.arrays[path], second.arrays[path]) for path in first.arrays)
    for path, array in first.arrays.items():
        if path.endswith("lora_kernel_b"):
            assert not array.any()
        else:
            assert array.any() and not np.array_equal(array, third.arrays[path])
            assert abs(array).max() <= np.sqrt(6 / np.prod(array.shape[:-1]))
    assert first.alpha == RANK and first.parameter_count == sum(array.size for array in first.arrays.values())


# --- damaged tensors


@pytest.mark.parametrize("twentieth", range(20))
def test_cut_tensors_are_refused(twentieth, folder, base):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) * twentieth // 20])
    assert_refused(folder, base)


@pytest.mark.parametrize("missing", [1, 2, 3, 4, 7, 8, 9])
def test_tensors_cut_by_a_few_bytes_are_refused(missing, folder, base):
    data = (folder / TENSORS).read_bytes()
    for damaged in (data[:-missing], data + b"\0" * missing, data[missing:]):
        (folder / TENSORS).write_bytes(damaged)
        assert_refused(folder, base)


def test_bits_flipped_in_the_header_load_nothing_wrong(folder, base, trained):
    data = (folder / TENSORS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    rng, harmless = np.random.default_rng(0), 0
    places = [*range(8), *rng.integers(8, end, 200)]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (folder / TENSORS).write_bytes(flipped)
        harmless += assert_refused_or_whole(folder, base, trained)
    assert harmless < 10


@pytest.mark.parametrize("change", [
    lambda tensors, name: {key: value for key, value in tensors.items() if key != name},
    lambda tensors, name: {},
    lambda tensors, name: {**tensors, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": tensors[name]},
    lambda tensors, name: {**tensors, "x": np.zeros(1, np.float32)},
    lambda tensors, name: {**tensors, name: tensors[name].T.copy()},
    lambda tensors, name: {**tensors, name: tensors[name][:-1]},
    lambda tensors, name: {**tensors, name: tensors[name][None]},
    lambda tensors, name: {**tensors, name: np.zeros((0, 32), np.float32)},
    lambda tensors, name: {**tensors, name: np.float32(1)[None]},
    lambda tensors, name: {**tensors, name: tensors[name].astype(np.float64)},
    lambda tensors, name: {**tensors, name: tensors[name].astype(np.int32)},
    lambda tensors, name: {**tensors, name: np.where(tensors[name] > 0, np.nan, 1).astype(np.float32)},
    lambda tensors, name: {**tensors, name: np.full_like(tensors[name], np.inf)},
    lambda tensors, name: {**tensors, name: np.full_like(tensors[name], -np.inf)},
], ids=["missing", "all missing", "a layer too many", "a tensor too many", "transposed", "a row less",
        "a dimension more", "empty", "scalar", "float64", "int32", "NaN", "inf", "-inf"])  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(change, folder, base):
    change_tensors(folder, change)
    assert_refused(folder, base)


@pytest.mark.parametrize("dtype, size", [("F8_E4M3", 1), ("BOOL", 1), ("F99", 4)])
def test_number_formats_that_numpy_does_not_know_are_refused(dtype, size, folder, base):
    header = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 2 * size)
    assert_refused(folder, base)


def test_heads_that_do_not_share_one_b_are_peft_s_own(folder, base, trained):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def change(tensors, _):
        tensors[name][0, -1] = 0.5  # off the block diagonal
        return tensors

    change_tensors(folder, change)
    loaded = load_adapter(folder, base)
    assert loaded.rank["decoder_block_0/attention/query"] == (2 * 2 * RANK, 2 * RANK)  # heads x PEFT's rank
    assert loaded.alpha == 2 * RANK  # and the scale is in B
    a, b = (loaded.arrays[f"decoder_block_0/attention/query/lora_kernel_{which}"] for which in "ab")
    lora_a, lora_b = to_textbook(a, b)
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    assert np.array_equal(lora_b, tensors[name]) and np.array_equal(lora_a, tensors[name.replace("lora_B", "lora_A")])


# --- damaged configurations


@pytest.mark.parametrize("twentieth", range(20))
def test_a_cut_configuration_is_refused(twentieth, folder, base):
    data = (folder / CONFIG).read_bytes().rstrip()
    (folder / CONFIG).write_bytes(data[: len(data) * twentieth // 20])
    assert_refused(folder, base)


def test_bits_flipped_in_the_configuration_never_break_the_tensors(folder, base, trained):
    data, rng = (folder / CONFIG).read_bytes(), np.random.default_rng(1)
    for place in rng.integers(0, len(data), 150):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (folder / CONFIG).write_bytes(flipped)
        try:
            loaded = load_adapter(folder, base)
        except RunError as error:
            assert "\n" not in str(error)
            continue
        # A digit of alpha may have become another digit; the rest is checked against the tensors.
        if isinstance(loaded.rank, int):
            assert all(np.array_equal(loaded.arrays[path], array) for path, array in trained.arrays.items())
        scales = loaded.rank.values() if isinstance(loaded.rank, dict) else [(0, loaded.rank)]
        assert all(np.isfinite(loaded.alpha / divisor) and loaded.alpha / divisor > 0 for _, divisor in scales)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "5", '"r lora_alpha target_modules"', "\x00", "{'r': 3}",
                                  "\xff\xfe", '["r", "lora_alpha", "target_modules"]'])  # fmt: skip
def test_a_configuration_that_is_no_configuration_is_refused(text, folder, base):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert_refused(folder, base)


@pytest.mark.parametrize("changes", [
    dict(r=2), dict(r=4), dict(r=0), dict(r=-3), dict(r=3.5), dict(r="3x"), dict(r=None), dict(r=[3]), dict(r=10**9),
    dict(r=...), dict(lora_alpha=...), dict(target_modules=...),
    dict(lora_alpha=None), dict(lora_alpha="much"), dict(lora_alpha=float("nan")), dict(lora_alpha=float("inf")),
    dict(lora_alpha=-1), dict(lora_alpha=0), dict(lora_alpha=[6]),
    dict(target_modules=None), dict(target_modules=[]), dict(target_modules=5), dict(target_modules="q_proj"),
    dict(target_modules=["q_proj"]), dict(target_modules=["q_proj", "lm_head"]), dict(target_modules=[["q_proj"]]),
    dict(target_modules=[None]), dict(target_modules="all-linear"),
], ids=str)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, folder, base):
    change_config(folder, **changes)
    assert_refused(folder, base)


@pytest.mark.parametrize("changes, word", [
    (dict(use_dora=True), "use_dora"), (dict(bias="lora_only"), "bias"), (dict(bias="all"), "bias"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"), (dict(layers_to_transform=[0]), "layers_to_transform"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out"), (dict(lora_bias=True), "lora_bias"),
    (dict(trainable_token_indices=[3]), "trainable_token_indices"), (dict(use_qalora=True), "use_qalora"),
    (dict(target_parameters=["mlp.x"]), "target_parameters"), (dict(layer_replication=[[0, 1]]), "layer_replication"),
    (dict(something_of_2030={"a": 1}), "something_of_2030"), (dict(peft_type="IA3"), "IA3"),
    (dict(task_type="SEQ_CLS"), "SEQ_CLS"),
    (dict(init_lora_weights="pissa_niter_4"), "pissa"), (dict(exclude_modules=["q_proj"]), "exclude_modules"),
    (dict(rank_pattern={"q_proj": "x"}), "rank_pattern"), (dict(alpha_pattern=[1]), "alpha_pattern"),
    (dict(rank_pattern={"(": 3, "q_proj": 6}), "pattern"), (dict(use_rslora="yes"), "use_rslora"),
    (dict(task_type="SEQ_CLS", modules_to_save=["score"]), "SEQ_CLS"), (dict(task_type="TOKEN_CLS"), "TOKEN_CLS"),
    (dict(target_modules=["q_proj", "embed_tokens"]), "embed_tokens"), (dict(target_modules="("), "pattern"),
], ids=str)  # fmt: skip
def test_what_is_not_computed_here_is_refused_by_its_name(changes, word, folder, base):
    change_config(folder, **changes)
    with pytest.raises(RunError, match=word) as error:
        load_adapter(folder, base)
    assert "\n" not in str(error.value)


def test_settings_of_training_alone_change_nothing(folder, base, trained):
    change_config(
        folder, lora_dropout=0.3, init_lora_weights="gaussian", peft_version="9", use_dora=False, bias="none",
        modules_to_save=None, eva_config={"rho": 2}, layers_to_transform=None, inference_mode=False,
    )  # fmt: skip
    loaded = load_adapter(folder, base)
    assert loaded.rank == RANK and all(np.array_equal(loaded.arrays[p], trained.arrays[p]) for p in trained.arrays)


@pytest.mark.parametrize("embedding", ["embed_tokens.lora_embedding_A", "embed_tokens.weight", "norm.weight"])
def test_tensors_beside_the_projections_are_refused(embedding, folder, base):
    change_tensors(folder, lambda tensors, name: {**tensors, f"base_model.model.model.{embedding}": tensors[name]})
    with pytest.raises(RunError, match=embedding.split(".")[0]):
        load_adapter(folder, base)


@pytest.mark.parametrize("other", [
    dict(num_layers=3), dict(num_layers=1), dict(hidden_dim=16), dict(num_query_heads=4), dict(intermediate_dim=32),
], ids=str)  # fmt: skip
def test_an_adapter_of_a_base_of_other_shape_is_refused(other, folder, base):
    changed = copy(base)
    changed.config = gemma_config("Gemma", {**base.arguments, **other})
    assert_refused(folder, changed)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_missing_files_are_named(name, folder, base):
    (folder / name).unlink()
    with pytest.raises(RunError, match=f"holds no {name}"):
        load_adapter(folder, base)
    assert_refused(folder, base)
    assert_refused(folder / "absent", base)


# --- files that are whole or not there




def test_a_folder_that_is_a_file_is_an_os_error(trained, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OSError):
        save_adapter(tmp_path / "run", trained, "tiny")
    assert (tmp_path / "run").read_text() == "a file" and len(list(tmp_path.iterdir())) == 1


def test_folders_are_made(trained, tmp_path):
    assert save_adapter(tmp_path / "a" / "b", trained, "tiny") == Path(tmp_path / "a" / "b")


# --- files that belong together


def test_digests_are_those_of_sha256sum(whole):
    names = [line.split("  ")[1] for line in (whole / SUMS).read_text().splitlines()]
    assert sorted(names) == [CONFIG, TENSORS]
    for line in (whole / SUMS).read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((whole / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", [CONFIG, TENSORS, SUMS])
def test_any_flipped_bit_is_refused_where_there_are_digests(name, whole, base):
    data, rng = (whole / name).read_bytes(), np.random.default_rng(3)
    for place in rng.integers(0, len(data), 25):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (whole / name).write_bytes(flipped)
        with pytest.raises(RunError) as error:
            load_adapter(whole, base)
        assert "\n" not in str(error.value)
    (whole / name).write_bytes(data)
    load_adapter(whole, base)


def test_what_was_edited_on_purpose_loads_unverified(whole, base):
    change_config(whole, lora_alpha=2 * ALPHA, alpha_pattern={"q_proj": 4 * ALPHA})
    with pytest.raises(RunError, match="not as it was saved.*verify=False"):
        load_adapter(whole, base)
    assert load_adapter(whole, base, verify=False).alpha == 2 * ALPHA


def test_a_full_disk_leaves_all_files_of_the_previous_state(whole, base, monkeypatch):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    real, calls = os.fsync, []

    def full_at_the_last(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full_at_the_last)
    with pytest.raises(OSError, match="No space"):
        save_adapter(whole, new_adapter(base, RANK, ALL_TARGETS, ALPHA, seed=9), "tiny")
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


# --- PEFT's own adapters


@pytest.mark.parametrize("heads, rank, inputs, size", [(1, 4, 32, 16), (2, 1, 8, 4), (4, 3, 32, 8), (3, 16, 24, 8)])
def test_the_textbook_s_lora_has_its_place_in_keras(heads, rank, inputs, size):
    rng = np.random.default_rng(0)
    lora_a, lora_b = rng.normal(size=(rank, inputs)).astype("f4"), rng.normal(size=(heads * size, rank)).astype("f4")
    a, b = from_textbook(lora_a, lora_b, heads)
    assert a.shape == (heads, inputs, heads * rank) and b.shape == (heads * rank, size)
    delta = np.einsum("ndr,rh->nhd", a.astype("f8"), b.astype("f8")).reshape(heads * size, inputs)
    np.testing.assert_allclose(delta, lora_b.astype("f8") @ lora_a.astype("f8"), atol=1e-12)  # exact: zeros were added
    back = to_textbook(a, b)
    assert np.array_equal(back[0], lora_a) and np.array_equal(back[1], lora_b)


def textbook(base, config, seed=0, dtype=np.float32, prefix="base_model.model.model."):
    "An adapter as PEFT writes it, with ranks as `config` says for module names."
    sizes = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32), "gate_proj": (32, 32),
             "up_proj": (32, 32), "down_proj": (32, 32)}  # fmt: skip
    rng, tensors = np.random.default_rng(seed), {}
    for block in range(len(base.config.layers)):
        for name in config["target_modules"]:
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            ranks = config.get("rank_pattern", {})
            rank = ranks.get(f"layers.{block}.{part}.{name}", ranks.get(name, config["r"]))
            key = f"{prefix}layers.{block}.{part}.{name}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(size=(rank, sizes[name][0])).astype(dtype)
            tensors[f"{key}.lora_B.weight"] = rng.normal(size=(sizes[name][1], rank)).astype(dtype)
    return tensors


def assert_one_rank_and_no_scale(folder):
    "What PEFT, vLLM and llama.cpp scale in three ways, they all scale by 1."
    config = json.loads((folder / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] and isinstance(config["r"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and "use_rslora" not in config
    assert {size for pair in padded_of(folder).values() for size in (len(pair[0]), pair[1].shape[1])} == {config["r"]}


def padded_of(folder):
    "lora_A and lora_B by path of the Keras layer."
    layers = {"q_proj": "attention/query", "k_proj": "attention/key", "v_proj": "attention/value",
              "o_proj": "attention/attention_output", "gate_proj": "ffw_gating", "up_proj": "ffw_gating_2",
              "down_proj": "ffw_linear"}  # fmt: skip
    tensors, found = safetensors.numpy.load_file(folder / TENSORS), {}
    for name, tensor in tensors.items():
        if name.endswith("lora_A.weight"):
            *_, block, _, module, _, _ = name.split(".")
            pair = tensor, tensors[name.replace("lora_A", "lora_B")]
            found[f"decoder_block_{block}/{layers[module]}"] = pair
    return found


def deltas(adapter):
    "float64 change of each layer's weight, as transformers lays it out, by path."
    found = {}
    for path, a in adapter.arrays.items():
        if path.endswith("a"):
            layer_path = path.rsplit("/", 1)[0]
            divisor = adapter.rank[layer_path][1] if isinstance(adapter.rank, dict) else adapter.rank
            delta = (a.astype("f8") @ adapter.arrays[path[:-1] + "b"]) * (adapter.alpha / divisor)
            per_head = layer_path.split("/")[-1] in ("query", "key", "value")
            found[layer_path] = (
                delta.transpose(0, 2, 1).reshape(-1, delta.shape[1]) if per_head
                else delta.reshape(-1, delta.shape[-1]).T
            )  # fmt: skip
    return found


ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("config", [
    dict(r=4, lora_alpha=8, target_modules=ALL_MODULES),
    dict(r=4, lora_alpha=8, target_modules=["v_proj"]),
    dict(r=2, lora_alpha=5, target_modules=ALL_MODULES, use_rslora=True),
    dict(r=2, lora_alpha=5, target_modules=ALL_MODULES, rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 1},
         alpha_pattern={"o_proj": 7, "layers.0.self_attn.k_proj": 1}),
    dict(r=2, lora_alpha=5, target_modules=["q_proj", "up_proj"], alpha_pattern={"up_proj": 3}, use_rslora=True,
         rank_pattern={"up_proj": 5}),
], ids=["all", "value", "rslora", "patterns", "patterns and rslora"])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_peft_s_own_adapter_is_the_same_change_of_weights(config, dtype, base, tmp_path):
    tensors = textbook(base, config, dtype=np.dtype(jnp.dtype(dtype)))
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", **config}))
    (tmp_path / TENSORS).write_bytes(safetensors.numpy.save(tensors))
    loaded = load_adapter(tmp_path, base)
    modules = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "attention_output": "o_proj",
               "ffw_gating": "gate_proj", "ffw_gating_2": "up_proj", "ffw_linear": "down_proj"}  # fmt: skip
    found = deltas(loaded)
    assert len(found) == 2 * len(config["target_modules"])
    for path, delta in found.items():
        block, name = int(path[len("decoder_block_")]), modules[path.split("/")[-1]]
        part = "mlp" if path.count("/") == 1 else "self_attn"
        full = f"layers.{block}.{part}.{name}"
        rank, alpha = (
            config.get(pattern, {}).get(full, config.get(pattern, {}).get(name, default))
            for pattern, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"]))
        )
        lora_a, lora_b = (tensors[f"base_model.model.model.{full}.lora_{w}.weight"].astype("f8") for w in "AB")
        scale = alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)
        np.testing.assert_allclose(delta, scale * (lora_b @ lora_a), rtol=1e-12, atol=1e-12)

    saved = save_adapter(tmp_path / "again", loaded, "tiny")
    assert_one_rank_and_no_scale(saved)
    again = load_adapter(saved, base)
    assert (again.rank, again.alpha, again.targets) == (loaded.rank, loaded.alpha, loaded.targets)
    assert list(again.arrays) == list(loaded.arrays)
    assert all(np.array_equal(again.arrays[path], array) for path, array in loaded.arrays.items())
    for path, (lora_a, lora_b) in padded_of(saved).items():
        np.testing.assert_allclose(lora_b.astype("f8") @ lora_a, found[path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["base_model.model.model.language_model.", "base_model.model.language_model.model."])
def test_names_of_gemma_3_with_vision_are_understood(prefix, base, tmp_path):
    config = dict(r=2, lora_alpha=5, target_modules=r".*\.(q_proj|down_proj)")
    tensors = textbook(base, {**config, "target_modules": ["q_proj", "down_proj"]}, prefix=prefix)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / TENSORS).write_bytes(safetensors.numpy.save(tensors))
    assert load_adapter(tmp_path, base).targets == ("query", "ffw_linear")


def test_patterns_of_gemma_3_with_vision_are_understood(base, tmp_path):
    config = dict(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    tensors = textbook(base, config, prefix="base_model.model.model.language_model.")
    config["alpha_pattern"] = {"language_model.layers.1.mlp.down_proj": 9}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / TENSORS).write_bytes(safetensors.numpy.save(tensors))
    loaded = load_adapter(tmp_path, base)
    scales = {path: loaded.alpha / divisor for path, (_, divisor) in loaded.rank.items()}
    assert scales.pop("decoder_block_1/ffw_linear") == 9 / 2
    assert set(scales.values()) == {5 / 2}


@pytest.mark.parametrize("name", ["base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight",
                                  "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])  # fmt: skip
def test_what_is_beside_the_language_model_is_refused_by_name(name, base, tmp_path):
    config = dict(r=2, lora_alpha=5, target_modules=["q_proj"])
    tensors = textbook(base, config, prefix="base_model.model.model.language_model.")
    tensors[name] = tensors["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / TENSORS).write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(RunError, match="vision_tower" if "vision" in name else "twice, under two prefixes"):
        load_adapter(tmp_path, base)


def test_layers_that_one_block_lacks_are_left_alone(base, tmp_path):
    config = dict(r=2, lora_alpha=5, target_modules=["q_proj"])
    tensors = {name: tensor for name, tensor in textbook(base, config).items() if ".layers.1." in name}
    (tmp_path / CONFIG).write_text(json.dumps({**config, "target_modules": ["layers.1.self_attn.q_proj"]}))
    (tmp_path / TENSORS).write_bytes(safetensors.numpy.save(tensors))
    loaded = load_adapter(tmp_path, base)
    assert list(loaded.rank) == ["decoder_block_1/attention/query"] and loaded.targets == ("query",)
    saved = save_adapter(tmp_path / "again", loaded, "tiny")
    assert json.loads((saved / CONFIG).read_text())["target_modules"] == ["layers.1.self_attn.q_proj"]
    assert load_adapter(saved, base).rank == loaded.rank


# --- saved runs


FIXTURES = Path(__file__).parent / "fixtures"
BASE_OF_RUNS = FIXTURES / "hf_gemma"


@pytest.mark.parametrize("version", [1, 2])
def test_runs_of_every_format_still_load(version):
    folder = FIXTURES / f"run_format{version}"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    clf = GemmaLoraClassifier.load(folder, preset=str(BASE_OF_RUNS))
    assert json.loads((folder / "classifier.json").read_text())["format"] == version
    assert clf.classes_.tolist() == ["neg", "pos"] and clf.words_.words == ("bad", "good")
    np.testing.assert_allclose(clf.predict_proba(expected["comments"]), expected["probabilities"], atol=1e-5)


def cut(data, rng):
    return data[: int(rng.integers(len(data)))]


def flip(data, rng):
    flipped = bytearray(data)
    for place in rng.integers(0, len(data), int(rng.integers(1, 4))):
        flipped[place] ^= 1 << int(rng.integers(8))
    return bytes(flipped) if bytes(flipped) != data else flip(data, rng)


def of_tensors(change):
    def damage(data, rng):
        tensors = safetensors.numpy.load(data)
        name = sorted(tensors)[int(rng.integers(len(tensors)))]
        return safetensors.numpy.save(change(tensors, name, rng), {"format": "pt"})

    return damage


def without(tensors, name, rng):
    return {key: value for key, value in tensors.items() if key != name}


def of_wrong_shape(tensors, name, rng):
    value = tensors[name]
    shapes = [value.T.copy(), value[:-1], value[:, :-1], value.reshape(-1), np.concatenate([value, value])]
    shapes = [shape for shape in shapes if shape.shape != value.shape]
    return {**tensors, name: shapes[int(rng.integers(len(shapes)))]}


def of_wrong_dtype(tensors, name, rng):
    dtype = rng.choice(["float16", "float64", "int32", "uint8"])
    return {key: value.astype(dtype) if key == name or rng.random() < 0.3 else value for key, value in tensors.items()}


DAMAGE = [
    *((cut, name) for name in (TENSORS, CONFIG, "classifier.json", SUMS)),
    *((flip, name) for name in (TENSORS, CONFIG, "classifier.json", SUMS)),
    *((of_tensors(change), TENSORS) for change in (without, of_wrong_shape, of_wrong_dtype)),
]


def damaged_runs(tmp_path, first, last):
    "Damage the saved run in different ways; each must be refused in one line, and none loaded."
    messages = []
    for number in range(first, last):
        damage, name = DAMAGE[number % len(DAMAGE)]
        run = tmp_path / f"run{number}"
        shutil.copytree(FIXTURES / "run_format2", run)
        (run / name).write_bytes(damage((run / name).read_bytes(), np.random.default_rng(number)))
        with pytest.raises(RunError) as error:
            GemmaLoraClassifier.load(run, preset=str(BASE_OF_RUNS))
        message = str(error.value)
        assert "\n" not in message and len(message) < 600 and f"run{number}" in message, message
        messages.append(message)
    return messages


def test_40_damaged_runs_are_refused(tmp_path):
    assert len(damaged_runs(tmp_path, 0, 40)) == 40


@pytest.mark.slow
def test_200_damaged_runs_are_refused(tmp_path):
    print(f"{len(damaged_runs(tmp_path, 0, 200))} damaged runs, all refused")


def test_tensors_damaged_before_the_digests_were_made_are_refused_too(tmp_path):
    "What a digest cannot tell: a file that was already wrong."
    for number, change in enumerate((without, of_wrong_shape)):
        run = tmp_path / f"run{number}"
        shutil.copytree(FIXTURES / "run_format2", run)
        data = of_tensors(change)((run / TENSORS).read_bytes(), np.random.default_rng(0))
        names = ("classifier.json", CONFIG)
        save_files(run, {TENSORS: data, **{name: (run / name).read_bytes() for name in names}})
        with pytest.raises(RunError, match="is missing|the base need"):
            GemmaLoraClassifier.load(run, preset=str(BASE_OF_RUNS))


def test_a_base_of_the_same_shape_and_other_weights_is_refused(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE_OF_RUNS, base)
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1e-3)
    safetensors.numpy.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="is not the one this classifier was fitted on"):
        GemmaLoraClassifier.load(FIXTURES / "run_format2", preset=str(base))
