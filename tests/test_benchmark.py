"""The folder benchmarks/: what a page does not show. Processes that fail or are slow, limits, odd tables, the wheel."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma_lora_sentiment.classifier import GemmaLoraClassifier
from gemma_lora_sentiment.cli import _benchmarks, app
from gemma_lora_sentiment.data import DataError, duplicate_groups, fingerprint
from gemma_lora_sentiment.gemma import hidden_at
from gemma_lora_sentiment.model import GEMMA_2B_CONFIG, jax, load_base, lora_parameter_count, tiny_gemma

ROOT = Path(__file__).resolve().parents[1]
# By the shell's own door, so that what is patched here is what the shell calls.
of_ours, peers, peft_loop, processes = map(_benchmarks, ("ours", "peers", "peft_loop", "processes"))
random_weights, real, shapes, tables = map(_benchmarks, ("random_weights", "real_rows", "shapes", "tables"))
BenchmarkSettings, benchmark_rows, run_benchmark = (
    shapes.BenchmarkSettings, shapes.benchmark_rows, random_weights.run_benchmark
)  # fmt: skip
RealSettings, rows_to_measure = real.RealSettings, real.rows_to_measure

TINY = BenchmarkSettings(
    shape="tiny", rows=12, predict_rows=5, score_rows=20, batch_size=4, epochs=3, length=96, time_limit=600
)


# --- one whole run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ours, the tutorial's recipe and PEFT on the tiny shape: result, lines printed, folder."""
    out, lines = tmp_path_factory.mktemp("benchmark") / "new" / "out", []
    result = run_benchmark(TINY, ["ours", "shell", "classifier", "tutorial", "peft"], out, say=lines.append)
    return result, "\n".join(lines).splitlines(), out


def test_every_system_is_measured_or_left_out_by_name(run):
    result, lines, _ = run
    assert set(result["systems"]) | set(result["left_out"]) == {"ours", "shell", "classifier", "tutorial", "peft"}
    assert "left out: classifier (it needs the tokenizer of mini_ko)" in lines
    if "peft" in result["left_out"]:
        assert any(line.startswith("left out: peft (") and line.endswith(" not installed)") for line in lines)
    for system, runs in result["systems"].items():
        for kind, record in runs.items():
            assert "failed" not in record and "ended" not in record, (system, kind, record)
    assert set(result["systems"]["ours"]) == {"cold", "warm"} and set(result["systems"]["tutorial"]) == {"cold"}


def test_what_is_measured_is_positive_and_in_order(run):
    table = tables.benchmark_table(run[0])
    for system in table.index:
        row = table.loc[system]
        assert 0 < row["epoch"] < row["first_epoch"] < row["fit_cold"] < row["process_cold"], row
        assert 0.05 < row["peak_gb"] < 20 and row["utilisation"] > 0
    ours = run[0]["systems"]["ours"]
    assert len(ours["cold"]["epochs"]) == 6 and len(ours["warm"]["epochs"]) == 3  # the cold process fits twice
    assert ours["cold"]["refit_seconds"] < ours["cold"]["fit_seconds"], "a second fit must not compile again"
    assert ours["cold"]["programs"] >= 1 and ours["cold"]["compile_seconds"] < ours["cold"]["fit_seconds"]
    assert {"fit_warm", "process_warm", "predict", "rows_per_second"} <= set(table.loc["ours"].dropna().index)
    assert np.isnan(table.loc["tutorial", "predict"])


def test_files_hold_what_was_measured(run):
    result, lines, out = run
    assert json.loads((out / "benchmark.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    table = (out / "benchmark.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in table[1:]] == [s for s in result["systems"] if s != "shell"]
    assert sorted(path.name for path in out.iterdir()) == ["benchmark.json", "benchmark.tsv"]
    rows = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 and len(rows) == 2 + len(table) - 1
    assert any(line.startswith("tutorial / ours: an epoch ") for line in lines)


def test_shell_is_timed(run):
    figures = tables.figures_table(run[0]).set_index("figure").value
    assert 0 < figures["the Python interpreter alone"] <= figures["gemma-lora-sentiment --help"] < 30
    assert "gemma-lora-sentiment quickstart, cold" not in figures  # it is no part of the tiny shape


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(benchmark_rows(TINY)))
    return tmp_path


def environment(folder):
    return processes.process_environment(folder / "cache")


def test_a_process_that_takes_too_long_is_ended(folder, monkeypatch):
    monkeypatch.setattr(processes, "_GRACE", 0.0)
    settings = replace(TINY, time_limit=0.5)
    record = processes.run_process(folder, random_weights._spec_of("ours", settings, "cold"), environment(folder))
    assert record["ended"] is True and "failed" not in record
    result = {"settings": asdict(settings), "rows": {"tokens": 400}, "systems": {"ours": {"cold": record}}}
    assert tables.benchmark_table(result).loc["ours", "note"] == "ended at the time limit"
    assert tables.comparisons(result) == []


def test_a_process_that_fails_says_why(folder):
    record = processes.run_process(folder, {"task": "nonsense", "settings": asdict(TINY)}, environment(folder))
    assert record["failed"].startswith("KeyError") and "nonsense" in record["failed"]


def test_a_process_that_dies_says_why(folder, monkeypatch):
    monkeypatch.chdir(folder)
    broken = {**environment(folder), "PYTHONPATH": str(folder)}
    (folder / "gemma_lora_sentiment").mkdir()
    (folder / "gemma_lora_sentiment" / "__init__.py").write_text("raise SystemExit('no such thing')")
    record = processes.run_process(folder, {"task": "ours", "settings": asdict(TINY)}, broken)
    assert record == {"failed": "exit status 1: no such thing"}


