"""What would bore a reader of 05_classifier: scikit-learn's contract, labels of all kinds, threads, damaged folders."""

import errno
import functools
import inspect
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import tracemalloc
import unicodedata
import warnings
from decimal import Decimal
from pathlib import Path

import jax
import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

from gemma_lora_sentiment import GemmaLoraClassifier
from gemma_lora_sentiment import classifier as room
from gemma_lora_sentiment.adapter import RunError
from gemma_lora_sentiment.backend import choose_dtype
from gemma_lora_sentiment.data import DataError, split_comments
from gemma_lora_sentiment.model import (
    ModelError,
    keras,
    keras_nlp,
    load_base,
    release_bases,
    tiny_gemma,
    without_tensorflow,
)
from gemma_lora_sentiment.precision import base_for_device, choose_quantization
from gemma_lora_sentiment.training import RECIPES

GOOD = ["맛있어요", "최고예요", "친절해요", "좋았어요", "또 갈게요", "추천합니다"]
BAD = ["별로예요", "실망했어요", "불친절해요", "맛이 없어요", "안 가요", "비추입니다"]
COMMENTS = [comment for pair in zip(GOOD, BAD, strict=True) for comment in pair]
LABELS = [1, 0] * 6
# All comments fit one length, so nearly all tests share one compiled training step.
FAST = dict(lora_rank=4, learning_rate=0.02, epochs=2, batch_size=4, max_length=16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(tiny):
    return functools.partial(GemmaLoraClassifier, **{**FAST, "preset": tiny})


@pytest.fixture(scope="module")
def fitted(tiny):
    return GemmaLoraClassifier(**{**FAST, "preset": tiny, "epochs": 60, "learning_rate": 0.02}).fit(COMMENTS, LABELS)


def same(a, b):
    return np.array_equal(a.predict_proba(COMMENTS), b.predict_proba(COMMENTS)) and all(
        np.array_equal(a.adapter_.arrays[path], array) for path, array in b.adapter_.arrays.items()
    )


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 1000


# --- it learns, and says how sure it is


def test_it_learns_its_rows(fitted):
    assert fitted.score(COMMENTS, LABELS) == 1.0
    assert fitted.history_.loss.iloc[-1] < fitted.history_.loss.iloc[0] and fitted.best_epoch_ == 60


def test_probabilities_are_probabilities(fitted):
    probabilities = fitted.predict_proba(COMMENTS)
    assert probabilities.shape == (12, 2) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert (probabilities > 0).all() and fitted.classes_.tolist() == [0, 1]
    assert np.array_equal(fitted.predict(COMMENTS), fitted.classes_[probabilities.argmax(axis=1)])


def test_batched_is_one_by_one_in_any_order(fitted):
    whole = fitted.predict_proba(COMMENTS)
    np.testing.assert_allclose(np.concatenate([fitted.predict_proba([c]) for c in COMMENTS]), whole, atol=1e-5)
    order = np.random.default_rng(0).permutation(12)
    shuffled = fitted.predict_proba([COMMENTS[i] for i in order])
    np.testing.assert_allclose(shuffled, whole[order], atol=1e-5)
    np.testing.assert_allclose(fitted.predict_proba(COMMENTS * 7)[-12:], whole, atol=1e-5)


def test_duplicates_have_the_same_probability(fitted):
    probabilities = fitted.predict_proba(["맛있어요", "별로예요", "맛있어요", "맛있어요"])
    assert np.array_equal(probabilities[0], probabilities[2]) and np.array_equal(probabilities[0], probabilities[3])


def test_no_comments_and_empty_comments(fitted):
    assert fitted.predict_proba([]).shape == (0, 2) and fitted.predict([]).shape == (0,)
    assert fitted.predict([]).dtype == fitted.classes_.dtype
    assert np.isfinite(fitted.predict_proba(["", " \n"])).all()


def test_zero_epochs_is_the_base(make, tiny):
    clf = make(epochs=0).fit(COMMENTS, LABELS)
    assert clf.best_epoch_ == 0 and len(clf.history_) == 0
    tokenizer = room._tokenizer(load_base(tiny).tokenizer_proto)
    prompt = tokenizer.encode([clf.template.split("{instruction}")[0]])[0]
    middle = tokenizer.encode(["\n\nResponse:\n"])[0]
    ids = np.array([[tokenizer.bos_id, *prompt, *tokenizer.encode(["맛있어요"])[0], *middle]], np.int32)
    with without_tensorflow():
        backbone = keras_nlp.models.Backbone.from_preset(tiny, dtype="float32")
    hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    logits = np.asarray(backbone.token_embedding(hidden, reverse=True))[0, -1]
    zero, one = (tokenizer.encode([word])[0][0] for word in "01")
    expected = np.exp(logits[[zero, one]]) / np.exp(logits[[zero, one]]).sum()
    np.testing.assert_allclose(clf.predict_proba(["맛있어요"])[0], expected, atol=1e-5)


def test_generate_before_and_after(make, fitted):
    before = make().generate("맛있어요", max_new_tokens=8)
    assert isinstance(before, str) and not hasattr(make(), "adapter_")
    assert fitted.generate("맛있어요", 8) == "1" and fitted.generate("별로예요", 8) == "0"
    assert make().generate("맛있어요", max_new_tokens=8) == before  # the fitted adapter was only lent
    assert isinstance(fitted.generate("맛있어요 " * 500, 8), str)  # shortened like any comment


def test_token_influence_leaves_one_token_out(fitted):
    table = fitted.token_influence("맛있어요 최고예요")
    assert "".join(table.piece).replace("▁", " ") == "맛있어요 최고예요" and np.isfinite(table.influence).all()
    assert list(table.columns) == ["piece", "influence"]
    assert len(fitted.token_influence("")) == 0
    with pytest.raises(DataError):
        fitted.token_influence(None)


def test_token_influence_of_a_single_token_is_the_change_without_it(fitted):
    table = fitted.token_influence("굿")
    assert len(table) == 1
    whole, without = fitted.predict_proba(["굿"])[0], fitted.predict_proba([""])[0]
    label = whole.argmax()
    expected = np.log(whole[label] / (1 - whole[label])) - np.log(without[label] / (1 - without[label]))
    np.testing.assert_allclose(table.influence[0], expected, atol=1e-3)


# --- scikit-learn's contract, ported to one-dimensional strings


def test_parameters_are_those_of_the_constructor_untouched():
    signature = inspect.signature(GemmaLoraClassifier.__init__)
    names = [name for name in signature.parameters if name != "self"]
    given = {name: object() for name in names}  # whatever is given is kept, without a look at it
    clf = GemmaLoraClassifier(**given)
    assert sorted(clf.get_params()) == sorted(names) and set(vars(clf)) == set(names)
    assert all(getattr(clf, name) is value and clf.get_params()[name] is value for name, value in given.items())
    clf.set_params(seed=given["preset"])
    assert clf.seed is given["preset"]
    with pytest.raises(ValueError, match="Invalid parameter 'sed'"):
        clf.set_params(sed=1)
    documented = ("preset recipe template label_words lora_rank lora_alpha lora_dropout target_layers learning_rate "
                  "weight_decay epochs batch_size max_length dtype quantization loss_on class_weight warm_start "
                  "validation_fraction patience callbacks checkpoint_dir devices strategy seed verbose")  # fmt: skip
    assert names == documented.split()


def test_clone_copies_parameters_and_nothing_else(fitted):
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params() and not [name for name in vars(copy) if name.endswith("_")]
    assert repr(copy) == repr(fitted)
    mutable = GemmaLoraClassifier(label_words={0: "a", 1: "b"}, class_weight={0: 1, 1: 2}, target_layers=["query"])
    assert clone(mutable).get_params() == mutable.get_params()


def test_fit_returns_self_and_changes_no_parameter(make):
    parameters = dict(
        target_layers=["query", "value"], class_weight={0: 1.0, 1: 2.0}, label_words={0: "0", 1: "1"}, callbacks=[]
    )
    clf = make(**parameters)
    before = {name: (value, repr(value)) for name, value in clf.get_params().items()}
    X, y = list(COMMENTS), list(LABELS)
    assert clf.fit(X, y) is clf
    clf.predict_proba(X), clf.predict(X)
    for name, (value, text) in before.items():
        assert clf.get_params()[name] is value and repr(value) == text
    assert X == COMMENTS and y == LABELS
    learned = {name for name in vars(clf) if name not in before}
    assert learned and all(name.endswith("_") and not name.startswith("_") for name in learned)
    attributes = dict(vars(clf))
    clf.predict_proba(X), clf.generate(X[0], 4), clf.token_influence(X[0])
    assert vars(clf).keys() == attributes.keys() and all(vars(clf)[k] is v for k, v in attributes.items())


def test_repeated_fits_are_identical(make):
    clf = make().fit(COMMENTS, LABELS)
    first = pickle.loads(pickle.dumps(clf))
    make(learning_rate=0.1, seed=5).fit(COMMENTS, LABELS)
    assert same(clf.fit(COMMENTS, LABELS), first) and same(clone(clf).fit(COMMENTS, LABELS), first)
    assert not same(clone(clf).set_params(seed=1).fit(COMMENTS, LABELS), first)


def test_fitting_again_on_other_labels_forgets_the_first(make):
    clf = make().fit(COMMENTS, LABELS).fit(COMMENTS[:6], ["a", "b", "c"] * 2)
    assert clf.classes_.tolist() == ["a", "b", "c"] and clf.predict_proba(COMMENTS).shape == (12, 3)


@pytest.mark.parametrize("use", [
    lambda clf: clf.predict(COMMENTS), lambda clf: clf.predict([]), lambda clf: clf.predict_proba(COMMENTS),
    lambda clf: clf.predict_proba([]), lambda clf: clf.score(COMMENTS, LABELS), lambda clf: clf.save("x"),
    lambda clf: clf.token_influence("a"),
])  # fmt: skip
def test_unfitted_use_raises_not_fitted(use, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFittedError):
        use(make())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("X, y, message", [
    (COMMENTS[:3], [0, 1], "X has 3 comments and y has shape"),
    (COMMENTS[:2], [0, 1, 0], "X has 2 comments and y has shape"),
    (COMMENTS[:2], 1, "y has shape"),
    (COMMENTS[:2], [[0], [1]], "y has shape"),
    (COMMENTS[:2], [0, 0], "at least two classes"),
    ([], [], "holds no comments"),
    ("a comment", [0, 1], "one-dimensional sequence"),
    ([["a"], ["b"]], [0, 1], "one-dimensional sequence"),
    ([["a"], ["b", "c"]], [0, 1], "one-dimensional sequence"),
    (pd.DataFrame({"comment": ["a", "b"]}), [0, 1], "one-dimensional sequence"),
    (np.array([["a"], ["b"]]), [0, 1], "one-dimensional sequence"),
    (None, [0, 1], "one-dimensional sequence"),
    (["a", None], [0, 1], "Comment 1 is None"),
    (["a", float("nan")], [0, 1], "Comment 1 is nan"),
    ([b"a", "b"], [0, 1], "Comment 0 is b'a'"),
    (np.array([1.0, 2.0]), [0, 1], "Comment 0 is 1.0, not a string"),
    (COMMENTS[:2], None, "y has shape"),
    (COMMENTS[:2], [0, None], "Label 1 is missing"),
    (COMMENTS[:2], [0.0, float("nan")], r"Label 1 is missing \(nan\)"),
    (COMMENTS[:2], np.array(["a", "a"]), "All 2 labels are 'a'; training"),
    (COMMENTS[:2], np.array([7, 7]), "All 2 labels are 7; training"),
    (COMMENTS[:2], pd.Series(["a", pd.NA]), "Label 1 is missing"),
    (COMMENTS[:2], pd.Series([1, pd.NA], dtype="Int64"), "Label 1 is missing"),
    (COMMENTS[:2], np.array([0, "a"], dtype=object), "Convert them to one type"),
    (COMMENTS[:2], ["", "a"], "has no word"),
    (["a", "\ud800 abc"], [0, 1], "Comment 1 holds half a character"),
    (COMMENTS[:2], ["a", "\udfff"], "Label 1 holds half a character"),
    (COMMENTS[:2], [pd.Timestamp("2020-01-01"), pd.Timestamp("2021-01-01")], "of type Timestamp; .*Convert the labels"),
    (COMMENTS[:2], np.array(["2020-01-01", "2021-01-01"], "datetime64[ns]"), "of type datetime64; .*Convert"),
    (COMMENTS[:2], pd.Series(pd.to_datetime(["2020-01-01", "2021-01-01"])), "of type datetime64; .*Convert"),
    (COMMENTS[:2], [b"a", b"b"], "of type bytes; .*Convert the labels"),
    (COMMENTS[:2], [Decimal(0), Decimal(1)], "of type Decimal; .*Convert the labels"),
    (COMMENTS[:2], [1j, 2j], "of type complex; .*Convert the labels"),
    (COMMENTS[:2], np.array([1, 2], np.complex64), "of type complex64; .*Convert the labels"),
], ids=ascii)  # fmt: skip
def test_data_that_cannot_be_fitted_is_refused_in_one_line(X, y, message, make):
    clf = make()
    with pytest.raises(DataError, match=message) as error:
        clf.fit(X, y)
    assert one_line(error) and not hasattr(clf, "classes_")


@pytest.mark.parametrize("X", ["abc", None, [["a"]], [1], ["a", None], ["\ud800 abc"]], ids=ascii)
def test_comments_that_cannot_be_predicted_are_refused_in_one_line(X, fitted):
    for method in (fitted.predict_proba, fitted.predict):
        with pytest.raises(DataError) as error:
            method(X)
        assert one_line(error)


@pytest.mark.parametrize("comment", [None, 5, "\ud800 abc"], ids=ascii)
def test_a_comment_that_nothing_can_be_said_of_is_refused_in_one_line(comment, make, fitted):
    for method in (fitted.generate, make().generate, fitted.token_influence):
        with pytest.raises(DataError, match="Comment 0") as error:
            method(comment)
        assert one_line(error)


@pytest.mark.parametrize("parameters", [
    dict(lora_rank=0), dict(lora_rank=2.5), dict(lora_rank=True), dict(lora_rank="8"), dict(learning_rate=0),
    dict(learning_rate=-1), dict(learning_rate=float("nan")), dict(learning_rate="fast"), dict(weight_decay=-0.1),
    dict(epochs=-1), dict(epochs=1.5), dict(batch_size=0), dict(max_length=1), dict(max_length=None),
    dict(lora_alpha=0), dict(lora_dropout=1.0), dict(lora_dropout=-0.1), dict(validation_fraction=1.0),
    dict(patience=2), dict(patience=0, validation_fraction=0.2), dict(loss_on="words"), dict(recipe="best"),
    dict(dtype="fp16"), dict(quantization="int3"), dict(target_layers=("qeury",)), dict(target_layers=()),
    dict(class_weight="equal"), dict(class_weight={0: 1}), dict(class_weight={0: -1, 1: 1}), dict(class_weight=[1, 2]),
    dict(checkpoint_dir=3), dict(devices=0), dict(strategy="both"), dict(preset="gema"), dict(seed=-1),
    dict(seed=None), dict(seed="x"), dict(target_layers="query"), dict(target_layers=5), dict(callbacks=5),
    dict(class_weight={0: "a", 1: 1}), dict(class_weight={0: float("inf"), 1: 1}), dict(class_weight={0: 0, 1: 0}),
    dict(learning_rate=float("inf")), dict(lora_alpha=float("inf")),
], ids=str)  # fmt: skip
def test_parameters_that_cannot_work_are_refused_in_one_line(parameters, make):
    clf = make(**parameters)
    with pytest.raises(ModelError) as error:
        clf.fit(COMMENTS, LABELS)
    assert one_line(error) and not hasattr(clf, "classes_")


@pytest.mark.parametrize("value", [
    np.array([1.0, 2.0]), np.array("auto"), pd.Series(["a", "b"]), pd.DataFrame({"a": [1]}), [["a"]], [3], b"x",
    {1: [2]}, pd.NA, list(range(10_000)),
], ids=lambda value: type(value).__name__)  # fmt: skip
@pytest.mark.parametrize("name", inspect.signature(GemmaLoraClassifier).parameters)
def test_parameters_of_any_other_type_are_refused_in_one_line(name, value, make):
    with pytest.raises((ModelError, DataError)) as error:
        make(**{name: value}).fit(COMMENTS, LABELS)
    assert one_line(error)


@pytest.mark.parametrize("recipe", [["a"], np.zeros(2)], ids=str)
def test_what_is_asked_before_a_fit_is_refused_in_one_line_too(recipe, make):
    clf = make(recipe=recipe)
    for ask in (clf.resolve_recipe, clf.memory_needs, clf.choose_base, lambda: clf.generate("맛있어요")):
        with pytest.raises(ModelError, match="recipe=.* is not one of 'auto', 'tutorial'") as error:
            ask()
        assert one_line(error)


@pytest.mark.parametrize("parameters", [
    dict(template="no fields"), dict(template=None), dict(template=5), dict(label_words={0: "x", 1: "x"}),
    dict(label_words={0: "x"}), dict(label_words=["x"]), dict(label_words="xy"), dict(warm_start=1), dict(max_length=3),
    dict(template="\ud800{instruction}{response}"),
], ids=ascii)  # fmt: skip
def test_templates_and_words_that_cannot_work_are_refused_in_one_line(parameters, make):
    clf = make(**parameters)
    with pytest.raises((DataError, ModelError)) as error:
        clf.fit(COMMENTS, LABELS)
    assert one_line(error) and not hasattr(clf, "classes_")


@pytest.mark.parametrize("words", [["\ud800나쁨", "좋음"], {0: "나쁨", 1: "좋\udfff음"}], ids=ascii)
def test_half_a_character_in_label_words_is_refused_in_one_line(words, make):
    for recipe in ("auto", "tutorial"):
        with pytest.raises(DataError, match="The word .* of label [01] holds half a character") as error:
            make(label_words=words, recipe=recipe).fit(COMMENTS, LABELS)
        assert one_line(error) and str(error.value).encode()


@pytest.mark.parametrize("dtype", [
    np.array(["float32"]), np.array(["auto", "float32"]), pd.Series(["auto"] * 2), ["auto"], np.zeros(10_000), 5,
], ids=lambda dtype: f"{type(dtype).__name__}-{np.size(dtype)}")  # fmt: skip
def test_a_dtype_of_another_type_is_refused_in_one_line(dtype, make, tiny):
    for ask in (
        choose_dtype, lambda dtype: load_base(tiny, dtype), lambda dtype: make(dtype=dtype).choose_base(),
        lambda dtype: base_for_device(tiny, dtype), lambda dtype: choose_quantization(tiny, dtype, 10**9),
    ):  # fmt: skip
        with pytest.raises(ModelError, match="dtype.* is not one of .*auto.*, .*float32") as error:
            ask(dtype)
        assert one_line(error)


def test_pickle_and_joblib_keep_a_fitted_classifier(fitted, tmp_path):
    for copy in (pickle.loads(pickle.dumps(fitted)), pickle.loads(pickle.dumps(fitted, protocol=2))):
        assert same(copy, fitted)
    joblib.dump(fitted, tmp_path / "clf")
    assert same(joblib.load(tmp_path / "clf"), fitted)
    assert len(pickle.dumps(fitted)) < 100_000  # an adapter, not a base


def test_a_classifier_with_keras_callbacks_can_be_cloned_and_pickled_after_fit(make):
    clf = make(callbacks=[keras.callbacks.EarlyStopping("loss", patience=5)]).fit(COMMENTS, LABELS)
    assert len(clone(clf).fit(COMMENTS, LABELS).history_) == 2
    assert same(pickle.loads(pickle.dumps(clf)), clf)


LABEL_KINDS = {
    "int": [1, 0], "negative": [-1, 5], "str": ["나쁨", "좋음"], "leading zero": ["01", "1"], "bool": [True, False],
    "numpy int8": list(np.array([3, 1], np.int8)), "numpy bool": list(np.array([True, False])),
    "numpy str": list(np.array(["bad", "good"])), "float": [0.0, 1.0], "spaces": ["not good", "good"],
}  # fmt: skip


@pytest.mark.parametrize("values", LABEL_KINDS.values(), ids=LABEL_KINDS)
@pytest.mark.parametrize("container", [list, np.array, pd.Series, functools.partial(np.array, dtype=object)],
                         ids=["list", "array", "series", "object"])  # fmt: skip
def test_labels_come_out_as_they_went_in(values, container, make, tmp_path):
    y = container(values * 6)
    clf = make(epochs=0, max_length=32).fit(COMMENTS, y)
    assert clf.classes_.tolist() == sorted(values) and clf.classes_.dtype == np.asarray(y).dtype
    predicted = clf.predict(COMMENTS)
    assert predicted.dtype == clf.classes_.dtype and set(predicted.tolist()) <= set(values)
    assert {type(label) for label in predicted.tolist()} == {type(np.asarray(y).tolist()[0])}
    if isinstance(values[0], str) or clf.classes_.dtype != object:  # scikit-learn's metrics refuse objects
        assert 0 <= clf.score(COMMENTS, y) <= 1
    loaded = GemmaLoraClassifier.load(clf.save(tmp_path))
    assert loaded.classes_.tolist() == clf.classes_.tolist()
    assert [type(room._plain(label)) for label in loaded.classes_] == [type(room._plain(c)) for c in clf.classes_]
    assert np.array_equal(loaded.predict(COMMENTS), predicted)


@pytest.mark.parametrize("dtype", ["int8", "uint64", "int64", "float16", "float32", "float64"])
def test_numbers_as_labels_keep_their_type_in_a_saved_run(dtype, make, tmp_path):
    clf = make(epochs=0, max_length=32).fit(COMMENTS, np.array(LABELS, dtype))
    loaded = GemmaLoraClassifier.load(clf.save(tmp_path / "run"))
    assert loaded.predict(COMMENTS).dtype == clf.predict(COMMENTS).dtype == np.dtype(dtype)
    path = tmp_path / "run" / "classifier.json"  # as earlier versions wrote it
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(f'"dtype": "{dtype}",\n    "values"', f'"dtype": "{dtype[0]}",\n    "values"'))
    assert path.read_text(encoding="utf-8") != text
    earlier = GemmaLoraClassifier.load(tmp_path / "run", verify=False)
    assert earlier.classes_.tolist() == clf.classes_.tolist()


