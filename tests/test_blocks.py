"""What is changed on KerasHub's decoder blocks, held against the blocks as KerasHub computes them."""

import numpy as np
import pytest

from gemma_lora_sentiment import blocks, model
from gemma_lora_sentiment.adapter import new_adapter
from gemma_lora_sentiment.model import (
    ModelError,
    jax,
    keras,
    keras_nlp,
    load_base,
    release_bases,
    tiny_gemma,
    without_tensorflow,
)

FAMILIES = ("gemma", "gemma2", "gemma3", "gemma4")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp(request.param), request.param, seed=5)


def inputs_of(length=24, positions=((3, 20), (22, 0))):  # longer than the sliding window of 16
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.full((2, 1), 2), rng.integers(4, 200, (2, length - 1))], axis=1).astype(np.int32)
    arrays = {"token_ids": ids, "padding_mask": np.ones_like(ids), "positions": np.array(positions, np.int32)}
    return {name: jax.numpy.asarray(array) for name, array in arrays.items()}


def state_of(scorer, seed=1):
    """The adapter with both factors away from zero, and the frozen arrays."""
    rng, start = np.random.default_rng(seed), new_adapter(scorer).arrays
    adapter = [start[v.path] + rng.normal(0, 0.1, v.shape).astype(np.float32) for v in scorer.trainable_variables]
    return adapter, [variable.value for variable in scorer.non_trainable_variables]


def hidden_of(scorer, adapter, frozen, inputs):
    return np.asarray(jax.jit(scorer._with_state(scorer.hidden_states))(adapter, frozen, inputs), np.float32)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_last_block_at_few_positions_is_the_whole_one_there(folder, quantization):
    if quantization and "gemma4" in folder:
        with pytest.raises(ModelError, match="without their scales, so it cannot be quantized"):
            load_base(folder, quantization=quantization)
        return
    base = load_base(folder, quantization=quantization)
    targets = ("query", "key", "value", "attention_output", "ffw_gating", "ffw_linear")
    scorer = base.scorer(targets, 3)
    state, few = state_of(scorer), inputs_of()
    every = {**few, "positions": jax.numpy.tile(jax.numpy.arange(24), (2, 1))}
    seen = []
    usual = scorer.backbone.transformer_layers[-1].call

    def watch(hidden, **inputs):
        outputs = usual(hidden, **inputs)
        seen.append((outputs[0] if isinstance(outputs, tuple) else outputs).shape[1])
        return outputs

    object.__setattr__(scorer.backbone.transformer_layers[-1], "call", watch)
    try:
        at_few, at_all = hidden_of(scorer, *state, few), hidden_of(scorer, *state, every)
    finally:
        object.__setattr__(scorer.backbone.transformer_layers[-1], "call", usual)
    assert seen == [2, 24], "else nothing was left out, and this says nothing"
    np.testing.assert_allclose(at_few, np.take_along_axis(at_all, few["positions"][..., None], axis=1), atol=2e-5)


def test_the_last_block_in_float16(folder):
    scorer = load_base(folder, "float16").scorer(rank=3)
    state, few = state_of(scorer), inputs_of()
    every = {**few, "positions": jax.numpy.tile(jax.numpy.arange(24), (2, 1))}
    whole = np.take_along_axis(hidden_of(scorer, *state, every), np.asarray(few["positions"])[..., None], axis=1)
    np.testing.assert_allclose(hidden_of(scorer, *state, few), whole, atol=0.02)


def gradients(scorer, adapter, frozen, inputs):
    def loss(adapter):
        return (scorer._with_state(scorer.hidden_states)(adapter, frozen, inputs) ** 2).mean()

    return jax.jit(jax.grad(loss))(adapter)


def test_gradients_are_those_of_the_whole_last_block(folder):
    scorer = load_base(folder).scorer(rank=3)
    (adapter, frozen), few = state_of(scorer), inputs_of()

    def loss_of_all(adapter):
        every = {**few, "positions": jax.numpy.tile(jax.numpy.arange(24), (2, 1))}
        hidden = scorer._with_state(scorer.hidden_states)(adapter, frozen, every)
        return (jax.numpy.take_along_axis(hidden, few["positions"][..., None], axis=1) ** 2).mean()

    whole = jax.jit(jax.grad(loss_of_all))(adapter)
    for ours, expected in zip(gradients(scorer, adapter, frozen, few), whole, strict=True):
        assert np.abs(np.asarray(expected)).max() > 0
        np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family, kinds", [("gemma", 1), ("gemma2", 2), ("gemma3", 2)])
def test_each_kind_of_block_is_traced_once(family, kinds, tmp_path, monkeypatch):
    """Of six blocks; Gemma 2 and 3 alternate local and global attention."""
    monkeypatch.setitem(model._TINY, "num_layers", 6)
    traced, usual = [], blocks._call_at

    def counting(block):
        call = usual(block)
        return lambda *args, **kwargs: traced.append(block.name) or call(*args, **kwargs)

    monkeypatch.setattr(blocks, "_call_at", counting)
    scorer = load_base(tiny_gemma(tmp_path, family)).scorer(rank=2)
    adapter, frozen = state_of(scorer)
    jax.jit(scorer._with_state(scorer.hidden_states)).lower(adapter, frozen, inputs_of())
    assert len(scorer.backbone.transformer_layers) == 6
    assert kinds < len(traced) <= kinds + 2 < 6  # the first and the last block have other inputs


