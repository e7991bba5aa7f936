# SPDX-License-Identifier: Apache-2.0
"""`Limits` and `Room`: bounds make sense, and places are counted and given back."""

from __future__ import annotations

import pytest

from smn_peft.serving.errors import ServingError
from smn_peft.serving.limits import Limits, Room


def test_places_are_given_back_whatever_happens():
    room = Room(4, lambda: 0.6)
    with room.place(3):
        with pytest.raises(ServingError) as refused, room.place(2):
            pass
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "2"})
        with pytest.raises(OSError, match="x"), room.place(1):
            raise OSError("x")
        assert room.taken == 3
    assert room.taken == 0


def test_a_bound_of_nothing_is_refused():
    with pytest.raises(ValueError, match="queue must be above 0"):
        Limits(queue=0)
