"""What a fit decides by looking at its rows: the words that speak for the labels."""

import json
from dataclasses import replace

import numpy as np
import pytest

from gemma_lora_sentiment import GemmaLoraClassifier, judge, read_comments, search
from gemma_lora_sentiment.model import load_base
from gemma_lora_sentiment.prompt import LabelWords, PromptTemplate, TextTokenizer, encode_prompts, label_words
from gemma_lora_sentiment.search import (
    choices_text,
    choose_loss,
    choose_steps,
    choose_strength,
    choose_words,
    rows_to_ask,
)
from gemma_lora_sentiment.training import RECIPES

ROWS = read_comments("sample_validation").groupby("label").head(32)
OTHERS = read_comments("sample_validation").groupby("label").tail(40)
NAMES = {"0": "안 옴", "1": "다시 옴"}


@pytest.fixture(scope="module")
def base():
    return load_base("mini_ko")


@pytest.fixture(scope="module")
def tokenizer(base):
    return TextTokenizer(base.tokenizer_proto)


@pytest.fixture(scope="module")
def fitted():
    return GemmaLoraClassifier(epochs=1, max_length=96).fit(ROWS.comment, ROWS.label.map(NAMES))


def asked(base, tokenizer, names, rows=ROWS, seed=0):
    labels = sorted(set(names.values()))
    index = np.array([labels.index(names[label]) for label in rows.label])
    prompts = encode_prompts(rows.comment.tolist(), tokenizer, PromptTemplate(), 96, 8).token_ids
    return choose_words(base, prompts, index, label_words(labels, tokenizer, PromptTemplate()), tokenizer, seed)


@pytest.mark.parametrize("names", [{"0": "1", "1": "0"}, NAMES, {"0": "no", "1": "yes"}], ids=str)
def test_words_come_in_the_order_that_the_rows_ask_for(base, tokenizer, names):
    words, evidence = asked(base, tokenizer, names)
    spoken = dict(zip(words.labels, words.words, strict=True))
    assert (spoken[names["0"]], spoken[names["1"]]) == ("0", "1") and words.labels == tuple(sorted(names.values()))
    assert words.single_token and evidence["loss"] < evidence["own_loss"] and evidence["words"] == list(words.words)
    assert json.loads(json.dumps(evidence)) == evidence
    assert asked(base, tokenizer, names) == (words, evidence)
    line = choices_text(evidence, words)
    assert "\n" not in line and f"'1' for {names['1']!r}" in line and f"{evidence['own_loss']:.3f}" in line


def test_words_that_mean_nothing_are_not_taken_for_labels_that_nothing_can_know(base, tokenizer):
    own = label_words(["a", "b"], tokenizer, PromptTemplate())
    prompts = encode_prompts(ROWS.comment.tolist(), tokenizer, PromptTemplate(), 96, 8).token_ids
    for seed in range(5):
        coins = np.random.default_rng(seed).permutation(np.arange(len(ROWS)) % 2)
        assert choose_words(base, prompts, coins, own, tokenizer, seed)[0] == own


def test_few_rows_of_a_label_choose_nothing(base, tokenizer):
    few = ROWS.groupby("label").head(11)
    words, evidence = asked(base, tokenizer, NAMES, few)
    assert words.words == ("다시 옴", "안 옴") and evidence == {"rows": 22, "loss": None, "words": None}


def test_a_base_that_does_not_say_the_words_takes_more_and_smaller_steps(base, tokenizer):
    coins = np.arange(len(ROWS)) % 2
    own = label_words(["왼쪽 문", "오른쪽 문"], tokenizer, PromptTemplate())
    prompts = encode_prompts(ROWS.comment.tolist(), tokenizer, PromptTemplate(), 96, 8).token_ids
    words, evidence = choose_words(base, prompts, coins, own, tokenizer)
    assert words == own and evidence["said"] < 0.1
    recipe = choose_steps("mini_ko", RECIPES["mini_ko"], evidence, 2, 64)
    assert (recipe.batch_size, recipe.epochs) == (4, 12)
    clf = GemmaLoraClassifier(epochs=1, max_length=64).fit(ROWS.comment, np.array(own.labels)[coins])
    assert (clf.recipe_.batch_size, clf.recipe_.epochs) == (4, 1)  # what is given stays
    for names in ({"0": "0", "1": "1"}, NAMES):
        assert asked(base, tokenizer, names)[1]["said"] > 0.3


