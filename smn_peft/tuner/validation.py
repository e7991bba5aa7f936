# SPDX-License-Identifier: Apache-2.0
"""Fields of a config that may come from anybody's file: what they may hold, and how long they may take to match."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as sre
    import sre_parse as parser

__all__ = ["check_names", "check_pattern", "check_preprocessing", "class_names"]

MAX_NAMES = 20_000
MAX_SAVED = 128
"""Modules to save; PEFT matches each with every module."""
MAX_NAME = 1_000
MAX_PATTERN = 1_000_000
MAX_CHOICES = 3.5
MAX_CLASSES = 100_000
_DIGITS = frozenset({(sre.IN, ((sre.CATEGORY, sre.CATEGORY_DIGIT),)), (sre.IN, ((sre.RANGE, (48, 57)),))})
_INTERPOLATIONS = ("nearest", "nearest-exact", "box", "bilinear", "hamming", "bicubic", "lanczos", "random")


def check_pattern(option: str, pattern: str) -> None:
    r"""Refuse a regular expression that may take for ever on a module's name.

    Python's engine tries every way of sharing a name among the repetitions of a pattern, and cannot be stopped. Here a
    repetition such as ``.*`` counts 1, digits 0, what is optional and a choice by ``|`` ¼; what is repeated counts as
    often as it may be, so that a repetition inside an unlimited one is never taken. With 3.5 in all, the worst pattern
    takes milliseconds for a name.

    Args:
        option: Name of the option, for the message.
        pattern: The pattern.

    Raises:
        ValueError: If it is no regular expression, too long, or counts above 3.5.
    """
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"{option} is a pattern of {len(pattern):,} characters, and may have {MAX_PATTERN:,}.")
    try:
        choices = _choices(parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{option} is no regular expression ({error}): {pattern[:80]!r}.") from error
    if choices > MAX_CHOICES:
        raise ValueError(
            f"{option} is a pattern that may take for ever to match, with repetitions inside a repetition or too many "
            f"in a row: {pattern[:80]!r}. Write it with three of '.*' at most and none of them repeated, or list the "
            "names."
        )


def _choices(node: Any) -> float:
    """See [`check_pattern`]; `node` is of the parser's tree, or a part of one."""
    total = 0.0
    for operation, argument in node:
        if operation is sre.BRANCH:
            total += 0.25 + max(map(_choices, argument[1]))
        elif operation is sre.SUBPATTERN:
            total += _choices(argument[-1])
        elif operation in (sre.ASSERT, sre.ASSERT_NOT):
            total += _choices(argument[1])
        elif operation is sre.GROUPREF_EXISTS:
            total += 0.25 + max(_choices(part) for part in argument[1:] if part is not None)
        elif "REPEAT" in str(operation):
            total += _repeated(*argument)
        elif str(operation) == "ATOMIC_GROUP":
            total += _choices(argument)
    return total


def _repeated(least: int, most: int, body: Any) -> float:
    inside = _choices(body)
    times = math.inf if most is sre.MAXREPEAT else most
    total = times * inside if inside else 0.0
    if least == most or _frozen(body) in _DIGITS:
        return total
    return total + (0.25 if most == 1 else 1.0)


def _frozen(body: Any) -> Any:
    (operation, argument), *more = body or [(None, ())]
    return None if more or operation is not sre.IN else (operation, tuple(argument))


def check_names(option: str, names: Any, most: int = MAX_NAMES) -> None:
    """Refuse a list of modules that is none, or longer than PEFT can match.

    Raises:
        TypeError: If it holds anything but texts.
        ValueError: If there are too many, one is too long, or would be matched as a pattern that may take for ever.
    """
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{option} must hold names of modules; got {next(n for n in names if type(n) is not str)!r}.")
    if len(names) > most:
        raise ValueError(f"{option} has {len(names):,} names, and may have {most:,}: name the modules they lie in.")
    for name in names:
        if not 0 < len(name) <= MAX_NAME:
            raise ValueError(f"{option} has a name of {len(name):,} characters; it may have 1 to {MAX_NAME:,}.")
        if re.fullmatch(r"[\w.-]+", name) is None:
            check_pattern(option, name)


def class_names(id2label: Any) -> dict[int, str]:
    """Names of classes by index, in their order; JSON has the indices as texts.

    Raises:
        ValueError: If it is no such mapping, or larger than any dataset's.
    """
    if not isinstance(id2label, Mapping) or len(id2label) > MAX_CLASSES:
        raise ValueError(f"id2label must map up to {MAX_CLASSES:,} indices to names; got {_short(id2label)}.")
    result: dict[int, str] = {}
    for key, name in id2label.items():
        index = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
        if type(index) is not int or index < 0 or index in result:
            raise ValueError(f"id2label must have the indices of classes as its keys, each once; got {_short(key)}.")
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise ValueError(f"id2label must have names of up to {MAX_NAME:,} characters; got {_short(name)}.")
        result[index] = name
    return dict(sorted(result.items()))


def check_preprocessing(preprocessing: Any) -> dict[str, Any]:
    """What is said of images, in one form: floats and lists, as JSON has them.

    Raises:
        ValueError: If it says anything that cannot be.
    """
    if not isinstance(preprocessing, Mapping):
        raise ValueError(f"preprocessing must say how images are prepared, by name; got {_short(preprocessing)}.")
    result: dict[str, Any] = {}
    for key in sorted(preprocessing, key=str):
        value = preprocessing[key]
        if key == "image_size" and type(value) is int and 1 <= value <= 4096:
            result[key] = value
        elif key in ("mean", "std") and _is_color(value) and (key == "mean" or min(value) > 0):
            result[key] = [float(number) for number in value]
        elif key == "crop_pct" and _is_real(value) and 0 < value <= 1:
            result[key] = float(value)
        elif key == "interpolation" and value in _INTERPOLATIONS:
            result[key] = value
        else:
            raise ValueError(
                f"preprocessing: {_short(key)} cannot be {_short(value)}. It may have image_size (1 to 4096), mean "
                "and std (three numbers each, std above 0), crop_pct (above 0, and 1 at most) and interpolation (one "
                f"of {', '.join(_INTERPOLATIONS)})."
            )
    return result


def _is_color(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_real, value))


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e6 < value < 1e6


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
