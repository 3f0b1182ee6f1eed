"""What would bore a reader of the evaluation notebook: every label type, every error, figures, state left as it was."""

import json
import os
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import CalibratedClassifierCV
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import average_precision_score, f1_score, log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from gemma_lora_sentiment import evaluation
from gemma_lora_sentiment.evaluation import (
    baseline_classifier,
    comparison_table,
    compute_metrics,
    cross_validate,
    fold_indices,
    metrics_from_oof,
    plot_confusion_matrix,
    plot_precision_recall,
    plot_roc,
    plot_score_histogram,
    plot_training_curves,
    probabilities_from_oof,
    save_figures,
    verdict,
    wrong_rows,
)

TARR = Path(__file__).parents[2] / "shared" / "data" / "tarr_train.txt"
PNG = b"\x89PNG\r\n\x1a\n"
HISTORY = pd.DataFrame({"epoch": [1, 2], "loss": [0.6, 0.4], "val_loss": [0.5, 0.45], "accuracy": [0.7, 0.8]})


@pytest.fixture(autouse=True)
def same_global_state():
    """No test of this file may change matplotlib's settings, its open figures or NumPy's global random state."""
    settings, (_, keys, position, *_) = dict(matplotlib.rcParams), np.random.get_state()
    keys = keys.copy()
    figures = plt.get_fignums()
    yield
    assert dict(matplotlib.rcParams) == settings
    assert np.array_equal(np.random.get_state()[1], keys) and np.random.get_state()[2] == position
    assert plt.get_fignums() == figures


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


