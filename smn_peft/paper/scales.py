# SPDX-License-Identifier: Apache-2.0
"""`Scale`: backbones, images and hyper-parameters of a reproduction; the paper's and a small one for two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._options import did_you_mean, merged
from ..data import list_datasets
from ..evaluation import FRACTIONS
from ..training import load_recipe
from .runs import RunSpec

__all__ = ["SCALES", "Scale", "Setting", "scale_named"]


@dataclass(frozen=True)
class Setting:
    """A backbone and its training recipes: a block of a table."""

    label: str  # its name in tables
    base: Mapping[str, Any]  # arguments that name the backbone and its image size
    methods: Mapping[str, Mapping[str, Any]]  # arguments of every method: "mask", "full", "statistics", "topk" …
    datasets: tuple[str, ...]  # names of the scale's datasets that it is trained on
    minutes: float  # rough duration of a run


@dataclass(frozen=True)
class Scale:
    """What differs between reproducing at the paper's size and at a small one."""

    name: str  # value of `--scale`
    machine: str  # the machine that durations are for
    datasets: Mapping[str, Mapping[str, Any]]  # arguments of every dataset
    supervised: Sequence[Setting]  # settings that train with labels
    unsupervised: Mapping[str, Setting]  # settings that train without, by key
    main: Setting  # without labels: of Tables 3 and 10 and of the figures
    varied: Setting  # without labels: where single options are varied, as in Tables 5 and 9 and the ablations
    vit: Setting  # with labels: the transformer of Figure 6
    resnet: Setting  # with labels: the network of Figure 7, the same as `main` uses
    choices: Mapping[str, Any]  # what a table or figure varies or shows, by its name

    def run(self, setting: Setting, method: str, dataset: str, **changes: Any) -> RunSpec:
        """A run of a setting's method on a dataset, with some arguments changed."""
        arguments = merged(setting.methods[method], setting.base, self.datasets[dataset], changes)
        return RunSpec(arguments, minutes=setting.minutes)

    def cascade(self, dataset: str) -> RunSpec:
        """The cascade of a dataset: dispatcher, experts, and at some scales an ensemble over seeds as a control."""
        dispatcher = self.run(self.main, "mask", dataset, **self.choices["table3_options"].get(dataset, {}))
        options = self.choices["cascade"]
        masks = 1 + options["experts"] * (2 if options["ensemble"] else 1)
        return replace(dispatcher, cascade=options, minutes=dispatcher.minutes * masks)


