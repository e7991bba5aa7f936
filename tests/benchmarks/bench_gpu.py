# SPDX-License-Identifier: Apache-2.0
"""One optimizer step of mask training against full fine-tuning on a GPU, at the paper's size, compiled and not.

ResNet-50 and ViT-B/32 at 224 px under bf16 autocast, in turn in one process: time, peak memory, images per second.
Floor of the effective weights: a copy on the device that moves as many bytes, 12 per weight (θ and S read, θ̂ written).
Without a GPU nothing is measured; ``--rehearse`` runs the same on small models anywhere, and records nothing.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
from common import CLASSES, DEVICE, ratio, synchronise
from peft import get_peft_model
from recording import Recorder
from torch import Tensor, nn

from smn_peft import MaskConfig
from smn_peft.functional.effective import build
from smn_peft.functional.masking import MaskSpec, compute_mask, effective_weight
from smn_peft.tuner import MaskLayer

REHEARSE = "--rehearse" in sys.argv
MODELS = {"resnet50": "fc", "vit_base_patch32_224": "head"}
SMALL = {"test_resnet": "head.fc", "test_vit": "head"}
BATCHES, SIZE, ROUNDS = ((4,), 160, 3) if REHEARSE else ((64, 256), 224, 15)
STEPS = 1 if REHEARSE else 8  # between two waits for the device, which training does not wait for either
TIME_LIMIT, MEMORY_LIMIT = 1.05, 1.0


def model_of(name: str, masked_with_head: str | None = None) -> nn.Module:
    """A fresh model of random weights, masked if its head is named."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=CLASSES).to(DEVICE)
    if masked_with_head is None:
        return model
    return get_peft_model(model, MaskConfig(modules_to_save=[masked_with_head]))


def prepare(name: str, masked_with_head: str | None, batch: int, compiled: bool) -> Callable[[], None]:
    """One step under autocast as `smn train` takes it; scores, weights and the optimizer's state are fp32."""
    model = model_of(name, masked_with_head).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, fused=True)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
    images = torch.randn(batch, 3, SIZE, SIZE, device=DEVICE)
    labels = torch.randint(CLASSES, (batch,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step


def with_peak(make: Callable[[], Callable[[], None]]) -> tuple[Callable[[], None], int]:
    """A step that has been warmed up, and the peak bytes of three of it beyond what was there; 0 without a GPU.

    A step of another model comes first: libraries' workspaces and compilers' trials are nobody's.
    """
    make()()
    gc.collect()
    synchronise()
    before = torch.cuda.memory_allocated()
    step = make()
    for _ in range(2):
        step()
    synchronise()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    synchronise()
    return step, torch.cuda.max_memory_allocated() - before


def several(step: Callable[[], None]) -> Callable[[], None]:
    """As many steps as are timed at once."""

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


def masked_pairs(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Weights and scores of all masked layers."""
    layers = [module for module in model.modules() if isinstance(module, MaskLayer)]
    slots = [(layer, slot) for layer in layers for slot in layer.present_slots if layer.scores_of("default", slot)]
    return [(layer.base_tensor(slot).detach(), layer.scores(slot)["default"].detach()) for layer, slot in slots]


def bandwidth(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Time of making all effective weights, by one graph and by the passes of eager training, over the copy's."""
    spec = MaskSpec()

    def make() -> list[Tensor]:
        return [build(weight, scores, spec, None, weight.dtype)[0] for weight, scores in pairs]

    def written_out() -> list[Tensor]:
        return [effective_weight(weight, compute_mask(scores, spec)) for weight, scores in pairs]

    graph = torch.compile(written_out)
    source = torch.empty(6 * sum(weight.numel() for weight, _ in pairs), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    medians = []
    for function in (graph, make):
        time, copy, _ = ratio(function, lambda: target.copy_(source), ROUNDS)
        medians.append(time / copy)
    return medians[0], medians[1]


def main() -> None:
    """Print the table."""
    if DEVICE != "cuda" and not REHEARSE:
        print("No GPU here: nothing to measure.")
        return
    if REHEARSE:
        os.environ.pop("BENCH_JSON", None)
    recorder = Recorder("gpu", DEVICE)
    print("| model | batch | compiled | full | mask | ratio (≤ 1.05) | extra memory / masked bytes (≤ 1) | images/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, head in (SMALL if REHEARSE else MODELS).items():
        pairs = masked_pairs(model_of(name, head))
        masked_bytes = 4 * sum(weight.numel() for weight, _ in pairs)
        for batch in BATCHES:
            for compiled in (False, True):
                full = mask = None  # before the next ones are weighed
                torch._dynamo.reset()
                full, full_peak = with_peak(partial(prepare, name, None, batch, compiled))
                mask, mask_peak = with_peak(partial(prepare, name, head, batch, compiled))
                mask_time, full_time, ratios = ratio(several(mask), several(full), ROUNDS)
                mask_time, full_time = mask_time / STEPS, full_time / STEPS
                case = f"{name}, batch {batch}, {'compiled' if compiled else 'eager'}"
                median = recorder.add("step, mask / full fine-tuning", case, ratios, target=TIME_LIMIT)
                share = (mask_peak - full_peak) / masked_bytes
                recorder.add("extra memory / masked bytes", case, share, target=MEMORY_LIMIT, exact=True)
                rate = recorder.add("images per second", case, batch / mask_time, unit="images/s", better="higher")
                print(
                    f"| {name} | {batch} | {'yes' if compiled else 'no'} | {full_time * 1e3:.1f} ms "
                    f"| {mask_time * 1e3:.1f} ms | {median:.3f} | {share:.2f} | {rate:.0f} |"
                )
        graph, eager = bandwidth(pairs)
        recorder.add("effective weights / device copy of their bytes", f"{name}, compiled", graph)
        recorder.add("effective weights / device copy of their bytes", f"{name}, eager", eager)
        print(f"| {name} | effective weights | | | | {graph:.2f} and eager {eager:.2f} × a copy of their bytes | | |")


if __name__ == "__main__":
    main()
