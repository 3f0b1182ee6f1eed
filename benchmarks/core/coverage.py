"""How often an interval for the log-loss holds the truth: percentiles, a studentized bootstrap, and the package's own.

    python -m benchmarks.core.coverage [ROUNDS] > coverage.jsonl

Nine classifiers of two labels: right 90, 97 and 99 times in 100, and of each kind one that is too sure (log-odds twice
what they should be), one that is as sure as it should be, and one that is not sure enough (half). The true log-loss is
that of two million rows. Each is measured ROUNDS times (500) on 12, 60 and 300 rows; a line has, for one classifier
and size, the share of the rounds in which each of the three intervals of 95% held the truth. Where all rows have one
loss there is no interval, which counts as not holding it.
"""

import json
import sys

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from gemma_lora_sentiment.intervals import metric_intervals

SIZES, RIGHT, SURENESS, LEVELS = (12, 60, 300), (0.9, 0.97, 0.99), (2.0, 1.0, 0.5), (0.025, 0.975)
NORMAL = np.random.default_rng(0).normal(size=200_000)


def spread_for(right: float) -> float:  # of log-odds, with which so many answers are right
    return brentq(lambda spread: expit(np.abs(spread * NORMAL)).mean() - right, 0.1, 1000)


def drawn(n: int, spread: float, sureness: float, random: np.random.Generator):  # labels (n,), probabilities (n, 2)
    odds = spread * random.normal(size=n)
    labels = (random.random(n) < expit(odds)).astype(int)
    return labels, np.stack([expit(-sureness * odds), expit(sureness * odds)], axis=1)


def losses_of(labels, probabilities):
    return -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], np.finfo(np.float32).eps))


def bootstrapped(losses, random, resamples=1000):  # intervals by percentiles, and studentized in logarithms
    parts = losses[random.integers(len(losses), size=(resamples, len(losses)))]
    means = np.maximum(parts.mean(axis=1), 1e-300)  # a loss may be 0 to the last bit
    errors = parts.std(axis=1) / np.sqrt(len(losses)) / means
    mean = max(losses.mean(), 1e-300)
    error = losses.std() / np.sqrt(len(losses)) / mean
    if not error > 1e-9:  # rows of one and the same loss tell nothing of others
        return (np.nan, np.nan), (np.nan, np.nan)
    known = errors > 1e-9
    low, high = np.quantile(np.log(means[known] / mean) / errors[known], LEVELS)
    return np.quantile(means, LEVELS), (mean * np.exp(-high * error), mean * np.exp(-low * error))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    for right in RIGHT:
        spread = spread_for(right)
        for sureness in SURENESS:
            truth = losses_of(*drawn(2_000_000, spread, sureness, np.random.default_rng(1))).mean()
            for n in SIZES:
                held = np.zeros((rounds, 3), bool)
                for number in range(rounds):
                    random = np.random.default_rng([n, number])
                    labels, probabilities = drawn(n, spread, sureness, random)
                    ours = metric_intervals(labels, probabilities, [0, 1], resamples=1000)["log_loss"]
                    intervals = (*bootstrapped(losses_of(labels, probabilities), random), ours or (np.nan, np.nan))
                    held[number] = [low <= truth <= high for low, high in intervals]
                shares = dict(zip(("percentiles", "studentized", "ours"), held.mean(axis=0).round(4), strict=True))
                what = {"right": right, "sureness": sureness, "n": n, "rounds": rounds}
                print(json.dumps(what | shares), flush=True)


if __name__ == "__main__":
    main()
