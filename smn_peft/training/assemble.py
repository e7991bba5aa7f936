# SPDX-License-Identifier: Apache-2.0
"""From arguments to parts: images, backbone, mask, objective and loader, checked before training starts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..backbones import Backbone, load_backbone, load_classifier
from ..backbones.from_file import is_file_spec, load_from_file
from ..data import build_loader, multi_crop_transform, preprocessing_transform, supervised_transform
from ..evaluation import PAPER_DECAY, extract_features, fit_linear_probe
from ..storage import fingerprint, tensor_digest
from ..tuner import MaskConfig
from ..tuner.batch_norm import has_statistics
from ..tuner.targets import resolve_targets, stage_targets
from .crops import check_crops
from .images import Images, build_images
from .lora import lora_config
from .objective import build_objective, objective_kind
from .shared import base_features
from .start import start_from
from .task import TrainingTask
from .train_arguments import TrainArguments

__all__ = [
    "Images",
    "build_images",
    "build_task",
    "build_train_loader",
    "evaluation_of",
    "load_base",
]


def load_base(arguments: TrainArguments, num_classes: int | None = None) -> Backbone:
    """The frozen base that the arguments name: with a head for `num_classes`, or without one."""
    # Weights that no file gives are the run's own: the same in every process, on resuming and when it is loaded again.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        if is_file_spec(arguments.backbone):
            backbone = load_from_file(arguments.backbone)
            if arguments.image_size is not None:
                backbone = replace(backbone, image_size=arguments.image_size)
        else:
            backbone = load_backbone(
                arguments.backbone,
                pretrained=arguments.pretrained,
                image_size=arguments.image_size,
                state_dict=arguments.weights,
                revision=arguments.backbone_revision,
                projection=arguments.objective == "zero_shot",
            )
    return backbone if num_classes is None else load_classifier(backbone, num_classes, head_seed=arguments.seed)


def build_task(
    arguments: TrainArguments, images: Images, device: torch.device | str = "cpu"
) -> tuple[TrainingTask, Backbone]:
    """The model under its mask (or bare, for the baselines) and the objective.

    Args:
        arguments: Of the run.
        images: Its images.
        device: Where a head that starts from a probe gets its features from.

    Raises:
        ValueError: If a part does not fit another; the message says which argument to change.
        FileNotFoundError: If `init_from` holds no checkpoint.
    """
    kind = objective_kind(arguments)
    num_classes = images.num_classes if kind.consumes == "logits" else None
    backbone = load_base(arguments, num_classes)
    base = _fingerprint(backbone.model)  # while it is what was loaded
    if kind.views == "crops":
        check_crops(arguments, backbone)
    if arguments.head == "probe" and num_classes is not None:
        backbone.model.to(device)
        _start_from_probe(backbone, images, arguments)
    model = _adapted(arguments, backbone, num_classes is not None, images.train.classes)
    torch.manual_seed(arguments.seed)
    objective = build_objective(arguments, backbone, num_classes, images.train.classes)
    task = TrainingTask(model, objective, adapt_statistics=arguments.adapt == "statistics", base=base)
    if arguments.init_from is not None:
        start_from(task, arguments.init_from)
    return task, backbone


def _fingerprint(model: nn.Module) -> str:
    """Fingerprint of all that a base's features depend on, its head left out."""
    state = getattr(model, "backbone", model).state_dict()
    first = next((tensor.dtype for tensor in state.values()), torch.float32)
    return fingerprint((tensor_digest(tensor) for tensor in state.values()), first)


def _adapted(arguments: TrainArguments, backbone: Backbone, has_head: bool, classes: list[str] | None) -> nn.Module:
    model: Any = backbone.model
    if arguments.adapt == "full":
        return model.requires_grad_(True)
    if arguments.adapt in ("head", "statistics"):
        if arguments.adapt == "statistics" and not any(has_statistics(module) for module in model.modules()):
            raise ValueError(f"adapt='statistics' needs BatchNorm, and {arguments.backbone} has none.")
        model.requires_grad_(False)
        if has_head:
            model.head.requires_grad_(True)
        return model
    config: MaskConfig = copy.deepcopy(arguments.mask)  # it is filled in when the masks are made
    # What whoever uses the adapter has to know, who may have its two files only.
    config.preprocessing = backbone.preprocessing
    config.id2label = dict(enumerate(classes)) if has_head and classes is not None else None
    config.seed = config.seed or arguments.seed
    if arguments.mask_stages is not None:
        config.target_modules = stage_targets(model, config.target_modules, arguments.mask_stages)
    if arguments.adapt == "lora":
        options: dict[str, Any] = {"rank": arguments.lora_rank, "alpha": arguments.lora_alpha}
        lora = lora_config(model, config, modules_to_save=["head"] if has_head else None, **options)
        torch.manual_seed(arguments.seed)  # PEFT draws the factors from the global stream
        return get_peft_model(model, lora)
    if has_head and arguments.head == "masked":
        targets = resolve_targets(model, config.target_modules)
        if isinstance(targets, str):
            raise ValueError("head='masked' adds the head to mask.target_modules: give those as a list, or None.")
        config.target_modules = [*targets, "head"]
    elif has_head:
        config.modules_to_save = [*(config.modules_to_save or []), "head"]
    return get_peft_model(model, config)


def _start_from_probe(backbone: Backbone, images: Images, arguments: TrainArguments) -> None:
    """Fit a probe on the frozen features of the training images, and start the head from it."""
    model: Any = backbone.model
    assert images.train.labels is not None
    counts = torch.bincount(images.train.labels, minlength=model.num_classes)
    if (present := int((counts > 0).sum())) < model.num_classes:
        raise ValueError(
            f"head='probe' needs an image of every class; the training images have {present} of "
            f"{model.num_classes}: take more of them, or head='trained'."
        )
    options: dict[str, Any] = {"decays": [PAPER_DECAY]} if int(counts.max()) == 1 else {}  # none is left to choose on
    size = arguments.batch_size
    features = base_features(
        arguments,
        images.train,
        lambda: extract_features(backbone.model, images.train, evaluation_of(backbone), batch_size=size),
    )
    probe = fit_linear_probe(features, standardise=True, cautious=True, seed=arguments.subset_seed, **options)
    model.set_head(probe.weight, probe.bias, probe.mean, probe.std)


def evaluation_of(backbone: Backbone) -> Any:
    """How images are prepared to evaluate on them: as the backbone says, without randomness."""
    return preprocessing_transform(backbone.preprocessing)


def build_train_loader(
    arguments: TrainArguments, images: Images, backbone: Backbone, num_processes: int, process_index: int
) -> Any:
    """Augmented batches of the training images; each process gets its share of every batch.

    Raises:
        ValueError: If the batch does not divide, or there are fewer images than a batch has.
    """
    parts = num_processes * arguments.accumulate
    if arguments.batch_size % parts:
        raise ValueError(
            f"batch_size={arguments.batch_size} does not divide into {num_processes} processes × "
            f"{arguments.accumulate} accumulated parts: take a multiple of {parts}."
        )
    size, mean, std = backbone.image_size, backbone.mean, backbone.std
    if objective_kind(arguments).views == "one":
        transform = supervised_transform(size, mean, std, arguments.supervised)
    else:
        transform = multi_crop_transform(mean, std, arguments.multi_crop, global_size=size)
    return build_loader(
        images.train,
        transform,
        arguments.batch_size // arguments.accumulate,
        seed=arguments.seed,
        num_workers=arguments.num_workers,
        num_processes=num_processes,
        process_index=process_index,
        pin_memory=not arguments.cpu and torch.cuda.is_available(),
    )