def test_a_warm_start_goes_on_with_the_words_that_were_found():
    rows = ROWS.groupby("label").head(12)
    clf = GemmaLoraClassifier(epochs=1, max_length=64, warm_start=True)
    exchanged = rows.label.map({"0": "1", "1": "0"})
    words = clf.fit(rows.comment, exchanged).words_.words
    assert words != ("0", "1"), "words were found"
    smoothing = clf.recipe_.label_smoothing
    assert clf.fit(rows.comment, exchanged).words_.words == words
    assert clf.recipe_.label_smoothing == smoothing == 0.1
    assert clf.set_params(warm_start=False, recipe="mini_ko").fit(rows.comment, exchanged).words_.words == ("0", "1")


@pytest.mark.parametrize(
    "rows, batch_size, epochs",
    [(16, 4, 24), (64, 4, 18), (100, 4, 12), (128, 4, 9), (270, 16, 8), (300, 16, 8), (5000, 16, 4)],
)
def test_gemma_gets_the_steps_that_it_was_measured_with(rows, batch_size, epochs):
    evidence = {"loss": 0.69, "words": None, "said": 0.01}
    wanted = replace(RECIPES["gemma"], batch_size=batch_size, epochs=epochs)
    assert choose_steps("gemma", RECIPES["gemma"], evidence, 2, rows) == wanted
    assert choose_steps("tutorial", RECIPES["tutorial"], evidence, 2, rows) == RECIPES["tutorial"]


@pytest.mark.parametrize("evidence, more", [
    ({"loss": 0.13, "words": None}, False), ({"loss": 0.5, "words": None, "said": 0.8}, False),
    ({"loss": 0.13, "words": ["1", "0"], "said": 0.8}, False), ({"loss": 0.5, "words": ["1", "0"], "said": 0.8}, True),
    ({"loss": 0.5, "words": None, "said": 0.1}, True), ({"loss": None, "words": None}, False),
], ids=str)  # fmt: skip
def test_more_steps_where_there_is_more_to_learn(evidence, more):
    assert (choose_steps("mini_ko", RECIPES["mini_ko"], evidence, 2, 100).batch_size == 4) == more


def test_a_base_that_knows_the_task_is_followed_half_the_way(monkeypatch):
    """The adapter is the one of full strength, with half its alpha; whoever gives alpha has decided."""
    rows = read_comments("sample_test").groupby("label").head(16)
    known = {"rows": 32, "loss": 0.1, "worst": 0.2, "words": None}
    monkeypatch.setattr("gemma_lora_sentiment.classifier.choose_words", lambda *given: (given[3], dict(known)))
    fits = [GemmaLoraClassifier(epochs=1, max_length=64, **given).fit(rows.comment, rows.label)
            for given in ({}, {"lora_alpha": 8.0})]  # fmt: skip
    assert [clf.adapter_.alpha for clf in fits] == [4.0, 8.0]
    assert fits[0].choices_ == {**known, "strength": 0.5} and fits[1].choices_ == known
    assert all(np.array_equal(array, fits[1].adapter_.arrays[path]) for path, array in fits[0].adapter_.arrays.items())
    losses = (None, 0.1, 0.4, 2.0)
    words, several = (LabelWords(("0", "1"), ("0", "1"), ids, (1,)) for ids in (((20,), (21,)), ((20, 22), (21, 22))))
    assert choose_loss("mini_ko", RECIPES["mini_ko"], known, words) == RECIPES["mini_ko"]
    for evidence in ({**known, "worst": 0.6}, {**known, "words": ["1", "0"]}):
        assert choose_loss("mini_ko", RECIPES["mini_ko"], evidence, words).label_smoothing == 0.1
        assert choose_loss("gemma", RECIPES["gemma"], evidence, words) == RECIPES["gemma"]
        assert choose_loss("mini_ko", RECIPES["mini_ko"], evidence, several) == RECIPES["mini_ko"]
    assert choose_loss("mini_ko", RECIPES["mini_ko"], {"loss": None, "words": None}, words) == RECIPES["mini_ko"]
    assert [choose_strength({**known, "loss": loss, "worst": loss}, 2, 32) for loss in losses] == [1.0, 0.5, 0.5, 1.0]
    assert choose_strength({**known, "worst": 0.6}, 2, 32) == 1.0  # one of the labels is not known
    assert choose_strength({**known, "words": ["1", "0"]}, 2, 32) == 1.0
    assert [choose_strength(known, 2, n) for n in (300, 900)] == [0.5, 0.75]


