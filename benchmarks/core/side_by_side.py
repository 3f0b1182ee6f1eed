"""Fits side by side against the same fits one by one, and one by one with blocks computed otherwise.

    python -m benchmarks.core.side_by_side BASE TARR OUT.jsonl [--rate 1e-3]

Four fits of 170 to 200 of the competition's comments, four epochs at the rate of the recipe, judged on the other 100:
the largest and the median difference in a probability. On a CPU fits are side by side here too.
"""

import argparse
import json
import warnings
from pathlib import Path

import jax
import numpy as np

from gemma_lora_sentiment import GemmaLoraClassifier, read_comments
from gemma_lora_sentiment import classifier as classifier_room
from gemma_lora_sentiment import training as training_room


def probabilities(clf: GemmaLoraClassifier, parts: list, judged: list[str], together: bool, apart: bool) -> np.ndarray:
    before = classifier_room.gains_side_by_side, classifier_room.fits_together, training_room.runs_apart
    classifier_room.gains_side_by_side = lambda: together
    classifier_room.fits_together = lambda *_: len(parts)  # a CPU does not say how much memory there is
    if apart:
        training_room.runs_apart = lambda *_: True
    try:
        fits = clf.fit_many(parts, [{"seed": seed} for seed in range(len(parts))])
        return np.stack([fitted.predict_proba(judged) for fitted in fits])
    finally:
        classifier_room.gains_side_by_side, classifier_room.fits_together, training_room.runs_apart = before


def differences(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    return {"largest": float(abs(one - other).max()), "median": float(np.median(abs(one - other)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("tarr")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rate", type=float, help="in the place of the recipe's, which it goes by otherwise")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = read_comments(arguments.tarr)
    parts = [(rows.comment[:n], rows.label[:n]) for n in (200, 190, 180, 170)]
    judged = rows.comment[200:].tolist()
    with arguments.out.open("a", encoding="utf-8") as out:
        for targets in ("all", ("query", "value")):
            clf = GemmaLoraClassifier(arguments.base, recipe="gemma", target_layers=targets, epochs=4, dtype="float32",
                                      learning_rate=arguments.rate or "auto")  # fmt: skip
            with jax.default_matmul_precision("highest"):
                alone = probabilities(clf, parts, judged, together=False, apart=False)
                together = probabilities(clf, parts, judged, together=True, apart=False)
                apart = probabilities(clf, parts[:2], judged, together=False, apart=True)
            line = {"device": jax.devices()[0].device_kind, "base": arguments.base, "targets": targets}
            line |= {"rate": arguments.rate or "the recipe's", "dtype": "float32, exact products"}
            line |= {"side by side": differences(together, alone), "blocks apart": differences(apart, alone[:2])}
            print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main()
