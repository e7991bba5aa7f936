# SPDX-License-Identifier: Apache-2.0
"""`ImageDataset`: items, subsets, and the cache that changes nothing but time."""

from __future__ import annotations

import pytest
import torch

from smn_peft.data import ImageDataset, ImageError, load_images
from smn_peft.data.sources import EncodedImages
from tests.processes import sent


def images(dataset):
    return [dataset[i]["image"] for i in range(len(dataset))]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_an_item(npz_file):
    item = load_images(npz_file)[3]
    assert (item["image"].dtype, item["image"].shape) == (torch.uint8, (3, 12, 10))
    assert {key: item[key] for key in ("label", "index")} == {"label": 1, "index": 3}
    assert set(load_images(npz_file, labelled=False)[0]) == {"image", "index"}


def test_index_outside(npz_file):
    dataset = load_images(npz_file)
    with pytest.raises(IndexError, match=r"has 4 images; there is no index 4"):
        dataset[4]
    assert dataset[-1]["index"] == 3


def test_subset_counts_anew(npz_file):
    dataset = load_images(npz_file)
    part = dataset.subset([3, 0])
    assert part.labels.tolist() == [1, 0]
    assert [part[i]["index"] for i in range(2)] == [0, 1]
    assert same(images(part), [images(dataset)[3], images(dataset)[0]])
    assert same(images(part.subset(torch.tensor([1]))), [images(dataset)[0]])
    assert (part.classes, part.name, part.split) == (dataset.classes, dataset.name, dataset.split)


def test_the_first_classes_are_a_dataset_of_so_many(npz_file):
    dataset = load_images(npz_file)
    assert dataset.num_classes == 2
    part = dataset.first_classes(1)
    assert (part.num_classes, part.labels.unique().tolist()) == (1, [0])
    assert same(images(part), [images(dataset)[i] for i in (dataset.labels == 0).nonzero().flatten()])
    assert len(dataset.first_classes(2)) == 4
    assert dataset.num_classes == 2
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=rf"has 2 classes; got class_limit={wrong}"):
            dataset.first_classes(wrong)
    with pytest.raises(ValueError, match=r"has no classes; got class_limit=1"):
        dataset.without_labels().first_classes(1)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], r"has no images"),
        ([4], r"must lie in \[0, 4\)"),
        ([-1], r"must lie in"),
        ([0, 1 - 1e-9], r"index 0\.999999999 \(number 1\) is no whole number"),
    ],
)
def test_subsets_that_cannot_be(npz_file, indices, message):
    with pytest.raises(ValueError, match=message):
        load_images(npz_file).subset(indices)


@pytest.mark.parametrize("budget", [10**6, 800, 0])  # an image has 360 bytes: all, two, none
def test_cache_changes_nothing(npz_file, budget):
    dataset = load_images(npz_file)
    cached = dataset.cached(budget)
    assert same(images(cached), images(dataset))
    assert same(images(cached.subset([2, 1, 0])), images(dataset.subset([2, 1, 0])))
    assert same(images(cached.without_labels()), images(dataset))
    assert same(images(sent(cached)), images(dataset))


def test_cache_reads_once_and_keeps_to_its_budget(npz_file):
    class Counting:
        def __init__(self, source):
            self.source, self.reads = source, 0

        def read(self, row):
            self.reads += 1
            return self.source.read(row)

    dataset = load_images(npz_file)
    dataset.source = source = Counting(dataset.source)
    cached = dataset.cached(800)
    source.reads = 0
    images(cached)
    assert source.reads == 2
    images(cached.subset([1, 0]))
    assert source.reads == 2


@pytest.mark.parametrize(("cache", "read"), [(False, 4), (800, 2), (True, 0)])
def test_load_images_caches(npz_file, monkeypatch, cache, read):
    dataset, reads = load_images(npz_file, cache=cache), []
    source = EncodedImages.read
    monkeypatch.setattr(EncodedImages, "read", lambda self, row: (reads.append(row), source(self, row))[1])
    images(dataset)
    assert len(reads) == read


def test_a_broken_image_is_named_when_it_is_read(npz_file):
    dataset = load_images(npz_file)
    data, offsets = dataset.source._data.clone(), dataset.source._offsets
    data[offsets[2] : offsets[3]] = 0
    dataset.source = EncodedImages(data, offsets, "set.npz")
    assert dataset[1]["index"] == 1
    with pytest.raises(ImageError, match=r"^set\.npz, row 2: cannot be read"):
        dataset[2]


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, 1], None, r"has 3 images but 2 labels"),
        ([0, -1, 1], None, r"label -1, which stands for an unknown class.*labelled=False"),
        ([0, 1, 2], ["a", "b"], r"label 2 but only 2 class names"),
    ],
)
def test_labels_that_do_not_fit(labels, classes, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(
            EncodedImages(torch.empty(0), torch.zeros(4), "x"),
            labels=torch.tensor(labels),
            classes=classes,
            name="x",
            split="train",
            rows=torch.arange(3),
        )


def test_number_of_classes(npz_file, class_folder):
    assert load_images(npz_file).num_classes == 2
    assert load_images(npz_file, labelled=False).num_classes is None


def test_labels_given_in_python_are_whole_numbers_or_an_error(npz_file):
    dataset = load_images(npz_file)
    options = {"classes": None, "name": "mine", "split": "train", "rows": dataset.rows}
    made = ImageDataset(dataset.source, labels=torch.tensor([0.0, 2.0, 1.0, 0.0]), **options)
    assert (made.labels.tolist(), made.num_classes, made[1]["label"]) == ([0, 2, 1, 0], 3, 2)
    with pytest.raises(ValueError, match=r"mine, split 'train': label 0\.99\d* \(number 2\) is no whole number"):
        ImageDataset(dataset.source, labels=torch.tensor([0, 2, 1 - 1e-9, 0], dtype=torch.float64), **options)
