# SPDX-License-Identifier: Apache-2.0
"""The bins of like |θ| against a stable sort of all weights, and the memory that the archival code works in."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from smn_peft.storage.codec.bins import bin_edges, in_bin_order, rank_bins
from smn_peft.storage.codec.ranked import decode_ranked, encode_ranked


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def signed_zeros(count: int) -> np.ndarray:
    return np.where(normal(count) > 0, np.float32(0), np.float32(-0.0))


CASES = {
    "random": [normal(100_001), *(normal(size) for size in range(1, 71))],
    "float64": [normal(5000).astype(np.float64) / 3],
    "float16": [normal(40_001).astype(np.float16)],
    "bfloat16": [(normal(100_001).view(np.uint32) & 0xFFFF0000).view(np.float32)],
    "heavy ties": [np.round(normal(size)) for size in (70_003, *range(1, 71))],
    "mostly zero": [normal(70_003) * (np.random.default_rng(1).random(70_003) < 0.1)],
    "all equal": [np.full(size, 0.5, np.float32) for size in (66_000, *range(1, 71))],
    "signed zeros": [signed_zeros(size) for size in (40_000, *range(1, 71))],
    "both signs": [np.tile(np.float32([-1, 1]), 20_000)],
    "rising": [np.arange(50_000, dtype=np.float32)],
    "infinite": [np.tile(np.float32([np.inf, -np.inf, 1e30, 0]), 9000)],
    "not a number": [np.where(normal(40_000) > 1, np.float32(np.nan), normal(40_000, 1))],
}


@pytest.mark.parametrize("exponent", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", CASES)
def test_bins_and_their_order_are_those_of_a_stable_sort(name, exponent):
    for weight in CASES[name]:
        order = np.argsort(-np.abs(weight), kind="stable")
        edges = [len(weight) * i >> exponent for i in range((1 << exponent) + 1)]
        assert bin_edges(len(weight), exponent) == edges
        expected = np.empty(len(weight), np.uint8)
        for number, (first, last) in enumerate(pairwise(edges)):
            expected[order[first:last]] = number
        bins = rank_bins(weight, exponent)
        assert np.array_equal(bins, expected)
        assert np.array_equal(bins, rank_bins(weight, 5) >> (5 - exponent))
        placed = np.full(len(weight), -1)
        for index, places in in_bin_order(bins, edges):
            placed[places] = index
        assert np.array_equal(placed, np.concatenate([np.sort(order[i:j]) for i, j in pairwise(edges)]))


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_the_archival_code_round_trips(name, share):
    for weight in CASES[name]:
        is_minority = np.random.default_rng(2).random(len(weight)) < share
        is_minority[len(is_minority) // 2] = True
        payload = memoryview(encode_ranked(is_minority, weight))
        assert np.array_equal(decode_ranked(payload, int(is_minority.sum()), weight), is_minority)


@pytest.mark.parametrize("share", [0.01, 0.15, 0.45])
def test_working_memory_is_a_few_bytes_per_weight(share):
    weight = normal(2_000_000)
    is_minority = np.random.default_rng(1).random(len(weight)) < share
    payload = encode_ranked(is_minority, weight)
    tracemalloc.start()
    decode_ranked(memoryview(payload), int(is_minority.sum()), weight)
    peak = tracemalloc.get_traced_memory()[1] - len(weight)  # less what it returns
    tracemalloc.stop()
    assert peak < 6 * len(weight)