def test_blocks_of_one_kind_compute_with_their_own_weights(tmp_path):
    """One trace for both blocks of the tiny Gemma, and logits as KerasHub has them."""
    folder = tiny_gemma(tmp_path)
    scorer = load_base(folder).scorer(rank=2)
    kinds = [blocks._kind_of(block) for block in scorer.backbone.transformer_layers]
    assert len(kinds) == 2 and len(set(kinds)) == 1
    inputs = inputs_of()
    adapter = [0 * value for value in state_of(scorer)[0]]
    ours = jax.jit(scorer._with_state(scorer.call))(adapter, state_of(scorer)[1], inputs)
    with without_tensorflow():
        causal_lm = keras_nlp.models.GemmaCausalLM.from_preset(folder, dtype="float32", preprocessor=None)
    reference = np.asarray(causal_lm({name: inputs[name] for name in ("token_ids", "padding_mask")}))
    reference = np.take_along_axis(reference, inputs["positions"][..., None], axis=1)
    np.testing.assert_allclose(np.asarray(ours), reference, atol=2e-5)


def test_what_divides_alpha_makes_another_kind(tmp_path):
    base = load_base(tiny_gemma(tmp_path))
    layers = base.scorer(rank=2).backbone._flatten_layers()
    paths = [layer.path for layer in layers if getattr(layer, "lora_enabled", False)]
    for divisors, kinds in (([1.0, 1.0, 1.0, 1.0], 1), ([1.0, 1.0, 2.0, 1.0], 2)):
        scorer = base.scorer(rank={path: (3, divisor) for path, divisor in zip(paths, divisors, strict=True)})
        assert len({blocks._kind_of(block) for block in scorer.backbone.transformer_layers}) == kinds


def test_the_activation_is_not_kept_for_the_backward_pass():
    """Of the residuals of a block, those as wide as the feed-forward part are gate and value alone."""
    with without_tensorflow():  # feed-forward part of 104
        backbone, plain = (keras_nlp.models.GemmaBackbone(50, 1, 2, 1, 16, 208, 8) for _ in range(2))
    blocks._activate_again(backbone.transformer_layers[0])
    hidden = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)

    def wide(block):
        _, residuals = jax.vjp(lambda hidden: block(hidden, padding_mask=np.ones((2, 6), np.int32)), hidden)
        return [leaf.shape for leaf in jax.tree.leaves(residuals) if leaf.shape == (2, 6, 104)]

    ours, theirs = wide(backbone.transformer_layers[0]), wide(plain.transformer_layers[0])
    assert len(theirs) > len(ours) == 2
    for variable, other in zip(plain.variables, backbone.variables, strict=True):
        variable.assign(other.value)
    outputs = [np.asarray(b.transformer_layers[0](hidden)) for b in (backbone, plain)]
    np.testing.assert_allclose(*outputs, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("equation, shape, output", [("btd,ndh->btnh", (2, 3, 8), (4, 5)), (None, (2, 8), (6,))])
def test_an_int8_kernel_is_multiplied_in_the_format_of_the_base(equation, shape, output, dtype):
    layer = (
        keras.layers.EinsumDense(equation, output_shape=(None, *output))
        if equation
        else keras.layers.Dense(*output, use_bias=False)
    )
    layer.build(shape)
    kernel, x = np.asarray(layer.kernel), np.random.default_rng(0).normal(size=shape)
    layer.quantize("int8")
    exact = np.einsum(equation or "bd,df->bf", x, kernel)
    their_error = np.abs(np.asarray(layer(x.astype(np.float32))) - exact).max()
    blocks.compute_beside(layer, dtype)
    ours = layer(jax.numpy.asarray(x, dtype))
    assert str(ours.dtype) == dtype
    error = np.abs(np.asarray(ours, np.float64) - exact).max()
    if dtype == "float32":
        assert error < their_error  # whose inputs are rounded too
    assert error < {"float32": 0.02, "float16": 0.02, "bfloat16": 0.06}[dtype]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantized_kernel_is_unpacked_in_the_backward_pass_too(quantization, tmp_path, monkeypatch):
    """No unpacked kernel is carried from the forward to the backward pass."""
    monkeypatch.setitem(model._TINY, "hidden_dim", 48)  # so that no other array has as many numbers as a kernel
    base = load_base(tiny_gemma(tmp_path), quantization=quantization)
    scorer = base.scorer(rank=2)
    adapter, frozen = state_of(scorer)

    def carried():
        hidden = scorer._with_state(scorer.hidden_states)
        _, residuals = jax.vjp(lambda adapter: hidden(adapter, frozen, inputs_of(23)), adapter)
        leaves = [leaf for leaf in jax.tree.leaves(residuals) if quantization == "int4" or str(leaf.dtype) != "int8"]
        return [leaf for leaf in leaves if leaf.size == 48 * 32]  # of the feed-forward part; packed int4 has half

    assert not carried()
    monkeypatch.setattr(blocks, "_unpack_again", lambda layer: None)
    release_bases()
    scorer = load_base(base.preset, quantization=quantization).scorer(rank=2)
    adapter, frozen = state_of(scorer)
    assert carried(), "without it they are, so this can fail"
