"""The memory estimate against XLA's own plan, blocks computed twice, the batch that fits, and shapes compiled ahead."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from gemma_lora_sentiment import training
from gemma_lora_sentiment.adapter import lora_scales, new_adapter, stacked_lora, unstacked_lora
from gemma_lora_sentiment.classifier import GemmaLoraClassifier
from gemma_lora_sentiment.gemma import hidden_at, logits_of, with_scales
from gemma_lora_sentiment.memory import fitting_batch, memory_estimate, step_bytes
from gemma_lora_sentiment.model import jax, load_base, tiny_gemma
from gemma_lora_sentiment.scoring import log_softmax, score_labels
from gemma_lora_sentiment.training import Recipe, first_state, fit_to_device, train_adapter

COMMENTS = ["맛있어요", "별로예요", "친절해요", "다시는 안 가요", "최고예요", "추천해요", "실망해요 " * 6]
LABELS = ["1", "0", "1", "0", "1", "1", "0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(tiny):
    return load_base(tiny)


def step(base, batch_size=4, length=32, positions=2):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 290, (batch_size, length)).astype(np.int32)
    places = np.tile(np.arange(positions, dtype=np.int32), (batch_size, 1))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids), "positions": places}
    return inputs, ids[:, :positions], np.ones((batch_size, positions), np.float32)


def gradients(base, batch, again):
    start, rng = new_adapter(base, seed=1), np.random.default_rng(2)
    moved = {path: array + rng.normal(0, 0.1, array.shape).astype(np.float32) for path, array in start.arrays.items()}
    scales = lora_scales(start, base.config)
    inputs, targets, _ = batch

    def loss(lora):
        hidden = hidden_at(base.arrays, with_scales(lora, scales), inputs, base.config, again)
        logits = logits_of(base.arrays, hidden, base.config)
        return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()

    lora = stacked_lora(replace(start, arrays=moved), base.config)
    kept = jax.eval_shape(lambda lora: jax.vjp(loss, lora)[1], lora)  # what the backward pass needs
    found = unstacked_lora(jax.device_get(jax.jit(jax.grad(loss))(lora)), start, base.config)
    return found, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def test_blocks_computed_twice_keep_less_and_give_the_same_gradients(base):
    (once, kept), (twice, kept_twice) = (gradients(base, step(base), again) for again in (False, True))
    wider = step(base, batch_size=8)  # what grows with the rows is no part of the base
    kept, kept_twice = (gradients(base, wider, again)[1] - n for again, n in ((False, kept), (True, kept_twice)))
    assert 0 < kept_twice < kept / 2, (
        "XLA on a CPU merges the second computation with the first; JAX's own plan shows it"
    )
    for path, array in once.items():
        assert np.abs(array).max() > 0
        np.testing.assert_allclose(twice[path], array, rtol=1e-4, atol=1e-7)


def lowered(base, batch):
    """A training step, traced and not compiled."""
    start = new_adapter(base)
    numbers = dict.fromkeys(("rate", "decay", "total_steps", "warmup_steps", "dropout"), np.float32(0))
    numbers |= {"seed": np.uint32(0), "scales": lora_scales(start, base.config)}
    inputs, targets, weights = batch
    lora = stacked_lora(start, base.config)
    given = (first_state(lora), base.arrays, {**inputs, "targets": targets, "weights": weights}, numbers)
    layout = training.LoraLayout.of(lora)
    step = partial(training.train_step, config=base.config, layout=layout, scaled=base.dtype == "float16")
    return jax.jit(step, donate_argnums=0).lower(*given)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma4"])
def test_the_estimate_holds_for_every_family(family, tmp_path):
    # KerasHub halves it in Gemma 1 and 2 alone
    base = load_base(tiny_gemma(tmp_path, family, intermediate_dim=512))
    planned = step_bytes(lowered(base, step(base, 8, 64, 2)))
    assert 0.75 < memory_estimate(base, 4, batch_size=8, length=64)["activations"] / planned < 1.4


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantized_base_keeps_less_for_the_backward_pass(quantization, tmp_path):
    folder = tiny_gemma(tmp_path, "gemma3", intermediate_dim=1024, num_layers=6)
    bases = [load_base(folder, "float32", each) for each in (None, quantization)]
    planned, estimated = np.array([
        (step_bytes(lowered(base, step(base, 8, 64, 2))),
         memory_estimate(base, 4, batch_size=8, length=64)["activations"]) for base in bases
    ]).T  # fmt: skip
    wide = 5 * 2 * 1024 * 8 * 64 * 4  # gate and up of all blocks but the last
    assert planned[0] - planned[1] > 0.7 * wide and estimated[0] - estimated[1] > 0.7 * wide
    assert (0.75 < estimated / planned).all() and (estimated / planned < 1.4).all()


@pytest.mark.parametrize("batch_size, length, positions", [(4, 32, 2), (16, 64, 2), (8, 128, 2), (4, 64, 63)])
def test_the_estimate_is_what_xla_plans(batch_size, length, positions, base):
    compiled = lowered(base, step(base, batch_size, length, positions)).compile()
    estimate = memory_estimate(base, 4, batch_size=batch_size, length=length, positions=positions)
    planned = compiled.memory_analysis()
    assert 0.85 < estimate["activations"] / planned.temp_size_in_bytes < 1.15
    held = estimate["base"] + estimate["adapter"] / 2 + estimate["optimizer"]  # a gradient is no argument
    assert 0.85 < held / planned.argument_size_in_bytes < 1.15


def test_training_with_blocks_computed_twice_ends_where_it_would(tiny, base):
    comments, labels = COMMENTS, LABELS
    clf = GemmaLoraClassifier(preset=tiny, lora_rank=4, epochs=1, batch_size=4, learning_rate=0.01)
    plain = clf.fit(comments, labels).adapter_
    _, _, recipe, words, start = clf.prepare(clf.classes_)
    prompts = clf.encode(comments, base)
    index = np.array([int(label) for label in labels])
    rows = training.Rows(prompts, [words.trained_ids[i] for i in index], index, np.ones(len(index), np.float32))
    adapter, _, _ = train_adapter(base, start, rows, words, recipe, rematerialize=True)
    for path, array in plain.arrays.items():
        np.testing.assert_allclose(adapter.arrays[path], array, rtol=1e-3, atol=1e-5)


def test_fitting_batch_keeps_the_recipe_where_it_can(tmp_path):
    base = load_base(tiny_gemma(tmp_path, "gemma4"))  # of more than two blocks: the last one keeps little anyway
    needs = (base, 4, ("query", "value"), 16, lambda rows: (rows, 64, 2))
    once = memory_estimate(base, 4, batch_size=16, length=64)["total"]
    twice = memory_estimate(base, 4, batch_size=16, length=64, rematerialize=True)["total"]
    assert twice < once
    assert fitting_batch(*needs, None) == (16, False)
    assert fitting_batch(*needs, int(once / 0.9) + 2) == (16, False)
    assert fitting_batch(*needs, int(twice / 0.9) + 2) == (16, True)
    rows, rematerialize = fitting_batch(*needs, int(twice / 0.9) - 2)
    assert rows == 8 and rematerialize
    assert fitting_batch(*needs, 1) == (1, True)


def test_auto_batch_size_is_lowered_and_says_so(tiny, monkeypatch, capsys):
    clf = GemmaLoraClassifier(preset=tiny, lora_rank=4, epochs=1, verbose=1)
    base = load_base(tiny)
    little = memory_estimate(base, 4, batch_size=2, length=32, positions=2, rematerialize=True)["total"]
    monkeypatch.setattr(training, "device_bytes", lambda: little)
    with pytest.warns(UserWarning, match="batch_size is lowered from 16 to [1248], to fit the device's memory"):
        clf.fit(COMMENTS, LABELS)
    assert clf.recipe_.batch_size < 16
    assert "memory estimated: base 0.00 GB" in capsys.readouterr().err
    clf.set_params(batch_size=16).fit(COMMENTS, LABELS)  # the user's own number stands
    assert clf.recipe_.batch_size == 16


def test_shapes_compiled_side_by_side_are_not_compiled_again(tiny, monkeypatch):
    compiled = []

    def listen(event, seconds, **more):
        if event.endswith("backend_compile_duration"):
            compiled.append(more.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    monkeypatch.setattr(training, "choose_shapes", lambda *_, **__: ((16, 40), None))
    settings = dict(preset=tiny, lora_rank=3, epochs=1, batch_size=2, learning_rate=0.01)
    settings["target_layers"] = ["query", "value"]
    monkeypatch.setattr(training, "_cores", lambda: 16)
    real, ahead_of = training._compile_side_by_side, []  # how many programs were compiled before they were called
    monkeypatch.setattr(training, "_compile_side_by_side", lambda *each: ahead_of.append(real(*each)) or ahead_of[-1])
    ahead = GemmaLoraClassifier(**settings).fit(COMMENTS, LABELS)
    steps = [name for name in compiled if "train_step" in name]
    assert len(steps) == 2 and ahead_of == [2], compiled
    compiled.clear()
    again = GemmaLoraClassifier(**settings).fit(COMMENTS, LABELS)
    assert not [name for name in compiled if "train_step" in name]
    monkeypatch.setattr(training, "_cores", lambda: 2)
    training._step_program.cache_clear()
    alone = GemmaLoraClassifier(**settings).fit(COMMENTS, LABELS)
    assert ahead_of[-1] == 0 and len([name for name in compiled if "train_step" in name]) == 2
    jax.monitoring.unregister_event_duration_listener(listen)
    for path, array in alone.adapter_.arrays.items():
        assert np.array_equal(ahead.adapter_.arrays[path], array) and np.array_equal(again.adapter_.arrays[path], array)


@pytest.mark.parametrize("words", [None, {"0": "bad food", "1": "good"}])
def test_probabilities_are_those_of_one_by_one_scoring(words, tiny):
    """Buckets, batches, filled-up batches and deduplication against each comment alone, padded to its own length."""
    clf = GemmaLoraClassifier(
        preset=tiny, lora_rank=4, epochs=3, batch_size=4, learning_rate=0.02, label_words=words, dtype="float32"
    )
    clf.fit(COMMENTS, LABELS)
    comments = [*COMMENTS, *(f"{comment}{i % 3}!" for i, comment in enumerate(COMMENTS * 6)), *COMMENTS[:3]]
    together = clf.predict_proba(comments)
    base = load_base(tiny)
    prompts = clf.encode(comments, base)
    known: dict[str, np.ndarray] = {}
    for comment, prompt in zip(comments, prompts, strict=True):
        if comment not in known:
            longest = 0 if clf.words_.single_token else max(len(ids) for ids in clf.words_.scored_ids)
            length = -(-(len(prompt) + longest) // 8) * 8
            scores = score_labels(base, clf.adapter_, [prompt], clf.words_, (length,), 1)
            known[comment] = np.exp(log_softmax(scores))[0]
    alone = np.array([known[comment] for comment in comments])
    assert np.abs(together - alone).max() <= 1e-5
    assert np.ptp(together[:, 0]) > 1e-3, "the rows must differ for this to mean anything"


def test_fit_to_device_leaves_a_cpu_alone(base):
    recipe = Recipe(lora_rank=4, batch_size=16)
    start = new_adapter(base)
    ids = [np.arange(3, 20, dtype=np.int32)] * 3
    rows = training.Rows(ids, [(10, 1)] * 3, np.zeros(3, int), np.ones(3, np.float32))
    if training.device_bytes() is None:
        assert fit_to_device(base, start, recipe, rows)[:2] == (recipe, False)
    lowered, rematerialize, estimate = fit_to_device(base, start, recipe, rows, available=1)
    assert (lowered.batch_size, rematerialize) == (1, True) and estimate["total"] > base.nbytes
