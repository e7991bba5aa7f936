# SPDX-License-Identifier: Apache-2.0
"""The objective that a run's arguments name: its class, and the objective itself with all that it needs."""

from __future__ import annotations

from typing import Any

import torch

from ..backbones import Backbone
from ..backbones.clip import templates_for, text_embeddings
from ..backbones.from_file import import_file, is_file_spec
from ..objectives import Objective, create_objective, list_objectives, objective_class
from .train_arguments import TrainArguments

__all__ = ["build_objective", "objective_kind"]


def objective_kind(arguments: TrainArguments) -> type[Objective]:
    """The objective's class, by name or from the user's file that registers it: ``file.py:name``.

    Raises:
        ValueError: Unknown name, or a file that does not register it.
    """
    name = arguments.objective
    if is_file_spec(name):
        path, _, name = name.rpartition(":")
        if name not in list_objectives():
            import_file(path)
        if name not in list_objectives():
            raise ValueError(f"{path} registers no objective {name!r}: decorate its class with @register_objective.")
    return objective_class(name)


def build_objective(
    arguments: TrainArguments, backbone: Backbone, num_classes: int | None, classes: list[str] | None
) -> Objective:
    """The objective that the arguments name; for zero-shot with the embeddings of the class names.

    Raises:
        ValueError: If a name or an option is unknown, or class names are needed and missing.
    """
    kind, options = objective_kind(arguments), dict(arguments.objective_options)
    extra: dict[str, Any] = {}
    if arguments.objective == "zero_shot":
        if not classes:
            raise ValueError(f"objective='zero_shot' needs class names, and {arguments.dataset} has none.")
        templates = arguments.templates or templates_for(arguments.dataset)
        revision = arguments.backbone_revision
        embeddings, scale = text_embeddings(arguments.backbone, classes, templates, revision=revision)
        extra = {"class_embeddings": embeddings, "logit_scale": torch.tensor(scale)}
        num_classes = len(classes)
    return create_objective(
        kind.name, feature_dim=backbone.feature_dim, num_classes=num_classes, options=options, **extra
    )
