# SPDX-License-Identifier: Apache-2.0
"""The name `SMN` in PEFT's `PeftType`: spliced in here, and a no-op once upstream knows the name."""

from __future__ import annotations

from peft.utils.peft_types import PeftType

__all__ = ["SMN"]

_NAME = "SMN"


def _peft_type() -> PeftType:
    """The member `PeftType.SMN`, made if PEFT does not have it.

    PEFT and transformers look types up by value, call `.value` and use them as dict keys, so a plain string does not
    do: the member has to be a real one.
    """
    existing = PeftType.__members__.get(_NAME)
    if existing is not None:
        return existing
    member = str.__new__(PeftType, _NAME)
    member._name_ = _NAME
    member._value_ = _NAME
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    PeftType._member_names_.append(_NAME)
    type.__setattr__(PeftType, _NAME, member)
    return member


SMN = _peft_type()
"""The PEFT type of this method."""
