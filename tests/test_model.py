"""What would bore a reader of 02_model: every family against KerasHub, shared bases under all kinds of trouble."""

import gc
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gemma_lora_sentiment import model as room
from gemma_lora_sentiment import scoring, training
from gemma_lora_sentiment.adapter import RunError, lora_scales, new_adapter, stacked_lora
from gemma_lora_sentiment.backend import ModelError, choose_dtype, without_tensorflow
from gemma_lora_sentiment.gemma import hidden_at, logits_of, with_scales
from gemma_lora_sentiment.memory import memory_estimate
from gemma_lora_sentiment.model import (
    GEMMA_2B_CONFIG,
    held_bases,
    load_base,
    lora_parameter_count,
    lora_targets,
    release_bases,
    resolve_preset,
    tiny_gemma,
)
from gemma_lora_sentiment.prompt import LabelWords
from gemma_lora_sentiment.scoring import compiler_options, generate, lend, score_labels
from gemma_lora_sentiment.training import BatchSequence, Recipe, Rows, train_adapter

keras, jax = room.keras, room.jax
keras_nlp = room.keras_nlp
FAMILIES = ("gemma", "gemma2", "gemma3")
ALL_TARGETS = ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear")
# Words of one token each; the response is the word and <eos>.
WORDS = LabelWords(("0", "1"), ("0", "1"), ((20,), (21,)), (1,))
RECIPE = Recipe(lora_rank=4, learning_rate=0.02, weight_decay=0.01, epochs=3, batch_size=4)


def rows_of(n=8, seed=0, width=10):
    """Random prompts of one length bucket, so that every test uses the same compiled step."""
    rng = np.random.default_rng(seed)
    prompts = [np.array([2, *rng.integers(30, 250, width)], np.int32) for _ in range(n)]
    index = np.arange(n) % 2
    return Rows(prompts, [WORDS.trained_ids[i] for i in index], index, np.ones(n, np.float32))


ROWS = rows_of()


def arrays_of(base):
    """Each array of the base by its place: itself, and its bytes."""
    found, _ = jax.tree_util.tree_flatten_with_path(base.arrays)
    return {jax.tree_util.keystr(place): (array, np.asarray(array).tobytes()) for place, array in found}


def assert_base_unchanged(base, before):
    found, _ = jax.tree_util.tree_flatten_with_path(base.arrays)
    assert {jax.tree_util.keystr(place) for place, _ in found} == set(before)
    for place, now in found:
        array, content = before[jax.tree_util.keystr(place)]
        assert now is array, place
        assert not array.is_deleted() and np.asarray(array).tobytes() == content, place


def fit(base, recipe=RECIPE, rows=ROWS, targets=("query", "value"), **settings):
    start = new_adapter(base, recipe.lora_rank, targets, seed=settings.get("seed", 0))
    return train_adapter(base, start, rows, WORDS, recipe, **settings)


def score(base, adapter, rows=ROWS, **settings):
    return score_labels(base, adapter, rows.prompts, WORDS, (16,), 8, **settings)


def logits_at(base, inputs, adapter=None):
    """Over the vocabulary, float32 (b, p, vocabulary)."""
    lora = lend(base, adapter or new_adapter(base))
    hidden = jax.jit(hidden_at, static_argnums=3)(base.arrays, lora, inputs, base.config)
    return np.asarray(logits_of(base.arrays, hidden, base.config))


def same(a, b):
    return all(np.array_equal(a.arrays[path], b.arrays[path]) for path in a.arrays)