def _paper() -> Scale:
    """The paper's backbones, datasets and hyper-parameters (section 4.1), for a GPU with 24 GB."""
    often = {"evaluate_every": None}
    supervised = merged(load_recipe("supervised-resnet"), often)
    swav = merged(load_recipe("swav-resnet"), often, {"eval_probe": True})
    table1 = ("cifar10", "cifar100", "dtd", "eurosat", "flowers102", "pets", "sun397", "ucf101")
    table2 = tuple(name for name in table1 if name != "pets")
    swav_base = {"backbone": "resnet50", "weights": "{weights}/resnet50_swav.safetensors"}
    dino_base = {"backbone": "resnet50", "weights": "{weights}/resnet50_dino.safetensors"}

    def full(lr: float, decay: float) -> dict[str, Any]:
        rates = {"lr": lr, "head_lr": lr, "weight_decay": decay, "head_weight_decay": decay}
        return merged(supervised, {"adapt": "full", "head": "trained", "warmup_epochs": 0, **rates})

    # The paper gives no settings for LoRA, and does not re-estimate statistics alone: these are this project's.
    adamw = {"optimizer": "adamw", "lr": 1e-3, "head_lr": 1e-3, "warmup_epochs": 5, "mask": {"batch_norm": "frozen"}}
    controls = {
        "lora": merged(supervised, {"adapt": "lora", "head": "trained", **adamw}),
        "statistics": merged(supervised, {"adapt": "statistics", "head": "trained", "head_lr": 0.15}),
    }
    # What the small recipe changes, at the paper's length.
    small = {**adamw, "head": "probe", "lr": 0.06, "head_lr": 0.001, "warmup_epochs": 45}
    resnet18_methods = {"mask": supervised, "mask_small": merged(supervised, small), "full": full(0.001, 5e-4)}
    resnet18_base = {"backbone": "timm/resnet18.a1_in1k"}
    resnet18 = Setting("ResNet-18, supervised", resnet18_base, resnet18_methods | controls, table1, 360)
    resnet50_methods = {"mask": supervised, "full": full(0.15, 1e-6), **controls}
    clip_methods = {"mask": merged(load_recipe("supervised-clip"), often)}
    unsupervised_methods = {
        "mask": swav,
        "topk": merged(swav, {"mask": {"mask_type": "topk", "init_score": "kaiming_uniform"}}),
        "full": merged(swav, {"adapt": "full", "lr": 0.15, "weight_decay": 1e-6}),
        "statistics": merged(swav, {"adapt": "statistics"}),
    }
    resnet50 = Setting("ResNet-50, SwAV", swav_base, resnet50_methods, table1, 720)
    clip = Setting("ViT-B/32, CLIP", {"backbone": "openai/clip-vit-base-patch32"}, clip_methods, table1, 720)
    bases = {"DINO": dino_base, "SwAV": swav_base, "TIMM": {"backbone": "timm/resnet50.a1_in1k"}}
    without_labels = {
        name.lower(): Setting(f"ResNet-50, {name}", base, unsupervised_methods, table2, 1440)
        for name, base in bases.items()
    }
    return Scale(
        name="paper",
        machine="one A100, upper bounds from appendix J",
        datasets={name: {"dataset": name} for name in list_datasets()},
        supervised=(resnet18, resnet50, clip),
        unsupervised=without_labels,
        main=without_labels["swav"],
        varied=without_labels["swav"],
        vit=clip,
        resnet=resnet50,
        choices={
            "table2": {"swav": ("score", "absolute")},
            "table3": ("cifar100", "inatloc500"),
            "table3_options": {"inatloc500": {"epochs": 54}},
            "cascade": {"experts": 5, "ensemble": False},
            "table5": ("cifar10", "dtd", "sun397"),
            "table5_prototypes": (50, 500, 5000),
            "table6": ("swav", "cifar100"),
            "table7": ("swav", "sun397"),
            "table9": ("dtd", "eurosat", "flowers102", "ucf101"),
            "table10": ("dtd", "ucf101"),
            "figure3": ("cifar10", "cifar100", "eurosat"),
            "figure3_fractions": FRACTIONS,
            "figure3_options": {"batch_size": 32},
            "figure5": ("cifar10", "mask"),
            "densities": ("cifar10", "cifar100", "sun397", "dtd"),
            "figure8": "cifar10",
            "figure8_stages": (1, 2, 3),
            "figure8_shares": (0.009, 0.061, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            "figure9": "cifar100",
            "figure9_shares": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            "ablations": "cifar10",
            "ablations_kinds": ("with labels", "without labels"),
            "ablations_rates": (0.25, 0.5, 2.0, 4.0),
            "recipes": ((resnet18, "cifar10", (15, 50, 150)),),
            "recipes_methods": ("full", "mask", "mask_small"),
        },
    )


def _small() -> Scale:
    """Real weights and images of the folder that SMN_ASSETS names: a run takes two minutes on two cores.

    2,000 CIFAR-10 images (lossy JPEGs, enlarged to 64 or 48 px), 6 epochs. Only the order of methods can be compared
    with the paper.
    """
    supervised, swav = load_recipe("supervised-small"), load_recipe("swav-small")
    vit = {
        "backbone": "vit_tiny_patch16_224",
        "weights": "{assets}/vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors",
        "image_size": 64,
    }
    resnet = {"backbone": "{package}/small_resnet.py:build", "image_size": 48}
    convolutions = {"target_modules": "all-conv"}
    resnet56 = {"backbone": "{package}/cifar_resnet.py:build", "image_size": 32, "mask": convolutions}

    def with_labels(label: str, base: dict[str, Any], lr: float, head_lr: float) -> Setting:
        # The paper's recipe as far as six epochs allow: SGD, a random head, statistics that adapt. Features have size
        # 3 (ViT), 0.03 (ResNetV2) and 0.5 (ResNet-56): the head's rate has to fit.
        sgd = {"optimizer": "sgd", "lr": lr, "head_lr": head_lr, "head": "trained", "warmup_epochs": 0}
        methods = {
            "full": merged(supervised, {"adapt": "full", "lr": 3e-4}),
            "lora": merged(supervised, {"adapt": "lora", "lr": 2e-3}),
            "mask_sgd": merged(supervised, sgd, {"mask": {"batch_norm": "adapt"}}),
            "mask": supervised,
        }
        statistics = {} if base is vit else {"statistics": merged(supervised, {"adapt": "statistics"})}
        return Setting(label, base, methods | statistics, ("cifar10",), 1.5)

    def without_labels(label: str, base: dict[str, Any]) -> Setting:
        # Scores that are ranked start at about 1/sqrt(fan-in), not at 1: they want smaller steps.
        topk = {"lr": 0.005, "mask": {"mask_type": "topk", "init_score": "kaiming_uniform"}}
        full = {"adapt": "full", "lr": 1e-4}
        methods = {"mask": swav, "topk": merged(swav, topk), "full": merged(swav, full)}
        statistics = {} if base is vit else {"statistics": merged(swav, {"adapt": "statistics"})}
        return Setting(label, base, methods | statistics, ("cifar10",), 2.0)

    names = "ViT-Tiny, 64 px", "ResNetV2-50, 48 px"
    labelled = with_labels(names[0], vit, 10.0, 0.01), with_labels(names[1], resnet, 30.0, 3.0)
    unlabelled = {"vit": without_labels(names[0], vit), "resnet": without_labels(names[1], resnet)}
    untuned = with_labels("ResNet-56, 32 px", resnet56, 30.0, 0.1)
    limits = {"limit": 2000, "eval_limit": 2000, "eval_probe": True}
    tiny_imagenet = {"dataset": "{assets}/tiny_imagenet_200x84.npz", "class_limit": 30, "eval_probe": True}
    return Scale(
        name="small",
        machine="two CPU cores",
        datasets={
            "cifar10": {"dataset": "{assets}/cifar10_jpeg.npz", **limits},
            "tiny-imagenet, 30 classes": tiny_imagenet,
        },
        supervised=labelled,
        unsupervised=unlabelled,
        main=unlabelled["resnet"],
        varied=unlabelled["vit"],
        vit=labelled[0],
        resnet=labelled[1],
        choices={
            **dict.fromkeys(("table3", "table5", "table9", "table10", "figure3", "densities"), ("cifar10",)),
            **dict.fromkeys(("figure8", "figure9", "ablations"), "cifar10"),
            "table2": {"vit": ("score", "absolute"), "resnet": ("score",)},
            "table3_options": {},
            "cascade": {"experts": 3, "ensemble": True},
            "table5_prototypes": (10, 50, 120),
            "table6": ("resnet", "cifar10"),
            "table7": ("vit", "cifar10"),
            "figure3_fractions": (0.1, 0.04, 0.02),
            "figure3_options": {"batch_size": 32, "max_steps": 60, "epochs": 1000, "warmup_epochs": 15},
            "figure5": ("cifar10", "mask_sgd"),
            "figure8_stages": (4, 8),
            "figure8_shares": (0.1, 0.5),
            "figure9_shares": (0.1, 0.5),
            "ablations_kinds": ("with labels",),
            "ablations_rates": (0.25, 4.0),
            "recipes": (
                (labelled[1], "cifar10", (1, 3, 6)),
                *((setting, "tiny-imagenet, 30 classes", (6,)) for setting in (*labelled, untuned)),
            ),
            "recipes_methods": ("full", "mask_sgd", "mask"),
        },
    )


SCALES: dict[str, Scale] = {scale.name: scale for scale in (_small(), _paper())}


def scale_named(name: str) -> Scale:
    """Look up a scale; ValueError if there is none of this name."""
    if name not in SCALES:
        raise ValueError(f"There is no scale {name!r}; there are {', '.join(SCALES)}.{did_you_mean(name, SCALES)}")
    return SCALES[name]
