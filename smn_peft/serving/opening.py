# SPDX-License-Identifier: Apache-2.0
"""`open_bank`: the bank and the base that a server is started with."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..backbones import Backbone, is_file_spec
from ..bank.bank import MaskBank
from ..storage import read_config
from .adding import adapter_folders, load_folders
from .model import load_served
from .preparation import trained_size

__all__ = ["open_bank"]

_LOOKED_AT = 10  # adapters that are asked which size they were trained on


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
        where: Folder of a bank; or of an adapter, or of several adapters' folders, which are then held in memory.
        base: Name of the base, see [`load_served`].
        weights: See [`load_served`].
        image_size: See [`load_served`]; None for what the first task was trained on, if its adapter says it.
        head_name: See [`load_served`].
        device: Where the model is.
        ram_budget: Bytes that decoded tasks may take.
        read_only: Refuse changes of a bank on disk.

    Returns:
        The bank, the backbone whose model it has, and why some folders of adapters were left out, by name.

    Raises:
        FileNotFoundError: If there is no bank.
        ValueError: If the base cannot be loaded, or no adapter belongs to it.
    """
    where = Path(where)
    if not where.is_dir():
        raise FileNotFoundError(f"There is no folder {where}: name a bank, or a folder of adapters.")
    folders = adapter_folders(where)

    def load(size: int | None) -> Backbone:
        backbone = load_served(base, weights=weights, image_size=size, head_name=head_name)
        backbone.model.to(device)
        return backbone

    def trained(reads: Iterable[Callable[[], Mapping[str, Any]]]) -> int | None:
        return None if image_size or is_file_spec(os.fspath(base)) else trained_size(_read(reads))

    if not folders:
        options: dict[str, Any] = {"ram_budget": ram_budget, "exclusive": True, "read_only": read_only}
        backbone = load(image_size)
        bank = MaskBank.open(where, backbone.model, **options)
        size = trained(functools.partial(bank.config, name) for name in bank.names[:_LOOKED_AT])
        if size not in (None, backbone.image_size):
            # Position embeddings are resampled when a model is loaded: the tasks' base is the one of their size.
            bank.close()
            backbone = load(size)
            bank = MaskBank.open(where, backbone.model, **options)
        return bank, backbone, {}
    backbone = load(image_size or trained(functools.partial(read_config, folder) for folder in folders[:_LOOKED_AT]))
    bank = MaskBank.open([], backbone.model, ram_budget=ram_budget, exclusive=True)
    left_out = load_folders(bank, folders)
    if not len(bank):
        name, why = next(iter(left_out.items()))
        raise ValueError(f"None of the {len(folders)} adapters in {where} can be served; {name}: {why}")
    return bank, backbone, left_out


def _read(reads: Iterable[Callable[[], Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    for read in reads:
        with suppress(ValueError, OSError, KeyError):  # a damaged adapter is said when it is used
            yield read()
