"""The forward pass against KerasHub's in float32, and against itself: scanned, packed, divided, mapped, quantized."""

import gc
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from gemma_lora_sentiment import gemma, model
from gemma_lora_sentiment.adapter import (
    load_adapter,
    lora_scales,
    new_adapter,
    save_adapter,
    stacked_lora,
    unstacked_lora,
)
from gemma_lora_sentiment.backend import without_tensorflow
from gemma_lora_sentiment.gemma import (
    LORA_LAYERS,
    GemmaConfig,
    array_name,
    array_shapes,
    feed_forward,
    hidden_at,
    logits_of,
    project,
    stacked,
    unpack,
    with_scales,
)
from gemma_lora_sentiment.model import jax, keras, keras_nlp, load_base, lora_targets, quantized_kernel, tiny_gemma
from gemma_lora_sentiment.scoring import lend
from gemma_lora_sentiment.training import LoraLayout, first_state, train_step

jnp = jax.numpy
FAMILIES = ("gemma", "gemma2", "gemma3", "gemma4")
MODELS = {  # family, and what differs from the tiny one; all have blocks that are stacked
    "gemma": ("gemma", dict(num_layers=3)),
    "gemma2": ("gemma2", dict(num_layers=3, num_query_heads=4, num_key_value_heads=2)),
    "gemma2 scaled as 27B": ("gemma2", dict(num_layers=3, head_dim=8, query_head_dim_normalize=False)),
    "gemma3": ("gemma3", dict(num_layers=7, global_rope_scaling_factor=8.0)),
    "gemma3 scaled as 27B": ("gemma3", dict(num_layers=3, head_dim=8, query_head_dim_normalize=False)),
    "gemma3 without its q and k norms": ("gemma3", dict(num_layers=3, use_query_key_norm=False)),
    "gemma4": ("gemma4", dict(  # the last three take keys and values of the first two; two of them are stacked
        num_layers=5, num_kv_shared_layers=3, layer_types=[
            "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "full_attention"
        ],
    )),
    "gemma4 with experts": ("gemma4", dict(
        num_layers=3, num_kv_shared_layers=0, sliding_window_pattern=3, hidden_size_per_layer_input=0,
        use_double_wide_mlp=False, enable_moe_block=True, num_experts=4, num_experts_per_token=2,
        expert_intermediate_dim=24,
    )),
    "gemma4 whose keys are values": ("gemma4", dict(
        num_layers=3, num_kv_shared_layers=0, sliding_window_pattern=3, hidden_size_per_layer_input=0,
        use_double_wide_mlp=False, num_query_heads=4, num_key_value_heads=2, num_global_key_value_heads=1,
    )),
}  # fmt: skip

# The others hold every part of these: CI tries them alone, `-m slow` the rest.
BY_HAND = ("gemma2", "gemma3 scaled as 27B", "gemma3 without its q and k norms")
# Against KerasHub, CI tries every family; against itself, Gemma 3 and 4, whose blocks hold what those of the others do.
SMALL_BY_HAND = ("gemma", "gemma2")


def some(names, by_hand):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in by_hand else []) for name in names]


@pytest.fixture(scope="module", params=some(MODELS, BY_HAND))
def folder(request, tmp_path_factory):
    family, arguments = MODELS[request.param]
    return tiny_gemma(tmp_path_factory.mktemp("gemma") / request.param.replace(" ", "_"), family, 5, **arguments)


@pytest.fixture(scope="module", params=some(FAMILIES, SMALL_BY_HAND))
def small(request, tmp_path_factory):
    """One of each family, of a few blocks."""
    arguments = MODELS["gemma4"][1] if request.param == "gemma4" else dict(num_layers=3)
    return tiny_gemma(tmp_path_factory.mktemp(request.param) / request.param, request.param, 5, **arguments)


def inputs_of(length=24, n=2, padded=0, seed=0):  # longer than the sliding window of 16
    rng = np.random.default_rng(seed)
    ids = np.concatenate([np.full((n, 1), 2), rng.integers(4, 200, (n, length - 1))], axis=1).astype(np.int32)
    mask = np.ones_like(ids)
    if padded:
        ids[-1, -padded:], mask[-1, -padded:] = 0, 0
    return {"token_ids": ids, "padding_mask": mask}


def moved(adapter, seed=1, size=0.1):
    """The adapter with both factors away from zero."""
    rng = np.random.default_rng(seed)
    arrays = {path: a + rng.normal(0, size, a.shape).astype(np.float32) for path, a in adapter.arrays.items()}
    return replace(adapter, arrays=arrays)


def full(base, rank=3, alpha=5.0):
    """Of all layers that can carry LoRA, away from zero."""
    return moved(new_adapter(base, rank, lora_targets(base.config), alpha))


def without(config):
    return [{} for _ in config.groups]


def run(arrays, lora, batch, config, function=hidden_at):
    return np.asarray(jax.jit(function, static_argnums=(3,))(arrays, lora, batch, config), np.float32)


def hidden_and_gradients(adapter, batch, weights, config, arrays):
    """Hidden states, and gradients of their weighted sum by path: of one program."""
    scales = lora_scales(adapter, config)

    def loss(lora, arrays):
        hidden = hidden_at(arrays, with_scales(lora, scales), batch, config)
        return (hidden.astype(jnp.float32) * weights).sum(), hidden

    found, hidden = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(stacked_lora(adapter, config), arrays))
    return hidden, unstacked_lora(found, adapter, config)


