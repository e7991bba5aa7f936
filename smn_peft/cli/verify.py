# SPDX-License-Identifier: Apache-2.0
"""`smn verify`: is an adapter whole, and does it belong to its base?"""

from __future__ import annotations

from typing import Annotated

import typer

from ..storage import locate_adapter, verify_adapter_file
from ..training.saved import verify_run

__all__ = ["command"]


def command(
    name: Annotated[str, typer.Argument(help="Adapter: folder, safetensors file, or user/name on the Hub.")],
    backbone: Annotated[str | None, typer.Option(help="Where the base is, if not where the adapter says.")] = None,
    file_only: Annotated[bool, typer.Option("--file-only", help="Check the file alone, without its base.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder of the adapter inside.")] = None,
) -> None:
    """Check an adapter's checksums, and that its base is the one that its mask was learned on."""
    path = locate_adapter(name, revision, subfolder)
    for fact in verify_adapter_file(path):
        typer.echo(fact)
    if not file_only and not path.is_dir():
        raise ValueError(f"{path} is a file: name its folder to compare it with its base, or add --file-only.")
    if not file_only:
        typer.echo(f"base: {verify_run(path, backbone)}, the one that the mask was learned on")
