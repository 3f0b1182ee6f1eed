"""What would bore a reader of the analysis notebook: coverage by simulation, every number of classes, bad input."""

import json
import os
from functools import partial

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.special import expit, softmax
from sklearn.dummy import DummyClassifier
from sklearn.metrics import f1_score, roc_auc_score

from gemma_lora_sentiment.analysis import (
    _mean_cost,
    _weighted_metrics,
    apply_decision,
    apply_temperature,
    choose_abstention,
    choose_decision,
    choose_threshold,
    compare_predictions,
    conflicting_duplicates,
    decision_text,
    expected_calibration_error,
    explain_mistakes,
    fit_temperature,
    likely_label_errors,
    metric_intervals,
    metrics_table,
    metrics_with_intervals,
    paired_comparison,
    sweep,
    word_influence,
    worth_labelling,
)
from gemma_lora_sentiment.data import duplicate_groups, read_comments
from gemma_lora_sentiment.evaluation import (
    baseline_classifier,
    compute_metrics,
    cross_validate,
    probabilities_from_oof,
    simple_baselines,
    wrong_rows,
)
from gemma_lora_sentiment.figures import learning_curve, plot_sweep

# One compilation of a program is enough for all tests; compiling is most of what they cost.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["GEMMA_LORA_SENTIMENT_CACHE"] + "/jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

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


# calibration and decisions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_temperature_is_found(n_classes, temperature):
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(n_classes), size=6000)
    labels = np.array([random.choice(n_classes, p=row) for row in probabilities])
    spoilt = apply_temperature(probabilities, 1 / temperature)
    found = fit_temperature(labels, spoilt, list(range(n_classes)))
    assert found == pytest.approx(temperature, rel=0.1)
    mended = apply_temperature(spoilt, found)
    assert np.allclose(mended.sum(axis=1), 1) and (mended.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    if temperature != 1:
        before, after = (expected_calibration_error(labels, each, list(range(n_classes))) for each in (spoilt, mended))
        assert after < 0.03 < before


def test_temperature_has_ends():
    right = np.tile([[0.8, 0.2], [0.2, 0.8]], (20, 1))
    assert fit_temperature([0, 1] * 20, right, [0, 1]) == 0.1
    assert fit_temperature([1, 0] * 20, right, [0, 1]) == 10.0
    assert fit_temperature([1, 1], right[:2], [0, 1]) == 1.0
    certain = apply_temperature(np.array([[1.0, 0.0]], np.float32), 2.0)
    assert np.isfinite(certain).all() and 0 < certain[0, 1] < 0.01
    assert fit_temperature(["a", "c"] * 20, some_rows(40, 3)[1], ["a", "b", "c"]) > 0  # class b has no row
    for bad in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"temperature is .*, and must be above 0\. Pass what"):
            apply_temperature(right, bad)


def test_expected_calibration_error_by_hand():
    probabilities = [[0.05, 0.95]] * 2 + [[0.45, 0.55]] * 2
    assert expected_calibration_error([1, 0, 1, 0], probabilities, [0, 1]) == pytest.approx((0.45 * 2 + 0.05 * 2) / 4)
    assert expected_calibration_error([1], [[0.0, 1.0]], [0, 1]) == 0


@pytest.mark.parametrize("cost", [{0: 1, 1: 5}, {0: 8}, {0: 2, 1: 2}])
def test_threshold_is_the_cheapest(cost):
    positions, probabilities = simulated(400, np.random.default_rng(2), separation=0.7)
    threshold = choose_threshold(positions, probabilities, [0, 1], cost)
    costs = np.array([cost.get(0, 1), cost.get(1, 1)], float)
    spent = _mean_cost(positions, (probabilities[:, 1] >= threshold).astype(int), costs)
    every = [_mean_cost(positions, (probabilities[:, 1] >= t).astype(int), costs) for t in np.linspace(0, 1, 101)]
    assert spent <= min(every) + 0.01 and spent <= every[50]
    assert (threshold > 0.5) == (costs[0] > costs[1]) or costs[0] == costs[1]


def test_threshold_without_mistakes_is_that_of_theory():
    right = np.tile([[0.9, 0.1], [0.1, 0.9]], (20, 1))
    assert choose_threshold([0, 1] * 20, right, [0, 1], {1: 3}) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({2: 1}, "cost names 2, which is not one of 0, 1"),
        ({0: -1}, "numbers of at least 0 are needed"),
        ({0: 0}, "two of them above 0"),
        ({0: np.inf}, "numbers of at least 0 are needed"),
    ],
)
def test_costs_that_cannot_be(cost, message):
    positions, probabilities = some_rows(20, 2)
    for call in (choose_threshold, lambda *rows: choose_decision(*rows[:3], cost=rows[3])):
        with pytest.raises(ValueError, match=message):
            call(positions, probabilities, [0, 1], cost)
    with pytest.raises(ValueError, match="there are 3 classes, and a threshold parts two"):
        choose_threshold(*some_rows(20, 3), [0, 1, 2], {0: 2})


