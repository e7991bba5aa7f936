# SPDX-License-Identifier: Apache-2.0
"""`absolute`: what names something on this disk, by a path that means the same from every working directory."""

from __future__ import annotations

import os
import re

from ..backbones import is_file_spec

__all__ = ["absolute"]


def absolute(name: str) -> str:
    """The name as it is, if it is none of a file or folder here; else with its absolute path.

    A folder, a file, a pattern of parquet files and "file.py:function" are resolved, so that what is written down of a
    run is found again; what exists here comes before a name on the Hub, as everywhere.
    """
    path, function = name, ""
    if is_file_spec(name) and not name.endswith(".py"):
        path, _, function = name.rpartition(":")
    start = re.split(r"[*?\[]", path, maxsplit=1)[0] if path.endswith(".parquet") else path
    if not os.path.exists(path) and not (start != path and os.path.isdir(os.path.dirname(start) or os.curdir)):
        return name
    return os.path.abspath(path) + (f":{function}" if function else "")
