# SPDX-License-Identifier: Apache-2.0
"""A third scale, of tiny images and a tiny model, whose runs take two steps; its runs are shared by all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from smn_peft._options import merged
from smn_peft.paper.runs import RunStore
from smn_peft.paper.scales import Scale, Setting
from tests.training.tiny import SWAV, write_model, write_npz


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    write_model(folder)
    write_npz(folder / "set.npz")
    return folder


@pytest.fixture(scope="session")
def tiny_scale(tiny_folder: Path) -> Scale:
    common = {
        "max_steps": 2,
        "batch_size": 12,
        "knn_k": 5,
        "log_every": 1,
        "cpu": True,
        "supervised": {"jitter_probability": 0.0, "grayscale": 0.0, "solarize": 0.0},
    }
    mask = merged(common, {"lr": 1000.0, "head_lr": 0.1, "mask": {"batch_norm": "adapt"}})
    swav = merged(mask, SWAV, {"eval_probe": True})
    topk = {"lr": 0.05, "mask": {"mask_type": "topk", "init_score": "kaiming_uniform"}}
    base = {"backbone": f"{tiny_folder / 'model.py'}:build"}
    supervised = {
        "full": merged(common, {"adapt": "full", "lr": 0.01}),
        "mask": mask,
    }
    unsupervised = {
        "mask": swav,
        "infonce": {**swav, "objective": "infonce", "objective_options": {"hidden_dim": 8}},
        "topk": merged(swav, topk),
        "full": merged(swav, {"adapt": "full", "lr": 0.01}),
        "statistics": merged(swav, {"adapt": "statistics"}),
    }
    labelled, unlabelled = (Setting("Net", base, methods, 0.1, ("colours",)) for methods in (supervised, unsupervised))
    shared = {"setting": "net", "dataset": "colours"}
    return Scale(
        name="tiny",
        machine="any",
        datasets={"colours": {"dataset": str(tiny_folder / "set.npz")}},
        supervised={"net": labelled},
        unsupervised={"net": unlabelled},
        main=unlabelled,
        varied=unlabelled,
        vit=labelled,
        resnet=labelled,
        choices={
            **dict.fromkeys(("table3", "table5", "table9", "table10", "densities"), ("colours",)),
            **dict.fromkeys(("figure8", "figure9", "ablations"), "colours"),
            "table2": {"net": ("score",)},
            "cascade": {"experts": 2, "ensemble": False, "router": "kmeans", "router_dim": 2},
            "table3_run": ("net", "mask"),
            "table3_options": {"colours": {"batch_size": 8, "eval_probe": False}},
            "table5_prototypes": (4, 6, 200),
            "table6": ("net", "colours"),
            "table7": ("net", "colours"),
            "figure3": {"datasets": ("colours",), "fractions": (0.5,), "start": "mask", "options": common},
            "figure5": ("colours", "mask"),
            "figure8_stages": (1,),
            "figure8_shares": (),
            "figure9_shares": (0.1,),
            "ablations_kinds": ("with labels", "without labels"),
            "ablations_rates": (0.5, 2.0),
            "recipes": (("net", "colours", (1, 2)),),
            "steps": (("net", "colours", (1, 2)),),
            "recipes_methods": ("full", "mask", "mask"),
            "methods": [{**shared, "of": "supervised", "recipe": "mask", "kind": "convolutional"}],
            "unlabelled": [
                {**shared, "of": "unsupervised", "recipe": "mask", "kind": "unlabelled", "budgets": [None]}
            ],
        },
    )


@pytest.fixture(scope="session")
def store(tiny_folder: Path) -> RunStore:
    return RunStore(tiny_folder / "out")
