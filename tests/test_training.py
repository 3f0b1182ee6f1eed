"""What would bore a reader of 04_training: the arithmetic of loss, optimizer and schedule, and equal bits."""

import csv
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest

from gemma_lora_sentiment import scoring
from gemma_lora_sentiment import training as room
from gemma_lora_sentiment.adapter import RunError, lora_scales, new_adapter, stacked_lora
from gemma_lora_sentiment.gemma import hidden_at, logits_of, with_scales
from gemma_lora_sentiment.model import jax, load_base, tiny_gemma
from gemma_lora_sentiment.prompt import LabelWords, assign_buckets, spread_rows
from gemma_lora_sentiment.scoring import lend, log_softmax, score_labels
from gemma_lora_sentiment.training import (
    RECIPES,
    BatchSequence,
    Packing,
    Recipe,
    Rows,
    balanced_batches,
    choose_buckets,
    choose_shapes,
    class_weights,
    learning_rate_at,
    print_progress,
    recipe_for,
    train_adapter,
)

WORDS = LabelWords(("0", "1"), ("0", "1"), ((20,), (21,)), (1,))
RECIPE = Recipe(lora_rank=4, learning_rate=0.02, weight_decay=0.01, epochs=3, batch_size=4)
STILL = replace(RECIPE, learning_rate=1e-12, weight_decay=0.0, schedule="constant", epochs=1)  # losses of the base


def rows_of(n=8, seed=0, index=None):
    """Random prompts of one length, so that all tests share one compiled step."""
    rng = np.random.default_rng(seed)
    prompts = [np.array([2, *rng.integers(30, 250, 10)], np.int32) for _ in range(n)]
    index = np.arange(n) % 2 if index is None else np.asarray(index)
    return Rows(prompts, [WORDS.trained_ids[i] for i in index], index, np.ones(n, np.float32))


ROWS = rows_of()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(tiny):
    return load_base(tiny)


def fit(base, recipe=RECIPE, rows=ROWS, start_seed=0, **settings):
    return train_adapter(base, new_adapter(base, 4, seed=start_seed), rows, WORDS, recipe, **settings)


def same(a, b):
    return all(np.array_equal(a.arrays[path], b.arrays[path]) for path in a.arrays)


HIDDEN_AT = jax.jit(hidden_at, static_argnums=3)


def logits_at(base, adapter, batch):
    hidden = HIDDEN_AT(base.arrays, lend(base, adapter), batch, base.config)
    return np.asarray(logits_of(base.arrays, hidden, base.config)).astype(np.float64)


def losses_of(base, adapter, rows):
    """Cross-entropy of each row's response, mean over its tokens, in NumPy from the full logits."""
    losses = []
    for prompt, response in zip(rows.prompts, rows.responses, strict=True):
        ids = np.array([[*prompt, *response]], np.int32)
        ids = np.pad(ids, ((0, 0), (0, 16 - ids.shape[1])))
        mask = (np.arange(16) < len(prompt) + len(response)).astype(np.int32)[None]
        positions = np.arange(len(prompt) - 1, len(prompt) + len(response) - 1, dtype=np.int32)[None]
        logits = logits_at(base, adapter, {"token_ids": ids, "padding_mask": mask, "positions": positions})[0]
        log_probability = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses.append(-log_probability[np.arange(len(response)), list(response)].mean())
    return np.array(losses)


# --- equal bits

IN_A_PROCESS = """
import sys
sys.path[:0] = [{tests!r}]
import conftest
import test_training as t
print(t.drawn(t.load_base({tiny!r}), 3))
"""


def drawn(base, seed):
    """What a fit with everything random in it comes to."""
    adapter, history, _ = fit(base, seed=seed, start_seed=seed, lora_dropout=0.2)
    digest = hashlib.sha256(b"".join(adapter.arrays[path].tobytes() for path in sorted(adapter.arrays)))
    return f"{digest.hexdigest()} {history.loss.tolist()}"


def test_same_seed_same_bits_in_two_processes_other_seed_other_bits(tiny, base):
    other_hashes = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": other_hashes, "PYTHONPATH": str(Path(room.__file__).parents[1])}
    code = IN_A_PROCESS.format(tests=str(Path(__file__).parent), tiny=tiny)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == drawn(base, 3) + "\n" and drawn(base, 3) != drawn(base, 4)


