# SPDX-License-Identifier: Apache-2.0
"""`--launch`: the same command in several processes, through `accelerate launch` and its options."""

from __future__ import annotations

import difflib
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch
import typer

from ..data.loading import STOP_SIGNALS

__all__ = ["SETTINGS", "check_rest", "launch_environment", "launch_processes"]

# accelerate's own way in, without the traceback for a process that failed: that process has said why.
# The processes are waited for, since they save and then end. Several get their signals from accelerate's agent, which
# knows no SIGUSR1; a single one has had its own already.
_LAUNCHER = """
import signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
if hasattr(signal, "SIGUSR1"):
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    main()
except ChildFailedError as failure:
    sys.exit(failure.get_first_failure()[1].exitcode)
except subprocess.CalledProcessError as failure:
    sys.exit(failure.returncode)
"""

_HANG_UP = tuple(getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name))  # the terminal was closed

#: What belongs to `accelerate launch` is unknown to the command, and kept in the context.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def check_rest(context: typer.Context) -> None:
    """Refuse words that are no options of the command, where nothing is launched that could take them."""
    if context.args:
        known = [option for parameter in context.command.params for option in parameter.opts]
        close = difflib.get_close_matches(context.args[0], known, n=2)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Those of `accelerate launch` need --launch."
        raise typer.BadParameter(f"No such option: {context.args[0]}. {hint}", ctx=context)


def launch_processes(command: list[str], extra: list[str], *, cpu: bool) -> int:
    """Hand what is left of the command line to `accelerate launch`; returns its exit code.

    Args:
        command: The words that name the command, such as ["train"].
        extra: Words of the line that are none of the command's: options of `accelerate launch`.
        cpu: Whether the processes stay on the CPU though there is a GPU.
    """
    cpu = cpu or not torch.accelerator.is_available()
    line = _line(command, sys.argv[sys.argv.index(command[-1]) + 1 :], extra, cpu)
    interrupted: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: Any = None) -> None:
        interrupted.append(number)
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (*STOP_SIGNALS, *_HANG_UP)}
    try:
        # In a session of their own the processes get each signal once, from here, whoever else its sender meant; here
        # they are waited for, since they save and then end.
        started.append(subprocess.Popen(line, env=launch_environment(cpu), start_new_session=True))
        for number in list(interrupted):  # it came while they were started
            pass_on(number)
        code = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if interrupted else code


def launch_environment(cpu: bool) -> dict[str, str]:
    """The processes' environment; on the CPU each would otherwise look for a GPU and take itself for the only one."""
    return {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if cpu else {})}


def _line(command: list[str], words: list[str], extra: list[str], cpu: bool) -> list[str]:
    rest, own = list(extra), []
    for word in words:
        if rest and word == rest[0]:
            rest.pop(0)
        elif word != "--launch":
            own.append(word)
    # On the CPU accelerate starts one process whatever it is told, unless it takes its way of several GPUs.
    several = ["--multi_gpu"] if cpu and _processes(extra) > 1 and "--multi_gpu" not in extra else []
    return [sys.executable, "-c", _LAUNCHER, *several, *extra, "-m", "smn_peft.cli", *command, *own]


def _processes(extra: list[str]) -> int:
    """What `accelerate launch` is told of --num_processes."""
    for word, following in zip(extra, [*extra[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes" and (value or following).isdigit():
            return int(value or following)
    return 1
