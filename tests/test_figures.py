"""What would bore a reader of the figures' notebook: many classes, Hangul, bad input, further estimators."""

import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import CalibratedClassifierCV
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import ComplementNB
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from gemma_lora_sentiment import evaluation
from gemma_lora_sentiment.analysis import metrics_table, metrics_with_intervals, paired_comparison, sweep
from gemma_lora_sentiment.evaluation import (
    baseline_classifier,
    cross_validate,
    expected_calibration_error,
    metrics_from_oof,
    plot_reliability,
    probabilities_from_oof,
    save_figures,
    simple_baselines,
)
from gemma_lora_sentiment.figures import (
    _stratified_order,
    accuracy_by,
    learning_curve,
    plot_accuracy_by,
    plot_learning_curve,
    plot_sweep,
)


@pytest.fixture(autouse=True)
def same_global_state():
    """No figure changes matplotlib's settings; the figures that a test leaves open are closed."""
    settings = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == settings
    plt.close("all")


def some_rows(n=120, n_classes=2, seed=0):
    random = np.random.default_rng(seed)
    positions = np.arange(n) % n_classes
    scores = random.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[positions]
    return positions, np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


def comments_of(n, labels=("bad", "good"), start=0):
    """Comments, all different, whose words tell the label four times in five."""
    words, random = ["별로 실망", "최고 추천", "그냥 보통"], np.random.default_rng(start)
    given = [int(random.integers(len(labels))) if random.random() < 0.2 else row % len(labels) for row in range(n)]
    return [f"{words[row % len(labels)]} {start + row}번째" for row in range(n)], [labels[place] for place in given]


def new_axes():
    return Figure(layout="constrained").subplots()