def test_a_system_that_fails_does_not_stop_the_next(monkeypatch, tmp_path):
    def run_process(folder, spec, environment, module="random_weights"):
        if spec["task"] == "device":
            return {"flops": 1e12, "platform": "cpu", "kind": "x", "cpus": 1, "matmul_size": 1, "matmul_dtype": "f"}
        return {"failed": "MemoryError: full"} if spec["task"] == "ours" else {"epochs": [1.0, 0.5], "finished": True}

    monkeypatch.setattr(random_weights, "run_process", run_process)
    lines = []
    result = run_benchmark(TINY, ["ours", "tutorial"], tmp_path / "out", say=lines.append)
    assert list(result["systems"]) == ["ours", "tutorial"] and list(result["systems"]["ours"]) == ["cold"]
    assert any("failed: MemoryError: full" in line for line in lines)
    monkeypatch.setattr(random_weights, "run_benchmark", lambda *args, **kwargs: result)
    assert CliRunner().invoke(app, ["benchmark", "--shape", "tiny"]).exit_code == 1


def test_what_is_finished_is_written_at_once(monkeypatch, tmp_path):
    def run_process(folder, spec, environment, module="random_weights"):
        if spec["task"] == "tutorial":
            raise KeyboardInterrupt
        of_device = {"flops": 1e12, "platform": "cpu", "kind": "x", "cpus": 1, "matmul_size": 1, "matmul_dtype": "f"}
        return {**of_device, "epochs": [1.0, 0.5], "fit_seconds": 2.0, "finished": True}

    monkeypatch.setattr(random_weights, "run_process", run_process)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(TINY, ["ours", "tutorial"], tmp_path, say=lambda text: None)
    assert list(json.loads((tmp_path / "benchmark.json").read_text())["systems"]) == ["ours"]
    assert "ours\t0.5\t" in (tmp_path / "benchmark.tsv").read_text()


def test_a_sweep_is_drawn(monkeypatch, tmp_path):
    points = [{"size": n, "epoch_seconds": 1.0, "first_epoch_seconds": 2.0, "rows": 8 * n, "peak_bytes": 10**9}
              for n in (1, 4)]  # fmt: skip

    def run_process(folder, spec, environment, module="random_weights"):
        of_device = {"flops": 1e12, "platform": "cpu", "kind": "x", "cpus": 1, "matmul_size": 1, "matmul_dtype": "f"}
        return {"points": points} if spec["task"] == "sweep" else of_device

    monkeypatch.setattr(random_weights, "run_process", run_process)
    lines = []
    run_benchmark(TINY, [], tmp_path, sweeps={"batch": (4, 1)}, say=lines.append)
    assert "batch 4: 31.2 ms a row, first epoch 2 s, peak 1 GB" in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "figures"]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["cost_against_size.png"]


def test_no_process_sees_the_compile_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    found = processes.process_environment(tmp_path / "cache", 0.113)
    assert "JAX_COMPILATION_CACHE_DIR" not in found and found["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.1130"
    assert found["GEMMA_LORA_SENTIMENT_CACHE"] == str(tmp_path / "cache") and found["KERAS_BACKEND"] == "jax"


@pytest.mark.parametrize("name", ["random_weights", "real_rows"])
def test_importing_the_folder_imports_nothing_heavy(name):
    heavy = "{'jax', 'keras', 'pandas', 'torch', 'sklearn'}"
    code = f"import sys, benchmarks.{name}; print({heavy} & set(sys.modules))"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_a_cut_line_is_left_out_and_the_clock_is_that_of_the_asking(tmp_path):
    log = processes.ProcessLog(str(tmp_path / "log"), time.time() - 10, 15.0)
    log(import_seconds=1.5, epochs=[0.5])
    log(epochs=[0.25])
    with open(log.path, "a", encoding="utf-8") as file:
        file.write('{"epochs": [0.')  # ended in the middle
    assert processes.read_log(Path(log.path)) == {"import_seconds": 1.5, "epochs": [0.5, 0.25]}
    assert log.is_over(6.0) and not log.is_over(2.0)


def test_memory_is_the_highest():
    block = np.ones(30_000_000)  # 240 MB
    assert processes.resident_peak_bytes() >= block.nbytes and processes.device_peak_bytes() > 1e8


def test_a_task_wants_the_path_of_its_description(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-c"])
    for run_task in (random_weights.run_child, real.run_child, lambda: processes.run_task({})):
        with pytest.raises(IndexError):
            run_task()


# --- stopping in time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "expected"), [(0.0, {"partial": 1}), (1e6, {"epochs": 2})])
def test_fit_is_stopped_in_the_middle_of_an_epoch(limit, expected, tmp_path):
    import keras

    log = processes.ProcessLog(str(tmp_path / "log"), time.time(), limit)
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile(loss="mse", optimizer="sgd")
    x = np.zeros((40, 2), np.float32)
    model.fit(x, x[:, :1], batch_size=1, epochs=2, verbose=0, callbacks=[peers._stop_in_time(log, 40)])
    record = processes.read_log(tmp_path / "log")
    assert set(record) == set(expected)
    if "partial" in expected:  # callbacks run beside the steps, so a few more may be made
        assert 1 <= record["partial"]["steps"] < 40 and record["partial"]["of"] == 40
    else:
        assert len(record["epochs"]) == 2


@pytest.mark.parametrize(
    ("record", "epoch", "fit", "extrapolated"),
    [
        ({"epochs": [5.0, 1.0, 3.0], "fit_seconds": 9.5}, 2.0, 9.5, None),
        ({"epochs": [5.0, 1.0], "fit_seconds": 6.5}, 1.0, 7.5, "extrapolated from 2 of 3 epochs"),
        ({"epochs": [5.0, 1.0]}, 1.0, 7.0, "extrapolated from 2 of 3 epochs"),  # it was ended from outside
        ({"partial": {"seconds": 2.0, "steps": 5, "of": 10}}, 4.0, 12.0, "extrapolated from 0.5 of 3 epochs"),
        ({"epochs": [5.0, 1.0, 3.0, 0.1, 0.1, 0.1], "fit_seconds": 9.5}, 2.0, 9.5, None),  # ours fits twice
        ({}, None, None, None),
    ],
)
def test_summary(record, epoch, fit, extrapolated):
    summary = tables.summarize(record, 3)
    assert (summary["epoch"], summary["fit"], summary["extrapolated"]) == (epoch, fit, extrapolated)


def test_an_epoch_that_was_cut_counts_by_its_steps():
    cut = tables.summarize({"epochs": [12.0, 2.0, 2.2], "partial": {"seconds": 1.05, "steps": 10, "of": 20}}, 5)
    assert cut["fit"] == pytest.approx(12 + 2 + 2.2 + 1.05 + 1.5 * 2.1)
    assert cut["extrapolated"] == "extrapolated from 3.5 of 5 epochs" and cut["process"] is None
    assert tables.summarize({"failed": "out of memory"}, 5)["fit"] is None


def test_a_process_that_was_cut_is_extrapolated_as_a_whole():
    summary = tables.summarize({"epochs": [4.0, 2.0], "fit_seconds": 6.2, "process_seconds": 10.0}, 5)
    assert summary["process"] == 16.0 and summary["fit"] == pytest.approx(12.2) and summary["first_epoch"] == 4.0


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 100, 300, 3_000])
def test_lengths_are_those_of_the_tutorial(n):
    lengths = shapes.draw_lengths(n, seed=3)
    assert len(lengths) == n and lengths.min() >= 4 and lengths.max() <= 85
    if n >= 100:
        assert abs(lengths.mean() - 37.6) < 0.2
    assert not n > 2 or lengths.tolist() != sorted(lengths)
    assert sorted(lengths) == sorted(shapes.draw_lengths(n, seed=1)), "every seed costs the same"
    if n >= 300:
        assert lengths.max() == 85


