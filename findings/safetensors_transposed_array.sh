#!/usr/bin/env bash
# safetensors 0.8.0 (PyPI): safetensors.numpy.save and save_file write an array that is not C-contiguous, a transposed
# one for example, with its shape but with its numbers in the order of its memory. No error, no warning: what is read
# back has the right shape and other numbers. 0.7.0 and earlier wrote it right; safetensors.torch refuses such a tensor.
# Weights are often transposed on the way into a file (Keras keeps kernels the other way round than PyTorch does).
# Seen: 0.7.0 reads back what was written; 0.8.0 [[0, 1], [2, 3], [4, 5]] for [[0, 3], [1, 4], [2, 5]].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/try.py" <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
found = load(save({"x": transposed}))["x"]
copied = load(save({"x": np.ascontiguousarray(transposed)}))["x"]
same = bool(np.array_equal(found, transposed))
print(f"safetensors {safetensors.__version__}: {transposed.tolist()} comes back as {found.tolist()}")
assert np.array_equal(copied, transposed), "a contiguous copy is written right by both"
assert found.shape == transposed.shape
raise SystemExit(0 if same == (sys.argv[1] == "right") else 1)
PYTHON
for expected in 0.7.0:right 0.8.0:wrong; do
    "$folder/venv/bin/pip" install -q --disable-pip-version-check "safetensors==${expected%:*}" numpy==2.4.6
    "$folder/venv/bin/python" "$folder/try.py" "${expected#*:}"
done
