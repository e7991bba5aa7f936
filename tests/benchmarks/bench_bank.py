# SPDX-License-Identifier: Apache-2.0
"""Switching tasks and mixed batches on a model of ViT-B/32's size, beside PEFT's LoRA in the same run.

Floors: a dense write reads 4.125 bytes per weight and writes 4, a copy reads and writes 4; a mixed batch costs at
least one shared forward.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import timm
import torch
from common import DEVICE
from peft import LoraConfig, get_peft_model
from torch import nn

from smn_peft.bank.bank import MaskBank
from smn_peft.bank.live_tensor import write_masked
from smn_peft.bank.source import MemorySource, StoredAdapter
from smn_peft.functional.packing import pack_bits

TARGETS = ("qkv", "proj", "fc1", "fc2")
BATCH = 64


def build() -> nn.Module:
    """ViT-B/32 at 224 px, random weights."""
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch32_224", num_classes=100).to(DEVICE).eval()


def stored(model: nn.Module, bits: torch.Tensor, seed: int) -> StoredAdapter:
    """A bit-packed adapter over all blocks, its masks cut from a row of random bits at other places for every seed."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            count = module.weight.numel() // 8
            start = (977 * seed + len(tensors) * 7919) % (len(bits) - count)
            tensors[f"base_model.model.{name}.smn_mask"] = bits[start : start + count].clone()
    return StoredAdapter({"scale": True}, tensors)


def taking_turns(*functions: Callable[[], object], rounds: int = 9) -> list[float]:
    """Median milliseconds of functions that run in turn, after a first call each that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, mine in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            mine.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(mine[1:]) for mine in times]


def bank_of(model: nn.Module, density: float, count: int) -> MaskBank:
    """A bank of `count` tasks over a model; all decoded."""
    bank = MaskBank(MemorySource(), model, exclusive=True)
    bits = pack_bits(torch.rand(1 << 23) < density)
    for seed in range(count):
        bank._source.add(f"t{seed}", stored(model, bits, seed))
        bank.pin(f"t{seed}")
    return bank


def dense_write() -> None:
    """A dense write of all weights against a copy of the same bytes."""
    model = build()
    weights = [m.weight.detach().view(-1) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    outs = [torch.empty_like(weight) for weight in weights]
    bits = [pack_bits(torch.rand(weight.numel()) < 0.9) for weight in weights]

    def copy() -> None:
        for out, weight in zip(outs, weights, strict=True):
            out.copy_(weight)

    def write() -> None:
        for out, weight, packed in zip(outs, weights, bits, strict=True):
            write_masked(out, weight, packed)

    copied, written = taking_turns(copy, write)
    print(f"| dense write / copy | {written:.1f} ms / {copied:.1f} ms | {written / copied:.2f} | ≤ 2.5 |")


def switch() -> None:
    """Switching between decoded sparse and dense tasks."""
    sparse, dense = bank_of(build(), 0.999, 2), bank_of(build(), 0.9, 2)

    def turn(bank: MaskBank) -> None:
        for name in ("t0", "t1"):
            bank.activate(name)

    fast, slow = taking_turns(lambda: turn(sparse), lambda: turn(dense))
    print(f"| switch at 99.9 % / dense write | {fast / 2:.2f} ms / {slow / 2:.1f} ms | {fast / slow:.3f} | ≤ 0.125 |")


def registered() -> None:
    """Lookup and switch with 10 and with 10,000 registered tasks."""
    model = build()
    bank = bank_of(model, 0.999, 2)
    adapter = bank._source.read("t0")

    def turn() -> None:
        for name in ("t0", "t1"):
            bank.activate(name)

    (few,) = taking_turns(turn, rounds=25)
    for index in range(10_000):
        bank._source.add(f"other{index}", adapter)
    (many,) = taking_turns(turn, rounds=25)
    print(f"| switch with 10,000 tasks / with 2 | {many / 2:.2f} ms / {few / 2:.2f} ms | {many / few:.2f} | ≤ 1.2 |")


def mixed() -> None:
    """Mixed batches against one forward of the bare model."""
    images = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    for count, limit in ((8, 1.15), (64, 1.25)):
        model = build()
        bare, bank = build(), bank_of(model, 0.995, count)
        names = [f"t{index % count}" for index in range(BATCH)]
        with torch.no_grad():
            one, many = taking_turns(partial(bare, images), partial(bank, images, names), rounds=3)
        print(f"| mixed batch of {BATCH}, {count} tasks / one forward | {many:.0f} ms / {one:.0f} ms "
              f"| {many / one:.2f} | ≤ {limit} |")  # fmt: skip


def lora() -> None:
    """PEFT's LoRA: set_adapter with 2 and with 34 adapters, and a mixed batch of 8."""
    model = get_peft_model(build(), LoraConfig(r=8, target_modules=list(TARGETS))).eval()
    model.add_adapter("t1", LoraConfig(r=8, target_modules=list(TARGETS)))

    def turn() -> None:
        for name in ("default", "t1"):
            model.set_adapter(name)

    (few,) = taking_turns(turn)
    for index in range(2, 34):
        model.add_adapter(f"t{index}", LoraConfig(r=8, target_modules=list(TARGETS)))
    (many,) = taking_turns(turn)
    images, bare = torch.randn(BATCH, 3, 224, 224, device=DEVICE), build()
    names = [f"t{1 + index % 8}" for index in range(BATCH)]
    with torch.no_grad():
        one, served = taking_turns(lambda: bare(images), lambda: model(images, adapter_names=names), rounds=3)
    print(f"| LoRA: set_adapter with 34 / with 2 | {many / 2:.1f} ms / {few / 2:.1f} ms | {many / few:.2f} | |")
    print(f"| LoRA: mixed batch of {BATCH}, 8 adapters / one forward | {served:.0f} ms / {one:.0f} ms "
          f"| {served / one:.2f} | |")  # fmt: skip


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    print(f"ViT-B/32, {DEVICE}, {torch.get_num_threads()} threads")
    print("| what | times | ratio | target |")
    print("|---|---|---|---|")
    for part in (dense_write, switch, registered, mixed, lora):
        part()


if __name__ == "__main__":
    main()
