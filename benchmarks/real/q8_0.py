"""What 8-bit weights change in the answers of a run, by the kind of tensor.

    python -m benchmarks.real.q8_0 RUN F16.gguf Q8_0.gguf COMMENTS OUT.jsonl [--rows 60] [--kinds ffn_down ...]

RUN is the folder of a fine-tuned Gemma with two labels, the two files are its exports (`export RUN --format gguf
--outtype ...`). Of COMMENTS those are asked that the run is least sure of, in llama.cpp (extra `[llamacpp]`), one
thread: both files as they are; the q8_0 weights rounded, but stored and multiplied as f16; then each of `--kinds` in
q8_0, all other tensors f16. A line of OUT has the differences to `predict_proba`: of a probability (p_max, p_mean,
over05), of the log-odds (lo_max, lo_rms), and the decisions that changed.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from gemma_lora_sentiment import GemmaLoraClassifier, read_comments
from gemma_lora_sentiment.llamacpp import ask_llamacpp

KINDS = ("token_embd", "ffn_down", "ffn_gate+ffn_up", "attn_output", "attn_q+attn_k+attn_v")


def kind_of(name: str) -> str:  # blk.3.attn_q.weight -> attn_q, token_embd.weight -> token_embd
    parts = name.split(".")
    return parts[2] if parts[0] == "blk" else parts[0]


def mixed(out: Path, f16: str, q8_0: str, choose: Callable[[str], str]) -> Path:  # "f16", "q8_0" or "rounded"
    ours, theirs = gguf.GGUFReader(f16), {tensor.name: tensor for tensor in gguf.GGUFReader(q8_0).tensors}
    writer = gguf.GGUFWriter(out, ours.get_field("general.architecture").contents())
    for field in ours.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of_items)
    for tensor in ours.tensors:
        chosen = choose(kind_of(tensor.name))
        source = tensor if chosen == "f16" else theirs[tensor.name]
        if chosen == "rounded" and source.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            floats = gguf.quants.dequantize(source.data, source.tensor_type)
            writer.add_tensor(tensor.name, floats.astype(np.float16))
        else:
            writer.add_tensor(tensor.name, source.data, raw_dtype=source.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def measured(name: str, model: str | Path, prompts: list, words: list, ours: np.ndarray) -> dict:
    asked = ask_llamacpp(model, prompts, words, threads=1).log_probabilities
    theirs = np.exp(asked - asked.max(axis=1, keepdims=True))
    theirs /= theirs.sum(axis=1, keepdims=True)
    apart = np.abs(theirs - ours).max(axis=1)
    odds = np.abs(np.diff(asked, axis=1) - np.diff(np.log(ours), axis=1))[:, 0]
    return {
        "name": name, "rows": len(prompts),
        "p_max": round(float(apart.max()), 4), "p_mean": round(float(apart.mean()), 5),
        "over05": int((apart > 0.05).sum()), "lo_max": round(float(odds.max()), 3),
        "lo_rms": round(float(np.sqrt((odds**2).mean())), 4),
        "changed": int((theirs.argmax(axis=1) != ours.argmax(axis=1)).sum()), "size": os.path.getsize(model),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "f16", "q8_0", "comments", "out"):
        parser.add_argument(name)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    given = parser.parse_args()
    clf = GemmaLoraClassifier.load(given.run)
    comments = read_comments(given.comments, labelled=False).comment.tolist()
    probabilities = clf.predict_proba(comments).astype(np.float64)
    least_sure = np.argsort(probabilities.max(axis=1))[: given.rows]
    prompts = [prompt.tolist() for prompt in clf.encode([comments[row] for row in least_sure])]
    words = [list(map(int, ids)) for ids in clf.words_.scored_ids]

    def measure(name: str, model: str | Path) -> None:
        line = json.dumps(measured(name, model, prompts, words, probabilities[least_sure]))
        print(line, flush=True)
        with open(given.out, "a", encoding="utf-8") as out:
            out.write(line + "\n")

    measure("f16", given.f16)
    measure("q8_0", given.q8_0)
    choices = {"q8_0 weights rounded, f16 arithmetic": lambda kind: "rounded"}
    for kinds in given.kinds:
        choices[kinds] = lambda kind, kinds=kinds: "q8_0" if kind in kinds.split("+") else "f16"
    with tempfile.TemporaryDirectory() as folder:
        for name, choose in choices.items():
            measure(name, mixed(Path(folder) / "mixed.gguf", given.f16, given.q8_0, choose))


if __name__ == "__main__":
    main()
