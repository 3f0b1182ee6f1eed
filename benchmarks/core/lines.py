"""Steps by the lines that sixteen rows share, and by what is kept for the backward pass: seconds and planned bytes.

    python -m benchmarks.core.lines BASE none|int8|int4 qv|all OUT.jsonl

BASE is `gemma_2b` (random weights of that shape), `tiny`, a preset or a .gguf file. 300 rows of 26 to 85 tokens, 16 a
step, the lines as long as four epochs need them. `kept` says what a block keeps for the backward pass: all that takes a
product with the base to make again, all but the second of the two wide products, all but both, or nothing. A line of
OUT is one compiled step: `tokens` of it, `milliseconds` of each of six rounds, `planned` and `estimated` bytes beside
what it is given.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from gemma_lora_sentiment import gemma
from gemma_lora_sentiment.adapter import new_adapter, stacked_lora
from gemma_lora_sentiment.memory import memory_estimate
from gemma_lora_sentiment.model import load_base, lora_targets
from gemma_lora_sentiment.scoring import compiler_options, put
from gemma_lora_sentiment.training import (
    BatchSequence,
    LoraLayout,
    Packing,
    Recipe,
    Rows,
    first_state,
    step_config,
    step_numbers,
    train_step,
)

from ..shapes import SHAPES, random_base
from .joined import WORDS

LEFT_OUT = {"all": (), "not up": ("up",), "neither gate nor up": ("gate", "up"), "nothing": gemma.KEPT}


def keep(kept: str) -> None:
    "Let blocks keep this, whether the base is quantized or not."

    def names(config, *_):
        needed = {"attended": config.post_attention_norm, "fed": config.post_ffw_norm}
        left_out = {name for name, is_needed in needed.items() if not is_needed}.union(LEFT_OUT[kept])
        return jax.checkpoint_policies.save_only_these_names(*set(gemma.KEPT).difference(left_out))

    gemma._kept = names


def rows_of(vocabulary: int) -> Rows:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(6, 2.9, 300) + 20, 24, 83).astype(int)
    prompts = [np.array([2, *rng.integers(4, vocabulary, n - 1)], np.int32) for n in lengths]
    return Rows(prompts, [(20 + i % 2, 1) for i in range(300)], np.arange(300) % 2, np.ones(300, np.float32))


def milliseconds(program, state, *given) -> list[float]:
    rounds = []
    for _ in range(6):
        started = time.perf_counter()
        for _ in range(10):
            state, _ = program(state, *given)
        jax.block_until_ready(state)
        rounds.append(round((time.perf_counter() - started) * 100, 3))
    return rounds


def measure(base, rows: Rows, targets, lines: int, kept: str, apart: bool) -> dict:
    keep(kept)
    recipe = Recipe(lora_rank=8, learning_rate=1e-4, epochs=4, batch_size=16)
    packing = Packing.of(rows.lengths, 16, recipe.epochs, lines=lines)
    batches = BatchSequence(rows, (packing.length,), 16, packing=packing)
    adapter = new_adapter(base, recipe.lora_rank, targets)
    base.lay_out(apart)
    lora = stacked_lora(adapter, base.config)
    numbers = step_numbers(base, adapter, recipe, 76, 0.0, 0, WORDS)
    inputs, wanted, weights = batches[0]
    batch = put(base, {**inputs, "targets": wanted, "weights": weights}, rows=True, share=True)
    step = partial(train_step, config=step_config(base), layout=LoraLayout.of(lora), again=kept == "nothing")

    def measured_step(state, base, batch, numbers):
        return step(state, base, batch, numbers)

    state, started = put(base, first_state(lora)), time.perf_counter()
    jitted = jax.jit(measured_step, donate_argnums=0, compiler_options=compiler_options())
    program = jitted.lower(state, base.arrays, batch, numbers).compile()
    seconds, places = time.perf_counter() - started, packing.rows * 2
    estimate = memory_estimate(base, recipe.lora_rank, targets, lines, packing.length, places, kept == "nothing")
    return {
        "lines": lines, "length": packing.length, "tokens": lines * packing.length, "kept": kept, "apart": apart,
        "compile_seconds": round(seconds, 2), "planned": program.memory_analysis().temp_size_in_bytes,
        "estimated": estimate["activations"] + estimate["adapter"] // 2,
        "milliseconds": milliseconds(program, state, base.arrays, batch, numbers),
    }  # fmt: skip


def main() -> None:
    name, quantization, called, out = sys.argv[1:5]
    quantization = None if quantization == "none" else quantization
    base = random_base(name, "auto", quantization) if name in SHAPES else load_base(name, "auto", quantization)
    targets = ("query", "value") if called == "qv" else lora_targets(base.config)
    rows, large = rows_of(min(250_000, base.config.vocabulary_size)), name == "gemma_2b"
    what = [(lines, "all", large) for lines in (1, 2, 3, 4, 6, 8)]
    what += [(2, kept, large) for kept in list(LEFT_OUT)[1:]] if large else [(2, "all", True)]
    what = [each for each in what if each[0] == 2] if quantization else what
    with Path(out).open("a", encoding="utf-8") as file:
        for lines, kept, apart in what:
            found = {"base": name, "quantization": quantization, "targets": called}
            found |= {**measure(base, rows, targets, lines, kept, apart), "device": jax.devices()[0].device_kind}
            print(json.dumps(found), file=sys.stderr, flush=True)
            print(json.dumps(found), file=file, flush=True)


if __name__ == "__main__":
    main()
