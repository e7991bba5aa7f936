# SPDX-License-Identifier: Apache-2.0
"""Every training test starts with an accelerate of its own."""

from __future__ import annotations
