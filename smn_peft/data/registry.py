# SPDX-License-Identifier: Apache-2.0
"""The paper's datasets by name: where the Hub has them, their columns and splits, and what differs from the paper.

The paper uses the splits of CoOp (Zhou et al. 2022), training and validation joined; each entry says what differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._options import did_you_mean

__all__ = ["DATASETS", "DatasetSpec", "dataset_spec", "list_datasets"]


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of the paper."""

    name: str
    hub_id: str | None  # repository on the Hub; None where no copy is known, then it is loaded from a folder
    num_classes: int
    image_column: str = "image"
    label_column: str = "label"
    train: str = "train"  # split expression of the training images, validation included where the paper's is
    test: str = "test"  # split expression of the test images
    notes: str = ""  # how the copy differs from what the paper used, or where to get the files


_SPECS = (
    DatasetSpec("cifar10", "uoft-cs/cifar10", 10, image_column="img"),
    DatasetSpec(
        "cifar100", "uoft-cs/cifar100", 100, "img", "fine_label",
        notes="The column coarse_label holds the 20 superclasses.",
    ),
    DatasetSpec(
        "dtd", "tanganke/dtd", 47,
        notes="The authors' first split with training and validation joined; CoOp drew its own.",
    ),
    DatasetSpec(
        "eurosat", "blanchon/EuroSAT_RGB", 10, train="train+validation",
        notes="Split 60/20/20; EuroSAT has no split of its own and CoOp drew another.",
    ),
    DatasetSpec(
        "flowers102", "dpdl-benchmark/oxford_flowers102", 102, train="train+validation",
        notes="The authors' split, whose training part is the small one; CoOp drew its own with 2.8 times as many.",
    ),
    DatasetSpec("pets", "timm/oxford-iiit-pet", 37, notes="The authors' trainval and test, which CoOp keeps."),
    DatasetSpec(
        "sun397", "tanganke/sun397", 397,
        notes="50 training and 50 test images per class, as in CoOp; that both take the authors' first partition "
        "was not checked.",
    ),
    DatasetSpec(
        "ucf101", None, 101,
        notes="The middle frame of every video (UCF-101-midframes of CoOp's list of datasets, split 1 of the "
        "authors). flwrlabs/ucf101 on the Hub holds all frames, not the middle ones. Put the frames into "
        "FOLDER/train/CLASS and FOLDER/test/CLASS and pass FOLDER.",
    ),
    DatasetSpec(
        "food101", "ethz/food101", 101, test="validation",
        notes="The authors' split, whose test part is called validation on the Hub; CoOp drew its own.",
    ),
    DatasetSpec(
        "inatloc500", None, 500,
        notes="Its lists of files (visipedia/inat_loc on GitHub) point into iNat21 (train-weaksup, the training "
        "images) and iNat17 (test). Put the images into FOLDER/train/CLASS and FOLDER/test/CLASS and pass FOLDER.",
    ),
)  # fmt: skip

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}


def list_datasets() -> list[str]:
    """Names of the paper's datasets, as `load_images` takes them."""
    return sorted(DATASETS)


def dataset_spec(name: str) -> DatasetSpec:
    """Look up one dataset; `ValueError` with the closest name if there is none."""
    if name not in DATASETS:
        known = did_you_mean(name.lower(), DATASETS) or f" Known are {', '.join(list_datasets())}."
        raise ValueError(f"Unknown dataset {name!r}.{known} A Hub id has a '/', and a local path has to exist.")
    return DATASETS[name]
