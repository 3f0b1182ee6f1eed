"""Number format by device, float16 that overflows, quantization when memory is short."""

import json
import re
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from gemma_lora_sentiment import backend, model, precision
from gemma_lora_sentiment.adapter import RunError
from gemma_lora_sentiment.backend import ModelError, choose_dtype, without_tensorflow
from gemma_lora_sentiment.classifier import GemmaLoraClassifier
from gemma_lora_sentiment.cli import _benchmarks, app
from gemma_lora_sentiment.memory import memory_estimate
from gemma_lora_sentiment.model import keras_nlp, load_base, lora_targets, release_bases, tiny_gemma
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
    with without_tensorflow():
        backbone = keras_nlp.models.Backbone.from_preset(str(folder), dtype="float32")
        (variable,) = [v for v in backbone.variables if v.path == "decoder_block_0/ffw_linear/kernel"]
        variable.assign(np.array(variable.value) * 40_000)
        backbone.save_to_preset(str(folder))
    release_bases()
    return str(folder)


@pytest.fixture
def t4(monkeypatch):
    """`choose_dtype` says what it says on a T4; what is computed is computed on the CPU."""

    def on_a_t4(dtype="auto", *_):
        return choose_dtype(dtype, "gpu", 7.5)

    for room in (backend, model, precision):
        monkeypatch.setattr(room, "choose_dtype", on_a_t4)
    monkeypatch.setattr(precision, "device_bytes", lambda: None)
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
    assert overflows(load_base(large, "float16", "int8"), rows)  # int8 is multiplied in float16 too
    assert not overflows(load_base(tiny, "float16", "int8"), rows)


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
    monkeypatch.setattr(precision, "device_bytes", lambda: 1_000_000)
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
    return load_base(preset).arguments


def test_a_planned_base_has_the_real_one_s_bytes(tiny):
    for dtype in ("float32", "float16"):
        planned, base = planned_base(config_of(tiny), dtype), load_base(tiny, dtype)
        assert (planned.nbytes, planned.parameter_count) == (base.nbytes, base.parameter_count)
        assert memory_estimate(planned, 4) == memory_estimate(base, 4)
    for quantization in ("int8", "int4"):
        planned, base = planned_base(config_of(tiny), "float32", quantization), load_base(tiny, "float32", quantization)
        assert planned.nbytes <= base.nbytes < 1.3 * planned.nbytes  # the scales weigh more where kernels are tiny


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma4"])
def test_a_planned_base_of_every_family(family, tmp_path):
    base = load_base(tiny_gemma(tmp_path, family))
    planned = planned_base(base.arguments, "float32", family=base.config.family)
    assert (planned.nbytes, planned.parameter_count) == (base.nbytes, base.parameter_count)
    assert memory_estimate(planned, 4) == memory_estimate(base, 4) and planned.config == base.config


def test_auto_quantization_is_the_first_that_fits(tiny):
    def needed(how):
        return memory_estimate(planned_base(config_of(tiny), "float32", how), 8, length=256)["total"]

    with pytest.raises(ModelError, match="even in int4"):  # enough for LoRA on two layers, not for LoRA on all
        choose_quantization(tiny, "float32", int(needed(None) / 0.9) + 2, target_layers="all")
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


# --- from a shell ---------------------------------------------------------------------------------------------------

OPTIONS = ["--rank", "2", "--batch-size", "4", "--epochs", "1"]


def needed(config, how, target_layers=("query", "value"), **needs):
    """Bytes of a step, as `choose_quantization` estimates them, in float32."""
    planned = planned_base(config, "float32", how)
    targets = lora_targets(planned.config) if target_layers == "all" else target_layers
    return memory_estimate(planned, targets=targets, **needs)["total"]


@pytest.fixture
def memory(tiny, monkeypatch):
    """Gives the device the memory at which this quantization is chosen; "unknown": it reports none."""

    def give(how, **needs):
        needs = needs or dict(rank=2, batch_size=4, length=256, target_layers="all")  # of mini_ko's recipe
        limit = None if how == "unknown" else int(needed(config_of(tiny), how, **needs) / 0.9) + 2
        monkeypatch.setattr(precision, "device_bytes", lambda: limit)

    return give


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.tsv"
    lines = [f"{i}\t{COMMENTS[i % 8]} {i}\t{LABELS[i % 8]}" for i in range(24)]
    path.write_text("\n".join(["id\tcomment\tlabel", *lines]) + "\n", encoding="utf-8")
    return path


