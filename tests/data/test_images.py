# SPDX-License-Identifier: Apache-2.0
"""Names, Hub ids and parquet files, read by the real `datasets` without a network."""

from __future__ import annotations

import re

import pytest
import torch

from smn_peft.data import ImageError, dataset_spec, list_datasets, load_images
from smn_peft.data.sources import load_table


@pytest.fixture
def table(own_cache, picture, encoded):
    """Rows with pictures 0 to 3, an integer, a class, a string and a text column."""
    import datasets

    columns = {
        "img": [{"bytes": encoded(picture(i)), "path": f"{i}.png"} for i in range(4)],
        "label": [0, 1, 1, 0],
        "kind": ["red", "blue", "blue", "red"],
        "caption": ["a", "b", "c", "d"],
    }
    features = datasets.Features(
        img=datasets.Image(),
        label=datasets.ClassLabel(names=["no", "yes"]),
        kind=datasets.Value("string"),
        caption=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def repository(table, tmp_path):
    """A folder as `datasets` finds it on the Hub: two splits of parquet."""
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    table.select([2, 3]).to_parquet(folder / "test-00000-of-00001.parquet")
    return str(folder.parent)


def test_parquet(table, tmp_path, picture):
    path = str(tmp_path / "set.parquet")
    table.to_parquet(path)
    dataset = load_images(path)
    assert (dataset.labels.tolist(), dataset.classes) == ([0, 1, 1, 0], ["no", "yes"])
    for i in range(4):
        assert torch.equal(dataset[i]["image"], torch.from_numpy(picture(i)).permute(2, 0, 1))
    by_name = load_images(path, label_column="kind", image_column="img")
    assert (by_name.labels.tolist(), by_name.classes) == ([1, 0, 0, 1], ["blue", "red"])
    assert load_images(path, labelled=False).labels is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label_column": "species"},
            r"no column 'species'; pass label_column=, one of img, label, kind, caption\.",
        ),
        ({"image_column": "image"}, r"no column 'image'; pass image_column=, one of img, label, kind, caption\."),
    ],
)
def test_unknown_columns(table, tmp_path, columns, message):
    path = str(tmp_path / "set.parquet")
    table.to_parquet(path)
    with pytest.raises(ValueError, match=message):
        load_images(path, **columns)


def test_no_label_column(table, tmp_path):
    path = str(tmp_path / "set.parquet")
    table.select_columns(["img", "caption"]).to_parquet(path)
    with pytest.raises(ValueError, match=r"has no label column; it has img, caption: pass label_column=, or labelled"):
        load_images(path)
    assert len(load_images(path, labelled=False)) == 4


def test_no_image_column(table, tmp_path):
    path = str(tmp_path / "set.parquet")
    table.select_columns(["label", "caption"]).to_parquet(path)
    with pytest.raises(ValueError, match=r"has no columns of images; pass image_column=, one of label, caption"):
        load_images(path)


def test_a_broken_row_is_named(own_cache, tmp_path, picture, encoded):
    import datasets

    rows = [{"bytes": b"oops" if i == 2 else encoded(picture(i)), "path": f"{i}.png"} for i in range(4)]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    path = str(tmp_path / "set.parquet")
    datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 2, 3]}, features=features).to_parquet(path)
    dataset = load_images(path)
    assert (dataset.classes, dataset[3]["label"]) == (None, 3)
    with pytest.raises(ImageError, match=r"set\.parquet, row 2 \(2\.png\): cannot be read"):
        dataset[2]


def test_a_repository(repository):
    joined = load_table(repository, "train+test", name="mine")
    assert (joined.name, joined.split, joined.labels.tolist()) == ("mine", "train+test", [0, 1, 1, 0, 1, 0])
    with pytest.raises(ValueError, match=r"split 'validation': .*(train|test)"):
        load_table(repository, "validation", name="mine")


@pytest.mark.parametrize("name", ["cifar10", "nobody/nothing"])
def test_offline(name):
    with pytest.raises(
        OSError, match=rf"{name} is not in the local cache and the Hub cannot be reached.*Go online once"
    ):
        load_images(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar11", r"Unknown dataset 'cifar11'\. Did you mean cifar10"),
        ("zzz", r"Known are cifar10, cifar100, .*A Hub id has a '/', and a local path has to exist"),
        ("ucf101", r"not on the Hub in the paper's form.*middle frame.*FOLDER/train/CLASS"),
        (__file__, r"is a file of an unknown kind: pass a folder, a \.parquet or a \.npz"),
    ],
)
def test_names_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        load_images(name)


def test_splits_of_the_papers_datasets():
    with pytest.raises(ValueError, match=r"dtd has the splits 'train' and 'test', as in the paper; got 'validation'"):
        load_images("dtd", "validation")


def test_the_registry_has_the_papers_datasets():
    names = "cifar10 cifar100 dtd eurosat flowers102 food101 inatloc500 pets sun397 ucf101"
    assert list_datasets() == names.split()
    classes = [dataset_spec(name).num_classes for name in list_datasets()]
    assert classes == [10, 100, 47, 10, 102, 101, 500, 37, 397, 101]
    for spec in map(dataset_spec, list_datasets()):
        assert spec.hub_id is None or re.fullmatch(r"[\w-]+/[\w-]+", spec.hub_id)
