# SPDX-License-Identifier: Apache-2.0
"""The application: every command module in one list."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from . import (
    analyze,
    bank,
    cascade,
    eval,
    inspect,
    pack,
    push,
    recipes,
    reproduce,
    serve,
    targets,
    train,
    unpack,
    verify,
)
from .errors import ErrorGroup

__all__ = ["COMMANDS", "app", "main"]

#: Each module is a command of its own name, and holds it as `command`; or several, in an `app`.
COMMANDS = (
    *(train, eval, push, pack, unpack, inspect, verify, bank, serve),
    *(cascade, analyze, reproduce, recipes, targets),
)

app = typer.Typer(
    name="smn",
    cls=ErrorGroup,
    help="Adapt a frozen vision backbone by learning one bit per weight.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # what is not caught is a bug: Python's own traceback says most
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smn_peft {installed_version('smn_peft')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show errors in full; may stand anywhere on the line.")
    ] = False,
) -> None:
    """Options of every command; what they do is in their callback and in `ErrorGroup`."""


for _module in COMMANDS:
    _name = _module.__name__.rpartition(".")[2]
    if hasattr(_module, "app"):
        app.add_typer(_module.app, name=_name, no_args_is_help=True)
    else:
        app.command(_name, context_settings=getattr(_module, "SETTINGS", None))(_module.command)


def main() -> None:
    """Entry point of `smn`."""
    app(prog_name="smn")
