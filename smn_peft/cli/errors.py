# SPDX-License-Identifier: Apache-2.0
"""How commands fail: one line and exit code 1; wrong usage gives 2, Ctrl-C 130."""

from __future__ import annotations

import errno
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

__all__ = ["ErrorGroup", "one_line"]

_FLAG = "--traceback"


class ErrorGroup(TyperGroup):
    """A group of commands whose expected errors are printed as one line.

    Expected are ValueError, OSError, RuntimeError and ImportError: the package raises them with the remedy in the
    message. Anything else is a bug and comes as Python's traceback.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--traceback` from wherever it stands before a "--", so that it can be added at the line's end."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[_FLAG] = _FLAG in args[:end]
        rest = [arg for arg in args[:end] if arg != _FLAG] + args[end:]
        return list(super().parse_args(ctx, rest))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with _short_warnings():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # typer's own ways out are RuntimeErrors too
            raise
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # the reader of a pipe went away
                raise
            if ctx.meta[_FLAG]:
                typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
            else:
                typer.echo(f"error: {one_line(error)} (in full with {_FLAG})", err=True)
            raise typer.Exit(1) from error


@contextmanager
def _short_warnings() -> Iterator[None]:
    """What the package warns of as one line, without the place in the code."""
    python = warnings.formatwarning

    def short(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
        return f"warning: {message}\n" if category is UserWarning else python(message, category, *place, **more)

    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = python


def one_line(error: BaseException) -> str:
    """The message without line breaks; for the system's own errors what happened to which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
