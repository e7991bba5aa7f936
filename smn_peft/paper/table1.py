# SPDX-License-Identifier: Apache-2.0
"""Table 1: masks learned with labels against k-NN, a linear probe, full fine-tuning, and controls of this project."""

from __future__ import annotations

from .artefact import Artefact, Cell
from .scale import Scale

__all__ = ["ARTEFACT"]

_FROZEN = {"frozen_knn": "k-NN, frozen base", "frozen_linear_probe": "linear probe, frozen base"}
_METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA of at most the mask's bytes",
    "statistics": "new head, BatchNorm statistics alone",
    "mask_sgd": "mask, SGD and a random head",
    "mask": "mask",
}
_COLUMNS = ("cifar10", "cifar100", "dtd", "eurosat", "flowers102", "pets", "sun397", "ucf101")


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_COLUMNS, values, strict=True))


_PAPER = {
    "ResNet-18, supervised": {
        "k-NN": _row(0.826, 0.589, 0.587, 0.896, 0.677, 0.877, 0.465, 0.596),
        "full fine-tuning": _row(0.950, 0.759, 0.692, 0.969, 0.963, 0.889, 0.534, 0.689),
        "mask": _row(0.949, 0.760, 0.660, 0.969, 0.955, 0.852, 0.479, 0.659),
    },
    "ResNet-50, SwAV": {
        "k-NN": _row(0.832, 0.497, 0.693, 0.754, 0.728, 0.726, 0.535, 0.604),
        "full fine-tuning": _row(0.965, 0.817, 0.736, 0.977, 0.987, 0.892, 0.623, 0.675),
        "mask": _row(0.962, 0.798, 0.709, 0.974, 0.967, 0.863, 0.482, 0.628),
    },
    "ViT-B/32, CLIP": {
        "k-NN": _row(0.909, 0.694, 0.666, 0.858, 0.818, 0.768, 0.687, 0.753),
        "full fine-tuning": _row(0.958, 0.821, 0.723, 0.979, 0.974, 0.885, 0.640, 0.809),
        "mask": _row(0.971, 0.834, 0.738, 0.978, 0.973, 0.891, 0.668, 0.815),
    },
}


def _cells(scale: Scale) -> list[Cell]:
    cells = []
    for setting in scale.supervised.values():
        for dataset in setting.datasets:
            mask = scale.run(setting, "mask", dataset)
            for metric, row in _FROZEN.items():
                if metric == "frozen_knn" or mask.arguments.get("eval_probe"):
                    cells.append(Cell(setting.label, row, dataset, mask, metric))
            for method, row in _METHODS.items():
                if method in setting.methods:
                    cells.append(Cell(setting.label, row, dataset, scale.run(setting, method, dataset), "accuracy"))
        for method, row in _METHODS.items():
            if method in setting.methods:
                first = scale.run(setting, method, setting.datasets[0])
                cells.append(Cell(setting.label, row, f"file, {setting.datasets[0]}", first, "bytes"))
    return cells


ARTEFACT = Artefact(
    "table1",
    "Table 1: masking with labels",
    _cells,
    _PAPER,
    note=(
        "Accuracy on the test images. Files hold the head too. The paper's fine-tuning of CLIP is another paper's and "
        "is not run; LoRA, the linear probe and statistics alone are not in the paper."
    ),
)
