# SPDX-License-Identifier: Apache-2.0
"""Values of options by their type, from what a YAML file holds, and the type in a user's words."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["NONE", "describe", "from_yaml", "is_list", "is_mapping", "members_of"]

NONE = ("none", "null")


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, `NoneType` among them; another type alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def is_mapping(annotation: Any) -> bool:
    """Whether a mapping is a value."""
    return any(get_origin(member) is dict or member is dict for member in members_of(annotation))


def is_list(member: Any) -> bool:
    """Whether a type holds any number of values: a list, set or tuple[T, …]."""
    origin, args = get_origin(member) or member, get_args(member)
    return origin in (list, set) or (origin is tuple and (not args or args[-1] is Ellipsis))


def describe(annotation: Any) -> str:
    """The type in a user's words, such as "int or none"."""
    return " or ".join(_describe(member) for member in members_of(annotation))


def _describe(member: Any) -> str:
    origin, args = get_origin(member), get_args(member)
    if member is type(None):
        return NONE[0]
    if origin is Literal:
        return "|".join(str(value) for value in args)
    if is_list(member):
        return f"list of {describe(args[0])}" if args else "list"
    if origin is tuple:
        return f"({', '.join(describe(arg) for arg in args)})"
    if is_mapping(member):
        return "mapping"
    return {bool: "true or false", Path: "path", Any: "anything"}.get(member, getattr(member, "__name__", str(member)))


def from_yaml(value: Any, annotation: Any, where: str) -> Any:
    """A value of a YAML file as the type wants it; an int is a float too, and so is 1e-3, which YAML takes for text.

    Raises:
        ValueError: If it is of another type; names `where`.
    """
    members = members_of(annotation)
    for member in members:
        try:
            return _from_yaml(value, member, where)
        except TypeError:
            continue
    if isinstance(value, str) and float in members:
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{where} must be {describe(annotation)}; got {value!r}.")


def _from_yaml(value: Any, member: Any, where: str) -> Any:
    """TypeError says that the value is not of this type; a ValueError that something inside it is wrong."""
    origin, args = get_origin(member) or member, get_args(member)
    many = isinstance(value, Sequence) and not isinstance(value, str)
    if origin is Literal and value in args:
        return value
    if is_list(member) and many:
        return origin(from_yaml(item, args[0] if args else Any, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is tuple and not is_list(member) and many and len(value) == len(args):
        return tuple(
            from_yaml(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, args, strict=True))
        )
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if origin is Path and isinstance(value, (str, Path)):
        return Path(value)
    if origin is Any or (origin in (bool, int, str, type(None)) and type(value) is origin):
        return value
    if isinstance(origin, type) and origin not in (bool, int, tuple) and isinstance(value, origin):
        return value  # what no file holds, such as a tensor
    raise TypeError