@pytest.mark.parametrize(
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
def test_bad_input_is_one_line(y_true, probabilities, classes, message, tmp_path):
    calls = [
        lambda: compute_metrics(y_true, probabilities, classes),
        lambda: wrong_rows(["a", "b"], y_true, probabilities, classes),
        lambda: plot_roc(y_true, probabilities, classes),
        lambda: plot_precision_recall(y_true, probabilities, classes),
        lambda: plot_score_histogram(y_true, probabilities, classes),
        lambda: save_figures(tmp_path / "figures", y_true, probabilities, classes),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "figures").exists()


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
        (["a"] * 9 + ["b"], None, 5, r"class 'b' has 1 rows, fewer than folds=5\. Label more rows of it"),
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
    assert calls == [(i + 1, 12, list(estimators)[i % 4]) for i in range(12)]
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
    assert calls[-1] == (12, 12, "dummy")
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


# figures --------------------------------------------------------------------------------------------------------------


def all_figures(y_true, probabilities, classes, baseline=None):
    """Every figure on axes of its own, outside pyplot."""
    predicted = [classes[position] for position in np.argmax(probabilities, axis=1)]
    axes = [Figure(layout="constrained").subplots() for _ in range(5)]
    returned = [
        plot_confusion_matrix(y_true, predicted, classes, ax=axes[0]),
        plot_roc(y_true, probabilities, classes, ax=axes[1], baseline=baseline),
        plot_precision_recall(y_true, probabilities, classes, ax=axes[2], baseline=baseline),
        plot_score_histogram(y_true, probabilities, classes, ax=axes[3]),
        plot_training_curves(HISTORY, ax=axes[4]),
    ]
    assert all(one is two for one, two in zip(returned, axes, strict=True))
    return axes


def draw_without_warnings(axes):
    """Render; a missing letter or a layout that failed is a warning, and here an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ax in axes:
            ax.figure.canvas.draw()


@pytest.mark.parametrize("n_classes", [2, 3, 12])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_figures(n_classes, with_baseline):
    positions, probabilities = some_rows(120, n_classes)
    baseline = some_rows(120, n_classes, seed=1)[1] if with_baseline else None
    classes = [f"label {number}" for number in range(n_classes)]
    axes = all_figures([classes[position] for position in positions], probabilities, classes, baseline)
    draw_without_warnings(axes)
    n_curves = (1 if n_classes == 2 else n_classes) * (2 if with_baseline else 1)
    styles = [line.get_linestyle() for line in axes[1].lines]
    assert len(styles) == n_curves + 1 and styles.count("--") == (n_curves // 2 if with_baseline else 0)
    if n_classes > 2:  # told apart without colour
        assert len({line.get_marker() for line in axes[1].lines[:-1]}) == min(n_classes, 8)


def test_numbers_in_the_figures():
    positions, probabilities = some_rows(80)
    matrix, roc, precision_recall, scores, _ = all_figures(positions, probabilities, [0, 1])
    counts = [int(text.get_text()) for text in matrix.texts]
    assert sum(counts) == 80 and counts[0] + counts[3] == (probabilities.argmax(axis=1) == positions).sum()
    assert roc.lines[0].get_label() == f"classifier, AUC {roc_auc_score(positions, probabilities[:, 1]):.3f}"
    average = average_precision_score(positions, probabilities[:, 1])
    assert precision_recall.lines[0].get_label() == f"classifier, AP {average:.3f}"
    assert [text.get_text() for text in scores.get_legend().get_texts()] == ["true label 0 (40)", "true label 1 (40)"]


def test_a_new_figure_is_the_callers_to_close():
    before = plt.get_fignums()
    positions, probabilities = some_rows()
    for ax in [
        plot_confusion_matrix(positions, positions, [0, 1]),
        plot_roc(positions, probabilities, [0, 1]),
        plot_precision_recall(positions, probabilities, [0, 1]),
        plot_score_histogram(positions, probabilities, [0, 1]),
        plot_training_curves(HISTORY),
    ]:
        assert isinstance(ax, Axes)
        plt.close(ax.figure)
    assert plt.get_fignums() == before


@pytest.mark.parametrize("label", [0, 1])
def test_figures_of_one_class_only_say_so(label):
    axes = all_figures([label] * 10, some_rows(10)[1], [0, 1])
    draw_without_warnings(axes)
    for ax in axes[1:3]:
        assert "all of one class" in ax.texts[0].get_text()


def test_a_class_without_rows_has_no_curve():
    positions, probabilities = some_rows(60, 3)
    rows = positions != 1
    axes = all_figures(positions[rows], probabilities[rows], [0, 1, 2])
    draw_without_warnings(axes)
    assert [line.get_label().split(",")[0] for line in axes[1].lines] == ["0", "2", "chance"]


def test_confusion_matrix_errors():
    with pytest.raises(ValueError, match=r"y_true has 2 labels and y_pred 1\. Pass equally many"):
        plot_confusion_matrix([0, 1], [0], [0, 1])
    with pytest.raises(ValueError, match=r"y_pred row 1: label 5 is not one of 0, 1"):
        plot_confusion_matrix([0, 1], [0, 5], [0, 1])
    with pytest.raises(ValueError, match=r"y_true has 60 labels and probabilities have 3 rows"):
        plot_roc(*some_rows(), [0, 1], ax=Figure().subplots(), baseline=np.full((3, 2), 0.5))


def test_training_curves():
    ax = plot_training_curves(HISTORY, ax=Figure().subplots())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "loss, training", "loss, validation", "accuracy, training",
    ]  # fmt: skip
    assert len(ax.figure.axes) == 2 and ax.get_ylabel() == "loss"
    assert len({line.get_linestyle() for each in ax.figure.axes for line in each.lines}) == 3
    one_epoch = plot_training_curves(pd.DataFrame({"loss": [0.5], "val_loss": [np.nan]}), ax=Figure().subplots())
    assert len(one_epoch.lines) == 1 and len(one_epoch.figure.axes) == 1
    for bad in (HISTORY.drop(columns="loss"), HISTORY.iloc[:0], pd.DataFrame()):
        with pytest.raises(ValueError, match=r"history has \d rows and columns .* expected at least one row"):
            plot_training_curves(bad)


# class names in figures -----------------------------------------------------------------------------------------------

HANGUL = ["부정", "긍정", "보통"]


def texts_of(ax):
    """All that is written in a figure."""
    return [text.get_text() for text in ax.findobj(matplotlib.text.Text) if text.get_text()]


def test_hangul_without_a_font_for_it(monkeypatch):
    monkeypatch.setattr(evaluation, "_KOREAN_FONTS", ())
    if evaluation._can_draw("sans-serif", "부"):
        pytest.skip("matplotlib's default font here has Hangul")
    for classes in (HANGUL, HANGUL[:2], ["neutral", "긍정"]):
        positions, probabilities = some_rows(60, len(classes))
        axes = all_figures([classes[position] for position in positions], probabilities, classes)
        draw_without_warnings(axes)
        for ax in axes:
            assert all(text.isascii() for text in texts_of(ax))
        assert "class 1" in texts_of(axes[0])
        assert ("neutral" in texts_of(axes[0])) == ("neutral" in classes)
        assert any("no installed font has the class names" in text for text in texts_of(axes[0]))


def font_with_hangul(path, family):
    """A font of filled squares for the letters that the test needs."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000, isTTF=True)
    pen = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen(None)
    for number, point in enumerate([(50, 0), (50, 700), (650, 700), (650, 0)]):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    characters = {ord(character): f"g{number}" for number, character in enumerate("".join(HANGUL))}
    names = [".notdef", *characters.values()]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(characters)
    builder.setupGlyf({name: square for name in names})
    builder.setupHorizontalMetrics({name: (700, 50) for name in names})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def test_hangul_with_a_font_for_it(monkeypatch, tmp_path):
    family = f"Hangul of test {os.getpid()}"
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(font_with_hangul(tmp_path / "hangul.ttf", family))
    monkeypatch.setattr(evaluation, "_KOREAN_FONTS", ("not installed", family))
    if evaluation._can_draw("sans-serif", "부"):
        pytest.skip("matplotlib's default font here has Hangul")
    positions, probabilities = some_rows(60, 3)
    labels = [HANGUL[position] for position in positions]
    axes = all_figures(labels, probabilities, HANGUL, baseline=probabilities)
    draw_without_warnings(axes)
    written = texts_of(axes[0])
    assert set(HANGUL) <= set(written) and not any("font" in text for text in written)
    for text in axes[0].findobj(matplotlib.text.Text):
        if text.get_text() in HANGUL:
            assert family in text.get_fontfamily()


def test_names_that_matplotlib_would_misread():
    classes = ["_hidden", "$a_1$ or $", "two\nlines", "a" * 60, ""]
    positions, probabilities = some_rows(60, 5)
    axes = all_figures([classes[position] for position in positions], probabilities, classes)
    draw_without_warnings(axes)
    assert len(axes[1].get_legend().get_texts()) == 6
    assert max(map(len, texts_of(axes[0]))) <= 40


# files ----------------------------------------------------------------------------------------------------------------


def test_save_figures(tmp_path):
    positions, probabilities = some_rows()
    folder = tmp_path / "run" / "figures"
    paths = save_figures(folder, positions, probabilities, [0, 1], history=HISTORY, baseline=probabilities)
    names = ["confusion_matrix", "roc", "precision_recall", "scores", "reliability", "training_curves"]
    names = [f"{name}.png" for name in names]
    assert paths == [folder / name for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for path in paths:
        assert path.read_bytes().startswith(PNG)
        assert plt.imread(path).shape[:2] == (600, 750)  # 5 by 4 inches at 150 dpi
    before = {path.name: path.read_bytes() for path in paths}
    assert len(save_figures(str(folder), positions, probabilities, [0, 1])) == 5  # again, over the old ones
    assert (folder / "training_curves.png").read_bytes() == before["training_curves.png"]


def test_save_figures_of_three_classes(tmp_path):
    positions, probabilities = some_rows(60, 3)
    labels = [HANGUL[position] for position in positions]
    for path in save_figures(tmp_path, labels, probabilities, HANGUL, baseline=probabilities):
        assert plt.imread(path).shape[:2] == (675, 1200)  # room for the legend at the side


def test_save_figures_leaves_nothing_half_written(tmp_path, monkeypatch):
    positions, probabilities = some_rows()
    for bad in ({"history": HISTORY[["epoch"]]}, {"baseline": probabilities[:3]}):
        with pytest.raises(ValueError):
            save_figures(tmp_path / "figures", positions, probabilities, [0, 1], **bad)
        assert not (tmp_path / "figures").exists()

    def disk_full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_figures(tmp_path / "figures", positions, probabilities, [0, 1])
    assert list((tmp_path / "figures").iterdir()) == []
