# SPDX-License-Identifier: Apache-2.0
"""timm models as transformers' `TimmWrapperModel`, so that PEFT and the Hub can find them again by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, EvalTransform, check_loading

__all__ = ["built_size", "classifier_of", "create", "load", "prepared"]


def load(source: str, *, revision: str | None, image_size: int | None, dtype: torch.dtype, **kwargs: Any) -> Backbone:
    """Load the weights of a Hub id or a folder; `kwargs` are those of `timm.create_model`."""
    import transformers
    from transformers.utils import cached_file

    path: Any = cached_file(source, "config.json", revision=revision)
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    architecture, model_args = config["architecture"], config.get("model_args") or {}
    pretrained_cfg = config.get("pretrained_cfg") or {}
    resample = image_size is not None and _has_fixed_size(architecture, model_args, pretrained_cfg)
    # timm writes num_classes among the arguments, which transformers' wrapper stumbles over.
    if kwargs or "num_classes" in model_args or resample:
        made = create(
            architecture,
            state_dict=cached_file(source, "model.safetensors", revision=revision),
            image_size=image_size,
            dtype=dtype,
            pretrained_cfg=pretrained_cfg,
            **{**model_args, **kwargs},
        )
        labels = transformers.TimmWrapperConfig.from_dict(config).id2label
        made.model.config.id2label = labels  # type: ignore[union-attr]
        return made
    wrapper: Any = transformers.TimmWrapperModel
    model, info = wrapper.from_pretrained(
        source, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    check_loading(info, source)
    return _of_timm(model, model.timm_model, pretrained_cfg, image_size)


def create(
    architecture: str,
    *,
    state_dict: str | os.PathLike[str] | Mapping[str, Tensor] | None,
    image_size: int | None,
    dtype: torch.dtype,
    pretrained_cfg: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Backbone:
    """Make a timm architecture with the given weights or random ones; `kwargs` are those of `timm.create_model`."""
    import timm
    from timm.models import filter_pretrained_cfg
    from transformers import TimmWrapperConfig, TimmWrapperModel

    kwargs.pop("num_classes", None)
    overlay = {key: value for key, value in (pretrained_cfg or {}).items() if key != "num_classes"}
    if image_size is not None and _has_fixed_size(architecture, kwargs, overlay):
        kwargs["img_size"] = image_size
    if state_dict is None:
        model: Any = timm.create_model(architecture, num_classes=0, pretrained_cfg_overlay=overlay, **kwargs)
    else:
        model = _create_with(architecture, _read(state_dict), overlay, kwargs)
    made = _of_timm(model.to(dtype), model, {}, image_size)
    known = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True, remove_null=True)
    known.pop("num_classes", None)
    known["input_size"] = (3, made.image_size, made.image_size)
    config: Any = TimmWrapperConfig
    config = config(architecture=architecture.partition(".")[0], model_args=dict(kwargs), pretrained_cfg=known)
    with torch.device("meta"):  # only the wrapper is needed
        wrapper: Any = TimmWrapperModel(config)
    wrapper.timm_model = model
    return replace(made, model=wrapper)


def _create_with(architecture: str, weights: dict[str, Tensor], overlay: dict[str, Any], kwargs: Any) -> nn.Module:
    """Let timm load the weights as it loads its own: renamed, resampled, and strictly."""
    import timm

    registered = timm.get_pretrained_cfg(architecture)
    classifier: Any = overlay.get("classifier") or (registered.classifier if registered else None) or ""
    head = weights.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    # The classes of the file on both sides: otherwise timm would load without `strict`.
    num_classes = 0 if head is None else head.shape[0]
    overlay = {**overlay, "state_dict": weights, "num_classes": num_classes, "custom_load": False}
    try:
        model: Any = timm.create_model(
            architecture, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs
        )
    except (RuntimeError, KeyError) as error:
        reason = "\n".join(line[:300] for line in str(error).splitlines()[:8])
        fix = "name the architecture they were saved from"
        raise ValueError(f"The weights do not fit {architecture}: {fix}.\n{reason}") from error
    model.pretrained_cfg.pop("state_dict", None)
    if num_classes:
        model.reset_classifier(0)
    return model


def classifier_of(
    backbone: Backbone, revision: str | None, state_dict: str | os.PathLike[str] | Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Weight (classes, dim) and bias of a checkpoint's classifier, which loading the backbone left out."""
    from transformers.utils import cached_file

    inner: Any = backbone.model.timm_model
    if state_dict is None:
        state_dict = cached_file(backbone.name, "model.safetensors", revision=revision)
        assert state_dict is not None
    tensors, name = _read(state_dict), inner.pretrained_cfg.get("classifier")
    if not isinstance(name, str) or (weight := tensors.get(f"{name}.weight")) is None:
        raise ValueError(f"it holds no {name}.weight" if isinstance(name, str) else f"timm names {name}")
    return weight.flatten(1), tensors.get(f"{name}.bias")  # of a ResNetV2 it is a 1 × 1 convolution


def _read(state_dict: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name; floating point as fp32, so that resampling is exact too."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = state_dict if isinstance(state_dict, Mapping) else load_file(state_dict)
    except SafetensorError as error:
        raise ValueError(f"{state_dict} is not a safetensors file: {error}") from error
    return {
        name.removeprefix("timm_model."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _has_fixed_size(architecture: str, model_args: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> bool:
    import timm

    registered = timm.get_pretrained_cfg(architecture)
    fixed = pretrained_cfg.get("fixed_input_size", registered is not None and registered.fixed_input_size)
    return bool(fixed) and not model_args.get("dynamic_img_size", False)


def prepared(model: nn.Module, config: dict[str, Any], size: int) -> Backbone:
    """The model with the image settings of a data config of timm, for images of `size` pixels."""
    from timm.data import create_transform

    transform = EvalTransform(create_transform(**{**config, "input_size": (3, size, size)}, is_training=False))
    return Backbone(model, transform, 0, "", size, tuple(config["mean"]), tuple(config["std"]))


def _of_timm(model: nn.Module, inner: Any, pretrained_cfg: Mapping[str, Any], image_size: int | None) -> Backbone:
    """The model with the image settings of timm's `inner`."""
    from timm.data import resolve_data_config

    known = {**inner.pretrained_cfg, **pretrained_cfg}
    size = image_size or built_size(inner) or known["input_size"][-1]
    return prepared(model, resolve_data_config({"input_size": (3, size, size)}, pretrained_cfg=known), size)


def built_size(model: Any) -> int | None:
    """The input size that a timm model with position embeddings was built for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return None if size is None else size[-1]
