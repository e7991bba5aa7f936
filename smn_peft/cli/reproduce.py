# SPDX-License-Identifier: Apache-2.0
"""`smn reproduce`: a table or figure of the paper, at its own size or at a small one, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..paper import ARTEFACTS, SCALES, artefact_named, listing, reproduce, scale_named
from ..training import Interrupted

__all__ = ["command"]


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Tables and figures, such as table2 figure8; --list names them.",
            autocompletion=lambda: list(ARTEFACTS),
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help=f"{' or '.join(SCALES)}: see --list.", autocompletion=lambda: list(SCALES))
    ] = "small",
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; the table's own if not given.")] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the runs, shared by all tables, and of what is made.")
    ] = Path("runs/paper"),
    show: Annotated[bool, typer.Option("--list", help="List all tables and figures with what they take.")] = False,
) -> None:
    """Make tables and figures of the paper; what is done is not run again, and what was interrupted goes on."""
    if show:
        typer.echo(listing(list(SCALES.values())))
        typer.echo("\nRuns are shared: those of another table are not run again. Durations are rough, for")
        for known in SCALES.values():
            typer.echo(f"  {known.name}: {known.machine}")
        return
    if not names:
        raise typer.BadParameter("name a table or figure, such as table2, or pass --list", param_hint="NAMES")
    chosen = [artefact_named(name) for name in names]
    size = scale_named(scale)
    for artefact in chosen:
        try:
            made = reproduce(artefact, size, seeds=seeds, output=output, say=lambda text: typer.echo(text, err=True))
        except Interrupted as stop:
            typer.echo(f"{stop} The same command goes on.", err=True)
            raise typer.Exit(130) from stop
        typer.echo(made.text)
        typer.echo("\n".join(str(path) for path in made.files), err=True)