@pytest.mark.parametrize("container", [
    list, tuple, np.array, functools.partial(np.array, dtype=object), pd.Series, pd.Index,
    lambda X: pd.Series(X, index=range(100, 112)), lambda X: pd.Series(X, dtype="string"),
    lambda X: pd.Series(X).astype("category"), lambda X: pd.DataFrame({"comment": X})["comment"],
])  # fmt: skip
def test_comments_come_in_any_one_dimensional_sequence(container, make, fitted):
    X = container(COMMENTS)
    assert np.array_equal(fitted.predict_proba(X), fitted.predict_proba(COMMENTS))
    assert same(make().fit(X, pd.Series(LABELS, index=range(50, 62))), make().fit(COMMENTS, LABELS))


def test_more_than_two_classes(make):
    y = ["good", "bad", "so so"] * 4
    clf = make(max_length=32, epochs=3).fit(COMMENTS, y)
    probabilities = clf.predict_proba(COMMENTS)
    assert clf.classes_.tolist() == ["bad", "good", "so so"] and probabilities.shape == (12, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    one_by_one = np.concatenate([clf.predict_proba([comment]) for comment in COMMENTS[:3]])
    np.testing.assert_allclose(one_by_one, probabilities[:3], atol=1e-5)


def test_words_of_which_one_begins_another_give_a_distribution(make):
    clf = make(epochs=1).fit(COMMENTS, ["1", "10", "100"] * 4)
    assert not clf.words_.single_token
    np.testing.assert_allclose(clf.predict_proba(COMMENTS).sum(axis=1), 1, atol=1e-6)


# --- scikit-learn's own checks

# Its `estimator_checks_generator` yields one check for an estimator that takes strings alone (cloning). The checks
# that look at no data are run as they are; those that do are run on `OnNumbers`, which writes numbers as text.
EXPECTED_FAILED_CHECKS = {
    "check_parameters_default_constructible": "recent versions want constraints on parameters that we check at fit",
    "check_fit2d_1feature": "X is one-dimensional: there are no features",
    "check_n_features_in": "X is one-dimensional: there are no features",
    "check_estimators_nan_inf": "a comment is a string; what is no string is refused by name",
    "check_estimator_sparse_array": "comments are not sparse",
    "check_supervised_y_2d": "labels of shape (n, 1) are refused, not ravelled with a warning",
    "check_classifiers_train": "a random base of a few thousand parameters need not reach its accuracy",
    "check_class_weight_classifiers": "likewise: it asks that weights alone turn nearly every prediction",
}
WITHOUT_DATA = [
    "check_estimator_cloneable", "check_estimator_tags_renamed", "check_valid_tag_types", "check_estimator_repr",
    "check_no_attributes_set_in_init", "check_get_params_invariance", "check_set_params", "check_mixin_order",
    "check_do_not_raise_errors_in_init_or_set_params", "check_estimators_unfitted",
]  # fmt: skip
ON_NUMBERS = [
    "check_fit_score_takes_y", "check_estimators_fit_returns_self", "check_estimators_overwrite_params",
    "check_dont_overwrite_parameters", "check_dict_unchanged", "check_fit_idempotent", "check_fit_check_is_fitted",
    "check_estimators_pickle", "check_pipeline_consistency", "check_methods_sample_order_invariance",
    "check_methods_subset_invariance", "check_classifiers_one_label", "check_classifiers_classes",
    "check_classifiers_regression_target", "check_sample_weights_list", "check_sample_weights_pandas_series",
    "check_sample_weights_not_an_array", "check_sample_weights_shape", "check_sample_weights_not_overwritten",
    "check_estimators_dtypes",
]  # fmt: skip


class OnNumbers(ClassifierMixin, BaseEstimator):
    """Our classifier behind scikit-learn's numeric data: each number becomes one letter."""

    def __init__(self, preset="mini_ko", seed=0):
        self.preset, self.seed = preset, seed

    @staticmethod
    def _text(X):
        return ["".join(chr(97 + int(25 / (1 + np.exp(-value)))) for value in row[:8]) for row in X]

    def fit(self, X, y, sample_weight=None):
        from sklearn.utils.multiclass import check_classification_targets
        from sklearn.utils.validation import validate_data

        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        if sample_weight is not None:
            sample_weight = np.asarray(sample_weight)
        self.classifier_ = GemmaLoraClassifier(**{**FAST, "preset": self.preset, "seed": self.seed, "epochs": 1})
        self.classifier_.fit(self._text(X), y, sample_weight)
        self.classes_ = self.classifier_.classes_
        return self

    def _predicted(self, X, method):
        from sklearn.utils.validation import check_is_fitted, validate_data

        check_is_fitted(self)
        return getattr(self.classifier_, method)(self._text(validate_data(self, X, reset=False)))

    def predict(self, X):
        return self._predicted(X, "predict")

    def predict_proba(self, X):
        return self._predicted(X, "predict_proba")


def run_check(name, estimator):
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip(f"this version of scikit-learn has no {name}")
    if name in EXPECTED_FAILED_CHECKS:
        pytest.xfail(EXPECTED_FAILED_CHECKS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(type(estimator).__name__, estimator)


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_scikit_learn_s_checks_without_data(name, make):
    run_check(name, make())


@pytest.mark.parametrize("name", ON_NUMBERS)
def test_scikit_learn_s_checks_on_numbers_as_text(name, tiny):
    run_check(name, OnNumbers(tiny))


def test_scikit_learn_s_own_list_of_checks(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = estimator_checks.check_estimator(make(), expected_failed_checks=EXPECTED_FAILED_CHECKS)
    assert results and all(result["status"] in ("passed", "skipped", "xfail") for result in results)


def test_tags_say_that_it_takes_strings(make):
    from sklearn.utils import get_tags

    tags = get_tags(make())
    assert tags.input_tags.string and tags.input_tags.one_d_array and not tags.input_tags.two_d_array
    assert tags.target_tags.required and tags.classifier_tags.multi_class and tags.estimator_type == "classifier"


# --- scikit-learn's tools


def test_cross_val_predict(make):
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    probabilities = cross_val_predict(make(), COMMENTS, LABELS, cv=folds, method="predict_proba")
    assert probabilities.shape == (12, 2)
    for X, y in ((np.array(COMMENTS, dtype=object), np.array(LABELS)), (pd.Series(COMMENTS), pd.Series(LABELS))):
        again = cross_val_predict(make(), X, y, cv=folds, method="predict_proba")
        assert np.array_equal(again, probabilities)
    assert cross_val_score(make(), COMMENTS, LABELS, cv=2, scoring="roc_auc").shape == (2,)


def test_grid_search(make):
    grid = {"lora_rank": [2, 4], "learning_rate": [1e-3, 0.05]}
    search = GridSearchCV(make(), grid, cv=2, scoring="neg_log_loss", error_score="raise").fit(COMMENTS, LABELS)
    assert len(search.cv_results_["params"]) == 4 and np.isfinite(search.cv_results_["mean_test_score"]).all()
    best = search.best_estimator_
    assert best.adapter_.rank == search.best_params_["lora_rank"]
    assert same(clone(best).fit(COMMENTS, LABELS), best)


def test_calibration(make):
    calibrated = CalibratedClassifierCV(make(), cv=2, method="sigmoid").fit(COMMENTS, LABELS)
    probabilities = calibrated.predict_proba(COMMENTS)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert len(calibrated.calibrated_classifiers_) == 2


def test_pipeline(make):
    strip = FunctionTransformer(lambda X: [comment.strip() for comment in X])
    pipeline = Pipeline([("strip", strip), ("classify", make())]).fit([f"  {c} " for c in COMMENTS], LABELS)
    assert same(pipeline["classify"], make().fit(COMMENTS, LABELS))
    assert pipeline.set_params(classify__epochs=1)["classify"].epochs == 1
    assert pipeline.predict(COMMENTS).shape == (12,)


def test_sample_weight_reaches_fit_through_scikit_learn(make):
    weights = np.linspace(0.1, 3, 12)
    weighted = make().fit(COMMENTS, LABELS, sample_weight=weights)
    assert not same(weighted, make().fit(COMMENTS, LABELS))
    assert same(Pipeline([("c", make())]).fit(COMMENTS, LABELS, c__sample_weight=weights)["c"], weighted)


# --- weights, validation


def test_sample_weight_zero_is_a_row_left_out_of_the_loss(make):
    full = make(batch_size=12, epochs=1, learning_rate=1e-9, recipe="tutorial", loss_on="response")
    part = clone(full)
    weights = [1.0] * 6 + [0.0] * 6
    first = full.fit(COMMENTS, LABELS, weights).history_.loss[0]
    np.testing.assert_allclose(first, part.fit(COMMENTS[:6], LABELS[:6]).history_.loss[0], rtol=1e-4)


@pytest.mark.parametrize("weights", [
    [1.0] * 11, [1.0] * 13, [0.0] * 12, [-1.0] + [5.0] * 11, [np.nan] * 12, [np.inf] * 12, [[1.0]] * 12, ["a"] * 12, []
], ids=lambda weights: f"{len(weights)} of {weights[:1]}")  # fmt: skip
def test_sample_weights_that_cannot_work_are_refused_in_one_line(weights, make):
    with pytest.raises(DataError, match="sample_weight") as error:
        make().fit(COMMENTS, LABELS, weights)
    assert one_line(error)


def test_class_weights_may_be_numpy_s_and_are_saved(make, tmp_path):
    y = ["a", "b"] * 6
    clf = make(class_weight={"a": np.int64(1), "b": np.float32(3)}).fit(COMMENTS, y)
    assert same(clf, make(class_weight={"a": 1, "b": 3.0}).fit(COMMENTS, y))
    clf.save(tmp_path / "run")
    assert GemmaLoraClassifier.load(tmp_path / "run").class_weight == {"a": 1, "b": 3.0}
    with pytest.raises(ModelError, match="mapping label"):
        make(class_weight=np.array([1.0, 2.0])).fit(COMMENTS, y)


def test_held_out_rows_that_count_nothing_are_told_before_training(make):
    y, table = ["a", "b"] * 6, pd.DataFrame({"id": np.arange(12), "comment": COMMENTS, "label": [0, 1] * 6})
    held_out = split_comments(table, 0.25, 0)[1]["id"]
    only_kept = np.isin(np.arange(12), held_out, invert=True).astype(float)
    clf = make(validation_fraction=0.25)
    for comments, weights in ((["같은 말"] * 12, None), (COMMENTS, only_kept)):
        with pytest.raises(DataError, match="of which none counts.*hold nothing out with 0"):
            clf.fit(comments, y, sample_weight=weights)
    assert not hasattr(clf, "adapter_")


@pytest.mark.parametrize("recipe", ["auto", "tutorial"])
def test_rows_to_train_on_that_count_nothing_are_told_before_training(recipe, make):
    table = pd.DataFrame({"id": np.arange(12), "comment": COMMENTS, "label": LABELS})
    held_out = np.isin(np.arange(12), split_comments(table, 0.25, 0)[1]["id"]).astype(float)
    clf = make(recipe=recipe, validation_fraction=0.25)
    with pytest.raises(DataError, match="leaves 9 of 12 rows to train on, of which none counts.*Change it") as error:
        clf.fit(COMMENTS, LABELS, sample_weight=held_out)
    assert one_line(error) and not hasattr(clf, "adapter_")
    clf = make(recipe=recipe, class_weight={0: 0, 1: 1})
    with pytest.raises(DataError, match="class_weight and sample_weight leave 12 rows, of which none counts") as error:
        clf.fit(COMMENTS, LABELS, sample_weight=[float(label == 0) for label in LABELS])
    assert one_line(error) and not hasattr(clf, "adapter_")


def test_class_weight_mapping_and_balanced(make):
    y = [1, 0, 0, 0] * 3
    plain = make().fit(COMMENTS, y)
    assert same(make(class_weight={0: 1, 1: 1}).fit(COMMENTS, y), plain)
    balanced = make(class_weight="balanced").fit(COMMENTS, y)
    assert not same(balanced, plain)
    by_hand = make(class_weight={0: 12 / (2 * 9), 1: 12 / (2 * 3)}).fit(COMMENTS, y)
    for path, array in balanced.adapter_.arrays.items():
        np.testing.assert_allclose(by_hand.adapter_.arrays[path], array, atol=1e-5)
    heavy = make(class_weight={0: 1, 1: 100}, epochs=8).fit(COMMENTS, y)
    light = make(class_weight={0: 100, 1: 1}, epochs=8).fit(COMMENTS, y)
    assert heavy.predict_proba(COMMENTS)[:, 1].mean() > light.predict_proba(COMMENTS)[:, 1].mean()
    named = make(class_weight={"bad": 1.0, "good": 2.0}, epochs=1).fit(COMMENTS, ["good", "bad"] * 6)
    assert named.classes_.tolist() == ["bad", "good"]


def test_validation_fraction_with_patience(make):
    clf = make(validation_fraction=0.34, patience=2, epochs=40, learning_rate=0.05).fit(COMMENTS, LABELS)
    assert {"val_loss", "val_accuracy"} <= set(clf.history_) and len(clf.history_) < 40
    assert clf.best_epoch_ == clf.history_.epoch[clf.history_.val_loss.idxmin()] == len(clf.history_) - 2
    with pytest.raises(DataError) as error:
        make(validation_fraction=0.2).fit(COMMENTS[:3], [0, 1, 1])
    assert one_line(error)


def test_auto_is_resolved_at_fit(tiny):
    clf = GemmaLoraClassifier(tiny, epochs=0).fit(COMMENTS, LABELS)
    assert clf.recipe_name_ == "mini_ko" and vars(clf.recipe_) == {**vars(RECIPES["mini_ko"]), "epochs": 0}
    assert (clf.lora_rank, clf.dtype, clf.dtype_) == ("auto", "auto", "float32")
    assert clf.adapter_.rank == clf.adapter_.alpha == clf.recipe_.lora_rank
    assert GemmaLoraClassifier(tiny, epochs=0, lora_rank=4, lora_alpha=7).fit(COMMENTS, LABELS).adapter_.alpha == 7
    tutorial = GemmaLoraClassifier(tiny, recipe="tutorial", epochs=0).fit(COMMENTS, LABELS)
    assert vars(tutorial.recipe_) == {**vars(RECIPES["tutorial"]), "epochs": 0} and tutorial.adapter_.rank == 4


def test_verbose_writes_a_line_an_epoch_on_standard_error(make, capsys):
    make(verbose=1).fit(COMMENTS, LABELS)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 3 and lines[0].startswith("4 rows a step, memory estimated: base ")
    make().fit(COMMENTS, LABELS)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# --- long comments


def test_a_warning_counts_the_comments_that_were_shortened(make, fitted):
    long = ["맛있어요 " * 50, "별로예요 " * 50, "굿"]
    with pytest.warns(UserWarning, match="2 of 3 comments were longer than max_length=16"):
        clf = make().fit([*long], [1, 0, 1])
    with pytest.warns(UserWarning, match="2 of 3 comments were longer"):
        assert np.isfinite(clf.predict_proba(long)).all()
    with pytest.warns(UserWarning, match="3 of 4 comments"):  # a duplicate is scored once, and counted twice
        clf.predict([*long, long[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.predict_proba(COMMENTS)


def test_a_comment_of_100_000_characters_costs_no_memory_for_the_others(fitted):
    comments = [*COMMENTS * 30, "맛있어요 " * 20_000]
    tracemalloc.start()
    with pytest.warns(UserWarning, match="1 of 361 comments"):
        probabilities = fitted.predict_proba(comments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(probabilities).all() and peak < 40e6


# --- many classifiers, one base


def test_ten_classifiers_predict_in_any_order(make):
    classifiers = [
        make(seed=seed, learning_rate=0.005 * (seed + 1), lora_alpha=1 + seed).fit(COMMENTS, LABELS)
        for seed in range(10)
    ]
    first = [clf.predict_proba(COMMENTS) for clf in classifiers]
    assert len({probabilities.tobytes() for probabilities in first}) == 10
    for index in np.random.default_rng(0).permutation(np.repeat(np.arange(10), 2)):
        assert np.array_equal(classifiers[index].predict_proba(COMMENTS), first[index])


def test_two_threads_predict_as_one_alone(make):
    classifiers = [make(seed=0).fit(COMMENTS, LABELS), make(seed=1, lora_rank=2).fit(COMMENTS, LABELS),
                   make(seed=2, lora_alpha=40).fit(COMMENTS, LABELS)]  # fmt: skip
    alone = [clf.predict_proba(COMMENTS) for clf in classifiers]
    results = [[] for _ in classifiers]

    def predict(index):
        for _ in range(15):
            results[index].append(classifiers[index].predict_proba(COMMENTS))

    threads = [threading.Thread(target=predict, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for expected, found in zip(alone, results, strict=True):
        assert len(found) == 15 and all(np.array_equal(expected, one) for one in found)


def test_one_thread_fits_while_another_predicts(make, fitted):
    expected, alone, errors = fitted.predict_proba(COMMENTS), make(seed=3).fit(COMMENTS, LABELS), []
    done = threading.Event()

    def predict():
        while not done.is_set():
            if not np.array_equal(fitted.predict_proba(COMMENTS), expected):
                errors.append("changed")

    thread = threading.Thread(target=predict)
    thread.start()
    again = [make(seed=3).fit(COMMENTS, LABELS) for _ in range(3)]
    done.set()
    thread.join(120)
    assert not errors and all(same(clf, alone) for clf in again)


def test_global_random_state_is_left_alone(make):
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), pickle.dumps(np.random.get_state())
    clf = make(target_layers=("key",), lora_rank=1, lora_dropout=0.1).fit(COMMENTS, LABELS)  # a new program too
    clf.predict_proba(COMMENTS), clf.generate(COMMENTS[0], 4), clf.token_influence(COMMENTS[0])
    make().generate(COMMENTS[0], 4)
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before
    random.seed(2)
    np.random.seed(2)
    keras.utils.set_random_seed(7)
    assert same(clone(clf).fit(COMMENTS, LABELS), clf)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, RunError])
def test_a_failed_fit_leaves_the_earlier_one(error, make):
    clf = make().fit(COMMENTS, LABELS)
    before, attributes = clf.predict_proba(COMMENTS), dict(vars(clf))

    def fail(epoch, logs):
        raise error("stop")

    clf.callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=fail)]
    with pytest.raises(error):
        clf.fit(COMMENTS[:8], ["a", "b"] * 4)
    clf.callbacks = None
    assert np.array_equal(clf.predict_proba(COMMENTS), before)
    assert all(vars(clf)[name] is value for name, value in attributes.items())
    with pytest.raises(RunError, match="not finite"):
        clf.set_params(learning_rate=1e30).fit(COMMENTS, LABELS)
    assert np.array_equal(clf.predict_proba(COMMENTS), before)


def test_parameters_changed_after_fit_do_not_change_predictions(fitted):
    clf = pickle.loads(pickle.dumps(fitted))
    clf.set_params(lora_rank=2, lora_alpha=99, learning_rate=9.0, max_length=500, seed=3, epochs=1, recipe="tutorial")
    assert np.array_equal(clf.predict_proba(COMMENTS), fitted.predict_proba(COMMENTS))


# --- to a folder and back


@pytest.mark.parametrize("parameters, y", [
    (dict(), [1, 0]), (dict(), ["01", "1"]), (dict(), [True, False]),
    (dict(label_words={1: "최고", 0: "별로"}), [1, 0]),
    (dict(label_words={True: "good", False: "bad"}), [True, False]), (dict(class_weight={0: 1.0, 1: 3.0}), [1, 0]),
    (dict(class_weight={"a": 1, "b": 3}), ["a", "b"]), (dict(class_weight="balanced"), [1, 0]),
    (dict(target_layers=("key", "ffw_linear")), [1, 0]), (dict(target_layers=["query"]), [1, 0]),
    (dict(lora_alpha=np.int64(9), lora_dropout=0.1, seed=np.int64(3), learning_rate=np.float32(0.01)), [1, 0]),
    (dict(lora_rank=np.int64(4), epochs=np.int32(2), batch_size=np.int64(4), max_length=np.int64(16)), [1, 0]),
    (dict(template="<start_of_turn>{instruction}<end_of_turn>{response}<end_of_turn>"), [1, 0]),
    (dict(validation_fraction=0.34, patience=1), [1, 0]), (dict(epochs=0), ["a", "b"]),
    pytest.param(dict(callbacks=[keras.callbacks.TerminateOnNaN()]), [1, 0], id="callbacks"),
], ids=str)  # fmt: skip
def test_save_and_load(parameters, y, make, tmp_path):
    clf = make(**parameters).fit(COMMENTS, y * 6)
    folder = clf.save(tmp_path / "a" / "run")
    assert sorted(p.name for p in folder.iterdir()) == [
        "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "classifier.json"
    ]  # fmt: skip
    loaded = GemmaLoraClassifier.load(folder)
    assert same(loaded, clf) and loaded.words_ == clf.words_ and loaded.buckets_ == clf.buckets_
    assert loaded.classes_.tolist() == clf.classes_.tolist() and loaded.classes_.dtype == clf.classes_.dtype
    assert loaded.recipe_ == clf.recipe_ and loaded.recipe_name_ == clf.recipe_name_
    assert loaded.best_epoch_ == clf.best_epoch_ and loaded.adapter_.alpha == clf.adapter_.alpha
    expected = {**clf.get_params(), "callbacks": None}
    found = loaded.get_params()
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()} == {
        name: list(v) if isinstance(v, tuple) else v for name, v in expected.items()
    }
    if not parameters.get("callbacks"):
        assert same(loaded.fit(COMMENTS, y * 6), clf)  # and it can be trained again, to the same bits
    again = GemmaLoraClassifier.load(loaded.save(tmp_path / "again"))
    assert same(again, clf)


def test_a_preset_given_as_a_path(make, tiny, tmp_path):
    clf = make(preset=Path(tiny)).fit(COMMENTS, LABELS)
    loaded = GemmaLoraClassifier.load(clf.save(tmp_path))
    assert same(loaded, clf) and loaded.preset == tiny and same(make().fit(COMMENTS, LABELS), clf)


def test_a_base_that_has_moved_can_be_named(make, tmp_path):
    clf = make(preset=tiny_gemma(tmp_path / "here", seed=4)).fit(COMMENTS, LABELS)
    expected, folder = clf.predict_proba(COMMENTS), clf.save(tmp_path / "run")
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(ModelError, match="is unknown"):
        GemmaLoraClassifier.load(folder)
    loaded = GemmaLoraClassifier.load(folder, preset=str(tmp_path / "there"))
    assert np.array_equal(loaded.predict_proba(COMMENTS), expected)


def test_another_base_in_the_same_folder_is_refused(make, tmp_path):
    clf = make(preset=tiny_gemma(tmp_path / "base", seed=5)).fit(COMMENTS, LABELS)
    folder = clf.save(tmp_path / "run")
    tiny_gemma(tmp_path / "base", seed=6)
    for use in (lambda: GemmaLoraClassifier.load(folder), lambda: clf.predict(COMMENTS)):
        with pytest.raises(RunError, match="is not the one this classifier was fitted on") as error:
            use()
        assert one_line(error)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    return fitted.save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("place", range(25))
def test_a_cut_classifier_json_is_refused_in_one_line(place, folder):
    path = folder / "classifier.json"
    data = path.read_bytes().rstrip()
    path.write_bytes(data[: len(data) * place // 25])
    with pytest.raises(RunError) as error:
        GemmaLoraClassifier.load(folder)
    assert one_line(error)


@pytest.mark.parametrize("name", ["classifier.json", "adapter_config.json", "adapter_model.safetensors", "SHA256SUMS"])
def test_missing_files_are_refused_in_one_line(name, folder):
    (folder / name).unlink()
    with pytest.raises(RunError, match=name) as error:
        GemmaLoraClassifier.load(folder)
    assert one_line(error)
    with pytest.raises(RunError):
        GemmaLoraClassifier.load(folder / "absent")


@pytest.mark.parametrize("change", [
    lambda saved: saved.pop("parameters"), lambda saved: saved.pop("classes"), lambda saved: saved.pop("words"),
    lambda saved: saved.pop("recipe"), lambda saved: saved.pop("base_fingerprint"), lambda saved: saved.pop("buckets"),
    lambda saved: saved.update(parameters=[1]), lambda saved: saved["parameters"].update(unknown=1),
    lambda saved: saved.update(classes="01"), lambda saved: saved["classes"].update(values=[0]),
    lambda saved: saved["classes"].update(dtype="int8", values=[0, 999]),
    lambda saved: saved["classes"].update(dtype="int99"), lambda saved: saved["classes"].update(dtype=5),
    lambda saved: saved["classes"].update(values=[0, 1, 2]), lambda saved: saved.update(words=["0"]),
    lambda saved: saved.update(words=None), lambda saved: saved.update(words=["x", "x"]),
    lambda saved: saved.update(words=[1, 2]), lambda saved: saved["classes"].update(values=None),
    lambda saved: saved["recipe"].update(max_length="long"), lambda saved: saved["recipe"].update(unknown=1),
    lambda saved: saved["parameters"].update(template="no fields"), lambda saved: saved.update(dtype="fp99"),
    lambda saved: saved.update(base_fingerprint="0" * 64), lambda saved: saved.update(buckets=5),
    lambda saved: saved.update(format=99), lambda saved: saved.clear(),
])  # fmt: skip
def test_a_classifier_json_of_other_content_is_refused_in_one_line(change, folder):
    path = folder / "classifier.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises((RunError, ModelError, DataError)) as error:
        GemmaLoraClassifier.load(folder, verify=False)
    assert one_line(error)
    with pytest.raises(RunError) as error:
        GemmaLoraClassifier.load(folder)
    assert one_line(error)


def test_what_was_edited_on_purpose_loads_unverified(folder, fitted):
    path = folder / "classifier.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["parameters"]["verbose"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="classifier.json is not as it was saved.*verify=False") as error:
        GemmaLoraClassifier.load(folder)
    assert one_line(error)
    loaded = GemmaLoraClassifier.load(folder, verify=False)
    assert loaded.verbose == 1 and same(loaded, fitted)
    loaded.save(folder)
    assert same(GemmaLoraClassifier.load(folder), fitted)


def test_an_adapter_of_another_run_is_refused(make, folder, tmp_path):
    make(lora_rank=2, epochs=0).fit(COMMENTS, LABELS).save(tmp_path / "other")
    path = "adapter_model.safetensors"
    (folder / path).write_bytes((tmp_path / "other" / path).read_bytes())
    with pytest.raises(RunError) as error:
        GemmaLoraClassifier.load(folder)
    assert one_line(error)


def test_saving_to_a_place_that_cannot_be_written_is_an_os_error(fitted, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        fitted.save(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["run", "runs/monday/run"])
def test_saving_on_a_full_disk_leaves_no_folder(name, fitted, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(os, "fsync", full)
        fitted.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).mkdir(parents=True)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(os, "fsync", full)
        fitted.save(tmp_path / name)
    assert list((tmp_path / name).iterdir()) == []  # a folder that was there stays
    assert same(GemmaLoraClassifier.load(fitted.save(tmp_path / name)), fitted)


def test_the_bundled_base_fits_predicts_and_comes_back(tmp_path):
    clf = GemmaLoraClassifier(epochs=1, batch_size=12, max_length=16).fit(COMMENTS, LABELS)
    loaded = GemmaLoraClassifier.load(clf.save(tmp_path))
    assert clf.recipe_name_ == "mini_ko" and same(loaded, clf)


def test_folder_of_a_base_is_saved_absolute_and_may_move(make, tiny, tmp_path, monkeypatch):
    (tmp_path / "bases").mkdir()
    shutil.copytree(tiny, tmp_path / "bases" / "tiny")
    monkeypatch.chdir(tmp_path)
    clf = make(preset="bases/tiny").fit(COMMENTS, LABELS)
    expected = clf.predict_proba(COMMENTS)
    clf.save("run")
    saved = json.loads(Path("run/classifier.json").read_text(encoding="utf-8"))
    assert saved["parameters"]["preset"] == str(tmp_path / "bases" / "tiny") and clf.preset == "bases/tiny"
    monkeypatch.chdir("/")
    assert np.array_equal(GemmaLoraClassifier.load(tmp_path / "run").predict_proba(COMMENTS), expected)
    (tmp_path / "bases" / "tiny").rename(tmp_path / "elsewhere")
    release_bases()
    with pytest.raises(ModelError, match="If its base has moved, say where it is with preset=") as error:
        GemmaLoraClassifier.load(tmp_path / "run")
    assert one_line(error) and "bases/tiny" in str(error.value)
    loaded = GemmaLoraClassifier.load(tmp_path / "run", preset=str(tmp_path / "elsewhere"))
    assert np.array_equal(loaded.predict_proba(COMMENTS), expected)


FORK = """
import os, sys
from gemma_lora_sentiment import GemmaLoraClassifier

def in_child(call):
    read, write = os.pipe()
    if not os.fork():
        try:
            said = str(call())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    return os.fdopen(read).read()

def score():
    return GemmaLoraClassifier.load(sys.argv[1]).predict_proba(["맛있어요"]).shape

print(in_child(score))
clf = GemmaLoraClassifier.load(sys.argv[1])
print(in_child(lambda: clf.predict(["맛있어요"])))
print(in_child(score))
print(in_child(lambda: clf.fit(["a", "b"], [0, 1])))
print(clf.predict_proba(["맛있어요"]).shape)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_told_so_and_does_not_wait(fitted, tmp_path):
    fitted.save(tmp_path / "run")
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    first, *told, last = done.stdout.splitlines()
    assert first == last == "(1, 2)", done.stderr
    assert len(told) == 3 and all(line.startswith("RunError: This process was forked after JAX") for line in told)


def test_either_form_of_a_comment_has_the_same_probabilities(make):
    texts = ["국물이 진하고 좋았어요", "별로예요", "café", "Ａ급 ㅋㅋ"]
    pieces = [unicodedata.normalize("NFD", text) for text in texts]
    assert pieces != texts
    clf = make().fit([*COMMENTS, *texts], [*LABELS, 0, 1, 0, 1])
    twin = make().fit([*COMMENTS, *pieces], [*LABELS, 0, 1, 0, 1])
    expected = clf.predict_proba(texts)
    for rows, fitted in ((pieces, clf), (texts, twin), (pieces, twin)):
        assert np.array_equal(fitted.predict_proba(rows), expected)
    mixed = clf.predict_proba([*texts, *pieces])
    assert np.array_equal(mixed[:4], mixed[4:])
    assert clf.token_influence(pieces[0]).equals(clf.token_influence(texts[0]))


def test_label_words_in_either_form_are_the_same_words(make):
    words = {0: "별로예요", 1: "좋아요"}
    pieces = {label: unicodedata.normalize("NFD", word) for label, word in words.items()}
    first, second = (make(label_words=each).fit(COMMENTS, LABELS) for each in (words, pieces))
    assert first.words_.word_ids == second.words_.word_ids and same(first, second)


@pytest.mark.parametrize("labels, said", [
    ([0, "1"], "Label 1 is '1', a text, and label 0 is a number"),
    ([True, 1], "Label 1 is 1, a number, and label 0 is a truth value"),
    (np.array([0, True], dtype=object), "Label 1 is True, a truth value"),
    (pd.Series(["0", 1]), "Label 1 is 1, a number"),
    (pd.Series([1, None], dtype="Int64"), "Label 1 is missing"),
], ids=str)  # fmt: skip
def test_labels_of_mixed_types_are_refused_before_anything_is_loaded(labels, said, make):
    clf = make(preset="no such base")
    with pytest.raises(DataError, match=said) as error:
        clf.fit(["a", "b"], labels)
    assert one_line(error)


@pytest.mark.parametrize(
    "labels", [["나쁨", "좋음"], [0.0, 1.0], ["0.0", "1.0"], [unicodedata.normalize("NFD", "나쁨"), "좋음"]], ids=repr
)
def test_labels_of_spreadsheets_come_out_as_they_went_in(labels, make):
    clf = make().fit(COMMENTS, [labels[i % 2] for i in range(len(COMMENTS))])
    assert clf.classes_.tolist() == sorted(labels) and set(clf.predict(COMMENTS)) <= set(labels)
    assert clf.words_.words in (("0", "1"), ("나쁨", "좋음"))


def test_warm_start_goes_on_from_the_fitted_adapter(make, tmp_path):
    whole = make(epochs=3, seed=3).fit(COMMENTS, LABELS)
    clf = make(epochs=3, seed=3, warm_start=True).fit(COMMENTS, LABELS)
    assert same(clf, whole)
    before = {path: array.copy() for path, array in clf.adapter_.arrays.items()}
    clf.save(tmp_path / "run")
    loaded = GemmaLoraClassifier.load(tmp_path / "run")
    assert loaded.warm_start and not clone(loaded).__dict__.get("adapter_")
    for each in (clf, loaded):
        each.set_params(epochs=0).fit(COMMENTS, LABELS)
        assert all(np.array_equal(each.adapter_.arrays[path], array) for path, array in before.items())
    onward = loaded.set_params(epochs=1).fit(COMMENTS, LABELS)
    assert onward.history_.loss[0] < whole.history_.loss[0]
    assert any(not np.array_equal(onward.adapter_.arrays[path], array) for path, array in before.items())
    anew = GemmaLoraClassifier.load(tmp_path / "run").set_params(warm_start=False).fit(COMMENTS, LABELS)
    assert same(anew, whole)
    alpha = whole.adapter_.alpha
    assert same(GemmaLoraClassifier.load(tmp_path / "run").set_params(epochs=1, lora_alpha=alpha).fit(COMMENTS, LABELS),
                GemmaLoraClassifier.load(tmp_path / "run").set_params(epochs=1).fit(COMMENTS, LABELS))  # fmt: skip
    for change, rows, said in (
        ({"lora_alpha": 64}, LABELS, f'lora_alpha=64 is not the adapter\'s {alpha:.4g}. Go on with lora_alpha="auto"'),
        ({"lora_rank": 3}, LABELS, "lora_rank or target_layers"), ({}, [str(x) for x in LABELS], "the labels were"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=said) as error:
            GemmaLoraClassifier.load(tmp_path / "run").set_params(**change).fit(COMMENTS, rows)
        assert one_line(error)


# --- several fits at once ---------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What a GPU would gain, and the chunks that were trained side by side; room for four fits."""
    chunks = []

    def noted(base, starts, *rest):
        chunks.append(len(starts))
        return trained(base, starts, *rest)

    trained = room.train_side_by_side
    monkeypatch.setattr(room, "gains_side_by_side", lambda: True)
    monkeypatch.setattr(room, "fits_together", lambda *shape: 4)
    monkeypatch.setattr(room, "train_side_by_side", noted)
    return chunks


PARTS = [(COMMENTS[i:] + COMMENTS[:i], LABELS[i:] + LABELS[:i]) for i in (0, 2, 4)] + [
    (COMMENTS[:-i], LABELS[:-i]) for i in (2, 4)
]  # one fit of ten of these is of rows with a line each, and so is made by itself


def test_fits_side_by_side_are_fits_one_by_one(make, as_on_a_gpu):
    clf = make(lora_dropout=0.1, seed=3)
    together = list(clf.fit_many(PARTS))
    assert as_on_a_gpu == [4] and not hasattr(clf, "classes_")
    for fitted, (comments, labels) in zip(together, PARTS, strict=True):
        alone = make(lora_dropout=0.1, seed=3).fit(comments, labels)
        assert np.abs(fitted.predict_proba(COMMENTS) - alone.predict_proba(COMMENTS)).max() < 1e-3
        assert fitted.get_params() == alone.get_params() and fitted.recipe_ == alone.recipe_
        assert fitted.history_.epoch.tolist() == alone.history_.epoch.tolist()
        np.testing.assert_allclose(fitted.history_.loss, alone.history_.loss, atol=1e-3)
        assert fitted.best_epoch_ == alone.best_epoch_
        assert np.abs(fitted.predict_proba(COMMENTS) - make().fit(COMMENTS, LABELS).predict_proba(COMMENTS)).max() > 0


def test_fits_that_have_no_room_side_by_side_are_made_one_by_one(make, as_on_a_gpu, monkeypatch):
    from gemma_lora_sentiment import side_by_side as room

    def full(*given):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")

    def broken(*given):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(room, "_run", full)
    with pytest.warns(UserWarning, match="2 fits side by side; training one by one"):
        fitted = list(make().fit_many(PARTS[:2]))
    assert (fitted[0].predict_proba(COMMENTS) == make().fit(*PARTS[0]).predict_proba(COMMENTS)).all()
    monkeypatch.setattr(room, "_run", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        list(make().fit_many(PARTS[:2]))


def test_epochs_of_fits_side_by_side_are_told(make, as_on_a_gpu, capsys):
    list(make(verbose=1, epochs=3).fit_many(PARTS[:2]))
    told = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert told == ["epoch 1", "epoch 2", "epoch 3"] * 2


@pytest.mark.parametrize(
    "apart",
    [{"validation_fraction": 0.5}, {"callbacks": []}, {"loss_on": "text"}, {"epochs": 0}, {"devices": 1}],
    ids=str,
)
def test_fits_that_cannot_share_a_program_are_made_one_by_one(make, as_on_a_gpu, apart):
    clf = make(**apart)
    together = list(clf.fit_many(PARTS[:2]))
    assert as_on_a_gpu == ([2] if apart == {"callbacks": []} else [])
    for fitted, part in zip(together, PARTS[:2], strict=True):
        alone = make(**apart).fit(*part)
        assert np.abs(fitted.predict_proba(COMMENTS) - alone.predict_proba(COMMENTS)).max() < 1e-3


def test_fits_of_other_shapes_have_programs_of_their_own(make, as_on_a_gpu):
    of_words = [(COMMENTS, ["bad", "good"] * 6)] * 2
    together = list(make(max_length=32).fit_many([*PARTS[:2], *of_words]))
    assert as_on_a_gpu == [2, 2] and [fitted.classes_.tolist() for fitted in together[1:3]] == [[0, 1], ["bad", "good"]]


def test_settings_side_by_side(make, as_on_a_gpu):
    settings = [{"seed": 1}, {"learning_rate": 0.05, "epochs": 3}, {"lora_alpha": 2.0}, {"lora_rank": 2}]
    together = list(make().fit_many([PARTS[0]] * 4, settings))
    assert as_on_a_gpu == [3]  # another rank is another program
    for fitted, parameters in zip(together, settings, strict=True):
        alone = make(**parameters).fit(*PARTS[0])
        assert fitted.get_params() == alone.get_params() and len(fitted.history_) == alone.recipe_.epochs
        assert np.abs(fitted.predict_proba(COMMENTS) - alone.predict_proba(COMMENTS)).max() < 1e-3


def test_a_cross_validation_trains_its_folds_side_by_side(make, as_on_a_gpu, monkeypatch):
    from gemma_lora_sentiment.evaluation import cross_validate

    together = cross_validate({"ours": make()}, COMMENTS, LABELS, folds=3)
    assert as_on_a_gpu == [3]
    monkeypatch.setattr(room, "gains_side_by_side", lambda: False)
    alone = cross_validate({"ours": make()}, COMMENTS, LABELS, folds=3)
    assert as_on_a_gpu == [3] and together.fold.tolist() == alone.fold.tolist()
    assert np.abs(together.ours_p_1 - alone.ours_p_1).max() < 1e-3


def test_a_loss_that_is_not_finite_ends_fits_side_by_side(make, as_on_a_gpu):
    with pytest.raises(RunError, match="not finite .* Lower learning_rate"):
        list(make(learning_rate=1e30).fit_many(PARTS))
    assert as_on_a_gpu == [4]
