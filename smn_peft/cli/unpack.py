# SPDX-License-Identifier: Apache-2.0
"""`smn unpack`: an adapter with its masks bit-packed, which every loader reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..storage import MAX_UNPACKED, adapter_sizes, size_change, unpack_adapter
from ..training.saved import save_run_as

__all__ = ["command"]


def command(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    base: Annotated[
        bool, typer.Option("--base", help="Load the base: needed if only the weights that train are coded.")
    ] = False,
    backbone: Annotated[
        str | None, typer.Option(help="With --base: where it is, if not where the folder says.")
    ] = None,
    max_bytes: Annotated[int, typer.Option(help="Refuse masks that unpack to more bytes.")] = MAX_UNPACKED,
) -> None:
    """Write an adapter with one bit per weight, as transformers' own loader wants it."""
    before = adapter_sizes(folder)
    after = save_run_as(folder, out, "bits", backbone) if base or backbone else unpack_adapter(folder, out, max_bytes)
    typer.echo(f"{out}: {size_change(before, after)}")
