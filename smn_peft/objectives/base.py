# SPDX-License-Identifier: Apache-2.0
"""`Objective`: a batch in, a loss out, for any model; and the registry of objectives by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from .._options import did_you_mean, from_mapping

Batch = Mapping[str, Any]
"""``pixel_values`` (batch, 3, H, W) or ``crops``, a list of such tensors with the global ones first; ``labels``."""

Model = Callable[[Tensor], Tensor]
"""Images (batch, 3, H, W) in; features (batch, dim) or logits (batch, classes) out, as the objective consumes."""

_FIXES = {
    "pixel_values": "use a transform that gives one view, such as supervised_transform.",
    "labels": "use a data set with labels (label_column), or an objective without.",
    "crops": "use a transform with several views, such as multi_crop_transform.",
}


@dataclass(frozen=True)
class NoOptions:
    """Options of an objective that has none."""


class Objective(nn.Module):
    """Base class of objectives. A subclass sets the class attributes and defines `forward`.

    Parameters and buffers are fp32; they are trained, moved and saved with the model. An objective never sees PEFT:
    `model` is any function of images.

    Attributes:
        name: Name in the registry, set by [`register_objective`].
        views: ``"one"``: the batch holds ``pixel_values``; ``"crops"``: it holds ``crops``, several views per image.
        needs_labels: Whether the batch must hold ``labels``.
        consumes: Whether `model` returns features or logits.
        run_state: Names of buffers that belong to one run; a run that starts from another's weights resets them.
        Options: Dataclass of the options, each field with ``metadata={"help": …}``.

    Args:
        feature_dim: Number of features that the model returns per image.
        num_classes: Number of classes, or None without labels.
        options: An instance of `Options`.
    """

    name: ClassVar[str] = ""
    views: ClassVar[Literal["one", "crops"]]
    needs_labels: ClassVar[bool]
    consumes: ClassVar[Literal["features", "logits"]]
    run_state: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(self, feature_dim: int, num_classes: int | None, options: Any) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.num_classes = num_classes
        self.options = options

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Compute ``"loss"``, the mean over this process's batch, and detached scalars to log."""
        raise NotImplementedError(f"{type(self).__name__} has to define forward(model, batch).")

    def begin(self, total_steps: int) -> None:
        """Prepare for a run of `total_steps` optimizer steps; called before training starts or resumes."""

    def before_step(self, step: int) -> None:
        """Hook before the forward of optimizer step `step`, counted from 0."""

    def after_backward(self, step: int) -> None:
        """Hook between the reduction of the gradients of step `step` and the optimizer's step."""

    @property
    def grace_steps(self) -> int:
        """First steps in which a collapse does not stop the run."""
        return 0

    def collapsed(self, logs: Mapping[str, float]) -> str | None:
        """Describe the collapse that the averaged outputs of `forward` show, with advice; None if they show none."""
        return None

    def entry(self, batch: Batch, key: str) -> Any:
        """``batch[key]``; ValueError if it is missing."""
        if key not in batch:
            raise ValueError(f"{self.name} needs batch[{key!r}], and the batch has {sorted(batch)}: {_FIXES[key]}")
        return batch[key]

    def features(self, model: Model, images: Tensor) -> Tensor:
        """The model's features; ValueError if their shape is not (batch, feature_dim)."""
        features = model(images)
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            made = f"{self.name} was made for features of shape (batch, {self.feature_dim}), and the model returned"
            fix = "pass the model's pooled features, or its feature_dim when the objective is created"
            raise ValueError(f"{made} {tuple(features.shape)}: {fix}.")
        return features

    def crops(self, batch: Batch, global_crops: int = 1) -> list[Tensor]:
        """``batch["crops"]``: at least two tensors (batch, 3, h, w), the global crops first, all of one size."""
        crops, needed = list(self.entry(batch, "crops")), max(global_crops, 2)
        if len(crops) < needed:
            found = f"the batch has {len(crops)}: make more crops, or lower global_crops"
            raise ValueError(f"{self.name} needs {global_crops} global crops and {needed} crops in all, {found}.")
        if len({len(crop) for crop in crops}) > 1:
            raise ValueError(f"Every crop must hold the same images, got batch sizes {[len(crop) for crop in crops]}.")
        sizes = [tuple(crop.shape[-2:]) for crop in crops]
        if len(set(sizes[:global_crops])) > 1:
            first = f"The first {global_crops} crops must be the global ones"
            raise ValueError(f"{first}, of one size; got sizes {sizes}.")
        return crops

    def crop_features(self, model: Model, crops: Sequence[Tensor]) -> Tensor:
        """Features of all crops, (crops · batch, dim), crop by crop; crops of one size share a forward."""
        found: dict[int, Tensor] = {}
        for shape in dict.fromkeys(crop.shape for crop in crops):
            members = [i for i, crop in enumerate(crops) if crop.shape == shape]
            features = self.features(model, torch.cat([crops[i] for i in members]))
            found.update(zip(members, features.chunk(len(members)), strict=True))
        return torch.cat([found[i] for i in range(len(crops))])


