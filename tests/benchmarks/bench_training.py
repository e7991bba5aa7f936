# SPDX-License-Identifier: Apache-2.0
"""One optimizer step of mask training against full fine-tuning, in time and in peak memory.

Both train the same model on the same batch with the same optimizer, in turn, in one process; peak memory is taken in a
process each. Floor: full fine-tuning itself does the same products; what masks add is to read θ and S and to write θ̂
twice, and dL/dS once, about 40 bytes per weight.
"""

from __future__ import annotations

import json
import sys

from common import BATCH, DEVICE, SHAPES, SIZE, build, masked, peak_in_subprocess, peak_of, ratio, step_of
from recording import Recorder

TIME_LIMIT, MEMORY_LIMIT = 1.10, 1.3


def main() -> None:
    """Print the table, or with two arguments the peak memory of one model and method."""
    if len(sys.argv) == 3:
        method, name = sys.argv[1:]
        step = step_of(build(name) if method == "full" else masked(name))
        print(json.dumps({"peak": peak_of(step)}))
        return
    recorder = Recorder("training", DEVICE)
    print(f"One training step, batch {BATCH}, {SIZE} px, {DEVICE}")
    print("| model | full fine-tuning | mask | ratio | target | extra memory / masked bytes | target |")
    print("|---|---|---|---|---|---|---|")
    for name in SHAPES:
        model = masked(name)
        weight_bytes = 4 * sum(mask.numel() for mask in model.masks().values())
        mask, full, ratios = ratio(step_of(model), step_of(build(name)), rounds=25)
        median = recorder.add("step, mask / full fine-tuning", name, ratios, target=TIME_LIMIT)
        extra = peak_in_subprocess(__file__, "mask", name) - peak_in_subprocess(__file__, "full", name)
        share = recorder.add("extra memory / masked bytes", name, extra / weight_bytes, target=MEMORY_LIMIT)
        print(
            f"| {name} | {full * 1e3:.0f} ms | {mask * 1e3:.0f} ms | {median:.3f} | ≤ {TIME_LIMIT} "
            f"| {share:.2f} | ≤ {MEMORY_LIMIT} |"
        )


if __name__ == "__main__":
    main()
