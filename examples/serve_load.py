# SPDX-License-Identifier: Apache-2.0
"""Load on `smn serve`: clients ask for random tasks, and every answer is compared with the task's own logits.

Without arguments it makes 10 adapters with random masks over a small random ViT. Over a bank of yours:
``serve_load.py BANK --base NAME --seconds 300 --clients 16``. It measures a server, and nothing of the paper.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import timm
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import save_file

from smn_peft import MaskConfig
from smn_peft.data import evaluation_transform
from smn_peft.data.decoding import decode_rgb
from smn_peft.serving.bank import open_bank


def small_bank(folder: Path) -> list[str]:
    """Save a base and 10 adapters of it; returns the arguments that name them."""
    for task in range(10):
        torch.manual_seed(0)
        base = timm.create_model("test_vit", num_classes=10)
        save_file(base.state_dict(), folder / "base.safetensors")
        model = get_peft_model(base, MaskConfig(modules_to_save=["head"]))
        torch.manual_seed(task)
        for name, parameter in model.named_parameters():
            if "smn_" in name:
                parameter.data = 0.9 + task / 100 - torch.rand_like(parameter)  # 90 to 99 % stay on
            elif "head.modules_to_save" in name:
                parameter.data = torch.randn_like(parameter)
        model.save_pretrained(str(folder / "bank" / f"task-{task:02}"))
    return [str(folder / "bank"), "--base=test_vit", f"--weights={folder / 'base.safetensors'}"]


def pictures(count: int) -> list[bytes]:
    """JPEG files of 320 × 240 pixels, smooth noise."""
    files = []
    for small in np.random.default_rng(0).integers(0, 256, (count, 12, 16, 3), dtype=np.uint8):
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG")
        files.append(file.getvalue())
    return files


def logits_of_all(files: list[bytes], args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """(images, classes) by task, one task after the other and without a server."""
    options = {"weights": args.weights, "image_size": args.image_size, "head_name": args.head}
    bank, backbone, _ = open_bank(args.bank, args.base, **options, read_only=True)
    transform = evaluation_transform(backbone.image_size, backbone.mean, backbone.std)
    images, found = torch.stack([transform(decode_rgb(file, "image")) for file in files]), {}
    with bank, torch.no_grad():
        for name in bank.names:
            with bank.use(name) as model:
                found[name] = model(images)["logits"]
    return found


def ask(connection: http.client.HTTPConnection, image: bytes, task: str) -> torch.Tensor:
    """The logits that the server gives."""
    body = {"image": base64.b64encode(image).decode(), "task": task, "logits": True}
    connection.request("POST", "/v1/predict", json.dumps(body), {"Content-Type": "application/json"})
    return torch.tensor(json.loads(connection.getresponse().read())["results"][0]["logits"])


def memory(port: int) -> float:
    """MiB that the server has in memory."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[1]) / (1 << 20)


def load(port: int, files: list[bytes], expected: dict[str, torch.Tensor], args: argparse.Namespace) -> int:
    """Let the clients ask, print what came of it, and return the number of errors."""
    times, problems, names = [], [], sorted(expected)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        for task in names:  # decode every task once, so that memory shows what grows besides
            ask(connection, files[0], task)
    before, started = memory(port), time.monotonic()

    def client(seed: int) -> None:
        pick, connection = random.Random(seed), http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.monotonic() < started + args.seconds:
            task, index, asked = pick.choice(names), pick.randrange(len(files)), time.perf_counter()
            try:
                logits = ask(connection, files[index], task)
                times.append(time.perf_counter() - asked)
                torch.testing.assert_close(logits, expected[task][index], rtol=1e-3, atol=1e-3)
            except Exception as error:
                problems.append(f"{task}: {error!r}")
                connection.close()

    with ThreadPoolExecutor(args.clients) as clients:
        list(clients.map(client, range(args.clients)))
    seconds, (p50, p99) = time.monotonic() - started, 1000 * np.quantile(times or [np.nan], [0.5, 0.99])
    print(f"{len(names)} tasks, {args.clients} clients, {len(times)} requests in {seconds:.1f} s: ", end="")
    print(f"{len(times) / seconds:.1f} requests/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms, {len(problems)} errors")
    print(f"resident memory {before:.0f} MiB at the start, {memory(port):.0f} at the end")
    print("".join(f"{problem}\n" for problem in problems[:5]), end="")
    return len(problems)


def main() -> None:
    """Make a bank if none is named, start a server over it, and load it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bank", nargs="?", help="folder of a bank, or of adapters")
    for option, kind in {"base": str, "weights": str, "image-size": int}.items():
        parser.add_argument(f"--{option}", type=kind, help="as in smn serve")
    for option, default in {"head": "head", "seconds": 5.0, "clients": 8, "images": 4}.items():
        parser.add_argument(f"--{option}", type=type(default), default=default)
    with tempfile.TemporaryDirectory() as folder:
        args = parser.parse_args()
        if args.bank is None:
            args = parser.parse_args(small_bank(Path(folder)), args)
        files = pictures(args.images)
        expected = logits_of_all(files, args)
        options = {name: getattr(args, name) for name in ("base", "weights", "image_size", "head")}
        command = [sys.executable, "-m", "smn_peft.cli", "serve", args.bank, "--port=0"]
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
