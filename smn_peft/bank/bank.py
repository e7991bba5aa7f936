# SPDX-License-Identifier: Apache-2.0
"""`MaskBank`: thousands of tasks over one frozen model, which one context has at a time."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn

from .forking import forkable
from .live import LiveModel
from .mixed import MixedForward, one_per_sample
from .reading import TaskReader
from .source import BASE_NAME as BASE
from .source import MemorySource, check_name, read_adapter
from .store import FILE_NAME, DiskStore, TaskSource, open_store
from .task import BankStats, Task

__all__ = ["BASE", "MaskBank"]


class MaskBank:
    """Tasks over one frozen `model`, each a mask, a head and statistics, switched in the model's own memory.

    Coded adapters lie on disk or in memory, decoded tasks are cached, and one task is live. No module is made per
    task, and registering a task does not touch the model. Threads take turns: one has the model until it is done. What
    is copied, pickled or exported of the model is a plain model of what is live. A bank that nobody holds is closed.
    `stats` are [`BankStats`].
    """

    def __init__(
        self, source: TaskSource, base: nn.Module, *, ram_budget: int = 1 << 30, exclusive: bool = False
    ) -> None:
        if ram_budget < 0:
            raise ValueError(f"ram_budget must not be negative; got {ram_budget}.")
        self.stats = BankStats()
        self._source = source
        self._live = LiveModel(base, self.stats)
        self.model = base
        self._tasks = TaskReader(source, self._live, ram_budget, self.stats)
        self._active = _ActiveTask(self._live, self._tasks, exclusive=exclusive)
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self._options = {"ram_budget": ram_budget, "exclusive": exclusive}
        self._mixed = MixedForward(self._live)
        self._release = weakref.finalize(self, _let_go, source, self._tasks, self._live)
        self._release.atexit = False
        forkable.add(self)

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        base: nn.Module,
        *,
        ram_budget: int = 1 << 30,
        hot: Sequence[str] = (),
        exclusive: bool = False,
        read_only: bool = False,
        revision: str | None = None,
        timeout: float = 5.0,
    ) -> MaskBank:
        """Open a bank; an empty one is made where there is none.

        Args:
            where: Folder of a store, which holds it as bank.sqlite, or that file; "user/name" of one on the Hub, where
                there is no such folder and no folder "user"; the URL of such a file, as fsspec takes it; or a list of
                adapter folders and Hub ids, which are held in memory, each under the last part of its name; [`add`]
                takes other names.
            base: A plain timm or transformers model, or a `Classifier`; goes to eval mode.
            ram_budget: Bytes that decoded tasks may take.
            hot: Tasks that are decoded at once, and kept.
            exclusive: The model is used through the bank only: what a call left live stays live until another task
                is asked for, which saves a write. Otherwise the base (or the activated task) is put back.
            read_only: Do not create a store, and refuse changes. One from the Hub or a URL is read-only: it is read
                through a copy on this disk, which [`refresh`] makes anew.
            revision: Branch, tag or commit of a store on the Hub.
            timeout: Seconds that a change of a store waits while another process writes, before `StoreBusyError`.

        Raises:
            FileNotFoundError: If there is no store and `read_only` or on the Hub, or an adapter is not found.
            ValueError: If an adapter does not belong to the base.
        """
        source: TaskSource
        if isinstance(where, (str, os.PathLike)):
            source, adapters = open_store(where, read_only=read_only, revision=revision, timeout=timeout), []
        else:
            source, adapters = MemorySource(), list(where)
        with ExitStack() as undo:
            undo.callback(source.close)
            bank = undo.enter_context(cls(source, base, ram_budget=ram_budget, exclusive=exclusive))
            for adapter in adapters:
                if (name := Path(os.path.abspath(adapter)).name) in bank:
                    raise ValueError(f"Two adapters would be called {name!r}: put one in by bank.add(other_name, …).")
                bank.add(name, adapter)
            for name in hot:
                bank.pin(name)
            undo.pop_all()
        return bank

    @property
    def names(self) -> list[str]:
        """Names of all tasks, sorted."""
        return self._source.names()

    def find(self, text: str = "", *, after: str = "", limit: int = 100) -> list[str]:
        """Return a page of the names that contain a text, sorted, from the next to `after` on.

        Letters of either case are the same; in a store only those from A to Z.
        """
        return self._source.find(text, after=after, limit=limit)

    def near(self, name: str, count: int) -> list[str]:
        """Return the names next to one in sorted order, `count` before it and as many from it on."""
        return self._source.near(name, count)

    @property
    def resident(self) -> list[str]:
        """Names of the tasks that are decoded, the least recently used first."""
        return self._tasks.resident()

    def refresh(self) -> bool:
        """Read a bank of the Hub or a URL anew if it has changed there, and return whether it had.

        Tasks are then decoded anew when they are asked for. If the new file cannot be fetched or read, the error is
        raised and the old one stays.
        """
        return self._source.refresh()

    def __len__(self) -> int:
        return len(self._source)

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def add(
        self, name: str, adapter: str | os.PathLike[str], *, replace: bool = False, revision: str | None = None
    ) -> None:
        """Register an adapter, after checking that it fits the base.

        Args:
            name: Of the task.
            adapter: Folder of a saved adapter, or Hub id.
            replace: Put it in place of the task of that name.
            revision: Git revision on the Hub.

        Raises:
            AdapterFileError: If the file is damaged.
            FileNotFoundError: If there is no adapter.
            ValueError: If the name is taken or not allowed, or the adapter does not belong to the base.
        """
        check_name(name)
        stored = read_adapter(adapter, revision=revision)
        self._tasks.decode(name, stored)
        self._source.add(name, stored, replace=replace)
        self._tasks.drop(name)
        self._active.replace(name, name)

    def remove(self, name: str) -> None:
        """Remove a task; KeyError for an unknown name."""
        self._source.remove(name)
        self._tasks.forget(name)
        self._active.replace(name, None)

    def rename(self, old: str, new: str) -> None:
        """Give a task another name; KeyError for an unknown one, ValueError for one that is taken."""
        check_name(new)
        self._source.rename(old, new)
        if self._tasks.forget(old):
            self.pin(new)
        self._active.replace(old, new)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload bank",
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Push all tasks as one file, which [`open`] takes by the repository's name; options are as of PEFT's method.

        The repository, "user/name", and the branch `revision` are made where they do not exist. ValueError if the
        repository is public and must be `private`.
        """
        api = HfApi(library_name="smn_peft", token=token)
        with TemporaryDirectory() as folder:
            file = Path(folder) / FILE_NAME
            if isinstance(self._source, DiskStore):
                self._source.copy(file)
            with DiskStore(file) as store:
                if isinstance(self._source, MemorySource):
                    store.add_many(self._source.items())
                local = sorted({info.base for info in store.infos() if info.base and os.path.isabs(info.base)})
            if local:
                warnings.warn(
                    f"Tasks name their base by a path of this disk, which whoever opens the bank reads: {local[0]}.",
                    stacklevel=2,
                )
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and api.model_info(repo_id).private is False:
                raise ValueError(f"{repo_id} exists and is public: nothing was sent. Choose another name.")
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_file(
                path_or_fileobj=file,
                path_in_repo=FILE_NAME,
                repo_id=repo_id,
                revision=revision,
                commit_message=commit_message,
            )

    def info(self, name: str) -> dict[str, Any]:
        """Return config, density and bytes of a task; KeyError for an unknown name."""
        task = self.task(name)
        return {"name": name, "density": task.density, "decoded_bytes": task.nbytes, "config": dict(task.info)}

    def config(self, name: str) -> Mapping[str, Any]:
        """Return the config of a task's adapter without decoding its masks; KeyError for an unknown name."""
        return self._source.read(name).config

    def task(self, name: str) -> Task:
        """Return a task, decoded if it is not; KeyError for an unknown name."""
        return self._tasks.task(name)

    def pin(self, name: str) -> None:
        """Decode a task and keep it decoded."""
        self._source.version(name)  # KeyError for an unknown name
        self._tasks.pinned.add(name)
        self.task(name)

    def unpin(self, name: str) -> None:
        """Let a task make room again."""
        self._tasks.pinned.discard(name)

    def prefetch(self, names: Sequence[str]) -> Future[None]:
        """Decode tasks in the background."""

        def decode(names: Sequence[str]) -> None:
            for name in names:
                if not self._closed:
                    self.task(name)

        self._pool = self._pool or ThreadPoolExecutor(1, "smn-bank")
        return self._pool.submit(decode, list(names))

    def activate(self, name: str | None) -> None:
        """Make a task live until further notice, inside a [`use`] block until it ends; errors as there."""
        self._active.activate(name)

    @contextmanager
    def use(self, name: str | None) -> Iterator[nn.Module]:
        """Give the model to this context alone, under a task; afterwards it is what it was before.

        The block belongs to the context that it stands in (`contextvars`): other threads wait for its end, another
        asyncio task of the same thread, which cannot wait, is refused. Blocks end in the opposite order, else
        RuntimeError. Do not await inside a block. Do not yield inside one either, unless the generator is run to its
        end before another block begins: generators share their caller's context, so that one which is resumed inside
        another's block computes under that one's task.

        Args:
            name: Of the task; None (or "__base__") for the base.

        Raises:
            KeyError: For an unknown name.
            RuntimeError: If other code of this thread has the model and is suspended, or if a block ends before one
                that began inside it; once both have ended, what was live before is live again.
        """
        with self._active.block(f"bank.use({name!r:.80})", lasting=True) as block:
            self._active.enter(block, name)
            yield self.model

    def forward(
        self, inputs: Tensor, tasks: Sequence[str | Task | None] | str | Task | None = None, **kwargs: Any
    ) -> Any:
        """Run a batch whose samples may be of different tasks.

        Args:
            inputs: (batch, …), such as pixel values (batch, 3, height, width).
            tasks: A name per sample, or one for all; "__base__" or None for the base; or what [`task`] gave, which
                is not looked up again.
            kwargs: Of the model.

        Returns:
            What the model returns, rows in the order of the batch: the same as sample by sample up to rounding. A
            list of rows where tasks have different numbers of classes.

        Raises:
            KeyError: For an unknown task.
            TypeError: If a task is not named by text.
            ValueError: If the number of names is not the number of samples.
        """
        names = one_per_sample(tasks, len(inputs))
        with self._active.block("bank.forward"), torch.no_grad():
            decoded = {name: self._tasks(name) for name in dict.fromkeys(names)}
            return self._mixed([decoded[name] for name in names], inputs, **kwargs)

    __call__ = forward

    def close(self) -> None:
        """Put the base back as it was, and let go of the store; a second time does nothing.

        RuntimeError if somebody else wrote to weights that a task was in.
        """
        if self._closed:
            return
        with self._active.closing():
            self._closed = True
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
            self._release()

    def __reduce__(self) -> Any:
        """Pickle by what it was opened with: where it lies (or what it holds in memory), the base, and what is pinned.

        The base goes with its own weights, whichever task is live; that takes a copy of it.
        """
        if self._closed:
            raise ValueError("A bank that is closed cannot be pickled: open it anew.")
        with self.use(None) as base:
            return _reopened, (self._source, copy.deepcopy(base), self._options, sorted(self._tasks.pinned))

    def _before_fork(self, held: ExitStack) -> None:
        for lock in (self._active.turn, self._tasks.lock, self._live.memory):
            held.enter_context(lock)

    def _after_fork(self) -> None:
        self._pool = None  # whose thread is the parent's
        self._active.after_fork()

    def __enter__(self) -> MaskBank:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _reopened(source: TaskSource, base: nn.Module, options: dict[str, Any], pinned: list[str]) -> MaskBank:
    bank = MaskBank(source, base, **options)
    for name in pinned:
        bank.pin(name)
    return bank


def _let_go(source: TaskSource, tasks: TaskReader, live: LiveModel) -> None:
    with ExitStack() as last:
        last.callback(source.close)
        last.callback(tasks.clear)
        last.callback(live.close)


@dataclass(eq=False)
class _Block:
    """A stretch of code that has the model: a `use` block, or a call of the bank."""

    what: str  # its name in messages
    outer: _Block | None  # the block of the same context that it is nested in, of whichever bank
    active: tuple[str, Task] | None  # what is live while no inner block has the model; None for the base
    thread: threading.Thread | None  # that began it, and its asyncio task; an identifier might be given again
    task: asyncio.Task[Any] | None


_innermost: ContextVar[_Block | None] = ContextVar("smn_bank_block", default=None)


class _ActiveTask:
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
        """If `name` is active, activate another, or the one that has its name now, once no block is under way."""
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
        # A child process does not have other threads' blocks.
        self._blocks = [block for block in self._blocks if block.thread in (None, threading.current_thread())]


def _asyncio_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None
