"""Every family's rows in shared lines; Gemma 4 through the code of the others, and what is refused of Gemma 3n."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from gemma_lora_sentiment.adapter import lora_scales, new_adapter, stacked_lora
from gemma_lora_sentiment.backend import ModelError, without_tensorflow
from gemma_lora_sentiment.classifier import GemmaLoraClassifier
from gemma_lora_sentiment.gemma import hidden_at, logits_of
from gemma_lora_sentiment.model import jax, keras_nlp, load_base, lora_targets, resolve_preset, tiny_gemma
from gemma_lora_sentiment.prompt import LabelWords, training_arrays
from gemma_lora_sentiment.scoring import lend, log_softmax, score_labels
from gemma_lora_sentiment.training import BatchSequence, LoraLayout, Packing, Rows, first_state, train_step

COMMENTS = ["맛있어요 최고예요", "친절해요 또 갈게요", "맛이 없어요 별로예요", "불친절해요 실망했어요"] * 2
LABELS = [1, 1, 0, 0] * 2


def logits_at(base, inputs, labels=None):
    """Of the base with an untrained adapter."""
    hidden = jax.jit(hidden_at, static_argnums=3)(base.arrays, lend(base, new_adapter(base)), inputs, base.config)
    return np.asarray(logits_of(base.arrays, hidden, base.config, labels))


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("gemma4"), "gemma4", seed=3)


def test_logits_are_those_of_keras_hub_padded_or_not(gemma4):
    base = load_base(gemma4)
    with without_tensorflow():
        backbone = keras_nlp.models.Backbone.from_preset(gemma4, dtype="float32")
        causal_lm = keras_nlp.models.Gemma4CausalLM(preprocessor=None, backbone=backbone)
    rng, n = np.random.default_rng(0), 24  # longer than the sliding window of 16
    ids = np.concatenate([np.full((2, 1), 2), rng.integers(4, 200, (2, n - 1))], axis=1).astype(np.int32)
    given = {"token_ids": ids, "padding_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(n), (2, 1))}
    positions = np.array([[0, 5, n - 1], [7, n - 1, 3]], np.int32)
    expected = np.take_along_axis(np.asarray(jax.jit(causal_lm)(given)), positions[..., None], axis=1)
    padded, mask = np.zeros((2, 40), np.int32), np.zeros((2, 40), np.int32)
    padded[:, :n], mask[:, :n] = ids, 1
    whole = {"token_ids": ids, "padding_mask": np.ones_like(ids), "positions": positions}
    np.testing.assert_allclose(logits_at(base, whole), expected, atol=1e-4)
    labels = np.array([20, 150, 21], np.int32)
    inputs = {"token_ids": padded, "padding_mask": mask, "positions": positions[:, -1:]}
    np.testing.assert_allclose(logits_at(base, inputs, labels)[:, 0], expected[:, -1][:, labels], atol=1e-4)


def test_gemma4_trains_predicts_generates_and_comes_back(gemma4, tmp_path):
    targets = lora_targets(load_base(gemma4).config)
    assert {"query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"} == set(targets)
    clf = GemmaLoraClassifier(gemma4, epochs=12, batch_size=4, learning_rate=0.02, target_layers=targets)
    clf.fit(COMMENTS, LABELS)
    assert clf.history_.loss.iloc[-1] < clf.history_.loss.iloc[0]
    trained = [path for path, array in clf.adapter_.arrays.items() if path.endswith("lora_kernel_b") and array.any()]
    assert len(trained) == len(clf.adapter_.arrays) / 2, "every layer learns"
    np.testing.assert_allclose(clf.predict_proba(COMMENTS).sum(axis=1), 1, atol=1e-6)
    assert isinstance(clf.generate(COMMENTS[0], max_new_tokens=4), str)
    clf.save(tmp_path / "run")
    loaded = GemmaLoraClassifier.load(tmp_path / "run")
    assert loaded.adapter_.rank == clf.adapter_.rank, "blocks without key and value are no sign of another layout"
    np.testing.assert_array_equal(loaded.predict_proba(COMMENTS), clf.predict_proba(COMMENTS))


def test_the_text_part_of_a_gemma4_with_eyes(gemma4, tmp_path):
    """What is loaded of a preset with a vision encoder is what a preset without one holds."""
    models = keras_nlp.models
    vision = models.Gemma4VisionEncoder(
        image_size=16, patch_size=4, pool_size=2, num_layers=1, num_heads=2, head_dim=8, num_key_value_heads=2,
        hidden_dim=16, intermediate_dim=16, output_dim=32, dtype="float32",
    )  # fmt: skip
    with without_tensorflow():
        text = models.Backbone.from_preset(gemma4)
        whole = models.Gemma4Backbone(**{**plain(text), "vision_encoder": vision, "dtype": "float32"})
        values = {variable.path: np.array(variable.value) for variable in text.variables}
        for variable in whole.variables:
            if variable.path in values:
                variable.assign(values.pop(variable.path))
        assert not values, "every variable of the text part has its place"
        whole.save_to_preset(str(tmp_path))
        models.Tokenizer.from_preset(gemma4).save_to_preset(str(tmp_path))
    base = load_base(tmp_path)
    assert base.arguments["vision_encoder"] is None
    assert {path for path, _ in base.weights()} == {variable.path for variable in text.variables}
    assert base.fingerprint == load_base(gemma4).fingerprint and base.nbytes == load_base(gemma4).nbytes
    ids = np.random.default_rng(0).integers(4, 200, (2, 12)).astype(np.int32)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids), "positions": np.full((2, 1), 11, np.int32)}
    np.testing.assert_array_equal(logits_at(base, inputs), logits_at(load_base(gemma4), inputs))


def plain(backbone):
    return {name: value for name, value in backbone.get_config().items() if name not in ("name", "trainable", "dtype")}


def test_presets_of_every_family_are_known():
    for preset in ("gemma_2b_en", "gemma2_2b_en", "gemma3_270m", "gemma4_2b"):
        assert resolve_preset(preset) == preset
    with pytest.raises(ModelError, match="is a Gemma 3n. KerasHub gives its logits by a function"):
        resolve_preset("gemma3n_e2b")


def test_what_cannot_continue_a_text_is_refused(tmp_path):
    backbone = keras_nlp.models.Gemma4Backbone(
        vocabulary_size=300, image_size=16, num_layers=2, num_query_heads=2, num_key_value_heads=1, hidden_dim=32,
        intermediate_dim=64, head_dim=16, is_embedding_model=True, pooling_intermediate_dim=16, embedding_dim=8,
        dtype="float32",
    )  # fmt: skip
    with without_tensorflow():
        backbone.save_to_preset(str(tmp_path))
    with pytest.raises(ModelError, match="embeds texts"):
        load_base(tmp_path)


# Of each family, test_gemma packs rows against rows alone; lines are laid and scored for all families by the same code.
@pytest.mark.parametrize("family", ["gemma3", *(pytest.param(name, marks=pytest.mark.slow)
                                                for name in ("gemma", "gemma2", "gemma4"))])  # fmt: skip
def test_rows_that_share_a_line_are_computed_as_if_alone(family, tmp_path):
    """Longer than the sliding window of 16, so a mask or a position that is off by a row shows."""
    base = load_base(tiny_gemma(tmp_path / family, family, seed=5), dtype="float32")
    rng = np.random.default_rng(0)
    prompts = [np.array([2, *rng.integers(4, 200, n)], np.int32) for n in rng.integers(3, 40, 30)]
    index = rng.integers(0, 2, 30)
    start = new_adapter(base, seed=0)
    arrays = {path: rng.normal(0, 0.1, array.shape).astype(np.float32) for path, array in start.arrays.items()}
    adapter = replace(start, arrays=arrays)
    for words in (LabelWords((0, 1), ("a", "b"), ((20,), (21,)), (1,)),
                  LabelWords((0, 1), ("a b", "c d"), ((20, 22), (21, 23)), (1,))):  # fmt: skip
        together = log_softmax(score_labels(base, adapter, prompts, words))[:10]
        alone = [score_labels(base, adapter, [prompt], words, (48,), 1) for prompt in prompts[:10]]
        np.testing.assert_allclose(together, log_softmax(np.concatenate(alone)), atol=2e-5)
        assert np.ptp(together[:, 0]) > 1e-3, "rows must differ for this to mean anything"
    rows = Rows(prompts, [words.trained_ids[i] for i in index], index, np.linspace(0.5, 1.5, 30, dtype=np.float32))
    packing = Packing.of(rows.lengths, 8, 1)
    batches = BatchSequence(rows, (packing.length,), 8, packing=packing)
    chosen, (inputs, targets, weights) = batches.plan(0)[0][1], batches[0]
    assert len(targets) == packing.lines < len(chosen)
    lora, numbers = stacked_lora(adapter, base.config), dict.fromkeys(NUMBERS, np.float32(0))
    numbers |= {"seed": np.uint32(0), "scales": lora_scales(adapter, base.config)}
    step = jax.jit(partial(train_step, config=base.config, layout=LoraLayout.of(lora)))
    given = {**inputs, "targets": targets, "weights": weights}
    packed = step(first_state(lora), base.arrays, given, numbers)[1]
    part = rows.take(chosen)
    one = training_arrays(part.prompts, part.responses, 48, 4, "response", part.weights)
    alone = step(first_state(lora), base.arrays, one, numbers)[1]
    for name in ("step_loss", "loss", "accuracy"):
        np.testing.assert_allclose(packed[name], alone[name], atol=1e-5)


NUMBERS = ("rate", "decay", "total_steps", "warmup_steps", "dropout")
