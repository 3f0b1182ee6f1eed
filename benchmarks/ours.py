"""What is measured of this package: the machine under it, a fit, a classifier, ten folds, the shell, cost by size."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from .processes import ProcessLog, device_peak_bytes, median_seconds
from .shapes import EOS, LABEL_IDS, SHAPES, BenchmarkSettings, base_of, draw_lengths, random_prompts


def measure_device(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    with _without_tensorflow():
        import jax
        import jax.numpy as jnp
        import keras_nlp  # noqa: F401

    device, on_cpu = jax.local_devices()[0], jax.default_backend() == "cpu"
    log(platform=device.platform, kind=device.device_kind, cpus=os.cpu_count(), import_seconds=log.elapsed())
    size, dtype = (2048, "float32") if on_cpu else (8192, "bfloat16")
    key = jax.random.key(0)
    a, b = (jax.random.normal(k, (size, size), dtype) for k in jax.random.split(key))
    many = 2 if on_cpu else 20  # products between two looks at the clock
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, many, lambda _, x: jnp.matmul(x, b) * (size**-0.5), a))
    product(a, b).block_until_ready()
    seconds = median_seconds(lambda: product(a, b).block_until_ready())
    log(matmul_size=size, matmul_dtype=dtype, flops=many * 2 * size**3 / seconds)


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    from gemma_lora_sentiment.model import without_tensorflow

    with without_tensorflow():
        yield


def _training_rows(prompts: Sequence[Sequence[int]], labels: Sequence[int]) -> tuple[Any, Any]:  # Rows, LabelWords
    from gemma_lora_sentiment.prompt import LabelWords
    from gemma_lora_sentiment.training import Rows

    words = LabelWords((0, 1), ("0", "1"), tuple((label_id,) for label_id in LABEL_IDS), (EOS,))
    arrays = [np.array(prompt, np.int32) for prompt in prompts]
    responses = [words.trained_ids[label] for label in labels]
    return Rows(arrays, responses, np.array(labels), np.ones(len(arrays), np.float32)), words


def _count_compilations() -> dict[str, float]:  # updated by JAX from now on
    import jax

    counted = {"programs": 0, "compile_seconds": 0.0}

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            counted["programs"] += 1
            counted["compile_seconds"] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    return counted


def _stop_after_epoch(log: ProcessLog) -> Any:  # a Keras callback that costs no step anything
    import keras

    class StopAfterEpoch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self._model.stop_training |= log.is_over()

    return StopAfterEpoch()


def run_ours(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    from gemma_lora_sentiment.adapter import new_adapter
    from gemma_lora_sentiment.cache import use_compile_cache
    from gemma_lora_sentiment.model import jax
    from gemma_lora_sentiment.scoring import score_labels, scoring_batch_size
    from gemma_lora_sentiment.training import Recipe, train_adapter

    settings = BenchmarkSettings(**spec["settings"])
    use_compile_cache()  # as `load_base` does
    compiled = _count_compilations()
    log(import_seconds=log.elapsed())
    started = time.perf_counter()
    base = base_of(settings)
    jax.block_until_ready(base.arrays)
    log(base_seconds=time.perf_counter() - started, base_bytes=base.nbytes, base_peak_bytes=device_peak_bytes())
    log(dtype=base.dtype, quantization=base.quantization, batch_size=settings.batch_size)
    log(**{f"base_{name}": n for name, n in compiled.items()})
    train, words = _training_rows(rows["train"], rows["labels"])
    recipe = Recipe(
        lora_rank=settings.lora_rank, learning_rate=5e-5, epochs=settings.epochs, batch_size=settings.batch_size
    )

    def fit() -> tuple[Any, tuple[int, ...]]:
        start = new_adapter(base, settings.lora_rank, seed=settings.seed)
        adapter, _, buckets = train_adapter(
            base, start, train, words, recipe, callbacks=[_stop_after_epoch(log)],
            progress=lambda numbers: log(epochs=[numbers["seconds"]]),
        )  # fmt: skip
        return adapter, buckets

    before, started = dict(compiled), time.perf_counter()
    adapter, buckets = fit()
    log(fit_seconds=time.perf_counter() - started, process_seconds=log.elapsed(), peak_bytes=device_peak_bytes())
    log(buckets=[int(length) for length in buckets], **{name: compiled[name] - before[name] for name in compiled})
    log(compile_cache=jax.config.jax_compilation_cache_dir is not None)
    if spec["cache"] == "warm" or log.is_over():
        return
    started = time.perf_counter()
    fit()
    log(refit_seconds=time.perf_counter() - started)

    def score(part: str, batch_size: int) -> np.ndarray:
        prompts = [np.array(prompt, np.int32) for prompt in rows[part]]
        return score_labels(base, adapter, prompts, words, batch_size=batch_size)

    log_scoring(log, rows, lambda part: score(part, scoring_batch_size()))  # the batch that `predict_proba` takes
    log(predict_peak_bytes=device_peak_bytes())


def log_scoring(log: ProcessLog, rows: Mapping[str, Any], score: Callable[[str], Any]) -> None:
    started = time.perf_counter()
    score("predict")
    log(first_predict_seconds=time.perf_counter() - started)
    seconds = median_seconds(lambda: score("predict"))
    log(predict_seconds=seconds)
    if log.is_over(2 * seconds * len(rows["score"]) / len(rows["predict"])):
        return
    score("score")  # compiles what is new
    log(score_seconds=median_seconds(lambda: score("score"), 1), score_rows=len(rows["score"]))


def _sample(n: int) -> tuple[list[str], list[str]]:  # comments and labels of n rows of the bundled sample, both classes
    from gemma_lora_sentiment.data import read_comments

    sample = read_comments("sample").sample(frac=1.0, random_state=0)
    chosen = sample.groupby("label").head(-(-n // 2)).head(n)
    return chosen.comment.tolist(), chosen.label.tolist()


def run_classifier(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    from gemma_lora_sentiment.classifier import GemmaLoraClassifier

    settings = BenchmarkSettings(**spec["settings"])
    log(import_seconds=log.elapsed())
    comments, labels = _sample(settings.rows)
    clf = GemmaLoraClassifier(dtype=settings.dtype, quantization=settings.quantization, seed=settings.seed)
    started = time.perf_counter()
    clf.fit(comments, labels)
    log(fit_seconds=time.perf_counter() - started, process_seconds=log.elapsed(), peak_bytes=device_peak_bytes())
    log(epochs=clf.history_.seconds.tolist(), dtype=clf.dtype_, batch_size=clf.recipe_.batch_size)
    log(fit_epochs=len(clf.history_), quantization=clf.quantization_)
    if spec["cache"] == "warm" or log.is_over():
        return
    texts = {
        name: [f"{comments[i % len(comments)]} {i}" for i in range(len(rows[name]))] for name in ("predict", "score")
    }
    log_scoring(log, rows, lambda part: clf.predict_proba(texts[part]))


def run_cross_validation(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    from sklearn.base import clone
    from sklearn.model_selection import StratifiedKFold

    from gemma_lora_sentiment.classifier import GemmaLoraClassifier

    settings = BenchmarkSettings(**spec["settings"])
    compiled = _count_compilations()
    comments, labels = (np.array(column, dtype=object) for column in _sample(settings.rows))
    clf = GemmaLoraClassifier(dtype=settings.dtype, quantization=settings.quantization, seed=settings.seed)
    folds = StratifiedKFold(10, shuffle=True, random_state=settings.seed)
    for train, test in folds.split(comments, labels):
        started = time.perf_counter()
        fitted = clone(clf).fit(comments[train], labels[train])
        fitted.predict_proba(comments[test])
        log(folds=[time.perf_counter() - started], process_seconds=log.elapsed(), **compiled)
        log(quantization=fitted.quantization_)
        if log.is_over():
            return
    log(peak_bytes=device_peak_bytes())


_SHELL = "import sys; from gemma_lora_sentiment.cli import app; app()"


def measure_shell(settings: BenchmarkSettings, environment: Mapping[str, str], log: ProcessLog) -> None:
    def run(*arguments: str, cwd: str | None = None) -> None:
        subprocess.run(
            [sys.executable, "-P", "-c", *arguments], env=dict(environment), cwd=cwd, check=True, capture_output=True,
            timeout=settings.time_limit,
        )  # fmt: skip

    log(interpreter_seconds=median_seconds(lambda: run("pass")))
    log(import_seconds=median_seconds(lambda: run("import gemma_lora_sentiment")))
    log(help_seconds=median_seconds(lambda: run(_SHELL, "--help")))
    if settings.shape == "mini_ko":
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            run(_SHELL, "quickstart", "--quiet", cwd=folder)
            log(quickstart_seconds=time.perf_counter() - started)


SWEEPS = {
    "rows": (300, 3_000, 30_000),
    "length": (32, 64, 128, 256, 512),  # tokens
    "batch": (1, 2, 4, 8, 16, 32, 64, 128),  # rows a step
}


def _sweep_lengths(kind: str, size: int, batch_size: int, seed: int) -> tuple[np.ndarray, int]:  # lengths, batch size
    if kind == "rows":
        return draw_lengths(size, seed), batch_size
    if kind == "length":
        return np.full(8 * batch_size, size), batch_size
    return np.full(8 * size, 64), size


def run_sweep(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    from gemma_lora_sentiment.adapter import new_adapter
    from gemma_lora_sentiment.training import Recipe, train_adapter

    settings, kind = BenchmarkSettings(**spec["settings"]), spec["kind"]
    base = base_of(settings)
    log(quantization=base.quantization)
    start = new_adapter(base, settings.lora_rank)
    epochs, per_token = 2 if kind == "rows" else 3, 0.0
    for size in spec["sizes"]:
        lengths, batch_size = _sweep_lengths(kind, size, settings.batch_size, settings.seed)
        if log.is_over(epochs * per_token * int(lengths.sum())):
            log(points_left_out=[size])
            continue
        prompts = random_prompts(lengths, SHAPES[settings.shape]["vocabulary_size"], settings.seed)
        train, words = _training_rows(prompts, [i % 2 for i in range(len(lengths))])
        recipe = Recipe(lora_rank=settings.lora_rank, epochs=epochs, batch_size=batch_size, learning_rate=5e-5)
        history = train_adapter(base, start, train, words, recipe)[1]
        seconds = median(history.seconds[1:])
        per_token = seconds / int(lengths.sum())
        point = {"size": size, "epoch_seconds": seconds, "first_epoch_seconds": float(history.seconds[0])}
        log(points=[{**point, "rows": len(lengths), "tokens": int(lengths.sum()), "peak_bytes": device_peak_bytes()}])
