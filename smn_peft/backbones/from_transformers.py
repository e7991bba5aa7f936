# SPDX-License-Identifier: Apache-2.0
"""Vision models of transformers, of two-tower models the vision tower, with their own image processor."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, EvalTransform, check_loading, interpolate_positions

__all__ = ["classifier_of", "load"]


def load(
    source: str,
    config: Any,
    *,
    pretrained: bool,
    revision: str | None,
    projection: bool,
    image_size: int | None,
    dtype: torch.dtype,
    **kwargs: Any,
) -> Backbone:
    """Load the model that extracts features, `config` being the checkpoint's; `kwargs` are `from_pretrained`'s."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    vision_config = getattr(config, "vision_config", None) or config
    if vision_config is not config and hasattr(config, "projection_dim"):
        vision_config.projection_dim = config.projection_dim
    if hasattr(vision_config, "mask_ratio"):
        vision_config.mask_ratio = 0.0  # MAE hides patches in eval mode too
    auto: Any = transformers.AutoModel
    with torch.device("meta"):
        is_known = type(vision_config) in MODEL_MAPPING
        shape: Any = auto.from_config(vision_config, trust_remote_code=False) if is_known else None
    if getattr(shape, "main_input_name", None) != "pixel_values":
        kind = vision_config.model_type
        raise ValueError(f"{source} ({kind}) is not a vision model: load_backbone needs one that takes pixel_values.")
    model_class: Any = type(shape)
    # Checkpoints of ViT and DeiT classifiers have no weights for a pooler with a Linear.
    options = {"add_pooling_layer": False} if hasattr(getattr(shape, "pooler", None), "dense") else {}
    if projection and (model_class := getattr(transformers, f"{model_class.__name__}WithProjection", None)) is None:
        raise ValueError(f"{type(shape).__name__} has no form with a projection: leave out projection=True.")
    if pretrained:
        model, info = model_class.from_pretrained(
            source,
            config=vision_config,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **kwargs,
        )
        check_loading(info, source)
    else:
        model = model_class(vision_config, **options).to(dtype)
    processors: Any = transformers.AutoImageProcessor
    try:
        processor = processors.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError:
        processor = _default_processor(config, source)
        image_size = image_size or getattr(vision_config, "image_size", None)
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    own: Any = crop.get("height") if getattr(processor, "do_center_crop", False) else None
    own = own or size.get("height") or size.get("shortest_edge")
    overrides: dict[str, Any] = {}
    if image_size is not None and image_size != own:
        overrides["size"] = {key: round(value * image_size / own) for key, value in size.items()}
        if crop:
            overrides["crop_size"] = {key: image_size for key in crop}
    image_size = image_size or own
    if image_size != getattr(vision_config, "image_size", image_size):
        interpolate_positions(model)
    transform = EvalTransform(functools.partial(_processed, processor, overrides))
    return Backbone(model, transform, 0, "", image_size, tuple(processor.image_mean), tuple(processor.image_std))


@torch.no_grad()
def classifier_of(backbone: Backbone, revision: str | None) -> tuple[Tensor, Tensor | None]:
    """Weight (classes, dim) and bias of a checkpoint's classifier, which loading the backbone left out.

    It is the last linear layer, and the checkpoint's logits must be that layer on the backbone's features.
    """
    import transformers

    auto: Any = transformers.AutoModelForImageClassification
    dtype = next(backbone.model.parameters()).dtype
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, info = auto.from_pretrained(backbone.name, revision=revision, trust_remote_code=False, **options)
    check_loading(info, backbone.name)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    size, generator = backbone.image_size, torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, size, size, generator=generator).to(dtype)
    features, logits = backbone.features(noise), model.eval()(noise).logits
    if head.in_features != features.shape[1] or not torch.allclose(head(features), logits, rtol=1e-3, atol=1e-3):
        raise ValueError(f"logits of {type(model).__name__} are not a linear layer on the pooled features")
    return head.weight, head.bias


def _default_processor(config: Any, source: str) -> Any:
    """The processor of the architecture, for a checkpoint that does not say which it used."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    for model_type in (config.model_type, config.model_type.removesuffix("_vision_model")):
        if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in IMAGE_PROCESSOR_MAPPING:
            found = IMAGE_PROCESSOR_MAPPING[CONFIG_MAPPING[model_type]]
            classes = [found.get("pil"), found.get("torchvision")] if isinstance(found, dict) else found
            processor_class = [cls for cls in classes if cls is not None][-1]
            what = f"images are prepared as {processor_class.__name__} does by default"
            fix = "Save the right processor beside the model with processor.save_pretrained(folder)"
            warnings.warn(f"{source} has no preprocessor_config.json: {what}. {fix}.", stacklevel=4)
            return processor_class()
    what = f"{source} does not say how its images are prepared: save the image processor beside the model"
    raise ValueError(f"{what}, AutoImageProcessor.from_pretrained('<original model>').save_pretrained(folder).")


def _processed(processor: Any, overrides: dict[str, Any], image: Any) -> Tensor:
    pixel_values: Tensor = processor(images=image, return_tensors="pt", **overrides)["pixel_values"]
    return pixel_values[0]
