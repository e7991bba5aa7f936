# SPDX-License-Identifier: Apache-2.0
"""`MaskBank`: thousands of tasks over one frozen model."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn

from .active import ActiveTask
from .live import LiveModel
from .mixed import MixedForward, one_per_sample
from .reading import TaskReader
from .source import BASE_NAME as BASE
from .source import MemorySource, check_name, read_adapter
from .store import FILE_NAME, DiskStore, TaskSource, forkable, open_store
from .task import BankStats, Task, TaskCache

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
        self._cache = TaskCache(ram_budget, self.stats)
        self._find = TaskReader(source, self._live, self._cache)
        self._active = ActiveTask(self._live, self._find, exclusive=exclusive)
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self._mixed = MixedForward(self._live)
        self._release = weakref.finalize(self, _let_go, source, self._cache, self._live)
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
    ) -> MaskBank:
        """Open a bank; an empty one is made where there is none.

        Args:
            where: Folder of a store, which holds it as bank.sqlite, or that file; "user/name" of one on the Hub, where
                there is no such folder and no folder "user"; or a list of adapter folders and Hub ids, which are held
                in memory, each under the last part of its name; [`add`] takes other names.
            base: A plain timm or transformers model, or a `Classifier`; goes to eval mode.
            ram_budget: Bytes that decoded tasks may take.
            hot: Tasks that are decoded at once, and kept.
            exclusive: The model is used through the bank only: what a call left live stays live until another task
                is asked for, which saves a write. Otherwise the base (or the activated task) is put back.
            read_only: Do not create a store, and refuse changes. One from the Hub is read-only.
            revision: Branch, tag or commit of a store on the Hub.

        Raises:
            FileNotFoundError: If there is no store and `read_only` or on the Hub, or an adapter is not found.
            ValueError: If an adapter does not belong to the base.
        """
        source: TaskSource
        if isinstance(where, (str, os.PathLike)):
            source, adapters = open_store(where, read_only=read_only, revision=revision), []
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
        self._find.decode(name, stored)
        self._source.add(name, stored, replace=replace)
        self._cache.drop(name)
        self._active.replace(name, name)

    def remove(self, name: str) -> None:
        """Remove a task; KeyError for an unknown name."""
        self._source.remove(name)
        self._cache.forget(name)
        self._active.replace(name, None)

    def rename(self, old: str, new: str) -> None:
        """Give a task another name; KeyError for an unknown one, ValueError for one that is taken."""
        check_name(new)
        self._source.rename(old, new)
        if self._cache.forget(old):
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
            copy = Path(folder) / FILE_NAME
            if isinstance(self._source, DiskStore):
                self._source.copy(copy)
            with DiskStore(copy) as store:
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
                path_or_fileobj=copy,
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
        return self._find.task(name)

    def pin(self, name: str) -> None:
        """Decode a task and keep it decoded."""
        self._source.version(name)  # KeyError for an unknown name
        self._cache.pinned.add(name)
        self.task(name)

    def unpin(self, name: str) -> None:
        """Let a task make room again."""
        self._cache.pinned.discard(name)

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
            decoded = {name: self._find(name) for name in dict.fromkeys(names)}
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

    def _before_fork(self, held: ExitStack) -> None:
        for lock in (self._active.turn, self._cache.lock, self._live.memory):
            held.enter_context(lock)

    def _after_fork(self) -> None:
        self._pool = None  # whose thread is the parent's
        self._active.after_fork()

    def __enter__(self) -> MaskBank:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _let_go(source: TaskSource, cache: TaskCache, live: LiveModel) -> None:
    with ExitStack() as last:
        last.callback(source.close)
        last.callback(cache.clear)
        last.callback(live.close)