def test_abstention():
    positions, probabilities = some_rows(300, 3)
    for wanted in (0.7, 0.8, 0.9, 0.97):
        band = choose_abstention(positions, probabilities, [0, 1, 2], wanted)
        rows = probabilities.max(axis=1) >= band["confidence"]
        assert rows.mean() == pytest.approx(band["answered"])
        assert (probabilities.argmax(axis=1) == positions)[rows].mean() == pytest.approx(band["accuracy"])
        assert band["accuracy"] >= wanted
        for confidence in np.unique(probabilities.max(axis=1)):  # no lower confidence would do
            more = probabilities.max(axis=1) >= confidence
            if more.mean() > band["answered"] + 1e-9:
                assert (probabilities.argmax(axis=1) == positions)[more].mean() < wanted
    assert choose_abstention([0, 1], [[0.3, 0.7], [0.6, 0.4]], [0, 1]) == {
        "confidence": None, "answered": 0.0, "accuracy": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"accuracy is 95, and must be above 0 and at most 1"):
        choose_abstention([0], [[0.3, 0.7]], [0, 1], 95)


@pytest.mark.parametrize("cost", [None, {"좋음": 4}])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_decision_round_trip(n_classes, cost):
    positions, probabilities = some_rows(240, n_classes)
    classes = ["나쁨", "좋음", "보통"][:n_classes]
    labels = [classes[place] for place in positions]
    decision = choose_decision(labels, np.stack([probabilities] * 2), classes, cost=cost, accuracy=0.9)
    assert json.loads(json.dumps(decision, ensure_ascii=False)) == decision
    table = apply_decision(probabilities, decision)
    calibrated = apply_temperature(probabilities, decision["temperature"])
    assert np.allclose(table[[f"p_{label}" for label in classes]], calibrated)
    if cost is None:
        assert table.label.tolist() == [classes[place] for place in probabilities.argmax(axis=1)]
    else:
        assert (table.label == "좋음").sum() > (probabilities.argmax(axis=1) == 1).sum()
        assert decision["measured"]["mean_cost"][1] < decision["measured"]["mean_cost"][0]
    assert (decision["threshold"] is None) == (cost is None or n_classes == 3)
    is_right = (table.label == labels)[~table.abstains]
    assert is_right.mean() >= 0.9 and decision["measured"]["accuracy_of_answers"] > 0.85
    text = decision_text(decision)
    assert "temperature" in text and "0.9" in text and ("costs" in text) == (cost is not None)


def test_what_is_measured_was_not_chosen_on():
    """Pure noise: a band that was found by luck is not there on other rows."""
    random = np.random.default_rng(0)
    scores = random.random(200)
    decision = choose_decision(random.integers(0, 2, 200), np.stack([1 - scores, scores], axis=1), [0, 1], accuracy=0.8)
    measured = decision["measured"]
    assert measured["log_loss"][1] < measured["log_loss"][0] and measured["calibration_error"][1] < 0.1
    assert measured["accuracy_of_answers"] is None or measured["answered"] < 0.3


@pytest.mark.parametrize("mistakes", [0, 1, 4])
def test_few_mistakes_change_no_probability(mistakes):
    """Sixty sure rows: the temperature of least log-loss without a mistake would be 0.1, without end."""
    labels = [0, 1] * 30
    probabilities = np.array([[0.97, 0.03], [0.03, 0.97]] * 30)
    probabilities[:mistakes] = probabilities[:mistakes, ::-1]
    decision = choose_decision(labels, probabilities, [0, 1])
    assert decision["temperature"] == 1.0 and decision["mistakes"] == mistakes
    assert f"{mistakes} mistake" in decision_text(decision) and "too few to judge" in decision_text(decision)


