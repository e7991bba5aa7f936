# SPDX-License-Identifier: Apache-2.0
"""`open_bank`: the bank and the base that a server is started with, and how tasks are added to it.

Nothing of an adapter is ever run: it is one JSON and one safetensors file, both checked.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn

from ..backbones import Backbone, base_name, is_file_spec, load_backbone, load_from_file, pooled_features
from ..bank.bank import MaskBank
from ..bank.store import StoreBusyError
from ..data import check_preprocessing
from ..storage import CONFIG_NAME, WEIGHTS_NAME, read_config
from .limits import ServingError, explained
from .models import NewTask

__all__ = ["ServedModel", "add_folder", "add_task", "class_name", "class_names", "open_bank", "refused_change"]

_CLASSES = "id2label"  # of adapter_config.json, as in transformers: {"0": "cat", …}
_LABEL_LENGTH = 1000
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Errors of the operating system for a path that cannot be one.
_NO_PATH = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL})
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
        where: A bank; or the folder of an adapter, or of several adapters' folders, which are then held in memory.
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
    where, base = Path(where), os.fspath(base)
    if not where.exists():
        raise FileNotFoundError(f"There is no {where}: name a bank, or a folder of adapters.")
    from_file = is_file_spec(base)
    if from_file and (weights is not None or image_size is not None):
        raise ValueError(f"--weights and --image-size are for libraries' models, not for {base}.")

    def load(size: int | None) -> Backbone:
        backbone = load_from_file(base) if from_file else load_backbone(base, state_dict=weights, image_size=size)
        model = ServedModel(backbone.model, backbone.feature_dim, head_name)
        return replace(backbone, model=model.to(device))

    def trained_size(configs: Iterable[Callable[[], Mapping[str, Any]]]) -> int | None:
        for read in [] if image_size or from_file else configs:
            try:
                return int(check_preprocessing(read()["preprocessing"])["image_size"])
            except (ValueError, OSError, KeyError):  # not said; or a damaged adapter, which is said when it is used
                continue
        return None

    folders = [where] if (where / CONFIG_NAME).is_file() else sorted(p.parent for p in where.glob(f"*/{CONFIG_NAME}"))
    if folders:
        size = trained_size(functools.partial(read_config, folder) for folder in folders[:_ASKED_FOR_SIZE])
        backbone = load(image_size or size)
        bank = MaskBank.open([], backbone.model, ram_budget=ram_budget, exclusive=True)
        left_out = {}
        for folder in folders:
            name = folder.resolve().name
            try:
                add_folder(bank, name, folder)
            except (ValueError, TypeError, OSError) as error:
                left_out[name] = str(error)
        if not len(bank):
            name, why = next(iter(left_out.items()))
            raise ValueError(f"None of the {len(folders)} adapters in {where} can be served; {name}: {why}")
        return bank, backbone, left_out
    options: dict[str, Any] = {"ram_budget": ram_budget, "exclusive": True, "read_only": read_only}
    backbone = load(image_size)
    bank = MaskBank.open(where, backbone.model, **options)
    size = trained_size(functools.partial(bank.config, name) for name in bank.names[:_ASKED_FOR_SIZE])
    if size not in (None, backbone.image_size):
        # Position embeddings are resampled when a model is loaded: the tasks' base is the one of their size.
        bank.close()
        backbone = load(size)
        bank = MaskBank.open(where, backbone.model, **options)
    return bank, backbone, {}


def add_folder(
    bank: MaskBank, name: str, folder: Path, *, classes: Sequence[str] | None = None, replace: bool = False
) -> None:
    """Add an adapter of this machine, with other names of its classes if some are given; raises as `MaskBank.add`."""
    config = read_config(folder)
    if not classes:
        bank.add(name, folder, replace=replace)
        return
    config[_CLASSES] = {str(index): label for index, label in enumerate(classes)}
    with tempfile.TemporaryDirectory() as staged:
        (Path(staged) / CONFIG_NAME).write_text(json.dumps(config), "utf-8")
        os.symlink((folder / WEIGHTS_NAME).resolve(), Path(staged) / WEIGHTS_NAME)
        bank.add(name, staged, replace=replace)


def add_task(bank: MaskBank, new: NewTask) -> dict[str, Any]:
    """Add a client's task; `ServingError` 409 if the name is taken, else of [`refused_change`]."""
    name, replaced = new.name, new.name in bank
    if replaced and not new.replace:
        raise ServingError(409, f"There is a task {name!r} already.", "Send replace=true, or another name.")
    try:
        if new.config is not None and new.weights is not None:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / CONFIG_NAME).write_bytes(new.config)
                (Path(folder) / WEIGHTS_NAME).write_bytes(new.weights)
                add_folder(bank, name, Path(folder), classes=new.classes, replace=new.replace)
        elif new.hub_id is not None:
            if not _HUB_ID.fullmatch(new.hub_id):
                raise ValueError(f"{new.hub_id!r} is not an id on the Hub: it reads user/name.")
            if os.path.isdir(new.hub_id):
                raise ValueError(f"{new.hub_id} is a folder where the server runs: send it as 'folder'.")
            bank.add(name, new.hub_id, replace=new.replace, revision=new.revision)
        else:
            add_folder(bank, name, Path(new.folder or ""), classes=new.classes, replace=new.replace)
    except Exception as error:
        raise refused_change(error, name) from error
    return {"name": name, "replaced": replaced, "total": len(bank)}


def refused_change(error: Exception, name: str) -> ServingError:
    """What the client is told of an error while a task is added or removed."""
    if isinstance(error, HfHubHTTPError):
        return ServingError(502, f"The Hub refused: {error}", "Check the id and the server's access to it.")
    if isinstance(error, FileNotFoundError):
        return ServingError(422, f"There is no adapter: {error}", f"Name a folder with {CONFIG_NAME}.")
    if isinstance(error, PermissionError):
        return ServingError(403, f"Task {name!r} was not changed: {error}", "Give the server access to its files.")
    if isinstance(error, StoreBusyError) or not isinstance(error, (ValueError, TypeError, OSError)):
        return explained(error)
    if isinstance(error, OSError) and error.errno not in _NO_PATH:
        return ServingError(503, f"Task {name!r} was not changed: {error}", "Try again later.", {"Retry-After": "5"})
    return ServingError(422, f"Task {name!r} was not added: {error}", "Send an adapter made for the base.")


def class_name(config: Mapping[str, Any], index: int) -> str:
    """Name of one class, its number where the config has none; however many classes there are."""
    found = config.get(_CLASSES)
    name = found.get(str(index), found.get(index)) if isinstance(found, Mapping) else None
    return str(index) if name is None else str(name)[:_LABEL_LENGTH]


def class_names(config: Mapping[str, Any], count: int) -> list[str] | None:
    """Names of the first `count` classes; None where the config has none."""
    return [class_name(config, index) for index in range(count)] if config.get(_CLASSES) else None