@pytest.mark.parametrize("change", [dict(seed=1), dict(start_seed=1), dict(lora_dropout=0.5)], ids=str)
def test_each_source_of_chance_has_its_effect_and_is_repeatable(change, base):
    plain, changed = fit(base)[0], fit(base, **change)[0]
    assert not same(plain, changed)
    assert same(fit(base, **change)[0], changed) and same(fit(base)[0], plain)


def test_dropout_masks_depend_on_the_seed(base):
    assert not same(fit(base, lora_dropout=0.5, seed=1)[0], fit(base, lora_dropout=0.5, seed=2)[0])


# --- the loss


def test_padding_rows_change_nothing(base):
    """Eight rows in batches of three: the last batch holds two, and a third of weight 0."""
    start = new_adapter(base, 4)
    recipe, seen = replace(STILL, batch_size=3), []
    log = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["loss"]))
    fit(base, recipe, callbacks=[log])
    rows = losses_of(base, start, ROWS)
    plan = BatchSequence(ROWS, (16,), 3).plan(0)
    by_batch = np.array([rows[members].mean() for _, members in plan])
    assert sorted(len(members) for _, members in plan) == [2, 3, 3]
    np.testing.assert_allclose(seen, np.cumsum(by_batch) / np.arange(1, 4), rtol=1e-4)  # Keras logs running means


def test_what_stands_in_padding_rows_and_padding_tokens_changes_nothing(base, monkeypatch):
    whole = fit(base, replace(RECIPE, batch_size=3))[0]
    original = BatchSequence.__getitem__

    def spoiled(self, index):
        batch, targets, weights = original(self, index)
        empty = weights.sum(axis=1) == 0
        batch["token_ids"][empty] = 77
        targets[empty] = 99
        batch["token_ids"][batch["padding_mask"] == 0] = 55
        return batch, targets, weights

    monkeypatch.setattr(BatchSequence, "__getitem__", spoiled)
    other = fit(base, replace(RECIPE, batch_size=3))[0]
    for path, array in whole.arrays.items():
        np.testing.assert_allclose(other.arrays[path], array, atol=1e-5)