def laid(base, apart):
    config = replace(base.config, apart=apart)
    return stacked(dict(base.weights()), config), config


def close(ours, theirs, share, where=True):
    """Largest difference over largest value."""
    ours, theirs = (np.where(where, np.asarray(array, np.float64), 0) for array in (ours, theirs))
    assert np.isfinite(ours).all() and np.abs(theirs).max() > 0
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert difference <= share, difference


# --- against KerasHub


def keras_backbone(folder, dtype="float32"):
    with without_tensorflow():
        backbone = keras_nlp.models.Backbone.from_preset(folder, dtype=dtype)
    for block in backbone.transformer_layers:  # KerasHub 0.32 builds every block as if this were True
        block.attention.query_head_dim_normalize = backbone.query_head_dim_normalize
    return backbone


def keras_inputs(backbone, batch):
    given = {name: batch[name] for name in ("token_ids", "padding_mask")}
    if type(backbone).__name__ == "Gemma4Backbone":
        n, length = given["token_ids"].shape
        given["position_ids"] = np.tile(np.arange(length, dtype=np.int32), (n, 1))
    return given


@pytest.fixture(scope="module")
def theirs(folder):
    """What KerasHub's backbone holds and computes, by itself and with LoRA: arrays, hidden states, gradients."""
    backbone, base, batch = keras_backbone(folder), load_base(folder), inputs_of(padded=5)
    given, adapter = keras_inputs(backbone, batch), full(base, alpha=10.0)
    found = {"arrays": {variable.path: np.array(variable.value) for variable in backbone.variables}}
    found["count"] = backbone.count_params()
    backbone.enable_lora(3, list(adapter.targets))
    variables = {variable.path: variable for variable in backbone.variables if "lora_kernel" in variable.path}
    assert {path: tuple(v.shape) for path, v in variables.items()} == {p: a.shape for p, a in adapter.arrays.items()}
    for layer in backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            layer.lora_alpha = adapter.alpha
    shape = (*batch["token_ids"].shape, base.config.hidden_dim)
    weights = np.random.default_rng(2).normal(0, 1, shape).astype(np.float32) * batch["padding_mask"][..., None]

    def loss(values):
        with keras.StatelessScope(state_mapping=[(variables[path], value) for path, value in values.items()]):
            hidden = backbone(given)
        return (hidden * weights).sum(), hidden

    program = jax.jit(jax.grad(loss, has_aux=True))
    found["gradients"], found["hidden"] = jax.device_get(program(adapter.arrays))
    nothing = {path: np.zeros_like(array) for path, array in adapter.arrays.items()}  # added to the kernels
    found["plain"] = np.asarray(program(nothing)[1])
    return {**found, "batch": batch, "adapter": adapter, "weights": weights}


@pytest.fixture(scope="module")
def ours(folder, theirs):
    """What our blocks, stacked, compute with the same adapter: hidden states and gradients."""
    base = load_base(folder)
    return hidden_and_gradients(theirs["adapter"], theirs["batch"], theirs["weights"], base.config, base.arrays)


def test_the_arrays_are_keras_hubs(folder, theirs):
    base = load_base(folder)
    assert array_shapes(base.config) == {path: array.shape for path, array in theirs["arrays"].items()}
    found = dict(base.weights())
    assert list(found) == list(array_shapes(base.config))
    for path, array in theirs["arrays"].items():
        np.testing.assert_array_equal(found[path], array)
    assert any(end - first > 1 for first, end in base.config.groups), "else nothing is scanned"
    assert base.parameter_count == theirs["count"]


def test_hidden_states_are_keras_hubs(folder, theirs, ours):
    base, batch = load_base(folder), theirs["batch"]
    where = batch["padding_mask"][..., None] > 0
    close(run(base.arrays, without(base.config), batch, base.config), theirs["plain"], 1e-5, where)
    close(ours[0], theirs["hidden"], 1e-5, where)
    assert np.abs(theirs["hidden"] - theirs["plain"]).max() > 0.1, "the adapter does something"


def test_lora_gradients_are_keras_hubs(theirs, ours):
    _, gradients = ours
    assert gradients.keys() == theirs["gradients"].keys()
    for path, expected in theirs["gradients"].items():
        close(gradients[path], expected, 1e-4)


def test_an_embedding_of_each_layer_with_a_vocabulary_of_its_own(tmp_path):
    """Gemma 4 names its size by itself."""
    folder = tiny_gemma(tmp_path, "gemma4", 5, vocab_size_per_layer_input=400)
    backbone, base, batch = keras_backbone(folder), load_base(folder), inputs_of()
    close(
        run(base.arrays, without(base.config), batch, base.config),
        jax.jit(backbone)(keras_inputs(backbone, batch)),
        1e-5,
    )
    assert base.parameter_count == backbone.count_params()


def test_gemma4_layers_of_named_kinds_and_rotary_numbers(tmp_path):
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention",
             "full_attention"]  # fmt: skip
    folder = tiny_gemma(
        tmp_path, "gemma4", 5, num_layers=6, num_kv_shared_layers=0, layer_types=kinds, global_rope_wavelength=5e5,
        local_rope_wavelength=2e4, global_rope_scaling_factor=2.0, local_rope_scaling_factor=1.5,
        attention_logit_soft_cap=20.0,
    )  # fmt: skip
    backbone, base, batch = keras_backbone(folder), load_base(folder), inputs_of()
    close(
        run(base.arrays, without(base.config), batch, base.config),
        jax.jit(backbone)(keras_inputs(backbone, batch)),
        1e-5,
    )


