# SPDX-License-Identifier: Apache-2.0
"""Options as dataclass fields: limits, literals, conversion from YAML, and messages that name the field."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch

from smn_peft._options import check_options, did_you_mean, from_mapping, option


@dataclass
class Inner:
    sizes: tuple[float, float] = option((0.5, 1.0), "Two sizes.")


@dataclass
class Options:
    rate: float = option(0.1, "A rate.", above=0, most=1)
    steps: int | None = option(None, "Steps.", least=1)
    kind: Literal["a", "b"] = option("a", "A kind.")
    names: list[str] = option([], "Names.")
    weights: torch.Tensor | None = option(None, "Weights.")
    inner: Inner = field(default_factory=Inner, metadata={"help": "More."})

    def __post_init__(self):
        check_options(self)


def test_limits_and_literals():
    Options(rate=1.0, steps=1, kind="b")
    for wrong, message in (
        ({"rate": 0.0}, "rate must be above 0 and at most 1; got 0.0."),
        ({"rate": math.nan}, "rate must be above 0 and at most 1; got nan."),
        ({"steps": 0}, "steps must be at least 1, or None; got 0."),
        ({"kind": "c"}, "kind must be one of a, b; got 'c'."),
    ):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            Options(**wrong)
        assert str(raised.value) == message


def test_a_mutable_default_is_copied():
    Options().names.append("x")
    assert Options().names == []


def test_values_of_yaml_become_those_of_the_fields():
    weights = torch.ones(2)
    values = {"rate": "5e-2", "names": ["n"], "weights": weights, "inner": {"sizes": [0.25, 1]}}
    found = from_mapping(Options, values, "x")
    assert (found.rate, found.names, found.inner) == (0.05, ["n"], Inner((0.25, 1.0)))
    assert found.weights is weights
    assert from_mapping(Options, {"inner": Inner()}, "x").inner == Inner()
    for wrong, message in (
        ({"steps": 0.5}, r"^x: steps must be int or none; got 0\.5\.$"),
        ({"inner": {"sizes": [1]}}, r"^x: inner\.sizes must be \(float, float\); got \[1\]\.$"),
        ({"zzz": 1}, r"^x: unknown option 'zzz'\.$"),
        ({"steps": True}, r"^x: steps must be int or none; got True\.$"),
        ({"step": 1}, r"^x: unknown option 'step'\. Did you mean steps\?$"),
        ({"inner": {"size": 1}}, r"^x: unknown option 'inner\.size'\. Did you mean inner\.sizes\?$"),
    ):
        with pytest.raises(ValueError, match=message):
            from_mapping(Options, wrong, "x")


def test_only_what_is_close_is_suggested():
    assert did_you_mean("stps", ["steps", "rate"]) == " Did you mean steps?"
    assert did_you_mean("zzz", ["steps"]) == ""
