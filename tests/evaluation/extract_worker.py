# SPDX-License-Identifier: Apache-2.0
"""One of several processes that extract features together: `test_features.py` starts it with torch's environment."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from smn_peft.evaluation import extract_features


class Numbered:
    """Image i is filled with the value i, its label is i."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.full((3, 4, 4), index, dtype=torch.uint8), "label": index, "index": index}


def main(folder: Path, sizes: list[int]) -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    found = {}
    for n in sizes:
        features = extract_features(model, Numbered(n), torch.Tensor.float, batch_size=3, accelerator=accelerator)
        found |= {f"features_{n}": features.features, f"labels_{n}": features.labels}
    found["processes"] = torch.tensor(accelerator.num_processes)
    save_file(found, folder / f"rank{accelerator.process_index}.safetensors")
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
