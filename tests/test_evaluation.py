"""What would bore a reader of the evaluation notebook: every label type, every error, sweeps, state left as it was."""

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from sklearn.calibration import CalibratedClassifierCV
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import f1_score, log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from gemma_lora_sentiment.evaluation import (
    baseline_classifier,
    comparison_table,
    compute_metrics,
    cross_validate,
    explain_mistakes,
    fold_indices,
    metrics_from_oof,
    probabilities_from_oof,
    simple_baselines,
    simpler_verdicts,
    sweep,
    verdict,
    word_influence,
    wrong_rows,
)
from gemma_lora_sentiment.figures import learning_curve, plot_sweep
from gemma_lora_sentiment.intervals import metrics_with_intervals

# One compilation of a program is enough for all tests; compiling is most of what they cost.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["GEMMA_LORA_SENTIMENT_CACHE"] + "/jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

TARR = Path(__file__).parents[2] / "shared" / "data" / "tarr_train.txt"


@pytest.fixture(autouse=True)
def same_global_state():
    """No test of this file may change NumPy's global random state; importing Keras draws from it, once."""
    had_keras, (_, keys, position, *_) = "keras" in sys.modules, np.random.get_state()
    keys = keys.copy()
    yield
    if had_keras or "keras" not in sys.modules:
        assert np.array_equal(np.random.get_state()[1], keys) and np.random.get_state()[2] == position


def some_rows(n=60, n_classes=2, seed=0):
    """Positions and probabilities of a classifier that is right more often than not."""
    random = np.random.default_rng(seed)
    positions = np.arange(n) % n_classes
    scores = random.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[positions]
    return positions, np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


def comments_and_labels(n=30, labels=("bad", "good")):
    """Comments, all different, whose words tell the label."""
    words = ["별로 실망", "최고 추천", "그냥 보통", "양이 많음"]
    rows = [(f"{words[i % len(labels)]} {i}번째", labels[i % len(labels)]) for i in range(n)]
    return [comment for comment, _ in rows], [label for _, label in rows]


# compute_metrics ------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    # Right, right, wrong, tie: a tie goes to the earlier class, so the fourth row is wrong.
    probabilities = [[0.8, 0.2], [0.4, 0.6], [0.7, 0.3], [0.5, 0.5]]
    metrics = compute_metrics([0, 1, 1, 1], probabilities, [0, 1])
    assert metrics["accuracy"] == 0.5
    assert metrics["macro_f1"] == pytest.approx((0.5 + 0.5) / 2)  # class 0: 1 of 3 right; class 1: 1 of 3 found
    assert metrics["roc_auc"] == 1.0
    assert metrics["log_loss"] == pytest.approx(-np.log(0.8 * 0.6 * 0.3 * 0.5) / 4)
    assert metrics["n"] == 4 and metrics["classes"] == [0, 1]
    assert list(metrics) == ["accuracy", "macro_f1", "roc_auc", "log_loss", "n", "classes"]


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_metrics_as_scikit_learn(n_classes):
    positions, probabilities = some_rows(100, n_classes)
    metrics = compute_metrics(positions, probabilities, list(range(n_classes)))
    predicted = probabilities.argmax(axis=1)
    assert metrics["accuracy"] == pytest.approx(np.mean(predicted == positions))
    assert metrics["macro_f1"] == pytest.approx(f1_score(positions, predicted, average="macro"))
    assert metrics["log_loss"] == pytest.approx(log_loss(positions, probabilities))
    scores = probabilities[:, 1] if n_classes == 2 else probabilities
    assert metrics["roc_auc"] == pytest.approx(roc_auc_score(positions, scores, multi_class="ovr", average="macro"))


