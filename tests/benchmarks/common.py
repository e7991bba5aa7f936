# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: models at real shapes, timing side by side, peak memory in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from smn_peft import MaskConfig

SHAPES = {"resnet18": "resnet18", "vit_tiny": "vit_tiny_patch16_224"}
BATCH, SIZE, CLASSES = 64, 64, 100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(name: str, size: int = SIZE) -> nn.Module:
    """A fresh model for images of `size` pixels, random weights."""
    torch.manual_seed(0)
    options = {"img_size": size} if name.startswith("vit") else {}
    return timm.create_model(SHAPES[name], num_classes=CLASSES, **options).to(DEVICE)


def head_name(name: str) -> str:
    """Name of the classifier."""
    return "fc" if name == "resnet18" else "head"


def masked(name: str, batch_norm: str = "adapt", size: int = SIZE, rate: float = 0.0) -> nn.Module:
    """The same model under a fresh mask adapter."""
    config = MaskConfig(batch_norm=batch_norm, modules_to_save=[head_name(name)], rate=rate)
    return get_peft_model(build(name, size), config)


def synchronise() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def step_of(
    model: nn.Module,
    score_lr: float = 1.0,
    size: int = SIZE,
    sgd: type[torch.optim.SGD] = torch.optim.SGD,
    compiled: bool = False,
) -> Callable[[], None]:
    """One optimizer step of cross-entropy, and a mask's rate, with SGD with momentum on everything that trains."""
    model.train()
    groups = [
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and "smn_" in n], "lr": score_lr},
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and "smn_" not in n], "lr": 1e-3},
    ]
    optimizer = sgd([g for g in groups if g["params"]], momentum=0.9)
    images = torch.randn(BATCH, 3, size, size, device=DEVICE)
    labels = torch.randint(CLASSES, (BATCH,), device=DEVICE)
    rate: Callable[[], torch.Tensor | None] | None = getattr(model, "rate", None)
    forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(images), labels)
        bits = rate() if rate is not None else None
        (loss if bits is None else loss + bits).backward()
        optimizer.step()

    return step


def ratio(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float, list[float]]:
    """Median seconds of two functions run in turn, and their ratio first / second in every round."""
    times: list[tuple[float, float]] = []
    for index in range(rounds + 2):
        row = []
        for function in (first, second) if index % 2 else (second, first):
            synchronise()
            start = time.perf_counter()
            function()
            synchronise()
            row.append(time.perf_counter() - start)
        times.append((row[0], row[1]) if index % 2 else (row[1], row[0]))
    times = times[2:]
    return (
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        [a / b for a, b in times],
    )


def peak_in_subprocess(script: str, *arguments: str) -> int:
    """Peak bytes that a benchmark script reports, run with the given arguments."""
    command = [sys.executable, script, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1])["peak"])


def peak_of(make: Callable[[], Callable[[], None]]) -> int:
    """Peak bytes of all tensors while a model is made and takes three steps; once per process, by torch's count.

    Not the process's own peak: that moves by as much as the weights of ResNet-18 from run to run.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=DEVICE == "cpu") as profiler:
        step = make()
        for _ in range(3):
            step()
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
