# SPDX-License-Identifier: Apache-2.0
"""`ServedModel`: a backbone with a place for the tasks' heads, that gives logits and features in one forward."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..backbones import Backbone, base_name, is_file_spec, load_backbone, load_from_file, pooled_features

__all__ = ["ServedModel", "load_served"]


class ServedModel(nn.Module):
    """The base of a bank that serves.

    The head is a plain `nn.Linear`, so that mixed batches may share one product: what standardises a `Classifier`'s
    features is folded into the weights of a task's head when it is read.

    Attributes:
        backbone: The model that gives the features.
        head_name: Where the head is, as adapters call it.
        name_or_path: The backbone's name.
    """

    #: Where the vision model is, in transformers' words.
    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, feature_dim: int, head_name: str = "head") -> None:
        """Put a place for heads on a backbone.

        Args:
            backbone: A vision model whose `pooled_features` are (batch, feature_dim).
            feature_dim: Size of the features.
            head_name: "head" in adapters made on a `Classifier`; on a plain timm model as timm names it, such as "fc"
                or "head.fc".

        Raises:
            ValueError: If the name is not one of a module, or taken.
        """
        super().__init__()
        self.backbone = backbone
        self.name_or_path = base_name(backbone) or ""
        *parents, last = head_name.split(".")
        owner: nn.Module = self
        for part in parents:
            owner = _placed(owner, part, nn.Module(), head_name)
        _placed(owner, last, nn.Linear(feature_dim, 1), head_name)
        self.head_name = head_name
        self.eval()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """(batch, 3, height, width) -> "logits" (batch, classes) and "features" (batch, 1, feature_dim).

        The second dimension tells features from logits where a bank looks for what was made of a mixed batch's logits.
        """
        features = pooled_features(self.backbone, pixel_values, **kwargs)
        head = self.get_submodule(self.head_name)
        return {"logits": head(features.to(next(head.parameters()).dtype)), "features": features[:, None]}


def _placed(owner: nn.Module, part: str, module: nn.Module, head_name: str) -> nn.Module:
    if not part.isidentifier() or hasattr(owner, part):
        raise ValueError(f"{head_name!r} is no name for a head: it is 'head', 'fc', 'classifier' or the like.")
    owner.add_module(part, module)
    return module


def load_served(
    base: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    head_name: str = "head",
) -> Backbone:
    """Load the base of a bank by name.

    Args:
        base: Hub id, timm name, folder, or "file.py:function", which is run.
        weights: safetensors file for the timm architecture `base`.
        image_size: Another input size than the model's own.
        head_name: See [`ServedModel`].

    Returns:
        The backbone with a [`ServedModel`] as its `model`.

    Raises:
        ValueError: As `load_backbone`; also for arguments that a file's own model cannot take.
        OSError: As `load_backbone`.
    """
    name = os.fspath(base)
    if not is_file_spec(name):
        backbone = load_backbone(name, state_dict=weights, image_size=image_size)
    elif weights is not None or image_size is not None:
        raise ValueError(f"--weights and --image-size are for libraries' models, not for {name}.")
    else:
        backbone = load_from_file(name)
    return replace(backbone, model=ServedModel(backbone.model, backbone.feature_dim, head_name))
