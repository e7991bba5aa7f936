# SPDX-License-Identifier: Apache-2.0
"""`key_from`: a key that is asked for is there, or the server does not start."""

from __future__ import annotations

import pytest

from smn_peft.serving.auth import key_from


def test_the_key_comes_from_a_variable(monkeypatch):
    assert key_from(None) is None
    monkeypatch.setenv("SOME_KEY", " secret\n")
    assert key_from("SOME_KEY") == "secret"
    for value in ("", " "):
        monkeypatch.setenv("SOME_KEY", value)
        with pytest.raises(ValueError, match="SOME_KEY holds no API key"):
            key_from("SOME_KEY")
