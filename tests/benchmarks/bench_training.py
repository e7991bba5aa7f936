# SPDX-License-Identifier: Apache-2.0
"""One optimizer step of mask training against full fine-tuning, in time and in peak memory.

Both train the same model on the same batch with the same optimizer, in turn, in one process; peak memory is taken in a
process each. What masks add is to read θ and S and to write θ̂ twice, and dL/dS once, 36 bytes per weight. Beside it:
both compiled by `torch.compile`; PEFT's LoRA and SHiRA, of rank 8 on the layers that are masked, where they apply.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from common import BATCH, DEVICE, SHAPES, SIZE, build, head_name, masked, peak_in_subprocess, peak_of, ratio, step_of
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from recording import Recorder
from torch import nn

from smn_peft.training.task import NarrowSGD

TIME_LIMIT, MEMORY_LIMIT = 1.05, 1.0
LARGE, LARGE_LIMIT = 224, 1.02
RATE, RATE_LIMIT = 1.0, 1.02
RANK = 8
PEERS: dict[str, tuple[PeftConfig, tuple[str, ...]]] = {
    "LoRA": (LoraConfig(r=RANK, lora_alpha=2 * RANK), ("resnet18", "vit_tiny")),
    "SHiRA": (ShiraConfig(r=RANK), ("vit_tiny",)),  # of Linear only
}


def peer(name: str, config: PeftConfig, layers: list[str]) -> nn.Module:
    """The model under another method of PEFT on the same layers."""
    config.target_modules, config.modules_to_save = layers, [head_name(name)]
    return get_peft_model(build(name), config)


def main() -> None:
    """Print the tables, or with two arguments the peak memory of one model and method."""
    if len(sys.argv) == 3:
        method, name = sys.argv[1:]
        print(json.dumps({"peak": peak_of(lambda: subject(method, name))}))
        return
    tables()


def subject(method: str, name: str) -> Callable[[], None]:
    """A step of which the peak memory is taken: "full", "mask" or "mask-bf16"."""
    if method == "full":
        return step_of(build(name))
    model = masked(name)
    if method == "mask":
        return step_of(model)
    for parameter in (p for n, p in model.named_parameters() if p.requires_grad and "smn_" in n):
        parameter.data = parameter.data.bfloat16()
    return step_of(model, sgd=NarrowSGD)


def tables() -> None:
    """Time and memory side by side."""
    recorder = Recorder("training", DEVICE)
    print(f"One training step, batch {BATCH}, {DEVICE}")
    print("| model | px | full fine-tuning | mask | ratio | target | extra memory / masked bytes | target | in bf16 |")
    print("|---|---|---|---|---|---|---|---|---|")
    layers = {}
    for name in SHAPES:
        model = masked(name)
        masks = model.masks()
        layers[name] = [key.removesuffix(".weight") for key in masks]
        weight_bytes = 4 * sum(mask.numel() for mask in masks.values())
        mask, full, ratios = ratio(step_of(model), step_of(build(name)), rounds=41)
        median = recorder.add("step, mask / full fine-tuning", name, ratios, target=TIME_LIMIT)
        full_peak = peak_in_subprocess(__file__, "full", name)
        extra = [peak_in_subprocess(__file__, method, name) - full_peak for method in ("mask", "mask-bf16")]
        shares = [number / weight_bytes for number in extra]
        share = recorder.add("extra memory / masked bytes", name, shares[0], target=MEMORY_LIMIT, exact=True)
        narrow = recorder.add("extra memory, bf16 / masked bytes", name, shares[1], target=0.0, exact=True)
        print(
            f"| {name} | {SIZE} | {full * 1e3:.0f} ms | {mask * 1e3:.0f} ms | {median:.3f} | ≤ {TIME_LIMIT} "
            f"| {share:.2f} | ≤ {MEMORY_LIMIT} | {narrow:.2f} (≤ 0) |"
        )
        steps = step_of(masked(name, size=LARGE), size=LARGE), step_of(build(name, LARGE), size=LARGE)
        mask, full, ratios = ratio(*steps, rounds=9)
        median = recorder.add(f"step at {LARGE} px, mask / full fine-tuning", name, ratios, target=LARGE_LIMIT)
        print(
            f"| {name} | {LARGE} | {full * 1e3:.0f} ms | {mask * 1e3:.0f} ms | {median:.3f} | ≤ {LARGE_LIMIT} | | | |"
        )
    print("\nWith and without a rate\n\n| model | px | without | with | ratio | target |\n|---|---|---|---|---|---|")
    for name in SHAPES:
        rated, plain, ratios = ratio(step_of(masked(name, rate=RATE)), step_of(masked(name)), rounds=41)
        median = recorder.add("step, mask with a rate / without", name, ratios, target=RATE_LIMIT)
        print(f"| {name} | {SIZE} | {plain * 1e3:.0f} ms | {rated * 1e3:.0f} ms | {median:.3f} | ≤ {RATE_LIMIT} |")
    print("\nBoth compiled\n\n| model | px | full fine-tuning | mask | ratio | target |\n|---|---|---|---|---|---|")
    for name in SHAPES:
        compiled = [step_of(model, compiled=True) for model in (masked(name), build(name))]
        mask, full, ratios = ratio(*compiled, rounds=25)
        median = recorder.add("step compiled, mask / full fine-tuning", name, ratios, target=TIME_LIMIT)
        print(f"| {name} | {SIZE} | {full * 1e3:.0f} ms | {mask * 1e3:.0f} ms | {median:.3f} | ≤ {TIME_LIMIT} |")
    print(f"\nPeers of rank {RANK}, {SIZE} px\n\n| method | model | step / full fine-tuning's |\n|---|---|---|")
    for method, (config, names) in PEERS.items():
        for name in names:
            _, _, ratios = ratio(step_of(peer(name, config, layers[name])), step_of(build(name)), rounds=11)
            median = recorder.add(f"step, {method} / full fine-tuning", name, ratios, better=None)
            print(f"| {method} | {name} | {median:.3f} |")


if __name__ == "__main__":
    main()