@pytest.mark.parametrize(
    "classes",
    [["0", "1"], ["01", "1"], [0, 1], [-1, 7], [False, True], ["부정", "긍정"], [0.5, 1.5]],
    ids=str,
)
def test_metrics_of_any_label_type(classes):
    positions, probabilities = some_rows()
    labels = [classes[position] for position in positions]
    expected = compute_metrics(positions, probabilities, [0, 1]) | {"classes": classes}
    for y_true, order in [
        (labels, classes),
        (np.array(labels), np.array(classes)),
        (pd.Series(labels, index=range(7, 67)), pd.Series(classes)),
        (np.array(labels, dtype=object), tuple(classes)),
        (pd.Series(labels, dtype="category"), classes),
    ]:
        metrics = compute_metrics(y_true, probabilities, order)
        assert metrics == expected
        assert [type(label) for label in metrics["classes"]] == [type(label) for label in classes]
        assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_class_order_is_respected():
    positions, probabilities = some_rows()
    swapped = compute_metrics(positions, probabilities[:, ::-1], [1, 0])
    straight = compute_metrics(positions, probabilities, [0, 1])
    for key in ("accuracy", "macro_f1", "roc_auc", "log_loss"):
        assert swapped[key] == pytest.approx(straight[key])


def test_roc_auc_of_missing_classes():
    positions, probabilities = some_rows(60, 3)
    assert compute_metrics([2, 2], probabilities[:2], [0, 1, 2])["roc_auc"] is None
    rows = positions != 1
    areas = [roc_auc_score(positions[rows] == column, probabilities[rows, column]) for column in (0, 2)]
    assert compute_metrics(positions[rows], probabilities[rows], [0, 1, 2])["roc_auc"] == pytest.approx(np.mean(areas))


def test_log_loss_of_float32_certainty_is_finite():
    certain = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    assert compute_metrics([1, 1], certain, [0, 1])["log_loss"] == pytest.approx(15.942385 / 2)
    assert compute_metrics([0, 1], certain, [0, 1])["log_loss"] == 0.0


def test_probabilities_of_lower_precision_are_accepted():
    positions, probabilities = some_rows()
    for dtype in (np.float16, np.float32):
        metrics = compute_metrics(positions, probabilities.astype(dtype), [0, 1])
        assert metrics["log_loss"] == pytest.approx(compute_metrics(positions, probabilities, [0, 1])["log_loss"], 1e-2)
    assert compute_metrics(positions, pd.DataFrame(probabilities), [0, 1])["n"] == 60


GOOD = np.array([[0.5, 0.5], [0.2, 0.8]])


BAD_INPUT = pytest.mark.parametrize(
    ("y_true", "probabilities", "classes", "message"),
    [
        (["0"], GOOD, ["0", "1"], r"y_true has 1 labels and probabilities have 2 rows\. Pass one row for each label"),
        (["0", "2"], GOOD, ["0", "1"], r"y_true row 1: label '2' is not one of '0', '1'\. Pass labels of the same"),
        ([0, 1], GOOD, ["0", "1"], r"y_true row 0: label 0 is not one of '0', '1'"),
        (["0", None], GOOD, ["0", "1"], r"y_true row 1: label None is not one of"),
        ([0.0, np.nan], GOOD, [0.0, 1.0], r"y_true row 1: label nan is not one of"),
        (["0", "1"], GOOD[:, 1], ["0", "1"], r"probabilities have shape \(2,\), expected \(n, 2\)"),
        (["0", "1"], GOOD, ["0", "1", "2"], r"probabilities have shape \(2, 2\), expected \(n, 3\)"),
        (["0", "1"], GOOD * 1.01, ["0", "1"], r"probabilities row 0 sums to 1\.0100, expected 1 within 0\.001"),
        (["0", "1"], np.log(GOOD), ["0", "1"], r"expected finite values from 0 to 1"),
        (["0", "1"], [[0.5, 0.5], [np.nan, 1]], ["0", "1"], r"probabilities row 1 is \[nan, 1\.0\], expected finite"),
        (["0", "1"], [[0.5, 0.5], [np.inf, 1]], ["0", "1"], r"probabilities row 1 is \[inf"),
        (["0", "1"], GOOD, ["0", "0"], r"classes \['0', '0'\] name a class twice"),
        ([], np.zeros((0, 2)), ["0", "1"], r"no rows to evaluate"),
        (np.array([["0"], ["1"]]), GOOD, ["0", "1"], r"labels have shape \(2, 1\), expected one dimension"),
    ],
)


