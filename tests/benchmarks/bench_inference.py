# SPDX-License-Identifier: Apache-2.0
"""Inference with an active adapter, loaded as bits or as it trains, against the bare base. Floor: the base itself.

What may still train is made anew in every forward: its row says what that costs, and has no target.
"""

from __future__ import annotations

import tempfile
import warnings

import torch
from common import BATCH, DEVICE, SHAPES, SIZE, build, masked, ratio, step_of
from peft import PeftModel
from recording import Recorder

LIMIT = 1.02


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore", message="Could not find a config file")
    recorder = Recorder("inference", DEVICE)
    print(f"One forward without gradients, batch {BATCH}, {SIZE} px, {DEVICE}")
    print("| model | adapter | base | with adapter | ratio | target |")
    print("|---|---|---|---|---|---|")
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE)
    for name in SHAPES:
        trained = masked(name)
        step_of(trained, score_lr=100.0)()
        with tempfile.TemporaryDirectory() as folder:
            trained.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(build(name), folder)
        base = build(name).eval()
        for kind, model, limit in (("trained", trained, None), ("bits", loaded, LIMIT)):
            model.eval()
            with torch.no_grad():
                ours, bare, ratios = ratio(lambda model=model: model(images), lambda base=base: base(images), 60)
            median = recorder.add("forward, with adapter / base", f"{name}, {kind}", ratios, target=limit)
            shown = "" if limit is None else f"≤ {limit}"
            print(f"| {name} | {kind} | {bare * 1e3:.1f} ms | {ours * 1e3:.1f} ms | {median:.3f} | {shown} |")


if __name__ == "__main__":
    main()