def shell(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def written(folder, name="run.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_a_run_says_what_auto_chose_and_is_repeated_with_it(tiny, rows, memory, tmp_path):
    arguments = ["train", rows, "--preset", tiny, *OPTIONS, "--no-refit", "--quiet"]
    memory("int8")
    shell(*arguments, "--quantization", "auto", "--out", tmp_path / "one")
    run = written(tmp_path / "one")
    assert (run["settings"]["quantization"], run["quantization"]) == ("auto", "int8")
    assert written(tmp_path / "one", "classifier.json")["quantization"] == "int8"

    memory(None)  # a device with more memory: there auto would be none
    shell("train", "--from", tmp_path / "one" / "run.json", "--quiet", "--out", tmp_path / "two")
    assert written(tmp_path / "two")["quantization"] == "int8"
    for name in ("adapter_model.safetensors", "predictions.tsv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    repeat = ["train", "--from", tmp_path / "one" / "run.json", "--quiet", "--quantization"]
    for option, out in (("none", "three"), ("auto", "four")):  # an option wins
        shell(*repeat, option, "--out", tmp_path / out)
        assert written(tmp_path / out)["quantization"] is None
    answers = tmp_path / "answers.tsv"
    shell("predict", tmp_path / "one", rows, "--out", answers, "--quiet")
    assert len(answers.read_text(encoding="utf-8").splitlines()) == 25


def test_a_killed_run_goes_on_with_the_quantization_it_began_with(tiny, rows, memory, tmp_path, monkeypatch):
    arguments = ["train", rows, "--preset", tiny, *OPTIONS, "--no-refit", "--quiet", "--quantization", "auto"]
    memory("int8")
    with monkeypatch.context() as patch:
        patch.setattr("gemma_lora_sentiment.judge.judge_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--out", tmp_path / "run")])
    assert (tmp_path / "run" / "checkpoint" / "plan.json").is_file()
    memory(None)
    line = shell(*arguments, "--resume", "--out", tmp_path / "run", status=2).stderr
    assert "is of another run" in line
    memory("int8")
    shell(*arguments, "--resume", "--out", tmp_path / "run")
    assert written(tmp_path / "run")["quantization"] == "int8"


def test_cross_validation_says_what_was_chosen(tiny, rows, memory, tmp_path):
    memory("int8")
    arguments = ["cross-validate", rows, "--preset", tiny, *OPTIONS, "--folds", "2", "--quiet"]
    shell(*arguments, "--quantization", "auto", "--out", tmp_path / "cv")
    assert written(tmp_path / "cv", "cv.json")["quantization"] == "int8"


def test_cross_validation_with_an_overflow_loads_float16_once(large, t4, rows, tmp_path, monkeypatch):
    loaded = []
    for room in (precision, model):
        monkeypatch.setattr(room, "load_base", lambda *a, **k: loaded.append(load_base(*a, **k)) or loaded[-1])
    arguments = ["cross-validate", rows, "--preset", large, *OPTIONS, "--folds", "2", "--quiet"]
    shell(*arguments, "--out", tmp_path / "cv")
    assert written(tmp_path / "cv", "cv.json")["dtype"] == "float32"
    formats = [base.dtype for base in loaded]
    assert "float16" in formats and "float16" not in formats[formats.index("float32") :]


def info_line(*arguments):
    return re.search(r"^quantization: (.*)$", shell("info", *arguments).stdout, re.MULTILINE)[1]


def test_info_says_which_quantization_and_why(tiny, memory):
    recipe = GemmaLoraClassifier(tiny).memory_needs()
    memory("unknown")
    assert info_line("--preset", tiny) == (
        "none (the default); auto would choose none (the device does not say how much memory it has)"
    )
    memory("int8", **recipe)
    assert re.fullmatch(
        r"none \(the default\); auto would choose int8 \(estimated at [\d.]+ GB of the device's [\d.]+ GB\)",
        info_line("--preset", tiny),
    )
    assert info_line("--preset", tiny, "--quantization", "auto").startswith("int8 (estimated at ")
    assert info_line("--preset", tiny, "--quantization", "int4") == "int4 (as asked for)"
    precision.device_bytes = lambda: 1000  # the fixture puts the function back
    assert "auto finds none that fits" in info_line("--preset", tiny)
    assert "even in int4" in shell("info", "--preset", tiny, "--quantization", "auto", status=2).stderr


def test_info_on_a_t4(tiny, t4):
    text = shell("info", "--preset", tiny).stdout
    assert re.search(r"^dtype: float16 \(a card of compute capability 7.5 .*overflows\)$", text, re.MULTILINE)


def test_quickstart_takes_the_option(tmp_path):
    line = shell("quickstart", "--quantization", "int3", "--out", tmp_path / "run", status=2).stderr
    assert line == "error: --quantization 'int3' is not one of auto, none, int8, int4. Choose one of these.\n"


def test_benchmark_resolves_auto(monkeypatch):
    shapes = _benchmarks("shapes")
    settings = shapes.BenchmarkSettings(shape="tiny", dtype="float32", quantization="auto")
    for how in (None, "int8"):
        limit = needed(shapes.SHAPES["tiny"], how, rank=4, batch_size=16, length=85)
        monkeypatch.setattr(precision, "device_bytes", lambda limit=limit: int(limit / 0.9) + 2)
        assert shapes.base_of(settings).quantization == how
    assert shapes.base_of(replace(settings, quantization=None)).quantization is None
