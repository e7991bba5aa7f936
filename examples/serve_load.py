#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Load on `smn serve`: clients ask for random tasks, and every answer is compared with the task's own logits.

Without arguments it makes 20 adapters with random masks over a small random ViT. Over a bank of yours:
``serve_load.py BANK --base NAME --seconds 300 --clients 16``. Over 1,000 tasks of a real ViT-Tiny, see
`serve_tasks.py`: ``serve_load.py --real --seconds 300``. It measures a server, and nothing of the paper.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from serve_parts import figures, logits_of_all, pictures, small_bank
from serve_tasks import real_bank


def ask(connection: http.client.HTTPConnection, image: bytes, task: str) -> torch.Tensor:
    """The logits that the server gives."""
    body = {"image": base64.b64encode(image).decode(), "task": task, "logits": True}
    connection.request("POST", "/v1/predict", json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    return torch.tensor(answer["results"][0]["logits"])


def load(port: int, files: list[bytes], expected: dict[str, torch.Tensor], args: argparse.Namespace) -> int:
    """Let the clients ask, print what came of it, and return the number of errors."""
    times, problems, memory, names = [], [], [], sorted(expected)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        for task in names:  # what is decoded once is there from the start: memory shows what grows besides
            ask(connection, files[0], task)
    started = time.monotonic()

    def client(seed: int) -> None:
        pick, connection = random.Random(seed), http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.monotonic() < started + args.seconds:
            task, index, before = pick.choice(names), pick.randrange(len(files)), time.perf_counter()
            try:
                logits = ask(connection, files[index], task)
                times.append(time.perf_counter() - before)
                torch.testing.assert_close(logits, expected[task][index], rtol=1e-3, atol=1e-3)
            except Exception as error:
                problems.append(f"{task}: {error!r}")
                connection.close()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(args.clients)]
    for thread in threads:
        thread.start()
    while threads[0].is_alive():
        memory.append(figures(port))
        threads[0].join(args.seconds / 20)
    for thread in threads:
        thread.join()
    seconds, (p50, p99) = time.monotonic() - started, 1000 * np.quantile(times or [np.nan], [0.5, 0.99])
    print(f"{len(names)} tasks, {args.clients} clients, {len(times)} requests in {seconds:.1f} s: ", end="")
    print(f"{len(times) / seconds:.1f} requests/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms, {len(problems)} errors")
    all_, decoded = zip(*(memory[int(part * (len(memory) - 1))] for part in (0, 0.5, 1)), strict=True)
    print("resident memory {:.0f} MiB at the start, {:.0f} half-way, {:.0f} at the end, ".format(*all_), end="")
    print("of which decoded tasks {:.0f}, {:.0f}, {:.0f}".format(*decoded))
    print("".join(f"{problem}\n" for problem in problems[:5]), end="")
    return len(problems)


def main() -> None:
    """Make a bank if none is named, start a server over it, and load it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bank", nargs="?", help="folder of a bank, or of adapters")
    for option, kind in [("base", str), ("weights", str), ("image-size", int)]:
        parser.add_argument(f"--{option}", type=kind, help="as in smn serve")
    parser.add_argument("--head", default="head", help="as in smn serve")
    parser.add_argument("--real", action="store_true", help="train --masks masks and fill up to --tasks tasks")
    counts = {"clients": 8, "images": 4, "tasks": 1000, "masks": 20, "steps": 15, "ram-budget": 1024}
    for option, default in {"seconds": 5.0, **counts}.items():
        parser.add_argument(f"--{option}", type=type(default), default=default)
    with tempfile.TemporaryDirectory() as folder:
        args = parser.parse_args()
        if args.bank is None:
            made = (
                real_bank(Path(folder), args.tasks, args.masks, args.steps) if args.real else small_bank(Path(folder))
            )
            args = parser.parse_args(made, args)
        files = pictures(args.images)
        options = {"weights": args.weights, "image_size": args.image_size}
        expected = logits_of_all(files, args.bank, args.base, head_name=args.head, **options)
        command = [sys.executable, "-m", "smn_peft.cli", "serve", args.bank, "--port=0"]
        options |= {"base": args.base, "head": args.head, "ram_budget": args.ram_budget}
        command += [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value is not None]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            said = iter(server.stderr.readline, "")
            port = next(int(found[1]) for line in said if (found := re.search(r"running on http://.*:(\d+)", line)))
            try:
                errors = load(port, files, expected, args)
            finally:
                server.terminate()
            print("the server's last words:", *(line.strip() for line in said), sep="\n  ")
    sys.exit(bool(errors or server.returncode))


if __name__ == "__main__":
    main()
