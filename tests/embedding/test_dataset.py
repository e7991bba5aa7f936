# SPDX-License-Identifier: Apache-2.0
"""Parts are the same to the bit whoever makes them, are made once, and cost the same memory however many there are."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from smn_peft.data import ImageDataset, load_images
from smn_peft.embedding import Embedder, embed_dataset
from tests.gloo import join_group, run_processes
from tests.training.tiny import CLASSES, TRAIN, base_of, write_npz

PARTS = [f"part-{number:05d}-of-00007.parquet" for number in range(7)]
SIZES = {"part_size": 7}  # 48 images: the last part has 6, and batches of 3 never fill a part


def embedder_of(finished: Path) -> Embedder:
    return Embedder(base_of(finished), finished / "out", batch_size=3)


@pytest.fixture(scope="module")
def embedder(finished) -> Embedder:
    return embedder_of(finished)


@pytest.fixture(scope="module")
def images(finished) -> ImageDataset:
    return load_images(finished / "set.npz")


@pytest.fixture(scope="module")
def alone(embedder, images, tmp_path_factory) -> Path:
    """The folder of one process."""
    folder = tmp_path_factory.mktemp("alone") / "parts"
    done = embed_dataset(embedder, images, folder, **SIZES)
    assert (done.parts, done.written, done.left, done.images) == (7, 7, 0, TRAIN)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def table(folder: Path, tmp_path: Path) -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))


def test_the_rows_are_the_dataset_in_its_order(alone, embedder, images, tmp_path):
    assert [*contents(alone)] == PARTS
    found = table(alone, tmp_path)
    assert found.column_names == ["index", "label", "embedding"]
    assert found["index"][:] == list(range(TRAIN))
    assert found["label"][:] == images.labels.tolist()
    assert found.features["label"] == datasets.ClassLabel(names=list(CLASSES))
    assert found.features["embedding"].length == embedder.dim == 16
    same = embedder({"image": [images[index]["image"] for index in range(TRAIN)]})["embedding"]
    np.testing.assert_allclose(np.array(found["embedding"], np.float32), same, rtol=1e-5, atol=1e-6)


def in_group(finished: Path, folder: Path) -> dict[str, torch.Tensor]:
    join_group()
    embedder, images = embedder_of(finished), load_images(finished / "set.npz")
    done = embed_dataset(embedder, images, folder, **SIZES, accelerator=Accelerator(cpu=True))
    return {"written": torch.tensor(done.written), "left": torch.tensor(done.left)}


def test_two_processes_two_jobs_and_workers_write_the_same_bytes(alone, finished, embedder, images, tmp_path):
    torch.set_num_threads(1)
    results = run_processes(in_group, 2, tmp_path, finished, tmp_path / "processes")
    assert [int(result["written"]) for result in results] == [4, 3]
    assert contents(tmp_path / "processes") == contents(alone)
    for job in ((1, 2), (2, 2)):
        done = embed_dataset(embedder, images, tmp_path / "jobs", **SIZES, job=job, num_workers=2)
        assert (done.written, done.left) == ((3, 0) if job == (1, 2) else (4, 0))
        assert [*contents(tmp_path / "jobs")] == PARTS[: done.written if job == (1, 2) else 7]
    assert contents(tmp_path / "jobs") == contents(alone)
    # What is lacking is shared anew.
    for name in PARTS[1:3]:
        (tmp_path / "processes" / name).unlink()
    results = run_processes(in_group, 2, tmp_path, finished, tmp_path / "processes")
    assert [(int(result["written"]), int(result["left"])) for result in results] == [(1, 5), (1, 5)]
    assert contents(tmp_path / "processes") == contents(alone)


def test_what_was_interrupted_goes_on_and_what_is_there_stays(alone, embedder, finished, tmp_path):
    broken = load_images(write_npz(tmp_path / "set.npz", broken=33))
    with pytest.raises(ValueError, match=r"set\.npz, row 33: cannot be read"):
        embed_dataset(embedder, broken, tmp_path / "parts", **SIZES)
    assert contents(tmp_path / "parts").keys() == {*PARTS[:4]}  # whole parts and nothing else
    for path in (tmp_path / "parts").iterdir():
        path.unlink()
    (tmp_path / "parts" / PARTS[2]).write_bytes((alone / PARTS[2]).read_bytes())
    before = (tmp_path / "parts" / PARTS[2]).stat().st_mtime_ns
    done = embed_dataset(embedder, load_images(finished / "set.npz"), tmp_path / "parts", **SIZES)
    assert (done.written, done.left) == (6, 1)
    assert (tmp_path / "parts" / PARTS[2]).stat().st_mtime_ns == before
    assert contents(tmp_path / "parts") == contents(alone)


def test_parts_of_something_else_are_refused_by_name(alone, embedder, images, finished, tmp_path):
    before = contents(alone)
    other = Embedder(base_of(finished), batch_size=3)
    for made, of, options, message in [
        (other, images, SIZES, r"part-00000-of-00007\.parquet is of something else \(model: float32:\w+, now float32"),
        (embedder, images.subset(range(47)), SIZES, r"is of something else \(data: .*images: 48, now 47\)"),
        (embedder, images.without_labels(), SIZES, r"is of something else \(data: "),
        (embedder, images, {"part_size": 8}, r"\(part_size: 7, now 8\): take another folder, or delete"),
        (embedder, images, {**SIZES, "format": "safetensors"}, r"\(format: parquet, now safetensors\)"),
        (embedder, images, {**SIZES, "format": "npz"}, "Unknown format 'npz'; there are parquet, safetensors"),
        (embedder, images, {"part_size": 0}, "part_size must be at least 1; got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            embed_dataset(made, of, alone, **options)
    assert contents(alone) == before
    (tmp_path / PARTS[0]).write_bytes(before[PARTS[0]][:100])
    with pytest.raises(ValueError, match=r"part-00000-of-00007\.parquet is no part that smn embed wrote, or damaged"):
        embed_dataset(embedder, images, tmp_path, **SIZES)


def test_images_of_files_have_keys(embedder, tmp_path):
    for name in ("b/one.png", "a/two.png", "a/deep/three.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 7 * len(name), np.uint8)).save(tmp_path / "set" / name)
    embed_dataset(embedder, load_images(tmp_path / "set", "train"), tmp_path / "parts")
    found = table(tmp_path / "parts", tmp_path)
    assert found.column_names == ["index", "key", "label", "embedding"]
    assert found["key"][:] == ["a/deep/three.png", "a/two.png", "b/one.png"]
    assert found["label"][:] == [0, 0, 1]
    files = [{"image": {"bytes": (tmp_path / "set" / key).read_bytes(), "path": key}} for key in found["key"][:2]]
    records = datasets.Dataset.from_list([*files, {"image": {"bytes": files[0]["image"]["bytes"], "path": None}}])
    records.to_parquet(tmp_path / "table.parquet")
    embed_dataset(embedder, load_images(tmp_path / "table.parquet", labelled=False), tmp_path / "of_table")
    found = table(tmp_path / "of_table", tmp_path / "other")
    assert found.column_names == ["index", "key", "embedding"]
    assert found["key"][:] == ["a/deep/three.png", "a/two.png", None]


def test_as_safetensors(embedder, images, tmp_path):
    embed_dataset(embedder, images, tmp_path, part_size=30, format="safetensors")
    found = [load_file(path) for path in sorted(tmp_path.glob("part-0000?-of-00002.safetensors"))]
    joined = {name: torch.cat([part[name] for part in found]) for name in ("index", "label", "embedding")}
    assert joined["index"].tolist() == list(range(TRAIN))
    assert torch.equal(joined["label"], images.labels)
    assert joined["embedding"].shape == (TRAIN, 16)
    assert embed_dataset(embedder, images, tmp_path, part_size=30, format="safetensors").left == 2


WIDE = """
import torch

