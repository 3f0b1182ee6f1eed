"""What would bore a reader of the labelling notebook: which comments and labels a person is shown, and bad input."""

import os

import numpy as np
import pytest

from gemma_lora_sentiment.data import duplicate_groups, read_comments
from gemma_lora_sentiment.evaluation import baseline_classifier, cross_validate, probabilities_from_oof
from gemma_lora_sentiment.labelling import conflicting_duplicates, likely_label_errors, worth_labelling

# One compilation of a program is enough for all tests; compiling is most of what they cost.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["GEMMA_LORA_SENTIMENT_CACHE"] + "/jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


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


def test_twins_of_another_emphasis_are_chosen_once():
    comments = [text for n in range(12) for text in (f"{n}번 손님 맛있어요", f"{n}번 손님, 맛있어요!!")]
    probabilities = np.full((24, 2), 0.5)
    picked = worth_labelling(comments, probabilities, [0, 1], number=12)
    assert len(set(duplicate_groups(picked.comment))) == len(picked) == 12
