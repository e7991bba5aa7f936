# SPDX-License-Identifier: Apache-2.0
"""The example of a user's own objective runs, learns, and is as short as it claims."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "custom_objective.py"


def test_the_example_runs_and_learns(tmp_path):
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+), accuracy", done.stdout)]
    assert len(losses) == 2
    assert losses[1] < losses[0] / 4


def test_the_example_fits_on_a_page_and_the_objective_in_twenty_lines():
    lines = EXAMPLE.read_text("utf-8").splitlines()
    assert len(lines) <= 60
    start = lines.index('@register_objective("info_nce")')
    end = next(i for i, line in enumerate(lines) if line.startswith('if __name__ == "__main__"'))
    assert sum(bool(line.strip()) for line in lines[start:end]) <= 20
