# SPDX-License-Identifier: Apache-2.0
"""`Batcher`: samples of many clients, of whatever tasks, in one forward; one thread owns the model."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bank.bank import BASE, MaskBank
from ..bank.task import Task

__all__ = ["BatchFacts", "Batcher", "Output"]

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Output:
    """What the model says of one sample.

    Attributes:
        logits: fp32 (classes,), those of a head that means nothing where the task brings none.
        features: fp32 (dim,).
        task: The task as it was used; None for the base.
        waited: Seconds from submission until the batch started.
        ran: Seconds that the batch took, shared by its samples.
        batch: Samples in the batch.
    """

    logits: Tensor
    features: Tensor
    task: Task | None
    waited: float
    ran: float
    batch: int


@dataclass(frozen=True)
class BatchFacts:
    """A batch for the statistics: number of samples and of tasks, and seconds."""

    samples: int
    tasks: int
    seconds: float


@dataclass(frozen=True)
class _Sample:
    image: Tensor
    task: str
    future: Future[Output] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Collects samples for a short while and runs them together.

    Attributes:
        seconds_each: What a sample took of late, batches and all.
    """

    def __init__(
        self,
        bank: MaskBank,
        *,
        max_batch: int = 32,
        max_wait: float = 0.005,
        watch: Callable[[BatchFacts], None] = lambda _: None,
    ) -> None:
        """Start the thread.

        Args:
            bank: Its model returns "logits" and "features", as `ServedModel` does.
            max_batch: Samples in one forward.
            max_wait: Seconds that the first sample of a batch waits for others.
            watch: Told of every batch, in the thread.

        Raises:
            ValueError: If a number is out of range.
        """
        if max_batch < 1 or not 0 <= max_wait <= _LONGEST_WAIT:  # false for nan too
            raise ValueError(
                f"max_batch must be at least 1 and max_wait at least 0, at most {_LONGEST_WAIT:g} s; "
                f"got {max_batch}, {max_wait}."
            )
        self._bank, self._max_batch, self._max_wait, self._watch = bank, max_batch, max_wait, watch
        self._device = next(bank.model.parameters()).device
        self._queue: queue.SimpleQueue[_Sample | None] = queue.SimpleQueue()
        self.seconds_each = 0.0
        self._thread = threading.Thread(target=self._work, name="smn-batcher", daemon=True)
        self._thread.start()

    def submit(self, image: Tensor, task: str) -> Future[Output]:
        """Ask for one sample, (3, height, width), under a task; a future that is cancelled is not computed."""
        sample = _Sample(image, task)
        self._queue.put(sample)
        return sample.future

    @property
    def depth(self) -> int:
        """Samples that wait for a batch."""
        return self._queue.qsize()

    def close(self, timeout: float | None = None) -> bool:
        """Finish what was submitted, and end the thread; whether it has ended within so many seconds."""
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
        """The next batch, and whether there is one after it: all that is there, and what comes within the wait."""
        batch: list[_Sample] = []
        while len(batch) < self._max_batch:
            try:
                if not batch:
                    sample = self._queue.get()
                else:
                    wait = batch[0].since + self._max_wait - time.perf_counter()
                    sample = self._queue.get(timeout=wait) if wait > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if sample is None:
                return batch, False
            batch.append(sample)
        return batch, True

    def _run(self, batch: list[_Sample]) -> None:
        started = time.perf_counter()
        tasks: dict[str, Task | None] = {}
        for name in dict.fromkeys(sample.task for sample in batch):
            try:
                tasks[name] = None if name == BASE else self._bank.task(name)
            except Exception as error:  # this task's trouble alone
                _fail([sample for sample in batch if sample.task == name], error)
        batch = [sample for sample in batch if sample.task in tasks]
        if not batch:
            return
        try:
            answers = self._forward(batch, tasks, started)
        except Exception as error:
            if len(tasks) == 1:
                _fail(batch, error)
                return
            logger.warning("a batch of %d tasks failed (%r) and is run task by task", len(tasks), error)
            for name in tasks:
                self._run([sample for sample in batch if sample.task == name])
            return
        seconds = time.perf_counter() - started
        self.seconds_each += 0.1 * (seconds / len(batch) - self.seconds_each)
        self._watch(BatchFacts(len(batch), len(tasks), seconds))
        for sample, answer in zip(batch, answers, strict=True):
            sample.future.set_result(answer)

    def _forward(self, batch: Sequence[_Sample], tasks: dict[str, Task | None], started: float) -> list[Output]:
        images = torch.stack([sample.image for sample in batch]).to(self._device)
        output = self._bank.forward(images, [tasks[sample.task] for sample in batch])  # found: no second lookup
        # Rows are copies: one that is kept must not keep the batch.
        logits = [row.float().cpu().clone() for row in output["logits"]]
        features = [row.float().cpu().clone().flatten() for row in output["features"]]
        ran = time.perf_counter() - started
        return [
            Output(logits[i], features[i], tasks[sample.task], started - sample.since, ran, len(batch))
            for i, sample in enumerate(batch)
        ]


def _fail(samples: Sequence[_Sample], error: Exception) -> None:
    for sample in samples:
        sample.future.set_exception(error)
