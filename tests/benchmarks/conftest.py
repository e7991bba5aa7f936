# SPDX-License-Identifier: Apache-2.0
"""What the tests of the benchmarks' scripts share: the scripts, and rows to give them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

MACHINE = {"cpu": "one", "cores": 2, "threads": 1, "torch": "2.0", "device": "cpu"}


@pytest.fixture
def scripts(monkeypatch):
    """The modules, which import each other as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import comparison
    import page
    import recording

    return SimpleNamespace(comparison=comparison, page=page, recording=recording)


@pytest.fixture
def row(scripts):
    """Makes a row of a ratio without quartiles, but for what is said."""

    def make(value=1.0, low=None, high=None, name="resnet18", **more):
        machine = {**MACHINE, **more.pop("machine", {})}
        defaults = {"benchmark": "training", "what": "mine / its", "unit": "ratio", "better": "lower", "target": None}
        return scripts.recording.Row(name=name, value=value, low=low, high=high, machine=machine, **defaults | more)

    return make
