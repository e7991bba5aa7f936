# SPDX-License-Identifier: Apache-2.0
"""`python -m smn_peft.cli` is `smn`."""

from __future__ import annotations

from . import app

if __name__ == "__main__":
    app()
