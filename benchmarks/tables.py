"""What is said of a run: its table, the figures beside it, ratios, a figure of cost against size, the files."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from .shapes import SHAPES, block_parameters


def summarize(
    record: Mapping[str, Any],  # what a process wrote down: epochs, perhaps partial, seconds, bytes
    epochs: int,  # that were asked for
) -> dict[str, Any]:  # epoch, first_epoch, fit, process in seconds; extrapolated
    "Figures of one process."
    measured, partial = list(record.get("epochs", []))[:epochs], record.get("partial")
    if not measured and not partial:
        return {"epoch": None, "first_epoch": None, "fit": None, "process": None, "extrapolated": None}
    whole_of_partial = partial["seconds"] * partial["of"] / partial["steps"] if partial else None
    steady = median(measured[1:]) if len(measured) > 1 else whole_of_partial or measured[0]
    fit, process = record.get("fit_seconds"), record.get("process_seconds")
    cut = None
    if len(measured) < epochs:
        done = len(measured) + (partial["steps"] / partial["of"] if partial and len(measured) < epochs else 0)
        missing = (epochs - done) * steady
        spent = sum(measured) + (partial["seconds"] if partial else 0)
        fit = (fit if fit is not None else spent) + missing
        process = process + missing if process is not None else None
        cut = f"extrapolated from {done:.2g} of {epochs} epochs"
    first = measured[0] if measured else None
    return {"epoch": steady, "first_epoch": first, "fit": fit, "process": process, "extrapolated": cut}


_COLUMNS = {  # name in the result -> heading, decimals
    "epoch": ("epoch (s)", 3), "first_epoch": ("first epoch (s)", 2), "fit_cold": ("fit, cold (s)", 1),
    "fit_warm": ("fit, warm (s)", 1), "process_cold": ("process, cold (s)", 1),
    "process_warm": ("process, warm (s)", 1), "predict": ("predict (s)", 3), "rows_per_second": ("rows scored/s", 0),
    "peak_gb": ("peak memory (GB)", 2), "utilisation": ("FLOP utilisation", 4),
}  # fmt: skip


def table_row(result: Mapping[str, Any], system: str) -> dict[str, Any]:
    settings, runs = result["settings"], result["systems"][system]
    cold, warm = runs.get("cold", {}), runs.get("warm", {})
    epochs = cold.get("fit_epochs", settings["epochs"])
    of_cold, of_warm = summarize(cold, epochs), summarize(warm, epochs)
    row = {"system": system, "epoch": of_cold["epoch"], "first_epoch": of_cold["first_epoch"]}
    row |= {"fit_cold": of_cold["fit"], "fit_warm": of_warm["fit"]}
    row |= {"process_cold": of_cold["process"], "process_warm": of_warm["process"]}
    row["predict"] = cold.get("predict_seconds")
    row["rows_per_second"] = cold["score_rows"] / cold["score_seconds"] if "score_seconds" in cold else None
    row["peak_gb"] = cold["peak_bytes"] / 1e9 if "peak_bytes" in cold else None
    flops = 4 * block_parameters(SHAPES[settings["shape"]]) * result["rows"]["tokens"]
    rate = result.get("device", {}).get("flops")
    has_rows = system not in ("classifier", "shell", "cross-validation")  # these take comments, not the rows
    row["utilisation"] = flops / rate / row["epoch"] if rate and row["epoch"] and has_rows else None
    return {**row, "note": _note(cold, warm, of_cold)}


def _note(cold: Mapping[str, Any], warm: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    parts = [f"batch {cold['batch_size']}, {cold['dtype']}"] if {"batch_size", "dtype"} <= set(cold) else []
    parts += [cold["quantization"]] if cold.get("quantization") else []
    if cold.get("buckets"):
        parts.append("lengths " + "/".join(map(str, cold["buckets"])))
    if warm and cold.get("compile_cache") is False:
        parts.append("no compile cache")
    parts += [summary["extrapolated"]] if summary["extrapolated"] else []
    parts += ["ended at the time limit"] if cold.get("ended") else []
    parts += [f"failed: {run['failed']}" for run in (cold, warm) if run.get("failed")]
    return "; ".join(parts)


def benchmark_table(
    result: Mapping[str, Any],  # of run_benchmark, or read from its benchmark.json
) -> Any:  # pandas DataFrame: a row a system; empty cells are NaN
    "The table of a run: seconds, GB, and the share of the chip's arithmetic that was useful work."
    import pandas as pd

    rows = [table_row(result, system) for system in result["systems"] if system not in ("shell", "cross-validation")]
    table = pd.DataFrame(rows, columns=["system", *_COLUMNS, "note"]).set_index("system")
    table[list(_COLUMNS)] = table[list(_COLUMNS)].astype(float)
    return table


def markdown_line(
    cells: Sequence[Any],  # of one row
) -> str:
    "A line of a Markdown table."
    return "| " + " | ".join(map(str, cells)) + " |"


def markdown_row(row: Mapping[str, Any]) -> str:
    cells = []
    for name, (_, decimals) in _COLUMNS.items():
        value = row[name]
        cells.append("-" if value is None or value != value else f"{value:,.{decimals}f}")
    return markdown_line([row["system"], *cells, row["note"] or "-"])


def markdown_head() -> str:
    headings = ["system", *(heading for heading, _ in _COLUMNS.values()), "note"]
    return markdown_line(headings) + "\n" + markdown_line(["---"] * len(headings))


_FIGURES = (  # system, name in its record, what it is, unit
    ("shell", "interpreter_seconds", "the Python interpreter alone", "s"),
    ("shell", "import_seconds", "import gemma_lora_sentiment", "s"),
    ("shell", "help_seconds", "gemma-lora-sentiment --help", "s"),
    ("shell", "quickstart_seconds", "gemma-lora-sentiment quickstart, cold", "s"),
    ("ours", "import_seconds", "ours: interpreter and imports", "s"),
    ("ours", "base_seconds", "ours: random weights", "s"),
    ("ours", "compile_seconds", "ours: compilation in the first fit, cold", "s"),
    ("ours", "programs", "ours: programs compiled in the first fit, small ones included", ""),
    ("ours", "refit_seconds", "ours: a second fit in the same process", "s"),
    ("ours", "first_predict_seconds", "ours: the first prediction", "s"),
    ("ours", "base_bytes", "ours: the base", "GB"),
    ("ours", "base_peak_bytes", "ours: peak memory before the fit", "GB"),
    ("ours", "predict_peak_bytes", "ours: peak memory after scoring", "GB"),
    ("cross-validation", "compile_seconds", "cross-validation: compilation", "s"),
    ("cross-validation", "programs", "cross-validation: programs compiled, small ones included", ""),
    ("peft", "import_seconds", "peft: interpreter and imports", "s"),
    ("peft", "base_seconds", "peft: random weights", "s"),
    ("peft", "first_predict_seconds", "peft: the first prediction", "s"),
)


def figures_table(
    result: Mapping[str, Any],  # of run_benchmark, or read from its benchmark.json
) -> Any:  # pandas DataFrame: figure, value, unit
    "The figures beside the table."
    import pandas as pd

    found = []
    for system, name, what, unit in _FIGURES:
        value = result["systems"].get(system, {}).get("cold", {}).get(name)
        if value is not None:
            found.append((what, value / 1e9 if unit == "GB" else value, unit))
    folds = result["systems"].get("cross-validation", {}).get("cold", {}).get("folds", [])
    if folds:
        process = result["systems"]["cross-validation"]["cold"]["process_seconds"] + (10 - len(folds)) * median(folds)
        cut = "" if len(folds) == 10 else f", extrapolated from {len(folds)}"
        found.append((f"10-fold cross-validation, whole process{cut}", process, "s"))
    return pd.DataFrame(found, columns=["figure", "value", "unit"])


def comparisons(
    result: Mapping[str, Any],  # of run_benchmark, or read from its benchmark.json
) -> list[str]:  # one line a peer and figure
    "How many times less ours takes than each peer, in the figures that both have."
    table = benchmark_table(result)
    if "ours" not in table.index:
        return []
    lines = []
    for peer in table.index.drop(["ours", "classifier"], errors="ignore"):
        named = {"epoch": "an epoch", "fit_cold": "the fit, cold", "process_cold": "the process, cold",
                 "predict": "predict", "peak_gb": "peak memory"}  # fmt: skip
        ratios = {what: table.loc[peer, name] / table.loc["ours", name] for name, what in named.items()}
        parts = [f"{what} {ratio:.2f}" for what, ratio in ratios.items() if ratio == ratio]
        if parts:
            lines.append(f"{peer} / ours: " + ", ".join(parts))
    return lines


def write_result(
    result: Mapping[str, Any],  # what is known by now
    table: Callable[[Mapping[str, Any]], Any],  # result -> DataFrame, a row a system
    out: Path | None,  # a folder; None writes nothing
) -> None:
    "Write `benchmark.json`, and `benchmark.tsv` once a system is measured. Raises `OSError`."
    if out is None:
        return
    from gemma_lora_sentiment.files import whole_file

    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "benchmark.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if result["systems"]:
        with whole_file(out / "benchmark.tsv") as temporary:
            table(result).to_csv(temporary, sep="\t", lineterminator="\n")


def versions_here() -> dict[str, str]:  # by the name of the package
    "Of Python and of all that computes."
    names = ("keras", "keras-hub", "jax", "torch", "transformers", "peft", "tensorflow", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe(result: Mapping[str, Any]) -> str:
    device, rows, settings = result["device"], result["rows"], result["settings"]
    shown = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"shape {settings['shape']}, {settings['epochs']} epochs of {rows['n']} rows, {rows['mean']:.1f} tokens in the "
        f"mean, longest {rows['longest']}; predict {settings['predict_rows']}, long file {settings['score_rows']}\n"
        f"{device['kind']} ({device['platform']}), {device['cpus']} CPU cores; matrix product of "
        f"{device['matmul_size']}, {device['matmul_dtype']}: {device['flops'] / 1e12:.3g} TFLOP/s\n{shown}"
    )


def describe_sweep(kind: str, record: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{kind} {point['size']}: {1000 * point['epoch_seconds'] / point['rows']:.3g} ms a row, "
        f"first epoch {point['first_epoch_seconds']:.3g} s, peak {point['peak_bytes'] / 1e9:.3g} GB"
        for point in record.get("points", [])
    ]
    lines += [f"{kind} {size}: left out, it would not end in time" for size in record.get("points_left_out", [])]
    if record.get("ended"):
        lines.append(f"sweep over {kind}: ended at the time limit")
    return [*lines, *([f"sweep over {kind} failed: {record['failed']}"] if record.get("failed") else [])]


def save_size_figure(
    result: Mapping[str, Any],  # of run_benchmark with sweeps
    path: str | Path,  # of a PNG; its folder is made
) -> Any:  # matplotlib Figure
    "Milliseconds a row and peak memory against rows, length and rows a step."
    from matplotlib.figure import Figure

    sweeps = {kind: record["points"] for kind, record in result["sweeps"].items() if record.get("points")}
    figure = Figure(figsize=(4 * max(1, len(sweeps)), 5), layout="constrained")
    axes = figure.subplots(2, max(1, len(sweeps)), squeeze=False, sharex="col")
    units = {"rows": "training rows", "length": "tokens a row", "batch": "rows a step"}
    for column, (kind, points) in enumerate(sweeps.items()):
        sizes = [point["size"] for point in points]
        panels = (
            ("ms a row, steady", [1000 * point["epoch_seconds"] / point["rows"] for point in points]),
            ("peak memory (GB)", [point["peak_bytes"] / 1e9 for point in points]),
        )
        for axis, (label, values) in zip(axes[:, column], panels, strict=True):
            axis.plot(sizes, values, marker="o")
            axis.set(xscale="log", ylabel=label, ylim=(0, 1.1 * max(values)))
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.minorticks_off()
        axes[1, column].set_xlabel(units[kind])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return figure


def benchmark_markdown(
    name: str,  # of the run: the machine and the shape
    result: Mapping[str, Any],  # of run_benchmark, or read from its benchmark.json
) -> str:  # a section of Markdown: machine, versions, table, figures, ratios, sweeps
    "A run as a page shows it."
    lines = [f"### {name}", "", describe(result).replace("\n", "  \n"), "", markdown_head()]
    lines += [markdown_row(table_row(result, system)) for system in benchmark_table(result).index]
    lines += ["", *(f"- left out: {system} ({reason})" for system, reason in result["left_out"].items())]
    lines += [f"- {row.figure}: {row.value:,.3g} {row.unit}".rstrip() for row in figures_table(result).itertuples()]
    lines += [f"- {line}" for line in comparisons(result)]
    lines += [f"- {line}" for kind, record in result["sweeps"].items() for line in describe_sweep(kind, record)]
    return "\n".join(lines)
