# SPDX-License-Identifier: Apache-2.0
"""`embed_dataset`: embeddings of a dataset in parts on disk, which processes and jobs share and make once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from ..data import ImageDataset
from ..evaluation.features import Inputs, feature_batches
from ..storage.files import atomic_write
from ..training.processes import decided, together
from .embedder import Embedder

FORMATS = ("parquet", "safetensors")
_FACTS = "smn_embed"  # name of a part's facts, JSON in its metadata


class Embedded(NamedTuple):
    """What a call of [`embed_dataset`] did."""

    parts: int  # of the whole dataset
    written: int  # by this process
    left: int  # that were there of this job's share
    images: int  # embedded by this process
    seconds: float


def embed_dataset(
    embedder: Embedder,
    images: ImageDataset,
    folder: str | Path,
    *,
    part_size: int = 8192,
    job: tuple[int, int] = (1, 1),
    format: str = "parquet",
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
) -> Embedded:
    """Embed all images, in their order, into files ``part-00000-of-00123.parquet`` of `part_size` images.

    Each has the columns `index` (in the dataset), `key` (the image's file, where there are some), `label` (where there
    are some) and `embedding`. Parts are the same to the bit whoever makes them: their batches do not depend on the
    number of processes and jobs, nor on whether it went on after it was stopped. A process holds one part at a time.

    Args:
        embedder: Its `batch_size` and device are taken.
        images: Read by index.
        folder: Is made; it may be shared by machines. Parts that it holds are not made again.
        part_size: Images per file, which is what processes share and what is lost if one is killed.
        job: (i, n) makes the i-th of n shares, from 1; each is a range of parts.
        format: "parquet", or "safetensors", which holds no keys.
        num_workers: Processes that read images, per process.
        accelerator: Shares the parts among its processes; None: this process makes all.

    Raises:
        ValueError: The folder holds a part of another model, dataset or size, or processes have different ones.
        ImageError: An image cannot be read.
        RuntimeError: Another process cannot start.
    """
    if part_size < 1:
        raise ValueError(f"part_size must be at least 1; got {part_size}.")
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; there are {', '.join(FORMATS)}.")
    folder, total = Path(folder), len(images)
    count = -(-total // part_size)
    facts = {
        "model": embedder.digest,
        "mode": embedder.mode,
        "preprocessing": embedder.preprocessing,
        "data": images.digest(),
        "images": total,
        "part_size": part_size,
        "format": format,
    }
    metadata = {_FACTS: json.dumps(facts)}
    schema = _schema(images, embedder.dim) if format == "parquet" else None
    share = range((job[0] - 1) * count // job[1], job[0] * count // job[1])
    paths = [folder / f"part-{number:05d}-of-{count:05d}.{format}" for number in range(count)]

    def start() -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("part-*-of-*")):
            _check_same(path, _read_facts(path), facts)
        return [number for number in share if not paths[number].exists()]

    if accelerator is None:
        processes, process, todo = 1, 0, start()
    else:
        processes, process = accelerator.num_processes, accelerator.process_index
        todo, main = decided(lambda: (start(), facts))
        together(accelerator, lambda: _check_same("The main process's part", main, facts))
        folder.mkdir(parents=True, exist_ok=True)  # on each machine's disk, if it is not shared
    mine = todo[process::processes]
    bounds = {number: range(number * part_size, min((number + 1) * part_size, total)) for number in mine}
    batches = (part[at : at + embedder.batch_size] for part in bounds.values() for at in _starts(part, embedder))
    inputs = Inputs(images, embedder.transform, keys=images.has_keys)
    found = feature_batches(
        embedder.model,
        inputs,
        batches,
        device=embedder.device,
        num_workers=num_workers,
        function=embedder.features,
    )
    began = time.perf_counter()
    done, own = sum(map(len, bounds.values())), f" (process 1 of {processes})" if processes > 1 else ""
    bar = tqdm(total=done, desc=f"embedding{own}", unit=" images", disable=None if process == 0 else True)
    with bar, closing(found):
        for number, part in bounds.items():
            columns = _columns(part, _watched(islice(found, len(_starts(part, embedder))), bar))
            with atomic_write(paths[number]) as file:
                if schema is None:
                    columns.pop("key", None)  # text is no tensor
                    file.write(save({name: tensor.contiguous() for name, tensor in columns.items()}, metadata))
                else:
                    _write_parquet(file, columns, schema.with_metadata({**schema.metadata, **metadata}))
    return Embedded(count, len(mine), len(share) - len(todo), done, time.perf_counter() - began)


def _starts(part: range, embedder: Embedder) -> range:
    return range(0, len(part), embedder.batch_size)


def _watched(batches: Iterator[dict[str, Any]], bar: Any) -> Iterator[dict[str, Any]]:
    for batch in batches:
        bar.update(len(batch["features"]))
        yield batch


def _columns(part: range, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The columns of a part: tensors, and a list of keys."""
    found = list(batches)
    columns: dict[str, Any] = {"index": torch.arange(part.start, part.stop)}
    if "key" in found[0]:
        columns["key"] = [key or None for batch in found for key in batch["key"]]
    if "label" in found[0]:
        columns["label"] = torch.cat([batch["label"] for batch in found])
    return {**columns, "embedding": torch.cat([batch["features"] for batch in found])}


def _schema(images: ImageDataset, dim: int) -> Any:
    """Arrow's schema of the columns, by which `datasets` knows the classes' names."""
    try:
        from datasets import ClassLabel, Features, Sequence, Value
    except ImportError as error:
        what = "Parquet files are written by datasets and pyarrow"
        raise ImportError(f"{what}: pip install 'smn_peft[data]', or take --format safetensors.") from error
    names = images.classes or []
    columns: dict[str, Any] = {"index": Value("int64")}
    if images.has_keys:
        columns["key"] = Value("string")
    if images.labels is not None:
        columns["label"] = ClassLabel(names=names) if len({*names}) == len(names) > 0 else Value("int64")
    return Features({**columns, "embedding": Sequence(Value("float32"), length=dim)}).arrow_schema


def _write_parquet(file: Any, columns: dict[str, Any], schema: Any) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    embedding = columns["embedding"].contiguous()
    arrays = {name: values if isinstance(values, list) else values.numpy() for name, values in columns.items()}
    arrays["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(embedding.flatten().numpy()), embedding.shape[1])
    parquet.write_table(pa.table(arrays, schema=schema), file, use_dictionary=False)  # hardly a value repeats


def _read_facts(path: Path) -> dict[str, Any]:
    """What a part was made of; ValueError if it is damaged, or not of ours."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            facts: dict[str, Any] = json.loads((parquet.read_schema(path).metadata or {})[_FACTS.encode()])
            return facts
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[_FACTS])
            return facts
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} is no part that smn embed wrote, or damaged ({error!r}): delete it.") from error


def _check_same(where: str | Path, found: dict[str, Any], facts: dict[str, Any]) -> None:
    differing = [f"{name}: {found.get(name)}, now {facts[name]}" for name in facts if found.get(name) != facts[name]]
    if differing:
        fix = "take another folder, or delete what is in it"
        raise ValueError(f"{where} is of something else ({'; '.join(differing)}): {fix}.")