AnyObjective = TypeVar("AnyObjective", bound=type[Objective])

OBJECTIVES: dict[str, type[Objective]] = {}
"""The registered classes by name."""


def register_objective(name: str) -> Callable[[AnyObjective], AnyObjective]:
    """Class decorator: make an [`Objective`] available by name to [`create_objective`], recipes and the command line.

    Raises:
        TypeError: If the class is no [`Objective`], or lacks one of the class attributes.
        ValueError: If another class has the name.
    """

    def register(cls: AnyObjective) -> AnyObjective:
        if not (isinstance(cls, type) and issubclass(cls, Objective)):
            raise TypeError(f"{cls!r} cannot be registered as {name!r}: derive the class from Objective.")
        attributes = {"views": ("one", "crops"), "needs_labels": (False, True), "consumes": ("features", "logits")}
        for attribute, allowed in attributes.items():
            if getattr(cls, attribute, None) not in allowed:
                raise TypeError(f"{cls.__name__} has to set the class attribute {attribute} to one of {allowed}.")
        owner, new = (f"{each.__module__}.{each.__qualname__}" for each in (OBJECTIVES.get(name, cls), cls))
        if owner != new:  # a notebook cell that is run again defines the same class anew
            raise ValueError(f"The objective name {name!r} belongs to {owner}: take another name.")
        cls.name = name
        OBJECTIVES[name] = cls
        return cls

    return register


def list_objectives() -> list[str]:
    """Names of all registered objectives, sorted."""
    return sorted(OBJECTIVES)


def objective_class(name: str) -> type[Objective]:
    """The class registered under a name; ValueError if there is none."""
    if name not in OBJECTIVES:
        known = f"{did_you_mean(name, OBJECTIVES)} Known: {', '.join(list_objectives())}"
        raise ValueError(f"Unknown objective {name!r}.{known}. Your own: decorate it with @register_objective.")
    return OBJECTIVES[name]


def create_objective(
    name: str,
    *,
    feature_dim: int,
    num_classes: int | None = None,
    options: Mapping[str, Any] | Any | None = None,
    **arguments: Any,
) -> Objective:
    """Construct an objective by name.

    Args:
        name: One of [`list_objectives`].
        feature_dim: Number of features that the model returns per image.
        num_classes: Number of classes; required by objectives that need labels.
        options: The objective's options dataclass, a mapping of its fields as YAML gives it, or None for the defaults.
        arguments: Further arguments of the class, such as the class embeddings of ``zero_shot``.

    Raises:
        ValueError: If the name or an option is unknown, a value out of range or of another type, or `num_classes`
            missing.
        TypeError: If `options` are those of another objective.
    """
    cls = objective_class(name)
    if options is None or isinstance(options, Mapping):
        options = from_mapping(cls.Options, options or {}, f"Options of {name!r}")
    elif not isinstance(options, cls.Options):
        raise TypeError(f"{name!r} takes {cls.Options.__name__} or a mapping, got {type(options).__name__}.")
    if cls.needs_labels and num_classes is None:
        raise ValueError(f"The objective {name!r} learns from labels: pass num_classes.")
    return cls(feature_dim, num_classes, options, **arguments)
