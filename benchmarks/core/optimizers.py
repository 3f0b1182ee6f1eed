"""AdamW of optax against Keras's `stateless_apply`: compiling an update, and taking it.

    python -m benchmarks.core.optimizers [BASE] > optimizers.jsonl

The update alone, jitted, without a gradient of a model: of an adapter of rank 8 on all layers of BASE (by default
`mini_ko`), as arrays (the adapter's own) and as one vector, which is how a fit has it. Each way is compiled and run in
turn, five rounds of it; a line has the median seconds of lowering and compiling, of one update, and how many
operations the compiled program has.
"""

import json
import statistics
import sys
import time

import jax
import numpy as np
import optax

from gemma_lora_sentiment.adapter import new_adapter, stacked_lora
from gemma_lora_sentiment.backend import keras
from gemma_lora_sentiment.model import load_base, lora_targets

ROUNDS, UPDATES = 5, 50


def of_optax(arrays):
    adam = optax.adamw(1e-3, weight_decay=0.01)

    def update(arrays, state, gradients):
        directions, state = adam.update(gradients, state, arrays)
        return optax.apply_updates(arrays, directions), state

    return update, adam.init(arrays)


def of_keras(arrays):
    variables = [keras.Variable(array) for array in jax.tree.leaves(arrays)]
    adam = keras.optimizers.AdamW(1e-3, weight_decay=0.01, epsilon=1e-8)
    adam.build(variables)

    def update(arrays, state, gradients):
        leaves, structure = jax.tree.flatten(arrays)
        new, state = adam.stateless_apply(state, jax.tree.leaves(gradients), leaves)
        return jax.tree.unflatten(structure, new), state

    return update, [variable.value for variable in adam.variables]


def timed(make, arrays):  # seconds to compile, seconds of an update, operations of the program
    update, state = make(arrays)
    gradients = jax.tree.map(np.ones_like, arrays)
    started = time.perf_counter()
    program = jax.jit(update).lower(arrays, state, gradients).compile()
    compiled = time.perf_counter() - started
    arrays, state = jax.block_until_ready(program(arrays, state, gradients))
    started = time.perf_counter()
    for _ in range(UPDATES):
        arrays, state = program(arrays, state, gradients)
    jax.block_until_ready(arrays)
    taken = (time.perf_counter() - started) / UPDATES
    entry = program.as_text().split("ENTRY")[1]
    return compiled, taken, sum(" = " in line and "parameter(" not in line for line in entry.splitlines())


def main() -> None:
    base = load_base(sys.argv[1] if len(sys.argv) > 1 else "mini_ko")
    adapter = new_adapter(base, 8, lora_targets(base.config))
    lora = stacked_lora(adapter, base.config)
    vector = np.concatenate([np.asarray(array).reshape(-1) for array in jax.tree.leaves(lora)])
    ways = {(library, layout): (make, arrays)
            for layout, arrays in (("arrays", lora), ("one vector", vector))
            for library, make in (("optax", of_optax), ("keras", of_keras))}  # fmt: skip
    rounds = [{way: timed(*ways[way]) for way in ways} for _ in range(ROUNDS)]
    for (library, layout), of_rounds in ((way, [each[way] for each in rounds]) for way in ways):
        compiled, taken, operations = map(statistics.median, zip(*of_rounds, strict=True))
        line = {"optimizer": library, "layout": layout, "parameters": len(vector), "operations": operations,
                "compile": float(f"{compiled:.4g}"), "update": float(f"{taken:.4g}")}  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
