"""Accuracy beside seconds on labelled rows: this package, PEFT at its settings, a frozen base, TF-IDF, `mini_ko`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .peft_loop import PEFT_NEEDS, import_peft, score_peft, torch_device, train_peft
from .processes import (
    ProcessLog,
    device_peak_bytes,
    memory_fraction,
    process_environment,
    resident_peak_bytes,
    run_process,
    run_task,
)
from .tables import markdown_line, versions_here, write_result

# pandas and the package's rooms are imported in the functions: not on the clock of every system.

REAL_SYSTEMS = {  # name: what it is
    "ours": "GemmaLoraClassifier with these settings",
    "peft-words": "Hugging Face PEFT, settings and label words of ours",
    "peft-head": "Hugging Face PEFT, settings of ours, a classification head",
    "frozen": "logistic regression on the hidden states of the frozen base",
    "tfidf": "TF-IDF of characters, logistic regression",
    "mini_ko": "GemmaLoraClassifier with the bundled base, as it comes",
}
_PEFT = ("peft-words", "peft-head")


@dataclass(frozen=True)
class RealSettings:
    """What is trained on which rows."""

    file: str  # labelled comments, or a name such as "sample"
    preset: str = "mini_ko"  # the base, as of GemmaLoraClassifier
    test_file: str | None = None  # labelled comments to judge by; None: a share of `file`
    test_fraction: float = 0.25  # that share
    parameters: dict[str, Any] = field(default_factory=dict)  # further ones of GemmaLoraClassifier
    dtype: str = "auto"  # of the base; PEFT takes what ours has
    quantization: str | None = None  # of the base; PEFT has none
    seed: int = 0  # of the split, the adapters and the order of rows
    time_limit: float = 3600.0  # seconds a process
    memory_limit: float | None = None  # GB of GPU memory that a process may take


LEAST_ROWS = 10  # on either side


def rows_to_measure(
    settings: RealSettings,  # files, share and seed
    reading: Any = None,  # a Reading: how to read both files; None: it is found out
) -> tuple[Any, Any]:  # DataFrames of rows to train on and to judge by: id, comment, label
    "The rows of all systems. Raises `DataError` for a file that cannot be read, is not labelled, or has too few rows."
    from gemma_lora_sentiment.data import DataError, classes_of, read_comments, split_comments

    rows = read_comments(settings.file, reading=reading)
    labels = classes_of(rows.label.tolist(), settings.file)
    if settings.test_file is None:
        train, test = split_comments(rows, settings.test_fraction, settings.seed)
    else:
        train, test = rows, read_comments(settings.test_file, reading=reading)
    unknown = [label for label in test.label.unique().tolist() if label not in labels]
    if unknown:
        known = ", ".join(map(repr, labels))
        raise DataError(f"{settings.test_file}: label {unknown[0]!r} is none of {settings.file}, which has {known}.")
    if min(len(train), len(test)) < LEAST_ROWS:
        raise DataError(
            f"{settings.file}: {len(train)} rows to train on and {len(test)} to judge by, and at least {LEAST_ROWS} of "
            "each are needed. Give more rows, or a second file to judge by."
        )
    return train, test


def right_bits(
    labels: Sequence[Any],  # n labels
    probabilities: np.ndarray,  # float (n, classes)
    classes: Sequence[Any],  # in the order of the columns
) -> str:  # hexadecimal, the first row is the highest bit
    "A bit a row: 1 where the most probable class is the label."
    right = np.asarray(classes)[np.asarray(probabilities).argmax(axis=1)] == np.asarray(labels)
    return np.packbits(right).tobytes().hex()


def rows_right(
    bits: str,  # of right_bits
    n: int,  # rows
) -> np.ndarray:  # bool (n,)
    "The bits as rows again."
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))[:n].astype(bool)


def judged(
    test: Any,  # DataFrame: comment, label
    probabilities: np.ndarray,  # float (n, classes)
    classes: Sequence[Any],  # in the order of the columns
) -> dict[str, Any]:  # of compute_metrics, and intervals, right
    "What is said of a system's answers. Raises `ValueError` for probabilities that are none."
    from gemma_lora_sentiment.data import duplicate_groups
    from gemma_lora_sentiment.intervals import metrics_with_intervals

    values = np.asarray(probabilities, np.float64)
    numbers = metrics_with_intervals(test.label, values, list(classes), duplicate_groups(test.comment))
    return numbers | {"right": right_bits(test.label, values, classes)}


def _classifier(system: str, spec: Mapping[str, Any], labels: Sequence[Any], again: bool = False) -> Any:  # unfitted
    from gemma_lora_sentiment.data import of_own_labels

    settings, seed = spec["settings"], spec["settings"]["seed"]
    common = dict(dtype=settings["dtype"], quantization=settings["quantization"], seed=seed)
    parameters = dict(settings["parameters"])
    if system == "tfidf":
        from gemma_lora_sentiment.evaluation import baseline_classifier

        return baseline_classifier(seed)
    if system == "frozen":
        from gemma_lora_sentiment.features import FrozenGemmaClassifier

        given = {name: parameters[name] for name in ("template", "max_length") if name in parameters}
        clf = FrozenGemmaClassifier(settings["preset"], **given, **common)
        return clf.set_params(max_length=clf.max_length + again)  # or it would remember the first fit's states
    from gemma_lora_sentiment.classifier import GemmaLoraClassifier

    if system == "mini_ko":
        return GemmaLoraClassifier(seed=seed)
    if isinstance(words := parameters.get("label_words"), Mapping):
        parameters["label_words"] = of_own_labels(words, labels)
    return GemmaLoraClassifier(settings["preset"], **parameters, **common)


def _settings_of(clf: Any) -> dict[str, Any]:  # what a fit of ours arrived at, as JSON holds it
    if not hasattr(clf, "recipe_"):
        return {}
    recipe = vars(clf.recipe_) | {"epochs": len(clf.history_)}  # those that were trained
    found = {"recipe": recipe, "recipe_name": clf.recipe_name_, "dtype": clf.dtype_}
    found |= {"quantization": clf.quantization_, "words": list(clf.words_.words), "template": clf.template}
    found |= {"targets": list(clf.adapter_.targets), "choices": clf.choices_}
    return found | {"fingerprint": clf.base_fingerprint_}


def _run_classifier(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    system, (train, test) = spec["system"], (rows["train"], rows["test"])
    clf = _classifier(system, spec, train["label"])
    log(import_seconds=log.elapsed())
    started = time.perf_counter()
    clf.fit(train["comment"], train["label"])
    log(fit_seconds=time.perf_counter() - started, process_seconds=log.elapsed(), **_settings_of(clf))
    started = time.perf_counter()
    probabilities = clf.predict_proba(test["comment"])
    log(first_score_seconds=time.perf_counter() - started, classes=list(clf.classes_.tolist()))
    log(probabilities=np.asarray(probabilities, np.float64).tolist())
    clf = _classifier(system, spec, train["label"], again=True)
    started = time.perf_counter()
    clf.fit(train["comment"], train["label"])
    log(refit_seconds=time.perf_counter() - started)
    started = time.perf_counter()
    clf.predict_proba(test["comment"])
    log(score_seconds=time.perf_counter() - started)
    log(peak_bytes=resident_peak_bytes() if system == "tfidf" else device_peak_bytes())


def peft_targets(
    base: Any,  # Base
    targets: Sequence[str],  # names of our layers
) -> list[str]:  # names of the checkpoint's modules, such as "q_proj"
    "Where PEFT has the layers of ours."
    from gemma_lora_sentiment.adapter import new_adapter, padded_pairs

    return sorted({module.rsplit(".", 1)[-1] for module in padded_pairs(new_adapter(base, 1, targets))})


def prepare_peft(
    preset: str,  # the base
    ours: Mapping[str, Any],  # what a fit of ours arrived at: recipe, words, template, targets, dtype
    parts: Mapping[str, Any],  # name -> comment, label: columns of a table or lists
    folder: str | Path,  # to write the base to
    seed: int = 0,  # of the fit of ours
) -> dict[str, Any]:  # parts as prompts and labels (positions); responses, words, modules, recipe, dtype
    "Base, rows and words as PEFT takes them. Raises as `export_checkpoint` does."
    from gemma_lora_sentiment.adapter import new_adapter
    from gemma_lora_sentiment.data import composed
    from gemma_lora_sentiment.export import export_checkpoint
    from gemma_lora_sentiment.model import load_base
    from gemma_lora_sentiment.prompt import PromptTemplate, TextTokenizer, encode_prompts, forged_copies, label_words

    base = load_base(preset, "float32")
    export_checkpoint(folder, base, new_adapter(base, 1), [], ours["dtype"], "The base as it is.")
    tokenizer, template = TextTokenizer(base.tokenizer_proto), PromptTemplate(ours["template"])
    classes = np.unique(list(parts["train"]["label"])).tolist()
    words = label_words(classes, tokenizer, template, list(ours["words"]))
    longest = max(map(len, words.trained_ids))
    share = (ours.get("choices") or {}).get("forged", 0.0)
    found: dict[str, Any] = {"classes": classes, "parts": {}}
    for name, part in parts.items():
        comments, labels = [composed(comment) for comment in part["comment"]], list(part["label"])
        if name == "train":  # on the copies too, as ours
            copies = forged_copies(comments, words, template, share, seed)
            comments, labels = comments + list(copies.values()), labels + [labels[row] for row in copies]
        prompts = encode_prompts(comments, tokenizer, template, ours["recipe"]["max_length"], longest).token_ids
        found["parts"][name] = {
            "prompts": [prompt.tolist() for prompt in prompts],
            "labels": [classes.index(label) for label in labels],
        }
    found["responses"] = [list(map(int, ids)) for ids in words.trained_ids]
    found["words"] = [list(map(int, ids)) for ids in words.scored_ids]
    return found | {"modules": peft_targets(base, ours["targets"]), "recipe": ours["recipe"], "dtype": ours["dtype"]}


def peft_model(
    torch: Any,  # the module
    folder: str | Path,  # of the base
    how: str,  # "words": the language model; "head": a classification head
    modules: Sequence[str],  # that get LoRA
    rank: int,  # of LoRA, and its alpha: the product is not scaled
    labels: int,  # classes
    seed: int = 0,
    device: str = "cpu",  # or "cuda"
    dtype: str = "float32",  # of the weights; what is trained is float32
) -> Any:  # PEFT's model
    "The base of `folder` with adapters that are new."
    import peft
    import transformers

    torch.manual_seed(seed)
    if how == "words":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    model = model.to(device, getattr(torch, dtype))
    model.config.pad_token_id, model.config.use_cache = 0, False
    task = "CAUSAL_LM" if how == "words" else "SEQ_CLS"
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules), task_type=task)
    model = peft.get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def peft_rows(
    given: Mapping[str, Any],  # of prepare_peft
    how: str,  # "words" or "head"
    part: str = "train",  # name of the rows
) -> tuple[list[list[int]], list[Any]]:  # texts and targets as train_peft takes them
    "What PEFT is trained on: the response after each prompt, or the prompt and its class."
    rows = given["parts"][part]
    if how == "head":
        return rows["prompts"], rows["labels"]
    answers = [given["responses"][label] for label in rows["labels"]]
    texts = [[*prompt, *answer] for prompt, answer in zip(rows["prompts"], answers, strict=True)]
    if given["recipe"]["loss_on"] == "text":
        return texts, texts
    return texts, [[-100] * (len(text) - len(answer)) + answer for text, answer in zip(texts, answers, strict=True)]


def _run_export(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    folder = Path(spec["folder"])
    given = prepare_peft(spec["settings"]["preset"], spec["ours"], rows, folder / "base", spec["settings"]["seed"])
    (folder / "peft.json").write_text(json.dumps(given), encoding="utf-8")


def _run_peft(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    import torch
    import transformers
    from scipy.special import softmax

    transformers.utils.logging.set_verbosity_error()
    folder, how, settings = Path(spec["folder"]), spec["how"], spec["settings"]
    given = json.loads((folder / "peft.json").read_text(encoding="utf-8"))
    recipe, test = given["recipe"], given["parts"]["test"]
    device, dtype = torch_device(torch, given["dtype"], settings["memory_limit"])
    autocast = None if dtype == "float32" else dtype
    texts, targets = peft_rows(given, how)
    log(import_seconds=log.elapsed(), dtype=dtype, recipe=recipe)
    shared = ("epochs", "batch_size", "learning_rate", "weight_decay", "global_clipnorm")
    of_fit = {name: recipe[name] for name in shared if name in recipe}
    of_fit |= dict(linear=recipe["schedule"] == "linear", seed=settings["seed"], autocast=autocast)
    words = given["words"] if how == "words" else None
    for which in ("", "re"):
        started = time.perf_counter()
        model = peft_model(torch, folder / "base", how, given["modules"], recipe["lora_rank"], len(given["classes"]),
                           settings["seed"], device, dtype)  # fmt: skip
        if which == "re":  # the base is there already in a warm fit of ours too
            started = time.perf_counter()
        train_peft(torch, model, texts, targets, log, **of_fit)
        log(**{f"{which}fit_seconds": time.perf_counter() - started})
        if log.is_over():
            log(ended=True)
            return
        if which == "":
            log(process_seconds=log.elapsed())
        started = time.perf_counter()
        scores = score_peft(torch, model, test["prompts"], words, autocast).astype(np.float64)
        seconds = time.perf_counter() - started
        if which == "":
            log(first_score_seconds=seconds, classes=given["classes"], probabilities=softmax(scores, axis=1).tolist())
        else:
            log(score_seconds=seconds)
    log(peak_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak_bytes())


def _begin(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    classes = sorted(set(rows["train"]["label"]))
    try:
        clf = _classifier("ours", spec, classes).set_params(epochs=0)
        clf.fit(["-"] * len(classes), classes)
    except ValueError as error:  # of the settings, not of the machine
        log(refused=" ".join(str(error).split()))
        return
    import jax

    device = jax.local_devices()[0]
    log(platform=device.platform, kind=device.device_kind, cpus=os.cpu_count(), fingerprint=clf.base_fingerprint_)


_TASKS = {
    "begin": _begin, "classifier": _run_classifier, "import-peft": import_peft, "export": _run_export, "peft": _run_peft
}  # fmt: skip


def run_child() -> None:
    "Entry of a process of this module."
    run_task(_TASKS)


def _check(settings: RealSettings, systems: Sequence[str]) -> None:
    for system in systems:
        if system not in REAL_SYSTEMS:
            raise ValueError(f"System {system!r} is not one of {', '.join(REAL_SYSTEMS)}. Choose among these.")
    if "ours" not in systems and set(systems) & set(_PEFT):
        raise ValueError("PEFT takes the settings at which ours arrives. Name the system ours too.")
    epochs = settings.parameters.get("epochs", "auto")
    if epochs != "auto" and epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1.")
    if settings.time_limit < 1:
        raise ValueError(f"time_limit={settings.time_limit} must be at least 1.")


def _why_left_out(system: str, settings: RealSettings) -> str | None:
    missing = [name for name in PEFT_NEEDS if find_spec(name) is None] if system in _PEFT else []
    if missing:
        return f"{', '.join(missing)} not installed"
    if system == "mini_ko" and settings.preset == "mini_ko" and not settings.parameters:
        return "it is ours here"
    return None


_COLUMNS = {  # name in the table -> heading, decimals
    "accuracy": ("accuracy", 3), "accuracy_low": ("from", 3), "accuracy_high": ("to", 3), "log_loss": ("log-loss", 3),
    "process_cold": ("process, cold (s)", 1), "fit_cold": ("fit, cold (s)", 2), "fit_warm": ("fit, warm (s)", 2),
    "score": ("scoring (s)", 3), "peak_gb": ("peak memory (GB)", 2),
}  # fmt: skip


def _note(record: Mapping[str, Any]) -> str:
    parts = []
    if recipe := record.get("recipe"):
        parts.append(f"{recipe['epochs']} epochs of {recipe['batch_size']} a step at {recipe['learning_rate']:.2g}")
        parts.append(f"rank {recipe['lora_rank']}, {record['dtype']}")
    parts += [record["quantization"]] if record.get("quantization") else []
    if words := (record.get("choices") or {}).get("words"):
        parts.append("words " + "/".join(words))
    if (strength := (record.get("choices") or {}).get("strength", 1.0)) < 1:
        parts.append(f"strength {strength:.2f}")
    parts += ["ended at the time limit"] if record.get("ended") else []
    return "; ".join([*parts, *([f"failed: {record['failed']}"] if record.get("failed") else [])])


def real_table(
    result: Mapping[str, Any],  # of run_real_benchmark, or read from its benchmark.json
) -> Any:  # DataFrame: a row a system; empty cells are NaN
    "Accuracy with its interval of 95%, log-loss, seconds and GB."
    import pandas as pd

    rows = []
    for system, runs in result["systems"].items():
        record = runs["cold"]
        metrics = record.get("metrics", {})
        low, high = (metrics.get("intervals") or {}).get("accuracy") or (None, None)
        row = {"accuracy": metrics.get("accuracy"), "accuracy_low": low, "accuracy_high": high}
        row |= {"log_loss": metrics.get("log_loss"), "process_cold": record.get("process_seconds")}
        row |= {"fit_cold": record.get("fit_seconds"), "fit_warm": record.get("refit_seconds")}
        row |= {"score": record.get("score_seconds"), "note": _note(record)}
        row["peak_gb"] = record["peak_bytes"] / 1e9 if "peak_bytes" in record else None
        rows.append({"system": system, **row})
    table = pd.DataFrame(rows, columns=["system", *_COLUMNS, "note"]).set_index("system")
    table[list(_COLUMNS)] = table[list(_COLUMNS)].astype(float)
    return table


def _line_of(table: Any, system: str) -> str:
    row = table.loc[system]
    cells = ["-" if row[name] != row[name] else f"{row[name]:,.{n}f}" for name, (_, n) in _COLUMNS.items()]
    return markdown_line([system, *cells, row["note"] or "-"])


def _head() -> list[str]:
    headings = ["system", *(heading for heading, _ in _COLUMNS.values()), "note"]
    return [markdown_line(headings), markdown_line(["---"] * len(headings))]


def real_comparisons(
    result: Mapping[str, Any],  # of run_real_benchmark, or read from its benchmark.json
) -> list[str]:  # one line a peer
    "How many times less ours takes, and how the rows compare that one of the two has right and the other not."
    from gemma_lora_sentiment.intervals import exact_p

    table, lines = real_table(result), []
    if "ours" not in table.index:
        return []
    named = {"process_cold": "process", "fit_cold": "fit, cold", "fit_warm": "fit, warm", "score": "scoring"}
    right = {}
    for system, runs in result["systems"].items():
        if metrics := runs["cold"].get("metrics"):
            right[system] = rows_right(metrics["right"], metrics["n"])
    for peer in table.index.drop("ours"):
        parts = []
        if peer in right and "ours" in right:
            ours_alone = int((right["ours"] > right[peer]).sum())
            theirs_alone = int((right[peer] > right["ours"]).sum())
            p = exact_p(ours_alone, theirs_alone)
            parts.append(f"right alone {theirs_alone} to {ours_alone} rows (p {p:.2g})")
        ratios = {what: table.loc[peer, name] / table.loc["ours", name] for name, what in named.items()}
        parts += [f"{what} {ratio:.2f}" for what, ratio in ratios.items() if ratio == ratio]
        if parts:
            lines.append(f"{peer} / ours: " + ", ".join(parts))
    return lines


def _left_out(result: dict[str, Any], system: str, reason: str, say: Callable[[str], None]) -> None:
    result["left_out"][system] = reason
    say(f"left out: {system} ({reason})")


def _describe(result: Mapping[str, Any]) -> str:
    device, rows, settings = result["device"], result["rows"], result["settings"]
    judge = settings["test_file"] or f"a share of {settings['test_fraction']:g} held out"
    shown = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"{settings['preset']}; {rows['train']} rows of {settings['file']} to train on, {rows['test']} to judge by "
        f"({judge}), labels {', '.join(map(str, rows['labels']))}\n"
        f"{device['kind']} ({device['platform']}), {device['cpus']} CPU cores\n{shown}"
    )


class _Run:
    "One run: its settings, its folder, what it has found."

    def __init__(self, settings, folder, fraction, result, say, progress):
        self.settings = settings
        self.folder = folder
        self.fraction = fraction
        self.result = result
        self.say = say
        self.progress = progress

    def process(self, task: str, **more: Any) -> dict[str, Any]:
        spec = {"task": task, "settings": asdict(self.settings), "folder": str(self.folder), **more}
        cache = self.folder / "cache"  # one, so that a base is put together once, and that before the clocks run
        for of_earlier in ("compiled", "quantized"):
            shutil.rmtree(cache / of_earlier, ignore_errors=True)
        return run_process(self.folder, spec, process_environment(cache, self.fraction), "real_rows")

    def peft_is_ready(self, system: str) -> bool:
        "Whether base and rows lie there as PEFT reads them; written when first asked."
        ours = self.result["systems"]["ours"]["cold"]
        reason = self.result["left_out"].get("peft-words") or self.result["left_out"].get("peft-head")
        if "recipe" not in ours:
            reason = "ours has not ended, whose settings it takes"
        elif reason is None and not (self.folder / "peft.json").exists():
            self.progress("export: the base as transformers reads it")
            record = self.process("export", ours=ours)
            if not (self.folder / "peft.json").exists():
                reason = f"the base could not be written for transformers: {record.get('failed', 'it took too long')}"
            else:
                self.process("import-peft")
        if reason:
            _left_out(self.result, system, reason, self.say)
        return reason is None

    def measure(self, system: str) -> dict[str, Any] | None:  # what its process wrote down; None: left out
        if system in _PEFT and not self.peft_is_ready(system):
            return None
        self.progress(f"{system}: {REAL_SYSTEMS[system]}")
        if system in _PEFT:
            return self.process("peft", how=system.removeprefix("peft-"))
        return self.process("classifier", system=system)


def run_real_benchmark(
    settings: RealSettings,  # what is trained on which rows
    systems: Sequence[str] | None = None,  # names in REAL_SYSTEMS; all by default
    out: str | Path | None = None,  # folder for benchmark.json and benchmark.tsv
    reading: Any = None,  # a Reading: how to read the files; None: it is found out
    caution: str | None = None,  # what the reader of the numbers must know
    say: Callable[[str], None] = print,  # called with each line of the result
    progress: Callable[[str], None] = lambda text: None,  # called with what is begun
) -> dict[str, Any]:  # settings, versions, device, rows, systems, left_out
    """Train and judge the systems one after another, each in a process of its own.

    A system that fails or is cut says so in its row. Raises `ValueError` for settings that cannot work, a preset that
    is not there among them, `DataError` for rows that cannot be measured, `OSError` when `out` cannot be written
    or the base does not run on this machine. Then nothing is written.
    """
    chosen = list(dict.fromkeys(REAL_SYSTEMS if systems is None else systems))
    _check(settings, chosen)
    fraction, out = memory_fraction(settings.memory_limit), None if out is None else Path(out)
    train, test = rows_to_measure(settings, reading)
    rows = {name: {column: part[column].tolist() for column in ("comment", "label")}
            for name, part in (("train", train), ("test", test))}  # fmt: skip
    result = _beginning(settings, train, test, caution)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        run = _Run(settings, Path(name), fraction, result, say, progress)
        (run.folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        progress(f"device, and {settings.preset}")
        result["device"] = device = run.process("begin")
        if "refused" in device:
            raise ValueError(device["refused"])
        if "kind" not in device:
            raise OSError(f"{settings.preset} does not run here: {device.get('failed', 'it took too long')}")
        write_result(result, real_table, out)
        say(_describe(result) + (f"\n{caution}" if caution else ""))
        _measure_all(run, [system for system in REAL_SYSTEMS if system in chosen], test, out)
    for line in ["", *real_comparisons(result)]:
        say(line)
    return result


def _beginning(settings: RealSettings, train: Any, test: Any, caution: str | None) -> dict[str, Any]:  # the result
    from gemma_lora_sentiment.data import fingerprint, leaked_comments

    labels = sorted(set(train.label))
    rows = {"train": len(train), "test": len(test), "labels": labels, "in_both": len(leaked_comments(train, test))}
    rows |= {"train_fingerprint": fingerprint(train), "test_fingerprint": fingerprint(test)}
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    result = {"started": started, "settings": asdict(settings), "versions": versions_here(), "rows": rows}
    return result | {"caution": caution, "systems": {}, "left_out": {}}


def _measure_all(run: _Run, systems: Sequence[str], test: Any, out: Path | None) -> None:
    result, say = run.result, run.say
    if result["rows"]["in_both"]:
        say(f"{result['rows']['in_both']} of the rows to judge by stand among the training rows too")
    for system in systems:
        if reason := _why_left_out(system, run.settings):
            _left_out(result, system, reason, say)
    lines = _head()
    for system in systems:
        record = None if system in result["left_out"] else run.measure(system)
        if record is None:
            continue
        if probabilities := record.pop("probabilities", None):
            try:
                record["metrics"] = judged(test, np.array(probabilities), record["classes"])
            except ValueError as error:  # numbers that are no probabilities
                record["failed"] = str(error)
        result["systems"][system] = {"cold": record}
        write_result(result, real_table, out)
        lines.append(_line_of(real_table(result), system))
        say("\n" + "\n".join(lines) if len(lines) == 3 else lines[-1])
