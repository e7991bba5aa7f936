# SPDX-License-Identifier: Apache-2.0
"""`make help` tells the truth, and the commands that the README names are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = "bench bench-compare bench-save clean coverage dist env format help lint quickstart test test-slow".split()


def test_help_lists_every_target_and_is_the_default(run_make):
    text = run_make("help").stdout
    listed = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  "))
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split()) == TARGETS
    assert all(listed.values())
    assert run_make().stdout == text


def test_every_target_expands(run_make):
    done = run_make("-n", *TARGETS)
    assert done.returncode == 0, done.stderr
    assert run_make("-n", "no-such-target").returncode != 0


def test_targets_make_a_missing_environment_first(run_make, tmp_path):
    commands = run_make("-n", "quickstart", f"VENV={tmp_path}/new", "UV=").stdout
    steps = ["-m venv", 'pip install -e ".[dev]"', ".smn_peft-installed", "examples/quickstart.py"]
    assert [commands.find(step) for step in steps] == sorted(commands.find(step) for step in steps)
    assert all(step in commands for step in steps)


def test_uv_is_used_where_it_is_there(run_make, tmp_path):
    commands = run_make("-n", "env", f"VENV={tmp_path}/new", "UV=/opt/uv").stdout
    assert '"/opt/uv" venv' in commands
    assert '"/opt/uv" pip install' in commands


def test_the_tests_run_offline_and_on_demand_with_coverage(run_make):
    plain, measured = (run_make("-n", target, "ARGS=tests/one.py").stdout for target in ("test", "coverage"))
    for part in ("HF_HUB_OFFLINE=1", '-m "not slow"', "tests/one.py"):
        assert part in plain
        assert part in measured
    for part in ("--cov=smn_peft", "--cov-fail-under=90"):
        assert part not in plain
        assert part in measured


def test_all_benchmarks_start_a_new_file_and_some_add_to_it(run_make):
    every, some = (run_make("-n", "bench", "BENCH_JSON=new.json", *more).stdout for more in ((), ("BENCH=one.py",)))
    assert [line for line in every.splitlines() if line.startswith("rm")] == ['rm -f "new.json"']
    assert "rm" not in some.split()
    assert all('export BENCH_JSON="new.json"' in commands for commands in (every, some))


def test_no_package_index_is_written_down():
    # Which index to use is the user's pip configuration.
    assert "index-url" not in MAKEFILE