def test_first_loss_of_the_whole_text_is_the_mean_over_all_tokens(base):
    recipe = replace(STILL, loss_on="text", batch_size=8)
    _, history, _ = fit(base, recipe)
    ids = np.array([[*p, *r] for p, r in zip(ROWS.prompts, ROWS.responses, strict=True)], np.int32)
    positions = np.tile(np.arange(ids.shape[1] - 1, dtype=np.int32), (8, 1))
    batch = {"token_ids": ids, "padding_mask": np.ones_like(ids), "positions": positions}
    logits = logits_at(base, new_adapter(base, 4), batch)
    log_probability = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_probability, ids[:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(history.loss[0], expected, rtol=1e-4)


def test_balanced_weights_equal_repeated_rows(base):
    unbalanced = rows_of(4, index=[0, 0, 0, 1])
    weighted = replace(unbalanced, weights=class_weights(unbalanced.label_index, 2, "balanced"))
    repeated = unbalanced.take([0, 1, 2, 3, 3, 3])
    recipe = replace(STILL, batch_size=8)
    first = fit(base, recipe, weighted)[1].loss[0]
    np.testing.assert_allclose(first, fit(base, recipe, repeated)[1].loss[0], rtol=1e-5)
    losses = losses_of(base, new_adapter(base, 4), unbalanced)
    np.testing.assert_allclose(first, (losses[:3].mean() + losses[3]) / 2, rtol=1e-4)


@pytest.mark.parametrize("index, weight, expected", [
    ([0, 1], None, [1, 1]), ([0, 0, 1, 2], "balanced", [2 / 3, 2 / 3, 4 / 3, 4 / 3]),
    ([0, 1], [1, 3], [0.5, 1.5]), ([0, 2], "balanced", [1, 1]), ([0, 0, 1], [0, 5], [0, 0, 3]),
])  # fmt: skip
def test_class_weights(index, weight, expected):
    weights = class_weights(np.array(index), max(index) + 1, weight)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert weights.dtype == np.float32


@pytest.mark.parametrize("weight", [[1], [1, 2, 3], [-1, 2], [0, 0], [np.nan, 1], [np.inf, 1], [[1, 2]]], ids=str)
def test_class_weights_that_cannot_work_are_refused(weight):
    with pytest.raises(ValueError, match="class_weight needs 2 numbers"):
        class_weights(np.array([0, 1]), 2, weight)


# --- the optimizer


@pytest.mark.parametrize("total, warmup, expected", [
    (0, 1, [1.0] * 12),  # constant
    (10, 2, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0]),
    (4, 1, [1, 1, 2 / 3, 1 / 3, 0, 0, 0, 0, 0, 0, 0, 0]),
    (1, 1, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
])  # fmt: skip
def test_warm_up_and_decay_of_the_learning_rate(total, warmup, expected):
    numbers = {"rate": 0.3, "total_steps": float(total), "warmup_steps": float(warmup)}
    rates = [float(learning_rate_at(np.int32(step), numbers)) for step in range(12)]
    np.testing.assert_allclose(rates, 0.3 * np.array(expected), atol=1e-6)


def adamw_by_hand(values, gradients, rates, decay):
    values, m, v = values.astype(np.float64), 0.0, 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        direction = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        values = values - rate * (direction + decay * values)
    return values


def test_the_step_is_adamw_against_numpy(base):
    """Five steps of one batch; gradients by JAX of a loss written out here."""
    start = fit(base, replace(RECIPE, epochs=1))[0]  # B is not zero, so A has a gradient
    batches = BatchSequence(ROWS, (16,), 8)
    inputs, targets, weights = batches[0]
    batch = {**inputs, "targets": targets, "weights": weights}
    scales = lora_scales(start, base.config)
    numbers = {"rate": 0.1, "decay": 0.5, "total_steps": 6.0, "warmup_steps": 2.0, "dropout": 0.0, "seed": 0}

    def loss_of(lora):
        hidden = hidden_at(base.arrays, with_scales(lora, scales), inputs, base.config)
        chosen = room.jax.nn.log_softmax(logits_of(base.arrays, hidden, base.config))
        losses = -room.jnp.take_along_axis(chosen, targets[..., None], axis=-1)[..., 0]
        return (losses * weights).sum() / weights.sum()

    layout = room.LoraLayout.of(stacked_lora(start, base.config))
    step = room.jax.jit(partial(room.train_step, config=base.config, layout=layout))
    gradient_of = room.jax.jit(room.jax.grad(loss_of))
    state, seen = room.first_state(stacked_lora(start, base.config)), []
    for _ in range(5):
        seen.append(room.jax.tree.map(np.asarray, gradient_of(layout.cut(state["adapter"]))))
        state, _ = step(state, base.arrays, batch, {**numbers, "scales": scales})
    rates = 0.1 * np.array([0.5, 1, 1, 3 / 4, 2 / 4])
    first, last = stacked_lora(start, base.config)[0]["query"]["a"], layout.cut(state["adapter"])[0]["query"]["a"]
    by_hand = adamw_by_hand(first, [gradients[0]["query"]["a"] for gradients in seen], rates, 0.5)
    np.testing.assert_allclose(last, by_hand, rtol=1e-3, atol=1e-4)


def test_weight_decay_reaches_the_adapter_and_only_it(base):
    """A's gradient is zero in the first step, because B is: only decay moves it then."""
    start = new_adapter(base, 4)
    recipe = replace(RECIPE, batch_size=8, epochs=1, schedule="constant", learning_rate=0.01)
    before = np.asarray(base.arrays["embedding"]).copy()
    decayed, _, _ = fit(base, replace(recipe, weight_decay=2.0))
    plain, _, _ = fit(base, replace(recipe, weight_decay=0.0))
    for path, array in start.arrays.items():
        if path.endswith("lora_kernel_a"):
            np.testing.assert_allclose(decayed.arrays[path], array * (1 - 0.01 * 2.0), rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(plain.arrays[path], array, rtol=1e-6)
    assert np.array_equal(np.asarray(base.arrays["embedding"]), before)


def test_the_schedule_of_a_fit_spans_its_steps(base):
    rates = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            rates.append(self.model.optimizer.learning_rate)

    fit(base, replace(RECIPE, epochs=1, batch_size=4), callbacks=[Watch()])
    assert rates[0] == pytest.approx(0.02)


# --- early stopping, callbacks, history


def test_early_stopping_returns_the_best_of_the_validation(base):
    kept, held_out = ROWS.take([0, 1, 2, 3]), ROWS.take([4, 5, 6, 7])
    recipe = replace(RECIPE, learning_rate=0.05, epochs=40)
    adapter, history, buckets = fit(base, recipe, kept, validation=held_out, patience=2)
    best = int(history.val_loss.idxmin())
    assert len(history) == best + 3 < 40
    assert (history.val_loss.iloc[best + 1 :] >= history.val_loss[best]).all()
    log_probability = log_softmax(score_labels(base, adapter, held_out.prompts, WORDS, buckets))
    of_labels = log_probability[np.arange(4), held_out.label_index]
    np.testing.assert_allclose(-of_labels.mean(), history.val_loss[best], rtol=1e-5)
    accuracy = (log_probability.argmax(axis=1) == held_out.label_index).mean()
    assert accuracy == history.val_accuracy[best]


def test_without_patience_all_epochs_run_and_the_best_comes_back(base):
    kept, held_out = ROWS.take([0, 1, 2, 3]), ROWS.take([4, 5, 6, 7])
    recipe = replace(RECIPE, learning_rate=0.05, epochs=6)
    adapter, history, _ = fit(base, recipe, kept, validation=held_out)
    assert len(history) == 6
    log_probability = log_softmax(score_labels(base, adapter, held_out.prompts, WORDS))
    of_labels = log_probability[np.arange(4), held_out.label_index]
    np.testing.assert_allclose(-of_labels.mean(), history.val_loss.min(), rtol=1e-5)


def test_history_has_a_row_an_epoch(base):
    _, history, buckets = fit(base)
    assert set(history.columns) == {"epoch", "loss", "accuracy", "seconds"} and buckets == (16,)
    assert history.epoch.tolist() == [1, 2, 3] and (history.seconds > 0).all()
    _, history, _ = fit(base, validation=ROWS.take([0, 1]))
    assert set(history.columns) == {"epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds"}


def test_the_user_s_keras_callbacks_work(base, tmp_path):
    seen = []
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=1)
    recipe = replace(RECIPE, learning_rate=0.05, epochs=40)
    _, history, _ = fit(
        base, recipe, ROWS.take([0, 1, 2, 3]), validation=ROWS.take([4, 5, 6, 7]),
        callbacks=[stopping, keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
                   keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))],
    )  # fmt: skip
    assert 1 < len(history) < 40 and stopping.stopped_epoch == len(history) - 1
    assert [logs["val_loss"] for logs in seen] == history.val_loss.tolist()
    with open(tmp_path / "log.csv") as file:
        table = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in table] == pytest.approx(history.val_loss.tolist())
    assert {"epoch", "loss", "accuracy", "val_loss", "val_accuracy"} <= set(table[0])