def run_python(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(Path(room.__file__).parents[1]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(tiny):
    return load_base(tiny)


# --- sizes, without allocation


def test_the_2b_shape_has_the_tutorial_s_count_and_takes_no_memory():
    random_state = random.getstate()
    gc.collect()
    live = sum(array.nbytes for array in jax.live_arrays())
    tracemalloc.start()
    with open("/proc/self/statm") if sys.platform == "linux" else open(os.devnull) as statm:
        resident = int((statm.read() or "0 0").split()[1])
    assert lora_parameter_count(GEMMA_2B_CONFIG, rank=4) == (2_506_172_416, 1_363_968)
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            grown = (int(statm.read().split()[1]) - resident) * os.sysconf("SC_PAGE_SIZE")
        assert grown < 500e6
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert sum(array.nbytes for array in jax.live_arrays()) - live < 1e6
    assert random.getstate() == random_state


@pytest.mark.parametrize("rank, targets", [(1, ("query",)), (8, ALL_TARGETS), (16, ("ffw_linear", "key"))])
def test_counted_parameters_are_those_of_an_adapter(rank, targets, base):
    total, trainable = lora_parameter_count(base.arguments, rank, targets)
    assert total == base.parameter_count == sum(array.size for _, array in base.weights())
    assert trainable == new_adapter(base, rank, targets).parameter_count
    with without_tensorflow():
        backbone = keras_nlp.models.Backbone.from_preset(base.preset)
    assert total == backbone.count_params()
    backbone.enable_lora(rank, list(targets))
    assert trainable == sum(int(np.prod(variable.shape)) for variable in backbone.trainable_variables
                            if "lora" in variable.path)  # fmt: skip


def test_memory_estimate_grows_with_what_it_depends_on(base):
    least = memory_estimate(base, 4, batch_size=1, length=16)
    assert least["base"] == base.nbytes and least["total"] == sum(least.values()) - least["total"]
    for more in (dict(batch_size=2), dict(length=32), dict(positions=20)):
        settings = {**dict(batch_size=1, length=16), **more}
        assert memory_estimate(base, 4, **settings)["total"] > least["total"]
    assert memory_estimate(base, 8, batch_size=1, length=16)["adapter"] == 2 * least["adapter"]


# --- the three families


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tiny_gemma(tmp_path_factory.mktemp(request.param), request.param, seed=3)
    return request.param, folder, load_base(folder)


def test_logits_are_those_of_keras_hub_padded_or_not(family):
    name, folder, base = family
    causal_lm_class = keras_nlp.models.Gemma3CausalLM if name == "gemma3" else keras_nlp.models.GemmaCausalLM
    with without_tensorflow():
        causal_lm = causal_lm_class.from_preset(folder, dtype="float32", preprocessor=None)
    rng, n = np.random.default_rng(0), 24  # longer than the sliding window of 16
    ids = np.concatenate([np.full((2, 1), 2), rng.integers(4, 200, (2, n - 1))], axis=1).astype(np.int32)
    theirs = jax.jit(causal_lm)  # of two rows of 24 tokens, so that it is compiled once
    reference = np.asarray(theirs({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
    padded, mask = np.zeros((2, 40), np.int32), np.zeros((2, 40), np.int32)
    padded[:, :n], mask[:, :n] = ids, 1
    positions = np.array([[0, 5, n - 1], [7, n - 1, 3]], np.int32)
    expected = np.take_along_axis(reference, positions[..., None], axis=1)
    lora = lend(base, new_adapter(base))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids), "positions": positions}
    np.testing.assert_allclose(logits_at(base, inputs), expected, atol=1e-4)
    labels = np.array([20, 150, 21], np.int32)
    given = {"token_ids": padded, "padding_mask": mask, "positions": positions[:, -1:]}
    hidden = jax.jit(hidden_at, static_argnums=3)(base.arrays, lora, given, base.config)
    columns = np.asarray(logits_of(base.arrays, hidden, base.config, labels))[:, 0]
    np.testing.assert_allclose(columns, expected[:, -1][:, labels], atol=1e-4)
    words = LabelWords((0, 1), ("a", "b"), ((30, 31), (32, 33, 34)), (1,))  # of several tokens
    rows = [np.array([2, 10, 11, 12, 13], np.int32), ids[0, :20]]
    scores = score_labels(base, new_adapter(base), rows, words)
    for row, prompt in enumerate(rows):
        whole, filled = np.zeros((2, n), np.int32), np.zeros((2, n), np.int32)
        for label, word in enumerate(words.scored_ids):
            whole[label, : len(prompt) + len(word)], filled[label, : len(prompt) + len(word)] = [*prompt, *word], 1
        found = np.asarray(theirs({"token_ids": whole, "padding_mask": filled}))
        for label, word in enumerate(words.scored_ids):
            log_softmax = found[label] - np.log(np.exp(found[label]).sum(axis=-1, keepdims=True))
            at = len(prompt) - 1 + np.arange(len(word))
            np.testing.assert_allclose(scores[row, label], log_softmax[at, list(word)].sum(), atol=1e-4)


def test_every_family_carries_lora_on_every_layer(family):
    _, _, base = family
    assert set(lora_targets(base.config)) == set(ALL_TARGETS)
    before = arrays_of(base)
    adapter, history, _ = fit(base, rows=ROWS)
    assert history.loss.iloc[-1] < history.loss.iloc[0]
    assert_base_unchanged(base, before)
    assert all(array.any() for array in adapter.arrays.values())


def test_families_are_told_apart_by_fingerprint(tmp_path, base):
    assert load_base(tiny_gemma(tmp_path / "a", seed=0)).fingerprint == base.fingerprint
    assert load_base(tiny_gemma(tmp_path / "b", seed=1)).fingerprint != base.fingerprint
    assert load_base(tiny_gemma(tmp_path / "c", "gemma2")).fingerprint != base.fingerprint


@pytest.mark.parametrize("settings", [{}, {"quantization": "int8"}, {"dtype": "bfloat16"}])
def test_a_fingerprint_does_not_depend_on_what_was_loaded_before(settings, tiny, base):
    first = load_base(tiny, **settings).fingerprint
    held = dict(held_bases())
    release_bases()
    try:
        load_base(tiny, dtype="float16")  # numbers in names of layers and policies move on
        assert load_base(tiny, **settings).fingerprint == first
    finally:
        release_bases()
        room._BASES.update(held)


def test_the_fingerprint_of_a_hugging_face_folder_does_not_depend_on_what_was_loaded_before(base):
    folder = Path(__file__).parent / "fixtures" / "hf_gemma"
    if not folder.is_dir():
        pytest.skip("no Hugging Face fixture")
    first = load_base(folder).fingerprint
    (held,) = [base for key, base in held_bases() if key[0] == str(folder)]
    release_bases(str(folder))
    assert load_base(folder).fingerprint == first and load_base(folder) is not held


HUGGING_FACE = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("family, says, named", [
    ("hf_gemma", dict(tie_word_embeddings=False), "tie_word_embeddings"),
    ("hf_gemma", dict(rope_parameters={"rope_theta": 5e5}), "rope_theta"),
    ("hf_gemma", dict(rope_parameters=None, rope_theta=5e5), "rope_theta"),
    ("hf_gemma", dict(hidden_activation="silu"), "hidden_activation"),
    ("hf_gemma", dict(rms_norm_eps=1e-5), "rms_norm_eps"),
    ("hf_gemma", dict(attention_bias=True), "attention_bias"),
    ("hf_gemma2", dict(layer_types=["full_attention"] * 2), "layer_types"),
    ("hf_gemma2", dict(query_pre_attn_scalar=100), "query_pre_attn_scalar"),
    ("hf_gemma3", dict(layer_types=["full_attention", *["sliding_attention"] * 5]), "layer_types"),
    ("hf_gemma3", dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "rope_theta of full_attention"),
    ("hf_gemma3", dict(rope_parameters={"sliding_attention": {"rope_theta": 1e6}}), "rope_theta of sliding_attention"),
    ("hf_gemma3", dict(rope_parameters=None, rope_theta=1e6, rope_local_base_freq=5e4), "rope_theta of sliding"),
], ids=str)  # fmt: skip
def test_what_keras_hub_passes_over_in_a_hugging_face_folder_is_refused_by_name(family, says, named, tmp_path):
    folder = shutil.copytree(HUGGING_FACE / family, tmp_path / family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **says}))
    with pytest.raises(ModelError, match=named) as error:
        load_base(folder, "float32")
    assert "\n" not in str(error.value) and not [key for key, _ in held_bases() if key[0] == str(folder)]


@pytest.mark.parametrize("family, says", [
    ("hf_gemma", dict(hidden_activation=None, hidden_act="gelu")), ("hf_gemma2", dict(layer_types=None)),
    ("hf_gemma3", dict(rope_parameters=None, rope_theta=1e6)),
    ("hf_gemma3", dict(rope_parameters=None, rope_theta=1e6, rope_local_base_freq=1e4)),
], ids=str)  # fmt: skip
def test_what_earlier_versions_of_transformers_wrote_is_taken(family, says, tmp_path):
    folder = shutil.copytree(HUGGING_FACE / family, tmp_path / family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **says}))
    base, usual = load_base(folder, "float32"), load_base(HUGGING_FACE / family, "float32")
    assert base.fingerprint == usual.fingerprint and base.config == usual.config


