"""`python -m gemma_lora_sentiment` is the shell command."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="gemma-lora-sentiment")
