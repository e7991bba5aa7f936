# SPDX-License-Identifier: Apache-2.0
"""The Python lines that load an adapter, as its card shows them: the base first, made as it was in training."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..backbones import is_file_spec
from ..storage import WEIGHTS_NAME
from .names import as_code, hub_id, shown_name

__all__ = ["base_code", "loading_code"]

_HEAD = "base_model.model.head.weight"
# What is no id on the Hub: a timm name, or the last part of a path, perhaps with a function.
_OWN_NAME = re.compile(r"[\w.-]+(\.py:\w+)?", re.ASCII)
_UNKNOWN = "\nbase = ...  # the model that the mask was learned on, loaded as it was then"
_REGISTER = "import smn_peft  # registers masks with PEFT; without it loading fails: KeyError: 'SMN'"


def loading_code(base: str, where: str, subfolder: str | None = None, revision: str | None = None) -> str:
    """Whole code of a card: imports, the base, and PEFT's loader.

    Args:
        base: Of [`base_code`].
        where: Repository or folder.
        subfolder: Folder of the task in it.
        revision: Branch or commit to load, None for the default.
    """
    options = "".join(
        f", {name}={as_code(value)}" for name, value in (("subfolder", subfolder), ("revision", revision)) if value
    )
    lines = [_REGISTER, "from peft import PeftModel", base, ""]
    return "\n".join([*lines, f"model = PeftModel.from_pretrained(base, {as_code(where)}{options}).eval()"])


def base_code(folder: Path, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Import lines, an empty line, and the lines that make `base`.

    Args:
        folder: Folder of the adapter: its file tells how many classes a head has.
        config: What adapter_config.json holds.
        arguments: The run's, empty if there was none.
    """
    mapping = config.get("auto_mapping") or {}
    kind, library = mapping.get("base_model_class") or "", mapping.get("parent_library") or ""
    name = arguments.get("backbone") or config.get("base_model_name_or_path")
    known = hub_id(name) or shown_name(name)
    if not hub_id(name) and not _OWN_NAME.fullmatch(known):
        return _UNKNOWN
    if arguments or library.startswith("smn_peft."):
        return _with_backbone(folder, name, config, arguments, kind)
    revision = f", revision={as_code(config['revision'])}" if config.get("revision") else ""
    if library.startswith("transformers.") and hub_id(name) and _is_class_name(kind):
        return f"from transformers import {kind}\n\nbase = {kind}.from_pretrained({as_code(name)}{revision})"
    if library.startswith("timm.") and name:
        shown = as_code(_timm_name(name))
        return f"import timm\n\nbase = timm.create_model({shown}, pretrained=True)  # with the same head"
    return _UNKNOWN


def _is_class_name(kind: str) -> bool:
    return kind.isascii() and kind.isidentifier() and not keyword.iskeyword(kind)


def _timm_name(name: str) -> str:
    repository = hub_id(name)
    return f"hf-hub:{repository}" if repository else shown_name(name)


def _with_backbone(
    folder: Path, name: str | None, config: Mapping[str, Any], arguments: Mapping[str, Any], kind: str
) -> str:
    """By this package's own loaders, as `smn train` does."""
    own_file = bool(name) and is_file_spec(str(name))
    loader = "load_from_file" if own_file else "load_backbone"
    options: dict[str, Any] = {}
    if not own_file:
        if not arguments.get("pretrained", True) and not arguments.get("weights"):
            options["pretrained"] = False
        if arguments.get("weights"):
            options["state_dict"] = shown_name(arguments["weights"])
        options["image_size"] = arguments.get("image_size")
        options["revision"] = arguments.get("backbone_revision") or config.get("revision")
        if arguments.get("objective") == "zero_shot" or "WithProjection" in kind:
            options["projection"] = True
    shown = "".join(f", {key}={as_code(value)}" for key, value in options.items() if value is not None)
    classes = _classes(folder, arguments)
    imports = f"from smn_peft.backbones import {loader}" + (", load_classifier" if classes else "")
    lines = [imports, "", f"backbone = {loader}({as_code(shown_name(name))}{shown})"]
    if options.get("pretrained") is False or own_file:
        lines = ["import torch", *lines]
        seed = as_code(arguments.get("seed", 0))
        lines.insert(3, f"torch.manual_seed({seed})  # as in training, for weights that no file gives")
    if classes:
        seed = f", head_seed={as_code(arguments['seed'])}" if arguments.get("seed") else ""
        lines.append(f"backbone = load_classifier(backbone, {as_code(classes)}{seed})")
    return "\n".join([*lines, "base = backbone.model"])


def _classes(folder: Path, arguments: Mapping[str, Any]) -> int | None:
    """Classes of the head: as the run says, or by the shape of the head in the adapter's file."""
    if arguments:
        found: int | None = arguments.get("head_classes")
        return found
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        return file.get_slice(_HEAD).get_shape()[0] if _HEAD in file.keys() else None
