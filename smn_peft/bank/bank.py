# SPDX-License-Identifier: Apache-2.0
"""`MaskBank`: thousands of tasks over one frozen model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .cache import BankStats, TaskCache
from .check import BaseCheck
from .live import LiveModel
from .mixed import MixedForward
from .named_forward import NamedForward
from .reading import task_from_tensors
from .source import MemorySource, TaskSource, read_adapter, unknown_task
from .task import Task

__all__ = ["BASE", "MaskBank"]

BASE = "__base__"
"""The name under which the base itself takes part in a mixed batch."""


class MaskBank:
    """Tasks over one frozen model, each a mask, a head and statistics, switched in the model's own memory.

    Three tiers: coded adapters on disk or in memory; decoded tasks, the least recently used out first; and the one
    task that is live. No module is made per task, and registering a task does not touch the model.

    A bank is safe to use from several threads: one switches at a time, and keeps the model until it is done.

    Attributes:
        model: The base.
        stats: See [`BankStats`].
    """

    def __init__(
        self, source: TaskSource, base: nn.Module, *, ram_budget: int = 1 << 30, exclusive: bool = False
    ) -> None:
        """Put a base under the tasks of a source; see [`open`]."""
        if ram_budget < 0:
            raise ValueError(f"ram_budget must not be negative; got {ram_budget}.")
        self.stats = BankStats()
        self._source = source
        self._live = LiveModel(base)
        self.model = base
        self._check = BaseCheck(base)
        self._cache = TaskCache(ram_budget, self.stats)
        self._exclusive = exclusive
        self._active: str | None = None
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(1, "smn-bank")
        self._mixed = MixedForward(self._live)
        self._named = NamedForward(base, self.forward)

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
    ) -> MaskBank:
        """Open a bank; an empty one is made where there is none.

        Args:
            where: Folder of a store; or a list of adapter folders and Hub ids, which are held in memory, each under
                the last part of its name.
            base: A plain timm or transformers model, or a `Classifier`; goes to eval mode.
            ram_budget: Bytes that decoded tasks may take.
            hot: Tasks that are decoded at once, and kept.
            exclusive: The model is used through the bank only: what a call left live stays live until another task
                is asked for, which saves a write. Otherwise the base (or the activated task) is put back.
            read_only: Do not create a store, and refuse changes.

        Raises:
            FileNotFoundError: If there is no store and `read_only`, or an adapter is not found.
            ValueError: If an adapter does not belong to the base.
        """
        source: TaskSource
        if isinstance(where, (str, os.PathLike)):
            from .store import DiskStore

            source = DiskStore.open(where, read_only=read_only)
        else:
            source = MemorySource()
        bank = cls(source, base, ram_budget=ram_budget, exclusive=exclusive)
        if not isinstance(where, (str, os.PathLike)):
            for adapter in where:
                bank.add(str(adapter).rstrip("/").rpartition("/")[2], adapter)
        for name in hot:
            bank.pin(name)
        return bank

    # --- Tasks -------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of all tasks, sorted."""
        return list(self._source.names())

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self._source)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a task."""
        return name in self._source

    def add(
        self,
        name: str,
        adapter: str | os.PathLike[str],
        *,
        replace: bool = False,
        revision: str | None = None,
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
        if name == BASE:
            raise ValueError(f"{BASE!r} names the base itself: choose another name.")
        stored = read_adapter(adapter, revision=revision)
        self._decode(name, stored.config, stored.tensors)
        self._source.add(name, stored, replace=replace)
        self._cache.drop(name)

    def remove(self, name: str) -> None:
        """Take a task out of the bank; KeyError for an unknown name."""
        self._source.remove(name)
        self._forget(name)

    def rename(self, old: str, new: str) -> None:
        """Give a task another name; KeyError for an unknown one, ValueError for one that is taken."""
        if new == BASE:
            raise ValueError(f"{BASE!r} names the base itself: choose another name.")
        self._source.rename(old, new)
        self._forget(old)

    def _forget(self, name: str) -> None:
        self._cache.drop(name)
        with self._lock:
            if self._active == name:
                self.activate(None)

    def info(self, name: str) -> dict[str, Any]:
        """Config, density and bytes of a task; KeyError for an unknown name."""
        task = self.task(name)
        return {"name": name, "density": task.density, "decoded_bytes": task.nbytes, "config": dict(task.info)}

    def task(self, name: str) -> Task:
        """A task, decoded if it is not; KeyError for an unknown name."""
        if name not in self._source:
            raise unknown_task(name, len(self._source))

        def decode() -> Task:
            stored = self._source.read(name)
            return self._decode(name, stored.config, stored.tensors)

        return self._cache.get(name, self._source.version(name), decode)

    def _looked_up(self, task: str | Task | None) -> Task | None:
        if task is None or task == BASE:
            return None
        return self.task(task) if isinstance(task, str) else task

    def _decode(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Task:
        needs_base = config.get("trainable_fraction", 1.0) < 1.0 or config.get("codec") == "archival"
        with self._lock if needs_base else nullcontext():
            if needs_base:  # what is selected, or how it is coded, follows from the base's own weights
                self._live.switch(None)
            task = task_from_tensors(name, tensors, self.model, config, may_be_sparse=self._live.may_be_sparse)
        with self._lock:
            self._check(task, self._live)
        return task

    def pin(self, name: str) -> None:
        """Decode a task and keep it decoded."""
        self._cache.pinned.add(name)
        self.task(name)

    def unpin(self, name: str) -> None:
        """Let a task make room again."""
        self._cache.pinned.discard(name)

    def prefetch(self, names: Sequence[str]) -> Future[None]:
        """Decode tasks in the background."""
        names = list(names)

        def decode() -> None:
            for name in names:
                self.task(name)

        return self._pool.submit(decode)

    # --- Switching ---------------------------------------------------------------------------------------------------

    def activate(self, name: str | None) -> None:
        """Make a task live until further notice; None (or "__base__") for the base. KeyError for an unknown name."""
        with self._lock:
            self._switch(name)
            self._active = None if name == BASE else name

    @contextmanager
    def use(self, name: str | None) -> Iterator[nn.Module]:
        """The model under a task, for this thread alone; afterwards it is what it was before."""
        with self._lock:
            before = self._active
            self._switch(name)
            self._active = None if name == BASE else name
            try:
                yield self.model
            finally:
                self._active = before
                self._put_back()

    def _switch(self, name: str | None) -> None:
        task = self._looked_up(name)
        if task is not self._live.current:
            self.stats.switches += 1
            self._live.switch(task)

    def _put_back(self) -> None:
        if not self._exclusive or self._active is not None:
            self._switch(self._active)

    def forward(self, inputs: Tensor, tasks: Sequence[str | Task | None] | str | None = None, **kwargs: Any) -> Any:
        """A batch whose samples may be of different tasks.

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
            ValueError: If the number of names is not the number of samples.
        """
        names = [tasks] * len(inputs) if tasks is None or isinstance(tasks, str) else list(tasks)
        if len(names) != len(inputs):
            raise ValueError(f"There are {len(inputs)} samples and {len(names)} tasks: name one task per sample.")
        with self._lock, torch.no_grad():
            decoded = {name: self._looked_up(name) for name in dict.fromkeys(names)}
            try:
                generation = self._live.generation
                return self._mixed([decoded[name] for name in names], inputs, **kwargs)
            finally:
                self.stats.switches += self._live.generation - generation
                self._put_back()

    __call__ = forward

    def close(self) -> None:
        """Put the base back as it was, and let go of the store."""
        with self._lock:
            self._pool.shutdown()
            self._named.remove()
            self._live.close()
            self._cache.clear()
            self._source.close()

    def __enter__(self) -> MaskBank:
        """Use the bank, and close it afterwards."""
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
