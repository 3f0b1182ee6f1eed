"""Keys turned for several fits in one program, against the CPU: which ways to write it XLA computes right.

    python -m benchmarks.core.turned_keys BASE

BASE has one key head, as gemma3_270m_gguf. One line for each way, shape (lines, tokens) and number of fits that differs
from the CPU by more than 2 %, with the largest difference of each fit. The stored output, turned_keys.txt, was made on
one H200 with jax 0.11.2 by a script that also tried queries, LoRA on keys, bfloat16 and two barriers (`before`,
`after`); `orig` there is `joined` here.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora_sentiment.gemma import project, rms_norm, rotary_angles
from gemma_lora_sentiment.model import load_base
from gemma_lora_sentiment.scoring import compiler_options

SHAPES = [(6, 80), (6, 96), (3, 160), (4, 112), (2, 96), (1, 192), (4, 48), (2, 64)]


def halves(x, cos, sin):
    cos, sin = (jnp.asarray(table)[:, None] for table in (cos, sin))
    first, second = jnp.split(x, 2, axis=-1)
    return first * cos - second * sin, second * cos + first * sin


def joined(x, cos, sin):
    return jnp.concatenate(halves(x, cos, sin), axis=-1)


def stacked(x, cos, sin):
    return jnp.stack(halves(x, cos, sin), axis=-2).reshape(x.shape)


def padded(x, cos, sin):
    first, second = halves(x, cos, sin)
    some, none = [(0, 0)] * (x.ndim - 1), first.shape[-1]
    return jnp.pad(first, [*some, (0, none)]) + jnp.pad(second, [*some, (none, 0)])


def rolled(x, cos, sin):
    cos, sin = np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)
    return x * cos[:, None] + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin[:, None]


def main(preset: str) -> None:
    base = load_base(preset, "float32")
    layer, epsilon = base.config.layers[0], base.config.norm_epsilon
    arrays = {name: np.asarray(array[0]) for name, array in base.arrays["groups"][0].items()
              if name in ("pre_attention_norm", "key", "key_norm")}  # fmt: skip
    arrays["embedding"] = np.asarray(base.arrays["embedding"][:4096])
    random, cpu = np.random.default_rng(0), jax.devices("cpu")[0]
    for way in (joined, stacked, padded, rolled):
        wrong = 0

        def keys(token_ids, arrays, way=way):
            x = rms_norm(arrays["embedding"][token_ids], arrays["pre_attention_norm"], epsilon)
            found = project(x, arrays["key"], "bld,kdh->blkh")
            found = rms_norm(found, arrays["key_norm"], epsilon) if "key_norm" in arrays else found
            return way(found, *rotary_angles(token_ids.shape[1], layer))

        for shape in SHAPES:
            for fits in (2, 5, 10):
                token_ids = np.broadcast_to(random.integers(0, 4096, shape), (fits, *shape)).copy()
                program = jax.jit(jax.vmap(keys, in_axes=(0, None)), compiler_options=compiler_options())
                found = np.asarray(program(token_ids, arrays))
                with jax.default_device(cpu):
                    wanted = np.asarray(jax.jit(keys)(token_ids[0], arrays))
                apart = np.abs(found - wanted).max(axis=(1, 2, 3, 4)) / np.abs(wanted).max()
                if apart.max() > 0.02:
                    wrong += 1
                    print(way.__name__, shape, f"{fits} fits", [f"{each:.0e}" for each in apart], flush=True)
        print(f"{way.__name__}: wrong in {wrong} of {3 * len(SHAPES)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
