"""Number format by device, float16 that overflows, quantization when memory is short."""

import shutil
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gemma_lora_sentiment import model, precision
from gemma_lora_sentiment.adapter import RunError
from gemma_lora_sentiment.classifier import GemmaLoraClassifier
from gemma_lora_sentiment.memory import memory_estimate
from gemma_lora_sentiment.model import (
    ModelError,
    choose_dtype,
    load_base,
    release_bases,
    tiny_gemma,
    without_tensorflow,
)
from gemma_lora_sentiment.precision import choose_quantization, fall_back, overflows, planned_base

COMMENTS = ["맛있어요 최고예요", "친절해요 또 갈게요", "맛이 없어요 별로예요", "불친절해요 실망했어요"] * 2
LABELS = [1, 1, 0, 0] * 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("safe"))


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory):
    """The same with one matrix so large that float16 has no number for what leaves it."""
    folder = tmp_path_factory.mktemp("large") / "preset"
    shutil.copytree(tiny, folder)
    base = load_base(str(folder), "float32")
    (variable,) = [v for v in base.backbone.variables if v.path == "decoder_block_0/ffw_linear/kernel"]
    variable.assign(np.array(variable.value) * 40_000)
    with without_tensorflow():
        base.backbone.save_to_preset(str(folder))
    release_bases()
    return str(folder)


@pytest.fixture
def t4(monkeypatch):
    """`choose_dtype` says what it says on a T4; what is computed is computed on the CPU."""

    def on_a_t4(dtype="auto", *_):
        return choose_dtype(dtype, "gpu", 7.5)

    for room in (model, precision):
        monkeypatch.setattr(room, "choose_dtype", on_a_t4)
    monkeypatch.setattr(precision, "device_memory", lambda: None)
    monkeypatch.setattr(precision, "_OVERFLOWED", {})


@pytest.mark.parametrize("devices, dtype", [
    (["7.5"], "float16"), (["7.0"], "float16"), (["8.0"], "bfloat16"), (["9.0"], "bfloat16"), (["10.0"], "bfloat16"),
    (["9.0", "7.5"], "float16"), (["gfx90a"], "bfloat16"), ([None], "bfloat16"),
])  # fmt: skip
def test_auto_dtype_of_a_gpu_goes_by_its_compute_capability(devices, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=number) for number in devices])
    chosen, why = choose_dtype()
    assert chosen == dtype and ("float16 overflows" in why) == (dtype == "float16")
    assert choose_dtype("bfloat16")[0] == "bfloat16"


def test_only_float16_overflows(tiny, large):
    rows = [[2, 10, 20, 30, 40], [2, 11, 21, 31, 41, 51, 61]]
    assert overflows(load_base(large, "float16"), rows)
    assert not overflows(load_base(large, "bfloat16"), rows) and not overflows(load_base(large, "float32"), rows)
    assert not overflows(load_base(tiny, "float16"), rows)


def test_float16_that_is_safe_is_kept(tiny, t4):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf = GemmaLoraClassifier(tiny, epochs=1, batch_size=4).fit(COMMENTS, LABELS)
    assert clf.dtype_ == "float16" and np.isfinite(clf.predict_proba(COMMENTS)).all()
    assert all(array.dtype == np.float32 for array in clf.adapter_.arrays.values())


def test_overflow_falls_back_to_the_safe_format_s_numbers(large, t4):
    settings = dict(epochs=2, batch_size=4, learning_rate=0.01)
    with pytest.warns(UserWarning, match="overflows in float16 on the first batch. Going on in float32") as caught:
        clf = GemmaLoraClassifier(large, **settings).fit(COMMENTS, LABELS)
    assert len([w for w in caught if "overflows" in str(w.message)]) == 1
    safe = GemmaLoraClassifier(large, dtype="float32", **settings).fit(COMMENTS, LABELS)
    assert clf.dtype_ == "float32" and np.isfinite(clf.history_.loss).all()
    np.testing.assert_array_equal(clf.predict_proba(COMMENTS), safe.predict_proba(COMMENTS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert GemmaLoraClassifier(large, epochs=0).fit(COMMENTS, LABELS).dtype_ == "float32"


def test_without_room_for_float32_it_is_bfloat16(large, t4, monkeypatch):
    monkeypatch.setattr(precision, "device_memory", lambda: 1_000_000)
    with pytest.warns(UserWarning, match="Going on in bfloat16"):
        assert fall_back(large, needed=600_000).dtype == "bfloat16"


def test_generation_before_fit_is_checked_too(large, t4):
    with pytest.warns(UserWarning, match="overflows in float16"):
        GemmaLoraClassifier(large).generate(COMMENTS[0], max_new_tokens=4)


def test_float16_asked_for_is_an_error_that_names_the_remedy(large):
    with pytest.raises(RunError, match="not finite.*dtype='float32'"):
        GemmaLoraClassifier(large, dtype="float16", epochs=1, batch_size=4).fit(COMMENTS, LABELS)
    zero_shot = GemmaLoraClassifier(large, dtype="float16", epochs=0).fit(COMMENTS, LABELS)
    with pytest.raises(RunError, match="not finite in float16. Fit again with dtype='bfloat16'"):
        zero_shot.predict(COMMENTS)


def config_of(preset):
    config = load_base(preset).backbone.get_config()
    return {name: value for name, value in config.items() if name not in ("name", "trainable", "dtype")}


def test_a_planned_base_has_the_real_one_s_bytes(tiny):
    for dtype in ("float32", "float16"):
        planned, base = planned_base(config_of(tiny), dtype), load_base(tiny, dtype)
        assert (planned.nbytes, planned.parameter_count) == (base.nbytes, base.parameter_count)
        assert memory_estimate(planned, 4) == memory_estimate(base, 4)
    for quantization in ("int8", "int4"):
        planned, base = planned_base(config_of(tiny), "float32", quantization), load_base(tiny, "float32", quantization)
        assert planned.nbytes <= base.nbytes < 1.3 * planned.nbytes  # the scales weigh more where kernels are tiny


def test_auto_quantization_is_the_first_that_fits(tiny):
    def needed(how):
        return memory_estimate(planned_base(config_of(tiny), "float32", how), 8, length=256)["total"]

    for how in (None, "int8", "int4"):
        assert choose_quantization(tiny, "float32", int(needed(how) / 0.9) + 2)[0] == how
    with pytest.raises(ModelError, match="even in int4"):
        choose_quantization(tiny, "float32", needed("int4"))
    assert choose_quantization(tiny, "float32")[0] is None, "a CPU does not say what it has"


def test_quantization_auto_is_resolved_at_fit_and_saved(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "choose_quantization", lambda *_, **__: ("int8", "for the test"))
    clf = GemmaLoraClassifier(tiny, quantization="auto", epochs=1, batch_size=4).fit(COMMENTS, LABELS)
    assert (clf.quantization, clf.quantization_) == ("auto", "int8")
    clf.save(tmp_path / "run")
    monkeypatch.undo()
    loaded = GemmaLoraClassifier.load(tmp_path / "run")
    assert loaded.quantization_ == "int8"
    np.testing.assert_array_equal(loaded.predict_proba(COMMENTS), clf.predict_proba(COMMENTS))
