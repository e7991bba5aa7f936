# SPDX-License-Identifier: Apache-2.0
"""Run PEFT's own tests on mask adapters: `python -m tests.peft_suite [FILE …] [--sdist FILE] [-- PYTEST ARGUMENTS]`.

pip downloads the source distribution of the installed PEFT unless `--sdist` names one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .runner import FILES, run


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.peft_suite", description="Run PEFT's own tests on mask adapters."
    )
    parser.add_argument("files", nargs="*", default=list(FILES), help="test files of PEFT")
    parser.add_argument("--sdist", type=lambda path: Path(path).resolve(), help="source distribution of PEFT")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    return run(options.files, options.sdist, words[cut + 1 :])


if __name__ == "__main__":
    raise SystemExit(main())
