"""What would bore a reader of 03a_checkpoint and 04_training: killed processes, damaged checkpoints, full disks."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from gemma_lora_sentiment import GemmaLoraClassifier, checkpoint, training
from gemma_lora_sentiment.adapter import new_adapter
from gemma_lora_sentiment.cli import app
from gemma_lora_sentiment.files import RunError, hold, seal, unseal
from gemma_lora_sentiment.model import jax, keras, load_base, tiny_gemma
from gemma_lora_sentiment.prompt import LabelWords
from gemma_lora_sentiment.training import OutOfMemory, Recipe, Rows, train_adapter

ROOT = Path(__file__).resolve().parents[1]
WORDS = LabelWords(("0", "1"), ("0", "1"), ((20,), (21,)), (1,))
RECIPE = Recipe(lora_rank=4, learning_rate=0.02, weight_decay=0.01, epochs=4, batch_size=2)
PHRASES = ("맛있어요", "별로예요", "또 갈게요", "실망했어요", "친절해요", "다시는 안 가요")
LINES = "".join(f"{i}\t{PHRASES[i % 6]} {i}\t{1 - i % 2}\n" for i in range(60))


def rows_of(n=10, seed=0):
    rng = np.random.default_rng(seed)
    prompts = [np.array([2, *rng.integers(30, 250, 10)], np.int32) for _ in range(n)]
    index = np.arange(n) % 2
    return Rows(prompts, [WORDS.trained_ids[i] for i in index], index, np.ones(n, np.float32))


ROWS, HELD_OUT = rows_of(), rows_of(4, seed=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_gemma(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(tiny):
    return load_base(tiny)


def fit(base, recipe=RECIPE, rows=ROWS, start_seed=0, **settings):
    return train_adapter(base, new_adapter(base, 4, seed=start_seed), rows, WORDS, recipe, **settings)


def same_bits(one, other):
    """The same adapter and the same history, times aside."""
    (a, a_history, _), (b, b_history, _) = one, other
    assert a.arrays.keys() == b.arrays.keys()
    assert all(a.arrays[path].tobytes() == b.arrays[path].tobytes() for path in a.arrays)
    pd.testing.assert_frame_equal(
        a_history.drop(columns="seconds"), b_history.drop(columns="seconds"), check_exact=True
    )  # fmt: skip
    return True


class Stop(keras.callbacks.Callback):
    """Ends a fit as Ctrl-C would, after so many steps."""

    def __init__(self, after):
        super().__init__()
        self.left, self.seen, self.epoch, self.begun, self.ended = after, [], None, 0, 0

    def on_train_begin(self, logs=None):
        self.begun += 1

    def on_train_end(self, logs=None):
        self.ended += 1

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((self.epoch, batch))
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def stopped(base, folder, after, **settings):
    stop = Stop(after)
    with pytest.raises(KeyboardInterrupt):
        fit(base, callbacks=[stop], checkpoint_dir=folder, checkpoint_steps=1, **settings)
    return stop


def resumed(base, folder, **settings):
    watch = Stop(-1)
    return fit(base, callbacks=[watch], checkpoint_dir=folder, **settings), watch


# --- the same bits


@pytest.mark.parametrize("settings", [
    dict(), dict(lora_dropout=0.3, seed=5), dict(validation=HELD_OUT), dict(validation=HELD_OUT, patience=1),
    dict(recipe=replace(RECIPE, batch_size=3, schedule="constant", loss_on="text")),
    dict(recipe=replace(RECIPE, batch_size=3, global_clipnorm=0.3, among_labels=0.5, label_smoothing=0.1)),
], ids=str)  # fmt: skip
def test_resumed_at_any_step_is_the_same_fit(settings, base, tmp_path):
    whole = fit(base, callbacks=[Stop(-1)], **settings)
    steps = len(ROWS) // 2 * len(whole[1]) if "recipe" not in settings else 4 * len(whole[1])
    for after in {1, steps // 2, steps - 1, 5}:
        folder = tmp_path / str(after)
        first = stopped(base, folder, after, **settings)
        result, second = resumed(base, folder, **settings)
        assert same_bits(whole, result)
        # the batch at which it was stopped has no checkpoint of its own: it is computed twice, and no other one is
        assert second.seen[0] == first.seen[-1] and len(first.seen) + len(second.seen) == steps + 1
        assert (second.begun, second.ended) == (1, 1)
        assert result[1].seconds.gt(0).all()


def test_stopped_again_and_again(base, tmp_path):
    whole = fit(base, callbacks=[Stop(-1)], validation=HELD_OUT, lora_dropout=0.1)
    for _ in range(19):
        stopped(base, tmp_path, 2, validation=HELD_OUT, lora_dropout=0.1)  # one step further each time
    result, watch = resumed(base, tmp_path, validation=HELD_OUT, lora_dropout=0.1)
    assert same_bits(whole, result) and watch.seen == [(3, 4)]


def test_float16_keeps_its_loss_scale(tiny, tmp_path):
    base = load_base(tiny, "float16")
    whole = fit(base, callbacks=[Stop(-1)])
    stopped(base, tmp_path, 8)
    (folder,) = tmp_path.iterdir()
    arrays, _ = checkpoint.load_checkpoint(folder, json.loads((folder / "checkpoint.json").read_text())["settings"])
    assert arrays["optimizer/loss_scale"] >= 1
    other = fit(base, start_seed=3, rows=rows_of(6, seed=9))  # what the shared model did in between does not matter
    assert np.isfinite(other[1].loss).all()
    assert same_bits(whole, resumed(base, tmp_path)[0])


def test_a_learning_rate_that_a_callback_lowered_stays_lowered(base, tmp_path):
    recipe = replace(RECIPE, schedule="constant")

    def lower(stop):
        return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5), stop]

    whole = fit(base, recipe, callbacks=lower(Stop(-1)))
    with pytest.raises(KeyboardInterrupt):
        fit(base, recipe, callbacks=lower(Stop(11)), checkpoint_dir=tmp_path)
    assert same_bits(whole, fit(base, recipe, callbacks=lower(Stop(-1)), checkpoint_dir=tmp_path))


def test_checkpoints_change_nothing_and_a_finished_fit_is_not_repeated(base, tmp_path):
    plain = fit(base)
    assert same_bits(plain, fit(base, checkpoint_dir=tmp_path, checkpoint_steps=1))
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 2  # the result, and no state of the optimizer
    arrays = safetensors.numpy.load(next(folder.glob("state-*")).read_bytes())
    assert all(name.startswith("adapter/") for name in arrays)
    result, watch = resumed(base, tmp_path / "elsewhere")
    assert watch.seen and same_bits(plain, result)
    result, watch = resumed(base, tmp_path / "elsewhere")
    assert not watch.seen and same_bits(plain, result)


def test_early_stopping_is_remembered(base, tmp_path):
    settings = dict(recipe=replace(RECIPE, epochs=40, learning_rate=0.05), validation=HELD_OUT, patience=2)
    whole = fit(base, callbacks=[Stop(-1)], **settings)
    assert 3 <= len(whole[1]) < 40
    stopped(base, tmp_path, 5 * len(whole[1]) - 2, **settings)  # in the last epoch, the best one being behind
    assert same_bits(whole, resumed(base, tmp_path, **settings)[0])


def test_half_a_minute_between_checkpoints(base, tmp_path, monkeypatch):
    written = []
    real = training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint", lambda *rest: (written.append(rest[3]), real(*rest)))
    fit(base, checkpoint_dir=tmp_path / "default")
    assert [progress.get("epoch") for progress in written] == [1, 2, 3, 4, None]  # each epoch, and the result
    written.clear()
    fit(base, checkpoint_dir=tmp_path / "two", checkpoint_steps=2)
    assert [(p["epoch"], p["batch"]) for p in written[:6]] == [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]
    written.clear()
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training.time, "monotonic", lambda: 0.0)  # writing takes no time
    fit(base, checkpoint_dir=tmp_path / "all")
    assert len(written) == 4 * 5 + 1


# --- whose checkpoint


def moved(folder, base, **settings):
    """Put a stopped fit's checkpoint where another fit looks for its own."""
    (source,) = folder.glob("fit-*")
    before = {path for path in folder.iterdir()}
    watch = Stop(1)
    with pytest.raises(KeyboardInterrupt):
        fit(base, callbacks=[watch], checkpoint_dir=folder / "other", **settings)
    names = []
    real = training.load_checkpoint
    training.load_checkpoint = lambda path, *rest: (names.append(path), real(path, *rest))[1]
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(base, callbacks=[Stop(1)], checkpoint_dir=folder / "other", **settings)
    finally:
        training.load_checkpoint = real
    shutil.rmtree(folder / "other")
    shutil.copytree(source, names[0])
    assert before <= set(folder.iterdir())
    return names[0]