# --- against itself


def test_scanned_blocks_are_blocks_one_after_another(folder, theirs, ours):
    base = load_base(folder)
    arrays, config = laid(base, True)
    assert len(config.groups) == len(config.layers) > len(base.config.groups)
    hidden, gradients = hidden_and_gradients(theirs["adapter"], theirs["batch"], theirs["weights"], config, arrays)
    close(hidden, ours[0], 1e-5)
    for path, expected in ours[1].items():
        close(gradients[path], expected, 1e-4)


def test_products_joined_for_a_gpu_are_those_apart(folder, theirs, ours):
    base = load_base(folder)
    config = replace(base.config, on_gpu=True)
    hidden, gradients = hidden_and_gradients(theirs["adapter"], theirs["batch"], theirs["weights"], config, base.arrays)
    close(hidden, ours[0], 1e-5)
    for path, expected in ours[1].items():
        close(gradients[path], expected, 1e-4)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_logits_of_a_divided_vocabulary_are_those_of_the_whole(cap):
    rng = np.random.default_rng(0)
    hidden, rows = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 8), (64 * 5, 8)))
    weights = rng.normal(size=(2, 3, 64 * 5)).astype(np.float32)
    found = {}
    for on_gpu in (False, True):
        config = GemmaConfig("Gemma", 320, 8, (), 1.0, logit_cap=cap, on_gpu=on_gpu)

        def loss(hidden, config=config):
            logits = logits_of({"embedding": rows}, hidden, config)
            return (logits * weights).sum(), logits

        found[on_gpu] = jax.grad(loss, has_aux=True)(hidden)
    for ours, expected in zip(*(jax.tree.leaves(found[on_gpu]) for on_gpu in (True, False)), strict=True):
        close(ours, expected, 1e-5)


def pairs(others, in_ci):
    """Of a family and something that does not depend on it: CI tries some, `-m slow` the rest."""
    every = [(family, other) for family in FAMILIES for other in others]
    return [pytest.param(*pair, marks=[] if pair in in_ci else [pytest.mark.slow]) for pair in every]


PAIRS = pairs((None, "int8", "int4"), [("gemma3", None), ("gemma4", "int4")])


@pytest.mark.parametrize("small, quantization", PAIRS, indirect=["small"])
def test_a_base_laid_out_anew_keeps_its_bits(quantization, small, monkeypatch):
    monkeypatch.setattr(model, "_BASES", {})  # a base of its own
    base, batch = load_base(small, quantization=quantization), inputs_of()
    adapter = full(base)

    def bits():
        return {jax.tree_util.keystr(place): np.asarray(array).tobytes()
                for place, array in jax.tree_util.tree_flatten_with_path(base.arrays)[0]}  # fmt: skip

    before, nbytes = bits(), base.nbytes
    expected = run(base.arrays, lend(base, adapter), batch, base.config)
    base.lay_out(True)
    assert len(base.arrays["groups"]) == len(base.config.layers) and base.nbytes == nbytes
    close(run(base.arrays, lend(base, adapter), batch, base.config), expected, 1e-5)
    base.lay_out(False)
    assert bits() == before


def test_rows_that_share_a_line_are_computed_as_if_alone(folder):
    base, rng = load_base(folder), np.random.default_rng(3)
    rows = [np.array([2, *rng.integers(4, 200, n)], np.int32) for n in (8, 19, 13)]
    line, numbers, start = np.zeros((1, 48), np.int32), np.zeros((1, 48), np.int32), 0
    lora = lend(base, full(base))
    for i, row in enumerate(rows):
        line[0, start : start + len(row)], numbers[0, start : start + len(row)] = row, i + 1
        start += len(row)
    together = run(base.arrays, lora, {"token_ids": line, "padding_mask": numbers}, base.config)[0]
    padded, mask = np.zeros((3, 24), np.int32), np.zeros((3, 24), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)], mask[i, : len(row)] = row, 1
    alone = run(base.arrays, lora, {"token_ids": padded, "padding_mask": mask}, base.config)
    for i, row in enumerate(rows):
        close(together[numbers[0] == i + 1], alone[i, : len(row)], 1e-5)


PLACES = np.array([[3, 20], [22, 0]], np.int32)


def picked(array, places=PLACES):
    return np.take_along_axis(np.asarray(array), places[..., None], axis=1)


@pytest.mark.parametrize("small, quantization", PAIRS, indirect=["small"])
def test_the_last_block_at_few_positions_is_the_whole_one_there(quantization, small, monkeypatch):
    base, batch = load_base(small, quantization=quantization), inputs_of()
    lora, seen, usual = lend(base, full(base)), [], gemma.block

    def watched(*arguments):
        outputs = usual(*arguments)
        seen.append(outputs[0].shape[1])
        return outputs

    monkeypatch.setattr(gemma, "block", watched)
    given = {**batch, "positions": PLACES}
    at_few = run(base.arrays, lora, given, base.config, lambda *inputs: hidden_at(*inputs))  # traced anew
    assert seen[-1] == 2 and set(seen[:-1]) == {24}, "else nothing was left out, and this says nothing"
    at_all = run(base.arrays, lora, batch, base.config)
    close(at_few, picked(at_all), 1e-5)
    many = np.tile(np.arange(20, dtype=np.int32), (2, 1))
    close(run(base.arrays, lora, {**batch, "positions": many}, base.config), picked(at_all, many), 1e-5)