def test_rows_are_asked_of_each_label():
    index = np.array([0] * 500 + [1] * 90 + [2] * 3)
    rows = rows_to_ask(index, 1)
    assert np.bincount(index[rows]).tolist() == [42, 42, 3] and (np.diff(rows) > 0).all()
    assert not np.array_equal(rows, rows_to_ask(index, 2))
    for labels, each in ((2, 64), (10, 12), (11, 12), (20, 12), (60, 8)):  # twelve, up to 42 labels
        many = np.arange(1200) % labels
        assert set(np.bincount(many[rows_to_ask(many)])) == {each}


def test_many_labels_are_asked_for_as_well(base, tokenizer):
    """Eleven labels leave each less than twelve of 128 rows; they would be fitted as if nothing were to be learned."""
    own = label_words(list("abcdefghijk"), tokenizer, PromptTemplate())
    index = np.arange(132) % 11
    prompts = encode_prompts([f"{n}번" for n in index], tokenizer, PromptTemplate(), 96, 8).token_ids
    words, evidence = choose_words(base, prompts, index, own, tokenizer, keep=True)
    assert words == own and evidence["rows"] == 132 and evidence["loss"] > 1
    assert choose_steps("mini_ko", RECIPES["mini_ko"], evidence, 11, 132).batch_size == 4
    assert choose_loss("mini_ko", RECIPES["mini_ko"], evidence, own).label_smoothing == 0.1


def test_a_cross_validation_is_of_the_same_job_whatever_the_rows_decide():
    """What `decide --by` leaves out of the comparison is what `recipe="auto"` may change of a recipe, and no more."""
    words = LabelWords(("0", "1"), ("0", "1"), ((20,), (21,)), (1,))
    unknown, changed = {"loss": 0.66, "worst": 0.68, "words": None, "said": 0.0}, set()
    for name in ("mini_ko", "gemma"):
        for n_rows in (20, 100, 1000):
            recipe = choose_loss(name, choose_steps(name, RECIPES[name], unknown, 2, n_rows), unknown, words)
            changed |= {field for field, value in vars(RECIPES[name]).items() if getattr(recipe, field) != value}
    assert changed == set(judge._BY_ROWS)


def test_labels_stay_the_users_own(fitted, tmp_path):
    assert fitted.classes_.tolist() == ["다시 옴", "안 옴"] and fitted.words_.words == ("1", "0")
    assert (fitted.recipe_.label_smoothing, fitted.recipe_.among_labels) == (0.1, 0.9)
    truth = OTHERS.label.map(NAMES)
    assert (fitted.predict(OTHERS.comment) == truth).mean() > 0.7
    assert fitted.get_params()["label_words"] is None
    fitted.save(tmp_path / "run")
    loaded = GemmaLoraClassifier.load(tmp_path / "run")
    assert loaded.words_ == fitted.words_ and loaded.choices_ == fitted.choices_
    assert np.array_equal(loaded.predict_proba(OTHERS.comment[:9]), fitted.predict_proba(OTHERS.comment[:9]))
    path = tmp_path / "run" / "classifier.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["choices"]["words"] == ["1", "0"]
    del saved["choices"]  # as earlier versions wrote it
    path.write_text(json.dumps(saved), encoding="utf-8")
    assert GemmaLoraClassifier.load(tmp_path / "run", verify=False).choices_ == {}


