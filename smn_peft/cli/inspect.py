# SPDX-License-Identifier: Apache-2.0
"""`smn inspect`: what an adapter holds, layer by layer, and where it comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from ..storage import inspect_adapter, locate_adapter

__all__ = ["command"]


def command(
    name: Annotated[str, typer.Argument(help="Adapter: safetensors file, folder, or user/name on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder of the adapter inside.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show density, bits per weight and entropy of each layer, sizes, fingerprint and base of an adapter."""
    report = inspect_adapter(locate_adapter(name, revision, subfolder))
    typer.echo(report.to_json() if as_json else str(report))