def test_rows_of_a_seed_are_the_same_and_of_another_are_not():
    assert benchmark_rows(TINY) == benchmark_rows(TINY) != benchmark_rows(replace(TINY, seed=1))


def test_rows_are_of_their_lengths_and_shape():
    rows = benchmark_rows(TINY)
    assert [len(prompt) + 2 for prompt in rows["train"]] == shapes.draw_lengths(TINY.rows).tolist()
    assert max(map(max, rows["score"])) < 300 and set(rows["labels"]) <= {0, 1}
    of_sample = benchmark_rows(replace(TINY, file="sample_test", shape="mini_ko"))["train"]
    assert len(of_sample) == TINY.rows and max(map(max, of_sample)) >= 300
    assert max(map(max, benchmark_rows(replace(TINY, file="sample_test"))["train"])) < 300


def test_rows_of_a_file(tmp_path):
    (tmp_path / "rows.txt").write_text("맛있어요\n별로예요 다시는 안 가요\n", encoding="utf-8")
    rows = benchmark_rows(replace(TINY, file=str(tmp_path / "rows.txt")))
    assert len(rows["train"]) == 12 and rows["train"][0] == rows["train"][2] != rows["train"][1]
    assert len(rows["train"][1]) > len(rows["train"][0]) and max(map(max, rows["train"])) < 300
    with pytest.raises(DataError, match="nothing.txt"):
        benchmark_rows(replace(TINY, file=str(tmp_path / "nothing.txt")))


# --- models ---------------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_models():
    assert shapes.SHAPES["gemma_2b"] == GEMMA_2B_CONFIG
    bundled = json.loads((files("gemma_lora_sentiment") / "bases/mini_ko/config.json").read_text())["config"]
    assert shapes.SHAPES["mini_ko"] == {name: bundled[name] for name in shapes.SHAPES["mini_ko"]}
    # all but embedding and norms
    assert abs(shapes.block_parameters(shapes.SHAPES["gemma_2b"]) - (2_506_172_416 - 256_000 * 2048)) < 1e5


def test_random_base_has_the_parameters_of_its_shape():
    base, half = shapes.random_base("tiny", "float32"), shapes.random_base("tiny", "bfloat16")
    assert base.parameter_count == lora_parameter_count(shapes.SHAPES["tiny"])[0]
    assert {str(array.dtype) for _, array in half.weights()} == {"bfloat16"} and half.nbytes * 2 == base.nbytes


def test_random_base_works_and_leaves_random_state_alone():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    base = shapes.random_base("tiny", "float32")
    assert random.random() == expected
    ids = np.arange(20, 36, dtype=np.int32).reshape(2, 8)
    batch = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    program = jax.jit(hidden_at, static_argnums=3)
    hidden = np.asarray(program(base.arrays, [{} for _ in base.config.groups], batch, base.config))
    assert np.isfinite(hidden).all() and 0.1 < hidden.std() < 10
    again = shapes.random_base("tiny", "float32")
    for (path, one), (_, other) in zip(base.weights(), again.weights(), strict=True):
        np.testing.assert_array_equal(one, other, path)