@pytest.mark.parametrize("small", some(FAMILIES, [*SMALL_BY_HAND, "gemma4"]), indirect=True)  # float32: see above
def test_the_last_block_in_float16(small):
    base, batch = load_base(small, "float16"), inputs_of()
    lora = lend(base, full(base))
    whole = picked(run(base.arrays, lora, batch, base.config))
    np.testing.assert_allclose(run(base.arrays, lora, {**batch, "positions": PLACES}, base.config), whole, atol=0.02)


def test_gradients_are_those_of_the_whole_last_block(small):
    base, batch = load_base(small), inputs_of()
    adapter = full(base)
    scales, groups = lora_scales(adapter, base.config), stacked_lora(adapter, base.config)

    def at_few(lora, arrays, again):
        given = {**batch, "positions": PLACES}
        return (hidden_at(arrays, with_scales(lora, scales), given, base.config, again) ** 2).mean()

    def of_all(lora, arrays):
        hidden = hidden_at(arrays, with_scales(lora, scales), batch, base.config)
        return (jnp.take_along_axis(hidden, PLACES[..., None], axis=1) ** 2).mean()

    whole = jax.tree.leaves(jax.jit(jax.grad(of_all))(groups, base.arrays))
    for again in (False, True):
        found = jax.tree.leaves(jax.jit(jax.grad(at_few), static_argnums=2)(groups, base.arrays, again))
        for ours, expected in zip(found, whole, strict=True):
            close(ours, expected, 1e-4)


