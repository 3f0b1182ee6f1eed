"""Hugging Face PEFT on the rows, settings and weights of ours, for the page of results.

    python peers.py prepare BASE TARR FOLDER
    python peers.py word FOLDER OUT.jsonl       label words, by the language model
    python peers.py head FOLDER OUT.jsonl       a classification head
    python peers.py ours BASE TARR OUT.jsonl    this package, the same measurements

BASE is a .gguf file. `prepare` writes it as a Hugging Face folder by this package's export, so that torch reads the
same numbers, and the rows as token ids beside it. Trained on the 300 rows of TARR, then twice on 300 rows of sample in
the same process: the last is the warm fit. Judged on sample_validation, by rows that no fit has seen.
"""

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

EPOCHS, BATCH, RATE, DECAY, RANK = 4, 16, 1e-3, 0.01, 8
LAYERS = {"q and v": ["q_proj", "v_proj"],
          "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}  # fmt: skip


def prepare(base: str, tarr: str, folder: str) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from gemma_lora_sentiment import GemmaLoraClassifier, read_comments
    from gemma_lora_sentiment.export import export_checkpoint
    from gemma_lora_sentiment.model import load_base
    from gemma_lora_sentiment.prompt import PromptTemplate, TextTokenizer, encode_prompts, label_words

    held = load_base(base, "float32")
    untrained = GemmaLoraClassifier(base, dtype="float32", epochs=0).fit(["-", "-"], ["0", "1"])
    tokenizer, template = TextTokenizer(held.tokenizer_proto), PromptTemplate()
    words = label_words(["0", "1"], tokenizer, template)

    def encoded(rows) -> dict:
        prompts = encode_prompts(rows.comment.tolist(), tokenizer, template, 256, 2).token_ids
        return {"prompts": [prompt.tolist() for prompt in prompts], "labels": [int(label) for label in rows.label]}

    sample = read_comments("sample").groupby("label", group_keys=False).sample(150, random_state=0)
    rows = {"tarr": encoded(read_comments(tarr)), "sample": encoded(sample)}
    rows["validation"] = encoded(read_comments("sample_validation"))
    export_checkpoint(folder, held, untrained.adapter_, [], "bfloat16", "The base as it is.")
    rows["responses"] = [list(map(int, ids)) for ids in words.trained_ids]
    (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def padded(torch, sequences, side, filler, device):
    longest = max(map(len, sequences))
    fill = [[filler] * (longest - len(ids)) for ids in sequences]
    pairs = zip(sequences, fill, strict=True)
    return torch.tensor([ids + more if side == "right" else more + ids for ids, more in pairs], device=device)


def fit(torch, model, rows, responses, how, seed):
    import numpy as np

    device = next(model.parameters()).device
    texts = rows["prompts"]
    if how == "word":
        texts = [prompt + responses[label] for prompt, label in zip(texts, rows["labels"], strict=True)]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    steps = EPOCHS * len(batches)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    for epoch in range(EPOCHS):
        for i in np.random.default_rng([seed, epoch]).permutation(len(batches)):
            ids = [texts[row] for row in batches[i]]
            ones = [[1] * len(text) for text in ids]
            given = {"input_ids": padded(torch, ids, "right", 0, device),
                     "attention_mask": padded(torch, ones, "right", 0, device)}  # fmt: skip
            if how == "word":
                n = len(responses[0])
                of_words = [[-100] * (len(text) - n) + text[-n:] for text in ids]
                given["labels"] = padded(torch, of_words, "right", -100, device)
            else:
                given["labels"] = torch.tensor([rows["labels"][row] for row in batches[i]], device=device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(**given).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    loss.item()  # waits for the device


def scores(torch, model, rows, responses, how):  # float32 (n, labels)
    import numpy as np

    device, found = next(model.parameters()).device, np.zeros((len(rows["prompts"]), 2), np.float32)
    order = sorted(range(len(rows["prompts"])), key=lambda i: len(rows["prompts"][i]))
    model.eval()
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        for first in range(0, len(order), 64):
            batch = order[first : first + 64]
            ids = [rows["prompts"][row] for row in batch]
            side = "left" if how == "word" else "right"
            given = {"input_ids": padded(torch, ids, side, 0, device),
                     "attention_mask": padded(torch, [[1] * len(text) for text in ids], side, 0, device)}  # fmt: skip
            if how == "word":
                positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
                logits = model(**given, position_ids=positions, logits_to_keep=1).logits[:, -1]
                logits = logits[:, [ids[0] for ids in responses]]
            else:
                logits = model(**given).logits
            found[batch] = logits.float().cpu().numpy()
    return found


def peft_model(torch, folder, how, layers, seed):
    import peft
    import transformers

    torch.manual_seed(seed)
    kind = transformers.AutoModelForCausalLM if how == "word" else transformers.AutoModelForSequenceClassification
    more = {} if how == "word" else {"num_labels": 2}
    model = kind.from_pretrained(folder, dtype=torch.float32, **more).to("cuda")
    model.config.pad_token_id, model.config.use_cache = 0, False
    task = "CAUSAL_LM" if how == "word" else "SEQ_CLS"
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, task_type=task)
    return peft.get_peft_model(model, lora)


def judged(found, labels) -> dict:
    import numpy as np
    from sklearn.metrics import log_loss

    found = found.astype(np.float64)
    chances = np.exp(found - found.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    return {"accuracy": round(float((found.argmax(axis=1) == labels).mean()), 4),
            "log_loss": round(float(log_loss(labels, chances)), 4)}  # fmt: skip


def theirs(folder: str, how: str):
    import torch

    rows = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
    responses = rows.pop("responses")
    for called, layers in LAYERS.items():
        line = {"system": f"PEFT, {how}", "targets": called}
        for i, part in enumerate(("tarr", "sample", "sample")):
            model = peft_model(torch, folder, how, layers, i)
            torch.cuda.synchronize()
            started = time.perf_counter()
            fit(torch, model, rows[part], responses, how, i)
            seconds, process = time.perf_counter() - started, time.perf_counter() - STARTED
            started = time.perf_counter()
            found = judged(scores(torch, model, rows["validation"], responses, how), rows["validation"]["labels"])
            line = {**line, "rows": part, "seed": i, "fit": "warm" if i == 2 else "first" if i == 0 else "second"}
            yield {**line, "seconds": round(seconds, 3), "process": round(process, 2), **found,
                   "scoring": round(time.perf_counter() - started, 3),
                   "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}  # fmt: skip
            del model
            torch.cuda.empty_cache()


def ours(base: str, tarr: str):
    import jax

    from gemma_lora_sentiment import GemmaLoraClassifier, read_comments
    from gemma_lora_sentiment.cache import use_compile_cache
    from gemma_lora_sentiment.model import load_base

    use_compile_cache()
    sample = read_comments("sample").groupby("label", group_keys=False).sample(150, random_state=0)
    rows, validation = {"tarr": read_comments(tarr), "sample": sample}, read_comments("sample_validation")
    for called, targets in {"q and v": ["query", "value"], "all": "all"}.items():
        for i, part in enumerate(("tarr", "sample", "sample")):
            clf = GemmaLoraClassifier(base, recipe="gemma", target_layers=targets, learning_rate=RATE, epochs=EPOCHS,
                                      lora_rank=RANK, batch_size=BATCH, weight_decay=DECAY, seed=i)  # fmt: skip
            jax.block_until_ready(load_base(base).arrays)
            started = time.perf_counter()
            clf.fit(rows[part].comment, rows[part].label)
            seconds, process = time.perf_counter() - started, time.perf_counter() - STARTED
            started = time.perf_counter()
            chances = clf.predict_proba(validation.comment)
            took = time.perf_counter() - started
            from sklearn.metrics import log_loss

            right = clf.classes_[chances.argmax(axis=1)] == validation.label
            stats = jax.local_devices()[0].memory_stats() or {}
            yield {"system": "ours", "targets": called, "rows": part, "seed": i,
                   "fit": "warm" if i == 2 else "first" if i == 0 else "second", "seconds": round(seconds, 3),
                   "process": round(process, 2), "accuracy": round(float(right.mean()), 4),
                   "log_loss": round(float(log_loss(validation.label, chances)), 4), "scoring": round(took, 3),
                   "peak_gb": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "word", "head", "ours"])
    parser.add_argument("arguments", nargs="+")
    given = parser.parse_args()
    if given.what == "prepare":
        return prepare(*given.arguments)
    *needs, out = given.arguments
    lines = ours(*needs) if given.what == "ours" else theirs(*needs, given.what)
    with open(out, "a", encoding="utf-8") as file:
        for line in lines:
            print(json.dumps(line), file=sys.stderr, flush=True)
            print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main()
