# SPDX-License-Identifier: Apache-2.0
"""`open_bank`: the bank and the base that a server is started with."""

from __future__ import annotations

import os
from pathlib import Path

from ..backbones import Backbone
from ..bank.bank import MaskBank
from .adding import adapter_folders, load_folders
from .model import load_served

__all__ = ["open_bank"]


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
        image_size: See [`load_served`].
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
    backbone = load_served(base, weights=weights, image_size=image_size, head_name=head_name)
    backbone.model.to(device)
    if not folders:
        stored = MaskBank.open(where, backbone.model, ram_budget=ram_budget, exclusive=True, read_only=read_only)
        return stored, backbone, {}
    bank = MaskBank.open([], backbone.model, ram_budget=ram_budget, exclusive=True)
    left_out = load_folders(bank, folders)
    if not len(bank):
        name, why = next(iter(left_out.items()))
        raise ValueError(f"None of the {len(folders)} adapters in {where} can be served; {name}: {why}")
    return bank, backbone, left_out
