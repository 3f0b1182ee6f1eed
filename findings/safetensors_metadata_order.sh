#!/usr/bin/env bash
# safetensors 0.8.0 (PyPI): saving the same tensors with the same metadata twice can give other bytes, because two or
# more metadata keys are written in an order that changes from call to call. One key, or none, is always the same.
# So a digest of a file with metadata says nothing about its content, and a reproducible file must sort them itself.
# Seen: 2 different files in 64 calls with two keys, 1 with one key.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import hashlib

import numpy as np
import safetensors
from safetensors.numpy import load, save

tensors = {"a": np.arange(3, dtype=np.float32)}


def files(metadata):
    made = [save(tensors, metadata) for _ in range(64)]
    assert all(np.array_equal(load(data)["a"], tensors["a"]) for data in made)
    return len({hashlib.sha256(data).hexdigest() for data in made})


one, two = files({"format": "pt"}), files({"format": "pt", "note": "x"})
print(f"safetensors {safetensors.__version__}: {one} file with one metadata key, {two} different files with two keys")
raise SystemExit(0 if (one, two) == (1, 2) else 1)
PYTHON
