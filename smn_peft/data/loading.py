# SPDX-License-Identifier: Apache-2.0
"""Batches to train on: the same samples for any number of workers and processes, and from any step on again."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from .transforms import ImageTransform

__all__ = [
    "STOP_SIGNALS",
    "AugmentedDataset",
    "PatientLoader",
    "ShardedBatches",
    "augmented",
    "build_loader",
    "check_map_style",
    "seed_of",
]


def seed_of(*parts: int | str) -> int:
    """A seed below 2^63 that depends on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


#: Signals that ask a run to stop; SLURM and systemd send them to all its processes at once.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """The main process finishes its step first and needs its workers; its own SIGTERM still ends one."""
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere nobody says who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_the_end, daemon=True).start()


def _await_the_end() -> None:
    main: Any = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)


class PatientLoader(DataLoader[dict[str, Any]]):
    """A `DataLoader` whose workers leave signals to the main process, and end with it."""

    def __init__(self, dataset: Any, batch_size: int | None = 1, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size, worker_init_fn=_leave_signals_to_the_main_process, **kwargs)

    def __iter__(self) -> Any:
        if self.num_workers == 0 or not hasattr(signal, "sigwaitinfo"):
            return super().__iter__()
        # Workers start with these signals blocked: one must not end a worker before it has come to ignore them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_map_style(dataset: Any) -> None:
    """Refuse a dataset (`ValueError`) that cannot be read by index, as a seeded order needs it."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        what = f"A {type(dataset).__name__} can only be read in order"
        raise ValueError(f"{what}: load it without streaming=True, or give list(dataset) if it fits into memory.")


def augmented(item: dict[str, Any], transform: ImageTransform, *parts: int) -> dict[str, Any]:
    """A transformed sample, whose randomness depends on `parts` alone."""
    views = transform(item["image"], torch.Generator().manual_seed(seed_of("sample", *parts)))
    labels = {"labels": item["label"]} if "label" in item else {}
    return {"pixel_values" if isinstance(views, Tensor) else "crops": views, **labels, "index": item["index"]}


class AugmentedDataset(Dataset[dict[str, Any]]):
    """Transformed samples, whose randomness depends on seed, epoch and index alone.

    `dataset[i]` is ``{"pixel_values": tensor, "index": i}``, or ``{"crops": [tensor, …], "index": i}`` where the
    transform gives a list, with ``"labels"`` where the images have them: stacked by torch's default collation, a batch
    of an objective.

    The `dataset` is an `ImageDataset`, or any map-style one of such items.
    """

    def __init__(self, dataset: Any, transform: ImageTransform, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        # In shared memory, so that workers that stay alive over the epochs see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Draw the samples of this epoch, in running workers too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return augmented(self.dataset[index], self.transform, self.seed, int(self._epoch), int(index))


class ShardedBatches(Sampler[list[int]]):
    """Indices of one process's part of every batch.

    The batches of the `n` samples depend on `batch_size`, `seed` and the epoch only; process r of p takes the r-th of
    p contiguous parts of each, so that the joined batch is the same for any number of processes. A last batch that is
    not full is left out. `batch_size` is the joined batch's, which `num_processes` must divide.
    """

    def __init__(
        self, n: int, batch_size: int, *, seed: int = 0, num_processes: int = 1, process_index: int = 0
    ) -> None:
        if batch_size < 1 or n < 1:
            raise ValueError(f"The batch size and the number of samples must be at least 1; got {batch_size} and {n}.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index must lie in [0, {num_processes}); got {process_index}.")
        if batch_size % num_processes:
            what = f"The joined batch of {batch_size} cannot be divided among {num_processes} processes"
            raise ValueError(f"{what}: take a multiple, such as {-(-batch_size // num_processes) * num_processes}.")
        if n < batch_size:
            fix = f"set the batch size to {n - n % num_processes or num_processes} or less"
            raise ValueError(f"{n} images are fewer than one batch of {batch_size}: {fix}.")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.num_processes, self.process_index = num_processes, process_index
        self.epoch, self.start_batch = 0, 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Continue with this epoch at this batch; those before it are not read."""
        last = self.n // self.batch_size
        if not 0 <= start_batch <= last:
            raise ValueError(f"start_batch must lie in [0, {last}], the batches of an epoch; got {start_batch}.")
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return self.n // self.batch_size - self.start_batch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.epoch))
        batches = torch.randperm(self.n, generator=generator).split(self.batch_size)
        for batch in batches[self.start_batch : self.n // self.batch_size]:
            yield batch.chunk(self.num_processes)[self.process_index].tolist()


class TrainingLoader(PatientLoader):
    """A [`PatientLoader`] that knows epochs; made by `build_loader`."""

    dataset: AugmentedDataset
    batch_sampler: ShardedBatches

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next iteration this epoch, from this batch on."""
        self.batch_sampler.set_epoch(epoch, start_batch)
        self.dataset.set_epoch(epoch)


def build_loader(
    dataset: Any,
    transform: ImageTransform,
    batch_size: int,
    *,
    seed: int = 0,
    num_workers: int = 0,
    num_processes: int = 1,
    process_index: int = 0,
    pin_memory: bool = False,
) -> TrainingLoader:
    """Load the batches of one process; call `set_epoch` before every epoch.

    Neither the samples nor their order depend on workers or processes, and the caller's random state is untouched. Do
    not pass the result to `Accelerator.prepare`: it is sharded already. The arguments are those of
    [`AugmentedDataset`], [`ShardedBatches`] and torch's `DataLoader`.
    """
    check_map_style(dataset)
    processes = {"num_processes": num_processes, "process_index": process_index}
    return TrainingLoader(
        AugmentedDataset(dataset, transform, seed),
        batch_sampler=ShardedBatches(len(dataset), batch_size, seed=seed, **processes),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        # Otherwise every iteration would take a number from the caller's generator.
        generator=torch.Generator().manual_seed(seed_of("workers", seed)),
    )