@pytest.mark.parametrize("seed", range(5))
def test_a_temperature_is_shrunk_by_what_the_rows_can_tell(seed):
    """Many rows find the temperature that spoilt them, few stay near 1, and repeats are no further evidence."""
    found = {}
    for n in (40, 4000):
        labels, probabilities = some_rows(n, 2, seed)
        spoilt = apply_temperature(probabilities, 1 / 3)
        found[n] = fit_temperature(labels, spoilt, [0, 1], spread=0.5)
        least = fit_temperature(labels, spoilt, [0, 1])
        assert abs(np.log(found[n])) < abs(np.log(least)) + 1e-3  # of least log-loss, and never beyond it
        twice = fit_temperature(np.tile(labels, 2), np.tile(spoilt, (2, 1)), [0, 1], spread=0.5, repeats=2)
        assert twice == pytest.approx(found[n], rel=1e-3)
    # the rows are a little less sure than they should be before they are spoilt
    assert found[4000] == pytest.approx(fit_temperature(*some_rows(4000, 2, seed), [0, 1]) * 3, rel=0.02)
    assert 1 < found[40] < found[4000] * 1.5


@pytest.mark.parametrize("seed", range(8))
def test_no_temperature_is_stored_that_does_harm_when_it_is_tried(seed):
    labels, probabilities = some_rows(60, 2, seed)
    decision = choose_decision(labels, probabilities, [0, 1])
    before, after = decision["measured"]["log_loss"]
    assert after <= before and (decision["temperature"] == 1 or after < before)


def test_decision_of_few_rows_and_of_one_class():
    few = choose_decision([0, 1], [[0.8, 0.2], [0.3, 0.7]], [0, 1])
    assert few["measured"] is None and "a band needs 20 held-out comments; there are 2" in decision_text(few)
    assert not apply_decision([[0.6, 0.4]], few).abstains.any()  # nothing is known, so nothing is withheld
    one = choose_decision([1] * 21, [[0.8, 0.2], [0.3, 0.7], [0.2, 0.8]] * 7, [0, 1])
    assert one["temperature"] == 1.0 and one["measured"] is None
    never = choose_decision([1] * 20, [[0.8, 0.2], [0.7, 0.3]] * 10, [0, 1])
    assert never["confidence"] is None and "no sureness is enough" in decision_text(never)
    assert apply_decision([[0.0, 1.0]], never).abstains.all()


# what to label, what to read again ------------------------------------------------------------------------------------


def test_worth_labelling():
    comments = [f"{word} {number}" for word in ("국물이 밍밍", "배달이 늦음", "직원이 친절") for number in range(20)]
    doubt = np.tile(np.linspace(0.5, 0.9, 20), 3)
    found = worth_labelling(comments, np.stack([doubt, 1 - doubt], axis=1), ["0", "1"], number=3, ids=list("abc") * 20)
    assert len({comment.split()[0] for comment in found.comment}) == 3  # not three times the same complaint
    assert found.margin.is_monotonic_increasing and list(found.columns) == ["id", "comment", "margin", "p_0", "p_1"]
    everything = worth_labelling(comments, np.stack([doubt, 1 - doubt], axis=1), ["0", "1"], number=100)
    assert len(everything) == 60 and everything.id.tolist()[:3] == [0, 20, 40]
    with pytest.raises(ValueError, match="number is 0"):
        worth_labelling(comments, np.stack([doubt, 1 - doubt], axis=1), ["0", "1"], number=0)


def with_turned_labels(table, seed, number=15):
    """Row numbers, and labels in which these are turned."""
    turned = np.random.default_rng(seed).choice(len(table), size=number, replace=False)
    labels = table.label.to_numpy().copy()
    labels[turned] = np.where(labels[turned] == "0", "1", "0")
    return turned, labels


def test_label_errors_in_real_comments(shared_data):
    """Of 15 labels turned on purpose at least 11 are among the first 30, with the baseline alone.

    Nearly always: of the draws 0 to 11, eleven gave 12 to 14, and number 2 gave 10.
    """
    table, counts = read_comments(shared_data / "tarr_train.txt"), []
    for seed in range(4):
        turned, labels = with_turned_labels(table, seed)
        oof = cross_validate({"baseline": baseline_classifier()}, table.comment, labels)
        probabilities = probabilities_from_oof(oof, "baseline", ["0", "1"])
        found = likely_label_errors(table.comment, labels, probabilities, ["0", "1"], table["id"])
        assert len(found) == 300 and (found.likely_label[:30] != found.label[:30]).all()
        counts.append(int(found.id[:30].isin(table["id"][turned]).sum()))
    assert sum(count >= 11 for count in counts) >= 3 and min(counts) >= 10, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_label_errors_by_mini_ko_and_baseline(shared_data, seed):
    """The list that `cross-validate` writes: the mean of ours and of the baseline."""
    from gemma_lora_sentiment import GemmaLoraClassifier

    table = read_comments(shared_data / "tarr_train.txt")
    turned, labels = with_turned_labels(table, seed)
    oof = cross_validate({"ours": GemmaLoraClassifier(), "baseline": baseline_classifier()}, table.comment, labels)
    layers = np.concatenate([probabilities_from_oof(oof, name, ["0", "1"]) for name in ("ours", "baseline")])
    found = likely_label_errors(table.comment, labels, layers, ["0", "1"], table["id"])
    assert found.id[:30].isin(table["id"][turned]).sum() >= 11


