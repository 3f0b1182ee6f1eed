"""Hugging Face PEFT on the rows, settings and weights of ours, for the page of results.

    python -m benchmarks.real.peers prepare BASE TARR FOLDER
    python -m benchmarks.real.peers word FOLDER OUT.jsonl       label words, by the language model
    python -m benchmarks.real.peers head FOLDER OUT.jsonl       a classification head
    python -m benchmarks.real.peers ours BASE TARR OUT.jsonl    this package, the same measurements

BASE is a preset or a .gguf file. `prepare` writes it as a Hugging Face folder by this package's export, so that torch
reads the same numbers, and the rows as token ids beside it. Trained on the 300 rows of TARR, then twice on 300 rows of
sample in the same process: the last is the warm fit. Judged on sample_validation, by rows that no fit has seen. The
loop is that of `gemma-lora-sentiment benchmark --preset BASE --file FILE`, which measures rows of your own; weights
are float32 and forward passes bfloat16, as they were for the lines that are stored.
"""

import time

STARTED = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

RECIPE = {"epochs": 4, "batch_size": 16, "learning_rate": 1e-3, "weight_decay": 0.01, "lora_rank": 8}
LAYERS = {"q and v": ["query", "value"], "all": "all"}
FITS = {"first": "tarr", "second": "sample", "warm": "sample"}  # what a fit is called: its rows


def rows_of(tarr: str) -> dict:
    from gemma_lora_sentiment import read_comments

    sample = read_comments("sample").groupby("label", group_keys=False).sample(150, random_state=0)
    return {"tarr": read_comments(tarr), "sample": sample, "validation": read_comments("sample_validation")}


def prepare(base: str, tarr: str, folder: str) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from gemma_lora_sentiment.model import load_base, lora_targets
    from gemma_lora_sentiment.prompt import TUTORIAL_TEMPLATE

    from ..real_rows import peft_targets, prepare_peft

    held, rows = load_base(base, "float32"), rows_of(tarr)
    recipe = {**RECIPE, "max_length": 256, "loss_on": "response"}
    ours = {"recipe": recipe, "words": ["0", "1"], "template": TUTORIAL_TEMPLATE, "dtype": "bfloat16"}
    ours["targets"] = every = lora_targets(held.config)
    given = prepare_peft(base, ours, {"train": rows["tarr"], **rows}, folder)
    given["layers"] = {called: peft_targets(held, every if layers == "all" else layers)
                       for called, layers in LAYERS.items()}  # fmt: skip
    (Path(folder) / "rows.json").write_text(json.dumps(given), encoding="utf-8")


def line_of(seconds: float, process: float, probabilities, labels, classes, scoring: float, peak_bytes: int) -> dict:
    from gemma_lora_sentiment.evaluation import compute_metrics

    found = compute_metrics(labels, probabilities, classes)
    return {"seconds": round(seconds, 3), "process": round(process, 2), "accuracy": round(found["accuracy"], 4),
            "log_loss": round(found["log_loss"], 4), "scoring": round(scoring, 3),
            "peak_gb": round(peak_bytes / 1e9, 2)}  # fmt: skip


def theirs(folder: str, how: str):
    import torch
    from scipy.special import softmax

    from ..peft_loop import score_peft, torch_device, train_peft
    from ..processes import ProcessLog
    from ..real_rows import peft_model, peft_rows

    given, device = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8")), torch_device(torch)[0]
    autocast, words = "bfloat16", given["words"] if how == "word" else None
    kind, judges = {"word": "words", "head": "head"}[how], given["parts"]["validation"]
    numbers = {name: RECIPE[name] for name in ("epochs", "batch_size", "learning_rate", "weight_decay")}
    log = ProcessLog(os.devnull, STARTED, float("inf"))
    for called, modules in given["layers"].items():
        for seed, (fit, part) in enumerate(FITS.items()):
            model = peft_model(torch, folder, kind, modules, RECIPE["lora_rank"], 2, seed, device)
            texts, targets = peft_rows(given, kind, part)
            started = time.perf_counter()
            train_peft(torch, model, texts, targets, log, **numbers, linear=True, seed=seed, autocast=autocast)
            seconds, process, started = time.perf_counter() - started, log.elapsed(), time.perf_counter()
            found = softmax(score_peft(torch, model, judges["prompts"], words, autocast).astype(float), axis=1)
            scoring, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() if device == "cuda" else 0
            yield {"system": f"PEFT, {how}", "targets": called, "rows": part, "seed": seed, "fit": fit,
                   **line_of(seconds, process, found, judges["labels"], [0, 1], scoring, peak)}  # fmt: skip
            del model
            torch.cuda.empty_cache()


def ours(base: str, tarr: str):
    import jax

    from gemma_lora_sentiment import GemmaLoraClassifier
    from gemma_lora_sentiment.cache import use_compile_cache
    from gemma_lora_sentiment.model import load_base

    use_compile_cache()
    rows = rows_of(tarr)
    judges = rows["validation"]
    for called, layers in LAYERS.items():
        for seed, (fit, part) in enumerate(FITS.items()):
            clf = GemmaLoraClassifier(base, recipe="gemma", target_layers=layers, seed=seed, **RECIPE)
            jax.block_until_ready(load_base(base).arrays)
            started = time.perf_counter()
            clf.fit(rows[part].comment, rows[part].label)
            seconds, process, started = time.perf_counter() - started, time.time() - STARTED, time.perf_counter()
            found = clf.predict_proba(judges.comment)
            scoring, stats = time.perf_counter() - started, jax.local_devices()[0].memory_stats() or {}
            peak = stats.get("peak_bytes_in_use", 0)
            yield {"system": "ours", "targets": called, "rows": part, "seed": seed, "fit": fit,
                   **line_of(seconds, process, found, judges.label, clf.classes_, scoring, peak)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "word", "head", "ours"])
    parser.add_argument("arguments", nargs="+")
    given = parser.parse_args()
    if given.what == "prepare":
        return prepare(*given.arguments)
    *needs, out = given.arguments
    lines = ours(*needs) if given.what == "ours" else theirs(*needs, given.what)
    with open(out, "a", encoding="utf-8") as file:
        for line in lines:
            print(json.dumps(line), file=sys.stderr, flush=True)
            print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main()