def test_a_callback_that_lowers_the_learning_rate_is_obeyed_and_forgotten(base):
    recipe = replace(RECIPE, schedule="constant")
    plain = fit(base, recipe)[0]
    lower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.02 * 0.1**epoch)
    assert not same(fit(base, recipe, callbacks=[lower])[0], plain)
    assert same(fit(base, recipe)[0], plain)


def test_progress_is_called_once_an_epoch_and_prints_to_standard_error(base, capsys):
    calls = []
    fit(base, progress=calls.append)
    assert [call["epoch"] for call in calls] == [1, 2, 3]
    print_progress({"epoch": 2, "loss": 0.5, "val_loss": 0.25, "seconds": 1.0})
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "epoch 2: loss 0.5000, val_loss 0.2500 (1.0 s)\n"


@pytest.mark.parametrize("recipe", [replace(RECIPE, learning_rate=1e30), replace(RECIPE, learning_rate=float("inf"))])
def test_a_loss_that_is_not_finite_is_a_run_error_and_the_base_survives(recipe, base):
    good = fit(base)[0]
    arrays = room.jax.tree.leaves(base.arrays)
    with pytest.raises(RunError, match="not finite") as error:
        fit(base, recipe)
    assert "\n" not in str(error.value)
    now = room.jax.tree.leaves(base.arrays)
    assert all(b is a and not a.is_deleted() for b, a in zip(now, arrays, strict=True))
    assert same(fit(base)[0], good)