def test_a_folder_written_anew_is_loaded_anew(tmp_path):
    first = load_base(tiny_gemma(tmp_path, seed=0))
    second = load_base(tiny_gemma(tmp_path, seed=1))
    assert second is not first and second.fingerprint != first.fingerprint


# --- one base, many adapters, all kinds of trouble


def test_two_shapes_of_adapters_over_one_base_train_and_predict_in_turn(base):
    before, other = arrays_of(base), ("key", "ffw_gating")
    recipe8 = Recipe(lora_rank=8, learning_rate=0.02, epochs=3, batch_size=4)
    a, _, _ = fit(base)
    score_a = score(base, a)
    b, _, _ = fit(base, recipe8, targets=other)
    score_b = score(base, b)
    assert not np.allclose(score_a, score_b)
    for _ in range(2):  # in turn, each unmoved by the other
        assert np.array_equal(score(base, a), score_a) and np.array_equal(score(base, b), score_b)
        assert same(fit(base)[0], a) and same(fit(base, recipe8, targets=other)[0], b)
    assert_base_unchanged(base, before)


class StopAt(keras.callbacks.Callback):
    def __init__(self, moment, error):
        super().__init__()
        self.moment, self.error, self.calls = moment, error, 0

    def _raise(self, moment):
        self.calls += moment == self.moment
        if moment == self.moment and self.calls == 2:
            raise self.error

    def on_train_batch_begin(self, batch, logs=None):
        self._raise("batch begin")

    def on_train_batch_end(self, batch, logs=None):
        self._raise("batch end")

    def on_epoch_begin(self, epoch, logs=None):
        self._raise("epoch begin")

    def on_epoch_end(self, epoch, logs=None):
        self._raise("epoch end")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no memory")], ids=["Ctrl-C", "an exception"])
