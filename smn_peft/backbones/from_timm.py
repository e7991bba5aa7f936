# SPDX-License-Identifier: Apache-2.0
"""timm models as transformers' `TimmWrapperModel`, so that PEFT and the Hub can find them again by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .settings import ImageSettings, check_loading

__all__ = ["create", "load"]

_PREFIX = "timm_model."


def load(
    source: str, *, revision: str | None, image_size: int | None, dtype: torch.dtype, **kwargs: Any
) -> tuple[Any, ImageSettings]:
    """The weights of a Hub id or a folder.

    Args:
        source: Hub id, or folder.
        revision: Git revision on the Hub.
        image_size: Side of the input, None for the model's own.
        dtype: Type of the weights.
        kwargs: Arguments of `timm.create_model`.
    """
    import transformers
    from transformers.utils import cached_file

    path: Any = cached_file(source, "config.json", revision=revision)
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    architecture, model_args = config["architecture"], config.get("model_args") or {}
    pretrained_cfg = config.get("pretrained_cfg") or {}
    # timm writes num_classes among the arguments, which transformers' wrapper stumbles over.
    if kwargs or "num_classes" in model_args or _must_resample(architecture, model_args, pretrained_cfg, image_size):
        weights = cached_file(source, "model.safetensors", revision=revision)
        return create(
            architecture,
            state_dict=weights,
            image_size=image_size,
            dtype=dtype,
            pretrained_cfg=pretrained_cfg,
            **{**model_args, **kwargs},
        )
    wrapper: Any = transformers.TimmWrapperModel
    model, info = wrapper.from_pretrained(
        source, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    check_loading(info, source)
    return model, _settings(model.timm_model, pretrained_cfg, image_size)


def create(
    architecture: str,
    *,
    state_dict: str | os.PathLike[str] | Mapping[str, Tensor] | None,
    image_size: int | None,
    dtype: torch.dtype,
    pretrained_cfg: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, ImageSettings]:
    """An architecture with the given weights, or with random ones.

    Args:
        architecture: timm name, with or without tag.
        state_dict: safetensors file, tensors by name, or None.
        image_size: Side of the input; timm resamples position embeddings to it.
        dtype: Type of the weights.
        pretrained_cfg: What is known of the weights beyond timm's registry, such as mean and std.
        kwargs: Arguments of `timm.create_model`.
    """
    import timm

    kwargs.pop("num_classes", None)
    overlay = {key: value for key, value in (pretrained_cfg or {}).items() if key != "num_classes"}
    if image_size is not None and _has_fixed_size(architecture, kwargs, overlay):
        kwargs["img_size"] = image_size
    if state_dict is None:
        model = timm.create_model(architecture, num_classes=0, pretrained_cfg_overlay=overlay, **kwargs)
    else:
        model = _create_with(architecture, _read(state_dict), overlay, kwargs)
    settings = _settings(model, {}, image_size)
    return _wrapped(model.to(dtype), architecture, kwargs, settings.image_size), settings


def _create_with(architecture: str, weights: dict[str, Tensor], overlay: dict[str, Any], kwargs: Any) -> nn.Module:
    """Let timm itself load the weights, as it would load its own: renamed, resampled, and strictly."""
    import timm

    registered = timm.get_pretrained_cfg(architecture)
    classifier = overlay.get("classifier") or (registered.classifier if registered else None) or ""
    first = classifier if isinstance(classifier, str) else classifier[0]
    head = weights.get(f"{first}.weight")
    # The classes of the file on both sides: otherwise timm would load without `strict`.
    num_classes = 0 if head is None else head.shape[0]
    overlay = {**overlay, "state_dict": weights, "num_classes": num_classes, "custom_load": False}
    try:
        model: Any = timm.create_model(
            architecture, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs
        )
    except (RuntimeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = "\n".join(f"  {line[:300]}{'…' if len(line) > 300 else ''}" for line in lines[:8])
        raise ValueError(
            f"The weights do not fit {architecture}: name the architecture they were saved from.\n{reason}"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)
    if num_classes:
        model.reset_classifier(0)
    return model


def _read(state_dict: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name; floating point as fp32, so that resampling is exact too."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if isinstance(state_dict, Mapping):
        tensors = dict(state_dict)
    else:
        try:
            tensors = load_file(state_dict)
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(state_dict)} is not a safetensors file: {error}") from error
    return {
        name.removeprefix(_PREFIX): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _wrapped(model: Any, architecture: str, model_args: Mapping[str, Any], image_size: int) -> Any:
    from timm.models import filter_pretrained_cfg
    from transformers import TimmWrapperConfig, TimmWrapperModel

    pretrained_cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True, remove_null=True)
    pretrained_cfg.pop("num_classes", None)
    pretrained_cfg["input_size"] = (3, image_size, image_size)
    config: Any = TimmWrapperConfig
    config = config(
        architecture=architecture.partition(".")[0], model_args=dict(model_args), pretrained_cfg=pretrained_cfg
    )
    with torch.device("meta"):  # only the shell is wanted
        wrapper = TimmWrapperModel(config)
    wrapper.timm_model = model
    return wrapper


def _has_fixed_size(architecture: str, model_args: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> bool:
    import timm

    registered = timm.get_pretrained_cfg(architecture)
    fixed = pretrained_cfg.get("fixed_input_size", registered is not None and registered.fixed_input_size)
    return bool(fixed) and not model_args.get("dynamic_img_size", False)


def _must_resample(
    architecture: str, model_args: Mapping[str, Any], pretrained_cfg: Mapping[str, Any], image_size: int | None
) -> bool:
    return image_size is not None and _has_fixed_size(architecture, model_args, pretrained_cfg)


def _settings(model: Any, pretrained_cfg: Mapping[str, Any], image_size: int | None) -> ImageSettings:
    from timm.data import create_transform, resolve_data_config

    known = {**model.pretrained_cfg, **pretrained_cfg}
    size = image_size or _built_size(model) or known["input_size"][-1]
    config = resolve_data_config({"input_size": (3, size, size)}, pretrained_cfg=known)
    return ImageSettings(
        create_transform(**config, is_training=False), size, tuple(config["mean"]), tuple(config["std"])
    )


def _built_size(model: Any) -> int | None:
    """The input size that a model with position embeddings was built for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[-1] if size is not None else None
