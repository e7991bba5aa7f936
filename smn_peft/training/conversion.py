# SPDX-License-Identifier: Apache-2.0
"""`convert`: a mask in the place of a fine-tuned model, from its weights alone, or by its outputs on images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .._options import merged
from ..backbones import Backbone, Classifier, load_classifier
from ..evaluation import library_versions
from ..hub import full_bytes
from ..storage.adapter_config import CONFIG_NAME
from ..storage.adapter_file import adapter_sizes
from ..tuner import MaskConfig, MaskLayer
from ..tuner.wrapper import adapter_layers
from .arguments import TrainArguments, as_facts, load_recipe
from .assemble import FineTuned, adapted, load_base
from .run import RUN_NAME, RunSummary, check_folder, claim, run
from .saved import load_run

_OF_BASE = ("backbone", "weights", "pretrained", "backbone_revision", "base_dtype", "image_size", "seed")


def load_fine_tuned(name: str | Path, base: Mapping[str, Any] | None = None) -> FineTuned:
    """Load a fine-tuned classifier: the folder of a finished run other than a mask's, or any checkpoint.

    Args:
        name: The run's `output_dir`; or what `load_classifier` takes, or a safetensors file of timm's `backbone`.
        base: Arguments of `TrainArguments` that name the base; of a run only where its `backbone` is now.

    Raises:
        ValueError: It has a mask or no classifier, its base is not named, or the two are not the same architecture.
        FileNotFoundError: There is no such run, file or folder.
    """
    name, base = str(name), {key: value for key, value in (base or {}).items() if key in _OF_BASE}
    if Path(name, RUN_NAME).is_file() or Path(name, CONFIG_NAME).is_file():
        return _of_run(Path(name), base.get("backbone"))
    if not base.get("backbone"):
        raise ValueError(f"{name} is no run of `smn train`, which would name its base: name it by --backbone.")
    if name.endswith(".safetensors"):
        tuned = load_classifier(base["backbone"], state_dict=name, image_size=base.get("image_size"))
    else:
        tuned = load_classifier(name, image_size=base.get("image_size"))
    names = dict(getattr(tuned.model.config, "id2label", None) or {})
    # transformers makes up names where a checkpoint has none, and timm's know only how many.
    known = len(names) == tuned.model.num_classes and list(names.values()) != [f"LABEL_{index}" for index in names]
    arguments = TrainArguments(**base)
    if (loaded := load_base(arguments)).image_size != tuned.image_size:
        loaded = load_base(arguments := replace(arguments, image_size=tuned.image_size))
    _check_same(name, tuned, loaded)
    found, model = {key: getattr(arguments, key) for key in _OF_BASE}, tuned.model.eval().requires_grad_(False)
    classes = list(names.values()) if known else None
    return FineTuned(model, found, classes=classes)  # type: ignore[arg-type]


def _of_run(folder: Path, backbone: str | None) -> FineTuned:
    arguments, loaded = load_run(folder, backbone=backbone)
    model: Any = loaded.model
    if isinstance(model, PeftModel):
        if isinstance(model.active_peft_config, MaskConfig):
            raise ValueError(f"{folder} holds a mask already.")
        model = model.merge_and_unload()
    if arguments is None or not isinstance(model, Classifier):
        raise ValueError(f"{folder} holds no finished run of `smn train` with a head: there are no classes to follow.")
    base = {name: getattr(arguments, name) for name in _OF_BASE}
    classes = RunSummary.load(folder).arguments.get("classes")
    return FineTuned(model.eval().requires_grad_(False), base, arguments.dataset, classes)


def _check_same(name: str, tuned: Backbone, base: Backbone) -> None:
    """Raise ValueError unless weights are alike in name and shape, and images are prepared alike."""
    own = {key: value.shape for key, value in tuned.model.backbone.state_dict().items()}  # type: ignore[union-attr]
    of_base = {key: value.shape for key, value in base.model.state_dict().items()}
    if wrong := [key for key in {**of_base, **own} if own.get(key) != of_base.get(key)]:
        what = f"{len(wrong)} weights are missing on one side or of another shape, such as {', '.join(wrong[:3])}"
        raise ValueError(f"{name} is not {base.name} fine-tuned: {what}. Name the base that it was made from.")
    for key in ("mean", "std"):
        if (there := getattr(tuned, key)) != (here := getattr(base, key)):
            what = f"images of {name} are normalised with {key} {there}, those of {base.name} with {here}"
            raise ValueError(f"{what}: save the same image processor, or pretrained_cfg, beside both.")


def convert(
    name: str | Path, output_dir: str | Path, values: Mapping[str, Any] | None = None, *, backbone: str | None = None
) -> RunSummary:
    """Make the mask and head whose model is nearest to a fine-tuned one's.

    Without a dataset only the weights count: a weight is off where 0 is nearer to the fine-tuned one than the base's
    is. With a dataset, of which labels are not needed, the mask is trained by the recipe ``distill`` until its logits
    follow those of the fine-tuned model; with labels of the same classes both are evaluated.

    Args:
        name: Output folder of `smn train` with any `adapt` but ``"mask"``; or a checkpoint with a classifier: a Hub
            id, a folder of transformers or timm, or a safetensors file of the timm architecture `backbone`.
        output_dir: Folder to write the adapter to.
        values: Arguments of `TrainArguments`, such as `dataset`, `limit`, `mask` or `max_bytes`.
        backbone: The base: of a checkpoint needed, of a run where it is now, if not where the run says.

    Returns:
        What was done, as of [`run`]; without a dataset nothing is evaluated.

    Raises:
        ValueError: As of [`load_fine_tuned`] and [`run`].

    Warns:
        UserWarning: Weights that no mask holds were fine-tuned too, such as norms, and no dataset is given.
    """
    values = dict(values or {})
    tuned = load_fine_tuned(name, merged(values, {"backbone": backbone}) if backbone else values)
    fixed = {"output_dir": str(output_dir), "adapt": "mask", "objective": "distillation"}
    if values.get("dataset"):
        return run(TrainArguments(**merged(load_recipe("distill"), tuned.base, values, fixed)), teacher=tuned)
    arguments = TrainArguments(**merged(tuned.base, values, fixed, {"dataset": tuned.dataset}))
    check_folder(arguments)
    loaded = load_base(arguments, tuned.model.num_classes)
    loaded.model.head.load_state_dict(tuned.model.head.state_dict())  # type: ignore[union-attr]
    model: Any = adapted(arguments, loaded, tuned.classes)
    if others := set_nearest(model, tuned.model):
        warnings.warn(
            f"{len(others)} tensors that no mask holds were fine-tuned too, such as {others[0]}: the adapter leaves "
            "them as the base has them. With a dataset the mask is trained to make up for that.",
            stacklevel=2,
        )
    with claim(output_dir):
        model.save_pretrained(str(output_dir), save_embedding_layers=False)
        facts: dict[str, Any] = {"classes": tuned.classes, "head_classes": tuned.model.num_classes}
        facts["preprocessing"] = loaded.preprocessing
        summary = RunSummary(
            arguments=as_facts(arguments, facts),
            before={},
            after={},
            loss=None,
            density=model.base_model.density(),
            steps=0,
            seconds=0.0,
            images_per_second=None,
            sizes={**vars(adapter_sizes(output_dir)), "full": full_bytes(model)},
            versions={name: library_versions()[name] for name in ("smn_peft", "torch")},
        )
        summary.save(output_dir)
    return summary


@torch.no_grad()
def set_nearest(model: PeftModel, teacher: Classifier) -> list[str]:
    """Set an adapter's masks to those nearest to other weights: off where ``θ'·θ < θ²/2``, so that 0 is nearer than θ.

    Returns the names of other weights and statistics, but for the head's, that differ from the teacher's.
    """
    adapter, tuned = model.active_adapter, dict(teacher.state_dict())
    base: Any = model.get_base_model()
    taken: set[str] = set()
    for name, layer in adapter_layers(base):
        for slot in layer.slots_of(adapter) if isinstance(layer, MaskLayer) else ():
            own, new = layer.base_tensor(slot), tuned[f"{name}.{slot.path}"]
            layer.set_mask(adapter, slot, new * own >= own.square() / 2)
            taken.add(f"{name}.{slot.path}")
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items()}
    rest = (name for name in tuned if name not in taken and not name.startswith("head."))
    return [name for name in rest if not torch.equal(tuned[name], state[name])]
