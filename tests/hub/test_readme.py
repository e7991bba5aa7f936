# SPDX-License-Identifier: Apache-2.0
"""The code under "Share" in docs/training.md runs as it stands, against the local Hub."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).resolve().parents[2] / "docs/training.md").read_text("utf-8")


def test_share_runs(hub):
    section = re.search(r"^## Share\n(.*)", PAGE, re.MULTILINE | re.DOTALL)[1]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict = {}
    exec(code, names)
    repository = hub.repositories["user/smn-cifar100"]
    assert repository.private
    assert set(repository.refs) == {"main", "better"}
    assert "timm.create_model" in repository.trees[repository.refs["better"]]["README.md"].decode()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert names["model"].eval()(images).shape == (2, 10)
