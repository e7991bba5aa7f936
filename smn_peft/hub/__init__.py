# SPDX-License-Identifier: Apache-2.0
"""Adapters on the Hugging Face Hub: model cards rendered from records, evaluation results, and pushing."""

from __future__ import annotations

from .card import render_card, write_card
from .facts import RUN_NAME, AdapterFacts
from .push import HubError, full_bytes, plan_push, push_model, push_run

__all__ = [
    "RUN_NAME",
    "AdapterFacts",
    "HubError",
    "full_bytes",
    "plan_push",
    "push_model",
    "push_run",
    "render_card",
    "write_card",
]
