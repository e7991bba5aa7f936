# SPDX-License-Identifier: Apache-2.0
"""Training: what a loop needs beside the model that it trains."""

from __future__ import annotations

from .trainer_callback import ExactResumeCallback

__all__ = ["ExactResumeCallback"]