OTHERS = {
    "other rows": (dict(rows=rows_of(10, seed=3)), "rows_digest was"),
    "fewer rows": (dict(rows=rows_of(8)), "rows was 10 and is 8"),
    "other epochs": (dict(recipe=replace(RECIPE, epochs=5)), "epochs was 4 and is 5"),
    "other rate": (dict(recipe=replace(RECIPE, learning_rate=0.01)), "learning_rate was 0.02 and is 0.01"),
    "other batches": (dict(recipe=replace(RECIPE, batch_size=5)), "batch_size was 2 and is 5"),
    "other seed": (dict(seed=4), "seed was 0 and is 4"),
    "other start": (dict(start_seed=4), "start_digest was"),
    "dropout": (dict(lora_dropout=0.1), "lora_dropout was 0.0 and is 0.1"),
    "held-out rows": (dict(validation=HELD_OUT), "validation_rows was 0 and is 4"),
    "template": (dict(settings={"template": "x"}), "template was null"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_fit_is_refused_with_the_difference(what, base, tmp_path):
    settings, named = OTHERS[what]
    stopped(base, tmp_path, 3)
    moved(tmp_path, base, **settings)
    with pytest.raises(RunError, match="is of another fit") as error:
        fit(base, callbacks=[Stop(-1)], checkpoint_dir=tmp_path / "other", **settings)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_of_another_base_is_refused(base, tmp_path):
    other = load_base(tiny_gemma(tmp_path / "base", seed=1))
    (tmp_path / "fits").mkdir()
    stopped(base, tmp_path / "fits", 3)
    moved(tmp_path / "fits", other)
    with pytest.raises(RunError, match="base was .* and is"):
        fit(other, callbacks=[Stop(-1)], checkpoint_dir=tmp_path / "fits" / "other")


def test_fits_side_by_side_do_not_meet(base, tmp_path):
    stopped(base, tmp_path, 3)
    stopped(base, tmp_path, 3, seed=1)
    assert len(list(tmp_path.glob("fit-*"))) == 2
    assert same_bits(resumed(base, tmp_path)[0], fit(base, callbacks=[Stop(-1)]))
    assert same_bits(resumed(base, tmp_path, seed=1)[0], fit(base, callbacks=[Stop(-1)], seed=1))


def test_other_versions_go_on_with_a_warning(base, tmp_path, monkeypatch):
    stopped(base, tmp_path, 3)
    monkeypatch.setattr(checkpoint, "version", lambda name: "0.0.1")
    with pytest.warns(UserWarning, match="jax was .* and is .0.0.1."):
        assert resumed(base, tmp_path)[0]


# --- damage

FAULTS = ("cut", "bit", "grown", "emptied", "missing tensor", "shape", "dtype", "json cut", "json bit", "json value",
          "json key", "gone")  # fmt: skip


def damage(folder, fault, rng, honest):
    """One fault; `honest` makes the digests right again, so that only the content can be judged."""
    state, description = next(folder.glob("state-*")), folder / "checkpoint.json"
    data, text = state.read_bytes(), description.read_bytes()
    if fault in ("cut", "json cut"):
        path, whole = (state, data) if fault == "cut" else (description, text)
        path.write_bytes(whole[: rng.randrange(len(whole))])
    elif fault in ("bit", "json bit"):
        path, whole = (state, bytearray(data)) if fault == "bit" else (description, bytearray(text))
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(whole)
    elif fault == "grown":
        state.write_bytes(data + bytes(rng.randrange(1, 100)))
    elif fault == "emptied":
        rng.choice((state, description)).write_bytes(b"")
    elif fault == "gone":
        state.unlink()
    elif fault in ("json value", "json key"):
        content = json.loads(text)
        part = content[rng.choice(("settings", "progress"))] if rng.random() < 0.7 else content
        name = rng.choice(sorted(part))
        if fault == "json key":
            del part[name]
        else:
            part[name] = [part[name], 1]
        description.write_text(json.dumps(content, indent=1) + "\n")
    else:
        tensors = safetensors.numpy.load(data)
        name = rng.choice(sorted(tensors))
        if fault == "missing tensor":
            del tensors[name]
        elif fault == "shape":
            tensors[name] = np.concatenate([np.atleast_1d(tensors[name])] * 2)
        else:
            tensors[name] = tensors[name].astype(rng.choice(("float16", "float64", "int64")))
        data = safetensors.numpy.save(tensors)
        state.write_bytes(data)
        if honest:
            content = json.loads(text)
            del content["sha256"]
            content |= {"bytes": len(data), "file_sha256": hashlib.sha256(data).hexdigest()}
            description.write_text(seal(content))


def refused_when_damaged(base, folder, count, seed):
    """Damage `count` copies of a checkpoint; how many of them were refused in one line, of how many kinds."""
    rng, lines, settings = random.Random(seed), [], dict(validation=HELD_OUT, lora_dropout=0.1)
    stopped(base, folder / "good", 13, **settings)
    finished = folder / "finished"
    fit(base, callbacks=[Stop(-1)], checkpoint_dir=finished, **settings)
    for number in range(count):
        copy = folder / "copy"
        shutil.copytree(folder / "good" if number % 4 else finished, copy)
        (part,) = copy.glob("fit-*")
        fault = FAULTS[number % len(FAULTS)]
        damage(part, fault, rng, honest=rng.random() < 0.7)
        before = {path: path.read_bytes() for path in part.iterdir()}
        watch = Stop(-1)
        with pytest.raises(RunError) as error:
            fit(base, callbacks=[watch], checkpoint_dir=copy, **settings)
        line = str(error.value)
        assert "\n" not in line and line.isprintable() and 20 < len(line) < 600, line
        assert "damaged" in line or "format" in line, line
        assert not watch.seen, (fault, "trained on")
        assert {path: path.read_bytes() for path in part.iterdir()} == before
        lines.append(fault)
        shutil.rmtree(copy)
    return len(lines), len(set(lines))


def test_damaged_checkpoints_are_refused(base, tmp_path):
    assert refused_when_damaged(base, tmp_path, 40, seed=0) == (40, len(FAULTS))


@pytest.mark.slow
def test_200_damaged_checkpoints_are_refused(base, tmp_path):
    print("refused, kinds of damage:", refused_when_damaged(base, tmp_path, 200, seed=int(time.time())))


def test_what_a_killed_writer_leaves_is_not_found(base, tmp_path):
    """The arrays without their description, half a description under its temporary name."""
    (tmp_path / "fits").mkdir()
    stopped(base, tmp_path / "fits", 3)
    (folder,) = (tmp_path / "fits").iterdir()
    (folder / "checkpoint.json").rename(folder / ".checkpoint.json.abc")
    result, watch = resumed(base, tmp_path / "fits")
    assert watch.seen[0] == (0, 0) and same_bits(result, fit(base, callbacks=[Stop(-1)]))
    assert len(list(folder.iterdir())) == 2


# --- kills

KILLED = """
import json, os, signal, sys
from gemma_lora_sentiment import GemmaLoraClassifier, training
from gemma_lora_sentiment import checkpoint, files
job = json.loads(sys.argv[1])
training.CHECKPOINT_SECONDS = 0.0
real = {"write": files.write_atomically, "save": training.save_checkpoint}
saves = 0

def die(*rest):
    os.kill(os.getpid(), signal.SIGKILL)

def write(path, data):  # killed within a checkpoint's writing: at half a file, between the files, before clearing up
    last = saves == job["save"]
    is_state = str(path).endswith(".safetensors")
    if last and job["stage"] == ("half state" if is_state else "half description"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.tmp"
        data = data if isinstance(data, bytes) else data.encode()
        temporary.write_bytes(data[: len(data) // 2])
        die()
    real["write"](path, data)
    if last and job["stage"] == ("state alone" if is_state else "both"):
        die()

def save(*rest):
    global saves
    saves += 1
    if saves == 1:
        print("training", flush=True)
    real["save"](*rest)

checkpoint.write_atomically, training.save_checkpoint = write, save
if job["train"]:
    from gemma_lora_sentiment.cli import app
    app(job["train"])
clf = GemmaLoraClassifier(**job["settings"]).fit(job["comments"], job["labels"])
clf.save(job["out"])
with open(job["out"] + "/history.json", "w") as file:
    json.dump(clf.history_.drop(columns="seconds").to_dict("list"), file)
"""
STAGES = ("half state", "state alone", "half description", "both")


def start(job):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    job = {"train": None, "save": -1, "stage": None, **job}
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(job)], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def killed(job, rng, at_write, seconds):
    """Whether the process was killed before it ended: while a checkpoint is written, or at a random moment."""
    if at_write:
        process = start({**job, "save": rng.randrange(1, 12), "stage": rng.choice(STAGES)})
    else:
        process = start(job)
        first = process.stdout.readline()
        assert "training" in first or process.wait() == 0, process.stderr.read()
        time.sleep(rng.uniform(0, seconds))
        process.kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), (out, err)
    return process.returncode != 0