def test_quantized_random_base_is_smaller():
    base = shapes.random_base("tiny", "float32", "int8")
    kernels = [part for group in base.arrays["groups"] for part in group.values() if isinstance(part, dict)]
    of_blocks = shapes.block_parameters(shapes.SHAPES["tiny"])
    assert sum(part["q"].size for part in kernels) == of_blocks, "each kernel of each block"
    assert {str(part["q"].dtype) for part in kernels} == {"int8"}
    assert base.nbytes < shapes.random_base("tiny", "float32").nbytes


def test_block_parameters_are_all_but_embedding_and_norms():
    found = shapes.random_base("tiny").weights()
    kernels = [array for path, array in found if array.ndim > 1 and not path.endswith("embeddings")]
    assert shapes.block_parameters(shapes.SHAPES["tiny"]) == sum(array.size for array in kernels)


def test_sweep_leaves_out_what_would_not_end_in_time(tmp_path):
    log = processes.ProcessLog(str(tmp_path / "log"), time.time(), 600)
    spec = {"settings": asdict(TINY), "kind": "batch", "sizes": [1, 2, 1_000_000]}
    of_ours.run_sweep(spec, {}, log)
    record = processes.read_log(tmp_path / "log")
    assert [(point["size"], point["rows"], point["tokens"]) for point in record["points"]] == [
        (1, 8, 512), (2, 16, 1024)
    ]  # fmt: skip
    assert all(0 < point["epoch_seconds"] < point["first_epoch_seconds"] for point in record["points"])
    assert record["points_left_out"] == [1_000_000]
    lines = tables.describe_sweep("batch", record)
    assert lines[0].startswith("batch 1: ") and lines[-1] == "batch 1000000: left out, it would not end in time"


def test_padding_and_sorting_of_peft():
    assert peft_loop.padded([[1, 2], [3]]).tolist() == [[1, 2], [3, 0]]
    assert peft_loop.padded([[1, 2], [3]], "left", 9).tolist() == [[1, 2], [9, 3]]
    assert peft_loop.sorted_batches([[1, 2], [3], [4, 5, 6]], 2) == [[1, 0], [2]]


def test_peft_padded_on_the_left_scores_as_one_by_one():
    torch = pytest.importorskip("torch", reason="torch is absent: install the [hf] extra")
    pytest.importorskip("peft", reason="peft is absent: install the [hf] extra")
    model = peers._peft_model(torch, TINY, "float32", "cpu")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    q_and_v = 32 * 4 + 4 * 32 + 32 * 4 + 4 * 16  # A and B of query (2 heads of 16) and of value (1 head)
    assert trainable == 2 * q_and_v
    prompts = benchmark_rows(TINY)["predict"]
    together = peft_loop.score_peft(torch, model, prompts, [(10,), (11,)])
    alone = np.concatenate([peft_loop.score_peft(torch, model, [prompt], [(10,), (11,)]) for prompt in prompts])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    assert np.abs(together).max() > 1e-3