@pytest.mark.parametrize("family, groups", [  # blocks of one kind, and turns of six, are no more than turns of two
    pytest.param("gemma", 2, marks=pytest.mark.slow), ("gemma2", 2), pytest.param("gemma3", 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_deeper_base_is_no_more_to_trace(family, groups, tmp_path, monkeypatch):
    """Gemma 2 and 3 alternate local and global attention; both kinds are one body."""
    traced, usual = [], gemma.block
    monkeypatch.setattr(gemma, "block", lambda *arguments: traced.append(1) or usual(*arguments))
    counts = {}
    for layers in (6, 12):
        base = load_base(tiny_gemma(tmp_path / str(layers), family, num_layers=layers))
        assert len(base.config.groups) == groups
        for apart in (False, True):
            arrays, config = laid(base, apart)
            traced.clear()
            given = {**inputs_of(), "positions": PLACES}
            jax.jit(hidden_at, static_argnums=(3,)).lower(arrays, without(config), given, config)
            counts[layers, apart] = len(traced)
    assert counts[6, False] == counts[12, False] <= 4 and (counts[6, True], counts[12, True]) == (6, 12)


def test_each_layer_has_its_own_alpha_and_rank(tmp_path):
    """Layers of one stack may differ in both: zeros fill the stack, and W + scale x AB is what is computed."""
    base, batch = load_base(tiny_gemma(tmp_path, num_layers=4)), inputs_of()
    ranks = {f"decoder_block_{i}/attention/query": (1 + i, 2.0 + i) for i in (0, 1, 3)}
    ranks["decoder_block_2/ffw_linear"] = (2, 0.5)
    adapter = moved(new_adapter(base, ranks, ("query", "ffw_linear"), alpha=3.0))
    assert {path.rsplit("/", 1)[0] for path in adapter.arrays} == set(ranks)
    merged = dict(base.weights())
    for path, (_, divisor) in ranks.items():
        a, b = (adapter.arrays[f"{path}/lora_kernel_{which}"] for which in "ab")
        merged[f"{path}/kernel"] = merged[f"{path}/kernel"] + 3.0 / divisor * (a @ b)
    expected = run(stacked(merged, base.config), without(base.config), batch, base.config)
    close(run(base.arrays, lend(base, adapter), batch, base.config), expected, 1e-5)
    untouched = run(base.arrays, without(base.config), batch, base.config)
    assert np.abs(untouched - expected).max() > 1e-2
    back = unstacked_lora(stacked_lora(adapter, base.config), adapter, base.config)
    assert all(np.array_equal(back[path], array) for path, array in adapter.arrays.items())


def test_adapters_of_blocks_without_keys_come_back(tmp_path):
    """The last three blocks of this Gemma 4 have no keys and values of their own."""
    base = load_base(tiny_gemma(tmp_path / "base", "gemma4", 5, **MODELS["gemma4"][1]))
    adapter = full(base)
    keys = [path for path in adapter.arrays if "/attention/key/" in path]
    assert len(keys) == 2 * 2
    save_adapter(tmp_path / "saved", adapter, base.preset)
    back = load_adapter(tmp_path / "saved", base)
    assert back.rank == 3 and back.arrays.keys() == adapter.arrays.keys()
    assert all(np.array_equal(back.arrays[path], array) for path, array in adapter.arrays.items())


# --- what is kept for the backward pass


def residuals(function, *arguments):
    """Shapes and formats alone: nothing is computed."""
    return jax.tree.leaves(jax.eval_shape(lambda *given: jax.vjp(function, *given)[1], *arguments))


def test_the_activation_is_not_kept_for_the_backward_pass(tmp_path):
    """Of what a block keeps, arrays as wide as the feed-forward part are gate and value alone."""
    base, batch = load_base(tiny_gemma(tmp_path, num_layers=3, intermediate_dim=208)), inputs_of(24)
    arrays, config = laid(base, True)
    adapter = full(base)
    lora, scales = stacked_lora(adapter, config), lora_scales(adapter, config)

    def hidden(lora, again=False):
        return hidden_at(arrays, with_scales(lora, scales), batch, config, again)

    def wide(leaves):
        return [leaf.shape for leaf in leaves if leaf.shape == (2, 24, 104)]

    assert len(wide(residuals(hidden, lora))) == 2 * 3
    assert not wide(residuals(lambda lora: hidden(lora, again=True), lora))
    x = np.random.default_rng(0).normal(size=(2, 24, 32)).astype(np.float32)
    gate, up, down = (np.ones(shape, np.float32) for shape in ((32, 104), (32, 104), (104, 32)))
    plain = residuals(lambda x: feed_forward(x, lambda x: (x @ gate, x @ up), lambda x: x @ down), x)
    assert len(wide(plain)) > 2, "by itself it keeps more, so this can fail"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantized_kernel_is_unpacked_in_the_backward_pass_too(quantization, monkeypatch):
    """No unpacked kernel is carried from the forward to the backward pass."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 48)).astype(np.float32), rng.normal(size=(48, 32)).astype(np.float32)
    parts, _ = quantized_kernel("decoder_block_0/ffw_gating/kernel", kernel, quantization)
    parts = jax.tree.map(jnp.asarray, parts)

    def carried():
        leaves = residuals(lambda x: project(x, parts, "bld,df->blf", kernel.shape), x)
        return [leaf for leaf in leaves if leaf.size == kernel.size and leaf.dtype == np.float32]

    assert not carried()
    monkeypatch.setattr(gemma.jax, "checkpoint", lambda function, **_: function)
    assert carried(), "without it they are, so this can fail"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_no_unpacked_kernel_is_carried_by_a_whole_base(quantization, tmp_path):
    # of these sizes no other array has as many numbers as a kernel
    base = load_base(tiny_gemma(tmp_path, num_layers=4, hidden_dim=48), quantization=quantization)
    adapter, batch = full(base), inputs_of(23)
    scales = lora_scales(adapter, base.config)
    leaves = residuals(
        lambda lora: hidden_at(base.arrays, with_scales(lora, scales), batch, base.config),
        stacked_lora(adapter, base.config),
    )
    sizes = {n * 48 * 32 for n in (1, 3)}  # of one block, of the stack
    assert leaves and not [leaf.shape for leaf in leaves if leaf.size in sizes and leaf.dtype == np.float32]


# --- one step: of several adapters, on several devices


def numbers_of(adapter, config, rate=0.01, seed=0, dropout=0.0):
    numbers = {"rate": rate, "decay": 0.01, "total_steps": 0, "warmup_steps": 1, "dropout": dropout}
    return {**{name: np.float32(value) for name, value in numbers.items()}, "seed": np.uint32(seed),
            "scales": lora_scales(adapter, config)}  # fmt: skip


def training_batch(n=4, seed=0):
    rng, batch = np.random.default_rng(seed), inputs_of(24, n, padded=4, seed=seed)
    return {**batch, "positions": np.tile(np.array([[17, 18]], np.int32), (n, 1)),
            "targets": rng.integers(4, 200, (n, 2)).astype(np.int32),
            "weights": rng.uniform(0.5, 1.5, (n, 2)).astype(np.float32)}  # fmt: skip


# Beside one another they are any function's under jax.vmap; the pass that it maps is tried above with each family.
@pytest.mark.parametrize("small", some(FAMILIES, [*SMALL_BY_HAND, "gemma4"]), indirect=True)
def test_ten_adapters_side_by_side_are_ten_adapters(small):
    base = load_base(small)
    adapters = [moved(new_adapter(base, 2, lora_targets(base.config), seed=i), seed=i) for i in range(10)]
    states = [first_state(stacked_lora(adapter, base.config)) for adapter in adapters]
    batches = [training_batch(seed=i) for i in range(10)]
    numbers = [numbers_of(a, base.config, 0.002 * (i + 1), i, 0.1 * (i % 3)) for i, a in enumerate(adapters)]

    layout = LoraLayout.of(stacked_lora(adapters[0], base.config))

    def step(state, arrays, batch, numbers):
        return train_step(state, arrays, batch, numbers, base.config, layout, drops=True)

    one, many = jax.jit(step), jax.jit(jax.vmap(step, in_axes=(0, None, 0, 0)))
    together, of_all, given = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *each) for each in (states, batches, numbers)
    )
    for _ in range(3):
        together, seen = many(together, base.arrays, of_all, given)
    for i, state in enumerate(states):
        for _ in range(3):
            state, metrics = one(state, base.arrays, batches[i], numbers[i])
        assert abs(float(seen["step_loss"][i]) - float(metrics["step_loss"])) < 1e-4
        mapped, alone = (jax.tree.leaves(layout.cut(v)) for v in (together["adapter"][i], state["adapter"]))
        for ours, expected in zip(mapped, alone, strict=True):
            close(ours, expected, 1e-3)  # Adam makes differences of small gradients as large as those of large ones


@pytest.mark.parametrize("small", some(FAMILIES, ["gemma3"]), indirect=True)
@pytest.mark.parametrize("targets", ["all", "some"])  # of some, what is joined is not a run of what is computed
def test_a_step_as_on_a_gpu_is_a_step(small, targets):
    base = load_base(small)
    names = lora_targets(base.config) if targets == "all" else ("query", "value", "ffw_linear")
    adapter = moved(new_adapter(base, 2, names, alpha=3.0))
    lora, numbers = stacked_lora(adapter, base.config), numbers_of(adapter, base.config, dropout=0.25)
    layout, state, batch = LoraLayout.of(lora), first_state(lora), training_batch()
    found = {}
    for on_gpu in (False, True):
        step = partial(train_step, config=replace(base.config, on_gpu=on_gpu), layout=layout, drops=True)
        program = jax.jit(step).lower(state, base.arrays, batch, numbers)
        new, metrics = program.compile()(state, base.arrays, batch, numbers)
        found[on_gpu] = (program.as_text().count("dot_general"), new["adam"].mu, metrics["step_loss"])
    assert found[True][0] < found[False][0], "else nothing was joined"
    for ours, expected in zip(found[True][1:], found[False][1:], strict=True):
        close(ours, expected, 1e-4)  # a tenth of the gradients; the loss


EIGHT = """
import sys
from dataclasses import replace
from functools import partial
import jax, numpy as np
from gemma_lora_sentiment.adapter import new_adapter, lora_scales, stacked_lora, unstacked_lora
from gemma_lora_sentiment.gemma import hidden_at
from gemma_lora_sentiment.model import load_base, lora_targets
from gemma_lora_sentiment.scoring import lend, put
from gemma_lora_sentiment.training import LoraLayout, first_state, train_step

assert jax.device_count() == 8
rng = np.random.default_rng(0)
ids = rng.integers(4, 200, (8, 24)).astype(np.int32)
batch = {"token_ids": ids, "padding_mask": np.ones_like(ids), "targets": ids[:, :2],
         "positions": np.tile(np.array([[3, 20]], np.int32), (8, 1)),
         "weights": rng.uniform(0.5, 1.5, (8, 2)).astype(np.float32)}

def computed(base, adapter):
    given = put(base, batch, rows=True)
    inputs = {name: given[name] for name in ("token_ids", "padding_mask", "positions")}
    hidden = []
    if not base.quantization:
        hidden = [jax.jit(hidden_at, static_argnums=3)(base.arrays, lend(base, adapter), inputs, base.config)]
    numbers = {"rate": 0.01, "decay": 0.01, "total_steps": 0, "warmup_steps": 1, "dropout": 0.25}
    numbers = {name: np.float32(value) for name, value in numbers.items()}
    numbers |= {"seed": np.uint32(7), "scales": lora_scales(adapter, base.config)}
    lora = stacked_lora(adapter, base.config)
    step = jax.jit(partial(train_step, config=base.config, layout=LoraLayout.of(lora), drops=True))
    state, metrics = step(put(base, first_state(lora)), base.arrays, given, numbers)
    moments = LoraLayout.of(lora).cut(np.asarray(state["adam"].mu))  # a tenth of the gradients
    gradients = unstacked_lora(moments, adapter, base.config)
    return [*map(np.asarray, hidden), np.asarray(metrics["step_loss"]), *gradients.values()]

for folder in sys.argv[2:]:
    for quantization in eval(sys.argv[1]):
        one = load_base(folder, quantization=quantization)
        start = new_adapter(one, 2, lora_targets(one.config))
        moved = {path: array + rng.normal(0, 0.1, array.shape).astype(np.float32)
                 for path, array in start.arrays.items()}
        adapter = replace(start, arrays=moved)
        expected = computed(one, adapter)
        for devices, strategy in ((8, "data"), (8, "model"), (2, "model")):
            base = load_base(folder, quantization=quantization, devices=devices, strategy=strategy)
            assert base.fingerprint == one.fingerprint and base.replicas == (8 if strategy == "data" else 1)
            cut = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(base.arrays))
            assert cut < 0.8 * base.nbytes if strategy == "model" else cut == base.nbytes, (cut, base.nbytes)
            for ours, theirs in zip(computed(base, adapter), expected, strict=True):
                difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
                assert difference < 1e-4, (folder, strategy, quantization, difference)
            if not quantization:
                for (path, ours), (_, theirs) in zip(base.weights(), one.weights(), strict=True):
                    assert np.array_equal(ours, theirs), path
print("equal")
"""


def on_eight_devices(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(model.__file__).parents[1])}
    environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, *arguments], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr[-3000:]


@pytest.mark.parametrize("family, modes", [
    ("gemma3", (None, "int4")),
    *(pytest.param(family, (None,), marks=pytest.mark.slow) for family in ("gemma", "gemma4")),
    pytest.param("gemma2", (None, "int8"), marks=pytest.mark.slow),
])  # fmt: skip
def test_eight_devices_compute_what_one_computes(family, modes, tmp_path):
    """Eight heads of queries are divided by eight; two of keys are not, and are divided by two."""
    arguments = dict(MODELS["gemma4"][1] if family == "gemma4" else {"num_layers": 4})
    arguments |= dict(num_query_heads=8, num_key_value_heads=2)
    on_eight_devices(repr(modes), tiny_gemma(tmp_path, family, 5, **arguments))


# --- 16 bits


# Soft caps of Gemma 2 in the narrower range, clamps of 3 and 4 in the coarser numbers.
IN_16_BITS = [("gemma2", "float16"), ("gemma3", "bfloat16"), ("gemma4", "bfloat16")]


@pytest.mark.parametrize("small, dtype", pairs(("bfloat16", "float16"), IN_16_BITS), indirect=["small"])
def test_16_bits_are_close_to_32(dtype, small):
    base, wide, batch = load_base(small, dtype), load_base(small), inputs_of()
    adapter = full(base)
    rounded = {path: array.astype(np.float32) for path, array in base.weights()}
    exact = run(stacked(dict(rounded), wide.config), lend(wide, adapter), batch, wide.config)
    ours = run(base.arrays, lend(base, adapter), batch, base.config)
    share = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]  # to which a number is rounded
    assert np.abs(ours - exact).mean() < 16 * share * np.abs(exact).mean()
    backbone = keras_backbone(small, dtype)
    theirs = np.asarray(jax.jit(backbone)(keras_inputs(backbone, batch)), np.float32)
    plain = run(stacked(dict(rounded), wide.config), without(wide.config), batch, wide.config)
    plainly = run(base.arrays, without(base.config), batch, base.config)
    off, keras_off = (np.abs(found - plain).mean() for found in (plainly, theirs))
    assert off < 1.5 * keras_off, (off, keras_off)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_hidden_states_stay_within_float16(family, tmp_path):
    """KerasHub clamps those of Gemma 3 and 4; without that they would be infinite, and then no numbers."""
    # what Gemma 4 adds for each layer's own embedding, KerasHub does not clamp
    more = dict(hidden_size_per_layer_input=0, num_kv_shared_layers=0) if family == "gemma4" else {}
    folder = tiny_gemma(tmp_path, family, 5, num_layers=4, **more)
    backbone = keras_backbone(folder)
    for variable in backbone.variables:
        if variable.path.startswith(("decoder_block_1/post_attention_norm", "decoder_block_1/post_ffw_norm")):
            variable.assign(np.full(variable.shape, 2e4))  # either fits, their sum does not
    with without_tensorflow():
        backbone.save_to_preset(folder)
    base, batch = load_base(folder, "float16"), inputs_of()
    theirs = keras_backbone(folder, "float16")
    expected = np.asarray(jax.jit(theirs)(keras_inputs(theirs, batch)), np.float32)
    ours = run(base.arrays, without(base.config), batch, base.config)
    assert np.isfinite(expected).all()
    close(ours, expected, 0.01)
    unclamped = run(base.arrays, without(base.config), batch, replace(base.config, clamped=False))
    assert not np.isfinite(unclamped).all(), "else nothing was clamped, and this says nothing"


# --- int8 and int4, against Keras's own


@cache
def quantized_by_keras(folder, dtype, mode):
    """KerasHub's backbone whose dense layers Keras has quantized, and their float kernels."""
    backbone, kernels = keras_backbone(folder, dtype), {}
    layers = [layer for layer in backbone._flatten_layers() if layer.name in LORA_LAYERS]
    gc.collect()
    gc.freeze()  # Keras collects all garbage at each kernel that it replaces
    for layer in layers:
        kernels[layer.path] = np.asarray(layer.kernel)
        if mode == "int8" and dtype == "float16":  # which Keras refuses
            layer.dtype_policy = "float32"
        layer.quantize(mode)
    gc.unfreeze()
    return backbone, {layer.path: layer for layer in layers}, kernels


@pytest.fixture(scope="module", params=some(["gemma", "gemma3"], ["gemma"]))
def wide(request, tmp_path_factory):
    """Kernels of more rows than share a scale in int4, and not a multiple of them."""
    arguments = dict(num_layers=1, hidden_dim=160, intermediate_dim=328, num_query_heads=3, head_dim=18)
    return tiny_gemma(tmp_path_factory.mktemp(request.param) / "wide", request.param, 5, **arguments)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernels_are_quantized_as_keras_does(dtype, mode, wide):
    backbone, layers, kernels = quantized_by_keras(wide, dtype, mode)
    variables = {variable.path: np.asarray(variable.value) for variable in backbone.variables}
    assert len(layers) == 7
    seen = set()
    for path, layer in layers.items():
        parts, own = quantized_kernel(f"{path}/kernel", kernels[path], mode)
        for name, array in own.items():
            theirs = variables[name]
            assert (array.dtype, array.shape, array.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes()), name
        seen |= set(own)
        shape = kernels[path].shape
        ours = np.asarray(unpack(jax.tree.map(jnp.asarray, parts), jnp.float32, shape))
        scale = np.abs(kernels[path].astype(np.float32)).max()
        assert np.abs(ours - kernels[path].astype(np.float32)).max() < scale * (0.01 if mode == "int8" else 0.15)
        if dtype == "float32":  # Keras's layer, given the unit vectors, gives its kernel
            inputs = int(np.prod(shape[:-1])) if array_name(f"{path}/kernel") == "attention_output" else shape[-2]
            unit = np.eye(inputs, dtype=np.float32)
            if array_name(f"{path}/kernel") == "attention_output":
                theirs = np.asarray(layer(unit.reshape(1, inputs, *shape[:-1]))).reshape(shape)
            elif len(shape) == 3:
                theirs = np.asarray(layer(unit[None]))[0].transpose(1, 0, 2)
            else:
                theirs = np.asarray(layer(unit[None]))[0]
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert seen == {path for path in variables if path.rsplit("/", 1)[0] in layers}, "nothing of Keras's is left out"


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_fingerprint_of_a_quantized_base_is_that_of_keras_s_variables(dtype, mode, wide):
    """As versions before this forward pass computed it: their adapters must find their base again."""
    backbone, _, _ = quantized_by_keras(wide, dtype, mode)
    config = {
        name: value for name, value in backbone.get_config().items() if name not in ("name", "trainable", "dtype")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for variable in backbone.variables:
        flat = np.asarray(variable.value).reshape(-1)
        sample = flat[:: max(1, flat.size // 64)][:64].astype(np.float32)
        digest.update(variable.path.encode() + str(tuple(variable.shape)).encode() + sample.tobytes())
    assert load_base(wide, dtype, mode).fingerprint == digest.hexdigest()


@pytest.mark.parametrize(
    "small, mode", pairs(("int8", "int4"), [("gemma3", "int8"), ("gemma4", "int4")]), indirect=["small"]
)
def test_a_quantized_base_computes_with_the_unpacked_kernels(mode, small):
    """Any family: what is computed is what a base of these very numbers computes."""
    base, plain, batch = load_base(small, quantization=mode), load_base(small), inputs_of()
    floats = {}
    for path, array in plain.weights():
        if array_name(path) in LORA_LAYERS:
            parts, _ = quantized_kernel(path, array, mode)
            array = np.asarray(unpack(jax.tree.map(jnp.asarray, parts), jnp.float32, array.shape))
        floats[path] = array
    adapter = full(base)
    expected = run(stacked(floats, plain.config), lend(plain, adapter), batch, plain.config)
    close(run(base.arrays, lend(base, adapter), batch, base.config), expected, 1e-5)
    assert base.nbytes < plain.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("equation, shape, output", [("btd,ndh->btnh", (2, 3, 8), (4, 5)), (None, (2, 8), (6,))])
def test_an_int8_kernel_is_multiplied_in_the_format_of_the_base(equation, shape, output, dtype):
    drawn = {"kernel_initializer": keras.initializers.GlorotUniform(seed=1)}  # by chance ours might be the larger error
    layer = (
        keras.layers.EinsumDense(equation, output_shape=(None, *output), **drawn)
        if equation
        else keras.layers.Dense(*output, use_bias=False, **drawn)
    )
    layer.build(shape)
    kernel, x = np.asarray(layer.kernel), np.random.default_rng(0).normal(size=shape)
    layer.quantize("int8")
    exact = np.einsum(equation or "bd,df->bf", x, kernel)
    their_error = np.abs(np.asarray(layer(x.astype(np.float32))) - exact).max()
    parts, _ = quantized_kernel("decoder_block_0/attention/query/kernel", kernel, "int8")
    ours = project(jnp.asarray(x, dtype), jax.tree.map(jnp.asarray, parts), equation or "bd,df->bf", kernel.shape)
    assert str(ours.dtype) == dtype
    error = np.abs(np.asarray(ours, np.float64) - exact).max()
    if dtype == "float32":
        assert error < their_error  # whose inputs are rounded too
    assert error < {"float32": 0.02, "float16": 0.02, "bfloat16": 0.06}[dtype]


def test_logits_are_those_of_keras_hub_for_blocks_of_one_kind(tmp_path):
    folder = tiny_gemma(tmp_path, num_layers=4)
    base, batch = load_base(folder), {**inputs_of(), "positions": PLACES}
    assert len({layer.kind for layer in base.config.layers}) == 1
    ours = logits_of(base.arrays, run(base.arrays, without(base.config), batch, base.config), base.config)
    with without_tensorflow():
        causal_lm = keras_nlp.models.GemmaCausalLM.from_preset(folder, dtype="float32", preprocessor=None)
    reference = np.asarray(jax.jit(causal_lm)({name: batch[name] for name in ("token_ids", "padding_mask")}))
    np.testing.assert_allclose(np.asarray(ours), picked(reference), atol=2e-5)


@pytest.mark.parametrize("lines, length", [(6, 80), (6, 96), (3, 160), (4, 112)])
def test_keys_turned_for_several_fits_at_once_are_those_of_each_alone(lines, length, tmp_path):
    """Joined by jnp.concatenate, every second one was wrong for the first three shapes: jax 0.11.2 on an H200."""
    base = load_base(tiny_gemma(tmp_path / "base", "gemma3", num_key_value_heads=1))
    config, layer = base.config, base.config.layers[0]
    arrays = jax.tree.map(lambda array: array[0], base.arrays["groups"][0])

    def keys(token_ids):
        x = gemma.rms_norm(base.arrays["embedding"][token_ids], arrays["pre_attention_norm"])
        projected = gemma.project(x, arrays["key"], "bld,kdh->blkh")
        turned = gemma.rms_norm(projected, arrays["key_norm"])
        return gemma.rotate(turned, *gemma.rotary_angles(token_ids.shape[1], layer))

    token_ids = np.random.default_rng(0).integers(0, config.vocabulary_size, (2, lines, length))
    together, alone = jax.jit(jax.vmap(keys))(token_ids), [jax.jit(keys)(each) for each in token_ids]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-4)
