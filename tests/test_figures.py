"""What would bore a reader of the figures' notebook: many classes, Hangul, bad input, further estimators, no state."""

import os
import warnings

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
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.naive_bayes import ComplementNB
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from test_evaluation import BAD_INPUT

from gemma_lora_sentiment import figures
from gemma_lora_sentiment.decision import expected_calibration_error
from gemma_lora_sentiment.evaluation import (
    baseline_classifier,
    cross_validate,
    metrics_from_oof,
    probabilities_from_oof,
    simple_baselines,
    sweep,
)
from gemma_lora_sentiment.figures import (
    _stratified_order,
    accuracy_by,
    learning_curve,
    plot_accuracy_by,
    plot_confusion_matrix,
    plot_learning_curve,
    plot_precision_recall,
    plot_reliability,
    plot_roc,
    plot_score_histogram,
    plot_sweep,
    plot_training_curves,
    save_figures,
)
from gemma_lora_sentiment.intervals import metrics_table, metrics_with_intervals, paired_comparison

PNG = b"\x89PNG\r\n\x1a\n"
HISTORY = pd.DataFrame({"epoch": [1, 2], "loss": [0.6, 0.4], "val_loss": [0.5, 0.45], "accuracy": [0.7, 0.8]})


@pytest.fixture(autouse=True)
def same_global_state():
    """No test of this file may change matplotlib's settings, its open figures or NumPy's global random state."""
    settings, (_, keys, position, *_) = dict(matplotlib.rcParams), np.random.get_state()
    keys = keys.copy()
    before = plt.get_fignums()
    yield
    assert dict(matplotlib.rcParams) == settings
    assert np.array_equal(np.random.get_state()[1], keys) and np.random.get_state()[2] == position
    assert plt.get_fignums() == before


def some_rows(n=60, n_classes=2, seed=0):
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


# one set of predictions -----------------------------------------------------------------------------------------------


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


def draw_all(axes):
    for ax in axes:
        draw_without_warnings(ax)


@pytest.mark.parametrize("n_classes", [2, 3, 12])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_figures(n_classes, with_baseline):
    positions, probabilities = some_rows(120, n_classes)
    baseline = some_rows(120, n_classes, seed=1)[1] if with_baseline else None
    classes = [f"label {number}" for number in range(n_classes)]
    axes = all_figures([classes[position] for position in positions], probabilities, classes, baseline)
    draw_all(axes)
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
    draw_all(axes)
    for ax in axes[1:3]:
        assert "all of one class" in ax.texts[0].get_text()


def test_a_class_without_rows_has_no_curve():
    positions, probabilities = some_rows(60, 3)
    rows = positions != 1
    axes = all_figures(positions[rows], probabilities[rows], [0, 1, 2])
    draw_all(axes)
    assert [line.get_label().split(",")[0] for line in axes[1].lines] == ["0", "2", "chance"]


@BAD_INPUT
def test_figures_of_bad_input_are_one_line(y_true, probabilities, classes, message, tmp_path):
    calls = [
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


def test_hangul_without_a_font_for_it(monkeypatch):
    monkeypatch.setattr(figures, "_KOREAN_FONTS", ())
    if figures._can_draw("sans-serif", "부"):
        pytest.skip("matplotlib's default font here has Hangul")
    for classes in (HANGUL, HANGUL[:2], ["neutral", "긍정"]):
        positions, probabilities = some_rows(60, len(classes))
        axes = all_figures([classes[position] for position in positions], probabilities, classes)
        draw_all(axes)
        for ax in axes:
            assert all(text.isascii() for text in texts_of(ax))
        assert "class 1" in texts_of(axes[0])
        assert ("neutral" in texts_of(axes[0])) == ("neutral" in classes)
        note = next(text for text in texts_of(axes[0]) if "no installed font has the class names" in text)
        assert "counted from 0 in their order" in note and "fonts-nanum" in note


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
    monkeypatch.setattr(figures, "_KOREAN_FONTS", ("not installed", family))
    if figures._can_draw("sans-serif", "부"):
        pytest.skip("matplotlib's default font here has Hangul")
    positions, probabilities = some_rows(60, 3)
    labels = [HANGUL[position] for position in positions]
    axes = all_figures(labels, probabilities, HANGUL, baseline=probabilities)
    draw_all(axes)
    written = texts_of(axes[0])
    assert set(HANGUL) <= set(written) and not any("font" in text for text in written)
    for text in axes[0].findobj(matplotlib.text.Text):
        if text.get_text() in HANGUL:
            assert family in text.get_fontfamily()


def test_names_that_matplotlib_would_misread():
    classes = ["_hidden", "$a_1$ or $", "two\nlines", "a" * 60, ""]
    positions, probabilities = some_rows(60, 5)
    axes = all_figures([classes[position] for position in positions], probabilities, classes)
    draw_all(axes)
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
    monkeypatch.setattr(figures, "_KOREAN_FONTS", ())
    if figures._can_draw("sans-serif", "맛"):
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
        ((comments, labels, comments[:1], labels[:1]), {}, "1 test comment is among the comments too"),
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
        "svm": make_pipeline(CountVectorizer(), CalibratedClassifierCV(LinearSVC(random_state=0), cv=2)),
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
