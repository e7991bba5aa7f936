# SPDX-License-Identifier: Apache-2.0
"""The built-in page: one HTML file, and the policy that lets a browser run what is in it and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

__all__ = ["content_policy", "page"]


def page() -> str:
    """The page's HTML."""
    return (files(__package__) / "index.html").read_text("utf-8")


def content_policy(html: str) -> str:
    """A Content-Security-Policy that names the page's own inline script and style by their hashes."""
    script, style = (
        " ".join(_hash(text) for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL))
        for tag in ("script", "style")
    )
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
