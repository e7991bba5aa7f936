# SPDX-License-Identifier: Apache-2.0
"""Table 8: densities that masks learned with labels find; the paper calls them sparsities."""

from __future__ import annotations

from .artefact import Artefact, Cell
from .scale import Scale

__all__ = ["ARTEFACT"]

_COLUMNS = ("cifar10", "cifar100", "dtd", "eurosat", "flowers102", "inatloc500", "pets", "sun397", "ucf101")


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_COLUMNS, values, strict=True))


_PAPER = {
    "": {
        "ResNet-18, supervised": _row(0.848, 0.643, 0.926, 0.934, 0.931, 0.512, 0.956, 0.680, 0.894),
        "ResNet-50, SwAV": _row(0.895, 0.772, 0.951, 0.957, 0.945, 0.654, 0.962, 0.811, 0.917),
        "ViT-B/32, CLIP": _row(0.996, 0.987, 0.999, 0.999, 0.999, 0.948, 0.999, 0.993, 0.998),
    }
}


def _cells(scale: Scale) -> list[Cell]:
    settings = scale.supervised.values()
    names = {"mask": "", "mask_sgd": ", SGD and a random head"}
    return [
        Cell("", f"{setting.label}{name}", dataset, scale.run(setting, method, dataset), "density")
        for setting in settings
        for method, name in names.items()
        if method in setting.methods
        for dataset in setting.datasets
    ]


ARTEFACT = Artefact("table8", "Table 8: densities found with labels", _cells, _PAPER)
