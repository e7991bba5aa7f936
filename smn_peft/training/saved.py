# SPDX-License-Identifier: Apache-2.0
"""Load what a run saved, by its ``run.json`` or the adapter alone: the adapted backbone, or the masks."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..backbones import Backbone, is_file_spec, load_backbone, load_classifier, load_from_file, name_read_from
from ..data import check_preprocessing
from ..storage.adapter_config import CONFIG_NAME, read_config
from ..storage.adapter_file import BASE_PREFIX, WEIGHTS_NAME, AdapterSizes, adapter_sizes
from ..storage.files import check_regular
from ..tuner import MaskConfig
from ..tuner.checks import base_fingerprint
from .arguments import TrainArguments
from .assemble import load_base
from .checkpoint import latest_checkpoint
from .run import MODEL_NAME, RUN_NAME, RunSummary


def arguments_of(summary: RunSummary, backbone: str | None = None) -> TrainArguments:
    """Arguments that a run was started with, its base at `backbone` if given.

    Nothing in a ``run.json``, which anybody may have written, names a program: of an objective in a user's file only
    the name is kept, and a base in one must be given.
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
    """Load the model that a run saved, in eval mode, with images prepared as in training.

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
    summary = RunSummary.load(folder) if (folder / RUN_NAME).is_file() else None
    saved = _saved_preprocessing(folder, summary)
    arguments: TrainArguments | None = None
    if summary is not None:
        arguments = arguments_of(summary, backbone)
        arguments = replace(arguments, image_size=image_size or arguments.image_size)
        loaded = load_base(arguments, None if base else summary.arguments.get("head_classes"))
    else:
        loaded = _base_of_adapter(folder, base, backbone, image_size or (saved or {}).get("image_size"))
    if saved is not None:
        loaded = loaded.prepared_as(saved)
        if image_size not in (None, saved["image_size"]):
            warnings.warn(
                f"{folder} was trained on images of {saved['image_size']} pixels, and is used on {image_size}, as "
                "image_size says: leave it out for what it was trained for.",
                stacklevel=2,
            )
    if image_size is not None:
        loaded = loaded.prepared_as({"image_size": image_size})
    if base:
        return arguments, loaded
    if arguments is None or arguments.adapt in ("mask", "lora"):
        read_config(folder)  # before PEFT reads it, which waits for a FIFO
        model: Any = PeftModel.from_pretrained(loaded.model, str(folder))
    else:
        model, path = loaded.model, folder / MODEL_NAME
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist{_unfinished(folder)}.")
        check_regular(path)
        try:
            model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit the model that {folder / RUN_NAME} names: {error}") from error
    return arguments, replace(loaded, model=model.eval())


def load_masks(folder: str | Path, *, backbone: str | None = None) -> dict[str, Tensor]:
    """Load the bool masks, by weight name, of a run's folder or an adapter's; see [`load_run`]."""
    arguments, loaded = load_run(folder, backbone=backbone)
    if arguments is not None and arguments.adapt != "mask":
        raise ValueError(f"{folder} holds no mask: it was trained with adapt={arguments.adapt!r}.")
    model: Any = loaded.model
    masks: dict[str, Tensor] = model.masks()
    return masks


def save_run_as(folder: str | Path, out: str | Path, codec: str, backbone: str | None = None) -> AdapterSizes:
    """Load an adapter over its base and save it in folder `out` with another codec; see [`load_run`]."""
    model, config = _load_adapter(folder, backbone)
    config.codec = codec
    model.save_pretrained(str(out), save_embedding_layers=False)
    return adapter_sizes(out)


def verify_run(folder: str | Path, backbone: str | None = None) -> str:
    """Check that an adapter's base is its mask's, even if `check_base` is off, and return the fingerprint of both."""
    model, config = _load_adapter(folder, backbone)
    expected = config.base_fingerprint
    if expected is None:
        raise ValueError(f"{folder} names no fingerprint of its base: save it again with model.save_pretrained.")
    present = base_fingerprint(model, "default")
    if present != expected:
        raise ValueError(f"{folder} was made for a base with fingerprint {expected}; this base has {present}.")
    return expected


def _load_adapter(folder: str | Path, backbone: str | None) -> tuple[PeftModel, MaskConfig]:
    model = load_run(folder, backbone=backbone)[1].model
    if not isinstance(model, PeftModel):
        raise ValueError(f"{folder} holds a fully fine-tuned model and no adapter.")
    config: MaskConfig = model.peft_config["default"]  # type: ignore[assignment]
    return model, config


def _saved_preprocessing(folder: Path, summary: RunSummary | None) -> dict[str, Any] | None:
    """How images were prepared in training: by the adapter's config, else by ``run.json``, else None."""
    found = read_config(folder).get("preprocessing") if (folder / CONFIG_NAME).is_file() else None
    found = found or (summary.arguments.get("preprocessing") if summary is not None else None)
    try:
        return None if found is None else check_preprocessing(found)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _base_of_adapter(folder: Path, base: bool, backbone: str | None, image_size: int | None) -> Backbone:
    """The base that ``adapter_config.json`` names, with a head where the adapter's file holds one."""
    if not (folder / CONFIG_NAME).exists():
        raise FileNotFoundError(f"{folder} holds no {RUN_NAME} and no {CONFIG_NAME}{_unfinished(folder)}.")
    config = read_config(folder)
    name = backbone or name_read_from(folder / CONFIG_NAME, config.get("base_model_name_or_path") or "")
    if not name:
        raise ValueError(f"{folder / CONFIG_NAME} names no base: name it, as in --backbone timm/resnet18.a1_in1k.")
    if is_file_spec(name):  # the caller's own
        loaded = load_from_file(name)
    else:
        kind = (config.get("auto_mapping") or {}).get("base_model_class", "")
        options: dict[str, Any] = {"revision": config.get("revision"), "projection": "WithProjection" in kind}
        loaded = load_backbone(name, **options)
        if image_size not in (None, loaded.image_size):  # asked for only then: most models take no argument for it
            loaded = load_backbone(name, image_size=image_size, **options)
    if base:
        return loaded
    path = folder / WEIGHTS_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: the copy of the adapter is incomplete.")
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Copy it again.") from error
    if not any(key.startswith(f"{BASE_PREFIX}backbone.") for key in shapes):
        return loaded
    if (head := f"{BASE_PREFIX}head.weight") not in shapes:
        fix = "keep the run's folder together, or load the base yourself and use PeftModel.from_pretrained"
        raise ValueError(f"{folder} holds no head of its classifier, and no {RUN_NAME} says how it was made: {fix}.")
    return load_classifier(loaded, shapes[head][0])


def _unfinished(folder: Path) -> str:
    newest = latest_checkpoint(folder)
    if newest is None:
        return ": name the output_dir of a finished run, or the folder of an adapter"
    return f", only {newest.name} of a run that is not finished: go on with it by smn train … --resume"
