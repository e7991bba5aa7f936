# SPDX-License-Identifier: Apache-2.0
"""The same batches for any number of workers and processes, and from any step on."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from smn_peft.data import (
    ImageDataset,
    ImageError,
    build_loader,
    load_images,
    multi_crop_transform,
    supervised_transform,
)
from smn_peft.data.loading import AugmentedDataset, ShardedBatches
from smn_peft.data.sources import EncodedImages

MEAN = STD = (0.5, 0.5, 0.5)
SUPERVISED = supervised_transform(8, MEAN, STD)
CROPS = multi_crop_transform(MEAN, STD, global_size=8, local_size=6)


@pytest.fixture
def dataset(picture, encoded):
    """11 different pictures in two classes."""
    files = [torch.frombuffer(bytearray(encoded(picture(3 * i))), dtype=torch.uint8) for i in range(11)]
    offsets = torch.tensor([0, *map(len, files)]).cumsum(0)
    return ImageDataset(
        EncodedImages(torch.cat(files), offsets, "pictures"),
        labels=torch.arange(11) % 2,
        classes=["a", "b"],
        name="pictures",
        split="train",
        rows=torch.arange(11),
    )


def epoch(loader, number, start=0):
    loader.set_epoch(number, start)
    return list(loader)


def assert_same(first, second):
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def joined(parts):
    """Batches of several processes as those of one."""

    def join(*values):
        if isinstance(values[0], list):
            return [torch.cat(crops) for crops in zip(*values, strict=True)]
        return torch.cat(values)

    return [{key: join(*(part[key] for part in batch)) for key in batch[0]} for batch in zip(*parts, strict=True)]


def test_a_batch(dataset):
    (batch, _) = epoch(build_loader(dataset, SUPERVISED, 4), 0)
    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((4, 3, 8, 8), torch.float32)
    assert batch["labels"].dtype == batch["index"].dtype == torch.int64
    assert torch.equal(batch["labels"], dataset.labels[batch["index"]])


def test_a_batch_of_crops(dataset):
    (batch, _) = epoch(build_loader(dataset.without_labels(), CROPS, 4), 0)
    assert set(batch) == {"crops", "index"}
    assert [tuple(crop.shape) for crop in batch["crops"]] == [(4, 3, 8, 8)] * 2 + [(4, 3, 6, 6)] * 6


@pytest.mark.parametrize("transform", [SUPERVISED, CROPS])
def test_workers_change_nothing(dataset, transform):
    expected = [epoch(build_loader(dataset, transform, 4, seed=3), number) for number in (0, 1)]
    assert expected[0][0]["index"].tolist() != expected[1][0]["index"].tolist()
    for workers in (1, 2):
        loader = build_loader(dataset, transform, 4, seed=3, num_workers=workers)
        # The second epoch runs in the same worker processes.
        assert_same([epoch(loader, 0), epoch(loader, 1)], expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batch(dataset, processes):
    options = {"seed": 3, "num_processes": processes}
    parts = [epoch(build_loader(dataset, CROPS, 4, process_index=r, **options), 2) for r in range(processes)]
    assert_same(joined(parts), epoch(build_loader(dataset, CROPS, 4, seed=3), 2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_going_on_in_the_middle(dataset, start, workers):
    whole = epoch(build_loader(dataset, SUPERVISED, 2, seed=1), 4)
    fresh = build_loader(dataset, SUPERVISED, 2, seed=1, num_workers=workers)
    assert_same(epoch(fresh, 4, start), whole[start:])
    assert len(fresh) == 5 - start
    assert_same(epoch(fresh, 5), epoch(build_loader(dataset, SUPERVISED, 2, seed=1), 5))


def test_what_a_sample_depends_on(dataset):
    data = AugmentedDataset(dataset, SUPERVISED, seed=1)
    first = data[3]["pixel_values"]
    assert torch.equal(first, data[3]["pixel_values"])
    data.set_epoch(1)
    assert not torch.equal(first, data[3]["pixel_values"])
    assert not torch.equal(first, AugmentedDataset(dataset, SUPERVISED, seed=2)[3]["pixel_values"])
    same_picture = AugmentedDataset(dataset.subset([3, 3]), SUPERVISED, seed=1)
    assert not torch.equal(same_picture[0]["pixel_values"], same_picture[1]["pixel_values"])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_caller_s_random_state_is_untouched(dataset, workers):
    before = torch.get_rng_state()
    epoch(build_loader(dataset, CROPS, 4, num_workers=workers), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_has_every_image_once():
    batches = ShardedBatches(9, 3)
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    assert [len(batch) for batch in ShardedBatches(10, 3)] == [3, 3, 3]  # the tenth image is left out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_with_its_row(dataset, workers):
    source = dataset.source
    source._data[source._offsets[5] :][:40] = 0
    with pytest.raises(ImageError, match=r"pictures, row 5: cannot be read as an image"):
        epoch(build_loader(dataset, SUPERVISED, 11, num_workers=workers), 0)
    for worker in multiprocessing.active_children():  # torch waits five seconds for one that raised
        worker.terminate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 5, "batch_size": 8}, r"5 images are fewer than one batch of 8.*batch size to 5 or less"),
        ({"n": 5, "batch_size": 8, "num_processes": 2}, r"batch size to 4 or less"),
        ({"n": 9, "batch_size": 6, "num_processes": 4}, r"6 cannot be divided among 4 processes: take a multiple.* 8"),
        ({"n": 9, "batch_size": 0}, r"must be at least 1; got 0 and 9"),
        (
            {"n": 9, "batch_size": 2, "num_processes": 2, "process_index": 2},
            r"process_index must lie in \[0, 2\); got 2",
        ),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ShardedBatches(options.pop("n"), options.pop("batch_size"), **options)


def test_a_start_outside_the_epoch(dataset):
    with pytest.raises(ValueError, match=r"start_batch must lie in \[0, 2\], the batches of an epoch; got 3"):
        build_loader(dataset, SUPERVISED, 4).set_epoch(0, 3)


def test_real_images(assets):
    dataset = load_images(assets / "cifar10_jpeg.npz").subset(range(64))
    stored = epoch(build_loader(dataset, CROPS, 32), 0)
    assert_same(epoch(build_loader(dataset.cached(), CROPS, 32), 0), stored)
