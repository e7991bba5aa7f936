# SPDX-License-Identifier: Apache-2.0
"""The command line `smn`: thin commands over the package's functions."""

from __future__ import annotations
