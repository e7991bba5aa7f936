# SPDX-License-Identifier: Apache-2.0
"""A row of a table that names a file gets it only from the dataset's own folder, and only if it is a file."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from smn_peft.data import ImageError, load_images
from smn_peft.data.sources import TableImages

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("still reading")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def table(folder: Path, paths: list[str | None], *, pattern: bool = False) -> str:
    """A parquet file whose rows have paths and no bytes, as anybody could write it."""
    features = datasets.Features(
        image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")}, label=datasets.Value("int64")
    )
    rows = [{"bytes": None, "path": path} for path in paths]
    made = datasets.Dataset.from_dict({"image": rows, "label": list(range(len(paths)))}, features=features)
    folder.mkdir(exist_ok=True)
    made.to_parquet(folder / "train-0.parquet")
    return str(folder / ("train-*.parquet" if pattern else "train-0.parquet"))


@pytest.mark.parametrize("pattern", [False, True])
def test_files_below_the_tables_folder(tmp_path, monkeypatch, pattern):
    own = tmp_path / "set"
    (own / "images").mkdir(parents=True)
    for name in ("red", "blue"):
        (own / "images" / f"{name}.png").write_bytes(picture(name))
    name = table(own, ["images/red.png", str(own / "images" / "blue.png")], pattern=pattern)
    monkeypatch.chdir(tmp_path)  # relative to the table, not to where the program runs
    dataset = load_images(name)
    assert [dataset[i]["image"][0, 0, 0].item() for i in range(2)] == [255, 0]


def test_no_other_files(tmp_path, monkeypatch):
    own = tmp_path / "set"
    own.mkdir()
    (tmp_path / "private.png").write_bytes(picture("red"))
    os.symlink(tmp_path / "private.png", own / "link.png")
    os.mkfifo(own / "fifo.png")
    monkeypatch.chdir(tmp_path)
    paths = [str(tmp_path / "private.png"), "../private.png", "private.png", "link.png", "/dev/zero", "/etc/passwd"]
    dataset = load_images(table(own, [*paths, "fifo.png"]))
    for row in range(len(paths)):
        with pytest.raises(ImageError, match=rf"row {row} .*not below .*set, the dataset's own folder"):
            dataset[row]
    with pytest.raises(ImageError, match=r"fifo\.png is a FIFO"):
        dataset[len(paths)]


def test_bytes_come_first(tmp_path):
    source = TableImages([{"i": {"bytes": picture("red"), "path": "/dev/zero"}}], "i", "set", [tmp_path])
    assert source.read(0)[0] == picture("red")


def test_a_large_file_is_not_read(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no space
    source = TableImages([{"i": {"bytes": None, "path": "huge.png"}}], "i", "set", [tmp_path])
    with pytest.raises(ImageError, match=r"huge\.png has 1,099,511,627,776 bytes"):
        source.read(0)


def test_what_the_hub_s_folder_of_a_dataset_holds(tmp_path):
    """A repository of image files: `datasets` gives paths into the cache, whose files are links to blobs."""
    own = tmp_path / "datasets--user--set"
    (own / "blobs").mkdir(parents=True)
    (own / "snapshots").mkdir()
    (own / "blobs" / "1").write_bytes(picture("blue"))
    os.symlink(own / "blobs" / "1", own / "snapshots" / "a.png")
    row = {"bytes": None, "path": str(own / "snapshots" / "a.png")}
    source = TableImages([{"i": row}], "i", "set", [own, tmp_path / "downloads"])
    assert torch.frombuffer(bytearray(source.read(0)[0]), dtype=torch.uint8).numel() == len(picture("blue"))
    other = TableImages([{"i": row}], "i", "set", [tmp_path / "datasets--user--other"])
    with pytest.raises(ImageError, match="not below"):
        other.read(0)


def test_a_folder_of_tables_keeps_to_itself(tmp_path, monkeypatch):
    """The same for a dataset directory: files beside the tables are read, and no others."""
    own = tmp_path / "set"
    (own / "data").mkdir(parents=True)
    (own / "data" / "inside.bin").write_bytes(picture("blue"))  # with an image's suffix it would be a folder of images
    table(own / "data", ["inside.bin", "/etc/hostname", "/dev/zero", "../../private.png", "../inside.bin"])
    (tmp_path / "private.png").write_bytes(picture("red"))
    monkeypatch.chdir(own / "data")
    dataset = load_images(own, labelled=False)
    assert dataset[0]["image"][2, 0, 0] == 255
    for row in range(1, 5):
        with pytest.raises(ImageError, match=rf"row {row} .*not below .*data, the dataset's own folder"):
            dataset[row]
