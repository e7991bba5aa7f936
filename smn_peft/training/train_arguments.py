# SPDX-License-Identifier: Apache-2.0
"""`TrainArguments`: a whole run, from the backbone's name to the evaluation, as the command line takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_origin, get_type_hints

from ..data import MultiCropOptions, SupervisedOptions
from ..tuner import MaskConfig
from .loop_arguments import LoopArguments, option
from .paths import absolute
from .suggestion import did_you_mean

__all__ = ["TrainArguments"]

_PLACES = ("backbone", "weights", "dataset", "init_from", "indices_file", "objective")


@dataclass
class TrainArguments(LoopArguments):
    """What to adapt, on which images, to which objective; the loop's own arguments are inherited."""

    backbone: str = option("", "Hub id, timm name, folder, or your own file.py:function that returns a model.")
    weights: str | None = option(None, "A safetensors file with weights for the timm architecture `backbone`.")
    pretrained: bool = option(True, "False starts from random weights, which is good for tests only.")
    backbone_revision: str | None = option(None, "Git revision of the backbone on the Hub.")
    image_size: int | None = option(None, "Side of the images in pixels; None: the backbone's own.")
    init_from: str | None = option(
        None, "Start from the scores, head and statistics of this run's output_dir, instead of the first ones."
    )
    adapt: Literal["mask", "full", "head", "lora", "statistics"] = option(
        "mask",
        "What trains: a mask, all weights, the head alone, PEFT's LoRA on the layers of `mask`, or, beside the head, "
        "nothing but the BatchNorm statistics.",
    )
    mask: MaskConfig = field(default_factory=MaskConfig, metadata={"help": "The mask adapter."})
    mask_stages: int | None = option(None, "Mask the first so many stages only, or blocks where there are no stages.")
    lora_rank: int | None = option(
        None, "Rank of adapt='lora'; None: the largest whose fp32 factors take at most the bytes of the packed mask."
    )
    lora_alpha: float | None = option(None, "α of adapt='lora', whose update is scaled by α / rank; None: 2 · rank.")

    dataset: str = option("", "Name of a known dataset, Hub id, image folder, parquet or npz file.")
    dataset_revision: str | None = option(None, "Git revision of the dataset on the Hub.")
    image_column: str | None = option(None, "Column of the images, if the dataset does not say.")
    label_column: str | None = option(None, "Column of the labels, if the dataset does not say.")
    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option("test", "Split to evaluate on; None: do not evaluate.")
    eval_fraction: float | None = option(
        None,
        "Evaluate on this part of the images of train_split instead, evenly of every class, and train on the rest.",
    )
    eval_limit: int | None = option(None, "Evaluate on a seeded choice of this many images of eval_split.")
    knn_limit: int | None = option(None, "k-NN votes with at most this many labelled training images.")
    knn_k: int = option(200, "Neighbours of the k-NN evaluation; all where there are fewer.")
    eval_probe: bool = option(False, "Fit a linear probe too whenever k-NN is evaluated.")
    limit: int | None = option(None, "Train on a seeded choice of this many images.")
    class_limit: int | None = option(None, "Train and evaluate on the images of the first so many classes only.")
    fraction: float = option(1.0, "Train on this fraction of the images (after limit).")
    balanced: bool = option(True, "Take the fraction evenly from the classes, where labels are known.")
    subset_seed: int = option(0, "Seed of the limits, so that runs with other seeds see the same images.")
    fraction_seed: int = option(0, "Seed of the fraction; with one seed a smaller part lies in a larger one.")
    indices_file: str | None = option(
        None, "A .npy of image numbers: train on these of the images that limit and fraction leave."
    )
    num_workers: int = option(0, "Processes that load and augment images; 0: the training process itself.")
    cache_images: bool = option(False, "Hold decoded images in memory, up to 2 GiB.")
    supervised: SupervisedOptions = field(
        default_factory=SupervisedOptions, metadata={"help": "Augmentation where there is one view per image."}
    )
    multi_crop: MultiCropOptions = field(
        default_factory=MultiCropOptions, metadata={"help": "Augmentation where there are several views per image."}
    )

    objective: str = option("cross_entropy", "cross_entropy, zero_shot, swav, or your own file.py:name.")
    objective_options: dict[str, Any] = option({}, "Options of the objective, as key=value.")
    head: Literal["trained", "probe", "masked"] = option(
        "trained", "Head for labels: new and trained; trained from a linear probe; or frozen, random and masked."
    )
    templates: list[str] = option([], "Prompts of the zero-shot head, each with one {}; none: the dataset's own.")

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        super().__post_init__()
        for name, kind in (("mask", MaskConfig), ("supervised", SupervisedOptions), ("multi_crop", MultiCropOptions)):
            if isinstance(value := getattr(self, name), Mapping):
                setattr(self, name, _from_mapping(kind, value))
        for name, example in (("backbone", "timm/resnet50.a1_in1k"), ("dataset", "cifar10")):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: name one, such as {name}={example!r}.")
        for name in _PLACES:
            if getattr(self, name):
                setattr(self, name, absolute(getattr(self, name)))
        for name, allowed in (
            ("adapt", ("mask", "full", "head", "lora", "statistics")),
            ("head", ("trained", "probe", "masked")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        for name, least in (("knn_k", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction must lie in (0, 1]; got {self.fraction}.")
        if self.eval_fraction is not None and not 0.0 < self.eval_fraction < 1.0:
            raise ValueError(f"eval_fraction must lie in (0, 1), or be None; got {self.eval_fraction}.")
        if self.eval_fraction is not None and self.eval_split is None:
            raise ValueError("eval_fraction holds images out to evaluate on, and eval_split=None evaluates on none.")
        for name in ("image_size", "limit", "class_limit", "eval_limit", "knn_limit", "mask_stages", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None; got {value}.")
        if self.image_size is not None and self.image_size > 4096:
            raise ValueError(f"image_size must be at most 4096; got {self.image_size}.")
        if self.head == "masked" and self.adapt != "mask":
            raise ValueError("head='masked' needs adapt='mask': a frozen random head can only be masked.")
        if self.adapt == "head" and self.objective != "cross_entropy":
            raise ValueError("adapt='head' needs objective='cross_entropy': nothing else has a head to keep.")
        if self.mask_stages is not None and self.mask.layers_to_transform is not None:
            raise ValueError("mask_stages and mask.layers_to_transform both choose layers: give one of them.")
        if self.adapt == "lora" and self.mask.batch_norm == "adapt":
            raise ValueError("adapt='lora' keeps the base's BatchNorm statistics: set mask.batch_norm='frozen'.")


def _from_mapping(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A nested dataclass from what YAML or JSON holds, in which a tuple is a list."""
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no option {unknown[0]!r}.{did_you_mean(unknown[0], hints)}")
    return kind(**{key: tuple(v) if get_origin(hints[key]) is tuple else v for key, v in values.items()})
