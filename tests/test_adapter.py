"""What would bore a reader of 03_adapter: files that are cut, flipped, swapped or of another model."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

# One compilation of a program is enough for all tests and their subprocesses.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["GEMMA_LORA_SENTIMENT_CACHE"] + "/jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling is most of what they cost

from gemma_lora_sentiment.adapter import (
    Adapter,
    RunError,
    adapter_settings,
    from_peft,
    load_adapter,
    new_adapter,
    save_adapter,
    to_peft,
    write_atomically,
)
from gemma_lora_sentiment.model import load_base, tiny_gemma

ALL_TARGETS = ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear")
RANK, ALPHA = 3, 6.0
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(tiny_gemma(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def scorer(base):
    return base.scorer(ALL_TARGETS, RANK)


@pytest.fixture(scope="module")
def trained(scorer):
    rng = np.random.default_rng(0)
    start = new_adapter(scorer, ALPHA)
    arrays = {path: rng.normal(size=array.shape).astype(np.float32) for path, array in start.arrays.items()}
    return Adapter(arrays, start.rank, start.alpha, start.targets)


@pytest.fixture
def folder(trained, tmp_path):
    return save_adapter(tmp_path / "run", trained, "tiny")


def assert_refused(folder, scorer):
    before = scorer.read()
    with pytest.raises(RunError) as error:
        load_adapter(folder, scorer)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    after = scorer.read()
    assert all(np.array_equal(before[path], after[path]) for path in before)  # none loaded


def assert_refused_or_whole(folder, scorer, trained):
    """A flipped bit may hit a byte without meaning; then what is loaded must be what was saved."""
    try:
        loaded = load_adapter(folder, scorer)
    except RunError as error:
        assert "\n" not in str(error)
        return 0
    assert all(np.array_equal(loaded.arrays[path], array) for path, array in trained.arrays.items())
    assert (loaded.rank, loaded.alpha) == (trained.rank, trained.alpha)
    assert set(loaded.targets) == set(trained.targets)
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
    scorer, rng = base.scorer(targets, rank), np.random.default_rng(rank)
    start = new_adapter(scorer, alpha, seed=5)
    arrays = {path: rng.normal(size=array.shape).astype(np.float32) for path, array in start.arrays.items()}
    save_adapter(tmp_path, Adapter(arrays, rank, alpha, targets), "tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]
    loaded = load_adapter(tmp_path, scorer)
    assert (loaded.rank, loaded.alpha, loaded.targets) == (rank, alpha, targets)
    assert adapter_settings(tmp_path) == (rank, alpha, targets)
    assert list(loaded.arrays) == list(arrays)
    assert all(np.array_equal(loaded.arrays[path], arrays[path]) for path in arrays)


def test_saving_over_a_saved_adapter_replaces_it(folder, scorer, trained):
    other = new_adapter(scorer, ALPHA, seed=9)
    save_adapter(folder, other, "tiny")
    loaded = load_adapter(folder, scorer)
    assert all(np.array_equal(loaded.arrays[path], other.arrays[path]) for path in other.arrays)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]


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


def test_a_new_adapter_changes_nothing_and_depends_on_its_seed_alone(scorer):
    first, second, third = (new_adapter(scorer, seed=seed) for seed in (0, 0, 1))
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
def test_cut_tensors_are_refused(twentieth, folder, scorer):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) * twentieth // 20])
    assert_refused(folder, scorer)


@pytest.mark.parametrize("missing", [1, 2, 3, 4, 7, 8, 9])
def test_tensors_cut_by_a_few_bytes_are_refused(missing, folder, scorer):
    data = (folder / TENSORS).read_bytes()
    for damaged in (data[:-missing], data + b"\0" * missing, data[missing:]):
        (folder / TENSORS).write_bytes(damaged)
        assert_refused(folder, scorer)


def test_bits_flipped_in_the_header_load_nothing_wrong(folder, scorer, trained):
    data = (folder / TENSORS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    rng, harmless = np.random.default_rng(0), 0
    places = [*range(8), *rng.integers(8, end, 200)]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (folder / TENSORS).write_bytes(flipped)
        harmless += assert_refused_or_whole(folder, scorer, trained)
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
    lambda tensors, name: {**tensors, name: tensors[name].astype(np.float16)},
    lambda tensors, name: {**tensors, name: tensors[name].astype(np.float64)},
    lambda tensors, name: {**tensors, name: tensors[name].astype(np.int32)},
    lambda tensors, name: {**tensors, name: np.where(tensors[name] > 0, np.nan, 1).astype(np.float32)},
    lambda tensors, name: {**tensors, name: np.full_like(tensors[name], np.inf)},
    lambda tensors, name: {**tensors, name: np.full_like(tensors[name], -np.inf)},
], ids=["missing", "all missing", "a layer too many", "a tensor too many", "transposed", "a row less",
        "a dimension more", "empty", "scalar", "float16", "float64", "int32", "NaN", "inf", "-inf"])  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(change, folder, scorer):
    change_tensors(folder, change)
    assert_refused(folder, scorer)


@pytest.mark.parametrize("dtype, size", [("BF16", 2), ("F8_E4M3", 1), ("BOOL", 1), ("F99", 4)])
def test_number_formats_that_numpy_does_not_know_are_refused(dtype, size, folder, scorer):
    header = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 2 * size)
    assert_refused(folder, scorer)


def test_heads_that_do_not_share_one_b_are_refused(folder, scorer):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def change(tensors, _):
        tensors[name][0, -1] = 0.5  # off the block diagonal
        return tensors

    change_tensors(folder, change)
    assert_refused(folder, scorer)


# --- damaged configurations


@pytest.mark.parametrize("twentieth", range(20))
def test_a_cut_configuration_is_refused(twentieth, folder, scorer):
    data = (folder / CONFIG).read_bytes().rstrip()
    (folder / CONFIG).write_bytes(data[: len(data) * twentieth // 20])
    assert_refused(folder, scorer)


def test_bits_flipped_in_the_configuration_never_break_the_tensors(folder, scorer, trained):
    data, rng = (folder / CONFIG).read_bytes(), np.random.default_rng(1)
    for place in rng.integers(0, len(data), 150):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (folder / CONFIG).write_bytes(flipped)
        try:
            loaded = load_adapter(folder, scorer)
        except RunError as error:
            assert "\n" not in str(error)
            continue
        # A digit of alpha may have become another digit; the rest is checked against the tensors.
        assert all(np.array_equal(loaded.arrays[path], array) for path, array in trained.arrays.items())
        assert np.isfinite(loaded.alpha) and loaded.alpha > 0


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "5", '"r lora_alpha target_modules"', "\x00", "{'r': 3}",
                                  "\xff\xfe", '["r", "lora_alpha", "target_modules"]'])  # fmt: skip
def test_a_configuration_that_is_no_configuration_is_refused(text, folder, scorer):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert_refused(folder, scorer)


@pytest.mark.parametrize("changes", [
    dict(r=2), dict(r=4), dict(r=0), dict(r=-3), dict(r=3.5), dict(r="3x"), dict(r=None), dict(r=[3]), dict(r=10**9),
    dict(r=...), dict(lora_alpha=...), dict(target_modules=...),
    dict(lora_alpha=None), dict(lora_alpha="much"), dict(lora_alpha=float("nan")), dict(lora_alpha=float("inf")),
    dict(lora_alpha=-1), dict(lora_alpha=0), dict(lora_alpha=[6]),
    dict(target_modules=None), dict(target_modules=[]), dict(target_modules=5), dict(target_modules="q_proj"),
    dict(target_modules=["q_proj"]), dict(target_modules=["q_proj", "lm_head"]), dict(target_modules=[["q_proj"]]),
    dict(target_modules=[None]), dict(target_modules="all-linear"),
], ids=str)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, folder, scorer):
    change_config(folder, **changes)
    assert_refused(folder, scorer)
    if changes not in (dict(r=2), dict(r=4), dict(r=10**9), dict(target_modules=["q_proj"])):
        with pytest.raises(RunError) as error:  # already before a scorer is made for it
            adapter_settings(folder)
        assert "\n" not in str(error.value)


def test_another_scorer_is_refused(folder, base):
    for targets, rank in ((ALL_TARGETS, 2), (("query", "value"), RANK), (ALL_TARGETS[:-1], RANK)):
        assert_refused(folder, base.scorer(targets, rank))


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_missing_files_are_named(name, folder, scorer):
    (folder / name).unlink()
    with pytest.raises(RunError, match=f"holds no {name}"):
        load_adapter(folder, scorer)
    assert_refused(folder, scorer)
    assert_refused(folder / "absent", scorer)


# --- files that are whole or not there


def test_a_write_that_fails_leaves_the_previous_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "a.txt", "before")

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace", "chmod"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                write_atomically(path, "after")
        assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert write_atomically(path, "뒤".encode()).read_text(encoding="utf-8") == "뒤"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_folder_that_is_a_file_is_an_os_error(trained, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OSError):
        save_adapter(tmp_path / "run", trained, "tiny")
    assert (tmp_path / "run").read_text() == "a file" and len(list(tmp_path.iterdir())) == 1


def test_folders_are_made(trained, tmp_path):
    assert save_adapter(tmp_path / "a" / "b", trained, "tiny") == Path(tmp_path / "a" / "b")
