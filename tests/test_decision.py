"""What would bore a reader of the notebook on decisions: temperatures by simulation, many classes, few rows."""

import json

import numpy as np
import pytest
from test_intervals import simulated, some_rows

from gemma_lora_sentiment.decision import (
    _mean_cost,
    apply_decision,
    apply_temperature,
    choose_abstention,
    choose_decision,
    choose_threshold,
    decision_text,
    expected_calibration_error,
    fit_temperature,
)

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


def test_where_all_may_be_answered_no_threshold_is_named():
    """The most probable of two labels is never below 0.5, so "at least 0.28" would bind nothing."""
    positions, probabilities = some_rows(300, 2)
    assert choose_abstention(positions, probabilities, [0, 1], 0.5)["confidence"] == 0.0
    decision = choose_decision(positions, probabilities, [0, 1], accuracy=0.6)
    assert decision["confidence"] == 0.0 and not apply_decision(probabilities, decision).abstains.any()
    last = decision_text(decision).splitlines()[-1]
    assert last.startswith("For an accuracy of 0.6 all may be answered: 100% of other comments answered, ")
    assert last.endswith(" of them right.") and "probable" not in last
    old = {**decision, "confidence": 0.28}  # as earlier versions stored it
    assert decision_text(old).splitlines()[-1] == last


def test_a_target_that_is_missed_is_said():
    positions, probabilities = some_rows(200, 2)
    decision = choose_decision(positions, probabilities, [0, 1], accuracy=0.95)
    for right, missed in ((0.912, True), (0.95, False), (0.97, False)):
        measured = {**decision["measured"], "answered": 0.85, "accuracy_of_answers": right}
        text = decision_text({**decision, "confidence": 0.908, "measured": measured})
        start = "For an accuracy of 0.95, answer only what is at least 0.908 probable: 85% of other comments answered"
        assert f"{start}, {right:.3f} of them right" in text
        assert text.endswith("so 0.95 is not reached on rows it was not chosen on.") == missed
    none = {**decision, "confidence": 0.9, "measured": {**decision["measured"], "accuracy_of_answers": None}}
    assert decision_text(none).endswith("; of comments it was not chosen on it would answer none.")


@pytest.mark.parametrize("costs, dearer", [([0.025, 0.075], True), ([0.075, 0.025], False), ([0.05, 0.05], False)])
def test_costs_that_made_it_dearer_are_said(costs, dearer):
    positions, probabilities = some_rows(200, 3)
    decision = choose_decision(positions, probabilities, [0, 1, 2], cost={1: 5})
    text = decision_text({**decision, "measured": {**decision["measured"], "mean_cost": costs}})
    assert f"a comment costs {costs[1]:.3f} in place of {costs[0]:.3f}" in text
    assert ("the most probable label is the cheaper answer" in text) == dearer


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
    few = {0: "0 mistakes in 60 comments are", 1: "1 mistake in 60 comments is", 4: "4 mistakes in 60 comments are"}
    assert decision_text(decision).startswith(f"{few[mistakes]} too few to judge")


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
