# SPDX-License-Identifier: Apache-2.0
"""The entropy that bits per weight are compared with; reports of whole files are tested with their commands."""

from __future__ import annotations

import pytest

from smn_peft.storage.inspection import binary_entropy


def test_the_entropy_of_a_coin():
    for share, entropy in ((0.5, 1.0), (0.25, 0.8112781244591328), (0.999, 0.011407757737461138)):
        assert binary_entropy(share) == pytest.approx(entropy, rel=1e-12)
        assert binary_entropy(1 - share) == pytest.approx(entropy, rel=1e-9)
    for share in (0.0, 1.0):
        assert f"{binary_entropy(share):.4f}" == "0.0000"  # and not -0.0000