def finish(job):
    process = start(job)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err)
    return out


def kill_fits(tiny, folder, wanted, seed, chain=(1, 4)):
    """Kill fits of a classifier until so many kills are done; every fit ends in the bits of one left in peace."""
    rng, kills, at_write, fits = random.Random(seed), 0, 0, 0
    comments = [line.split("\t")[1] for line in LINES.splitlines()]
    labels = [line.split("\t")[2] for line in LINES.splitlines()]
    settings = dict(preset=tiny, lora_rank=4, epochs=6, batch_size=2, learning_rate=0.01, max_length=32,
                    lora_dropout=0.1, validation_fraction=0.2, patience=5)  # fmt: skip
    peace = GemmaLoraClassifier(**settings).fit(comments, labels)
    while kills < wanted:
        job = {"settings": {**settings, "checkpoint_dir": str(folder / f"checkpoints{fits}")}, "comments": comments,
               "labels": labels, "out": str(folder / f"out{fits}")}  # fmt: skip
        ended = False
        for _ in range(rng.randint(*chain)):
            if not ended and kills < wanted:
                write = kills % 3 == 0
                ended = not killed(job, rng, write, seconds=0.8)
                kills, at_write = kills + (not ended), at_write + (write and not ended)
        if not ended:
            finish(job)
        saved = GemmaLoraClassifier.load(job["out"])
        for path, array in peace.adapter_.arrays.items():
            assert saved.adapter_.arrays[path].tobytes() == array.tobytes()
        history = json.loads((Path(job["out"]) / "history.json").read_text())
        assert history == peace.history_.drop(columns="seconds").to_dict("list")
        fits += 1
    return kills, at_write, fits