@pytest.mark.parametrize("moment", ["batch begin", "batch end", "epoch begin", "epoch end"])
def test_the_base_survives_a_stop_in_fit(moment, error, base):
    expected, _, _ = fit(base)
    scores, before = score(base, expected), arrays_of(base)
    with pytest.raises(type(error)):
        fit(base, callbacks=[StopAt(moment, error)])
    assert_base_unchanged(base, before)
    assert np.array_equal(score(base, expected), scores)
    assert same(fit(base)[0], expected)
    assert base.lock.acquire(blocking=False) and base.lock.release() is None


def test_the_base_survives_a_stop_in_prediction(base):
    adapter, _, _ = fit(base)
    scores, before = score(base, adapter, rows_of(100)), arrays_of(base)

    def stop(done, n):
        assert n == 100
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(base, adapter, rows_of(100), progress=stop)
    assert_base_unchanged(base, before)
    assert np.array_equal(score(base, adapter, rows_of(100)), scores)
    seen = []
    score(base, adapter, rows_of(100), progress=lambda *numbers: seen.append(numbers))
    assert len(seen) > 2 and seen == sorted(seen) and seen[-1] == (100, 100)


def test_a_loss_that_is_not_finite_is_a_run_error(base):
    expected, before = fit(base)[0], arrays_of(base)
    huge = Recipe(lora_rank=4, learning_rate=1e30, epochs=3, batch_size=4)
    with pytest.raises(RunError, match="is not finite.*Lower learning_rate") as error:
        fit(base, huge)
    assert "\n" not in str(error.value)
    assert_base_unchanged(base, before)
    assert same(fit(base)[0], expected)


def test_a_callback_that_restores_weights_does_not_copy_the_base(tmp_path):
    base = load_base(tiny_gemma(tmp_path))
    fit(base, targets=("key",))
    before = arrays_of(base)
    stopping = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=1e9, restore_best_weights=True)
    fit(base, callbacks=[stopping])
    assert_base_unchanged(base, before)


