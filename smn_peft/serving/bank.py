# SPDX-License-Identifier: Apache-2.0
"""`open_bank`: the bank and the base that a server is started with, and how tasks are added to it.

Nothing of an adapter is ever run: it is one JSON and one safetensors file, both checked.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones import Backbone, base_name, is_file_spec, load_backbone, load_from_file, pooled_features
from ..bank.bank import MaskBank
from ..bank.remote import is_remote
from ..bank.source import MemorySource
from ..bank.store import open_store
from ..data import check_preprocessing
from ..storage.adapter_config import CONFIG_NAME, read_config
from ..storage.adapter_file import WEIGHTS_NAME
from ..storage.hub_files import locate_adapter
from .limits import ServingError, explained
from .models import NewTask

__all__ = ["ServedModel", "add_folder", "add_task", "class_name", "class_names", "is_shared", "open_bank"]

_CLASSES = "id2label"  # of adapter_config.json, as in transformers: {"0": "cat", …}
_LABEL_LENGTH = 1000
_ASKED_FOR_SIZE = 10  # adapters that are read for the size they were trained on


class ServedModel(nn.Module):
    """A backbone with a place for the tasks' heads that gives logits and features in one forward.

    The head is a plain `nn.Linear`, since a bank folds what standardises a `Classifier`'s features into the weights.

    Args:
        backbone: A vision model whose `pooled_features` are (batch, feature_dim).
        feature_dim: Size of the features.
        head_name: "head" in adapters made on a `Classifier`; on a plain timm model as timm names it, such as "fc".
    """

    #: Where the vision model is, in transformers' words.
    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, feature_dim: int, head_name: str = "head") -> None:
        super().__init__()
        self.backbone = backbone
        self.name_or_path = base_name(backbone) or ""
        self.head_name = head_name
        owner: nn.Module = self
        parts = head_name.split(".")
        for left, part in enumerate(parts, 1 - len(parts)):
            if not part.isidentifier() or hasattr(owner, part):
                raise ValueError(f"{head_name!r} is no name for a head: it is 'head', 'fc', 'classifier' or the like.")
            owner.add_module(part, nn.Module() if left else nn.Linear(feature_dim, 1))
            owner = owner.get_submodule(part)
        self.eval()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """(batch, 3, height, width) -> "logits" (batch, classes) and "features" (batch, 1, feature_dim)."""
        features = pooled_features(self.backbone, pixel_values, **kwargs)
        head = self.get_submodule(self.head_name)
        # A dimension more than logits, to tell them apart where a bank joins the rows of a mixed batch.
        return {"logits": head(features.to(next(head.parameters()).dtype)), "features": features[:, None]}


def open_bank(
    where: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    head_name: str = "head",
    device: str = "cpu",
    ram_budget: int = 1 << 30,
    read_only: bool = False,
) -> tuple[MaskBank, Backbone, dict[str, str]]:
    """Open a bank for serving.

    Args:
        where: A bank, as `MaskBank.open` takes it; or the folder of an adapter, or of several adapters' folders,
            which are then held in memory.
        base: Base of the tasks: Hub id, timm name, folder, or "file.py:function", which is run.
        weights: safetensors file for the timm architecture `base`.
        image_size: Input size; None for what the first task was trained on if its adapter says so, else the base's.
        head_name: See [`ServedModel`].
        device: Device of the model.
        ram_budget: Bytes that decoded tasks may take.
        read_only: Refuse changes of a bank on disk.

    Returns:
        The bank, the backbone with the bank's [`ServedModel`], and why some adapters were left out, by name.

    Raises:
        ValueError: If the base cannot be loaded, or no adapter belongs to it.
    """
    where, base = os.fspath(where), os.fspath(base)
    if not (is_remote(where) or Path(where).exists()):
        raise FileNotFoundError(f"There is no {where}: name a bank, or a folder of adapters.")
    from_file = is_file_spec(base)
    if from_file and (weights is not None or image_size is not None):
        raise ValueError(f"--weights and --image-size are for libraries' models, not for {base}.")
    folders = [] if is_remote(where) else _adapters_in(Path(where))
    source = MemorySource() if folders else open_store(where, read_only=read_only)

    def trained_size() -> int | None:
        for one in folders[:_ASKED_FOR_SIZE] or source.find(limit=_ASKED_FOR_SIZE):
            try:
                config = read_config(one) if isinstance(one, Path) else source.read(one).config
                return int(check_preprocessing(config["preprocessing"])["image_size"])
            except (ValueError, OSError, KeyError):  # not said; or a damaged adapter, which is said when it is used
                continue
        return None

    if from_file:
        backbone = load_from_file(base)
    else:
        # Position embeddings are resampled when a model is loaded: the tasks' base is the one of their size.
        backbone = load_backbone(base, state_dict=weights, image_size=image_size or trained_size())
    model = ServedModel(backbone.model, backbone.feature_dim, head_name).to(device)
    bank = MaskBank(source, model, ram_budget=ram_budget, exclusive=True)
    left_out = {}
    for folder in folders:
        name = folder.resolve().name
        try:
            add_folder(bank, name, folder)
        except (ValueError, TypeError, OSError) as error:
            left_out[name] = str(error)
    if folders and not len(bank):
        name, why = next(iter(left_out.items()))
        raise ValueError(f"None of the {len(folders)} adapters in {where} can be served; {name}: {why}")
    return bank, replace(backbone, model=model), left_out


def is_shared(where: str) -> bool:
    """Whether it is a bank, which several processes can have open, and no folder of adapters."""
    return is_remote(where) or not _adapters_in(Path(where))


def _adapters_in(where: Path) -> list[Path]:
    return [where] if (where / CONFIG_NAME).is_file() else sorted(p.parent for p in where.glob(f"*/{CONFIG_NAME}"))


def add_folder(
    bank: MaskBank, name: str, folder: Path, *, classes: Sequence[str] | None = None, replace: bool = False
) -> None:
    """Add an adapter of this machine, with other names of its classes if some are given; raises as `MaskBank.add`."""
    if not classes:
        bank.add(name, folder, replace=replace)
        return
    config = {**read_config(folder), _CLASSES: {str(index): label for index, label in enumerate(classes)}}
    with tempfile.TemporaryDirectory() as staged:
        (Path(staged) / CONFIG_NAME).write_text(json.dumps(config), "utf-8")
        os.symlink((folder / WEIGHTS_NAME).resolve(), Path(staged) / WEIGHTS_NAME)
        bank.add(name, staged, replace=replace)


def add_task(bank: MaskBank, new: NewTask) -> dict[str, Any]:
    """Add a client's task; `ServingError` 409 if the name is taken, else of [`explained`]."""
    replaced = new.name in bank
    if replaced and not new.replace:
        raise ServingError(409, f"There is a task {new.name!r} already.", "Send replace=true, or another name.")
    try:
        with tempfile.TemporaryDirectory() as uploads:
            folder = Path(uploads if new.folder is None else new.folder)
            if new.config is not None and new.weights is not None:
                (folder / CONFIG_NAME).write_bytes(new.config)
                (folder / WEIGHTS_NAME).write_bytes(new.weights)
            elif new.hub_id is not None:
                folder = locate_adapter(new.hub_id, new.revision)
            if not os.path.isfile(folder / CONFIG_NAME):  # also of a path that cannot be one
                raise FileNotFoundError(f"there is no adapter in {folder}: name a folder with {CONFIG_NAME}.")
            add_folder(bank, new.name, folder, classes=new.classes, replace=new.replace)
    except Exception as error:
        raise explained(error, new.name, change=True) from error
    return {"name": new.name, "replaced": replaced, "total": len(bank)}


def class_name(config: Mapping[str, Any], index: int) -> str:
    """Name of one class, its number where the config has none; however many classes there are."""
    found = config.get(_CLASSES)
    name = found.get(str(index), found.get(index)) if isinstance(found, Mapping) else None
    return str(index) if name is None else str(name)[:_LABEL_LENGTH]


def class_names(config: Mapping[str, Any], count: int) -> list[str] | None:
    """Names of the first `count` classes; None where the config has none."""
    return [class_name(config, index) for index in range(count)] if config.get(_CLASSES) else None
