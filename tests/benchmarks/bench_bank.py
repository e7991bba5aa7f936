# SPDX-License-Identifier: Apache-2.0
"""Switching tasks and mixed batches on a model of ViT-B/32's size, beside PEFT's LoRA in the same run.

What is compared takes turns, and a ratio is the median of the rounds' ratios. On a CPU everything, the copies too,
runs on one thread and times are that thread's CPU time, which other processes disturb little. Floors: a dense write
reads 4.125 bytes per weight and writes 4, a copy reads and writes 4; a mixed batch costs at least one shared forward.
Mixed batches run through two of the twelve blocks, all of which are alike, without the patches' embedding.

``bench_bank.py PART …`` runs some of dense_write, switch, registered, mixed, lora.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import timm
import torch
from common import DEVICE, synchronise
from peft import LoraConfig, get_peft_model
from recording import Recorder
from torch import nn

from smn_peft.bank.bank import MaskBank
from smn_peft.bank.source import MemorySource, StoredAdapter
from smn_peft.bank.store import DiskStore, TaskSource
from smn_peft.functional.effective import write_masked
from smn_peft.functional.packing import pack_bits

TARGETS = ["qkv", "proj", "fc1", "fc2"]
BATCH, TOKENS = 64, 49
RECORDER = Recorder("bank", DEVICE)


def build(depth: int = 12) -> nn.Module:
    """ViT-B/32 at 224 px without its patches' embedding, random weights: takes (batch, 49, 768)."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch32_224", num_classes=100, depth=depth).to(DEVICE).eval()
    model.patch_embed = nn.Identity()
    return model


def tokens() -> torch.Tensor:
    """A batch."""
    return torch.randn(BATCH, TOKENS, 768, device=DEVICE)


def random_bits(density: float) -> torch.Tensor:
    """A long row of random bits."""
    return pack_bits(torch.rand(1 << 23) < density)


def stored(model: nn.Module, bits: torch.Tensor, seed: int) -> StoredAdapter:
    """A bit-packed adapter over all blocks, its masks cut from a row of random bits at other places for every seed."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            size = module.weight.numel() // 8
            start = (977 * seed + len(tensors) * 7919) % (len(bits) - size)
            tensors[f"base_model.model.{name}.smn_mask"] = bits[start : start + size].clone()
    return StoredAdapter({"scale": True, "peft_type": "SMN"}, tensors)


def bank_of(model: nn.Module, density: float, number: int, source: TaskSource | None = None) -> MaskBank:
    """A bank with tasks "t0", "t1", … over a model, all decoded."""
    bank, bits = MaskBank(MemorySource() if source is None else source, model, exclusive=True), random_bits(density)
    for seed in range(number):
        bank._source.add(f"t{seed}", stored(model, bits, seed))
        bank.pin(f"t{seed}")
    return bank


def taking_turns(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[float, float, list[float]]:
    """Median milliseconds of both, and every round's ratio first / second; a first round does not count."""
    clock = time.process_time if DEVICE == "cpu" else time.perf_counter
    times: list[list[float]] = [[], []]
    for index in range(rounds + 1):
        for which in (0, 1) if index % 2 else (1, 0):
            synchronise()
            start = clock()
            (first, second)[which]()
            synchronise()
            times[which].append(1e3 * (clock() - start))
    pairs = list(zip(times[0][1:], times[1][1:], strict=True))
    return (*(statistics.median(mine[1:]) for mine in times), [a / b for a, b in pairs])


def row(
    what: str,
    measured: tuple[float, float, list[float]],
    target: float | None = None,
    calls: int = 1,
    better: str | None = "lower",
) -> None:
    """Print and record one comparison, of times that `calls` calls took each."""
    first, second = (f"{value / calls:.{4 if value < calls else 1}f} ms" for value in measured[:2])
    ratio = RECORDER.add(what, "ViT-B/32", measured[2], target=target, better=better)
    print(f"| {what} | {first} / {second} | {ratio:.3f} | {'' if target is None else f'≤ {target}'} |", flush=True)


def turning(bank: MaskBank) -> None:
    """Two switches."""
    bank.activate("t0")
    bank.activate("t1")


def dense_write() -> None:
    """A dense write of all weights against a copy of the same bytes."""
    weights = [m.weight.detach().view(-1) for n, m in build().named_modules() if isinstance(m, nn.Linear)]
    outs = [torch.empty_like(weight) for weight in weights]
    bits = [pack_bits(torch.rand(weight.numel()) < 0.9).to(DEVICE) for weight in weights]

    def copy() -> None:
        for out, weight in zip(outs, weights, strict=True):
            out.copy_(weight)

    def write() -> None:
        for out, weight, packed in zip(outs, weights, bits, strict=True):
            write_masked(out, weight, packed)

    row("dense write / copy of the same bytes", taking_turns(write, copy, 15), 2.5)