@BAD_INPUT
def test_bad_input_is_one_line(y_true, probabilities, classes, message):
    calls = [
        lambda: compute_metrics(y_true, probabilities, classes),
        lambda: wrong_rows(["a", "b"], y_true, probabilities, classes),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_sums_within_a_thousandth_pass():
    assert compute_metrics([0, 1], GOOD * 1.0005, [0, 1])["log_loss"] == pytest.approx(
        compute_metrics([0, 1], GOOD, [0, 1])["log_loss"]
    )


# folds and cross-validation -------------------------------------------------------------------------------------------


def test_folds_are_stratified_complete_and_repeatable():
    labels = ["a"] * 40 + ["b"] * 20
    folds = fold_indices(labels, None, 10, 0)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(60))
    for train, test in folds:
        assert sorted([*train, *test]) == list(range(60))
        assert [labels[row] for row in test].count("a") == 4
    again, other = fold_indices(labels, None, 10, 0), fold_indices(labels, None, 10, 1)
    assert all(np.array_equal(one[1], two[1]) for one, two in zip(folds, again, strict=True))
    assert not all(np.array_equal(one[1], two[1]) for one, two in zip(folds, other, strict=True))


def test_groups_without_duplicates_change_nothing():
    labels = [0, 1] * 15
    plain, grouped = fold_indices(labels, None, 5, 3), fold_indices(labels, list(range(30)), 5, 3)
    assert all(np.array_equal(one[1], two[1]) for one, two in zip(plain, grouped, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_stay_in_one_fold(seed):
    comments, labels = comments_and_labels(40)
    comments += [comments[0], comments[1], "  ".join(comments[2].split()), comments[0]]
    labels += [labels[0], labels[1], labels[2], labels[0]]
    oof = cross_validate({"dummy": DummyClassifier(strategy="prior")}, comments, labels, folds=5, seed=seed)
    for original, copies in [(0, (40, 43)), (1, (41,)), (2, (42,))]:
        assert {oof.fold[copy] for copy in copies} == {oof.fold[original]}
    assert sorted(oof.fold.unique()) == [0, 1, 2, 3, 4]


def test_groups_that_are_passed_stay_in_one_fold():
    comments, labels = comments_and_labels(40)
    visitors = [f"visitor {row // 4}" for row in range(40)]
    oof = cross_validate({"dummy": DummyClassifier()}, comments, labels, folds=5, groups=visitors)
    assert (oof.groupby(visitors).fold.nunique() == 1).all()
    folds = fold_indices(labels, visitors, 5, 0)
    assert all((oof.fold[test] == number).all() for number, (_, test) in enumerate(folds))


@pytest.mark.parametrize(
    ("labels", "groups", "folds", "message"),
    [
        (["a"] * 9 + ["b"] * 3, None, 5, r"class 'b' has 3 rows, fewer than folds=5\. Use folds=3 or fewer, or label"),
        (["a"] * 9 + ["b"], None, 5, r"class 'b' has 1 row, fewer than folds=5\. Label more rows of it"),
        (["a"] * 9, None, 5, r"labels hold 1 class, at least 2 are needed"),
        (["a"] * 5 + [1] * 5, None, 2, r"labels mix int and str"),
        (["a"] * 5 + [None], None, 2, r"labels mix NoneType and str"),
        ([1.0, 0.0, np.nan] * 5, None, 2, r"labels mix float or are missing"),
        (["a", "b"] * 5, None, 1, r"folds is 1, expected a whole number from 2"),
        (["a", "b"] * 5, None, 2.5, r"folds is 2\.5, expected a whole number"),
        (["a", "b"] * 5, [1, 2], 2, r"there are 10 labels and 2 groups"),
        (["a"] * 4 + ["b"] * 4, [1, 2, 1, 2, 1, 2, 1, 2], 4, r"8 rows in 2 groups do not fill folds=4\. Use fewer"),
        (["a", "b"] * 5, ["all", 1, "all", 2, "all", 3, "all", 4, "all", 5], 2, r"class 'a' has one group of rows"),
    ],
)
def test_rows_that_cannot_be_folded(labels, groups, folds, message):
    with pytest.raises(ValueError, match=message) as error:
        fold_indices(labels, groups, folds, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [("bad", "good"), (0, 1), (False, True), ("0", "1", "2"), (3, 1, 2, 0)], ids=str)
@pytest.mark.parametrize("container", [list, lambda x: np.array(x, dtype=object), pd.Series], ids=["list", "np", "pd"])
def test_cross_validate_any_labels_and_containers(labels, container):
    comments, y_true = comments_and_labels(48, labels)
    oof = cross_validate({"ours": baseline_classifier()}, container(comments), container(y_true), folds=4)
    classes = sorted(labels)
    assert list(oof.columns) == ["fold", "label", "ours_prediction", *[f"ours_p_{label}" for label in classes]]
    assert oof.label.tolist() == y_true and oof.index.tolist() == list(range(48))
    assert metrics_from_oof(oof, "ours", classes)["accuracy"] == 1.0  # every label has its own words
    assert oof.ours_prediction.tolist() == y_true


def test_cross_validate_any_estimator():
    comments, labels = comments_and_labels(40)
    estimators = {
        "bayes": make_pipeline(CountVectorizer(), MultinomialNB()),
        "dummy": DummyClassifier(strategy="prior"),
        "search": GridSearchCV(baseline_classifier(), {"logistic__C": [1.0, 30.0]}, cv=2),
        "svm": CalibratedClassifierCV(make_pipeline(CountVectorizer(), LinearSVC(dual="auto", random_state=0)), cv=2),
    }
    calls = []
    oof = cross_validate(estimators, comments, labels, folds=3, progress=lambda *call: calls.append(call))
    assert calls == [(i // 4 + 1, 3, list(estimators)[i % 4]) for i in range(12)]  # 3 folds, not 12
    for name, estimator in estimators.items():
        assert not hasattr(estimator, "classes_")  # clones were fitted
        metrics = metrics_from_oof(oof, name, ["bad", "good"])
        assert metrics["accuracy"] < 0.6 if name == "dummy" else metrics["accuracy"] == 1.0
        assert metrics["accuracy"] == (oof.label == oof[f"{name}_prediction"]).mean()


def test_class_unseen_in_training_or_absent_from_a_test_part():
    comments, labels = comments_and_labels(40)
    comments += ["드물다"] * 5 + ["희귀하다"]
    labels += ["rare"] * 6
    oof = cross_validate({"ours": baseline_classifier()}, comments, labels, folds=5)
    assert oof[oof.label == "rare"].fold.nunique() <= 2  # so most folds have no such test row
    assert np.allclose(oof.filter(like="ours_p_").sum(axis=1), 1)
    metrics = metrics_from_oof(oof, "ours", ["bad", "good", "rare"])
    assert metrics["n"] == 46 and 0 < metrics["roc_auc"] <= 1

    class Forgetful(DummyClassifier):
        """Never learns the last class."""

        def fit(self, X, y, sample_weight=None):
            keep = y != "rare"
            return super().fit(X[keep], y[keep])

    oof = cross_validate({"ours": Forgetful()}, comments, labels, folds=5)
    assert (oof.ours_p_rare == 0).all()
    assert np.isfinite(metrics_from_oof(oof, "ours", ["bad", "good", "rare"])["log_loss"])


def test_cross_validate_same_seed_same_table():
    comments, labels = comments_and_labels(30)
    tables = [
        cross_validate({"b": baseline_classifier()}, comments, labels, folds=3, seed=seed) for seed in (1, 1, 2)
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert tables[0].fold.tolist() != tables[2].fold.tolist()


def test_repeats_cut_anew_and_are_averaged():
    comments, labels = comments_and_labels(30)
    comments += [comments[0], comments[1]]
    labels += [labels[0], labels[1]]
    estimators = {"b": baseline_classifier(), "dummy": DummyClassifier(strategy="prior")}
    calls = []
    oof = cross_validate(
        estimators, comments, labels, folds=3, repeats=2, seed=4, progress=lambda *call: calls.append(call)
    )
    assert list(oof.columns)[:3] == ["repeat", "fold", "label"] and oof["repeat"].tolist() == [0] * 32 + [1] * 32
    assert calls[0] == (1, 6, "b") and calls[-1] == (6, 6, "dummy")
    for repeat, part in oof.groupby("repeat"):
        part = part.reset_index(drop=True)
        assert part.fold[0] == part.fold[30] and part.fold[1] == part.fold[31]
        alone = cross_validate(estimators, comments, labels, folds=3, seed=4 + repeat)
        pd.testing.assert_frame_equal(part.drop(columns="repeat"), alone)
    layers = probabilities_from_oof(oof, "dummy", ["bad", "good"])
    assert layers.shape == (2, 32, 2)
    each = [compute_metrics(labels, layer, ["bad", "good"]) for layer in layers]
    found = metrics_from_oof(oof, "dummy", ["bad", "good"])
    assert found["n"] == 32
    for name in ("accuracy", "macro_f1", "roc_auc", "log_loss"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in each]))
    for bad in (0, 1.5, True, None):
        with pytest.raises(ValueError, match=r"repeats is .*, expected a whole number from 1"):
            cross_validate(estimators, comments, labels, folds=3, repeats=bad)


def test_cross_validate_errors():
    comments, labels = comments_and_labels(20)
    with pytest.raises(ValueError, match=r"estimator 'svm' \(Pipeline\) has no predict_proba\. Wrap it in sklearn"):
        cross_validate({"svm": make_pipeline(CountVectorizer(), LinearSVC())}, comments, labels)
    with pytest.raises(ValueError, match=r"there are no estimators"):
        cross_validate({}, comments, labels)
    with pytest.raises(ValueError, match=r"there are 20 comments and 19 labels"):
        cross_validate({"b": baseline_classifier()}, comments, labels[:-1])
    with pytest.raises(ValueError, match=r"class 'good' has 9 rows, fewer than folds=11"):
        cross_validate({"b": baseline_classifier()}, comments, labels[:-1] + ["bad"], folds=11)


def test_metrics_from_oof_survive_a_text_file(tmp_path):
    comments, labels = comments_and_labels(30, ("0", "1"))
    oof = cross_validate({"ours": baseline_classifier()}, comments, labels, folds=3)
    oof.to_csv(tmp_path / "oof.tsv", sep="\t", index=False)
    read = pd.read_csv(tmp_path / "oof.tsv", sep="\t", dtype={"label": str})
    metrics, expected = metrics_from_oof(read, "ours", ["0", "1"]), metrics_from_oof(oof, "ours", ["0", "1"])
    assert metrics.pop("classes") == expected.pop("classes")
    assert metrics == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"no column 'theirs_p_0'; it has fold, label, ours_prediction"):
        metrics_from_oof(oof, "theirs", ["0", "1"])


def test_baseline_is_deterministic_and_takes_one_and_many_classes():
    comments, labels = comments_and_labels(30, ("a", "b", "c"))
    first, second = (baseline_classifier(seed=4).fit(comments, labels).predict_proba(comments) for _ in range(2))
    assert first.shape == (30, 3) and np.array_equal(first, second)
    assert baseline_classifier(seed=4).get_params()["logistic__random_state"] == 4
    assert baseline_classifier().fit(comments, labels).score(comments, labels) == 1.0


@pytest.mark.skipif(not TARR.exists(), reason="the public comments are not on this machine")
def test_baseline_on_real_comments():
    table = pd.read_csv(TARR, sep="\t", dtype=str)
    for seed in (0, 1):
        oof = cross_validate({"baseline": baseline_classifier()}, table.comment, table.label, folds=10, seed=seed)
        metrics = metrics_from_oof(oof, "baseline", ["0", "1"])
        assert metrics["n"] == 300
        assert metrics["accuracy"] >= 0.89
        assert metrics["log_loss"] < 0.32 and metrics["roc_auc"] > 0.95


# tables ---------------------------------------------------------------------------------------------------------------


def test_wrong_rows():
    probabilities = [[0.6, 0.4], [0.1, 0.9], [0.95, 0.05], [0.3, 0.7]]
    table = wrong_rows(list("abcd"), ["1", "1", "1", "0"], probabilities, ["0", "1"], ids=["x1", "x2", "x3", "x4"])
    assert list(table.columns) == ["id", "comment", "label", "prediction", "p_0", "p_1"]
    assert table.id.tolist() == ["x3", "x4", "x1"]
    assert table.comment.tolist() == ["c", "d", "a"]
    assert table.label.tolist() == ["1", "0", "1"] and table.prediction.tolist() == ["0", "1", "0"]
    assert table.p_0.tolist() == pytest.approx([0.95, 0.3, 0.6])
    assert wrong_rows(pd.Series(list("abcd")), [1, 1, 1, 0], probabilities, [0, 1]).id.tolist() == [2, 3, 0]


def test_wrong_rows_of_three_classes_and_of_none():
    positions, probabilities = some_rows(60, 3)
    table = wrong_rows([str(row) for row in range(60)], positions, probabilities, [0, 1, 2])
    assert len(table) == (probabilities.argmax(axis=1) != positions).sum() > 0
    assert table[["p_0", "p_1", "p_2"]].max(axis=1).is_monotonic_decreasing
    none = wrong_rows(["a"], [0], [[0.8, 0.1, 0.1]], [0, 1, 2])
    assert len(none) == 0 and list(none.columns) == list(table.columns)
    with pytest.raises(ValueError, match=r"there are 1 comments, 1 ids and 2 labels"):
        wrong_rows(["a"], [0, 1], GOOD, [0, 1])


def test_comparison_and_verdict():
    ours = {"accuracy": 0.93, "macro_f1": 0.92, "roc_auc": None, "log_loss": 0.2, "n": 300, "classes": ["0", "1"]}
    baseline = ours | {"accuracy": 0.9, "roc_auc": 0.95}
    table = comparison_table(ours, baseline)
    assert table.index.tolist() == ["gemma + LoRA", "TF-IDF baseline"]
    assert table.columns.tolist() == ["accuracy", "macro_f1", "roc_auc", "log_loss"]
    assert all(kind == np.float64 for kind in table.dtypes) and np.isnan(table.roc_auc.iloc[0])
    assert verdict(ours, baseline) == (
        "gemma + LoRA is more accurate than the TF-IDF baseline: 0.930 against 0.900, 9 more of 300 comments right."
    )
    assert verdict(baseline, ours) == (
        "The TF-IDF baseline is more accurate than gemma + LoRA: 0.930 against 0.900, 9 more of 300 comments right."
    )
    assert verdict(ours, ours) == "gemma + LoRA and the TF-IDF baseline are equally accurate: 0.930 on 300 comments."
    with pytest.raises(ValueError, match=r"ours has 300 rows and the baseline 60\. Measure both on the same rows"):
        verdict(ours, baseline | {"n": 60})


# what moved a prediction ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_most_frequent_class_orders_no_comment(repeats):
    """Its shares differ from fold to fold, against those of the test rows: pooled, it would be worse than chance."""
    comments, labels = sweep_rows(38)
    oof = cross_validate(simple_baselines(), comments, labels, folds=4, repeats=repeats)
    assert (oof.groupby(oof["repeat"] if repeats > 1 else lambda row: 0).most_frequent_p_0.nunique() == 1).all()
    assert oof.baseline_p_0.nunique() > 30  # who tells comments apart is left alone
    layers = probabilities_from_oof(oof, "most_frequent", [0, 1, 2])
    floor = metrics_with_intervals(labels, layers, [0, 1, 2])
    assert floor["roc_auc"] == 0.5 and layers[0, 0] == pytest.approx(np.bincount(labels) / len(labels), abs=0.01)


def test_what_the_base_does_without_fine_tuning_is_said():
    compared = {"comparison": {"sentence": "Who is ahead."}}
    ours = {"accuracy": 0.911, "log_loss": 0.2}
    better, worse = ({"accuracy": accuracy, "log_loss": 0.3, **compared} for accuracy in (0.914, 0.9))

    def said(**baselines):
        return simpler_verdicts({**ours, "baselines": baselines})

    assert said(zero_shot=worse, frozen=worse, baseline=better) == [] == simpler_verdicts(ours)
    assert said(frozen=better, zero_shot=worse) == [
        "A logistic regression on the frozen base is more accurate, 0.914 against 0.911, for one pass over the "
        "comments and no fine-tuning. Who is ahead."
    ]
    assert said(zero_shot=better) == [
        "Fine-tuning made the probabilities better (log-loss 0.200 against 0.300), not the answers, on these comments: "
        "the base itself has an accuracy of 0.914, gemma + LoRA 0.911. Who is ahead."
    ]
    assert said(zero_shot={**better, "log_loss": 0.1})[0].startswith("Fine-tuning gained nothing on these comments: ")
    assert len(said(zero_shot=better, frozen=better)) == 2


def test_nothing_to_explain_is_said():
    mistakes = pd.DataFrame({"id": [], "comment": [], "label": [], "prediction": []})
    with pytest.warns(UserWarning, match="no answer is wrong, so there is no mistake to explain"):
        assert len(explain_mistakes(baseline_classifier(), mistakes)) == 0


def test_twins_of_another_emphasis_stay_together_from_python_too():
    comments = [text for n in range(12) for text in (f"{n}번 손님 맛있어요", f"{n}번 손님, 맛있어요!!")]
    labels = [n % 2 for n in range(12) for _ in range(2)]
    estimator = baseline_classifier()
    oof = cross_validate({"simple": estimator}, comments, labels, folds=3)
    assert (oof.fold.to_numpy().reshape(-1, 2) == oof.fold.to_numpy().reshape(-1, 2)[:, :1]).all()
    with pytest.raises(ValueError, match="12 test comments are among the comments too, the first is row 0"):
        learning_curve({"simple": estimator}, comments[::2], labels[::2], comments[1::2], labels[1::2], sizes=[4])


# names that have moved ------------------------------------------------------------------------------------------------

NOW = {
    "evaluation": {
        "figures": "DrawableNames MARKERS drawable_names new_axes plot_confusion_matrix plot_precision_recall "
        "plot_reliability plot_roc plot_score_histogram plot_training_curves save_figures use_fonts",
        "intervals": "share_interval",
        "decision": "expected_calibration_error",
    },
    "analysis": {
        "intervals": "compare_predictions exact_p metric_intervals metrics_table metrics_with_intervals "
        "paired_comparison share_interval",
        "decision": "MISTAKES_TO_JUDGE ROWS_OF_A_DECISION apply_decision apply_temperature choose_abstention "
        "choose_decision choose_threshold decision_text expected_calibration_error fit_temperature",
        "labelling": "conflicting_duplicates likely_label_errors worth_labelling",
        "evaluation": "compute_metrics explain_mistakes sweep word_influence",
    },
}


@pytest.mark.parametrize("door", NOW)
def test_every_name_is_still_found_by_its_old_room(door):
    old = importlib.import_module(f"gemma_lora_sentiment.{door}")
    for room, names in NOW[door].items():
        new = importlib.import_module(f"gemma_lora_sentiment.{room}")
        for name in names.split():
            with pytest.warns(DeprecationWarning, match=f"from gemma_lora_sentiment.{room} import {name}$") as said:
                assert getattr(old, name) is getattr(new, name)
            assert said[0].filename == __file__, "the warning names the line that asks"
    with pytest.raises(AttributeError, match=f"module 'gemma_lora_sentiment.{door}' has no attribute 'nothing'"):
        _ = old.nothing
    with pytest.raises(ImportError, match="cannot import name '_hidden'"):
        exec(f"from gemma_lora_sentiment.{door} import _hidden")