def test_generation_leaves_the_base_and_the_random_state(base):
    before, adapter = arrays_of(base), fit(base)[0]
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    jax.clear_caches()  # as at the first call
    first = generate(base, adapter, ROWS.prompts[0], 32, (1,))
    assert np.array_equal(generate(base, adapter, ROWS.prompts[0], 32, (1,)), first) and len(first) <= 32 - 11
    assert_base_unchanged(base, before)
    assert random.getstate() == state and np.random.get_state()[1].tolist() == numpy_state


def test_a_lent_adapter_stays_its_owner_s(base):
    adapter, _, _ = fit(base)
    copies = {path: array.copy() for path, array in adapter.arrays.items()}
    score(base, adapter)
    fit(base, Recipe(lora_rank=4, learning_rate=0.1, epochs=2, batch_size=4))
    assert all(np.array_equal(adapter.arrays[path], array) for path, array in copies.items())
    assert all(isinstance(array, np.ndarray) and array.dtype == np.float32 for array in adapter.arrays.values())


# --- compilations


def test_no_step_is_compiled_twice(base):
    start = new_adapter(base, seed=0)
    for dropout in (0.0, 0.1):  # without it nothing is drawn
        train_adapter(base, start, ROWS, WORDS, RECIPE, lora_dropout=dropout)
    score(base, start)
    events = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for changed, alpha, dropout, seed in [
            (dict(learning_rate=1e-3), 4.0, 0.0, 0), (dict(weight_decay=0.3), 8.0, 0.0, 1),
            (dict(schedule="constant", epochs=2), 1.5, 0.3, 2), (dict(learning_rate=0.1, epochs=5), 4.0, 0.5, 3),
        ]:  # fmt: skip
            start, recipe = new_adapter(base, alpha=alpha, seed=seed), replace(RECIPE, **changed)
            trained, _, _ = train_adapter(base, start, ROWS, WORDS, recipe, lora_dropout=dropout, seed=seed)
            score(base, trained)
        assert events == []
        train_adapter(base, new_adapter(base, 5), ROWS, WORDS, RECIPE)  # another shape is another program
        assert events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("change", [
    dict(learning_rate=0.001), dict(weight_decay=5.0), dict(schedule="constant"), dict(epochs=2),
    dict(alpha=1.0), dict(lora_dropout=0.5), dict(seed=1),
], ids=str)  # fmt: skip
def test_changed_numbers_take_effect_on_a_compiled_step(change, base):
    first, _, _ = train_adapter(base, new_adapter(base), ROWS, WORDS, RECIPE)
    settings = {k: v for k, v in change.items() if k in ("lora_dropout", "seed")}
    recipe = replace(RECIPE, **{k: v for k, v in change.items() if hasattr(RECIPE, k)})
    other, _, _ = train_adapter(base, new_adapter(base, alpha=change.get("alpha")), ROWS, WORDS, recipe, **settings)
    assert not same(first, other)
    assert same(first, train_adapter(base, new_adapter(base), ROWS, WORDS, RECIPE)[0])


# --- number formats


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_bases_train_a_float32_adapter(dtype, tiny, monkeypatch):
    real, scaled = training._step_program, []

    def watched(*arguments):
        scaled.append(inspect.signature(real).bind(*arguments).arguments["scaled"])
        return real(*arguments)

    monkeypatch.setattr(training, "_step_program", watched)
    base = load_base(tiny, dtype=dtype)
    before = arrays_of(base)
    assert {str(array.dtype) for array in jax.tree.leaves(base.arrays)} == {dtype}
    adapter, history, _ = fit(base, Recipe(lora_rank=4, learning_rate=0.02, epochs=12, batch_size=4))
    assert all(array.dtype == np.float32 and array.any() for array in adapter.arrays.values())
    assert history.loss.iloc[-1] < history.loss.iloc[0] and np.isfinite(score(base, adapter)).all()
    assert scaled == [dtype == "float16"], "the loss is scaled where small gradients would be zero"
    assert_base_unchanged(base, before)
    # the same numbers as in float32, but for the format
    exact, _, _ = fit(load_base(tiny), Recipe(lora_rank=4, learning_rate=0.02, epochs=1, batch_size=4))
    rough, _, _ = fit(base, Recipe(lora_rank=4, learning_rate=0.02, epochs=1, batch_size=4))
    distance = max(abs(exact.arrays[path] - rough.arrays[path]).max() for path in exact.arrays)
    assert distance < 0.1  # Adam's first steps are of the size of the learning rate whatever the gradient
    assert base.nbytes * 2 == load_base(tiny).nbytes


