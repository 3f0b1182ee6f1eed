"""Sizes, rows and weights of a run that needs no account: all three are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from statistics import NormalDist
from typing import Any

import numpy as np

SHAPES = {  # arguments of KerasHub's GemmaBackbone
    "tiny": dict(
        vocabulary_size=300, num_layers=2, num_query_heads=2, num_key_value_heads=1, hidden_dim=32,
        intermediate_dim=64, head_dim=16,
    ),
    "mini_ko": dict(
        vocabulary_size=24_000, num_layers=4, num_query_heads=6, num_key_value_heads=1, hidden_dim=384,
        intermediate_dim=1536, head_dim=64,
    ),
    "gemma_2b": dict(
        vocabulary_size=256_000, num_layers=18, num_query_heads=8, num_key_value_heads=1, hidden_dim=2048,
        intermediate_dim=32_768, head_dim=256,
    ),
}  # fmt: skip


def block_parameters(
    shape: Mapping[str, int],  # one of SHAPES
) -> int:  # numbers in the weights of all decoder blocks together
    "Weights that every token is multiplied with; KerasHub's `intermediate_dim` counts gate and value together."
    hidden, heads = shape["hidden_dim"], shape["num_query_heads"] + shape["num_key_value_heads"]
    attention = 2 * hidden * heads * shape["head_dim"]  # query and output, key and value
    return shape["num_layers"] * (attention + 3 * hidden * shape["intermediate_dim"] // 2)


_TEMPLATE_TOKENS, _COMMENT_TOKENS, _SPREAD, LONGEST = 10, 27.6, 0.366, 85


def draw_lengths(
    n: int,  # rows
    seed: int = 0,
) -> np.ndarray:  # int (n,), tokens of a row: prompt, label and `<eos>`
    "Lengths like those of the tutorial's comments in its template."
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])
    comment = _COMMENT_TOKENS * np.exp(_SPREAD * quantiles - _SPREAD**2 / 2)
    lengths = np.clip(np.round(_TEMPLATE_TOKENS + comment), 4, LONGEST).astype(int)
    return np.random.default_rng([seed, n]).permutation(lengths)


@dataclass(frozen=True)
class BenchmarkSettings:
    """What a run of the benchmark measures."""

    shape: str = "mini_ko"  # a name in `SHAPES`
    rows: int = 300  # to train on
    predict_rows: int = 100
    score_rows: int = 3_000  # the long file
    batch_size: int = 16  # rows a step, of ours and of PEFT
    epochs: int = 5
    lora_rank: int = 4
    dtype: str = "auto"  # of ours and of PEFT; "auto": bfloat16 on a GPU, float32 on a CPU
    quantization: str | None = None  # of ours: None, "int8", "int4", or "auto": the first that fits
    length: int = 512  # tokens that the tutorial's recipe pads every row to
    file: str | None = None  # comments to take the rows from
    seed: int = 0
    time_limit: float = 180.0  # seconds a process
    memory_limit: float | None = None  # GB of GPU memory that a process may take


EOS, BOS, LABEL_IDS, FIRST_FREE = 1, 2, (10, 11), 20


def random_prompts(lengths: np.ndarray, vocabulary_size: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng([seed, 1])
    return [[BOS, *rng.integers(FIRST_FREE, vocabulary_size, int(n) - 3).tolist()] for n in lengths]


def _file_prompts(file: str, vocabulary_size: int) -> list[list[int]]:
    from gemma_lora_sentiment.data import read_comments
    from gemma_lora_sentiment.prompt import PromptTemplate, TextTokenizer, encode_prompts

    assets = files("gemma_lora_sentiment") / "bases" / "mini_ko" / "assets" / "tokenizer"
    tokenizer = TextTokenizer((assets / "vocabulary.spm").read_bytes())
    comments = read_comments(file, labelled=False).comment
    encoded = encode_prompts(comments, tokenizer, PromptTemplate(), max_length=512, response_length=2)
    free = vocabulary_size - FIRST_FREE
    return [[BOS, *(FIRST_FREE + ids[1:] % free).tolist()] for ids in encoded.token_ids]


def benchmark_rows(
    settings: BenchmarkSettings,
) -> dict[str, Any]:  # train, predict, score: prompts as lists of token ids; labels: 0 or 1 of each row of train
    "The rows that every system is given. Raises `DataError` for a file that cannot be read."
    vocabulary_size = SHAPES[settings.shape]["vocabulary_size"]
    rng = np.random.default_rng([settings.seed, 2])
    rows: dict[str, Any] = {"labels": rng.integers(0, 2, settings.rows).tolist()}
    of_file = _file_prompts(settings.file, vocabulary_size) if settings.file else None
    sizes = {"train": settings.rows, "predict": settings.predict_rows, "score": settings.score_rows}
    for number, (name, n) in enumerate(sizes.items()):
        if of_file:  # a short file is repeated
            rows[name] = [of_file[i % len(of_file)] for i in range(n)]
        else:
            lengths = draw_lengths(n, settings.seed + number)
            rows[name] = random_prompts(lengths, vocabulary_size, settings.seed + number)
    return rows


def token_count(rows: Mapping[str, Any]) -> int:  # of the training rows, label and `<eos>` included
    return sum(len(prompt) + 2 for prompt in rows["train"])


def random_base(
    shape: str,  # a name in SHAPES
    dtype: str = "auto",  # see choose_dtype
    quantization: str | None = None,  # None, "int8" or "int4", or "auto": see choose_quantization
    **needs: int,  # rank, batch_size, length: what a step must hold, for "auto"
) -> Any:  # Base with a tokenizer that is empty
    "A base of this shape, its weights drawn on the device. Raises `ModelError` for an unknown dtype."
    from gemma_lora_sentiment.backend import choose_dtype, jax
    from gemma_lora_sentiment.gemma import LORA_LAYERS, OUTSIDE, array_name, array_shapes, block_shapes, gemma_config
    from gemma_lora_sentiment.model import Base, complete_arguments, quantized_kernel
    from gemma_lora_sentiment.precision import choose_quantization

    dtype = choose_dtype(dtype)[0]
    if quantization == "auto":
        found = ("Gemma", SHAPES[shape])
        quantization = choose_quantization(f"Shape {shape}", dtype, found=found, **needs)[0]
    arguments = complete_arguments("Gemma", SHAPES[shape])
    config = gemma_config("Gemma", arguments)
    shapes = array_shapes(config)
    numbers = {path: number for number, path in enumerate(shapes)}

    draw = jax.jit(_scaled_normal, static_argnums=(1, 2, 3))  # a program a shape
    put = jax.jit(lambda whole, place, one: whole.at[place].set(one), donate_argnums=0)

    def drawn(path: str) -> Any:  # jax.Array
        sizes = shapes[path]
        fan_in = sizes[-1] if path.endswith("embeddings") else sizes[-2] if len(sizes) > 1 else 0
        return draw(jax.random.key(numbers[path], impl="rbg"), sizes, dtype, fan_in)

    def stacked(paths: list[str]) -> Any:  # of jax.Array, (len(paths), ...); nothing is on the device twice
        if quantization and array_name(paths[0]) in LORA_LAYERS:
            parts = [quantized_kernel(path, np.asarray(drawn(path)), quantization)[0] for path in paths]
            return jax.tree.map(lambda *each: jax.numpy.asarray(np.stack(each)), *parts)
        whole = jax.numpy.zeros((len(paths), *shapes[paths[0]]), dtype)
        for place, path in enumerate(paths):
            whole = put(whole, place, drawn(path))
        return whole

    laid: dict[str, Any] = {name: drawn(path) for path, name in OUTSIDE.items() if path in shapes}
    laid["groups"] = [
        {array_name(path): stacked([f"decoder_block_{i}/{path}" for i in range(first, end)])
         for path in block_shapes(config, config.layers[first])}
        for first, end in config.groups
    ]  # fmt: skip
    return Base(f"random {shape}", config, laid, b"", dtype, shape, arguments, quantization)


def base_of(settings: BenchmarkSettings) -> Any:  # Base
    needs = {"rank": settings.lora_rank, "batch_size": settings.batch_size, "length": LONGEST}
    return random_base(settings.shape, settings.dtype, settings.quantization, **needs)


def _scaled_normal(key: Any, shape: tuple[int, ...], dtype: str, fan_in: int) -> Any:  # jax.Array
    import jax

    if not fan_in:  # scale of a norm, to which Gemma adds 1
        return jax.numpy.zeros(shape, dtype)
    return jax.random.normal(key, shape, dtype) * fan_in**-0.5
