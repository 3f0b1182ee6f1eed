"""Gradients and seconds of a step: LoRA's products joined and apart, one fit and three in one program.

    python -m benchmarks.core.joined BASE

Random adapters and tokens over the weights of BASE, a preset or a .gguf file, in float32 with exact products. For each
way, the largest difference of a gradient to that of one fit with products apart, over the largest gradient of its
array, with that array's name, for each of three fits; then the milliseconds of a step. The stored output, joined.txt,
was made on one H200 with jax 0.11.2 over random weights of Gemma 3 270M's shape, by a script that took no times.
joined_steps.jsonl has times of the prototype there, in bfloat16, before the vocabulary was divided: whole, one kernel
of its gradient took 1.04 of 11.2 ms.
"""

import sys
import time
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from gemma_lora_sentiment.adapter import new_adapter, stacked_lora
from gemma_lora_sentiment.model import load_base, lora_targets
from gemma_lora_sentiment.prompt import LabelWords
from gemma_lora_sentiment.scoring import compiler_options
from gemma_lora_sentiment.training import RECIPES, LoraLayout, first_state, step_numbers, train_step

SHAPES = {"all": [(6, 112, 8), (3, 160, 12)], "q and v": [(6, 96, 8)]}  # lines, tokens of a line, positions of a line
WORDS = LabelWords(("0", "1"), ("0", "1"), ((20,), (21,)), (1,))


def fit(base, targets, seed, shape):  # layout, and what a step takes beside the base
    rng, (lines, length, places) = np.random.default_rng(seed), shape
    adapter = new_adapter(base, 8, targets, seed=seed)
    arrays = {path: rng.normal(0, 0.02, array.shape).astype(np.float32) for path, array in adapter.arrays.items()}
    adapter = replace(adapter, arrays=arrays)
    lora, numbers = (
        stacked_lora(adapter, base.config),
        step_numbers(base, adapter, RECIPES["gemma"], 500, 0.0, 0, WORDS),
    )
    batch = {
        "token_ids": rng.integers(4, base.config.vocabulary_size, (lines, length)).astype(np.int32),
        "padding_mask": np.tile(np.repeat(np.arange(1, 5, dtype=np.int32), length // 4), (lines, 1)),
        "positions": np.tile(np.arange(places, dtype=np.int32) * (length // places), (lines, 1)),
        "targets": rng.integers(20, 22, (lines, places)).astype(np.int32),
        "weights": np.ones((lines, places), np.float32),
    }
    return LoraLayout.of(lora), (first_state(lora), batch, numbers)


def milliseconds(program, arguments, steps=20):
    jax.block_until_ready(program(*arguments))
    started = time.perf_counter()
    jax.block_until_ready([program(*arguments) for _ in range(steps)])
    return (time.perf_counter() - started) / steps * 1e3


def gradients(layout, state):  # name of an array -> a tenth of its gradients, as Adam's first moment holds them
    leaves = jax.tree_util.tree_leaves_with_path(layout.cut(np.asarray(state["adam"].mu)))
    return {jax.tree_util.keystr(path): np.asarray(array) for path, array in leaves}


def compare(base, called, targets, shape):
    fits = [fit(base, targets, seed, shape) for seed in range(3)]
    layout, expected = fits[0][0], None
    together = jax.tree.map(lambda *each: np.stack(each), *[given for _, given in fits])
    for on_gpu in (False, True):
        step = partial(train_step, config=replace(base.config, on_gpu=on_gpu), layout=layout)
        one = jax.jit(step, compiler_options=compiler_options())
        many = jax.jit(jax.vmap(step, in_axes=(0, None, 0, 0)), compiler_options=compiler_options())
        alone = [gradients(layout, one(given[0], base.arrays, *given[1:])[0]) for _, given in fits]
        mapped = many(together[0], base.arrays, *together[1:])[0]
        mapped = [
            gradients(layout, {"adam": jax.tree.map(lambda array, i=i: array[i], mapped["adam"])}) for i in range(3)
        ]
        expected = expected or alone
        for way, found in {"alone": alone, "mapped": mapped}.items():
            apart = [max((float(abs(each[name] - array).max() / abs(array).max()), name) for name, array in of.items())
                     for each, of in zip(found, expected, strict=True)]  # fmt: skip
            program, given = (one, fits[0][1]) if way == "alone" else (many, together)
            spent = milliseconds(program, (given[0], base.arrays, *given[1:]))
            words = ", ".join(f"{difference:.1e} {name}" for difference, name in apart)
            print(called, shape, way, "joined" if on_gpu else "apart", words, f"{spent:.2f} ms", flush=True)


def main() -> None:
    base = load_base(sys.argv[1], "float32")
    with jax.default_matmul_precision("highest"):
        for called, shapes in SHAPES.items():
            targets = lora_targets(base.config) if called == "all" else ("query", "value")
            for shape in shapes:
                compare(base, called, targets, shape)


if __name__ == "__main__":
    main()
