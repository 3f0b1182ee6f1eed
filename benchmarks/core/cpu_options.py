"""What XLA's options on a CPU cost and save: a step of `mini_ko` and its scoring, each option in a process of its own.

    python -m benchmarks.core.cpu_options OUT.jsonl [ROUNDS]

The step is that of `benchmarks.core.lines`, all layers, four lines. A line of OUT: the options, seconds that the step
took to compile with an empty cache, milliseconds of a step (the median of five rounds of ten), and seconds of scoring
2,000 comments of `sample` (the best of three).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIONS = (
    "", "--xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=1",
    "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)  # fmt: skip


def measured() -> dict:
    import numpy as np

    from gemma_lora_sentiment import GemmaLoraClassifier, read_comments
    from gemma_lora_sentiment.model import load_base, lora_targets

    from . import lines

    lines.compiler_options = lambda: None  # the flags alone
    base = load_base("mini_ko")
    step = lines.measure(base, lines.rows_of(24_000), lora_targets(base.config), 4, "all", False)
    comments = read_comments("sample").comment.tolist()
    comments += comments[: 2000 - len(comments)]
    clf, seconds = GemmaLoraClassifier(epochs=0).fit(["-", "-"], ["0", "1"]), []
    for _ in range(4):
        started = time.perf_counter()
        clf.predict_proba(comments)
        seconds.append(time.perf_counter() - started)
    return {"compile_seconds": step["compile_seconds"], "milliseconds": float(np.median(step["milliseconds"][1:])),
            "scoring_seconds": round(min(seconds[1:]), 3)}  # fmt: skip


def main() -> None:
    if sys.argv[1] == "--one":
        print(json.dumps(measured()))
        return
    with Path(sys.argv[1]).open("a", encoding="utf-8") as out:
        for number in range(int(sys.argv[2]) if len(sys.argv) > 2 else 1):
            for options in OPTIONS:
                with tempfile.TemporaryDirectory() as cache:
                    more = {"XLA_FLAGS": options, "GEMMA_LORA_SENTIMENT_CACHE": cache, "JAX_PLATFORMS": "cpu"}
                    command = [sys.executable, "-m", "benchmarks.core.cpu_options", "--one"]
                    done = subprocess.run(command, env=os.environ | more, stdout=subprocess.PIPE, check=True, text=True)
                line = {"options": options, "round": number, **json.loads(done.stdout.splitlines()[-1])}
                print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main()
