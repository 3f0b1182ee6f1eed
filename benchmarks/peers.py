"""What ours is compared with where weights are random: the tutorial's recipe, and Hugging Face PEFT."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from .ours import log_scoring
from .peft_loop import score_peft, torch_device, train_peft
from .processes import ProcessLog, device_peak_bytes, log_epoch, resident_peak_bytes
from .shapes import BOS, EOS, LABEL_IDS, SHAPES, BenchmarkSettings


def _stop_in_time(log: ProcessLog, steps: int) -> Any:  # a Keras callback
    "Ends `fit` when the time is over, and writes down each epoch or the part of it that was measured."
    import keras

    class StopInTime(keras.callbacks.Callback):
        async_safe = True  # so Keras does not wait for the numbers of each step

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.started, self.steps = time.perf_counter(), 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.steps += 1
            if log.is_over():  # `self.model` would copy the state of training into the model first
                self._model.stop_training = True

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            log_epoch(log, time.perf_counter() - self.started, self.steps, steps)
            self._model.stop_training |= log.is_over()

    return StopInTime()


def run_tutorial(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    import keras
    import keras_nlp

    settings = BenchmarkSettings(**spec["settings"])
    log(import_seconds=log.elapsed(), dtype=spec["dtype"], batch_size=1)
    started = time.perf_counter()
    backbone = keras_nlp.models.GemmaBackbone(**SHAPES[settings.shape], dtype=spec["dtype"])
    backbone.enable_lora(rank=settings.lora_rank)
    logits = backbone.token_embedding(backbone.outputs[0], reverse=True)
    gemma_lm = keras.Model(backbone.inputs, logits)  # `GemmaCausalLM.fit` would want TensorFlow for its preprocessing
    log(base_seconds=time.perf_counter() - started)

    token_ids = np.zeros((len(rows["train"]), settings.length + 1), np.int32)
    for row, (prompt, label) in enumerate(zip(rows["train"], rows["labels"], strict=True)):
        ids = [*prompt, LABEL_IDS[label], EOS][: settings.length + 1]
        token_ids[row, : len(ids)] = ids
    padding_mask = token_ids != 0
    x = {"token_ids": token_ids[:, :-1], "padding_mask": padding_mask[:, :-1]}

    optimizer = keras.optimizers.AdamW(learning_rate=5e-5, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    gemma_lm.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizer,
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    started = time.perf_counter()
    gemma_lm.fit(
        x, token_ids[:, 1:], sample_weight=padding_mask[:, 1:], batch_size=1, epochs=settings.epochs, verbose=0,
        callbacks=[_stop_in_time(log, len(token_ids))],
    )  # fmt: skip
    log(fit_seconds=time.perf_counter() - started, process_seconds=log.elapsed(), peak_bytes=device_peak_bytes())


def _peft_model(torch: Any, settings: BenchmarkSettings, dtype: str, device: str) -> Any:
    import peft
    import transformers

    shape = SHAPES[settings.shape]
    config = transformers.GemmaConfig(
        vocab_size=shape["vocabulary_size"], num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_query_heads"], num_key_value_heads=shape["num_key_value_heads"],
        hidden_size=shape["hidden_dim"], intermediate_size=shape["intermediate_dim"] // 2, head_dim=shape["head_dim"],
        pad_token_id=0, eos_token_id=EOS, bos_token_id=BOS, use_cache=False,
    )  # fmt: skip
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = transformers.GemmaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    rank = settings.lora_rank
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora).to(device)


def run_peft(spec: Mapping[str, Any], rows: Mapping[str, Any], log: ProcessLog) -> None:
    import torch
    import transformers

    settings, size = BenchmarkSettings(**spec["settings"]), spec["batch_size"]
    transformers.utils.logging.set_verbosity_error()
    device, dtype = torch_device(torch, settings.dtype, settings.memory_limit)
    on_gpu = device == "cuda"
    log(import_seconds=log.elapsed(), dtype=dtype, batch_size=size, device=device)
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    model = _peft_model(torch, settings, dtype, device)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    log(base_seconds=time.perf_counter() - started)

    def peak_bytes() -> int:
        return torch.cuda.max_memory_allocated() if on_gpu else resident_peak_bytes()

    texts = [[*prompt, LABEL_IDS[i], EOS] for prompt, i in zip(rows["train"], rows["labels"], strict=True)]
    targets = [[-100] * (len(text) - 2) + text[-2:] for text in texts]
    how = dict(epochs=settings.epochs, batch_size=size, learning_rate=5e-5, seed=settings.seed)
    started = time.perf_counter()
    train_peft(torch, model, texts, targets, log, **how)
    log(fit_seconds=time.perf_counter() - started, process_seconds=log.elapsed(), peak_bytes=peak_bytes())
    if size > 1 and spec["cache"] == "cold" and not log.is_over():
        words = [(label_id,) for label_id in LABEL_IDS]
        log_scoring(log, rows, lambda part: score_peft(torch, model, rows[part], words))
        log(predict_peak_bytes=peak_bytes())
