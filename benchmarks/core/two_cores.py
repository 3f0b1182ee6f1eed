"""What a user of the bundled base waits for, in this tree and in the one before its own forward pass, in turn.

    git worktree add OLD 3aa74bf
    python -m benchmarks.core.two_cores OLD TARR [ROUNDS] >> two_cores.jsonl

A line is one process with the compile cache in a folder of its own: `quickstart` with that folder empty, and ten folds
of the competition's TARR (tarr_train.txt) by default settings with a cache that an earlier run of the same tree has
filled; `seconds` of it, from the start of the interpreter to its end. Both trees run in the environment of this one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICKSTART = "from gemma_lora_sentiment.cli import app; app(['quickstart', '--quiet'])"
FOLDS = """
import sys, warnings
warnings.simplefilter("ignore")
from gemma_lora_sentiment import GemmaLoraClassifier, read_comments
from gemma_lora_sentiment.evaluation import cross_validate
rows = read_comments(sys.argv[1])
oof = cross_validate({"ours": GemmaLoraClassifier()}, rows.comment, rows.label, folds=10)
print((oof.ours_prediction == oof.label).mean())
"""


def seconds(tree: Path, cache: str, code: str, *arguments: str) -> float:
    more = {"PYTHONPATH": str(tree), "GEMMA_LORA_SENTIMENT_CACHE": cache, "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=os.environ | more,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)  # fmt: skip
        return time.perf_counter() - started


def main() -> None:
    trees = {"old": Path(sys.argv[1]).resolve(), "new": Path(__file__).resolve().parents[2]}
    tarr, rounds = str(Path(sys.argv[2]).resolve()), int(sys.argv[3]) if len(sys.argv) > 3 else 3
    with tempfile.TemporaryDirectory() as kept:
        for number in range(rounds + 1):
            for which, tree in trees.items():
                taken = {"ten folds": seconds(tree, f"{kept}/{which}", FOLDS, tarr)}
                if not number:
                    continue  # the first round fills the caches
                with tempfile.TemporaryDirectory() as empty:
                    taken["quickstart"] = seconds(tree, empty, QUICKSTART)
                for what, each in taken.items():
                    line = {"which": which, "what": what, "round": number, "seconds": round(each, 2)}
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
