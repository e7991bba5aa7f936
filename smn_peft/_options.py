# SPDX-License-Identifier: Apache-2.0
"""Options as dataclass fields: default, help and range are written once, and values are checked against them."""

from __future__ import annotations

import difflib
import functools
import math
import operator
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

__all__ = ["check_keys", "check_options", "did_you_mean", "from_mapping", "option"]

T = TypeVar("T")
get_type_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)

_COMPARISONS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def option(default: Any, help: str, **limits: float) -> Any:
    """Declare a dataclass field with its help.

    Args:
        default: The default value, of which each instance gets a copy if it is mutable; or a class to call for it.
        help: Help text, one or two sentences.
        limits: Numbers that [`check_options`] compares the value with: `least`, `above`, `most`, `below`.
    """
    metadata = {"help": help, "limits": limits}
    if isinstance(default, (dict, list, set, type)):
        return field(default_factory=default if isinstance(default, type) else default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_options(options: Any) -> None:
    """Check every field of a dataclass against its limits and its `Literal` type.

    Raises:
        ValueError: Names the field, what it may be and what it is.
    """
    hints = get_type_hints(type(options))
    for each in fields(options):
        value, hint = getattr(options, each.name), hints[each.name]
        optional = NoneType in get_args(hint)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{each.name} must be one of {', '.join(get_args(hint))}; got {value!r}.")
        limits = {} if optional and value is None else each.metadata.get("limits", {})
        in_range = (_COMPARISONS[kind][1](value, limit) for kind, limit in limits.items())
        if limits and not (math.isfinite(value) and all(in_range)):
            wanted = " and ".join(f"{_COMPARISONS[kind][0]} {limit}" for kind, limit in limits.items())
            raise ValueError(f"{each.name} must be {wanted}{', or None' * optional}; got {value}.")


def check_keys(kind: Any, values: Mapping[str, Any], where: str) -> None:
    """Refuse keys that are no field of a dataclass or of one nested in it.

    Raises:
        ValueError: Names the key and the closest field.
    """
    hints = get_type_hints(kind)
    known = [each.name for each in fields(kind)]
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}: unknown option {key!r}.{did_you_mean(key, known)}")
        if is_dataclass(hints[key]) and isinstance(value, Mapping):
            check_keys(hints[key], value, f"{where}, {key}")


def from_mapping(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from what YAML or JSON holds, each value converted to the type of its field.

    Raises:
        ValueError: For an unknown key, or a value of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    check_keys(kind, values, where)
    hints, converted = get_type_hints(kind), dict(values)
    for key, value in values.items():
        if not is_dataclass(hints[key]):
            try:
                adapter = TypeAdapter(hints[key], config={"arbitrary_types_allowed": True})
                converted[key] = adapter.validate_python(value)
            except ValidationError as error:
                raise ValueError(f"{where}, {key}: {error.errors()[0]['msg']}; got {value!r}.") from error
        elif isinstance(value, Mapping):
            converted[key] = from_mapping(hints[key], value, f"{where}, {key}")
    return kind(**converted)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean X?`` with the closest known name, or nothing where none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
