# SPDX-License-Identifier: Apache-2.0
"""`ImageStream`: images that `datasets` reads in order, and copies nowhere, and endless shuffled batches of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from .dataset import WITHOUT_LABELS, EncodedImages, ImageDataset, NoLabelsError, stored_image
from .decoding import decode_rgb
from .loading import PatientLoader, augmented, seed_of
from .transforms import ImageTransform

__all__ = ["ImageStream", "StreamLoader", "build_stream_loader"]

_BUFFER = 1000  # as of `datasets`


@dataclass(eq=False, repr=False)
class ImageStream:
    """Images in the order of their files (shards), read from where they are; made by `stream_images`."""

    table: Any  # a `datasets.IterableDataset` of the two columns, images not decoded
    image_column: str
    label_column: str | None
    _: KW_ONLY
    name: str
    split: str
    folders: list[Path]  # where rows may name files
    num_classes: int | None = None  # None: the table does not say

    def __post_init__(self) -> None:
        if self.label_column is None:
            return
        feature, names = self.table.features[self.label_column], self.classes
        if names is None and not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
            what = f"{self.name}: the column {self.label_column!r} holds {feature}, and a stream's labels are numbers"
            fix = f"store it as a ClassLabel, pass label_column=, one of {', '.join(self.table.features)}"
            raise NoLabelsError(f"{what}: {fix}, or pass {WITHOUT_LABELS}.")
        if self.num_classes is None and names is not None:
            self.num_classes = len(names)

    @property
    def classes(self) -> list[str] | None:
        """Names by label, where the column is a `ClassLabel`."""
        return None if self.label_column is None else getattr(self.table.features[self.label_column], "names", None)

    @property
    def num_shards(self) -> int:
        """Files, or parts of them, that processes and workers share among them."""
        return int(self.table.num_shards)

    def without_labels(self) -> ImageStream:
        """The same images, unlabelled."""
        return replace(self, label_column=None, num_classes=None)

    def read(self, row: Mapping[str, Any], number: int | str) -> tuple[bytes, str, dict[str, int]]:
        """An image file, its name for messages and ``{"label": …}``, empty without; NoLabelsError for a wrong one."""
        data, where = stored_image(row[self.image_column], f"{self.name}, {self.split}, {number}", self.folders)
        if self.label_column is None:
            return data, where, {}
        label = row[self.label_column]
        if label is None or not 0 <= label < (self.num_classes or 1 << 31):
            what = f"{where}: the label is {label}, and must lie in [0, {self.num_classes or '2^31'})"
            raise NoLabelsError(f"{what}: correct it, set num_classes, or pass {WITHOUT_LABELS}.")
        return data, where, {"label": int(label)}

    def digest(self, images: int = 16) -> str:
        """SHA-256, as hex, of the number of shards and the first images in order, and of their labels."""
        digest = hashlib.sha256(str(self.num_shards).encode())
        for row in self.table.take(images):
            data, _, label = self.read(row, "of the first images")
            digest.update(hashlib.sha256(data).digest() + str(label).encode())
        return digest.hexdigest()

    def first(self, count: int, *, seed: int = 0) -> ImageDataset:
        """The first `count` images in a shuffled order, their files held in memory."""
        rows = self.table.shuffle(seed=seed, buffer_size=_BUFFER).take(count)
        found = [self.read(row, f"image {number}") for number, row in enumerate(rows)]
        files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data, _, _ in found if data]
        offsets = torch.tensor([0, *(len(data) for data, _, _ in found)]).cumsum(0)
        labels = None if self.label_column is None else torch.tensor([label["label"] for _, _, label in found])
        source = EncodedImages(torch.cat(files or [torch.empty(0, dtype=torch.uint8)]), offsets, self.name)
        more: dict[str, Any] = {"name": self.name, "split": self.split, "rows": torch.arange(len(found))}
        return ImageDataset(source, labels=labels, classes=self.classes, **more)


class _Reader:
    """One worker's images without an end: pass after pass over its shards, each in another order."""

    def __init__(self, stream: ImageStream, seed: int, buffer_size: int, start: tuple[int, int]) -> None:
        self.position = start  # number of the pass, images of it that were read
        self._stream, self._seed, self._buffer_size = stream, seed, buffer_size
        self._rows: Iterator[dict[str, Any]] = islice(self._pass(), start[1], None)

    def _pass(self) -> Iterator[dict[str, Any]]:
        # Every process shuffles the shards alike, and takes its own of them.
        seed = seed_of("pass", self._seed, self.position[0])
        return iter(self._stream.table.shuffle(seed=seed, buffer_size=self._buffer_size))

    def next(self) -> tuple[dict[str, Any], tuple[int, int]]:
        """The next row, and its position."""
        while (row := next(self._rows, None)) is None:
            if self.position[1] == 0:
                raise ValueError(
                    f"{self._stream.name}, {self._stream.split}: a worker's files hold no image; delete them."
                )
            self.position = self.position[0] + 1, 0
            self._rows = self._pass()
        at, self.position = self.position, (self.position[0], self.position[1] + 1)
        return row, at


