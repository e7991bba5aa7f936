# SPDX-License-Identifier: Apache-2.0
"""What an adapter_config.json must hold where this package reads it: PEFT, which wrote it, checks no types."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from .adapter_file import AdapterFileError
from .formats import check_format_version

__all__ = ["check_config"]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _is_mapping(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_text_or_none, value.values())))


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "auto_mapping": (_is_mapping, "an object of texts"),
    "base_fingerprint": (_is_text_or_none, "text or null"),
    "base_model_name_or_path": (_is_text_or_none, "text or null"),
    "check_base": (_is_flag, "true or false"),
    "codec": (_is_text, "text"),
    "revision": (_is_text_or_none, "text or null"),
    "scale": (_is_flag, "true or false"),
    "seed": (_is_number, "an integer"),
    "select": (lambda value: value in ("random", "magnitude"), '"random" or "magnitude"'),
    "trainable_fraction": (_is_fraction, "a number above 0, and 1 at most"),
}


def check_config(config: Any) -> dict[str, Any]:
    """An adapter's config, if it can be used: fields may be missing, those that are there have their kind of value.

    Args:
        config: What the JSON gave.

    Raises:
        AdapterFileError: If it is no object, a field is of another kind, or a text cannot be encoded.
        ValueError: If its format is not known.
    """
    if not isinstance(config, Mapping):
        raise AdapterFileError("adapter_config.json is no JSON object: fetch it again.")
    for name, (is_valid, kind) in _FIELDS.items():
        if name in config and not is_valid(config[name]):
            raise AdapterFileError(
                f"{name} in adapter_config.json is {repr(config[name])[:80]}, and must be {kind}: fetch it again, or "
                "have its author correct it."
            )
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except ValueError as error:  # half of a surrogate pair
        raise AdapterFileError(f"adapter_config.json holds a text that is none ({error}): fetch it again.") from error
    check_format_version(config.get("format_version", 1))
    return dict(config)