def test_label_errors_of_three_classes():
    probabilities = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]]
    found = likely_label_errors(list("abc"), ["x", "x", "x"], probabilities, ["x", "y", "z"])
    assert found.id.tolist() == [1, 2, 0] and found.likely_label.tolist() == ["z", "y", "x"]
    assert found.suspicion.tolist() == pytest.approx([0.7, 0.1, -0.5])
    with pytest.raises(ValueError, match="2 comments, 2 ids and 3 labels"):
        likely_label_errors(list("ab"), ["x", "x", "x"], probabilities, ["x", "y", "z"])


def test_conflicting_duplicates():
    comments = ["맛있어요!", "맛있어요", "별로", "별로", "보통"]
    labels = [1, 0, 0, 0, 1]
    found = conflicting_duplicates(comments, labels, list("abcde"), duplicate_groups(comments))
    assert found.id.tolist() == ["a", "b"] and found.label.tolist() == [1, 0]
    assert list(found.columns) == ["group", "id", "comment", "label"]
    assert conflicting_duplicates(comments, labels).id.tolist() == [0, 1]  # a copy is the same everywhere
    with pytest.raises(ValueError, match="5 comments, 5 ids and 4 labels"):
        conflicting_duplicates(comments, labels[:-1])


class Counting(DummyClassifier):
    """Right about one word; counts how often it is asked."""

    calls = 0

    def predict_proba(self, X):
        type(self).calls += 1
        p = np.array([0.9 if "맛있" in text else 0.3 for text in X])
        return np.stack([1 - p, p], axis=1)


def test_influence_in_one_batch():
    fitted = Counting().fit(["a", "b"], [0, 1])
    Counting.calls = 0
    found = word_influence(fitted, "국물이 정말 맛있어요")
    assert Counting.calls == 1
    assert found.piece.tolist() == ["국물이", "정말", "맛있어요"]
    expected = np.log(0.9 / 0.1) - np.log(0.3 / 0.7)
    assert found.influence.tolist() == pytest.approx([0, 0, expected], abs=1e-5)
    assert len(word_influence(fitted, "")) == 0
    table = wrong_rows(["별로 맛있지 않아요", "좋아요"], [0, 1], fitted.predict_proba(["맛있", "x"]), [0, 1])
    explained = explain_mistakes(fitted, table, number=1)
    assert explained.spoke_for[0].startswith("맛있지 +") and explained.spoke_against[0] == ""


# sweeps ---------------------------------------------------------------------------------------------------------------


def sweep_rows(n=90):
    words = ["별로 실망", "최고 추천", "그냥 보통"]
    return [f"{words[row % 3]} {row // 3}" for row in range(n)], [row % 3 for row in range(n)]


@pytest.mark.parametrize("search", ["grid", "random", "halving"])
def test_sweep(search):
    comments, labels = sweep_rows()
    estimator = baseline_classifier()
    grid = {"logistic__C": [1e-4, 1.0, 30.0], "tfidf__ngram_range": [(1, 1), (1, 2)]}
    table = sweep(estimator, comments, labels, grid, search=search, candidates=4, folds=2)
    assert table.attrs["parameters"] == ["logistic__C", "tfidf__ngram_range"]
    assert list(table.columns[:5]) == ["logistic__C", "tfidf__ngram_range", "mean", "std", "seconds"]
    assert not hasattr(estimator[-1], "classes_") and table["mean"].between(0, 1).all()
    if search == "halving":
        assert table.resources.is_monotonic_decreasing and table.resources.nunique() > 1
    else:
        assert len(table) == {"grid": 6, "random": 4}[search] and table["mean"].is_monotonic_decreasing
    pd.testing.assert_frame_equal(
        table.drop(columns="seconds"),
        sweep(estimator, comments, labels, grid, search=search, candidates=4, folds=2).drop(columns="seconds"),
    )


def test_sweep_halves_by_a_parameter():
    comments, labels = sweep_rows(60)
    table = sweep(
        baseline_classifier(), comments, labels, {"logistic__C": [0.1, 1.0, 10.0]}, search="halving", folds=2,
        resource="logistic__max_iter", max_resources=90,
    )  # fmt: skip
    assert table.resources.max() > table.resources.min()


