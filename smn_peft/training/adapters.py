# SPDX-License-Identifier: Apache-2.0
"""From `adapt` to a model that trains: a mask, another method of PEFT, the biases, the head, or all weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
)
from torch import nn

from .._options import did_you_mean
from ..backbones import Backbone, Classifier, pooled_features
from ..storage.adapter_file import rounded
from ..tuner import MaskConfig, round_extras
from ..tuner.batch_norm import has_statistics
from ..tuner.forms import is_norm, iter_layers
from ..tuner.targets import exact_targets, head_modules, matching_names, resolve_targets, stage_targets

if TYPE_CHECKING:
    from .arguments import TrainArguments
    from .task import TrainingTask

WITHOUT_PEFT = ("full", "head", "bias", "statistics")
"""Values of `adapt` that train parameters of the base itself, whose file is a state dict."""


@cache
def peft_methods() -> dict[str, type[PeftConfig]]:
    """Configuration classes of PEFT's other methods that adapt layers, by the name that `adapt` takes: "lora"."""
    kinds = {kind.value.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind] for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    # AdaLoRA wants a call of its own in every step, which the loop does not make.
    left_out = (MaskConfig, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ADALORA])
    takes_layers = (name for name, kind in kinds.items() if "target_modules" in (each.name for each in fields(kind)))
    return {name: kinds[name] for name in takes_layers if kinds[name] not in left_out}