def test_a_fit_that_goes_on_decides_the_same(fitted, tmp_path):
    labels = ROWS.label.map(NAMES)
    clf = GemmaLoraClassifier(epochs=1, max_length=96, checkpoint_dir=tmp_path)
    clf.fit(ROWS.comment, labels)
    folders = sorted(path.name for path in tmp_path.iterdir())
    again = GemmaLoraClassifier(epochs=1, max_length=96, checkpoint_dir=tmp_path).fit(ROWS.comment, labels)
    assert folders == sorted(path.name for path in tmp_path.iterdir()) and again.choices_ == fitted.choices_
    for path, array in fitted.adapter_.arrays.items():
        assert np.array_equal(array, clf.adapter_.arrays[path]) and np.array_equal(array, again.adapter_.arrays[path])


@pytest.mark.parametrize("given", [dict(recipe="mini_ko"), dict(epochs=0), dict(recipe="tutorial")], ids=str)
def test_what_is_given_is_not_decided(given, monkeypatch):
    def never(*_):
        raise AssertionError("nothing was to be chosen")

    monkeypatch.setattr("gemma_lora_sentiment.classifier.choose_words", never)
    clf = GemmaLoraClassifier(**{"epochs": 1, "max_length": 64, **given})
    assert clf.fit(ROWS.comment[:8], ["다시 옴", "안 옴"] * 4).choices_ == {}


def test_words_that_are_given_are_kept():  # in either form: test_classifier
    given = {"다시 옴": "good", "안 옴": "bad"}
    clf = GemmaLoraClassifier(epochs=1, max_length=64, label_words=given).fit(ROWS.comment, ROWS.label.map(NAMES))
    assert clf.words_.words == ("good", "bad") and clf.choices_["words"] is None and clf.choices_["loss"] > 0


def test_a_refit_takes_the_words_and_steps_that_were_judged(tmp_path):
    from typer.testing import CliRunner

    from gemma_lora_sentiment.cli import app

    rows = ROWS.assign(label=np.array(["왼쪽 문", "오른쪽 문"])[np.arange(len(ROWS)) % 2])
    rows[["id", "comment", "label"]].to_csv(tmp_path / "rows.tsv", sep="\t", index=False, quoting=3)
    arguments = ["train", str(tmp_path / "rows.tsv"), "--out", str(tmp_path / "run"), "--epochs", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    saved = json.loads((tmp_path / "run" / "classifier.json").read_text(encoding="utf-8"))
    assert run["recipe"]["batch_size"] == saved["recipe"]["batch_size"] == 4
    judged = GemmaLoraClassifier(epochs=1, max_length=64).fit(ROWS.comment, ROWS.label.map(NAMES))
    everything = judged.refitted(ROWS.comment, ROWS.label.map(NAMES))  # by words found it knows the task
    assert judged.choices_["words"] and everything.words_ == judged.words_
    assert everything.recipe_.label_smoothing == judged.recipe_.label_smoothing == 0.1
    assert everything.choices_ == judged.choices_ and everything.adapter_.alpha == judged.adapter_.alpha
    assert run["choices"]["said"] == saved["choices"]["said"] < 0.2 and saved["words"] == ["오른쪽 문", "왼쪽 문"]
    assert "training rows asked" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_vocabulary_with_hardly_a_word_keeps_the_labels_own(monkeypatch):
    likes = np.log(np.random.default_rng(0).dirichlet(np.ones(40), 60)).astype(np.float32)
    index = np.arange(60) % 3
    monkeypatch.setattr(search, "_candidates", lambda *given: [(7, "seven"), (8, "eight")])
    own = LabelWords(("a", "b", "c"), ("a", "b", "c"), ((1,), (2,), (3,)), (0,))
    evidence = {"loss": 1.2, "words": None}
    assert search._words_found(likes, index, own, None, np.full(60, 1.2), evidence) == (own, evidence)
