"""One fit of this tree or of the tree before its own forward pass, in a process of its own; one line of JSON.

    python -m benchmarks.core.before_and_after new|old 270m|2b qv|all cold|long|int8|int4

`old` imports the package of commit 3aa74bf from the folder in OLD (`git worktree add OLD 3aa74bf`). Random weights of
the shape; those of 270M are a KerasHub preset in P270 (Gemma3Backbone of that shape, bfloat16). 300 rows of 24 to 83
tokens, 16 a step; `long` is 75 epochs; `first` is the first epoch, `epoch` the median of the others, `peak` in GB.
The compile cache is a fresh folder each time, so every fit is cold.
"""

# ruff: noqa: E402
import json
import os
import sys
import time

t0 = time.perf_counter()
which, shape, targets, mode = sys.argv[1:5]
if which == "old":
    sys.path.insert(0, os.environ["OLD"])
os.environ.update(
    KERAS_BACKEND="jax", XLA_PYTHON_CLIENT_PREALLOCATE="false", GEMMA_LORA_SENTIMENT_CACHE=f"/tmp/cache-{os.getpid()}"
)
import jax
import numpy as np

from gemma_lora_sentiment.adapter import new_adapter
from gemma_lora_sentiment.cache import use_compile_cache
from gemma_lora_sentiment.model import load_base
from gemma_lora_sentiment.prompt import LabelWords
from gemma_lora_sentiment.training import Recipe, Rows, train_adapter

if which == "old":
    from gemma_lora_sentiment.benchmark import random_base  # a room of the package then
else:
    from ..shapes import random_base

t_import = time.perf_counter() - t0
small = "--small" in sys.argv
use_compile_cache()
t = time.perf_counter()
q = mode if mode in ("int8", "int4") else None
if small:
    base = random_base("tiny")
elif shape == "2b":
    base = random_base("gemma_2b", "bfloat16", q)
else:
    base = load_base(os.environ["P270"], "bfloat16", q)
T = {
    "qv": ("query", "value"),
    "all": ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"),
}[targets]
arrays = base.arrays if which == "new" else [v.value for v in base.backbone.variables]
jax.block_until_ready(arrays)
t_load = time.perf_counter() - t


def stat():
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9


load_peak = stat()
rng = np.random.default_rng(0)
vocab = 60 if small else 250000
lengths = np.clip(rng.gamma(6, 2.9, 300) + 20, 24, 83).astype(int)
rows = Rows(
    [np.array([2, *rng.integers(4, vocab, n - 1)], np.int32) for n in lengths],
    [(20 + i % 2, 1) for i in range(300)],
    np.arange(300) % 2,
    np.ones(300, np.float32),
)
words = LabelWords(("0", "1"), ("0", "1"), ((20,), (21,)), (1,))
rank = 8 if shape == "270m" else 4
epochs = {"long": 75}.get(mode, 4 if shape == "270m" else 5)
if small and mode == "long":
    epochs = 3
rec = Recipe(lora_rank=rank, learning_rate=1e-4, epochs=epochs, batch_size=16)


def start(seed):
    return new_adapter(base, rank, T, seed=seed) if which == "new" else new_adapter(base.scorer(T, rank), seed=seed)


marks = []


def fit(seed):
    t = time.perf_counter()
    a, h, b = train_adapter(base, start(seed), rows, words, rec, seed=seed)
    return time.perf_counter() - t, a, h, b


cold, a, h, b = fit(0)
process = time.perf_counter() - t0
peak = stat()
row = dict(
    which=which,
    shape=shape,
    targets=targets,
    mode=mode,
    imports=round(t_import, 2),
    load=round(t_load, 2),
    load_peak=round(load_peak, 2),
    cold=round(cold, 2),
    process=round(process, 2),
    epoch=round(float(np.median(h.seconds[1:])), 4),
    first=round(float(h.seconds[0]), 2),
    peak=round(peak, 3),
    bytes=round(base.nbytes / 1e9, 3),
    lengths=[int(x) for x in b],
    loss=[round(float(x), 4) for x in h.loss[:2]],
)
if mode in ("cold",):
    w, a, h, b = fit(1)
    row["warm"] = round(w, 3)
    from importlib import import_module

    m = import_module("gemma_lora_sentiment.scoring" if which == "new" else "gemma_lora_sentiment.training")
    P = [p for p in rows.prompts[:100]]
    s = base if which == "new" else base.scorer(T, rank)
    for _ in range(4):
        t = time.perf_counter()
        m.score_labels(s, a, P, words, batch_size=64)
        row.setdefault("predict", []).append(round(time.perf_counter() - t, 4))
print("ROW", json.dumps(row), flush=True)
