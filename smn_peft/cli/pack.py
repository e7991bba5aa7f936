# SPDX-License-Identifier: Apache-2.0
"""`smn pack`: an adapter with its masks coded to about their entropy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..storage import adapter_sizes, pack_adapter, read_config, size_change
from ..training.saved import save_run_as

__all__ = ["command"]


def command(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    base: Annotated[
        bool, typer.Option("--base", help="Load the base: what selective masking leaves on then costs nothing.")
    ] = False,
    backbone: Annotated[
        str | None, typer.Option(help="With --base: where it is, if not where the folder says.")
    ] = None,
) -> None:
    """Code an adapter's masks to about their entropy: smaller, exact, and read by PEFT as before."""
    before = adapter_sizes(folder)
    if base or backbone:
        after = save_run_as(folder, out, "entropy", backbone)
    else:
        after = pack_adapter(folder, out)
        if read_config(folder).get("trainable_fraction", 1.0) < 1.0:
            typer.echo("Weights that selective masking leaves on were coded too: --base leaves them out.", err=True)
    typer.echo(f"{out}: {size_change(before, after)}")
