"""Requests of many clients at once against `serve`.

    python -m benchmarks.web.load RUN [--clients 32 --seconds 60 --rows 16]

Prints one line of JSON: median and 95th percentile of the answer times, rows a second beside those of offline scoring
in this process before the server starts, errors, and the server's memory along the way. Server and clients share the
machine.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np

from gemma_lora_sentiment import GemmaLoraClassifier, read_comments

SERVE = "from gemma_lora_sentiment.cli import app; app()"


def offline(run: Path, comments: list[str], seconds: float) -> float:  # rows a second
    clf = GemmaLoraClassifier.load(run)
    clf.predict_proba(comments[:512])
    rows, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        at = rows % (len(comments) - 512)
        rows += len(clf.predict_proba(comments[at : at + 512]))
    return rows / (time.perf_counter() - started)


def memory(pid: int) -> float:  # MB resident
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1)


async def client(host: str, port: int, requests: list[bytes], start: int, until: float, times: list, errors: list):
    reader, writer = await asyncio.open_connection(host, port)
    for number in count(start):
        if time.perf_counter() >= until:
            break
        body = requests[number % len(requests)]
        head = f"POST /predict HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        asked = time.perf_counter()
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(re.search(r"content-length: (\d+)", answer)[1]))
        if not answer.startswith("http/1.1 200"):
            errors.append(answer.splitlines()[0])
        times.append(time.perf_counter() - asked)
    writer.close()


async def load(address: str, requests: list[bytes], clients: int, seconds: float, pid: int) -> dict:
    host, port = re.fullmatch(r"http://(.+):(\d+)", address).groups()
    times, errors, held, started = [], [], [memory(pid)], time.perf_counter()
    until = started + seconds
    given = (host, int(port), requests)
    tasks = [asyncio.create_task(client(*given, 97 * i, until, times, errors)) for i in range(clients)]
    while time.perf_counter() < until:
        await asyncio.sleep(seconds / 6)
        held.append(memory(pid))
    await asyncio.gather(*tasks)
    took = time.perf_counter() - started
    p50, p95 = (round(1000 * float(value), 1) for value in np.percentile(times, [50, 95]))
    return {"requests": len(times), "errors": len(errors), "p50_ms": p50, "p95_ms": p95, "seconds": round(took, 1),
            "memory_mb": held}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rows", type=int, default=16, help="comments of a request")
    given = parser.parse_args()
    comments = read_comments("sample_extra").comment.tolist()[:20_000]
    alone = offline(given.run, comments, min(20, given.seconds))
    parts = [comments[at : at + given.rows] for at in range(0, len(comments) - given.rows, given.rows)]
    requests = [json.dumps({"comments": part}).encode() for part in parts]
    command = [sys.executable, "-c", SERVE, "serve", str(given.run), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        address = next(found[1] for line in server.stdout if (found := re.search(r"listening on (\S+)", line)))
        result = asyncio.run(load(address, requests, given.clients, given.seconds, server.pid))
    finally:
        server.terminate()
        server.wait()
    rate = result["requests"] * given.rows / result["seconds"]
    print(json.dumps({"clients": given.clients, "rows_a_request": given.rows, **result, "rows_a_second": round(rate),
                      "offline_rows_a_second": round(alone), "share": round(rate / alone, 2)}))  # fmt: skip


if __name__ == "__main__":
    main()
