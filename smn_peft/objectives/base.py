# SPDX-License-Identifier: Apache-2.0
"""`Objective`: a batch in, a loss out, for any model; and the registry of objectives by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from torch import Tensor, nn

from .values import from_yaml

__all__ = [
    "Batch",
    "Model",
    "NoOptions",
    "Objective",
    "create_objective",
    "list_objectives",
    "objective_class",
    "register_objective",
]

Batch = Mapping[str, Any]
"""``pixel_values`` (batch, 3, H, W) or ``crops``, a list of such tensors with the global ones first; ``labels``."""

Model = Callable[[Tensor], Tensor]
"""Images (batch, 3, H, W) in; features (batch, dim) or logits (batch, classes) out, as the objective consumes."""

Views = Literal["one", "crops"]
Consumes = Literal["features", "logits"]


@dataclass(frozen=True)
class NoOptions:
    """Options of an objective that has none."""


class Objective(nn.Module):
    """What a model is trained for. A subclass sets the class attributes and writes `forward`.

    Parameters and buffers are trained, moved and saved with the model; they are fp32. An objective never sees PEFT:
    `model` is any function of images. It is constructed as ``cls(feature_dim, num_classes, options)``.

    Attributes:
        name: Name in the registry, set by [`register_objective`].
        views: ``"one"``: the batch holds ``pixel_values``; ``"crops"``: it holds ``crops``, several views per image.
        needs_labels: Whether the batch must hold ``labels``.
        consumes: Whether `model` returns features or logits.
        run_state: Names of buffers that belong to one run: another that starts from its weights starts them anew.
        Options: Dataclass of the options, each field with ``metadata={"help": …}``.
    """

    name: ClassVar[str] = ""
    views: ClassVar[Views]
    needs_labels: ClassVar[bool]
    consumes: ClassVar[Consumes]
    run_state: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(self, feature_dim: int, num_classes: int | None, options: Any) -> None:
        """Keep what every objective is constructed from.

        Args:
            feature_dim: Number of features that the model returns per image.
            num_classes: Number of classes, or None without labels.
            options: An instance of `Options`.
        """
        super().__init__()
        self.feature_dim = feature_dim
        self.num_classes = num_classes
        self.options = options

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch.

        Returns:
            ``"loss"``, the mean over this process's batch, and detached scalars to log.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define forward(model, batch).")

    def begin(self, total_steps: int) -> None:
        """Called once before training, or before it resumes, with the optimizer steps of the whole run."""

    def before_step(self, step: int) -> None:
        """Called before the forward of optimizer step `step`, which counts from 0."""

    def after_backward(self, step: int) -> None:
        """Called after the gradients of step `step` are reduced, before the optimizer moves."""

    @property
    def grace_steps(self) -> int:
        """Steps before which a collapse that shows need not stay."""
        return 0

    def collapsed(self, logs: Mapping[str, float]) -> str | None:
        """What is wrong and what to change, if the averaged scalars of `forward` show a collapse; else None."""
        return None


AnyObjective = TypeVar("AnyObjective", bound=type[Objective])

_OBJECTIVES: dict[str, type[Objective]] = {}


def register_objective(name: str) -> Callable[[AnyObjective], AnyObjective]:
    """Class decorator: make an [`Objective`] available by name.

    Args:
        name: Name for [`create_objective`], recipes and the command line.

    Raises:
        TypeError: If the class is no [`Objective`], or lacks one of the class attributes.
        ValueError: If another class has the name.
    """

    def register(cls: AnyObjective) -> AnyObjective:
        if not (isinstance(cls, type) and issubclass(cls, Objective)):
            raise TypeError(f"{cls!r} cannot be registered as {name!r}: derive the class from Objective.")
        for attribute, allowed in {
            "views": get_args(Views),
            "needs_labels": (False, True),
            "consumes": get_args(Consumes),
        }.items():
            if getattr(cls, attribute, None) not in allowed:
                raise TypeError(f"{cls.__name__} has to set the class attribute {attribute} to one of {allowed}.")
        other = _OBJECTIVES.get(name)
        # A notebook cell that is run again defines the same class anew.
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"The objective name {name!r} belongs to {other.__module__}.{other.__qualname__}: take another name."
            )
        cls.name = name
        _OBJECTIVES[name] = cls
        return cls

    return register


def list_objectives() -> list[str]:
    """Names of all registered objectives, sorted."""
    return sorted(_OBJECTIVES)


def _unknown(what: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {what} {name!r}.{hint} Known: {', '.join(known) or 'none'}."


def objective_class(name: str) -> type[Objective]:
    """The class registered under a name.

    Raises:
        ValueError: If no objective has the name.
    """
    if name not in _OBJECTIVES:
        raise ValueError(_unknown("objective", name, list_objectives()) + " Your own: @register_objective.")
    return _OBJECTIVES[name]


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
        options: The objective's options dataclass, or a mapping of its fields as YAML reads them, or None for the
            defaults.
        arguments: What an objective takes beside its options, such as the class embeddings of ``zero_shot``.

    Raises:
        ValueError: If the name or an option is unknown, a value out of range or of another type, or `num_classes`
            missing.
        TypeError: If `options` are those of another objective.
    """
    cls = objective_class(name)
    if options is None:
        options = cls.Options()
    elif isinstance(options, Mapping):
        known = [field.name for field in fields(cls.Options)]
        for key in options:
            if key not in known:
                raise ValueError(_unknown(f"option of {name!r}:", str(key), known))
        hints = get_type_hints(cls.Options)
        options = cls.Options(
            **{key: from_yaml(value, hints[key], f"The option {key!r} of {name!r}") for key, value in options.items()}
        )
    elif not isinstance(options, cls.Options):
        raise TypeError(f"{name!r} takes {cls.Options.__name__} or a mapping, got {type(options).__name__}.")
    if cls.needs_labels and num_classes is None:
        raise ValueError(f"The objective {name!r} learns from labels: pass num_classes.")
    return cls(feature_dim, num_classes, options, **arguments)
