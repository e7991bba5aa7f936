# SPDX-License-Identifier: Apache-2.0
"""What `adapt` names: methods of PEFT and their configurations, and what trains of a model without PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftConfig,
    PeftType,
)
from torch import nn

from .._options import did_you_mean
from ..backbones import Classifier
from ..tuner import MaskConfig
from ..tuner.batch_norm import has_statistics
from ..tuner.forms import is_norm, iter_layers
from ..tuner.targets import exact_targets, head_modules, matching_names, resolve_targets

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