def switch() -> None:
    """Switching between decoded sparse and dense tasks, and from stored bytes."""
    sparse, dense = bank_of(build(), 0.999, 2), bank_of(build(), 0.9, 2)
    row(
        "switch at 99.9 % / at 90 %, decoded",
        taking_turns(partial(turning, sparse), partial(turning, dense), 9),
        0.125,
        2,
    )
    del dense
    with tempfile.TemporaryDirectory() as folder, DiskStore(Path(folder) / "store") as store:
        fresh = bank_of(build(), 0.999, 2, store)

        def first() -> None:
            for name in ("t0", "t1"):
                fresh._tasks.drop(name)
                fresh.activate(name)

        measured = taking_turns(first, partial(turning, sparse), 9)
        row("switch to a stored task, read and decoded / decoded before, 99.9 %", measured, calls=2)


def registered() -> None:
    """Lookup and switch in stores of 10 and of 10,000 tasks."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        banks = []
        for number in (10_000, 10):
            store = stack.enter_context(DiskStore(Path(folder) / f"of_{number}"))
            model = build()
            banks.append(bank_of(model, 0.999, 2, store))
            store.add("t2", StoredAdapter({"peft_type": "SMN"}, {"fc.smn_mask": pack_bits(torch.rand(999) < 0.9)}))
            small = store.read("t2")
            store.add_many((f"other{index}", small) for index in range(3, number))
        names: Iterator[str] = (f"t{index % 2}" for index in count())
        many, few = (partial(lambda bank: [bank.task(next(names)) for _ in range(200)], bank) for bank in banks)
        row("lookup with 10,000 tasks / with 10", taking_turns(many, few, 25), 1.2, calls=200)
        many, few = (partial(turning, bank) for bank in banks)
        row("switch with 10,000 tasks / with 10", taking_turns(many, few, 25), 1.2, calls=2)


def mixed() -> None:
    """Mixed batches against one forward of the bare model."""
    images, bare = tokens(), build(depth=2)
    for number, density, limit in ((8, 0.995, 1.15), (8, 0.9, None), (64, 0.999, 1.25), (64, 0.995, 1.25)):
        bank = bank_of(build(depth=2), density, number)
        names = [f"t{index % number}" for index in range(BATCH)]
        with torch.no_grad():
            measured = taking_turns(partial(bank, images, names), partial(bare, images), 4)
        row(f"mixed batch of {BATCH}, {number} tasks at {100 * density:g} % / one forward", measured, limit)


def lora() -> None:
    """PEFT's LoRA with 2 and with 34 adapters, and a mixed batch of 8: the peer's own figures, to read beside ours."""
    config = LoraConfig(r=8, target_modules=TARGETS)
    models = [get_peft_model(build(), config).eval() for _ in range(2)]
    for model, number in zip(models, (34, 2), strict=True):
        for index in range(1, number):
            model.add_adapter(f"t{index}", config)

    def turn(model: nn.Module) -> None:
        for name in ("default", "t1"):
            model.set_adapter(name)

    row(
        "LoRA: set_adapter with 34 / with 2",
        taking_turns(*(partial(turn, m) for m in models), 9),
        calls=2,
        better=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        models[1].save_pretrained(folder, selected_adapters=["default"])

        def load(model: nn.Module) -> None:
            model.load_adapter(folder, "loaded")
            model.delete_adapter("loaded")

        row("LoRA: load_adapter with 34 / with 2", taking_turns(*(partial(load, m) for m in models), 3), better=None)
    images, bare, served = tokens(), build(depth=2), get_peft_model(build(depth=2), config).eval()
    for index in range(1, 8):
        served.add_adapter(f"t{index}", config)
    names = ["default" if index % 8 == 0 else f"t{index % 8}" for index in range(BATCH)]
    with torch.no_grad():
        measured = taking_turns(lambda: served(images, adapter_names=names), lambda: bare(images), 4)
    row(f"LoRA: mixed batch of {BATCH}, 8 adapters / one forward", measured, better=None)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: else each forward's activations are mapped anew, which is timed at random."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    print(f"ViT-B/32, {DEVICE}, {torch.get_num_threads()} threads")
    print("| what | times | ratio | target |")
    print("|---|---|---|---|")
    parts = {part.__name__: part for part in (dense_write, switch, registered, mixed, lora)}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
