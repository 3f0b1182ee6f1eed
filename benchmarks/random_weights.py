"""Seconds and memory on the same drawn rows: this package, the tutorial's recipe and Hugging Face PEFT."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .ours import SWEEPS, measure_device, measure_shell, run_classifier, run_cross_validation, run_ours, run_sweep
from .peers import run_peft, run_tutorial
from .peft_loop import PEFT_NEEDS, import_peft
from .processes import ProcessLog, memory_fraction, process_environment, read_log, run_process, run_task
from .shapes import SHAPES, BenchmarkSettings, benchmark_rows, token_count
from .tables import (
    benchmark_table,
    comparisons,
    describe,
    describe_sweep,
    figures_table,
    markdown_head,
    markdown_row,
    save_size_figure,
    table_row,
    versions_here,
    write_result,
)

_TASKS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], ProcessLog], None]] = {
    "device": measure_device, "ours": run_ours, "sweep": run_sweep, "tutorial": run_tutorial,
    "import-peft": import_peft, "peft": run_peft,
    "classifier": run_classifier, "cross-validation": run_cross_validation,
}  # fmt: skip


def run_child() -> None:
    "Entry of a process of this module."
    run_task(_TASKS)


SYSTEMS = {  # name: what it is
    "ours": "this package",
    "peft": "Hugging Face PEFT, the same batch size, sorted, dynamic padding, loss on the response",
    "classifier": "GemmaLoraClassifier of this package with mini_ko, from comments (shape mini_ko only)",
    "shell": "the shell commands of this package",
    "tutorial": "the tutorial's recipe, float32, length 512, batch 1",
    "tutorial-16bit": "the same in bfloat16",
    "peft-1": "Hugging Face PEFT, batch 1",
    "cross-validation": "10 folds with GemmaLoraClassifier and mini_ko (shape mini_ko only)",
}
_NEEDS = {"peft": PEFT_NEEDS, "peft-1": PEFT_NEEDS}
_WARM = ("ours", "classifier")  # run again with the cache filled; the others keep nothing for the next process


def _why_left_out(system: str, settings: BenchmarkSettings) -> str | None:
    missing = [name for name in _NEEDS.get(system, ()) if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if system in ("classifier", "cross-validation") and settings.shape != "mini_ko":
        return "it needs the tokenizer of mini_ko"
    return None


def _spec_of(system: str, settings: BenchmarkSettings, cache: str) -> dict[str, Any]:
    task = system.removesuffix("-16bit").removesuffix("-1")
    spec: dict[str, Any] = {"task": task, "cache": cache, "settings": asdict(settings)}
    if task == "tutorial":
        spec["dtype"] = "bfloat16" if system.endswith("-16bit") else "float32"
    if task == "peft":
        spec["batch_size"] = 1 if system == "peft-1" else settings.batch_size
    return spec


_AT_LEAST = dict(
    rows=2, predict_rows=1, score_rows=1, batch_size=1, epochs=2, lora_rank=1, length=2, time_limit=1, seed=0
)


def _check(settings: BenchmarkSettings, systems: Sequence[str], sweeps: Iterable[str]) -> None:
    if settings.shape not in SHAPES:
        raise ValueError(f"Shape {settings.shape!r} is not one of {', '.join(SHAPES)}. Choose one of these.")
    for system in systems:
        if system not in SYSTEMS:
            raise ValueError(f"System {system!r} is not one of {', '.join(SYSTEMS)}. Choose among these.")
    for kind in sweeps:
        if kind not in SWEEPS:
            raise ValueError(f"Sweep {kind!r} is not one of {', '.join(SWEEPS)}. Choose among these.")
    for name, least in _AT_LEAST.items():
        if getattr(settings, name) < least:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least {least}.")
    allowed = {"dtype": ("auto", "float32", "bfloat16", "float16"), "quantization": (None, "auto", "int8", "int4")}
    for name, values in allowed.items():
        if getattr(settings, name) not in values:
            listed = ", ".join(value for value in values if value)
            raise ValueError(f"{name} {getattr(settings, name)!r} is not one of {listed}. Choose one of these.")


def _measure(
    system: str,
    settings: BenchmarkSettings,
    folder: Path,  # temporary, with rows.json
    fraction: float | None,  # of the GPU's memory
    progress: Callable[[str], None],
) -> dict[str, dict[str, Any]]:  # "cold" and perhaps "warm" -> what the process wrote down
    cache = folder / f"cache-{system}"
    environment = process_environment(cache, fraction)
    if system == "shell":
        progress(f"{system}: {SYSTEMS[system]}")
        log = ProcessLog(str(folder / "shell.jsonl"), time.time(), settings.time_limit)
        try:
            measure_shell(settings, environment, log)
        except subprocess.TimeoutExpired:
            log(ended=True)
        except subprocess.CalledProcessError as error:
            log(failed=" ".join(error.stderr.decode("utf-8", "replace").split())[-200:])
        return {"cold": read_log(Path(log.path))}
    if system in _NEEDS:
        run_process(folder, {"task": "import-peft", "settings": asdict(settings)}, environment)
    runs = {}
    for kind in ("cold", "warm") if system in _WARM else ("cold",):
        progress(f"{system}, {kind}: {SYSTEMS[system]}")
        runs[kind] = run_process(folder, _spec_of(system, settings, kind), environment)
        if "fit_seconds" not in runs[kind]:
            break
    return runs


def run_benchmark(
    settings: BenchmarkSettings | None = None,
    systems: Sequence[str] | None = None,  # names in SYSTEMS; all by default
    out: str | Path | None = None,  # folder for benchmark.json, benchmark.tsv and figures
    sweeps: Mapping[str, Sequence[int]] | None = None,  # SWEEPS, or some of its sizes
    say: Callable[[str], None] = print,  # called with each line of the result
    progress: Callable[[str], None] = lambda text: None,  # called with what is begun
) -> dict[str, Any]:  # settings, versions, device, rows, systems, left_out, sweeps
    """Measure the systems one after another, each in processes of its own.

    A system that fails or is cut says so in its row. Raises `ValueError` for settings that cannot work, `DataError`
    for a file of comments that cannot be read, `OSError` when `out` cannot be written, `RuntimeError` when JAX
    itself does not run.
    """
    settings = settings or BenchmarkSettings()
    chosen = list(SYSTEMS if systems is None else dict.fromkeys(systems))
    _check(settings, chosen, sweeps or {})
    fraction, out = memory_fraction(settings.memory_limit), None if out is None else Path(out)
    rows = benchmark_rows(settings)
    lengths = [len(prompt) + 2 for prompt in rows["train"]]
    of_rows = {"n": len(lengths), "tokens": token_count(rows), "mean": sum(lengths) / len(lengths)}
    result: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "settings": asdict(settings), "versions": versions_here(),
        "rows": {**of_rows, "longest": max(lengths)}, "systems": {}, "left_out": {}, "sweeps": {},
    }  # fmt: skip
    write_result(result, benchmark_table, out)  # is it ours to write in? Better to know before the work than after it
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        _measure_all(result, settings, chosen, sweeps or {}, folder, fraction, out, say, progress)
    for line in comparisons(result):
        say(line)
    return result


def _measure_all(result, settings, chosen, sweeps, folder, fraction, out, say, progress) -> None:
    environment = process_environment(folder / "cache-device", fraction)
    progress("device: a matrix product")
    patient = replace(settings, time_limit=max(600.0, settings.time_limit))  # nothing can be said without it
    spec = {"task": "device", "settings": asdict(patient)}
    result["device"] = device = run_process(folder, spec, environment)
    if "flops" not in device:
        raise RuntimeError(f"JAX does not run here: {device.get('failed', 'it took too long')}")
    say(describe(result))
    for system in chosen:
        if reason := _why_left_out(system, settings):
            result["left_out"][system] = reason
            say(f"left out: {system} ({reason})")
    if any(system in SYSTEMS and system not in result["left_out"] for system in chosen):
        say("\n" + markdown_head())
    for system in chosen:
        if system in result["left_out"]:
            continue
        result["systems"][system] = _measure(system, settings, folder, fraction, progress)
        write_result(result, benchmark_table, out)
        if system not in ("shell", "cross-validation"):
            say(markdown_row(table_row(result, system)))
    say("")
    for row in figures_table(result).itertuples():
        say(f"{row.figure}: {row.value:,.3g} {row.unit}".rstrip())
    for system in ("shell", "cross-validation"):  # what has no row in the table
        record = result["systems"].get(system, {}).get("cold", {})
        if record.get("failed") or record.get("ended"):
            say(f"{system}: " + (f"failed: {record['failed']}" if record.get("failed") else "ended at the time limit"))
    for kind, sizes in sweeps.items():
        progress(f"sweep over {kind}: {', '.join(map(str, sizes))}")
        spec = {"task": "sweep", "kind": kind, "sizes": sorted(sizes), "settings": asdict(settings)}
        result["sweeps"][kind] = run_process(folder, spec, environment)
        write_result(result, benchmark_table, out)
        for line in describe_sweep(kind, result["sweeps"][kind]):
            say(line)
        if out is not None:
            save_size_figure(result, out / "figures" / "cost_against_size.png")
