"""What the default settings of `mini_ko` come to: `python -m benchmarks.auto.defaults TARR OUT.jsonl`.

TARR is the competition's tarr_train.txt. Each line of OUT is one measurement of one seed.
"""

import argparse
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from gemma_lora_sentiment import GemmaLoraClassifier, read_comments
from gemma_lora_sentiment.data import duplicate_groups
from gemma_lora_sentiment.evaluation import compute_metrics, cross_validate, metrics_from_oof

NEW_LABELS = {"다시 옴, 안 옴": {"0": "안 옴", "1": "다시 옴"}, "불만, 만족": {"0": "불만", "1": "만족"},
              "0 and 1 exchanged": {"0": "1", "1": "0"}}  # fmt: skip
TUTORIAL = Path(__file__).parents[2] / "nbs" / "tutorials" / "your_own_labels.ipynb"


def inbox() -> pd.DataFrame:  # comment, label
    "The 240 messages of the tutorial, by its own cell, without the lines that write and print."
    cells = ["".join(cell["source"]) for cell in json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"]]
    cell = next(cell for cell in cells if cell.startswith("QUESTIONS ="))
    names = {"read_comments": read_comments, "pd": pd}
    exec(re.split(r"^inbox\.to_csv", cell, flags=re.MULTILINE)[0], names)
    return names["inbox"].rename(columns={"메시지": "comment", "분류": "label"})


def folds(rows: pd.DataFrame, number: int, seed: int, **settings) -> dict:
    clf = GemmaLoraClassifier(seed=seed, **settings)
    groups = duplicate_groups(rows.comment)
    oof = cross_validate({"ours": clf}, rows.comment, rows.label, folds=number, groups=groups, seed=seed)
    metrics = metrics_from_oof(oof, "ours", sorted(rows.label.unique()))
    return {name: metrics[name] for name in ("accuracy", "log_loss")}


def judged(clf: GemmaLoraClassifier, rows: pd.DataFrame) -> dict:
    metrics = compute_metrics(rows.label, clf.predict_proba(rows.comment), clf.classes_)
    return {name: metrics[name] for name in ("accuracy", "log_loss")}


def measurements(tarr: pd.DataFrame, seeds: range):  # (what, seed, numbers)
    validation, test = read_comments("sample_validation"), read_comments("sample_test")
    half = pd.concat([rows.head(80) for _, rows in tarr.groupby("label")])
    alone = GemmaLoraClassifier(epochs=0).fit(["-", "-"], ["0", "1"])
    yield "the base alone on sample_test", 0, judged(alone, test)
    yield "the base alone on tarr", 0, judged(alone, tarr)
    for seed in seeds:
        clf = GemmaLoraClassifier(seed=seed).fit(tarr.comment, tarr.label)
        yield "tarr, then sample_test", seed, judged(clf, test) | {"choices": clf.choices_}
        some = validation.sample(300, random_state=seed)
        clf = GemmaLoraClassifier(seed=seed).fit(some.comment, some.label)
        yield "300 rows of sample_validation, then sample_test", seed, judged(clf, test) | {"choices": clf.choices_}
        yield "inbox, five folds", seed, folds(inbox(), 5, seed)
        for name, labels in NEW_LABELS.items():
            renamed = half.assign(label=half.label.map(labels))
            yield f"160 rows of tarr, {name}, five folds", seed, folds(renamed, 5, seed)
        yield "tarr, ten folds", seed, folds(tarr, 10, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tarr")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with arguments.out.open("a", encoding="utf-8") as out:
        for what, seed, numbers in measurements(read_comments(arguments.tarr), range(arguments.seeds)):
            numbers |= {name: np.round(numbers[name], 4) for name in ("accuracy", "log_loss")}
            line = json.dumps({"what": what, "seed": seed, **numbers}, ensure_ascii=False)
            print(line, file=sys.stderr, flush=True)
            print(line, file=out, flush=True)


if __name__ == "__main__":
    main()
