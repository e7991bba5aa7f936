# SPDX-License-Identifier: Apache-2.0
"""`Batcher`: samples of many clients and tasks in one forward. `Workers`: threads for other blocking work."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..bank.bank import BASE, MaskBank
from ..bank.task import Task

__all__ = ["Batcher", "Output", "Workers"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LONGEST_WAIT = 60.0


class Workers:
    """Daemon threads: at exit Python joins those of a `ThreadPoolExecutor`, however long they work."""

    def __init__(self, count: int, name: str) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()  # (future, function, arguments), or None to end
        for _ in range(count):
            threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in one of the threads; never, if this is cancelled while it waits."""
        future: Future[T] = Future()
        self._queue.put((future, function, arguments))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the threads after what was put before."""
        self._queue.put(None)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            future, function, arguments = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            del job, future, function, arguments  # not held while waiting for the next
        self._queue.put(None)  # for the next thread


@dataclass(frozen=True)
class Output:
    """What the model gives for one sample."""

    logits: Tensor  # fp32 (classes,); meaningless where the task has no head
    features: Tensor  # fp32 (dim,)
    task: Task | None  # as it was used; None for the base
    waited: float  # seconds from submission until the batch started
    ran: float  # seconds that the batch took
    batch: int  # samples in the batch


@dataclass(frozen=True)
class _Sample:
    image: Tensor
    task: str
    future: Future[Output] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Collect samples for a short while and run them together, in a thread that owns the model.

    Args:
        bank: Its model returns "logits" and "features", as `ServedModel` does.
        max_batch: Samples in one forward.
        max_wait: Seconds that the first sample of a batch waits for others.
        watch: Called in the thread after every batch with its samples, tasks and seconds.
    """

    def __init__(
        self,
        bank: MaskBank,
        *,
        max_batch: int = 32,
        max_wait: float = 0.005,
        watch: Callable[[int, int, float], None] = lambda *_: None,
    ) -> None:
        if max_batch < 1 or not 0 <= max_wait <= _LONGEST_WAIT:  # false for nan too
            wanted = f"max_batch must be at least 1 and max_wait at least 0, at most {_LONGEST_WAIT:g} s"
            raise ValueError(f"{wanted}; got {max_batch}, {max_wait}.")
        self._bank, self._max_batch, self._max_wait, self._watch = bank, max_batch, max_wait, watch
        self._device = next(bank.model.parameters()).device
        self._queue: queue.SimpleQueue[_Sample | None] = queue.SimpleQueue()
        #: Moving average of the seconds per sample.
        self.seconds_each = 0.0
        self._thread = threading.Thread(target=self._work, name="smn-batcher", daemon=True)
        self._thread.start()

    def submit(self, image: Tensor, task: str) -> Future[Output]:
        """Queue one sample (3, height, width) under a task; a future that is cancelled is not computed."""
        sample = _Sample(image, task)
        self._queue.put(sample)
        return sample.future

    @property
    def depth(self) -> int:
        """Samples that wait for a batch."""
        return self._queue.qsize()

    def close(self, timeout: float | None = None) -> bool:
        """Finish what was submitted and end the thread; returns whether it ended within so many seconds."""
        self._queue.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        going = True
        while going:
            batch, going = self._collect()
            by_shape: dict[torch.Size, list[_Sample]] = {}
            for sample in batch:
                if sample.future.set_running_or_notify_cancel():
                    by_shape.setdefault(sample.image.shape, []).append(sample)
            for samples in by_shape.values():
                self._run(samples)

    def _collect(self) -> tuple[list[_Sample], bool]:
        """The next batch, and whether another follows."""
        batch: list[_Sample] = []
        while len(batch) < self._max_batch:
            left = max(0.0, batch[0].since + self._max_wait - time.perf_counter()) if batch else None
            try:
                sample = self._queue.get(timeout=left)
            except queue.Empty:
                break
            if sample is None:
                return batch, False
            batch.append(sample)
        return batch, True

    def _run(self, batch: Sequence[_Sample]) -> None:
        """Run samples of one shape together; task by task if that fails, so that a failure is one task's."""
        started = time.perf_counter()
        names = list(dict.fromkeys(sample.task for sample in batch))
        try:
            tasks = {name: None if name == BASE else self._bank.task(name) for name in names}
            images = torch.stack([sample.image for sample in batch]).to(self._device)
            output = self._bank.forward(images, [tasks[sample.task] for sample in batch])
            # Rows are copies: one that is kept must not keep the batch.
            logits = [row.float().cpu().clone() for row in output["logits"]]
            features = [row.float().cpu().clone().flatten() for row in output["features"]]
        except Exception as error:
            if len(names) > 1:
                logger.warning("a batch of %d tasks failed (%r) and is run task by task", len(names), error)
                for name in names:
                    self._run([sample for sample in batch if sample.task == name])
            else:
                for sample in batch:
                    sample.future.set_exception(error)
            return
        seconds = time.perf_counter() - started
        self.seconds_each += 0.1 * (seconds / len(batch) - self.seconds_each)
        self._watch(len(batch), len(tasks), seconds)
        for sample, scores, own in zip(batch, logits, features, strict=True):
            waited = started - sample.since
            sample.future.set_result(Output(scores, own, tasks[sample.task], waited, seconds, len(batch)))