class _StreamedBatches(IterableDataset[Any]):
    """A worker's share of an epoch: (worker, its position afterwards, batch), None for a batch that is skipped."""

    def __init__(
        self,
        stream: ImageStream,
        transform: ImageTransform,
        batch_size: int,
        batches: int,
        *,
        seed: int,
        buffer_size: int,
        process: int,
        workers: int,
    ) -> None:
        self.stream, self.transform, self.batch_size, self.batches = stream, transform, batch_size, batches
        self.seed, self.buffer_size, self.process = seed, buffer_size, process
        # Where each worker begins the epoch, and the first batch wanted: shared with workers that stay alive.
        self.positions = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()
        self.start_batch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._reader: _Reader | None = None

    def __iter__(self) -> Iterator[tuple[int, tuple[int, int], dict[str, Any] | None]]:
        worker = info.id if (info := get_worker_info()) else 0
        (passes, images), first = self.positions[worker].tolist(), int(self.start_batch)
        if self._reader is None or self._reader.position != (passes, images):
            self._reader = _Reader(self.stream, self.seed, self.buffer_size, (passes, images))
        reader = self._reader
        for number in range(worker, self.batches, len(self.positions)):  # the loader takes turns
            rows = [reader.next() for _ in range(self.batch_size)]
            batch = default_collate([self._sample(worker, *row) for row in rows]) if number >= first else None
            yield worker, reader.position, batch

    def _sample(self, worker: int, row: dict[str, Any], at: tuple[int, int]) -> dict[str, Any]:
        data, where, label = self.stream.read(row, f"image {at[1]} of worker {worker} in pass {at[0]}")
        item = {"image": decode_rgb(data, where), "index": at[1], **label}
        return augmented(item, self.transform, self.seed, self.process, worker, *at)


class StreamLoader(PatientLoader):
    """Batches of a stream, without a length; made by `build_stream_loader`.

    An epoch is so many batches, and begins where the one before ended. `state_dict` is the position after the batch
    that was taken last: where every worker began the epoch, as [number of the pass, images of it].
    """

    dataset: _StreamedBatches

    def __init__(self, dataset: _StreamedBatches, num_workers: int, **kwargs: Any) -> None:
        super().__init__(dataset, None, num_workers=num_workers, persistent_workers=num_workers > 0, **kwargs)
        self._epoch, self._taken = 0, 0
        self._begun = self._latest = dataset.positions.clone()

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next iteration this epoch, from this batch on: the same again, or the one after it."""
        state = self.state_dict()
        if epoch == state["epoch"]:
            self.load_state_dict(state)
        elif epoch != self._epoch:
            raise ValueError(f"A stream goes on where it is, in epoch {state['epoch']}; it cannot begin {epoch}.")
        self._taken = 0
        self.dataset.positions.copy_(self._begun)
        self.dataset.start_batch.fill_(start_batch)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch of the next batch begins, JSON-compatible."""
        done = self._taken == self.dataset.batches
        positions = self._latest if done else self._begun
        return {"epoch": self._epoch + done, "positions": positions.tolist(), "num_workers": self.num_workers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position; ValueError if it is of another number of workers."""
        if (there := state["num_workers"]) != self.num_workers:
            what = f"The stream was read with num_workers={there}, and with {self.num_workers} its order would change"
            raise ValueError(f"{what}: resume with {there}, or start anew in another output_dir.")
        self._epoch, self._taken = state["epoch"], 0
        self._begun = torch.tensor(state["positions"])

    def __iter__(self) -> Any:
        self._latest, self._taken = self._begun.clone(), 0
        for worker, position, batch in super().__iter__():
            self._latest[worker] = torch.tensor(position)
            self._taken += 1
            if batch is not None:
                yield batch


def build_stream_loader(
    stream: ImageStream,
    transform: ImageTransform,
    batch_size: int,
    batches: int,
    *,
    seed: int = 0,
    buffer_size: int = _BUFFER,
    num_workers: int = 0,
    num_processes: int = 1,
    process_index: int = 0,
    pin_memory: bool = False,
) -> StreamLoader:
    """Load the batches of one process, `batches` an epoch.

    Processes share the shards, and the workers of each its part of them; the order is the same for the same number of
    processes and workers, and another for another. `batch_size` is the joined batch's, as of `build_loader`.

    Raises:
        ValueError: There are fewer shards than processes, or a batch does not divide into them.

    Warns:
        UserWarning: A process has fewer shards than workers; the surplus is not started.
    """
    from datasets.distributed import split_dataset_by_node

    shards = stream.num_shards
    if shards < num_processes:
        what = f"{stream.name}, split {stream.split!r}, has {shards} shards for {num_processes} processes"
        raise ValueError(f"{what}, and each needs one of its own: start fewer, or write the images into more files.")
    if batch_size % num_processes:
        raise ValueError(f"The joined batch of {batch_size} cannot be divided among {num_processes} processes.")
    if num_workers > (most := shards // num_processes):
        text = f"{stream.name} has {shards} shards, which keep {most} workers a process busy, not {num_workers}"
        warnings.warn(f"{text}: only those are started.", stacklevel=2)
        num_workers = most
    own = split_dataset_by_node(stream.table, rank=process_index, world_size=num_processes, strategy="shards")
    dataset = _StreamedBatches(
        replace(stream, table=own),
        transform,
        batch_size // num_processes,
        batches,
        seed=seed,
        buffer_size=buffer_size,
        process=process_index,
        workers=max(1, num_workers),
    )
    return StreamLoader(
        dataset,
        num_workers,
        pin_memory=pin_memory,
        # Otherwise every iteration would take a number from the caller's generator.
        generator=torch.Generator().manual_seed(seed_of("workers", seed)),
    )
