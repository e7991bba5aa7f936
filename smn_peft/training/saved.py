# SPDX-License-Identifier: Apache-2.0
"""What a run saved, loaded again: `load_run` gives the adapted backbone, from ``run.json`` or the adapter alone."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..backbones import Backbone, is_file_spec, load_backbone, load_classifier, load_from_file, name_read_from
from ..storage import CONFIG_NAME, WEIGHTS_NAME, check_regular, read_config
from .assemble import load_base
from .checkpoint import latest_checkpoint
from .preparation import loaded_at, prepared, saved_preprocessing
from .run import MODEL_NAME, RUN_NAME, RunSummary
from .train_arguments import TrainArguments

__all__ = ["arguments_of", "load_masks", "load_run"]


def arguments_of(summary: RunSummary, backbone: str | None = None) -> TrainArguments:
    """The arguments that a run was started with, none of which names a program but `backbone`.

    Args:
        summary: As read from ``run.json``, whoever wrote that.
        backbone: Where the base is, if not where the run says. Of an objective in a file of the user's the name is
            kept, which is known once the caller has imported that file.

    Raises:
        ValueError: If they are those of another version of the package, or the base is a program and not given.
    """
    names = [field.name for field in fields(TrainArguments)]
    found = {name: summary.arguments[name] for name in names if name in summary.arguments}
    found["backbone"] = backbone or name_read_from(RUN_NAME, str(found.get("backbone", "")))
    if is_file_spec(str(found.get("objective", ""))):
        found["objective"] = found["objective"].rpartition(":")[2]
    return TrainArguments(**found)


def load_run(
    folder: str | Path, *, base: bool = False, backbone: str | None = None, image_size: int | None = None
) -> tuple[TrainArguments | None, Backbone]:
    """The model that a run saved, ready to evaluate on images prepared as they were in training.

    Args:
        folder: The run's `output_dir`, or any folder with an adapter.
        base: The frozen base alone, without adapter and head.
        backbone: Where the base is now, if not where the folder says.
        image_size: Another side of the images than in training; a warning says so.

    Returns:
        The run's arguments, None where there is no ``run.json``; and the backbone, its model a `PeftModel` over the
        base, or, after full fine-tuning, the model itself. With a head it gives logits, and `features` those before.

    Raises:
        FileNotFoundError: If nothing is saved there.
        ValueError: If the base cannot be known, or the saved weights do not belong to it.
    """
    folder = Path(folder)
    if (folder / RUN_NAME).is_file():
        summary = RunSummary.load(folder)
        arguments = arguments_of(summary, backbone)
        arguments = replace(arguments, image_size=image_size or arguments.image_size)
        saved = saved_preprocessing(folder, summary.arguments)
        loaded = load_base(arguments, None if base else summary.arguments.get("head_classes"))
        adapted = arguments.adapt in ("mask", "lora")
    else:
        arguments, adapted, saved = None, True, saved_preprocessing(folder)
        size = image_size or (saved or {}).get("image_size")
        loaded = loaded_at(lambda at: _base_of_adapter(folder, base=base, backbone=backbone, image_size=at), size)
    loaded = prepared(loaded, saved, image_size, folder)
    if base:
        return arguments, loaded
    if adapted:
        read_config(folder)  # before PEFT reads it, which waits for a FIFO
        model: Any = PeftModel.from_pretrained(loaded.model, str(folder))
    else:
        model = _filled(loaded.model, folder / MODEL_NAME)
    return arguments, replace(loaded, model=model.eval())


def load_masks(folder: str | Path, *, backbone: str | None = None) -> dict[str, Tensor]:
    """Bool masks by weight name of what a run saved.

    Args:
        folder: The run's `output_dir`, or any folder with an adapter.
        backbone: Where the base is, if not where the folder says.

    Raises:
        FileNotFoundError: If nothing is saved there.
        ValueError: If what is saved is no mask, or the base cannot be known.
    """
    arguments, loaded = load_run(folder, backbone=backbone)
    if arguments is not None and arguments.adapt != "mask":
        raise ValueError(f"{folder} holds no mask: it was trained with adapt={arguments.adapt!r}.")
    model: Any = loaded.model
    masks: dict[str, Tensor] = model.masks()
    return masks


def _base_of_adapter(folder: Path, *, base: bool, backbone: str | None, image_size: int | None) -> Backbone:
    """The base that ``adapter_config.json`` names, with a head where the adapter's file holds one."""
    if not (folder / CONFIG_NAME).exists():
        raise FileNotFoundError(f"{folder} holds no {RUN_NAME} and no {CONFIG_NAME}{_unfinished(folder)}.")
    config = read_config(folder)
    name = backbone or name_read_from(folder / CONFIG_NAME, config.get("base_model_name_or_path") or "")
    if not name:
        raise ValueError(
            f"{folder / CONFIG_NAME} names no base model: name it, as in --backbone timm/resnet18.a1_in1k."
        )
    if is_file_spec(name):  # the caller's own
        loaded = load_from_file(name)
    else:
        kind = (config.get("auto_mapping") or {}).get("base_model_class", "")
        options: dict[str, Any] = {"revision": config.get("revision"), "projection": "WithProjection" in kind}
        loaded = load_backbone(name, image_size=image_size, **options)
    if base:
        return loaded
    shapes = _shapes(folder / WEIGHTS_NAME)
    if not any(key.startswith("base_model.model.backbone.") for key in shapes):
        return loaded
    if "base_model.model.head.weight" not in shapes:
        raise ValueError(
            f"{folder} adapts a classifier whose head it does not hold, and has no {RUN_NAME} that says how the head "
            "was made: keep the run's folder together, or load the base yourself and use PeftModel.from_pretrained."
        )
    return load_classifier(loaded, shapes["base_model.model.head.weight"][0])


def _shapes(path: Path) -> dict[str, list[int]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: the copy of the adapter is incomplete.")
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Copy it again.") from error


def _unfinished(folder: Path) -> str:
    newest = latest_checkpoint(folder)
    if newest is None:
        return ": name the output_dir of a finished run, or the folder of an adapter"
    return f", only {newest.name} of a run that is not finished: go on with it by smn train … --resume"


def _filled(model: nn.Module, path: Path) -> nn.Module:
    """The model with all weights of a file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist{_unfinished(path.parent)}.")
    check_regular(path)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit the model that {path.parent / RUN_NAME} names: {error}") from error
    return model
