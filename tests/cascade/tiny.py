# SPDX-License-Identifier: Apache-2.0
"""A cascade of two experts that takes seconds, on images whose labels are partly noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from smn_peft.cascade import CascadeArguments
from smn_peft.training import TrainArguments
from tests.training.tiny import SWAV, tiny_arguments, write_model, write_npz

OPTIONS = CascadeArguments(experts=2, router_dim=4, ensemble=True)


def cascade_arguments(folder: Path, **options: Any) -> TrainArguments:
    """Arguments of a dispatcher of 8 steps; model and data are written into `folder`."""
    spec = write_model(folder)
    model = folder / "model.py"
    # The same base for every seed, as weights of a file are.
    seeded = "    import torch\n    torch.manual_seed(0)\n    # Unseeded"
    model.write_text(model.read_text().replace("    # Unseeded", seeded))
    path = write_npz(folder / "set.npz")
    arrays = dict(np.load(path))
    generator = np.random.default_rng(0)
    noisy = generator.random(len(arrays["label"])) < 0.4
    arrays["label"] = np.where(noisy, generator.integers(0, 3, len(noisy)), arrays["label"]).astype(np.int16)
    np.savez(path, **arrays)
    mask = {"batch_norm": "adapt"}
    return tiny_arguments(
        folder, backbone=spec, dataset=str(path), **{**SWAV, "head_lr": 0.1, "mask": mask, **options}
    )
