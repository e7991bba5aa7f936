# SPDX-License-Identifier: Apache-2.0
"""Who has the model: one context at a time; and which task is active once nobody has it."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .live import LiveModel
from .task import Task

__all__ = ["ActiveTask"]


@dataclass(eq=False)
class _Block:
    """A stretch of code that has the model: a `use` block, or a call of the bank."""

    what: str  # its name in messages
    outer: _Block | None  # the block of the same context that it is nested in, of whichever bank
    active: tuple[str, Task] | None  # what is live while no inner block has the model; None for the base
    thread: threading.Thread | None  # that began it, and its asyncio task; an identifier might be given again
    task: asyncio.Task[Any] | None


_innermost: ContextVar[_Block | None] = ContextVar("smn_bank_block", default=None)


class ActiveTask:
    """Gives the model to one context (`contextvars`) at a time, and puts the active task back afterwards.

    What one asyncio task has, another does not. Other threads wait; whoever would wait for code of their own thread,
    which could not go on, gets an error. Blocks end in the opposite order of their beginning.
    """

    def __init__(self, live: LiveModel, find: Callable[[str | Task | None], Task | None], *, exclusive: bool) -> None:
        self.turn = threading.Condition()  # held for bookkeeping only, never while the model is used
        self._live, self._find, self._exclusive = live, find, exclusive
        self._root = _Block("", None, None, None, None)  # whose task is live outside all blocks
        self._blocks = [self._root]  # each around the next

    def activate(self, name: str | None) -> None:
        """Make a task live until further notice; inside a `use` block until it ends. None for the base."""
        with self.block("bank.activate", lasting=True) as block:
            self.enter(block, name)
            self._around(block).active = block.active

    def replace(self, name: str, other: str | None) -> None:
        """If `name` is the active task, activate another, or the one that has its name now.

        A `use` block that is under way keeps its task; the change shows at its end.
        """
        with self.turn:
            if self._root.active is None or self._root.active[0] != name:
                return
            if self._blocks[-1] is not self._root:
                self._root.active = (other or name, self._root.active[1])
                return
        self.activate(other)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Have the model for good: nothing is active any more."""
        with self.block("bank.close"):
            for block in self._blocks:
                block.active = None
            yield

    def enter(self, block: _Block, name: str | None) -> None:
        """Make a task live for a lasting block."""
        task = self._find(name)
        self._live.switch(task)
        block.active = None if task is None else (str(name), task)

    @contextmanager
    def block(self, what: str, *, lasting: bool = False) -> Iterator[_Block]:
        """Let the block switch as it likes; what was live before is live afterwards. `what` names it in messages."""
        block = self._begin(what, lasting)
        try:
            yield block
        finally:
            self._end(block)

    def _begin(self, what: str, lasting: bool) -> _Block:
        """Wait for the model; RuntimeError if code of this very thread has it that cannot go on before."""
        outer, thread, task = _innermost.get(), threading.current_thread(), _asyncio_task()
        with self.turn:
            mine = outer
            while mine is not None and mine not in self._blocks:
                mine = mine.outer
            if mine is None or (lasting and mine.thread is thread and mine.task not in (None, task)):
                mine = self._root  # asyncio may have copied this context from a block's, and it may outlive that
            while (last := self._blocks[-1]) not in (mine, self._root):  # what was mine may end meanwhile
                if last.thread is thread:
                    raise RuntimeError(
                        f"{what} while {last.what} is under way in another asyncio task or context of this thread: "
                        "the model has one task at a time. Leave that block before anything is awaited: "
                        "bank.forward(inputs, tasks) is a block that awaits nothing."
                    )
                self.turn.wait()
            block = _Block(what, outer, last.active, thread, task)
            self._blocks.append(block)
        _innermost.set(block)
        return block

    def _end(self, block: _Block) -> None:
        """Put back what was live before, and give the model away; an inner block under way keeps its task live."""
        if _innermost.get() is block:
            _innermost.set(block.outer)
        try:
            if block not in self._blocks:  # another thread's, before a fork
                return
            if (last := self._blocks[-1]) is not block:
                raise RuntimeError(
                    f"{block.what} ends while {last.what}, which began inside it, is still under way: leave blocks in "
                    "the opposite order. The inner one keeps its task until it ends."
                )
            self._put_back(self._around(block))
        finally:
            with self.turn:
                if block in self._blocks:
                    self._blocks.remove(block)
                self.turn.notify_all()

    def _around(self, block: _Block) -> _Block:
        return self._blocks[self._blocks.index(block) - 1]

    def _put_back(self, block: _Block) -> None:
        """Switch to a block's task, as the source has it now; to the base if it is gone."""
        if block.active is None:
            return None if self._exclusive else self._live.switch(None)
        name, task = block.active
        try:
            task = self._find(name) or task
        except KeyError:
            warnings.warn(f"The task {name!r} was active and is gone from the bank: the base is live.", stacklevel=6)
            block.active = None
            return self._live.switch(None)
        except (OSError, RuntimeError, ValueError):  # it cannot be read anew: what was read is still good
            pass
        block.active = name, task
        self._live.switch(task)

    def after_fork(self) -> None:
        """Forget the blocks of other threads, which a child process does not have."""
        self._blocks = [block for block in self._blocks if block.thread in (None, threading.current_thread())]


def _asyncio_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None
