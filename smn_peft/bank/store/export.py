# SPDX-License-Identifier: Apache-2.0
"""An adapter out of a store, as the folder that it came from."""

from __future__ import annotations

import os
from pathlib import Path

from ...storage import CONFIG_NAME, WEIGHTS_NAME, atomic_write
from ...storage.finish import write_adapter_file
from ...storage.repack import MAX_UNPACKED, unpack_tensors
from ..source import StoredAdapter

__all__ = ["write_adapter"]


def write_adapter(folder: str | os.PathLike[str], adapter: StoredAdapter, config: bytes) -> None:
    """Write an adapter's folder; PEFT loads it.

    Args:
        folder: Made if it does not exist.
        adapter: The adapter; its masks are written bit-packed if its config's codec says so.
        config: adapter_config.json, written as it is.

    Raises:
        FileExistsError: If the folder holds an adapter.
        OSError: If the disk refuses.
    """
    path = Path(folder)
    begun = path / CONFIG_NAME  # written first: an export that did not come to its end is taken up again
    if (path / WEIGHTS_NAME).exists() or (begun.exists() and begun.read_bytes() != config):
        raise FileExistsError(f"{path} holds an adapter already: name another folder.")
    tensors = {key: tensor.clone() for key, tensor in adapter.tensors.items()}  # safetensors wants a memory for each
    if adapter.config.get("codec", "bits") == "bits":
        tensors = unpack_tensors(tensors, MAX_UNPACKED)
    path.mkdir(parents=True, exist_ok=True)
    with atomic_write(begun) as file:
        file.write(config)
    write_adapter_file(path / WEIGHTS_NAME, tensors, adapter.config.get("base_fingerprint"))
