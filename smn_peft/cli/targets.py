# SPDX-License-Identifier: Apache-2.0
"""`smn targets`: what an adapter would mask in a model, per layer and in total."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..backbones import is_file_spec, load_backbone, load_from_file
from ..tuner import MaskConfig, explain_targets
from .options import with_options

__all__ = ["command"]

_OPTIONS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "mask_bias",
)


@with_options(only=_OPTIONS)
def command(
    name: Annotated[str, typer.Argument(help="Hub id, timm name, folder, or your own file.py:function.")],
    mask: MaskConfig,
    revision: Annotated[str | None, typer.Option(help="Git revision on the Hub.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    projection: Annotated[bool, typer.Option("--projection", help="CLIP's vision tower with its projection.")] = False,
) -> None:
    """Show what would be masked in a model, layer by layer, and how large the adapter would be.

    Only the model's shape matters: no weights are downloaded.
    """
    if is_file_spec(name):
        if revision or image_size or projection:
            raise ValueError(f"--revision, --image-size and --projection are for libraries' models, not for {name}.")
        model = load_from_file(name).model
    else:
        options: dict[str, Any] = {"revision": revision, "image_size": image_size, "projection": projection}
        model = load_backbone(name, pretrained=False, **options).model
    report = explain_targets(model, mask, verbose=False)
    typer.echo(str(report))
    if not report.masked_weights:
        raise ValueError("Nothing would be masked: see the last column for what the layers are.")
