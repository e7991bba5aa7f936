# SPDX-License-Identifier: Apache-2.0
"""What no cascade can be made of is said before anything is loaded."""

from __future__ import annotations

import pytest

from smn_peft.cascade.fit import CascadeArguments, check_run
from smn_peft.training import TrainArguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts must be at least 2; got 1"),
        ({"router": "knn"}, "router must be one of gmm, kmeans; got 'knn'"),
        ({"router_dim": 0}, "router_dim must be at least 1; got 0"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, or None; got 0"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        CascadeArguments(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt": "full"}, "A cascade is made of masks: adapt must be 'mask', not 'full'"),
        ({"objective": "cross_entropy"}, "learns without labels, and objective='cross_entropy' needs them: take"),
        ({"keep_checkpoints": 0}, "Experts start from the dispatcher's scores: keep_checkpoints must be at least 1"),
        ({"init_from": "run"}, "init_from is set for every expert by the cascade"),
        ({"indices_file": "x.npy"}, "indices_file is set for every expert"),
    ],
)
def test_runs(options, message):
    run = {"backbone": "resnet18", "dataset": "cifar10", "objective": "swav", **options}
    with pytest.raises(ValueError, match=message):
        check_run(TrainArguments(**run), CascadeArguments())
