"""A process for each task: what it is given, what it writes down while it runs, and how it is ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any


class ProcessLog:
    "Lines of JSON, and the clock that started when the process was asked for."

    def __init__(
        self,
        path: str,  # of the file of lines
        spawned: float,  # seconds since 1970, when the process was asked for
        time_limit: float,  # seconds from then on
    ):
        self.path = path
        self.spawned = spawned
        self.time_limit = time_limit

    def __call__(self, **numbers: Any) -> None:
        "Write a line."
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")

    def elapsed(self) -> float:  # seconds
        "Since the process was asked for."
        return time.time() - self.spawned

    def is_over(
        self,
        needed: float = 0.0,  # seconds more
    ) -> bool:
        "Whether the time is, or would be."
        return self.elapsed() + needed > self.time_limit


def read_log(
    path: Path,  # of a ProcessLog
) -> dict[str, Any]:  # the last of each name, lists whole
    "What a process wrote down, its last line perhaps cut."
    record: dict[str, Any] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a process was ended within its last line
            for name, value in json.loads(line).items():
                record[name] = record.get(name, []) + value if isinstance(value, list) else value
    return record


def log_epoch(log: ProcessLog, seconds: float, done: int, steps: int) -> None:
    if done == steps:
        log(epochs=[seconds])
    elif done:
        log(partial={"seconds": seconds, "steps": done, "of": steps})


def device_peak_bytes() -> int:  # bytes
    "The most that this process, which uses JAX, held on its device, or as a whole on a CPU."
    import jax

    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return int(stats["peak_bytes_in_use"]) if stats else resident_peak_bytes()


def resident_peak_bytes() -> int:  # bytes
    "The most that this process held."
    with contextlib.suppress(OSError, IndexError, ValueError):
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(text.split("VmHWM:")[1].split()[0]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def median_seconds(
    function: Callable[[], Any],  # returns when its work is done
    repeats: int = 5,
) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def run_task(
    tasks: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any], ProcessLog], None]],  # by name
) -> None:
    "Run, in a process, the task whose description is at the path that is the process's one argument."
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    log = ProcessLog(spec["log"], spec["spawned"], spec["settings"]["time_limit"])
    rows = json.loads(Path(spec["rows"]).read_text(encoding="utf-8"))
    try:
        tasks[spec["task"]](spec, rows, log)
    except Exception as error:  # whatever it is, the other systems go on; it is shown in the table
        log(failed=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        raise
    log(finished=True)


_GRACE = 20.0  # seconds between the time limit and the end of a process that does not stop by itself
_NAME = "gemma_lora_sentiment_benchmarks"  # of this package in a process; another one may be called `benchmarks`


def _child_code(module: str) -> str:  # Python
    "What a process does: load this package by its place, and run the module's task."
    begin = Path(__file__).resolve().with_name("__init__.py")
    return f"""
import sys
from importlib import import_module, util
spec = util.spec_from_file_location({_NAME!r}, {str(begin)!r})
sys.modules[spec.name] = package = util.module_from_spec(spec)
spec.loader.exec_module(package)
import_module({f"{_NAME}.{module}"!r}).run_child()
"""


def process_environment(
    cache: Path,  # folder of its compile cache
    fraction: float | None = None,  # of the GPU's memory that XLA may take
) -> dict[str, str]:
    "Variables of a process that has no cache but this one."
    of_cache = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")  # the user's own would be warm
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_cache)}
    here = str(Path(str(files("gemma_lora_sentiment"))).parent)  # so that the processes import this same package
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, environment.get("PYTHONPATH")]))
    environment |= {"GEMMA_LORA_SENTIMENT_CACHE": str(cache), "KERAS_BACKEND": "jax", "PYTHONIOENCODING": "utf-8"}
    if fraction is not None:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.4f}"
    return environment


def run_process(
    folder: Path,  # with rows.json
    spec: Mapping[str, Any],  # task, settings with a time_limit, and what the task takes
    environment: Mapping[str, str],  # of process_environment
    module: str = "random_weights",  # of this package, whose run_child is the entry
) -> dict[str, Any]:
    "Run one task and return what it wrote down, however it ended."
    path, log_path = folder / "spec.json", folder / "log.jsonl"
    log_path.unlink(missing_ok=True)
    content = {**spec, "log": str(log_path), "rows": str(folder / "rows.json"), "spawned": time.time()}
    path.write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, "-P", "-c", _child_code(module), str(path)]  # -P: not what lies in the current folder
    with open(folder / "errors.txt", "w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            status = process.wait(spec["settings"]["time_limit"] + _GRACE)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # Ctrl-C must not leave it behind
            process.kill()
            process.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1][:200]
    record = read_log(log_path)
    if status is None:
        record["ended"] = True
    elif "finished" not in record and "failed" not in record:
        record["failed"] = f"exit status {status}: {last}"
    return record


def memory_fraction(
    memory_limit: float | None,  # GB of GPU memory for a process
) -> float | None:  # share of the GPU's memory that XLA may take
    "What a limit is of this GPU. Raises `ValueError` where there is none, or it is no limit."
    if memory_limit is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        total = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        fraction = memory_limit * 1e9 / (float(total) * 2**20)
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        raise ValueError("memory_limit needs an NVIDIA GPU and its nvidia-smi. Leave it out.") from None
    if not 0 < fraction <= 0.94:
        most = 0.94 * float(total) * 2**20 / 1e9
        raise ValueError(f"memory_limit={memory_limit} must be above 0 and at most {most:.1f} (GB) here.")
    return fraction