def test_an_adapter_that_does_not_move_is_a_run_error(base):
    with pytest.raises(RunError, match="did not move"):
        fit(base, replace(RECIPE, learning_rate=0.0))


# --- recipes


def test_the_tutorial_s_recipe_is_the_tutorial_s():
    name, recipe = recipe_for("gemma_2b_en", "tutorial")
    assert name == "tutorial"
    assert vars(recipe) == dict(lora_rank=4, learning_rate=5e-5, weight_decay=0.01, epochs=5, batch_size=1,
                                max_length=512, loss_on="text", schedule="constant",
                                target_layers=("query", "value"), global_clipnorm=0.0, among_labels=0.0,
                                label_smoothing=0.0)  # fmt: skip


def test_the_tutorial_s_recipe_trains(base):
    _, history, buckets = fit(base, RECIPES["tutorial"], ROWS.take([0, 1, 2]))
    assert len(history) == 5 and history.loss.iloc[-1] < history.loss.iloc[0] and buckets == (16,)


@pytest.mark.parametrize("preset, count, name", [
    ("mini_ko", None, "mini_ko"), ("mini_ko", 11_000_000, "mini_ko"), ("/a/folder", 11_000_000, "mini_ko"),
    ("gemma_2b_en", 2_506_172_416, "gemma"), ("gemma3_270m", 268_000_000, "gemma"), ("/a/folder", None, "gemma"),
])  # fmt: skip
def test_each_preset_brings_its_recipe(preset, count, name):
    assert recipe_for(preset, "auto", count) == (name, RECIPES[name])


# --- batches and buckets


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("epoch", [0, 7])
def test_every_row_stands_once_in_an_epoch(batch_size, epoch):
    rng = np.random.default_rng(batch_size)
    prompts = [np.arange(2, 3 + n, dtype=np.int32) for n in rng.integers(3, 60, 23)]
    rows = Rows(prompts, [(5, 1)] * 23, np.zeros(23, int), np.arange(1, 24, dtype=np.float32))
    buckets = choose_buckets(rows.lengths, 10, compile_tokens=10)
    batches = BatchSequence(rows, buckets, batch_size, seed=4)
    batches.epoch = epoch
    items = [batches[i] for i in range(len(batches))]
    assert len(batches.plan(epoch)) == len(batches)
    weights = np.concatenate([weights[:, 0] for _, _, weights in items])
    assert sorted(weights[weights > 0]) == list(range(1, 24))
    for inputs, targets, weights in items:
        assert inputs["token_ids"].shape[0] == len(targets) == len(weights) == batch_size
        assert inputs["token_ids"].shape[1] in buckets
    shapes = {inputs["token_ids"].shape for inputs, _, _ in items}
    assert len(shapes) <= len(buckets) <= 4


def test_choose_buckets_is_the_cheapest_number_of_shapes():
    lengths = np.random.default_rng(0).integers(5, 200, 300)
    for passes, price in ((1, 0), (1, 1_000), (8, 15_000), (50, 15_000)):
        chosen = choose_buckets(lengths, passes, price)

        def cost(buckets):
            padded = np.array(buckets)[assign_buckets(lengths, buckets)].sum()
            return padded * passes + price * len(buckets)  # noqa: B023

        assert all(cost(chosen) <= cost(room.length_buckets(lengths, n)) for n in range(1, 5))


# --- scoring


def test_scores_do_not_depend_on_batches_buckets_or_order(base):
    adapter = fit(base)[0]
    rng = np.random.default_rng(2)
    prompts = [np.array([2, *rng.integers(30, 250, n)], np.int32) for n in (3, 15, 7, 30, 1, 11, 20, 4, 9)]
    whole = score_labels(base, adapter, prompts, WORDS, (32,), 8)
    assert whole.dtype == np.float32 and whole.shape == (9, 2)
    order = rng.permutation(9)
    shuffled = score_labels(base, adapter, [prompts[i] for i in order], WORDS, (32,), 8)
    np.testing.assert_allclose(shuffled, whole[order], atol=1e-4)
    np.testing.assert_allclose(score_labels(base, adapter, prompts, WORDS, (16,), 8), whole, atol=1e-4)
    assert score_labels(base, adapter, [], WORDS).shape == (0, 2)