def draw_without_warnings(ax):
    """Render; a missing letter or a layout that failed is a warning, and here an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.canvas.draw()


def texts_of(ax):
    return [text.get_text() for text in ax.findobj(matplotlib.text.Text) if text.get_text()]


# reliability ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3, 12])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_reliability(n_classes, with_baseline):
    positions, probabilities = some_rows(200, n_classes)
    baseline = some_rows(200, n_classes, seed=1)[1] if with_baseline else None
    ax = plot_reliability(positions, probabilities, list(range(n_classes)), ax=new_axes(), baseline=baseline)
    draw_without_warnings(ax)
    error = expected_calibration_error(positions, probabilities, list(range(n_classes)))
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend[:2] == ["perfectly calibrated", f"classifier, ECE {error:.3f}"] and len(legend) == 2 + with_baseline
    counts = [int(text.get_text()) for text in ax.texts]
    assert sum(counts) == 200
    # The error in the legend is what the figure shows: the mean distance to the diagonal, weighted by the counts.
    sureness, right = ax.lines[1].get_xdata(), ax.lines[1].get_ydata()
    assert np.average(np.abs(sureness - right), weights=counts) == pytest.approx(error)
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines}) == len(ax.lines)  # without colour


def test_calibration_error_of_a_calibrated_and_of_a_boasting_classifier():
    random = np.random.default_rng(0)
    p = random.uniform(0.5, 1, 20_000)
    labels, values = (random.random(20_000) < p).astype(int), np.stack([1 - p, p], axis=1)
    assert expected_calibration_error(labels, values, [0, 1]) < 0.01
    boasting = np.where(values > 0.5, 1.0, 0.0)
    assert expected_calibration_error(labels, boasting, [0, 1]) == pytest.approx(1 - labels.mean())


def test_reliability_of_one_row_and_bad_input():
    draw_without_warnings(plot_reliability([1], [[0.0, 1.0]], [0, 1], ax=new_axes()))
    positions, probabilities = some_rows(20)
    with pytest.raises(ValueError, match="20 labels and probabilities have 3 rows"):
        plot_reliability(positions, probabilities, [0, 1], ax=new_axes(), baseline=probabilities[:3])


# accuracy by ----------------------------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    table = accuracy_by(
        [0, 0, 1, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.3, 0.7], [0.8, 0.2]], [0, 1], list("aabbc")
    )
    assert table.index.tolist() == ["c", "a", "b"] and table.n.tolist() == [1, 2, 2]
    assert table.accuracy.tolist() == [0.0, 0.5, 1.0]
    assert table.low.tolist() == pytest.approx([0, 0.0945, 0.3424], abs=1e-3)  # Wilson's, as tables of it have them
    assert table.high.tolist() == pytest.approx([0.7935, 0.9055, 1], abs=1e-3)


@pytest.mark.parametrize("n_classes", [2, 3, 12])
def test_accuracy_by_a_column(n_classes):
    positions, probabilities = some_rows(120, n_classes)
    labels = np.array([f"label {number}" for number in range(n_classes)])
    column = pd.Series(np.where(np.arange(120) % 4 == 0, None, np.arange(120) % 3), name="$shop_")
    table = accuracy_by(labels[positions], probabilities, labels, column)
    assert table.n.sum() == 120 and "(missing)" in table.index and table.loc["(missing)", "n"] == 30
    ax = plot_accuracy_by(labels[positions], probabilities, labels, column, ax=new_axes())
    draw_without_warnings(ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{name} ({n})" for name, n in table.n.items()]
    assert ax.lines[0].get_xdata().tolist() == table.accuracy.tolist()
    assert ax.get_ylabel() == r"\$shop_"


def test_accuracy_by_keeps_the_order_of_parts_of_a_number():
    positions, probabilities = some_rows(120)
    length = pd.qcut(pd.Series(np.arange(120), name="characters"), 4)
    assert accuracy_by(positions, probabilities, [0, 1], length).index.tolist() == length.cat.categories.tolist()
    with pytest.raises(ValueError, match=r"120 different values, at most 40 can be told apart\. Pass pd\.qcut"):
        plot_accuracy_by(positions, probabilities, [0, 1], np.arange(120))
    with pytest.raises(ValueError, match="120 labels and 3 values"):
        plot_accuracy_by(positions, probabilities, [0, 1], list("abc"))
    assert not plt.get_fignums()  # nothing is left of what failed


def test_accuracy_by_hangul_without_a_font_for_it(monkeypatch):
    monkeypatch.setattr(evaluation, "_KOREAN_FONTS", ())
    if evaluation._can_draw("sans-serif", "맛"):
        pytest.skip("matplotlib's default font here has Hangul")
    positions, probabilities = some_rows(60)
    column = pd.Series(["맛", "배달", "taste"] * 20, name="주제")
    ax = plot_accuracy_by(positions, probabilities, [0, 1], column, ax=new_axes())
    draw_without_warnings(ax)
    order = accuracy_by(positions, probabilities, [0, 1], column).index.tolist()
    shown = [label.get_text() for label in ax.get_yticklabels()]
    assert all(text.isascii() for text in texts_of(ax)) and "no installed font" in ax.get_xlabel()
    assert shown == [name + " (20)" if name == "taste" else f"value {place} (20)" for place, name in enumerate(order)]


# learning curve -------------------------------------------------------------------------------------------------------


def test_learning_curve_of_any_estimators_and_three_classes():
    comments, labels = comments_of(150, ("나쁨", "보통", "좋음"))
    test_comments, test_labels = comments_of(60, ("나쁨", "보통", "좋음"), start=1000)
    estimators = {
        **simple_baselines(),
        "forest": make_pipeline(CountVectorizer(), RandomForestClassifier(10, random_state=0)),
        "bayes": make_pipeline(CountVectorizer(), ComplementNB()),
    }
    calls = []
    table = learning_curve(
        estimators, comments, labels, test_comments, test_labels, sizes=(10, 40, 150), seeds=3,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert len(table) == len(calls) == 36 and calls[-1] == (36, 36, "bayes")
    assert table.groupby(["estimator", "size"]).size().unique().tolist() == [3]
    assert table[["accuracy", "macro_f1", "roc_auc"]].stack().between(0, 1).all()
    of_baseline = table[table.estimator == "baseline"].groupby("size").accuracy.mean()
    assert of_baseline[150] > of_baseline[10] + 0.05  # it has learnt
    assert table[table["size"] == 150].groupby("estimator").accuracy.nunique().max() == 1  # the same rows each time
    for metric in ("accuracy", "macro_f1", "log_loss"):
        ax = plot_learning_curve(table, ax=new_axes(), metric=metric)
        draw_without_warnings(ax)
        assert len({(c.lines[0].get_linestyle(), c.lines[0].get_marker()) for c in ax.containers}) == 4
        for container, name in zip(ax.containers, estimators, strict=True):
            means = table[table.estimator == name].groupby("size")[metric].mean()
            assert container.lines[0].get_ydata().tolist() == pytest.approx(means.tolist())
    again = learning_curve(estimators, comments, labels, test_comments, test_labels, sizes=(10, 40, 150), seeds=3)
    pd.testing.assert_frame_equal(table, again)


def test_draws_are_stratified_nested_and_differ_by_seed():
    positions = np.repeat([0, 1, 2], [150, 40, 10])
    orders = [_stratified_order(positions, seed) for seed in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    for order in orders:
        assert sorted(order) == list(range(200))
        for size in (20, 50, 100, 160):
            counts = np.bincount(positions[order[:size]], minlength=3)
            assert np.abs(counts - size * np.array([0.75, 0.2, 0.05])).max() <= 1


def test_learning_curve_refuses():
    comments, labels = comments_of(40)
    tests = comments_of(20, start=1000)
    for given, options, message in [
        ((comments, labels, *tests), {"sizes": (50,)}, r"size 50 is not between 2 \(the classes\) and 40 \(the rows\)"),
        ((comments, labels, *tests), {"sizes": (1,)}, "size 1 is not between"),
        ((comments, labels, comments[:3], labels[:3]), {}, "3 test comments are among the comments too"),
        ((comments, labels[:-1], *tests), {}, "40 comments and 39 labels"),
        ((comments, ["bad"] * 40, *tests), {}, "labels hold 1 class"),
    ]:
        with pytest.raises(ValueError, match=message):
            learning_curve({"b": baseline_classifier()}, *given, **({"sizes": (10,)} | options))
    with pytest.raises(ValueError, match="has no predict_proba"):
        learning_curve({"svm": make_pipeline(CountVectorizer(), LinearSVC())}, comments, labels, *tests, sizes=(10,))
    with pytest.raises(ValueError, match="no column 'estimator'"):
        plot_learning_curve(pd.DataFrame({"size": [1]}))


# sweeps ---------------------------------------------------------------------------------------------------------------


def test_heat_map_of_a_sweep_by_hand():
    table = pd.DataFrame(
        {"lora_rank": [8, 4, 8, 4, 4], "learning_rate": [3e-4, 1e-4, 1e-4, 3e-4, 3e-4],
         "epochs": [1, 1, 1, 1, 2], "mean": [0.9, 0.7, 0.8, 0.5, 0.6]}
    )  # fmt: skip
    table.attrs["parameters"] = ["lora_rank", "learning_rate", "epochs"]
    ax = plot_sweep(table, ax=new_axes())
    draw_without_warnings(ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "8"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.0001", "0.0003"]
    assert ax.images[0].get_array().tolist() == [[0.7, 0.8], [0.6, 0.9]]  # rows upwards, the best over epochs
    assert "the best over epochs" in ax.get_xlabel()
    frame, inner = ax.patches  # black and white, so it is seen on any cell
    assert frame.get_xy() == inner.get_xy() and frame.get_edgecolor() != inner.get_edgecolor()
    assert (frame.get_x(), frame.get_y()) == pytest.approx((0.53, 0.53))  # around rank 8, 0.0003


def test_heat_map_paints_no_mountain_of_what_chance_could_make():
    table = pd.DataFrame({"lora_rank": [4, 8], "learning_rate": [1e-4] * 2, "mean": [0.91, 0.9], "std": [0.05, 0.04]})
    assert plot_sweep(table, ax=new_axes()).images[0].get_clim() == pytest.approx((0.81, 0.91))
    assert plot_sweep(table.assign(std=0.001), ax=new_axes()).images[0].get_clim() == pytest.approx((0.9, 0.91))


def test_numbers_in_a_heat_map_can_be_read():
    """Dark letters on light cells and the other way about: a contrast of at least 3 to 1."""
    values = np.linspace(0, 1, 25)
    table = pd.DataFrame({"lora_rank": np.arange(25) % 5, "learning_rate": np.arange(25) // 5, "mean": values})
    ax = plot_sweep(table, ax=new_axes())
    ax.figure.canvas.draw()

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    for text in ax.texts:
        column, line = text.get_position()
        of_cell = ax.images[0].cmap(ax.images[0].norm(values[int(line) * 5 + int(column)]))
        pair = sorted([luminance(of_cell), luminance(matplotlib.colors.to_rgba(text.get_color()))])
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 3, text


def test_heat_map_of_halving_and_of_cells_that_were_not_tried():
    comments, labels = comments_of(90)
    grid = {"logistic__C": [0.01, 1.0, 30.0], "tfidf__ngram_range": [(1, 1), (1, 3)]}
    table = sweep(baseline_classifier(), comments, labels, grid, search="halving", folds=2)
    ax = plot_sweep(table, "logistic__C", "tfidf__ngram_range", ax=new_axes())
    draw_without_warnings(ax)
    assert len(ax.texts) == 6 and ax.texts[0].get_text().endswith(f"({table.resources.max()})")
    assert {label.get_text() for label in ax.get_yticklabels()} == {"(1, 1)", "(1, 3)"}
    one_by_one = sweep(
        baseline_classifier(), comments, labels, [{"logistic__C": [1.0]}, {"tfidf__min_df": [2]}], folds=2
    )
    with pytest.raises(ValueError, match="no row of the table has both"):
        plot_sweep(one_by_one, "logistic__C", "tfidf__min_df", ax=new_axes())
    with pytest.raises(ValueError, match="the table has no column 'lora_rank'; it has logistic__C"):
        plot_sweep(table, ax=new_axes())
    some = pd.DataFrame({"lora_rank": [4, 8], "learning_rate": [1e-4, 1e-3], "mean": [0.5, 0.5]})
    ax = plot_sweep(some, ax=new_axes())
    draw_without_warnings(ax)
    assert np.ma.getmaskarray(ax.images[0].get_array()).sum() == 2 and len(ax.texts) == 2


# a classifier of the user's own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [("bad", "good"), (0, 1, 2)], ids=str)
def test_a_further_baseline_goes_all_the_way(labels, tmp_path):
    """Any scikit-learn classifier: folds, repeats, intervals, comparison, figures."""
    comments, given = comments_of(90, labels)
    mine = {
        "svm": make_pipeline(CountVectorizer(), CalibratedClassifierCV(LinearSVC(), cv=2)),
        "bayes": make_pipeline(CountVectorizer(), ComplementNB()),
        "guess": DummyClassifier(strategy="stratified", random_state=0),
    }
    oof = cross_validate({**simple_baselines(), **mine}, comments, given, folds=3, repeats=2)
    classes = sorted(set(given))
    layers = {name: probabilities_from_oof(oof, name, classes) for name in ("baseline", *mine)}
    metrics = {name: metrics_with_intervals(given, values, classes) for name, values in layers.items()}
    for name, of_one in metrics.items():
        assert of_one["accuracy"] == pytest.approx(metrics_from_oof(oof, name, classes)["accuracy"])
        low, high = of_one["intervals"]["accuracy"]
        assert low < of_one["accuracy"] < high
    assert list(metrics_table(metrics).index) == ["baseline", "svm", "bayes", "guess"]
    compared = paired_comparison(given, layers["svm"], layers["guess"], classes, names=("svm", "the guess"))
    assert compared["sentence"].startswith("svm is better than the guess") and compared["p_value"] < 0.001
    paths = save_figures(tmp_path, given, layers["svm"][0], classes, baseline=layers["bayes"][0])
    assert "reliability.png" in [path.name for path in paths]
    for ax in [
        plot_reliability(given, layers["svm"][0], classes, baseline=layers["bayes"][0]),
        plot_accuracy_by(given, layers["svm"][0], classes, [comment[:2] for comment in comments]),
    ]:
        assert isinstance(ax, Axes)
        plt.close(ax.figure)
