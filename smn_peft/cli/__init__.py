# SPDX-License-Identifier: Apache-2.0
"""The command line `smn`: thin commands over the package's functions, and how they fail."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click

from ..training import Interrupted
from . import adapters, analyze, bank, embed, train
from .options import Group, one_line

__all__ = ["app", "main"]

_TRACEBACK = "--traceback"


class _Application(Group):
    """Prints expected errors as one line: exit code 1; wrong usage gives 2, Ctrl-C 130.

    Expected are ValueError, OSError, RuntimeError and ImportError: the package raises them with the remedy in the
    message. Anything else is a bug and comes as Python's traceback.
    """

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = "smn", **settings: Any
    ) -> None:
        words = list(sys.argv[1:] if args is None else args)
        in_full = _TRACEBACK in words  # wherever it stands, so that it can be added at the line's end
        words = [word for word in words if word != _TRACEBACK]
        python = warnings.formatwarning
        warnings.formatwarning = partial(_short_warning, python)
        try:
            code = super().main(words, prog_name, **{**settings, "standalone_mode": False})
        except click.ClickException as error:
            is_help = isinstance(error, click.exceptions.NoArgsIsHelpError)
            click.echo(f"{'' if is_help else 'error: '}{error.format_message()}", err=True)
            code = error.exit_code
        except click.Abort as error:
            if isinstance(error.__cause__, Interrupted):
                click.echo(str(error.__cause__), err=True)
            code = 130
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            short = f"error: {one_line(error)} (in full with {_TRACEBACK})\n"
            click.echo("".join(traceback.format_exception(error)) if in_full else short, err=True, nl=False)
            code = 1
        finally:
            warnings.formatwarning = python
        sys.exit(code or 0)


def _short_warning(python: Callable[..., str], message: Any, category: type[Warning], *rest: Any, **more: Any) -> str:
    """Format a warning of the package as one line, without the place in the code."""
    return f"warning: {message}\n" if category is UserWarning else python(message, category, *rest, **more)


@click.group(
    "smn",
    cls=_Application,
    context_settings={"max_content_width": 110, "show_default": True},
    epilog='Tab completion: eval "$(_SMN_COMPLETE=bash_source smn)", or zsh_source, fish_source.',
)
@click.version_option(package_name="smn_peft", message="%(package)s %(version)s")
@click.option(_TRACEBACK, is_flag=True, expose_value=False, help="Show errors in full; may stand anywhere.")
def app() -> None:
    """Adapt a frozen vision backbone by learning one bit per weight."""


for _command in (
    *(
        train.train,
        analyze.evaluate,
        embed.embed,
        adapters.push,
        adapters.pack,
        adapters.unpack,
        adapters.slice_,
        adapters.inspect,
        adapters.verify,
    ),
    *(train.convert, bank.bank, bank.serve, train.cascade, analyze.analyze, train.compare),
    *(train.reproduce, train.recipes, adapters.targets),
):
    app.add_command(_command)


def main() -> None:
    """Run `smn`."""
    app()