def kill_runs(tiny, folder, wanted, seed):
    """The same with `train --resume`."""
    rng, kills, runs = random.Random(seed), 0, 0
    (folder / "rows.tsv").write_text("id\tcomment\tlabel\n" + LINES, encoding="utf-8")
    arguments = ["train", str(folder / "rows.tsv"), "--preset", tiny, "--epochs", "4", "--rank", "4",
                 "--batch-size", "2", "--learning-rate", "0.01", "--max-length", "32", "--resume", "--out"]  # fmt: skip
    assert CliRunner().invoke(app, [*arguments, str(folder / "peace")]).exit_code == 0
    while kills < wanted:
        out = folder / f"run{runs}"
        ended = False
        while kills < wanted and not ended:
            ended = not killed({"train": [*arguments, str(out)]}, rng, kills % 3 == 2, seconds=1.5)
            kills += not ended
            assert (out / "checkpoint").is_dir() or (out / "run.json").is_file()
        if not ended:
            said = finish({"train": [*arguments, str(out)]})
            assert "run saved" in said or "finished" in said
        same_run(out, folder / "peace")
        assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
        runs += 1
    return kills, runs


def same_run(one, other):
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for name in ("adapter_model.safetensors", "adapter_config.json", "classifier.json", "wrong.tsv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    a, b = (pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (one, other))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    a, b = (json.loads((run / "metrics.json").read_text()) | {"seconds": 0} for run in (one, other))
    assert a == b


posix = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and locks of POSIX")


@posix
def test_killed_and_resumed_is_the_same_fit_and_run(tiny, tmp_path):
    """A fit is killed while a checkpoint is written, `train` at a random moment.

    Again and again: test_stopped_again_and_again, and by the twenty test_20_kills.
    """
    (tmp_path / "runs").mkdir()
    assert kill_fits(tiny, tmp_path, 1, 0, (1, 1)) == (1, 1, 1)
    assert kill_runs(tiny, tmp_path / "runs", 1, 0) == (1, 1)


@posix
@pytest.mark.slow
def test_20_kills(tiny, tmp_path):
    seed = int(time.time())
    (tmp_path / "runs").mkdir()
    kills, at_write, fits = kill_fits(tiny, tmp_path, 20, seed)
    print(f"\nseed {seed}: {kills} kills of fits, {at_write} while a checkpoint was written; {fits} fits, all equal")
    kills, runs = kill_runs(tiny, tmp_path / "runs", 20, seed)
    print(f"{kills} kills of train, {runs} runs, all equal")


# --- one process at a time


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("id\tcomment\tlabel\n" + LINES, encoding="utf-8")
    return path


def train(tiny, file, out, *more, status=0):
    """`train` in this process; its one line on standard error when it fails."""
    arguments = ["train", file, "--preset", tiny, "--epochs", 2, "--rank", 4, "--batch-size", 4, "--max-length", 32]
    result = CliRunner().invoke(app, [str(part) for part in [*arguments, "--quiet", "--out", out, *more]])
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    lines = result.stderr.splitlines()
    if status:
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert len(lines) == 1 and lines[0].startswith("error: ") and 20 < len(lines[0]) < 600, result.stderr
    return lines[0] if lines else result.stdout


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@posix
def test_second_process_is_refused_and_a_killed_one_blocks_nobody(tiny, rows_file, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", rows_file, "--preset", tiny, "--epochs", 1000, "--rank", 4, "--batch-size", 4,
                 "--max-length", 32, "--out", out]  # fmt: skip
    first = start({"train": [str(part) for part in arguments]})
    try:
        assert first.stdout.readline() == "training\n"
        first.send_signal(signal.SIGSTOP)  # it holds what it holds, and leaves this process the cores
        for more in ([], ["--resume"]):
            assert "Another process is writing to" in train(tiny, rows_file, out, *more, status=2)
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    assert (tmp_path / ".run.lock").exists()  # the killed process could not remove it
    assert "epochs was 1000 and is 2" in train(tiny, rows_file, out, "--resume", status=2)
    assert "is discarded" in train(tiny, rows_file, out)  # without --resume it starts anew
    train(tiny, rows_file, tmp_path / "peace")
    same_run(out, tmp_path / "peace")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peace", "rows.tsv", "run"]


def test_two_fits_on_one_checkpoint(base, tmp_path):
    stopped(base, tmp_path, 3)
    (folder,) = tmp_path.iterdir()
    with hold(folder.with_suffix(".lock"), folder), pytest.raises(RunError, match="Another process"):
        resumed(base, tmp_path)
    assert resumed(base, tmp_path)[1].seen


# --- full disks, folders that are read-only


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that sets its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def after_saves(monkeypatch, number, what):
    """Do something after so many checkpoints."""
    count, real = [0], training.save_checkpoint

    def save(*rest):
        count[0] += 1
        if count[0] == number + 1:
            what()
        real(*rest)

    monkeypatch.setattr(training, "save_checkpoint", save)


def test_disk_that_fills_up_in_training(small_disk, tiny, rows_file, tmp_path, monkeypatch):
    disk, resize = small_disk
    train(tiny, rows_file, tmp_path / "peace")
    before = {}

    def fill():
        before.update(files(disk))
        with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
        after_saves(patch, 7, fill)
        line = train(tiny, rows_file, disk / "run", status=1)
    assert "No space left" in line and "the one before is kept" in line
    (disk / "filler").unlink()
    after = files(disk)
    assert {name: data for name, data in before.items() if name.startswith("run/") and ".lock" not in name} == after
    assert any(name.endswith("/checkpoint.json") for name in after)
    train(tiny, rows_file, disk / "run", "--resume")
    same_run(disk / "run", tmp_path / "peace")


def test_disk_full_from_the_first_checkpoint_leaves_nothing(small_disk, tiny, rows_file, tmp_path, monkeypatch):
    disk, resize = small_disk
    after_saves(monkeypatch, 0, lambda: resize("12k"))
    assert "No space left" in train(tiny, rows_file, disk / "run", status=1)
    resize("16m")
    assert files(disk) == {} and list(disk.iterdir()) == []


def test_folder_made_read_only_in_training(tiny, rows_file, tmp_path, monkeypatch):
    """As root, as another user: permissions do not hold root back."""
    if os.name == "nt":
        pytest.skip("permissions of POSIX")
    train(tiny, rows_file, tmp_path / "peace")
    home = tmp_path / "home"
    home.mkdir()
    modules = [Path(sys.prefix, "lib"), Path(training.__file__)]  # some are imported late
    places = {parent for place in [*modules, Path(tiny, "config.json"), home] for parent in place.parents}
    closed = {place: place.stat().st_mode for place in places if not place.stat().st_mode & 0o001}
    out, before = home / "run", {}

    def lock_up():
        before.update(files(out))
        for folder in (out, out / "checkpoint", *out.glob("checkpoint/fit-*")):
            folder.chmod(0o555)

    is_root = os.geteuid() == 0
    try:
        if is_root:
            home.chmod(0o777)
            for place, mode in closed.items():
                place.chmod(mode | 0o011)
            os.seteuid(65534)
        with monkeypatch.context() as patch:
            patch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
            after_saves(patch, 7, lock_up)
            line = train(tiny, rows_file, out, status=1)
        assert "Permission denied" in line
        assert {name: data for name, data in files(out).items() if not name.endswith(".lock")} == {
            name: data for name, data in before.items() if not name.endswith(".lock")}  # fmt: skip
        for folder in (out, out / "checkpoint", *out.glob("checkpoint/fit-*")):
            folder.chmod(0o755)
        train(tiny, rows_file, out, "--resume")
    finally:
        if is_root:
            os.seteuid(0)
            for place, mode in closed.items():
                place.chmod(mode)
    same_run(out, tmp_path / "peace")


# --- runs that are resumed, replaced and repeated


def interrupt(*rest):
    raise KeyboardInterrupt


@pytest.fixture
def unfinished(tiny, rows_file, tmp_path, monkeypatch):
    """A run that was stopped in its first fit."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
        after_saves(patch, 3, interrupt)
        arguments = ["train", rows_file, "--preset", tiny, "--epochs", 2, "--rank", 4, "--batch-size", 4,
                     "--max-length", 32, "--out", tmp_path / "run"]  # fmt: skip
        result = CliRunner().invoke(app, [str(part) for part in arguments])
    assert result.exit_code in (1, 130) and "--resume" in result.stderr
    return tmp_path / "run"


CHANGES = {
    "seed": (["--seed", 3], "seed was 0 and is 3"),
    "rate": (["--learning-rate", 0.1], "learning_rate was"),
    "refit": (["--no-refit"], "refit was true and is false"),
    "template": (["--template", "{instruction} -> {response}"], "template was"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_resume_with_other_options_is_refused(what, unfinished, tiny, rows_file):
    options, named = CHANGES[what]
    before = files(unfinished)
    assert named in train(tiny, rows_file, unfinished, "--resume", *options, status=2)
    assert files(unfinished) == before


def test_resume_with_other_data_or_base_is_refused(unfinished, tiny, rows_file, tmp_path):
    before = files(unfinished)
    other = tmp_path / "other.tsv"
    other.write_text(rows_file.read_text().replace("맛있어요 0", "맛없어요 0"))
    line = train(tiny, other, unfinished, "--resume", status=2)
    assert f"started on 60 rows of {rows_file}, and is given 60 rows of {other} with other comments" in line
    other.write_text(rows_file.read_text() + "99\t하나 더\t1\n")
    line = train(tiny, other, unfinished, "--resume", status=2)
    assert f"started on 60 rows of {rows_file}, and is given 61 rows of {other}. Give the file" in line
    base = tiny_gemma(tmp_path / "base", seed=5)
    assert "base" in train(base, rows_file, unfinished, "--resume", status=2)
    assert files(unfinished) == before


def test_a_plan_of_an_earlier_version_is_gone_on_with(unfinished, tiny, rows_file, tmp_path):
    path = unfinished / "checkpoint" / "plan.json"
    plan = {name: value for name, value in unseal(path).items() if name not in ("source", "reading")}
    path.write_text(seal(plan), encoding="utf-8")
    other = tmp_path / "other.tsv"
    other.write_text(rows_file.read_text() + "99\t하나 더\t1\n")
    assert "started on 60 rows of a file, and is given 61" in train(tiny, other, unfinished, "--resume", status=2)
    train(tiny, rows_file, unfinished, "--resume")
    assert (unfinished / "run.json").is_file()


def test_a_run_of_a_version_that_computes_other_bits_is_not_gone_on_with(unfinished, tiny, rows_file):
    path = unfinished / "checkpoint" / "plan.json"
    before = unseal(path)
    for arithmetic in (None, before["arithmetic"] - 1):  # versions before this one kept none
        plan = {name: value for name, value in before.items() if name != "arithmetic"}
        path.write_text(seal(plan if arithmetic is None else {**plan, "arithmetic": arithmetic}), encoding="utf-8")
        line = train(tiny, rows_file, unfinished, "--resume", status=2)
        assert "a version of this package that computes otherwise" in line and "leave out --resume" in line
        assert not (unfinished / "run.json").exists()


def test_a_training_that_is_stopped_before_its_first_checkpoint_says_that_nothing_is_kept(
    tiny, rows_file, tmp_path, monkeypatch
):
    arguments = ["train", rows_file, "--preset", tiny, "--epochs", 2, "--rank", 4, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
        after_saves(patch, 0, interrupt)
        result = CliRunner().invoke(app, [str(part) for part in arguments])
    assert result.exit_code in (1, 130) and "--resume" not in result.stderr
    assert "stopped before the first checkpoint; nothing was kept" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.tsv"]


@pytest.mark.parametrize("name", ["plan.json", "checkpoint.json", "state"])
def test_resume_of_a_damaged_run_is_refused(name, unfinished, tiny, rows_file):
    (path,) = unfinished.rglob(f"{name}*")
    path.write_bytes(path.read_bytes()[:-7])
    before = files(unfinished)
    line = train(tiny, rows_file, unfinished, "--resume", status=2)
    assert "damaged" in line and path.name in line and files(unfinished) == before


def test_a_folder_named_checkpoint_of_the_users_is_left_alone(tiny, rows_file, tmp_path):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "mine.txt").write_text("mine")
    for more in ([], ["--resume"]):
        assert "is not of an unfinished run" in train(tiny, rows_file, tmp_path / "run", *more, status=2)
    assert files(tmp_path / "run") == {"checkpoint/mine.txt": b"mine"}


def test_a_run_that_cannot_be_trained_leaves_nothing(tiny, rows_file, tmp_path):
    line = train(tiny, rows_file, tmp_path / "run", "--learning-rate", 1e30, status=2)
    assert "is not finite" in line and "of epoch 1" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.tsv"]


def test_a_killed_training_over_a_finished_run_is_resumed(unfinished, tiny, rows_file, tmp_path):
    train(tiny, rows_file, tmp_path / "old", "--seed", 7)
    shutil.copytree(unfinished / "checkpoint", tmp_path / "old" / "checkpoint")
    train(tiny, rows_file, tmp_path / "old", "--resume")
    train(tiny, rows_file, tmp_path / "peace")
    same_run(tmp_path / "old", tmp_path / "peace")
    assert "finished" in train(tiny, rows_file, tmp_path / "old", "--resume")


def test_run_json_goes_last(unfinished, tmp_path):
    from gemma_lora_sentiment.run import _move_into

    new, old = tmp_path / "new", tmp_path / "old"
    for folder, text in ((new, "new"), (old, "old")):
        (folder / "z").mkdir(parents=True)
        for name in ("adapter_model.safetensors", "run.json", "z/last.png"):
            (folder / name).write_text(text)
    (old / "z" / "last.png").unlink()
    (old / "z" / "last.png").mkdir()  # this one cannot be replaced
    with pytest.raises(OSError):
        _move_into(new, old)
    assert not (old / "run.json").exists() and (old / "adapter_model.safetensors").read_text() == "new"
    (old / "z" / "last.png").rmdir()
    _move_into(new, old)
    assert {data for data in files(old).values()} == {b"new"} and not new.exists()


def test_repeating_a_run_gives_its_bits_and_refuses_other_rows(tiny, rows_file, tmp_path):
    train(tiny, rows_file, tmp_path / "one", "--no-refit", "--seed", 4, "--class-weight", "balanced")
    again = ["train", "--from", tmp_path / "one" / "run.json", "--quiet", "--out"]
    result = CliRunner().invoke(app, [str(part) for part in [*again, tmp_path / "two"]])
    assert (result.exit_code, result.stderr) == (0, "")
    same_run(tmp_path / "two", tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert {**one, "finished": ""} == {**two, "finished": ""}
    assert {"data", "settings", "recipe", "versions", "device", "dtype", "base_fingerprint"} <= set(one)
    other = tmp_path / "other.tsv"
    for text, named in ((LINES + "99\t하나 더\t1\n", "61 rows"), (LINES.replace("\t1\n", "\t2\n"), "labels")):
        other.write_text("id\tcomment\tlabel\n" + text, encoding="utf-8")
        arguments = ["train", other, *again[1:], tmp_path / "three"]
        result = CliRunner().invoke(app, [str(part) for part in arguments])
        assert result.exit_code == 2 and named in result.stderr and "60 rows" in result.stderr
        assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "three").exists()


def test_repeating_a_run_of_another_version(tiny, rows_file, tmp_path):
    """Its recipe's numbers are used, and the user is told."""
    train(tiny, rows_file, tmp_path / "one")
    run = json.loads((tmp_path / "one" / "run.json").read_text())
    run["recipe"]["weight_decay"], run["versions"]["jax"] = 0.5, "0.4.1"
    (tmp_path / "run.json").write_text(json.dumps(run))
    arguments = ["train", "--from", tmp_path / "run.json", "--quiet", "--out", tmp_path / "two"]
    result = CliRunner().invoke(app, [str(part) for part in arguments])
    assert result.exit_code == 0 and "the run had jax 0.4.1" in result.stderr
    settings = json.loads((tmp_path / "two" / "run.json").read_text())["settings"]
    assert settings["weight_decay"] == 0.5 and settings["learning_rate"] == "auto"
    run["base_fingerprint"] = "0" * 64
    (tmp_path / "run.json").write_text(json.dumps(run))
    result = CliRunner().invoke(app, [str(part) for part in [*arguments[:-1], tmp_path / "three"]])
    assert result.exit_code == 2 and "is not the one of the run" in result.stderr


def test_there_is_nothing_to_train_on(tmp_path):
    result = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "Give FILE" in result.stderr


# --- guards


def test_a_loss_that_is_not_finite_ends_the_fit_at_its_batch(base, monkeypatch):
    real, seen = training.BatchSequence.__getitem__, Stop(-1)

    def spoiled(self, index):
        batch, targets, weights = real(self, index)
        return batch, targets, weights * np.float32(np.nan if (self.epoch, index) == (1, 2) else 1)

    monkeypatch.setattr(training.BatchSequence, "__getitem__", spoiled)
    with pytest.raises(RunError, match=r"The loss of batch 3 of epoch 2 is not finite \(nan\), computed in float32"):
        fit(base, callbacks=[seen])
    assert (1, 1) in seen.seen and (2, 0) not in seen.seen


def test_a_step_that_does_not_move_the_adapter_ends_the_fit(base, monkeypatch):
    seen = Stop(-1)
    with pytest.raises(RunError, match="did not move in step 1 of epoch 1, computed in float32"):
        fit(base, replace(RECIPE, learning_rate=0.0), callbacks=[seen])
    assert seen.seen == []  # ended before the callbacks heard of the step


def test_a_batch_without_weight_may_leave_the_adapter_where_it_is(base):
    plan = training.BatchSequence(ROWS, (16,), 2, seed=0).plan(0)
    weights = np.ones(10, np.float32)
    weights[plan[0][1]] = 0
    assert fit(base, rows=replace(ROWS, weights=weights))[1].loss.gt(0).all()


@pytest.mark.parametrize("message, named", [
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.", "68719476736 bytes"),
    ("RESOURCE_EXHAUSTED: Out of memory allocating 12.50GiB [tf-allocator]", "12.50 GiB"),
    ("RESOURCE_EXHAUSTED: Failed to load program", "estimated"),
])  # fmt: skip
@pytest.mark.parametrize("at", [1, 7])
def test_out_of_memory_says_what_was_needed_and_what_to_lower(message, named, at, base, monkeypatch):
    good = fit(base)

    class Full(keras.callbacks.Callback):
        left = at

        def on_train_batch_begin(self, batch, logs=None):
            self.left -= 1
            if not self.left:
                raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(OutOfMemory) as error:
        fit(base, callbacks=[Full()])
    line = str(error.value)
    assert isinstance(error.value, RunError) and isinstance(error.value, MemoryError) and "\n" not in line
    assert named in line and "total 0.00 GB" in line and "activations" in line
    assert "batch_size=2" in line and "Lower batch_size or max_length, or use quantization='int8'." in line
    assert same_bits(good, fit(base))  # the base is as it was


def test_other_errors_of_the_device_stay_what_they_are(base):
    class Broken(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            raise jax.errors.JaxRuntimeError("INTERNAL: no memory of it")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fit(base, callbacks=[Broken()])


def test_out_of_memory_in_the_shell_is_status_1(tiny, rows_file, tmp_path, monkeypatch):
    def full(*rest):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")

    monkeypatch.setattr(training._Guard, "step", full)
    line = train(tiny, rows_file, tmp_path / "run", status=1)
    assert "Out of memory at batch_size=4" in line and sorted(path.name for path in tmp_path.iterdir()) == ["rows.tsv"]
