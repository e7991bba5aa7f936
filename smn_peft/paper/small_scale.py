# SPDX-License-Identifier: Apache-2.0
"""The small scale: real weights and images of the folder that SMN_ASSETS names, a run in two minutes of two cores.

2,000 CIFAR-10 images (lossy JPEGs, enlarged to 64 or 48 px), 6 epochs. Nothing here compares with the paper's numbers
but the order of methods.
"""

from __future__ import annotations

from typing import Any

from ..training import load_recipe
from .run_spec import merged
from .scale import Scale, Setting

__all__ = ["SMALL"]

_VIT = {
    "backbone": "vit_tiny_patch16_224",
    "weights": "{assets}/vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors",
    "image_size": 64,
}
_RESNET = {"backbone": "{package}/small_resnet.py:build", "image_size": 48}
_RESNET56 = {
    "backbone": "{package}/cifar_resnet.py:build",
    "image_size": 32,
    "mask": {"target_modules": "all-conv"},
}
_CIFAR10 = {
    "dataset": "{assets}/cifar10_jpeg.npz",
    "limit": 2000,
    "eval_limit": 2000,
    "eval_probe": True,
}
_TINY_IMAGENET = {"dataset": "{assets}/tiny_imagenet_200x84.npz", "class_limit": 30, "eval_probe": True}
_SUPERVISED = load_recipe("supervised-small")
_SWAV = load_recipe("swav-small")


def _supervised(label: str, base: dict[str, Any], sgd_rates: dict[str, float], *, statistics: bool) -> Setting:
    # The paper's recipe, in so far as it fits into six epochs: SGD, a random head, statistics that adapt. The ResNet's
    # features are of size 0.03 and the ViT's of size 3: the head's rate has to fit.
    sgd = {"optimizer": "sgd", **sgd_rates, "head": "trained", "warmup_epochs": 0}
    methods: dict[str, dict[str, Any]] = {
        "full": merged(_SUPERVISED, {"adapt": "full", "lr": 3e-4}),
        "lora": merged(_SUPERVISED, {"adapt": "lora", "lr": 2e-3}),
        "mask_sgd": merged(_SUPERVISED, sgd, {"mask": {"batch_norm": "adapt"}}),
        "mask": dict(_SUPERVISED),
    }
    if statistics:
        methods["statistics"] = merged(_SUPERVISED, {"adapt": "statistics"})
    return Setting(label, base, methods, ("cifar10",), minutes=1.5, has_statistics=statistics)


def _unsupervised(label: str, base: dict[str, Any], *, statistics: bool) -> Setting:
    # Scores that are ranked start at about 1/sqrt(fan-in), not at 1: they want smaller steps.
    topk = {"lr": 0.005, "mask": {"mask_type": "topk", "init_score": "kaiming_uniform"}}
    methods: dict[str, dict[str, Any]] = {
        "mask": dict(_SWAV),
        "topk": merged(_SWAV, topk),
        "full": merged(_SWAV, {"adapt": "full", "lr": 1e-4}),
    }
    if statistics:
        methods["statistics"] = merged(_SWAV, {"adapt": "statistics"})
    return Setting(label, base, methods, ("cifar10",), minutes=2.0, has_statistics=statistics)


_LABELLED = {
    "vit": _supervised("ViT-Tiny, 64 px", _VIT, {"lr": 10.0, "head_lr": 0.01}, statistics=False),
    "resnet": _supervised("ResNetV2-50, 48 px", _RESNET, {"lr": 30.0, "head_lr": 3.0}, statistics=True),
}
# On which nothing was tuned; its features are of size 0.5.
_FRESH = _supervised("ResNet-56, 32 px", _RESNET56, {"lr": 30.0, "head_lr": 0.1}, statistics=True)

SMALL = Scale(
    name="small",
    machine="two CPU cores",
    datasets={"cifar10": _CIFAR10, "tiny-imagenet, 30 classes": _TINY_IMAGENET},
    supervised=_LABELLED,
    unsupervised={
        "vit": _unsupervised("ViT-Tiny, 64 px", _VIT, statistics=False),
        "resnet": _unsupervised("ResNetV2-50, 48 px", _RESNET, statistics=True),
    },
    main="resnet",
    varied="vit",
    vit="vit",
    resnet="resnet",
    choices={
        "table2": {"vit": ("score", "absolute"), "resnet": ("score",)},
        "table3": ("cifar10",),
        "cascade": {"experts": 3, "ensemble": True},
        "table3_options": {},
        "table5": ("cifar10",),
        "table5_prototypes": (10, 50, 120),
        "table5_initialisations": ("vit", "resnet"),
        "table6": ("resnet", "cifar10"),
        "table7": ("vit", "cifar10"),
        "table9": ("cifar10",),
        "table10": ("cifar10",),
        "figure3": ("cifar10",),
        "figure3_fractions": (0.1, 0.04, 0.02),
        "figure3_options": {"batch_size": 32, "max_steps": 60, "epochs": 1000, "warmup_epochs": 15},
        "figure5": "cifar10",
        "figure5_method": "mask_sgd",
        "figure6": ("cifar10",),
        "figure7": ("cifar10",),
        "figure8": "cifar10",
        "figure8_stages": (4, 8),
        "figure8_shares": (0.1, 0.5),
        "figure9": "cifar10",
        "figure9_shares": (0.1, 0.5),
        "figure10": "cifar10",
        "figure10_classes": 10,
        "figure11": "cifar10",
        "ablations": "cifar10",
        "ablations_kinds": ("with labels",),
        "ablations_rates": (0.25, 4.0),
        "recipes": (
            (_LABELLED["resnet"], "cifar10", (1, 3, 6)),
            *((setting, "tiny-imagenet, 30 classes", (6,)) for setting in (*_LABELLED.values(), _FRESH)),
        ),
        "recipes_methods": {
            "full fine-tuning": "full",
            "mask, the paper's recipe": "mask_sgd",
            "mask, the small recipe": "mask",
        },
    },
)
