# SPDX-License-Identifier: Apache-2.0
"""What takes an adapter AND its base: coding only the weights that selective masking trains, and verifying."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from ..storage import AdapterSizes, adapter_sizes
from ..tuner import MaskConfig
from ..tuner.checks import base_fingerprint
from .saved import load_run

__all__ = ["save_run_as", "verify_run"]


def save_run_as(folder: str | Path, out: str | Path, codec: str, backbone: str | None = None) -> AdapterSizes:
    """Write an adapter again over its base, in another codec.

    Args:
        folder: Folder of an adapter, or a run's `output_dir`.
        out: Folder to write.
        codec: ``"bits"``, or a codec that makes a blob.
        backbone: Where the base is now, if not where the folder says.

    Returns:
        Sizes of what was written.

    Raises:
        ValueError: If base and adapter do not belong together, or the file is damaged.
    """
    model, config = _load(folder, backbone)
    config.codec = codec
    model.save_pretrained(str(out), save_embedding_layers=False)
    return adapter_sizes(out)


def verify_run(folder: str | Path, backbone: str | None = None) -> str:
    """Check that an adapter's base is the one that its mask was learned on, whatever its `check_base` says.

    Args:
        folder: Folder of an adapter, or a run's `output_dir`.
        backbone: Where the base is now, if not where the folder says.

    Returns:
        The fingerprint that both have.

    Raises:
        ValueError: If they do not belong together, cannot be compared, or the file is damaged.
    """
    model, config = _load(folder, backbone)
    expected = config.base_fingerprint
    if expected is None:
        raise ValueError(f"{folder} names no fingerprint of its base: save it again with model.save_pretrained.")
    present = base_fingerprint(model, "default")
    if present != expected:
        raise ValueError(f"{folder} was made for a base with fingerprint {expected}; this base has {present}.")
    return expected


def _load(folder: str | Path, backbone: str | None) -> tuple[PeftModel, MaskConfig]:
    model = load_run(folder, backbone=backbone)[1].model
    if not isinstance(model, PeftModel):
        raise ValueError(f"{folder} holds a fully fine-tuned model and no adapter.")
    config: MaskConfig = model.peft_config["default"]  # type: ignore[assignment]
    return model, config
