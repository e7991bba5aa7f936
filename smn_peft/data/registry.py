# SPDX-License-Identifier: Apache-2.0
"""The paper's datasets by name: where the Hub has them, their columns and splits, and what differs from the paper.

The paper uses the splits of CoOp (Zhou et al. 2022), training and validation joined, test as test. The Hub's copies
mostly keep the splits of the datasets' own authors; each entry says where that differs.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

__all__ = ["DATASETS", "DatasetSpec", "dataset_spec", "list_datasets"]


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of the paper."""

    name: str
    hub_id: str | None  # repository on the Hub; None where no copy is known, then it is loaded from a folder
    image_column: str
    label_column: str
    train: str  # split expression of the training images, validation included where the paper's is
    test: str  # split expression of the test images
    num_classes: int
    num_train: int | None  # training images in the copy, None if unknown
    num_test: int | None  # test images in the copy, None if unknown
    config: str | None = None  # configuration on the Hub, None for the only one
    paper: tuple[int, int] | None = None  # sizes of the paper's own training and test part, None where unknown
    notes: str = ""  # how the copy differs from what the paper used, or where to get the files
    # What was not checked against the dataset's card or code that uses it; no copy was downloaded.
    unverified: tuple[str, ...] = ()


_SPECS = (
    DatasetSpec(
        "cifar10", "uoft-cs/cifar10", "img", "label", "train", "test", 10, 50_000, 10_000, paper=(50_000, 10_000),
    ),
    DatasetSpec(
        "cifar100", "uoft-cs/cifar100", "img", "fine_label", "train", "test", 100, 50_000, 10_000,
        paper=(50_000, 10_000), notes="The column coarse_label holds the 20 superclasses.",
    ),
    DatasetSpec(
        "dtd", "tanganke/dtd", "image", "label", "train", "test", 47, 3_760, 1_880, paper=(3_948, 1_692),
        notes="The authors' first split with training and validation joined; CoOp drew its own.",
        unverified=("paper", "split of the authors"),
    ),
    DatasetSpec(
        "eurosat", "blanchon/EuroSAT_RGB", "image", "label", "train+validation", "test", 10, 21_600, 5_400,
        paper=(18_900, 8_100), notes="Split 60/20/20; EuroSAT has no split of its own and CoOp drew another.",
        unverified=("paper",),
    ),
    DatasetSpec(
        "flowers102", "dpdl-benchmark/oxford_flowers102", "image", "label", "train+validation", "test", 102,
        2_040, 6_149, paper=(5_726, 2_463),
        notes="The authors' split, whose training part is the small one; CoOp drew its own with 2.8 times as many.",
        unverified=("paper", "order of the classes"),
    ),
    DatasetSpec(
        "pets", "timm/oxford-iiit-pet", "image", "label", "train", "test", 37, 3_680, 3_669, paper=(3_680, 3_669),
        notes="The authors' trainval and test, which CoOp keeps.",
        unverified=("paper", "num_train", "num_test"),
    ),
    DatasetSpec(
        "sun397", "tanganke/sun397", "image", "label", "train", "test", 397, 19_850, 19_850, paper=(19_850, 19_850),
        notes="50 training and 50 test images per class, as in CoOp; that both take the authors' first partition "
        "was not checked.",
        unverified=("paper", "partition"),
    ),
    DatasetSpec(
        "ucf101", None, "image", "label", "train", "test", 101, None, None, paper=(9_537, 3_783),
        notes="The middle frame of every video (UCF-101-midframes of CoOp's list of datasets, split 1 of the "
        "authors). flwrlabs/ucf101 on the Hub holds all frames, not the middle ones. Put the frames into "
        "FOLDER/train/CLASS and FOLDER/test/CLASS and pass FOLDER.",
        unverified=("paper",),
    ),
    DatasetSpec(
        "food101", "ethz/food101", "image", "label", "train", "validation", 101, 75_750, 25_250,
        paper=(70_700, 30_300),
        notes="The authors' split, whose test part is called validation on the Hub; CoOp drew its own.",
        unverified=("paper", "num_train", "num_test"),
    ),
    DatasetSpec(
        "inatloc500", None, "image", "label", "train", "test", 500, None, None,
        notes="Its lists of files (visipedia/inat_loc on GitHub) point into iNat21 (train-weaksup, the training "
        "images) and iNat17 (test). Put the images into FOLDER/train/CLASS and FOLDER/test/CLASS and pass FOLDER.",
    ),
)  # fmt: skip

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}


def list_datasets() -> list[str]:
    """Names of the paper's datasets, as `load_images` takes them."""
    return sorted(DATASETS)


def dataset_spec(name: str) -> DatasetSpec:
    """Look up one dataset; `ValueError` with close names if there is none."""
    if name not in DATASETS:
        close = difflib.get_close_matches(name.lower(), DATASETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(list_datasets())}."
        raise ValueError(f"Unknown dataset {name!r}; {hint} A Hub id has a '/', and a local path has to exist.")
    return DATASETS[name]
