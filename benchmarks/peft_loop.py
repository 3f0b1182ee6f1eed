"""Hugging Face PEFT as its examples train it, with all that makes it fast, and scored at the label words."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .processes import ProcessLog, log_epoch

PEFT_NEEDS = ("torch", "transformers", "peft")


def padded(
    sequences: Sequence[Sequence[int]],  # n rows of token ids
    side: str = "right",  # where they are filled: "right" or "left"
    filler: int = 0,  # token id
) -> np.ndarray:  # int64 (n, longest)
    "Rows of one length."
    length = max(map(len, sequences))
    fill = [[filler] * (length - len(ids)) for ids in sequences]
    pairs = zip(sequences, fill, strict=True)
    return np.array([[*ids, *more] if side == "right" else [*more, *ids] for ids, more in pairs], np.int64)


def sorted_batches(
    sequences: Sequence[Sequence[int]],  # n rows of token ids
    batch_size: int,  # rows
) -> list[list[int]]:  # positions of the rows of each batch
    "Rows of about one length together."
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _peft_batch(torch: Any, model: Any, ids: Sequence[Sequence[int]], targets: Sequence[Any]) -> dict[str, Any]:
    arrays = {"input_ids": padded(ids), "attention_mask": padded([[1] * len(text) for text in ids])}
    if len(targets):
        of_tokens = isinstance(targets[0], list)
        arrays["labels"] = padded(targets, filler=-100) if of_tokens else np.array(targets, np.int64)
    device = next(model.parameters()).device
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _autocast(torch: Any, model: Any, dtype: str | None) -> Any:  # a context
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, getattr(torch, dtype)) if dtype else contextlib.nullcontext()


def _peft_optimizer(torch: Any, model: Any, rate: float, decay: float, steps: int | None) -> tuple[Any, Any]:
    "AdamW and its schedule: with `steps` a tenth of them up to the rate, then down to zero."
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=decay)
    warmup = max(1, (steps or 0) // 10)

    def share(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)) if steps else 1.0

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def train_peft(
    torch: Any,  # the module
    model: Any,  # of PEFT
    texts: Sequence[Sequence[int]],  # n rows of token ids
    targets: Sequence[Any],  # of each its token ids, -100 where there is no loss; or a class, for a head
    log: ProcessLog,  # of the epochs, and of the time that is left
    *,
    epochs: int,  # passes over the rows
    batch_size: int,  # rows
    learning_rate: float,  # at its highest
    weight_decay: float = 0.01,  # as in AdamW
    linear: bool = False,  # warm-up, then down to zero
    global_clipnorm: float = 0.0,  # the gradient of a step is cut down to this norm; 0: it is not
    seed: int = 0,  # of the order of the batches
    autocast: str | None = None,  # number format of the forward passes, where it is not that of the weights
) -> None:
    "Train as PEFT's examples do, until the end or the log's time limit."
    batches = sorted_batches(texts, batch_size)
    steps = epochs * len(batches) if linear else None
    optimizer, schedule = _peft_optimizer(torch, model, learning_rate, weight_decay, steps)
    model.train()
    for epoch in range(epochs):
        started, done = time.perf_counter(), 0
        for i in np.random.default_rng([seed, epoch]).permutation(len(batches)):
            rows = batches[i]
            batch = _peft_batch(torch, model, [texts[row] for row in rows], [targets[row] for row in rows])
            with _autocast(torch, model, autocast):
                loss = model(**batch).loss
            loss.backward()
            if global_clipnorm:
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], global_clipnorm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done += 1
            if log.is_over():
                break
        loss.item()  # waits for the device
        log_epoch(log, time.perf_counter() - started, done, len(batches))
        if log.is_over():
            return


def _word_scores(torch: Any, model: Any, prompts: Sequence[Sequence[int]], words: Sequence[tuple[int, ...]]) -> Any:
    "float32 (n, labels): a logit, or the sum of log-probabilities where a word has several tokens."
    device = next(model.parameters()).device
    scores = np.zeros((len(prompts), len(words)), np.float32)
    begun = sorted({word[:n] for word in words for n in range(len(word))})
    for before in begun:
        ids = [[*prompt, *before] for prompt in prompts]
        token_ids = torch.from_numpy(padded(ids, "left")).to(device)
        mask = torch.from_numpy(padded([[1] * len(text) for text in ids], "left")).to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids=token_ids, attention_mask=mask, position_ids=positions, logits_to_keep=1
        ).logits[:, -1]  # fmt: skip
        if len(begun) > 1:
            logits = logits.float().log_softmax(-1)
        labels = [i for i, word in enumerate(words) if word[: len(before)] == before and len(word) > len(before)]
        next_ids = [words[i][len(before)] for i in labels]
        scores[:, labels] += logits[:, next_ids].float().cpu().numpy()
    return scores


def score_peft(
    torch: Any,  # the module
    model: Any,  # of PEFT
    prompts: Sequence[Sequence[int]],  # n prompts, token ids
    words: Sequence[Sequence[int]] | None = None,  # token ids of each label's word; None: the model has a head
    autocast: str | None = None,  # as of train_peft
) -> np.ndarray:  # float32 (n, labels)
    "Scores of the labels, whose softmax is their probability."
    spoken = None if words is None else [tuple(word) for word in words]
    batches, found = sorted_batches(prompts, 64), []
    model.eval()
    with torch.inference_mode(), _autocast(torch, model, autocast):
        for batch in batches:
            ids = [prompts[row] for row in batch]
            if spoken is None:
                found.append(model(**_peft_batch(torch, model, ids, [])).logits.float().cpu().numpy())
            else:
                found.append(_word_scores(torch, model, ids, spoken))
    scores = np.zeros((len(prompts), found[0].shape[1]), np.float32)
    for batch, of_batch in zip(batches, found, strict=True):
        scores[batch] = of_batch
    return scores


def torch_device(
    torch: Any,  # the module
    dtype: str = "auto",  # of the weights; "auto": bfloat16 on a GPU, float32 on a CPU
    memory_limit: float | None = None,  # GB of the GPU's memory
) -> tuple[str, str]:  # "cuda" or "cpu", number format
    "Where PEFT runs and in what, its memory limited as ours is."
    on_gpu = torch.cuda.is_available()
    if on_gpu and memory_limit:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_limit * 1e9 / total)
    return "cuda" if on_gpu else "cpu", dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"


def import_peft(
    spec: Mapping[str, Any],  # of the task, as all tasks take it
    rows: Mapping[str, Any],  # not looked at
    log: ProcessLog,  # where it says that it has ended
) -> None:
    "Reads the libraries from the disk once, as `measure_device` does for ours."
    import peft  # noqa: F401
    import torch
    from transformers import GemmaForCausalLM  # noqa: F401

    a = torch.ones((64, 64), device="cuda" if torch.cuda.is_available() else "cpu")
    log(total=float((a @ a).sum()))
