"""Fine-tune Gemma with LoRA on a few hundred labelled comments, with Keras and JAX."""

__version__ = "0.1.0"

_PUBLIC = {
    "DataError": "tables",
    "read_comments": "data",
    "split_comments": "data",
    "GemmaLoraClassifier": "classifier",
    "write_submission": "submission",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    """Import a public name from its room at first use, so that `import gemma_lora_sentiment` stays light."""
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