def test_log_softmax_is_a_distribution_even_for_extreme_scores():
    rows = np.exp(log_softmax(np.array([[1e30, 0], [-1e30, 1e30], [3, 3], [88, -88]], np.float32)))
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    assert np.isfinite(rows).all() and rows[2].tolist() == [0.5, 0.5]


def test_every_batch_fits_its_lines_and_every_row_comes_once_an_epoch():
    lengths = np.clip(np.random.default_rng(1).gamma(3, 9, 301).astype(int) + 5, 6, 200)
    for batch_size, replicas in ((16, 1), (16, 4), (3, 2), (500, 1)):
        packing = Packing.of(lengths, batch_size, 3, seed=7, replicas=replicas)
        assert packing.lines % replicas == 0 and packing.length % 16 == 0
        for epoch in range(3):
            batches = balanced_batches(lengths, batch_size, np.random.default_rng([7, epoch]))
            assert sorted(np.concatenate(batches).tolist()) == list(range(301))
            assert max(map(len, batches)) <= batch_size and np.ptp([len(batch) for batch in batches]) <= 1
            for batch in batches:
                lines = spread_rows(lengths[batch], packing.lines, packing.rows)
                assert max(lengths[batch[line]].sum() for line in lines) <= packing.length
                assert max(map(len, lines)) <= packing.rows
    orders = [np.concatenate(balanced_batches(lengths, 16, np.random.default_rng([7, e]))).tolist() for e in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("platform, dear", [("cpu", 1024), ("gpu", 4096)])
def test_lines_are_chosen_for_the_epochs_that_they_must_hold(platform, dear, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    lengths = np.clip(np.random.default_rng(0).gamma(6, 2.9, 300) + 20, 24, 83).astype(int) + 2

    def cost(packing):  # of a token among its line's neighbours
        return packing.lines * packing.length * (1 + packing.length / dear)

    chosen = Packing.of(lengths, 16, 4)
    others = [Packing.of(lengths, 16, 4, lines=lines) for lines in (1, 2, 3, 4, 6, 8, 12, 16)]
    assert cost(chosen) == min(map(cost, others))
    after_one = Packing.of(lengths, 16, 1)  # three lines, which later epochs make longer
    assert platform != "cpu" or cost(chosen) < cost(Packing.of(lengths, 16, 4, lines=after_one.lines))
    assert Packing.of(lengths, 16, 40).lines == chosen.lines


def test_shapes_are_chosen_by_what_they_cost():
    rng = np.random.default_rng(2)
    prompts = [np.full(n, 5, np.int32) for n in rng.integers(5, 60, 200)]
    rows = Rows(prompts, [(20, 1)] * 200, np.zeros(200, int), np.ones(200, np.float32))
    recipe = replace(RECIPE, batch_size=16)
    buckets, packing = choose_shapes(rows, recipe)
    assert buckets == (packing.length,)
    assert 13 * packing.lines * packing.length < 1.3 * rows.lengths.sum()  # 13 steps; one row a line: 1.8
    assert choose_shapes(rows, recipe, replicas=4)[1].lines % 4 == 0
    for other in (replace(recipe, loss_on="text"), replace(recipe, batch_size=1)):
        assert choose_shapes(rows, other)[1] is None


def test_scoring_shapes_do_not_depend_on_the_rows():
    rng = np.random.default_rng(3)
    for lengths in (rng.integers(4, 128, 700), np.array([9]), np.full(90, 128)):
        steps = list(scoring._scoring_steps(lengths))
        assert {(length, places) for length, places, _ in steps} == {(128, 16)}
        assert {len(lines) for _, _, lines in steps} == {8}
    lengths = np.concatenate([rng.integers(4, 128, 300), [129, 200, 900]])
    steps = list(scoring._scoring_steps(lengths))
    assert sorted(row for _, _, lines in steps for line in lines for row in line) == list(range(303))
    assert all(lengths[line].sum() <= length for length, _, lines in steps for line in lines)
    assert [length for length, _, _ in steps] == sorted((length for length, _, _ in steps), reverse=True)
    of_long = [(length, lines) for length, _, lines in steps if length > 128]
    used = sum(lengths[line].sum() for _, lines in of_long for line in lines)
    assert used > 0.9 * sum(length * len(lines) for length, lines in of_long), "short rows take what long ones leave"


# --- clipping, and the loss among the label words


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_loss_among_labels_is_that_of_their_softmax(smoothing):
    rng = np.random.default_rng(0)
    logits, label_ids = rng.normal(size=(4, 3, 50)).astype(np.float32), np.array([7, 40, 41])
    targets = np.array([[7, 1, 0], [41, 1, 0], [40, 40, 1], [3, 7, 41]])
    found = np.asarray(room.losses_among_labels(logits, targets, label_ids, smoothing))
    among = log_softmax(logits[..., label_ids].reshape(-1, 3)).reshape(4, 3, 3)
    for place in np.ndindex(targets.shape):
        hit = np.flatnonzero(label_ids == targets[place])
        of_target = (1 - smoothing) * among[place][hit[0]] if len(hit) else 0.0
        expected = -of_target - smoothing * among[place].mean() if len(hit) else 0.0
        assert found[place] == pytest.approx(expected, abs=1e-5)


def test_smoothed_targets_bound_how_sure_a_fit_becomes(base):
    sure = {}
    for smoothing in (0.0, 0.4):
        recipe = replace(RECIPE, epochs=30, learning_rate=3e-2, among_labels=1.0, label_smoothing=smoothing)
        adapter, _, _ = fit(base, recipe)
        scores = log_softmax(score_labels(base, adapter, ROWS.prompts, WORDS))
        sure[smoothing] = float(np.exp(scores.max(axis=1)).mean())
    assert sure[0.0] > 0.95 and 0.7 < sure[0.4] < 0.9


def test_words_of_several_tokens_and_the_whole_text_get_the_whole_loss(base):
    several = LabelWords(("0", "1"), ("0", "1"), ((20, 22), (21, 22)), (1,))
    parts = replace(RECIPE, among_labels=0.9)
    assert room.parts_labels(parts, WORDS)
    assert not room.parts_labels(parts, several)
    assert not room.parts_labels(replace(parts, loss_on="text"), WORDS)
    assert not room.parts_labels(RECIPE, WORDS)
    rows = rows_of()
    of_several = [several.trained_ids[label] for label in rows.label_index]
    rows = replace(rows, responses=of_several)
    start = new_adapter(base, rank=4, seed=0)
    ours, plain = (train_adapter(base, start, rows, several, recipe)[0] for recipe in (parts, RECIPE))
    assert all(np.array_equal(ours.arrays[path], plain.arrays[path]) for path in plain.arrays)


def test_a_large_gradient_is_remembered_no_longer_than_a_clipped_one(base):
    """Adam's second moment holds the square of the first gradients for hundreds of steps; clipping bounds it."""
    start, batch = new_adapter(base, rank=4, seed=0), BatchSequence(rows_of(), (16,), 8)[0]
    batch = {**batch[0], "targets": batch[1], "weights": batch[2]}
    lora = stacked_lora(start, base.config)
    layout = room.LoraLayout.of(lora)
    moments = {}
    for clipnorm in (0.0, 1e-3, 1e3):
        numbers = room.step_numbers(base, start, replace(RECIPE, global_clipnorm=clipnorm), 10, 0.0, 0, WORDS)
        state, _ = room.train_step(room.first_state(lora), base.arrays, batch, numbers, base.config, layout)
        moments[clipnorm] = np.asarray(state["adam"].nu) / 0.001
    assert np.sqrt(moments[1e-3].sum()) == pytest.approx(1e-3, rel=1e-3)
    assert np.sqrt(moments[0.0].sum()) > 1e-2
    np.testing.assert_array_equal(moments[1e3], moments[0.0])


def test_a_callback_that_stops_at_once_stops_after_an_epoch_as_in_keras(base):
    class Impatient(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.stop_training = True

    _, history, _ = fit(base, replace(RECIPE, epochs=3), callbacks=[Impatient()])
    assert len(history) == 1
