# SPDX-License-Identifier: Apache-2.0
"""What the cards share: the bases' names and notes, reports and settings as cards take them.

Used by `model_cards.py`; not an example by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smn_peft.evaluation import EvalReport

__all__ = ["IMAGES", "RESNET", "VIT", "report", "shown"]

LOSSY = "CIFAR-10 (lossy JPEG)"
IMAGES = (
    "Trained on 2,000 images of CIFAR-10 in lossy JPEG, enlarged: no number here compares with others' on CIFAR-10."
)
VIT = {
    "title": "ViT-Tiny",
    "base": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "base_id": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "note": "The base's matrices were rounded to fp16 once: the Hub's own weights differ in the last bits and are "
    "refused.",
}
RESNET = {
    "title": "ResNet-50 v2, stages 1 to 3",
    "base": "ResNet-50 v2 of the ONNX model zoo, stages 1 to 3",
    "base_id": None,
    "note": "The base's matrices were rounded to fp16 once, and it has no repository on the Hub.",
}


def report(label: str, metric: str, values: Sequence[float], dataset: str = LOSSY, **settings: Any) -> EvalReport:
    """A report over seeds, or of one value."""
    seeds = range(len(values)) if len(values) > 1 else ()
    return EvalReport(label, dataset, "test", metric, tuple(values), tuple(seeds), settings=settings, versions={})


def shown(options: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text."""
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in options.items()}