def gradient_of(base):
    """Of the loss at one batch, all LoRA parameters in one vector."""
    inputs, targets, _ = BatchSequence(ROWS, (16,), 8)[0]
    start, rng = new_adapter(base), np.random.default_rng(0)
    moved = {path: array + rng.normal(0, 0.05, array.shape).astype(np.float32) for path, array in start.arrays.items()}
    lora, scales = stacked_lora(replace(start, arrays=moved), base.config), lora_scales(start, base.config)

    @jax.jit
    def loss(lora, arrays):
        hidden = hidden_at(arrays, with_scales(lora, scales), inputs, base.config)
        log_probability = jax.nn.log_softmax(logits_of(arrays, hidden, base.config))
        return -jax.numpy.take_along_axis(log_probability, targets[..., None], axis=-1).mean()

    return np.concatenate([np.ravel(gradient) for gradient in jax.tree.leaves(jax.grad(loss)(lora, base.arrays))])


@pytest.mark.parametrize("quantization, least", [("int8", 0.95), ("int4", 0.6)])
def test_the_gradient_of_a_quantized_base_is_nearly_that_of_the_base(quantization, least, tiny):
    """The embedding is left as it is: a rounded one lets no gradient through."""
    exact, ours = gradient_of(load_base(tiny)), gradient_of(load_base(tiny, quantization=quantization))
    assert exact @ ours / np.sqrt((exact @ exact) * (ours @ ours)) > least


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_bases_train_and_predict(quantization, tiny):
    base = load_base(tiny, quantization=quantization)
    before, plain = arrays_of(base), load_base(tiny)
    assert base is not plain and base.nbytes < plain.nbytes
    assert any(str(array.dtype) == "int8" for array in jax.tree.leaves(base.arrays))
    adapter, history, _ = fit(base, Recipe(lora_rank=4, learning_rate=0.02, epochs=12, batch_size=4))
    assert history.loss.iloc[-1] < history.loss.iloc[0] - 0.5
    assert {str(array.dtype) for array in adapter.arrays.values()} == {"float32"}
    scores = score(base, adapter)
    assert np.isfinite(scores).all() and (scores.argmax(axis=1) == ROWS.label_index).mean() >= 0.5
    assert_base_unchanged(base, before)
    assert base.fingerprint != plain.fingerprint


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hidden_states_have_the_format_of_their_base_and_logits_are_float32(dtype, quantization, tiny):
    base = load_base(tiny, dtype, quantization)
    inputs, _, _ = BatchSequence(ROWS, (16,), 8)[0]
    hidden = jax.jit(hidden_at, static_argnums=3)(base.arrays, lend(base, new_adapter(base)), inputs, base.config)
    assert str(hidden.dtype) == dtype
    assert str(logits_of(base.arrays, hidden, base.config).dtype) == "float32"
    assert score(base, new_adapter(base)).dtype == np.float32


def test_int8_beside_float16_is_like_int8_in_float32(tiny):
    """Keras refuses int8 in float16; here its kernels are multiplied in float16."""
    base, wide = load_base(tiny, "float16", "int8"), load_base(tiny, "float32", "int8")
    assert str(base.arrays["embedding"].dtype) == "float16" and base.nbytes < wide.nbytes
    adapter, history, _ = fit(base, Recipe(lora_rank=4, learning_rate=0.02, epochs=12, batch_size=4))
    assert history.loss.iloc[-1] < history.loss.iloc[0] - 0.5
    log_odds = [np.subtract(*score(b, adapter).T) for b in (base, wide)]
    assert np.isfinite(log_odds).all() and np.abs(np.subtract(*log_odds)).max() < 0.2


