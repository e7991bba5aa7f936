# SPDX-License-Identifier: Apache-2.0
"""Processes for tests, forked where that can be: they have torch and transformers imported, which takes longest."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

__all__ = ["ROOT", "can_fork", "context", "leave_the_test", "run_python", "sent"]

ROOT = Path(__file__).resolve().parents[1]


def can_fork() -> bool:
    """Whether a forked process could train: autograd's threads, once this process has any, do not survive a fork."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return False
    child = os.fork()
    if child == 0:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def context() -> Any:
    """How processes are started."""
    return multiprocessing.get_context("fork" if can_fork() else "spawn")


def leave_the_test() -> None:
    """What a forked process does first: no coverage, which would be lost, and the threads that survive, one."""
    sys.settrace(None)
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


def sent(value: Any) -> Any:
    """What a worker process is given when it is started with `value`."""
    return ForkingPickler.loads(ForkingPickler.dumps(value))


def run_python(*line: object, cwd: Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """`python LINE` in a folder, offline and on one thread; LINE is a script with arguments, or `-c` and code.

    A forked process imports PEFT, this package and the script's neighbours anew, as a fresh one would.
    """
    words = [str(word) for word in line]
    # transformers' trainer, once it is imported, knows the classes of a PEFT that the forked process has no more.
    if "transformers.trainer" in sys.modules or not can_fork():
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("fork").Process(target=_run, args=(words, cwd, outputs))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text("utf-8") for path in outputs))


def _run(words: list[str], cwd: Path, outputs: list[Path]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    # pytest has put objects of its own in their place.
    sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", encoding="utf-8")
    leave_the_test()
    os.chdir(cwd)
    folder = "" if words[0] == "-c" else str(Path(words[0]).parent)
    known = {path.stem for path in Path(folder).glob("*.py")} if folder else set()
    for name in list(sys.modules):
        if name.partition(".")[0] in {"peft", "smn_peft", *known}:
            del sys.modules[name]
    sys.path[:] = [folder, str(ROOT), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    sys.argv = words[:1] + words[1 + (words[0] == "-c") :]
    if words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")
