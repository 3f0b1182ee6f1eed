"""The benchmark: this package, the tutorial's recipe and Hugging Face PEFT on the same rows, timed and judged.

It is no part of the wheel. `gemma-lora-sentiment benchmark` finds this folder beside the package or in the current
folder; in a clone `python -m benchmarks` is the same command. Pages: nbs/10_benchmark.ipynb and nbs/10a_results.ipynb.
"""

BENCHMARKS_OF = "gemma_lora_sentiment"  # by this line the shell command knows that the folder is this project's