def test_peft_is_imported_and_trained(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is absent: install the [hf] extra")
    pytest.importorskip("peft", reason="peft is absent: install the [hf] extra")
    device, dtype = peft_loop.torch_device(torch)
    model = peers._peft_model(torch, TINY, dtype, device)
    log = processes.ProcessLog(str(tmp_path / "log"), time.time(), 60.0)
    peft_loop.import_peft({}, {}, log)
    how = dict(epochs=2, batch_size=1, learning_rate=0.1)
    peft_loop.train_peft(torch, model, [[2, 30, 10, 1]], [[-100, -100, 10, 1]], log, **how)
    assert len(processes.read_log(tmp_path / "log")["epochs"]) == 2
    assert peft_loop.score_peft(torch, model, [[2, 30], [2, 31, 32]], [(10,), (11,)]).shape == (2, 2)
    with pytest.raises(OSError):
        real.peft_model(torch, "nowhere", "words", ["q_proj"], 2, 2)


# --- tables ---------------------------------------------------------------------------------------------------------

RESULT = {
    "settings": asdict(replace(TINY, shape="gemma_2b", epochs=5)),
    "rows": {"n": 300, "tokens": 11_265, "mean": 37.6, "longest": 85},
    "device": {"flops": 790e12},
    "left_out": {},
    "systems": {
        "ours": {
            "cold": {
                "epochs": [12.0, 0.25, 0.3, 0.2, 0.25], "fit_seconds": 13.5, "process_seconds": 30.0, "batch_size": 16,
                "dtype": "bfloat16", "predict_seconds": 0.05, "score_rows": 3000, "score_seconds": 1.5,
                "peak_bytes": 8_700_000_000, "buckets": [48, 88], "compile_cache": False,
            },
            "warm": {"epochs": [1.0, 0.25, 0.25, 0.25, 0.25], "fit_seconds": 2.5, "process_seconds": 15.0},
        },
        "peft": {
            "cold": {
                "epochs": [14.0, 1.5, 1.5, 1.5, 1.5], "fit_seconds": 20.0, "process_seconds": 40.0, "batch_size": 16,
                "dtype": "bfloat16", "predict_seconds": 0.1, "peak_bytes": 11_300_000_000,
            }
        },
        "cross-validation": {"cold": {"folds": [10.0, 2.0, 2.0], "process_seconds": 20.0}},
    },
    "sweeps": {},
}  # fmt: skip


def test_table_of_a_known_result():
    ours = tables.benchmark_table(RESULT).loc["ours"]
    assert ours["epoch"] == 0.25 and ours["fit_warm"] == 2.5 and ours["rows_per_second"] == 2000
    assert ours["utilisation"] == pytest.approx(4 * 1.98e9 * 11_265 / 790e12 / 0.25, rel=0.01)
    assert ours["note"] == "batch 16, bfloat16; lengths 48/88; no compile cache"
    lines = tables.comparisons(RESULT)
    assert len(lines) == 1 and lines[0].startswith("peft / ours: an epoch 6.00, the fit, cold 1.48, ")
    assert "predict 2.00, peak memory 1.30" in lines[0]
    figures = tables.figures_table(RESULT).set_index("figure").value
    assert figures["10-fold cross-validation, whole process, extrapolated from 3"] == 34.0


def test_a_run_as_a_section_of_a_page():
    result = {**RESULT, "versions": tables.versions_here()}
    result["device"] = dict(flops=1e12, platform="gpu", kind="x", cpus=1, matmul_size=1, matmul_dtype="f")
    text = tables.benchmark_markdown("a machine", result)
    assert text.startswith("### a machine\n") and "FLOP utilisation" in text
    assert "\n- peft / ours: an epoch 6.00" in text
    assert tables.versions_here()["jax"] in text
    assert tables.figures_table(RESULT).columns.tolist() == ["figure", "value", "unit"]
    assert tables.markdown_line(["system", 1.5]) == "| system | 1.5 |"


def test_no_table_is_written_before_a_system_is_measured(tmp_path):
    tables.write_result({"systems": {}}, tables.benchmark_table, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]


def test_figure_of_no_points_and_of_one(tmp_path):
    point = {"size": 16, "epoch_seconds": 1.0, "rows": 128, "peak_bytes": 10**9}
    for number, sweeps in enumerate([{}, {"batch": {"failed": "x"}}, {"batch": {"points": [point]}}]):
        figure = tables.save_size_figure({"sweeps": sweeps}, tmp_path / "a" / f"{number}.png")
        assert len(figure.axes) == 2  # milliseconds, memory
        assert (tmp_path / "a" / f"{number}.png").stat().st_size > 1_000


# --- limits and bad settings ----------------------------------------------------------------------------------------


def smi(monkeypatch, text):
    done = subprocess.CompletedProcess([], 0, stdout=text)
    monkeypatch.setattr(processes.subprocess, "run", lambda *args, **kwargs: done)


def test_memory_limit_is_a_share_of_the_gpu(monkeypatch):
    assert processes.memory_fraction(None) is None
    smi(monkeypatch, "143771\n143771\n")
    assert processes.memory_fraction(15.8) == pytest.approx(15.8e9 / (143771 * 2**20))
    for limit in (0.0, 150.0):
        with pytest.raises(ValueError, match=r"at most 141\.7 \(GB\) here"):
            processes.memory_fraction(limit)


def test_memory_limit_without_a_gpu(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="Leave it out"):
        processes.memory_fraction(15.8)


FAULTS = {
    "shape": (["--shape", "gemma_7b"], "is not one of tiny, mini_ko, gemma_2b"),
    "system": (["--systems", "ours,keras"], "System 'keras' is not one of ours"),
    "sweep": (["--sweep", "ranks"], "Sweep 'ranks' is not one of rows, length, batch"),
    "rows": (["--rows", "1"], "rows=1 must be at least 2"),
    "epochs": (["--epochs", "1"], "epochs=1 must be at least 2"),
    "dtype": (["--dtype", "float8"], "dtype 'float8' is not one of auto"),
    "quantization": (["--quantization", "int2"], "is not one of auto, none, int8, int4"),
    "file": (["--file", "nothing.tsv"], "nothing.tsv"),
    "out": (["--out", __file__], "is a file. Give a folder."),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_option_is_one_line(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, named = FAULTS[fault]
    result = CliRunner().invoke(app, ["benchmark", "--shape", "tiny", *options])
    assert result.exit_code == 2 and result.stdout == "" and not list(tmp_path.iterdir())
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1 and named in result.stderr


def test_help():
    text = CliRunner().invoke(app, ["benchmark", "--help"]).stdout
    assert text.startswith("Usage:") and all(name in text for name in ("--quiet", "--memory-limit", "--sweep"))


def test_every_system_has_a_task():
    specs = {system: random_weights._spec_of(system, TINY, "cold") for system in random_weights.SYSTEMS}
    for spec in specs.values():
        assert spec["task"] in random_weights._TASKS or spec["task"] == "shell"
    assert specs["tutorial-16bit"]["dtype"] == "bfloat16" and specs["tutorial"]["dtype"] == "float32"
    assert (specs["peft-1"]["task"], specs["peft-1"]["batch_size"], specs["peft"]["batch_size"]) == ("peft", 1, 4)
    assert peft_loop.PEFT_NEEDS == ("torch", "transformers", "peft")


@pytest.mark.parametrize(
    ("settings", "systems", "named"),
    [
        (dict(shape="gemma_7b"), None, "is not one of tiny, mini_ko, gemma_2b"),
        ({}, ["tensorflow"], "is not one of ours, peft"),
        (dict(epochs=1), None, "epochs=1 must be at least 2"),
    ],
)
def test_bad_settings_from_python(settings, systems, named):
    with pytest.raises(ValueError, match=named):
        run_benchmark(replace(TINY, **settings), systems)


# --- the folder -----------------------------------------------------------------------------------------------------


def shell(arguments, cwd, package):
    """The shell command of a copy of the package, in a process that was told nothing else."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    code = "import sys; from gemma_lora_sentiment.cli import app; app()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with the package alone, as a wheel unpacks it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "gemma_lora_sentiment").symlink_to(ROOT / "gemma_lora_sentiment", target_is_directory=True)
    return folder


@pytest.mark.parametrize("other", [None, "", "import gemma_lora_sentiment_is_not_there\n"])
def test_without_the_folder_one_line_says_what_to_do(other, wheel, tmp_path):
    if other is not None:  # somebody else's folder of that name is neither taken nor run
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / "benchmarks" / "__init__.py").write_text(other)
    done = shell(["benchmark", "--shape", "tiny", "--out", "out"], tmp_path, wheel)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: The benchmark is not in the wheel") and len(done.stderr.splitlines()) == 1
    assert "git clone https://github.com/gemma-lora-sentiment/gemma_lora_sentiment" in done.stderr
    helped = shell(["--help"], tmp_path, wheel)
    assert helped.returncode == 0 and "  benchmark  " in helped.stdout


def test_the_folder_is_found_where_one_stands(wheel):
    done = shell(["benchmark", "--shape", "nothing"], ROOT, wheel)
    assert done.returncode == 2 and "Shape 'nothing' is not one of tiny" in done.stderr


def test_the_folder_runs_as_a_module(tmp_path):
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-m", "benchmarks", "--shape", "nothing"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Shape 'nothing' is not one of tiny" in done.stderr


def test_no_module_of_a_common_name_is_loaded():
    """Neither here nor in the processes, where another package of the name may be installed."""
    code = "import sys; from gemma_lora_sentiment.cli import _benchmarks; _benchmarks('random_weights')"
    names = {"benchmarks", *(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))}
    code += f"; print({names!r} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_process_takes_the_package_of_its_parent(folder, monkeypatch):
    """Not that of the current folder, which is a clone where the benchmark of a wheel was called."""
    (folder / "gemma_lora_sentiment").mkdir()
    (folder / "gemma_lora_sentiment" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(folder)
    record = processes.run_process(folder, {"task": "sweep", "settings": asdict(TINY)}, environment(folder))
    assert record["failed"].startswith("KeyError")


def test_a_process_takes_no_other_benchmarks(folder, monkeypatch):
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(folder)
    other = {**environment(folder), "PYTHONPATH": os.pathsep.join([str(folder), environment(folder)["PYTHONPATH"]])}
    record = processes.run_process(folder, {"task": "nonsense", "settings": asdict(TINY)}, other)
    assert record["failed"].startswith("KeyError")
    record = processes.run_process(folder, {"task": "nonsense", "settings": asdict(TINY)}, other, "real_rows")
    assert record["failed"].startswith("KeyError")


# --- real rows ------------------------------------------------------------------------------------------------------


def rows_file(folder, n=48, labels=("0", "1"), name="rows.tsv"):
    """A file of `n` different comments whose labels can be learned from one word."""
    lines = [f"{'맛있어요' if i % 2 else '별로예요'} {i} 번째\t{labels[i % len(labels)]}" for i in range(n)]
    path = Path(folder) / name
    path.write_text("comment\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


MEASURED = [name for name in real.REAL_SYSTEMS if name != "mini_ko"]  # the notebook's own run is of that base


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """The systems on a tiny random Gemma, by the shell: the result, what was printed, the folder."""
    folder = tmp_path_factory.mktemp("real")
    arguments = ["--preset", tiny_gemma(folder / "tiny"), "--file", rows_file(folder), "--out", folder / "out"]
    settings = ["--epochs", 2, "--rank", 2, "--label-word", "0=bad", "--label-word", "1=good", "--time-limit", 600]
    settings += ["--systems", ",".join(MEASURED)]
    done = CliRunner().invoke(app, ["benchmark", *map(str, [*arguments, *settings])])
    assert done.exit_code == 0, done.stderr
    return json.loads((folder / "out" / "benchmark.json").read_text(encoding="utf-8")), done.stdout, folder


def test_every_system_of_real_rows_is_measured_or_left_out_by_name(real_run):
    result, printed, _ = real_run
    assert [*result["systems"], *result["left_out"]] == sorted(MEASURED, key=lambda name: name in result["left_out"])
    missing = [name for name in peft_loop.PEFT_NEEDS if find_spec(name) is None]
    expected = {name: f"{', '.join(missing)} not installed" for name in ("peft-words", "peft-head")} if missing else {}
    assert result["left_out"] == expected
    for name, reason in expected.items():
        assert f"left out: {name} ({reason})" in printed
    for system, runs in result["systems"].items():
        assert runs["cold"]["finished"] and "failed" not in runs["cold"], system


def test_real_rows_have_accuracy_beside_seconds(real_run):
    result, printed, folder = real_run
    table = real.real_table(result)
    assert list(table.index) == [name for name in real.REAL_SYSTEMS if name in result["systems"]]
    for system, row in table.iterrows():
        assert 0 <= row.accuracy_low <= row.accuracy <= row.accuracy_high <= 1 and row.log_loss > 0, system
        assert 0 < row.fit_cold < row.process_cold and row.fit_warm > 0 and row.score > 0, system
        metrics = result["systems"][system]["cold"]["metrics"]
        right = np.unpackbits(np.frombuffer(bytes.fromhex(metrics["right"]), np.uint8))
        assert metrics["n"] == 12 and right[:12].mean() == pytest.approx(row.accuracy) and not right[12:].any()
        assert f"| {system} | {row.accuracy:.3f} |" in printed
    assert table.loc["ours", "fit_warm"] < table.loc["ours", "fit_cold"], "a second fit must not compile again"
    assert table.loc["tfidf", "accuracy"] == 1.0, "one word tells the label"
    assert "tfidf / ours: right alone " in printed and len(real.real_comparisons(result)) == len(table) - 1
    written = (folder / "out" / "benchmark.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in written] == ["system", *table.index]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["benchmark.json", "benchmark.tsv"]


def test_real_rows_name_what_they_rest_on(real_run):
    result, _, folder = real_run
    train, test = rows_to_measure(RealSettings(str(folder / "rows.tsv")))
    assert result["rows"] == {
        "train": 36, "test": 12, "labels": ["0", "1"], "in_both": 0,
        "train_fingerprint": fingerprint(train), "test_fingerprint": fingerprint(test),
    }  # fmt: skip
    ours = result["systems"]["ours"]["cold"]
    assert ours["words"] == ["bad", "good"] and ours["recipe"]["lora_rank"] == 2 and ours["recipe"]["epochs"] == 2
    assert ours["fingerprint"] == result["device"]["fingerprint"] and result["versions"]["python"]
    assert result["settings"]["preset"] == str(folder / "tiny")
    text = (folder / "out" / "benchmark.json").read_text(encoding="utf-8")
    assert not any(comment in text for comment in (*train.comment, *test.comment)), "no comment leaves the files"


def test_mini_ko_beside_another_base_is_as_it_comes():
    settings = RealSettings("sample", "gemma3_270m", parameters={"epochs": 7}, dtype="bfloat16", seed=3)
    spec = {"settings": asdict(settings)}
    assert real._classifier("mini_ko", spec, ["0", "1"]).get_params() == GemmaLoraClassifier(seed=3).get_params()
    ours = real._classifier("ours", spec, ["0", "1"])
    assert (ours.preset, ours.epochs, ours.dtype, ours.seed) == ("gemma3_270m", 7, "bfloat16", 3)
    first, second = (real._classifier("frozen", spec, ["0", "1"], again) for again in (False, True))
    assert first.max_length != second.max_length, "or the second fit would find all that it wants remembered"


def test_label_words_are_of_the_labels_of_the_file():
    spec = {"settings": asdict(RealSettings("sample", parameters={"label_words": {"0": "bad", "1": "good"}}))}
    assert real._classifier("ours", spec, [0, 1, 1]).label_words == {0: "bad", 1: "good"}


def test_copies_of_a_comment_lie_on_one_side_and_a_seed_gives_its_rows():
    train, test = rows_to_measure(RealSettings("sample_validation"))
    groups = duplicate_groups([*train.comment, *test.comment])
    assert not set(groups[: len(train)]) & set(groups[len(train) :]) and (len(train), len(test)) == (750, 250)
    assert rows_to_measure(RealSettings("sample_validation"))[1]["id"].tolist() == test["id"].tolist()
    assert rows_to_measure(RealSettings("sample_validation", seed=1))[1]["id"].tolist() != test["id"].tolist()


def test_answers_are_judged_and_kept_as_a_bit_a_row():
    _, test = rows_to_measure(RealSettings("sample_validation"))
    sure = np.where(test.label.to_numpy()[:, None] == np.array(["0", "1"]), 0.9, 0.1)
    sure[:5] = sure[:5, ::-1]  # five mistakes
    numbers = real.judged(test, sure, ["0", "1"])
    assert numbers["accuracy"] == pytest.approx(1 - 5 / len(test)) and numbers["right"][:2] == "07"
    low, high = numbers["intervals"]["accuracy"]
    assert low < numbers["accuracy"] < high
    assert real.right_bits(["0", "1", "1"], np.eye(2)[[0, 0, 1]], ["0", "1"]) == "a0"
    assert real.rows_right("a0", 3).tolist() == [True, False, True]


def test_peft_is_given_layers_and_rows_of_ours():
    base = load_base("mini_ko", "float32")
    assert real.peft_targets(base, ["query", "value"]) == ["q_proj", "v_proj"]
    assert real.peft_targets(base, ["ffw_gating", "ffw_linear"]) == ["down_proj", "gate_proj"]
    train = {"prompts": [[2, 40, 41], [2, 42]], "labels": [1, 0]}
    given = {"parts": {"train": train}, "responses": [[10, 1], [11, 1]], "recipe": {"loss_on": "response"}}
    texts, targets = real.peft_rows(given, "words")
    assert texts == [[2, 40, 41, 11, 1], [2, 42, 10, 1]]
    assert targets == [[-100, -100, -100, 11, 1], [-100, -100, 10, 1]]
    assert real.peft_rows({**given, "recipe": {"loss_on": "text"}}, "words")[1] == texts
    assert real.peft_rows(given, "head") == (train["prompts"], train["labels"])


def test_mini_ko_is_left_out_where_it_is_ours():
    assert real._why_left_out("mini_ko", RealSettings("sample")) == "it is ours here"
    assert real._why_left_out("mini_ko", RealSettings("sample", parameters={"epochs": 2})) is None


def test_rows_of_a_second_file_are_judged(tmp_path):
    file, other = rows_file(tmp_path), rows_file(tmp_path, 20, name="test.tsv")
    train, test = rows_to_measure(RealSettings(str(file), test_file=str(other)))
    assert (len(train), len(test)) == (48, 20) and test.comment[0] == train.comment[0]


def test_a_base_that_cannot_be_written_leaves_peft_out(tmp_path, monkeypatch):
    def run_process(folder, spec, environment, module):
        if spec["task"] == "begin":
            return {"kind": "x", "platform": "cpu", "cpus": 1, "fingerprint": "f"}
        if spec["task"] == "export":
            return {"failed": "ModelError: no export of this base"}
        return {"recipe": {"epochs": 1, "batch_size": 4, "learning_rate": 0.1, "lora_rank": 2}, "dtype": "float32"}

    monkeypatch.setattr(real, "run_process", run_process)
    monkeypatch.setattr(real, "find_spec", lambda name: True)
    lines, settings = [], RealSettings(str(rows_file(tmp_path)))
    result = real.run_real_benchmark(settings, ["peft-head", "ours", "peft-words"], say=lines.append)
    reason = "the base could not be written for transformers: ModelError: no export of this base"
    assert result["left_out"] == {"peft-words": reason, "peft-head": reason} and list(result["systems"]) == ["ours"]
    assert f"left out: peft-words ({reason})" in lines


def test_peft_needs_what_ours_arrived_at(tmp_path, monkeypatch):
    record = {"kind": "x", "platform": "cpu", "cpus": 1, "fingerprint": "f", "ended": True}
    monkeypatch.setattr(real, "run_process", lambda folder, spec, environment, module: record)
    monkeypatch.setattr(real, "find_spec", lambda name: True)
    settings = RealSettings(str(rows_file(tmp_path)))
    result = real.run_real_benchmark(settings, ["ours", "peft-words"], say=lambda text: None)
    assert result["left_out"] == {"peft-words": "ours has not ended, whose settings it takes"}
    assert real.real_table(result).loc["ours", "note"] == "ended at the time limit"
    assert real.real_comparisons(result) == []


def test_comparison_of_real_rows_counts_the_rows_that_differ():
    def record(bits, seconds):
        return {"cold": {"metrics": {"right": bits, "n": 8, "accuracy": 0.5, "log_loss": 1.0, "intervals": {}},
                         "process_seconds": seconds, "fit_seconds": seconds, "refit_seconds": seconds}}  # fmt: skip

    lines = real.real_comparisons({"systems": {"ours": record("f0", 2.0), "peft-words": record("0f", 5.0)}})
    assert lines == ["peft-words / ours: right alone 4 to 4 rows (p 1), process 2.50, fit, cold 2.50, fit, warm 2.50"]


def test_peft_on_real_rows_reads_the_numbers_of_ours(tmp_path):
    """The base written for PEFT, untrained: its label words score as ours do, also where a word has several tokens."""
    torch = pytest.importorskip("torch", reason="torch is absent: install the [hf] extra")
    pytest.importorskip("peft", reason="peft is absent: install the [hf] extra")
    preset, comments = str(tiny_gemma(tmp_path / "tiny")), ["맛있어요", "별로예요 다시는 안 가요", "so so"]
    words = {"0": "bad", "1": "good, I think"}
    clf = GemmaLoraClassifier(preset, label_words=words, epochs=0, dtype="float32").fit(["-", "-"], ["0", "1"])
    ours = {"recipe": vars(clf.recipe_), "words": clf.words_.words, "template": clf.template, "dtype": "float32"}
    ours["targets"] = ["query", "value"]
    parts = {"train": {"comment": comments, "label": ["0", "1", "0"]}}
    given = real.prepare_peft(preset, ours, parts, tmp_path / "base")
    assert max(map(len, given["words"])) > 1 and given["modules"] == ["q_proj", "v_proj"]
    model = real.peft_model(torch, tmp_path / "base", "words", given["modules"], 2, 2)
    scores = peft_loop.score_peft(torch, model, given["parts"]["train"]["prompts"], given["words"])
    theirs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(theirs, clf.predict_proba(comments), rtol=0, atol=1e-4)


REAL_FAULTS = {
    "no preset": (["--file", "rows.tsv", "--test-file", "rows.tsv"], "--test-file is for real rows"),
    "no file": (["--preset", "mini_ko"], "Give --file"),
    "random": (["--preset", "mini_ko", "--file", "rows.tsv", "--rows", "20"], "--rows is for random weights"),
    "unlabelled": (["--preset", "mini_ko", "--file", "unlabelled.txt"], "label"),
    "one class": (["--preset", "mini_ko", "--file", "one.tsv"], "at least two classes are needed"),
    "few": (["--preset", "mini_ko", "--file", "few.tsv"], "21 rows to train on and 7 to judge by"),
    "label": (["--preset", "mini_ko", "--file", "rows.tsv", "--test-file", "other.tsv"], "label 'x' is none of"),
    "share": (["--preset", "mini_ko", "--file", "rows.tsv", "--test-fraction", "1.5"], "must lie between 0 and 1"),
    "gone": (["--preset", "mini_ko", "--file", "nothing.tsv"], "nothing.tsv"),
    "system": (["--preset", "mini_ko", "--file", "rows.tsv", "--systems", "keras"], "is not one of ours, peft-words"),
    "peft alone": (["--preset", "mini_ko", "--file", "rows.tsv", "--systems", "peft-head"], "Name the system ours too"),
    "epochs": (["--preset", "mini_ko", "--file", "rows.tsv", "--epochs", "0"], "epochs=0 must be at least 1"),
    "preset": (["--preset", "gone/base", "--file", "rows.tsv"], "Preset 'gone/base' is unknown"),
    "word": (["--preset", "mini_ko", "--file", "rows.tsv", "--label-word", "0=bad"], "Label '1' has no word"),
}


@pytest.mark.parametrize("fault", REAL_FAULTS)
def test_bad_option_of_real_rows_is_one_line(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path), rows_file(tmp_path, 28, name="few.tsv"), rows_file(tmp_path, labels="1", name="one.tsv")
    rows_file(tmp_path, labels="1x", name="other.tsv")
    (tmp_path / "unlabelled.txt").write_text("맛있어요\n별로예요\n", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    options, named = REAL_FAULTS[fault]
    result = CliRunner().invoke(app, ["benchmark", "--quiet", "--out", "out", *options])
    assert result.exit_code == 2 and result.stdout == "" and sorted(tmp_path.iterdir()) == before
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1 and named in result.stderr
