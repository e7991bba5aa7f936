# SPDX-License-Identifier: Apache-2.0
"""From arguments to parts: base model, adapter (mask or LoRA), objective, loader and evaluation, all checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from ..backbones import Backbone, accept_size, load_backbone, load_classifier
from ..backbones.clip import templates_for, text_embeddings
from ..backbones.from_file import is_file_spec, load_from_file
from ..data import (
    ImageDataset,
    MultiCropOptions,
    build_loader,
    multi_crop_transform,
    preprocessing_transform,
    supervised_transform,
)
from ..evaluation import (
    PAPER_DECAY,
    Features,
    evaluate_accuracy,
    evaluate_knn,
    extract_features,
    fit_linear_probe,
    linear_probe,
)
from ..objectives import Objective, create_objective
from ..storage.adapter_file import WEIGHTS_NAME
from ..storage.fingerprint import fingerprint, tensor_digest
from ..tuner import MaskConfig, explain_targets
from ..tuner.batch_norm import has_statistics
from ..tuner.targets import resolve_targets, stage_targets
from .arguments import TrainArguments, objective_kind
from .checkpoint import latest_checkpoint, start_from
from .images import Images, base_features
from .task import TrainingTask


def load_base(arguments: TrainArguments, num_classes: int | None = None) -> Backbone:
    """Load the frozen base that the arguments name, with a head for `num_classes` or without one."""
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
    """Build the model under its adapter (or bare, for the baselines) and the objective; head='probe' uses `device`."""
    kind = objective_kind(arguments)
    num_classes = images.num_classes if kind.consumes == "logits" else None
    backbone = load_base(arguments, num_classes)
    # Of all that the base's features depend on, before anything changes it.
    state = getattr(backbone.model, "backbone", backbone.model).state_dict()
    first = next((tensor.dtype for tensor in state.values()), torch.float32)
    base = fingerprint((tensor_digest(tensor) for tensor in state.values()), first)
    if kind.views == "crops":
        _accept_crops(arguments.multi_crop, backbone)
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


def build_objective(
    arguments: TrainArguments, backbone: Backbone, num_classes: int | None, classes: list[str] | None
) -> Objective:
    """Create the objective; zero-shot gets the embeddings of the class names."""
    extra: dict[str, Any] = {}
    if arguments.objective == "zero_shot":
        if not classes:
            raise ValueError(f"objective='zero_shot' needs class names, and {arguments.dataset} has none.")
        templates = arguments.templates or templates_for(arguments.dataset)
        revision = arguments.backbone_revision
        embeddings, scale = text_embeddings(arguments.backbone, classes, templates, revision=revision)
        extra = {"class_embeddings": embeddings, "logit_scale": torch.tensor(scale)}
        num_classes = len(classes)
    name, options = objective_kind(arguments).name, dict(arguments.objective_options)
    return create_objective(name, feature_dim=backbone.feature_dim, num_classes=num_classes, options=options, **extra)


def _accept_crops(crops: MultiCropOptions, backbone: Backbone) -> None:
    """Refuse sizes of crops that do not fit, and let the backbone take local crops beside its own size."""
    size = backbone.image_size
    if crops.global_size not in (size, MultiCropOptions().global_size):
        fix = f"set image_size={crops.global_size}, or leave it out"
        raise ValueError(f"multi_crop.global_size={crops.global_size} is not the image size, {size}: {fix}.")
    if not crops.local_crops:
        return
    if crops.local_size >= size:
        fix = "the paper has 96 to 224. Or set multi_crop.local_crops=0."
        raise ValueError(f"multi_crop.local_size={crops.local_size} must be below the image size, {size}: {fix}")
    try:
        accept_size(backbone, crops.local_size)
    except ValueError as error:
        raise ValueError(f"{error}. Set another multi_crop.local_size, or multi_crop.local_crops=0.") from error


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
    config: MaskConfig = copy.deepcopy(arguments.mask)
    # For users of the adapter, who may have its two files only.
    config.preprocessing = backbone.preprocessing
    config.id2label = dict(enumerate(classes)) if has_head and classes is not None else None
    config.seed = config.seed or arguments.seed
    if arguments.mask_stages is not None:
        config.target_modules = stage_targets(model, config.target_modules, arguments.mask_stages)
    if arguments.adapt == "lora":
        in_full, rank, alpha = ["head"] if has_head else None, arguments.lora_rank, arguments.lora_alpha
        lora = lora_config(model, config, rank=rank, alpha=alpha, modules_to_save=in_full)
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
    """Initialise the head with a linear probe on the frozen features of the training images."""
    model: Any = backbone.model
    assert images.train.labels is not None
    counts = torch.bincount(images.train.labels, minlength=model.num_classes)
    if (present := int((counts > 0).sum())) < model.num_classes:
        found = f"the training images have {present} of {model.num_classes} classes"
        raise ValueError(f"head='probe' needs all: {found}. Take more of them, or head='trained'.")
    options: dict[str, Any] = {"decays": [PAPER_DECAY]} if int(counts.max()) == 1 else {}  # none left to choose on
    size, transform = arguments.batch_size, evaluation_of(backbone)
    extract = partial(extract_features, model, images.train, transform, batch_size=size)
    features = base_features(arguments, images.train, extract)
    probe = fit_linear_probe(features, standardise=True, cautious=True, seed=arguments.subset_seed, **options)
    model.set_head(probe.weight, probe.bias, probe.mean, probe.std)


def evaluation_of(backbone: Backbone) -> Any:
    """Transform of images for evaluation: as the backbone's preprocessing says, without randomness."""
    return preprocessing_transform(backbone.preprocessing)


