"""`python -m benchmarks --shape tiny` in a clone is `gemma-lora-sentiment benchmark --shape tiny`."""

import sys

from gemma_lora_sentiment.cli import app

if __name__ == "__main__":
    app(["benchmark", *sys.argv[1:]], prog_name="gemma-lora-sentiment")
