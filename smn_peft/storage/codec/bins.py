# SPDX-License-Identifier: Apache-2.0
"""Bins of like |θ|: which one each weight is in, and the order that the archival code reads a layer's bits in.

Weights are ranked from the largest |θ| down, among equals the first first, and bin i of 2^e ends before rank
⌊n (i + 1) / 2^e⌋. No index of all weights is ever built: what is kept is a byte for each.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["bin_edges", "in_bin_order", "rank_bins"]

_CHUNK = 1 << 15  # weights at a time: what is built from them stays in a core's cache


def bin_edges(total: int, exponent: int) -> list[int]:
    """First rank of each of the 2^`exponent` bins of `total` weights, and `total`."""
    return [total * i >> exponent for i in range((1 << exponent) + 1)]


def rank_bins(weight: NDArray[np.floating], exponent: int) -> NDArray[np.uint8]:
    """Bin of each weight, (weights,); shifted right by one, that of half as many bins.

    Args:
        weight: Frozen weights θ, (weights,), at least one. Signed zeros are equal, and NaN ranks last.
        exponent: Number of bins as a power of 2, at most 8.
    """
    edges = np.array(bin_edges(len(weight), exponent)[1:-1], np.int64)
    ranked = _keys(weight)
    ranked.sort()
    values = ranked[edges]
    before = edges - np.searchsorted(ranked, values)  # weights of an edge's own value that rank before it
    del ranked
    bins = np.zeros(len(weight), np.uint8)
    for start in range(0, len(weight), _CHUNK):
        keys, out = _keys(weight[start : start + _CHUNK]), bins[start : start + _CHUNK]
        for edge, value in enumerate(values):
            out += (keys >= value).view(np.uint8)
            if before[edge]:
                first = np.flatnonzero(keys == value)[: before[edge]]
                out[first] -= 1
                before[edge] -= len(first)
    return bins


def in_bin_order(bins: NDArray[np.uint8], edges: list[int]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Where each weight stands when the bins follow each other, each in the order of its weights.

    Args:
        bins: Bin of each weight, (weights,).
        edges: Of these bins, from [`bin_edges`].

    Yields:
        Indices of some weights and their places, (n,) each; together all weights, once.
    """
    following = np.array(edges[:-1], np.int64)  # place of each bin's next weight
    for start in range(0, len(bins), _CHUNK):
        chunk = bins[start : start + _CHUNK]
        order, counts = np.argsort(chunk, kind="stable"), np.bincount(chunk, minlength=len(following))
        places = np.arange(len(chunk)) + np.repeat(following - (np.cumsum(counts) - counts), counts)
        following += counts
        yield start + order, places


def _keys(weight: NDArray[np.floating]) -> NDArray[np.floating]:
    """What weights are ranked by, rising: −|θ|, and 1 for NaN, which compares with nothing."""
    keys: NDArray[np.floating] = np.abs(weight)
    np.negative(keys, out=keys)
    np.fmin(keys, 1, out=keys)
    return keys
