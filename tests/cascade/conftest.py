# SPDX-License-Identifier: Apache-2.0
"""One tiny cascade, trained once for all tests of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from smn_peft.cascade import Cascade
from smn_peft.training import TrainArguments

from .tiny import OPTIONS, cascade_arguments


@pytest.fixture(scope="session")
def arguments(tmp_path_factory) -> TrainArguments:
    """Arguments of the cascade's dispatcher; `output_dir` is the cascade's folder, which tests leave as it is."""
    return cascade_arguments(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="session")
def fitted(arguments) -> Path:
    """The folder of the trained cascade, with its ensemble of seeds."""
    Cascade.fit(arguments, OPTIONS)
    AcceleratorState._reset_state(reset_partial_state=True)
    return Path(arguments.output_dir)
