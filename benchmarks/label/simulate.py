"""Labelling by choosing against labelling by drawing, with labels that are known.

    python -m benchmarks.label.simulate OUT.jsonl

Each line of OUT is one seed and one way: accuracy on other comments of what was fitted on the first 48, 96, 160 and 320
labels. Lines that are there already are not made again. `--table` prints the means and the paired differences of OUT.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student
from sklearn.base import clone

from gemma_lora_sentiment import GemmaLoraClassifier, read_comments
from gemma_lora_sentiment.evaluation import baseline_classifier
from gemma_lora_sentiment.labelling import Labelling, retrain

MEASURED = (48, 96, 160, 320)  # labels
NEW_WORDS = {"0": "안 옴", "1": "다시 옴"}  # mini_ko ties neither to what it knows


def rows_of(name: str, new_words: bool) -> pd.DataFrame:
    rows = read_comments(name)
    return rows.assign(label=rows.label.map(NEW_WORDS)) if new_words else rows


def doubt_without_training(job: Labelling, clf: GemmaLoraClassifier, at_most: int) -> None:
    "Let the base as it is choose the first comments."
    asked = job.candidates(at_most)
    untrained = clone(clf).set_params(epochs=0).fit(["-"] * len(job.labels), job.labels)
    values = untrained.predict_proba([job.comments[row] for row in asked])
    columns = [untrained.classes_.tolist().index(label) for label in job.labels]
    job.update(asked, values[:, columns], number=16)


def accuracies(job: Labelling, clf: GemmaLoraClassifier, test: pd.DataFrame) -> dict[str, float]:
    "Of what `train` would make of all labels so far, and of TF-IDF."
    rows, found = job.rows(), {}
    for name, each in (("ours", clone(clf)), ("tfidf", baseline_classifier())):
        fitted = each.fit(rows.comment.tolist(), rows.label.tolist())
        found[name] = float(np.mean(fitted.predict(test.comment.tolist()) == test.label.to_numpy()))
    return found


def simulated(clf: GemmaLoraClassifier, pool: pd.DataFrame, test: pd.DataFrame, seed: int, choose: bool, given) -> dict:
    pile = pool.sample(frac=1, random_state=seed).reset_index(drop=True)
    truth, found, started = dict(zip(pile["id"].astype(str), pile.label, strict=True)), {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        job = Labelling(pile, sorted(set(pile.label)), Path(folder) / "labels.tsv", choose=choose, seed=seed)
        if choose:
            doubt_without_training(job, clf, given.pool_at_most)
        for number in range(1, max(given.measured) + 1):
            job.label(job.version, truth[job.task().id])
            if choose and number in given.retrain and number < max(given.measured):
                retrain(job, clf, given.pool_at_most)
            if number in given.measured:
                found[str(number)] = accuracies(job, clf, test)
    return {"accuracy": found, "seconds": round(time.perf_counter() - started)}


def table(path: Path) -> pd.DataFrame:
    "Means, and paired differences of choosing and drawing with their 95% intervals (Student's t over seeds)."
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [{"base": line["base"], "seed": line["seed"], "way": line["way"], "labels": int(n), **values}
            for line in lines for n, values in line["accuracy"].items()]  # fmt: skip
    found = []
    for (base, labels), part in pd.DataFrame(rows).groupby(["base", "labels"]):
        wide = part.pivot(index="seed", columns="way", values=["ours", "tfidf"]).dropna()
        gain = wide[("ours", "choose")] - wide[("ours", "draw")]
        reach = student.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.nan
        found.append({"base": base, "labels": labels, "seeds": len(gain), **{
            f"{who}, {way}": wide[(who, way)].mean() for who in ("ours", "tfidf") for way in ("choose", "draw")},
            "difference": gain.mean(), "low": gain.mean() - reach, "high": gain.mean() + reach})  # fmt: skip
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="mini_ko")
    parser.add_argument("--pool", help="labelled comments; by default those that the base has not met")
    parser.add_argument("--test", default="sample_test")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--ways", nargs="+", default=["choose", "draw"], choices=["choose", "draw"])
    parser.add_argument("--measured", type=int, nargs="+", default=list(MEASURED))
    parser.add_argument("--retrain", type=int, nargs="+", default=[16, 48, 96, 160, 240], help="after so many labels")
    parser.add_argument("--pool-at-most", type=int, default=600, help="comments to choose from each time")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(given.out).round(3).to_string(index=False))
        return
    warnings.simplefilter("ignore")
    small = given.preset == "mini_ko"
    pool = rows_of(given.pool or ("sample_validation" if small else "sample"), small)
    test = rows_of(given.test, small)
    done = set()
    if given.out.exists():
        lines = [json.loads(line) for line in given.out.read_text(encoding="utf-8").splitlines()]
        done = {(line["base"], line["seed"], line["way"]) for line in lines}
    for seed in given.seeds:
        for way in given.ways:
            if (given.preset, seed, way) in done:
                continue
            clf = GemmaLoraClassifier(preset=given.preset, seed=seed)
            line = {"base": given.preset, "seed": seed, "way": way, "pool": given.pool or "default", "test": given.test,
                    "retrain": given.retrain, **simulated(clf, pool, test, seed, way == "choose", given)}  # fmt: skip
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
