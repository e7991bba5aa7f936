# SPDX-License-Identifier: Apache-2.0
"""Folders and npz files, and what they refuse."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from smn_peft.data import ImageError, NoSplitError, load_images


def shown(dataset, picture):
    """Which pictures a lossless dataset shows, in order."""
    known = {picture(i).tobytes(): i for i in range(10)}
    return [known[dataset[i]["image"].permute(1, 2, 0).numpy().tobytes()] for i in range(len(dataset))]


def test_splits_and_classes(class_folder, picture):
    train, test = (load_images(class_folder, split) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert shown(train, picture) == [2, 3, 4, 0, 1]
    assert (train.name, train.split, train.revision) == (str(class_folder), "train", None)


def test_one_class_only(class_folder):
    shutil.rmtree(class_folder / "test" / "dog")
    with pytest.raises(ValueError, match=r"All 1 images of .*are of one class \(cat\).*labelled=False"):
        load_images(class_folder, "test")
    assert len(load_images(class_folder, "test", labelled=False)) == 1


def test_classes_without_splits(class_folder, picture):
    (class_folder / "train" / ".hidden").mkdir()
    (class_folder / "train" / "notes.txt").write_text("no image")
    dataset = load_images(class_folder / "train")
    assert (dataset.classes, shown(dataset, picture)) == (["cat", "dog"], [2, 3, 4, 0, 1])
    with pytest.raises(ValueError, match=r"no split 'test': it has no folders of splits, so only split='train'"):
        load_images(class_folder / "train", "test")


def test_unlabelled(class_folder, picture):
    flat = class_folder / "train" / "cat"
    assert shown(load_images(flat, labelled=False), picture) == [2, 3, 4]
    assert load_images(class_folder, labelled=False).labels is None
    with pytest.raises(ValueError, match=r"no folders of classes, so no labels.*labelled=False"):
        load_images(flat)


def test_unknown_split(class_folder):
    with pytest.raises(ValueError, match=r"has no split 'validation': it has test, train"):
        load_images(class_folder, "validation")
    shutil.move(class_folder / "test", class_folder / "val")
    assert len(load_images(class_folder, "validation")) == 2


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"split 'train', has no images \(\.bmp"):
        load_images(tmp_path, labelled=False)


def test_a_broken_file_is_named(class_folder):
    broken = class_folder / "train" / "cat" / "3.png"
    broken.write_bytes(b"oops")
    with pytest.raises(ImageError, match=rf"^{broken}: cannot be read"):
        load_images(class_folder)[1]


def test_columns_of_a_folder(class_folder):
    with pytest.raises(ValueError, match=r"is no table and no repository: leave out label_column, revision"):
        load_images(class_folder, label_column="label", revision="main")


def test_npz_splits(npz_file, picture):
    train, test = (load_images(npz_file, split) for split in ("train", "test"))
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 0, 1], [0, 1])
    assert train.classes == ["even", "odd"]
    close = torch.from_numpy(picture(5)).permute(2, 0, 1).float() - test[1]["image"].float()
    assert close.abs().mean() < 4


def test_labels_of_an_npz_are_whole_numbers_or_an_error(npz_file):
    with np.load(npz_file) as archive:
        arrays = dict(archive)
    np.savez(npz_file, **{**arrays, "label": arrays["label"].astype(np.float64)})
    assert load_images(npz_file).labels.tolist() == [0, 1, 0, 1]
    arrays["label"] = arrays["label"] - 1e-9  # 1 - 1e-9 would be class 0
    np.savez(npz_file, **arrays)
    with pytest.raises(ValueError, match=r"set\.npz: label -1e-09 \(number 0\) is no whole number"):
        load_images(npz_file)
    assert load_images(npz_file, labelled=False).labels is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, r"no array 'label'; it has jpeg, offsets, split, classes: pass labelled=False"),
        ({"jpeg": None}, r"no array 'jpeg'"),
        ({"label": np.zeros(3)}, r"label has the shape \(3,\), but there are 6 images"),
        ({"offsets": np.array([0, 10**9])}, r"offsets must rise from 0 to the \d+ bytes"),
        ({"offsets": np.array([0, 5, 3])}, r"offsets must rise"),
        ({"split": np.ones(6, dtype=np.uint8)}, r"split 'train', has no images"),
        ({"jpeg": np.array([object()])}, r"not an npz file of arrays"),
    ],
)
def test_npz_that_does_not_fit(npz_file, changes, message):
    with np.load(npz_file) as archive:
        arrays = {**dict(archive), **changes}
    np.savez(npz_file, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        load_images(npz_file)


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"a\.npz does not exist"):
        load_images(path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"not an npz file of arrays"):
        load_images(path)


def test_npz_split_name(npz_file):
    with pytest.raises(ValueError, match=r"an npz has 'train' and 'test'"):
        load_images(npz_file, "validation")


def test_real_images(assets):
    dataset = load_images(assets / "cifar10_jpeg.npz", "test")
    assert (len(dataset), dataset.num_classes) == (10_000, 10)
    assert dataset[9_999]["image"].shape == (3, 32, 32)
    assert len(load_images(assets / "imagenet_photos17.npz", labelled=False)) == 17


def write_tables(folder, names, encoded, picture):
    """Parquet files of two images each, of the classes 0 and 1; the first picture's number is the file's."""
    import datasets

    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = {
            "image": [{"bytes": encoded(picture(2 * number + i)), "path": None} for i in range(2)],
            "label": [0, 1],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / name)
    return folder


def test_a_folder_of_parquet_is_read_by_split(tmp_path, own_cache, encoded, picture):
    names = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/validation-00000.parquet"]
    folder = write_tables(tmp_path / "hub", names, encoded, picture)
    (folder / "README.md").write_text("no image")
    train = load_images(folder)
    assert (shown(train, picture), train.classes, train.labels.tolist()) == ([0, 1, 2, 3], ["a", "b"], [0, 1, 0, 1])
    assert (train.name, train.split) == (str(folder), "train")
    assert shown(load_images(folder, "val"), picture) == [4, 5]
    with pytest.raises(NoSplitError, match=r"hub, split 'test'.*validation") as said:
        load_images(folder, "test")
    assert said.value.there == ("train", "validation")


def test_tables_without_a_split_in_their_names_are_to_train_on(tmp_path, own_cache, encoded, picture):
    folder = write_tables(tmp_path / "plain", ["0000.parquet", "trained.parquet"], encoded, picture)
    assert shown(load_images(folder, labelled=False), picture) == [0, 1, 2, 3]
    write_tables(folder, ["test.parquet"], encoded, picture)
    with pytest.raises(ValueError, match=r"name of .*0000\.parquet tells no split, and that of .*test\.parquet"):
        load_images(folder)


def test_a_folder_with_images_is_one_of_images_whatever_lies_beside(class_folder, picture):
    (class_folder / "train.parquet").write_bytes(b"")
    assert shown(load_images(class_folder), picture) == [2, 3, 4, 0, 1]


def test_which_splits_there_are_is_known(class_folder, npz_file):
    with pytest.raises(NoSplitError) as said:
        load_images(class_folder, "validation")
    assert said.value.there == ("test", "train")
    with pytest.raises(NoSplitError) as said:
        load_images(npz_file, "validation")
    assert said.value.there == ("train", "test")
