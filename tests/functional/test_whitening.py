# SPDX-License-Identifier: Apache-2.0
"""Whitening against scikit-learn's PCA, and what it does with offsets, few rows, dead features and collapse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from smn_peft.functional.features import fit_whitening


def features(n: int, dim: int, offset: float = 0.0) -> torch.Tensor:
    """Correlated features of falling variances."""
    mixing = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q * torch.logspace(0, -3, dim).double()
    return (torch.randn(n, dim, dtype=torch.float64) @ mixing.T + offset).float()


@pytest.mark.parametrize(("n", "dim", "offset"), [(300, 12, 0.0), (300, 12, 50.0), (20, 40, 1.0)])
def test_it_is_scikit_learns_pca_up_to_signs_and_the_known_factor(n, dim, offset):
    train, test = features(n, dim, offset), features(50, dim, offset)
    found = fit_whitening(train, 8, chunk=64)
    pca = PCA(8, whiten=True, svd_solver="full").fit(train.double().numpy())
    expected = torch.tensor(pca.transform(test.double().numpy()))
    signs = torch.tensor(np.sign((found.components.numpy() * pca.components_).sum(1)))
    # fp32 alone holds an offset of 50 to 4e-6; what is left after it is what both saw.
    torch.testing.assert_close(found(test, unit_variance=True).double(), expected * signs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found(test).double() * math.sqrt(n - 1), expected * signs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.singular_values, torch.tensor(pca.singular_values_), rtol=1e-6, atol=0)


def test_the_columns_of_the_fit_are_orthonormal_and_centred():
    train = features(200, 10, offset=3.0)
    white = fit_whitening(train)(train).double()
    torch.testing.assert_close(white.T @ white, torch.eye(10, dtype=torch.float64), atol=1e-4, rtol=0)
    assert white.mean(0).abs().max() < 1e-6


def test_signs_and_bits_do_not_depend_on_the_order_of_the_rows():
    train = features(200, 10)
    one, two = fit_whitening(train), fit_whitening(train.flip(0))
    torch.testing.assert_close(one.components, two.components, rtol=1e-6, atol=1e-6)
    assert bool((one.components.gather(1, one.components.abs().argmax(1, keepdim=True)) > 0).all())
    again = fit_whitening(train)
    assert torch.equal(one.components, again.components)
    assert torch.equal(one(train, chunk=7), again(train))


def test_components_that_hold_only_rounding_are_dropped():
    train = torch.cat([features(100, 5), torch.zeros(100, 3), torch.full((100, 2), 7.0)], 1)
    train = torch.cat([train, train[:, :1] * 2], 1)
    assert len(fit_whitening(train).singular_values) == 5
    with pytest.warns(UserWarning, match="have 5 principal components above rounding, fewer than the 8 asked for"):
        found = fit_whitening(train, 8)
    assert found(train).shape == (100, 5)
    assert found(train).abs().max() < 1
    with pytest.warns(UserWarning, match="6 features of dim 20 have 5 principal components"):
        fit_whitening(features(6, 20), 20)


def test_mistakes():
    for bad, options, message in (
        (torch.full((30, 4), 0.1), {}, "All 30 features are the same to rounding.*collapsed"),
        (torch.randn(1, 4), {}, r"two or more features \(n, dim\); got \(1, 4\)"),
        (torch.randn(5), {}, r"\(n, dim\); got \(5,\)"),
        (torch.randn(9, 4), {"components": 0}, "components must be at least 1, or None for all; got 0"),
        (torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), {}, "Features to whiten: 1 of 2 rows hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_whitening(bad, **options)
    with pytest.raises(ValueError, match=r"fitted on features of dim 4; got \(2, 5\)"):
        fit_whitening(torch.randn(9, 4))(torch.randn(2, 5))
