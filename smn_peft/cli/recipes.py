# SPDX-License-Identifier: Apache-2.0
"""`smn recipes`: the recipes that come with the package, or one of them in full."""

from __future__ import annotations

from typing import Annotated

import typer

from ..training import list_recipes, load_recipe

__all__ = ["command"]


def command(name: Annotated[str | None, typer.Argument(help="Show this recipe in full.")] = None) -> None:
    """List the recipes for `smn train --recipe`."""
    import yaml

    if name is None:
        for known in list_recipes():
            typer.echo(f"{known:20} {load_recipe(known).notes.get('description', '')}")
        return
    recipe = load_recipe(name)
    typer.echo(yaml.safe_dump({**recipe.notes, **recipe}, sort_keys=False, allow_unicode=True).rstrip())