def test_kernels_are_not_tried_out_on_a_gpu_unless_asked_for(monkeypatch):
    monkeypatch.delenv("GEMMA_LORA_SENTIMENT_XLA_SEARCH", raising=False)
    options = compiler_options("gpu")
    assert options == {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    assert compiler_options("cpu") is None
    assert float(jax.jit(lambda x: 2 * x, compiler_options=options)(1.0)) == 2.0  # XLA knows every name
    monkeypatch.setenv("GEMMA_LORA_SENTIMENT_XLA_SEARCH", "1")
    assert compiler_options("gpu") is None


def test_a_cpu_takes_less_time_over_a_step_unless_flags_say_otherwise(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    options = compiler_options("cpu", quickly=True)
    assert options["xla_backend_optimization_level"] == 1
    assert float(jax.jit(lambda x: 2 * x, compiler_options=options)(1.0)) == 2.0
    monkeypatch.setattr(scoring, "_is_known", lambda option: option == "xla_backend_optimization_level")  # older XLA
    assert compiler_options("cpu", quickly=True) == {"xla_backend_optimization_level": 1}
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert compiler_options("cpu", quickly=True) is None
    assert "xla_backend_optimization_level" not in compiler_options("gpu", quickly=True)


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(scoring, "_QUICKLY", {"xla_no_such_option": 1})
    monkeypatch.setenv("XLA_FLAGS", "")
    assert compiler_options("cpu", quickly=True) is None


@pytest.mark.parametrize("platform, dtype", [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_auto_dtype(platform, dtype):
    assert choose_dtype("auto", platform)[0] == dtype
    assert choose_dtype("float16", platform)[0] == "float16"


# --- what is refused


@pytest.mark.parametrize("call, message", [
    (lambda folder, base: load_base("gemma_2b_english"), "Preset 'gemma_2b_english' is unknown"),
    (lambda folder, base: load_base(""), "config.json"),
    (lambda folder, base: load_base(folder / "absent"), "is unknown"),
    (lambda folder, base: load_base(folder), "holds no config.json"),
    (lambda folder, base: load_base(base.preset, dtype="fp16"), "not one of auto, float32"),
    (lambda folder, base: load_base(base.preset, dtype=None), "not one of auto, float32"),
    (lambda folder, base: load_base(base.preset, quantization="int2"), "not one of None, int8, int4"),
    (lambda folder, base: new_adapter(base, 4, ("qeury",)), "LoRA target 'qeury' is not a layer"),
    (lambda folder, base: new_adapter(base, 4, ("query", "token_embedding")), "'token_embedding' is not a layer"),
    (lambda folder, base: new_adapter(base, 4, ()), "No LoRA target"),
    (lambda folder, base: new_adapter(base, 0), "lora_rank=0"),
    (lambda folder, base: new_adapter(base, -3), "lora_rank=-3"),
    (lambda folder, base: tiny_gemma(folder, "gemma9"), "Family 'gemma9'"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_in_one_line(call, message, base, tmp_path):
    before = arrays_of(base)
    with pytest.raises(ModelError, match=re.escape(message)) as error:
        call(tmp_path, base)
    assert "\n" not in str(error.value)
    assert_base_unchanged(base, before)


@pytest.fixture
def preset_of_another_kind(request, tmp_path):
    if request.param == "bert":
        backbone = keras_nlp.models.BertBackbone(
            vocabulary_size=20, num_layers=1, num_heads=1, hidden_dim=8, intermediate_dim=8, max_sequence_length=8
        )
    elif request.param == "gpt2":
        backbone = keras_nlp.models.GPT2Backbone(
            vocabulary_size=20, num_layers=1, num_heads=1, hidden_dim=8, intermediate_dim=8, max_sequence_length=8
        )
    with without_tensorflow():
        backbone.save_to_preset(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("preset_of_another_kind", ["bert", "gpt2"], indirect=True)
def test_a_model_that_is_no_gemma_is_refused_in_one_line(preset_of_another_kind):
    with pytest.raises(ModelError, match="takes Gemma 1, 2, 3 and 4") as error:
        load_base(preset_of_another_kind)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '"gemma"', '{"model_type": "mamba"}'])
def test_a_folder_whose_config_is_damaged_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as error:
        load_base(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.weights.h5", "assets/tokenizer/vocabulary.spm", "tokenizer.json"])
def test_a_preset_that_lacks_a_file_is_refused_in_one_line(name, tmp_path):
    tiny_gemma(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ModelError) as error:
        load_base(tmp_path)
    assert "\n" not in str(error.value)


def test_presets_are_resolved_without_the_network():
    for preset in ("hf://google/gemma-2b", "kaggle://keras/gemma/keras/gemma_2b_en"):
        assert resolve_preset(preset) == preset
    for preset in ("gemma_2b_en", "gemma_instruct_2b_en", "gemma2_2b_en", "gemma3_270m"):
        assert resolve_preset(preset) == preset
    assert (Path(resolve_preset("mini_ko")) / "config.json").is_file()


# --- what a process must not load


def test_tensorflow_is_never_imported(tiny, tmp_path):
    done = run_python(f"""
import sys
import gemma_lora_sentiment
assert not {{"jax", "keras", "keras_nlp", "sklearn", "pandas", "matplotlib", "tensorflow"}} & set(sys.modules)
from gemma_lora_sentiment import GemmaLoraClassifier
X = ["맛있어요", "별로예요", "최고예요", "실망했어요"] * 2
clf = GemmaLoraClassifier({tiny!r}, epochs=1, lora_rank=4, batch_size=4).fit(X, [1, 0, 1, 0] * 2)
clf.predict_proba(X), clf.generate(X[0], 4), clf.token_influence(X[0])
GemmaLoraClassifier.load(clf.save({str(tmp_path)!r})).predict(X)
found = [name for name in sys.modules if name.split(".")[0] in ("tensorflow", "tensorflow_text", "torch")]
print("FOUND", found)
""")
    assert done.stdout.strip() == "FOUND []", done.stderr[-2000:]


REFUSED = """
import sys
{first}
import gemma_lora_sentiment
try:
    from gemma_lora_sentiment import GemmaLoraClassifier
    GemmaLoraClassifier({tiny!r}, epochs=1).fit(["a", "b"], [0, 1])
except Exception as error:
    print(type(error).__name__, "|", error)
"""


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "numpy"])
def test_another_backend_in_the_environment_is_refused_with_the_remedy(backend, tiny):
    done = run_python(REFUSED.format(first="", tiny=tiny), KERAS_BACKEND=backend)
    assert done.stdout.startswith("ModelError |") and done.stdout.count("\n") == 1, done.stdout + done.stderr[-2000:]
    assert backend in done.stdout and "KERAS_BACKEND=jax" in done.stdout


def test_another_backend_imported_already_is_refused_with_the_remedy(tiny):
    # numpy stands in for tensorflow, which takes 5 s to import
    first = "import os; os.environ['KERAS_BACKEND'] = 'numpy'; import keras; os.environ['KERAS_BACKEND'] = 'jax'"
    done = run_python(REFUSED.format(first=first, tiny=tiny))
    assert done.stdout.startswith("ModelError |") and "restart" in done.stdout, done.stdout + done.stderr[-2000:]


def test_the_bundled_base_is_a_preset_of_plain_keras_hub():
    folder = Path(resolve_preset("mini_ko"))
    config = json.loads((folder / "config.json").read_text())
    assert config["class_name"] == "GemmaBackbone"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 32e6
    base = load_base("mini_ko")
    assert base.parameter_count == sum(array.size for _, array in base.weights()) < 2e7
    assert load_base("mini_ko") is base and base.dtype == "float32"


@pytest.mark.parametrize("room", ["classifier", "tutorial", "pretraining", "training"])
def test_no_room_imports_tensorflow(room, tmp_path):
    """A TensorFlow that is installed is not imported: it takes seconds, and memory of the GPU."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')", encoding="utf-8")
    code = f"""if True:
        import gemma_lora_sentiment.{room} as room
        from gemma_lora_sentiment.backend import keras, keras_nlp
        print(keras.config.backend(), keras_nlp.models.GemmaBackbone.__name__)
    """
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["jax", "GemmaBackbone"]


# --- parameters of another type


@pytest.mark.parametrize("name", ["devices", "strategy", "quantization"])
@pytest.mark.parametrize("value", [[3], [[1]], b"x", np.array([1.0, 2.0]), pd.DataFrame({"a": [1, 2]})],
                         ids=lambda value: type(value).__name__)  # fmt: skip
def test_what_says_where_a_base_lies_is_refused_in_one_line(name, value):
    with pytest.raises(ModelError, match=name) as error:
        load_base("mini_ko", **{name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_device_may_be_named_or_given():
    assert load_base("mini_ko", devices=[jax.devices()[0]]) is load_base("mini_ko", devices=["cpu:0"])