def build_train_loader(
    arguments: TrainArguments, images: Images, backbone: Backbone, num_processes: int, process_index: int
) -> Any:
    """Build the loader of augmented batches, of which each process gets its share."""
    parts = num_processes * arguments.accumulate
    if arguments.batch_size % parts:
        split = f"{num_processes} processes × {arguments.accumulate} accumulated parts: take a multiple of {parts}"
        raise ValueError(f"batch_size={arguments.batch_size} does not divide into {split}.")
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


def evaluator_of(
    arguments: TrainArguments, images: Images, backbone: Backbone, accelerator: Accelerator
) -> Callable[[TrainingTask], dict[str, Any]] | None:
    """Build the function that evaluates a task on the run's images; None if there is nothing to test on.

    ``evaluation`` names images and k, so that only comparable values are compared. The first call of a run that does
    not resume is of the frozen base: a mask that does not start with all ones is switched off for it.
    """
    bank, test = images.bank, images.test
    if test is None or bank is None:
        return None
    transform, fresh = evaluation_of(backbone), latest_checkpoint(arguments.output_dir) is None
    names = ("eval_split", "eval_limit", "knn_k", "knn_limit")
    evaluation = ", ".join(f"{name}={getattr(arguments, name)}" for name in names)

    def measure(task: TrainingTask, shared: bool) -> dict[str, Any]:
        def features_of(part: ImageDataset) -> Features:
            size, workers = arguments.batch_size, arguments.num_workers
            loading: dict[str, Any] = {"batch_size": size, "num_workers": workers, "accelerator": accelerator}
            extract = partial(extract_features, task.model, part, transform, **loading)
            return base_features(arguments, part, extract) if shared else extract()

        voting, tested = features_of(bank), features_of(test)
        values = {"evaluation": evaluation, "knn": evaluate_knn(voting, tested, k=arguments.knn_k)}
        if arguments.eval_probe:
            values["linear_probe"] = linear_probe(voting, tested, seed=arguments.subset_seed)
        if task.objective.needs_labels:
            values["accuracy"] = evaluate_accuracy(Features(task.logits_of(tested.features), tested.labels)).top1
        return values

    def evaluate(task: TrainingTask) -> dict[str, Any]:
        nonlocal fresh
        first, fresh = fresh, False
        alone = accelerator.num_processes == 1
        moved = arguments.init_from is not None or task.density() not in (None, 1)  # it does not start at the base
        if first and moved and isinstance(task.model, PeftModel):
            with task.model.disable_adapter():
                return measure(task, alone)
        return measure(task, alone and first and not moved)

    return evaluate


# --- PEFT's LoRA as a baseline, on the layers of a mask and at its size ----------------------------------------------


def lora_config(
    model: nn.Module,
    mask: MaskConfig,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    modules_to_save: list[str] | None = None,
) -> LoraConfig:
    """Configure LoRA on the layers that a mask would take; None: the rank that matches it, alpha = 2 · rank."""
    rank = matched_lora_rank(model, mask) if rank is None else rank
    where: dict[str, Any] = {name: getattr(mask, name) for name in ("layers_to_transform", "layers_pattern")}
    targets = resolve_targets(model, mask.target_modules, **where)
    if targets is not mask.target_modules:  # the layers are in the names
        where = {}
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # PEFT takes any number
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=mask.exclude_modules,
        modules_to_save=modules_to_save,
        **where,
    )


def matched_lora_rank(model: nn.Module, mask: MaskConfig) -> int:
    """The largest rank whose fp32 factors take no more bytes than the packed mask; ValueError if rank 1 takes more."""
    available = explain_targets(model, mask, verbose=False).packed_bytes
    empty = copy.deepcopy(model).to("meta")
    adapted = get_peft_model(empty, lora_config(empty, mask, rank=1), low_cpu_mem_usage=True)
    per_rank = 4 * sum(parameter.numel() for name, parameter in adapted.named_parameters() if ".lora_" in name)
    if per_rank > available:
        sizes = f"LoRA of rank 1 takes {per_rank:,} bytes, the mask of the same layers {available:,}"
        raise ValueError(f"{sizes}: no rank matches it. Give one, as in lora_rank=1.")
    return available // per_rank


def lora_sizes(folder: str | Path) -> dict[str, int]:
    """Bytes of a saved LoRA adapter: of its ``factors``, of the ``head`` and others in full, and ``total``."""
    path = Path(folder) / WEIGHTS_NAME
    sums = {"factors": 0, "head": 0}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            sums["factors" if ".lora_" in name else "head"] += tensor.numel() * tensor.element_size()
    return {**sums, "total": path.stat().st_size}