def check_adapt(adapt: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown method, or for an option that its configuration does not have."""
    known = ["mask", *WITHOUT_PEFT, *peft_methods()]
    if adapt not in known:
        raise ValueError(f"adapt must be one of {', '.join(known)}; got {adapt!r}.{did_you_mean(adapt, known)}")
    if adapt not in peft_methods():
        if options:
            raise ValueError(f"peft holds options of PEFT's methods, and adapt={adapt!r} has none: leave it out.")
        return
    kind = peft_methods()[adapt]
    names = [each.name for each in fields(kind) if each.init]
    if unknown := [name for name in options if name not in names]:
        hint = did_you_mean(unknown[0], names)
        raise ValueError(f"peft: {kind.__name__} of adapt={adapt!r} has no option {unknown[0]!r}.{hint}")


def adapted(arguments: TrainArguments, backbone: Backbone, classes: list[str] | None) -> nn.Module:
    """Prepare a loaded model for training as `arguments.adapt` says; a head trains unless it is masked.

    Raises:
        ValueError: The method cannot take the layers, or there is nothing of what it trains.
    """
    model: Any = backbone.model
    has_head = isinstance(model, Classifier)
    if arguments.adapt in WITHOUT_PEFT:
        if arguments.adapt == "statistics" and not any(has_statistics(module) for module in model.modules()):
            raise ValueError(f"adapt='statistics' needs BatchNorm, and {arguments.backbone} has none.")
        return select_trainable(model, arguments.adapt)
    config: MaskConfig = copy.deepcopy(arguments.mask)
    # For users of the adapter, who may have its two files only.
    config.preprocessing = backbone.preprocessing
    config.id2label = dict(enumerate(classes)) if has_head and classes is not None else None
    config.seed = config.seed or arguments.seed
    if arguments.save_dtype != "float32":
        config.save_dtype = arguments.save_dtype
    if arguments.mask_stages is not None:
        config.target_modules = stage_targets(model, config.target_modules, arguments.mask_stages)
    if has_head and arguments.head == "masked":
        targets = resolve_targets(model, config.target_modules)
        if isinstance(targets, str):
            raise ValueError("head='masked' adds the head to mask.target_modules: give those as a list, or None.")
        config.target_modules = [*targets, "head"]
    elif has_head:
        config.modules_to_save = [*(config.modules_to_save or []), "head"]
    if arguments.adapt == "mask":
        return get_peft_model(model, config)
    torch.manual_seed(arguments.seed)  # PEFT draws the first weights from the global stream
    try:
        before = _features_of_noise(model, backbone.image_size)
        model = get_peft_model(model, peft_config(model, arguments.adapt, config, arguments.peft))
        after = _features_of_noise(model, backbone.image_size)  # a method may fail only here
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # PEFT's, of many kinds
        what = f"adapt={arguments.adapt!r} cannot adapt {arguments.backbone}: {' '.join(str(error).split())}"
        fix = "Set options of the method by peft, other layers by mask.target_modules, or take another method."
        raise ValueError(f"{what.rstrip('.')}. {fix}") from error
    if (change := float((after - before).norm() / before.norm())) > 1e-3:
        text = f"adapt={arguments.adapt!r} changes the features by {change:.2g} of their size before it is trained"
        warnings.warn(f"{text}: it does not start from {arguments.backbone}.", stacklevel=2)
    return model


@torch.no_grad()
def _features_of_noise(model: nn.Module, size: int) -> torch.Tensor:
    """Features (2, dim) in eval mode of two images of noise, which draw nothing from the global stream."""
    device = next(model.parameters()).device
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    training = model.training
    found = pooled_features(model.eval(), noise).float()
    model.train(training)
    return found


def peft_config(model: nn.Module, method: str, mask: MaskConfig, options: Mapping[str, Any]) -> PeftConfig:
    """Configure a method of PEFT on the layers that a mask would take; `options` win over what is set here.

    LN-tuning takes the norms. IA3 takes the layers of a mask that narrow, such as an MLP's second, as feed-forward
    ones. LoRA's `lora_alpha` is 2 · rank.
    """
    kind = peft_methods()[method]
    where: dict[str, Any] = {name: getattr(mask, name) for name in ("layers_to_transform", "layers_pattern")}
    targets = resolve_targets(model, mask.target_modules, **where)
    if targets is not mask.target_modules:  # the layers are in the names
        where = {}
    if method == "ln_tuning":
        heads = head_modules(model)
        targets = exact_targets(model, [n for n, m in iter_layers(model) if is_norm(m) and id(m) not in heads])
        where = {}
    values: dict[str, Any] = {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "exclude_modules": mask.exclude_modules,
        "modules_to_save": mask.modules_to_save,
        **where,
    }
    if method == "ia3":
        layers = {name: model.get_submodule(name) for name in matching_names(model, targets)}
        narrow = [n for n, m in layers.items() if isinstance(m, nn.Linear) and m.in_features > m.out_features]
        values["feedforward_modules"] = exact_targets(model, narrow) if narrow else []
    if method == "lora":
        values["lora_alpha"] = 2 * options.get("r", 8)
    values = {name: value for name, value in {**values, **options}.items() if value is not None}
    names = {each.name for each in fields(kind)}
    if missing := [name for name in values if name not in names]:
        fix = "name the layers in peft.target_modules or mask.target_modules instead"
        raise ValueError(f"{kind.__name__} has no {missing[0]}, which mask.{missing[0]} sets: {fix}")
    return kind(**values)


# --- Without PEFT: what trains, what of it is saved ------------------------------------------------------------------


def select_trainable(model: nn.Module, adapt: str) -> nn.Module:
    """Set which parameters of a bare model train: all, every bias, or the head alone; a head always does."""
    model.requires_grad_(adapt == "full")
    if adapt == "bias":  # BitFit (Ben Zaken et al. 2022): every bias that the base has, those of norms too
        biases = [p for name, p in model.named_parameters() if name.endswith("bias") and not name.startswith("head.")]
        if not biases:
            raise ValueError(f"adapt='bias' trains the base's biases, and {type(model).__name__} has none.")
        for parameter in biases:
            parameter.requires_grad_(True)
    if isinstance(model, Classifier):
        model.head.requires_grad_(True)
    return model


def trained_names(model: nn.Module, *, statistics: bool = False) -> list[str]:
    """Names in a bare model's state dict of what training changes; all if every parameter trains.

    Those are parameters that train and buffers beside them; with `statistics` those of every BatchNorm.
    """
    state = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if parameters and all(parameter.requires_grad for parameter in parameters.values()):
        return list(state)
    chosen = {name for name, parameter in parameters.items() if parameter.requires_grad}
    for path, module in model.named_modules(remove_duplicate=False):
        own = list(module.parameters(recurse=False))
        whole = all(parameter.requires_grad for parameter in own)
        if (whole and (own or has_statistics(module))) or (statistics and has_statistics(module)):
            chosen |= {f"{path}.{name}".removeprefix(".") for name, _ in module.named_buffers(recurse=False)}
    return [name for name in state if name in chosen]


@torch.no_grad()
def round_trained(task: TrainingTask, save_dtype: str) -> None:
    """Round what training changed of the model to the dtype that it is saved in, in place; objectives stay.

    The tensors keep their dtype: evaluate after this call, and what is measured is what is saved. A mask's config has
    a `save_dtype` of its own. ValueError if a value is beyond what the dtype can hold.
    """
    if task.mask_config is not None:
        round_extras(task.model)
    elif save_dtype != "float32":
        for name, tensor in task.trained_tensors().items():
            tensor.copy_(rounded(name, tensor, save_dtype))


def saved_tensors(task: TrainingTask, save_dtype: str) -> dict[str, torch.Tensor]:
    """Tensors by name to save of a model without a mask: rounded; of another method of PEFT all of its state dict."""
    narrow = {name: rounded(name, tensor, save_dtype) for name, tensor in task.trained_tensors().items()}
    return {**task.model.state_dict(), **narrow} if isinstance(task.model, PeftModel) else narrow
