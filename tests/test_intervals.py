"""What would bore a reader of the notebook on intervals: coverage by simulation, every number of classes, bad input."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import f1_score, roc_auc_score

from gemma_lora_sentiment.evaluation import compute_metrics
from gemma_lora_sentiment.intervals import (
    _weighted_metrics,
    compare_predictions,
    metric_intervals,
    metrics_table,
    metrics_with_intervals,
    paired_comparison,
)

METRICS = ["accuracy", "macro_f1", "roc_auc", "log_loss"]


def simulated(n, random, separation=1.3, share=0.5, copies=1):
    """Labels 0 and 1, and probabilities of a classifier whose accuracy depends on `separation` alone."""
    positions = (random.random(n) < share).astype(int)
    scores = expit(1.3 * (random.normal(size=n) + separation * (2 * positions - 1)))
    return np.repeat(positions, copies), np.repeat(np.stack([1 - scores, scores], axis=1), copies, axis=0)


def some_rows(n=120, n_classes=3, seed=0):
    random = np.random.default_rng(seed)
    positions = np.arange(n) % n_classes
    scores = random.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[positions]
    return positions, np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


# intervals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_weighted_metrics_are_those_of_the_rows_repeated(n_classes):
    positions, probabilities = some_rows(60, n_classes)
    probabilities = (probabilities * 16).round() / 16  # many equal scores, some of them 0
    probabilities[np.arange(60), probabilities.argmax(axis=1)] += 1 - probabilities.sum(axis=1)
    weights = np.random.default_rng(1).integers(0, 4, size=(5, 60))
    found = _weighted_metrics(weights.astype(float), positions, probabilities)
    for weight, values in zip(weights, found.T, strict=True):
        rows = np.repeat(np.arange(60), weight)
        expected = compute_metrics(positions[rows], probabilities[rows], list(range(n_classes)))
        assert values == pytest.approx([expected[name] for name in METRICS])
        predicted = probabilities[rows].argmax(axis=1)
        assert values[1] == pytest.approx(f1_score(positions[rows], predicted, average="macro"))


def test_weighted_auc_without_a_class_is_undefined():
    positions, probabilities = some_rows(10, 2)
    weights = np.array([(positions == 0).astype(float), np.ones(10)])
    found = _weighted_metrics(weights, positions, probabilities)[2]
    assert np.isnan(found[0]) and found[1] == pytest.approx(roc_auc_score(positions, probabilities[:, 1]))


def of_several_classes(n, random, sharpness=1.0, n_classes=3):
    """Labels and calibrated probabilities of a classifier of several classes; a sharpness above 1 makes it too sure."""
    positions = random.integers(0, n_classes, size=n)
    scores = sharpness * 1.6 * (random.normal(size=(n, n_classes)) + 1.6 * np.eye(n_classes)[positions])
    return positions, softmax(scores, axis=1)


def of_good(n, random):
    """A calibrated classifier that is right 97 times in 100: few rows carry most of its log-loss."""
    positions = random.integers(0, 2, size=n)
    scores = expit(3.8 * (random.normal(size=n) + 1.9 * (2 * positions - 1)))
    return positions, np.stack([1 - scores, scores], axis=1)


SIMULATED = {  # draw(n, random), rows, copies of each
    "300 rows": (simulated, 300, 1),
    "60 rows": (simulated, 60, 1),
    "a rare class": (partial(simulated, separation=1.7, share=0.2), 300, 1),
    "three copies of each": (simulated, 100, 3),
    "three classes": (of_several_classes, 150, 1),
    "three classes, too sure": (partial(of_several_classes, sharpness=2.0), 300, 1),
    "few mistakes": (of_good, 300, 1),
}


def coverage(draw, n, copies, rounds, level=0.95):
    """Share of intervals that hold the value of a million rows, for each metric."""
    random = np.random.default_rng(0)
    truth = draw(1_000_000, random)
    classes = list(range(truth[1].shape[1]))
    truth = compute_metrics(*truth, classes)
    hits = pd.DataFrame(
        {name: low <= truth[name] <= high for name, (low, high) in of_one.items()}
        for of_one in (
            metric_intervals(
                *(np.repeat(part, copies, axis=0) for part in draw(n, random)),
                classes, groups=np.repeat(np.arange(n), copies), level=level, resamples=200,
            )
            for _ in range(rounds)
        )
    )  # fmt: skip
    return hits.mean()


@pytest.mark.parametrize("kind", ["three copies of each", "three classes", "few mistakes"])
def test_intervals_cover_the_truth(kind):
    """Nominal 95 %, found between 92 and 98 % of 250 rounds; intervals at 85 % would not pass as such."""
    draw, n, copies = SIMULATED[kind]
    names = ["accuracy", "macro_f1", "log_loss"]
    assert coverage(draw, n, copies, 250)[names].between(0.92, 0.98).all()
    assert not coverage(draw, n, copies, 250, level=0.85)[names].between(0.92, 0.98).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIMULATED)
def test_intervals_cover_the_truth_in_1500_rounds(kind):
    found = coverage(*SIMULATED[kind], 1500)
    assert found[["accuracy", "macro_f1", "log_loss"]].between(0.92, 0.98).all(), found
    assert found["roc_auc"] > 0.9, found  # of few rows of a class near 1 it falls somewhat short


def test_copies_that_count_as_rows_would_be_too_sure():
    positions, probabilities = simulated(50, np.random.default_rng(3), copies=4)
    together = metric_intervals(positions, probabilities, [0, 1], groups=np.repeat(np.arange(50), 4))
    apart = metric_intervals(positions, probabilities, [0, 1])
    for name in METRICS:
        assert together[name][1] - together[name][0] > 1.5 * (apart[name][1] - apart[name][0])


def test_intervals_of_perfect_and_of_hopeless_rows():
    perfect = metric_intervals([0, 1] * 30, np.tile([[1.0, 0.0], [0.0, 1.0]], (30, 1)), [0, 1])
    assert perfect["accuracy"] == perfect["macro_f1"] == perfect["roc_auc"] == pytest.approx([0.9398, 1.0], abs=1e-3)
    assert perfect["log_loss"] is None  # it is 0 in every resample
    hopeless = metric_intervals([1, 0] * 30, np.tile([[0.9, 0.1], [0.1, 0.9]], (30, 1)), [0, 1])
    assert hopeless["accuracy"] == pytest.approx([0, 0.0602], abs=1e-3)
    assert metric_intervals([1, 1, 1], [[0.2, 0.8], [0.6, 0.4], [0.1, 0.9]], [0, 1])["roc_auc"] is None
    one = metric_intervals([1], [[0.2, 0.8]], [0, 1], resamples=50)
    assert one["accuracy"] == pytest.approx([0.2065, 1.0], abs=1e-3) and one["log_loss"] is None


@pytest.mark.parametrize("n, mistakes", [(12, 1), (60, 1), (60, 0), (300, 3)])
def test_log_loss_reaches_no_further_than_so_many_rows_can_tell(n, mistakes):
    """Of comments that are answered wrongly a share of 1 - 0.025 ** (1 / n) may be there, and none be seen."""
    probabilities = np.tile([[0.999, 0.001], [0.002, 0.998]], (n // 2, 1))
    positions = np.tile([0, 1], n // 2)
    probabilities[np.arange(mistakes), 1 - positions[:mistakes]] = 0.7  # wrong, and mildly
    probabilities[np.arange(mistakes), positions[:mistakes]] = 0.3
    assert (probabilities.argmax(axis=1) != positions).sum() == mistakes
    low, high = metric_intervals(positions, probabilities, [0, 1])["log_loss"]
    value = float(-np.log(probabilities[np.arange(n), positions]).mean())
    dearest, unseen = -np.log(0.001), 1 - 0.025 ** (1 / n)
    assert low <= value < high < 1.3 * (value + unseen * dearest)
    if not mistakes:  # nothing was seen of what a mistake costs: the interval goes as far as the bound
        assert high == pytest.approx(value + unseen * dearest, rel=0.1)


def test_copies_make_the_bound_no_tighter():
    """Sixty comments without a mistake, each ten times, are sixty comments."""
    probabilities = np.tile([[0.99, 0.01], [0.02, 0.98]], (30, 1))
    once = metric_intervals([0, 1] * 30, probabilities, [0, 1])["log_loss"]
    ten = metric_intervals(np.repeat([0, 1] * 30, 10), np.repeat(probabilities, 10, axis=0), [0, 1],
                           groups=np.repeat(np.arange(60), 10))["log_loss"]  # fmt: skip
    assert ten == pytest.approx(once, rel=1e-6)


def test_sentences_begin_with_a_capital_and_folders_keep_their_names():
    ours, theirs = np.tile([0.9, 0.1], (9, 1)), np.tile([0.1, 0.9], (9, 1))
    for name, start in {"a logistic regression on the frozen base": "A logistic", "the base itself": "The base itself",
                        "runs/one": "runs/one is", "a/run": "a/run is"}.items():  # fmt: skip
        said = paired_comparison([1] * 9, ours, theirs, [0, 1], names=("gemma + LoRA", name))["sentence"]
        assert said.startswith(start)


def test_intervals_hold_the_value_and_are_plain_numbers():
    positions, probabilities = some_rows()
    labels = np.array(["나쁨", "보통", "좋음"])[positions]
    metrics = metrics_with_intervals(labels, probabilities, ["나쁨", "보통", "좋음"])
    assert json.loads(json.dumps(metrics)) == metrics
    for name in METRICS:
        low, high = metrics["intervals"][name]
        assert low < metrics[name] < high
    narrow = metric_intervals(positions, probabilities, [0, 1, 2], level=0.5)["accuracy"]
    assert metrics["intervals"]["accuracy"][0] < narrow[0] < narrow[1] < metrics["intervals"]["accuracy"][1]
    again = metric_intervals(positions, probabilities, [0, 1, 2])
    assert again == metrics["intervals"] != metric_intervals(positions, probabilities, [0, 1, 2], seed=1)


def test_repeats_are_means():
    positions, first = some_rows(seed=0)
    _, second = some_rows(seed=1)
    both = metrics_with_intervals(positions, np.stack([first, second]), [0, 1, 2])
    each = [compute_metrics(positions, layer, [0, 1, 2]) for layer in (first, second)]
    assert both["n"] == 120
    for name in METRICS:
        assert both[name] == pytest.approx(np.mean([one[name] for one in each]))
    table = metrics_table({"ours": both, "other": each[0] | {"roc_auc": None}})
    assert table.loc["ours", "accuracy"].startswith(f"{both['accuracy']:.3f} [")
    assert table.loc["other", "roc_auc"] == "-" and "[" not in table.loc["other", "accuracy"]


# comparison -----------------------------------------------------------------------------------------------------------


def answers(*pairs):
    """Probabilities of ours and of the baseline, all labels 1, from (ours right, baseline right, how often)."""
    right, wrong = [0.2, 0.8], [0.8, 0.2]
    rows = [(right if ours else wrong, right if theirs else wrong) for ours, theirs, n in pairs for _ in range(n)]
    return [1] * len(rows), np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


@pytest.mark.parametrize(
    ("better", "worse", "sentence"),
    [
        (23, 9, "A is better than the B on 23 comments, worse on 9: p = 0.02."),
        (9, 23, "The B is better than A on 23 comments, worse on 9: p = 0.02."),
        (1, 0, "A is better than the B on 1 comment, worse on 0: p = 1.00; chance alone could make this difference."),
        (40, 5, "A is better than the B on 40 comments, worse on 5: p < 0.001."),
        (4, 4, "A and the B are each better on 4, so neither is ahead."),
        (0, 0, "A and the B are right and wrong on the same comments."),
    ],
)
def test_comparison_in_words(better, worse, sentence):
    rows = answers((1, 0, better), (0, 1, worse), (1, 1, 60), (0, 0, 5))
    found = paired_comparison(*rows, [0, 1], names=("A", "the B"))
    assert found["sentence"] == sentence
    assert (found["better"], found["worse"]) == (better, worse)
    assert found["difference"] == pytest.approx((better - worse) / found["n"])
    assert json.loads(json.dumps(found)) == found
    if better + worse:
        assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    else:
        assert found["interval"] is None


def test_paired_interval_and_test_under_no_difference():
    """The test rejects at most 5 % (it is exact, so less), and the interval covers 0 as often as it should."""
    random, rejected, covered = np.random.default_rng(0), 0, 0
    for _ in range(300):
        truth, ours = simulated(150, random)
        noise = random.normal(size=(2, 150))
        base = np.log(ours[:, 1] / ours[:, 0])
        one, two = (np.stack([1 - p, p], axis=1) for p in expit(base + noise))
        found = paired_comparison(truth, one, two, [0, 1], resamples=300)
        rejected += found["p_value"] < 0.05
        covered += found["interval"][0] <= 0 <= found["interval"][1]
    assert rejected / 300 <= 0.05
    assert 0.92 <= covered / 300 <= 0.98


def test_comparison_counts_copies_once_and_repeats_by_majority():
    truth, ours, theirs = answers((1, 0, 5), (0, 1, 2), (1, 1, 3))
    grouped = paired_comparison(truth, ours, theirs, [0, 1], groups=["a"] * 5 + list("bcdef"))
    assert (grouped["better"], grouped["worse"], grouped["n"]) == (1, 2, 10)
    twice = paired_comparison(truth, np.stack([ours, ours, theirs]), np.stack([theirs] * 3), [0, 1])
    assert (twice["better"], twice["worse"]) == (5, 2) and twice["difference"] == pytest.approx(0.2)


def predictions(labels, values, comments=None):
    comments = [f"comment {row}" for row in range(len(labels))] if comments is None else comments
    table = pd.DataFrame({"id": range(len(labels)), "comment": comments, "label": labels})
    return table.assign(p_0=values[:, 0], p_1=values[:, 1])


def test_compare_predictions_on_the_rows_that_both_have():
    positions, values = some_rows(60, 2)
    labels = positions.astype(str)
    first, second = predictions(labels, values), predictions(labels, values[::-1][:, ::-1])
    result, differences = compare_predictions(first.astype(str), second.iloc[10:].sample(frac=1, random_state=0))
    assert result["rows"] == 50 and result["rows_of_each"] == [60, 50]
    assert result["the first"]["accuracy"] == pytest.approx((values.argmax(axis=1) == positions)[10:].mean())
    assert (differences["first"] != differences["second"]).all()
    gap = result["the first"]["accuracy"] - result["the second"]["accuracy"]
    assert result["comparison"]["difference"] == pytest.approx(gap)
    assert json.loads(json.dumps(result)) == result


def test_compare_predictions_with_copies_and_repeats():
    values = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    table = predictions(["0", "1", "1", "0"], values, ["a", "b", "b", "c"])
    repeated = pd.concat([table.assign(repeat="0"), table.assign(repeat="1", p_0=0.0, p_1=1.0)])
    result, differences = compare_predictions(table, repeated)
    assert result["rows"] == 4 and len(differences) == 0  # the copies are not joined crosswise


def test_compare_predictions_refuses_what_cannot_be_compared():
    positions, values = some_rows(20, 2)
    table = predictions(positions.astype(str), values)
    for other, message in [
        (table.assign(comment="else"), "a and b share no labelled row"),
        (table.assign(label=["1" if label == "0" else "0" for label in table.label]), "share no labelled row"),
        (table.rename(columns={"p_1": "p_2"}), r"a knows the labels 0, 1, b 0, 2"),
        (table.drop(columns="label"), r"b: columns id, comment, p_0, p_1 lack"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare_predictions(table, other, names=("a", "b"))
