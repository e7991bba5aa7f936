# SPDX-License-Identifier: Apache-2.0
"""The application: every command module in one list."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from . import eval, inspect, pack, recipes, serve, targets, train, unpack, verify
from .errors import ErrorGroup

__all__ = ["COMMANDS", "app", "main"]

#: Each module is a command of its own name, and holds it as `command`.
COMMANDS = (train, eval, recipes, targets, pack, unpack, inspect, verify, serve)

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
    app.command(_name, context_settings=getattr(_module, "SETTINGS", None))(_module.command)


def main() -> None:
    """Entry point of `smn`."""
    app(prog_name="smn")