def test_sweep_one_change_at_a_time():
    comments, labels = sweep_rows(60)
    table = sweep(baseline_classifier(), comments, labels, [{"logistic__C": [1.0]}, {"tfidf__min_df": [2]}], folds=2)
    assert len(table) == 2 and table["logistic__C"].isna().sum() == 1


def test_sweep_refuses():
    comments, labels = sweep_rows(30)
    for grid, options, message in [
        ({"rank": [1]}, {}, r"grid names 'rank', no parameter of it \(.*logistic__C"),
        ({}, {}, "grid is empty"),
        ({"logistic__C": [1.0]}, {"search": "best"}, "search is 'best'"),
        ({"logistic__C": [1.0]}, {"folds": 11}, "fewer than folds=11"),
    ]:
        with pytest.raises(ValueError, match=message):
            sweep(baseline_classifier(), comments, labels, grid, **options)


def test_a_language_model_in_sweep_and_influence(tmp_path):
    """Learning rate, weight decay and epochs are variables of one program: nothing new is compiled for them."""
    import jax

    from gemma_lora_sentiment import GemmaLoraClassifier
    from gemma_lora_sentiment.model import tiny_gemma

    preset = str(tmp_path / "tiny")
    tiny_gemma(preset)
    comments, labels = [f"맛있어요 {row:02}" for row in range(16)], [row % 2 for row in range(16)]
    clf = GemmaLoraClassifier(preset, lora_rank=2, epochs=1, max_length=64)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        sweep(clf, comments, labels, {"learning_rate": [1e-3]}, folds=2)
        first = len(compiled)
        grid = [{"learning_rate": [1e-4, 1e-2]}, {"weight_decay": [0.1]}, {"epochs": [2]}]
        table = sweep(clf, comments, labels, grid, folds=2)
        grid = {"learning_rate": [1e-4, 1e-3, 1e-2], "weight_decay": [0.0]}
        halved = sweep(clf, comments, labels, grid, search="halving", resource="epochs", max_resources=3, folds=2)
        after_halving = len(compiled)
        programs = [{"lora_rank": [3]}, {"target_layers": [("query",)]}]
        for _ in range(2):
            ranks = sweep(clf, comments, labels, programs, folds=2)
            compiled.append("end of a sweep")
    finally:
        jax.monitoring.clear_event_listeners()
    assert first > 0 and after_halving == first
    assert len(table) == 4 and table["mean"].between(0, 1).all()
    assert halved.resources.tolist() == [3, 1, 1, 1] and halved.attrs["parameters"] == list(grid)
    assert plot_sweep(halved, "weight_decay", "learning_rate", ax=Figure().subplots()).texts
    # Ranks and layers are programs of their own, each compiled once: the second sweep of them compiles nothing.
    assert len(ranks) == 2 and compiled[-2:] == ["end of a sweep"] * 2
    assert compiled.index("end of a sweep") > first

    clf.fit(comments, labels)
    pd.testing.assert_frame_equal(word_influence(clf, comments[0]), clf.token_influence(comments[0]))
    mistakes = pd.DataFrame({"id": [7], "comment": comments[:1], "label": [0], "prediction": [1]})
    explained = explain_mistakes(clf, mistakes)
    assert explained.id.tolist() == [7] and (explained.spoke_for[0] + explained.spoke_against[0])


def test_simple_baselines():
    comments, labels = sweep_rows(30)
    oof = cross_validate(simple_baselines(), comments, labels, folds=3)
    assert oof.columns[2] == "most_frequent_prediction"
    floor = metrics_with_intervals(labels, probabilities_from_oof(oof, "most_frequent", [0, 1, 2]), [0, 1, 2])
    assert floor["accuracy"] < 0.4 and floor["log_loss"] == pytest.approx(np.log(3), abs=0.02)


def test_twins_of_another_emphasis_stay_together_from_python_too():
    comments = [text for n in range(12) for text in (f"{n}번 손님 맛있어요", f"{n}번 손님, 맛있어요!!")]
    labels = [n % 2 for n in range(12) for _ in range(2)]
    estimator = baseline_classifier()
    oof = cross_validate({"simple": estimator}, comments, labels, folds=3)
    assert (oof.fold.to_numpy().reshape(-1, 2) == oof.fold.to_numpy().reshape(-1, 2)[:, :1]).all()
    probabilities = np.full((24, 2), 0.5)
    picked = worth_labelling(comments, probabilities, [0, 1], number=12)
    assert len(set(duplicate_groups(picked.comment))) == len(picked) == 12
    with pytest.raises(ValueError, match="12 test comments are among the comments too, the first is row 0"):
        learning_curve({"simple": estimator}, comments[::2], labels[::2], comments[1::2], labels[1::2], sizes=[4])