def build():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 2 * 2, 768))
    model.mean, model.std, model.image_size = (0.5,) * 3, (0.25,) * 3, 2
    return model
"""


class OneImage(ImageDataset):
    """Rows of one image, so that the dataset itself takes no memory and little time."""

    def _image(self, index: int) -> torch.Tensor:
        return torch.arange(12, dtype=torch.uint8).view(3, 2, 2)


class Bytes:
    """What tells the dataset from others."""

    def read(self, row: int) -> tuple[bytes, str]:
        return b"one", f"row {row}"


def memory(kind: str) -> int:
    """Bytes of this process, now ("VmRSS") or at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def embedded(count: int, part_size: int, folder: Path) -> dict[str, torch.Tensor]:
    """Embed so many images as one of two processes: how much more memory that took at most than two parts."""
    join_group()
    accelerator, embedder = Accelerator(cpu=True), Embedder(f"{folder / 'wide.py'}:build", batch_size=512)
    rows = torch.arange(count)
    images = OneImage(Bytes(), labels=rows % 10, classes=None, name="one", split="train", rows=rows)
    options = {"part_size": part_size, "accelerator": accelerator}
    before = memory("VmRSS")
    embed_dataset(embedder, images.subset(rows[: 2 * part_size]), folder / "two", **options)
    first = memory("VmHWM") - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    embed_dataset(embedder, images, folder / "all", **options)
    return {"first": torch.tensor(first), "grown": torch.tensor(memory("VmHWM") - before)}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
@pytest.mark.parametrize(
    ("count", "part_size", "limit"),
    [(16_000, 500, 15e6), pytest.param(1_000_000, 8192, 150e6, marks=pytest.mark.slow)],
)
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, count, part_size, limit):
    (tmp_path / "wide.py").write_text(WIDE)
    results = run_processes(embedded, 2, tmp_path, count, part_size, tmp_path)
    for name in ("first", "grown"):
        print(f"{count:,} images, {name}: {', '.join(f'{int(each[name]) / 2**20:.0f} MiB' for each in results)}")
    # The features of a process are 25 MB and 1.5 GB, those of all twice as many; a part is 1.5 and 25 MB.
    assert max(int(result["grown"]) for result in results) < limit
    assert len([*(tmp_path / "all").iterdir()]) == -(-count // part_size)
