# SPDX-License-Identifier: Apache-2.0
"""Which codecs there are: the name that a config says, and the number that a coded file says."""

from __future__ import annotations

from .errors import CodecError

__all__ = ["CODECS", "codec_id", "codec_name"]

CODECS: dict[str, int] = {"bits": 0, "entropy": 1}
"""Codec numbers by name. A number is never given a second meaning; 0 is a file of plain `smn_mask` tensors."""


def codec_id(name: str) -> int:
    """Number of a codec that makes a blob.

    Raises:
        ValueError: If there is no such codec.
    """
    if CODECS.get(name, 0) == 0:
        choices = ", ".join(repr(choice) for choice, number in CODECS.items() if number)
        raise ValueError(f"No codec makes a coded file by the name of {name!r}: choose {choices}.")
    return CODECS[name]


def codec_name(number: int) -> str:
    """Name of the codec that a blob says it is made by.

    Raises:
        CodecError: If this release has no such codec.
    """
    for name, known in CODECS.items():
        if known == number and known:
            return name
    raise CodecError(
        f"The masks are coded by codec {number}, which this smn_peft does not know: upgrade it (pip install -U "
        "smn_peft), or the file is damaged."
    )
