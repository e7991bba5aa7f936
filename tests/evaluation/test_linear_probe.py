# SPDX-License-Identifier: Apache-2.0
"""The linear probe: at the minimum of the paper's objective, its decay chosen without the test set."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from smn_peft.evaluation import PAPER_DECAY, Features, fit_linear_probe, linear_probe
from smn_peft.evaluation.linear_probe import DECAYS


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("decay", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("standardise", [False, True])
def test_the_gradient_of_the_papers_objective_is_zero(blobs, classes, decay, standardise):
    train, _ = blobs(classes=classes, noise=2.0)
    probe = fit_linear_probe(train, decays=[decay], standardise=standardise, tolerance=1e-9)
    features = train.features.double()
    if standardise:
        features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    weight, bias = probe.weight.double().requires_grad_(), probe.bias.double().requires_grad_()
    loss = F.cross_entropy(features @ weight.T + bias, train.labels)
    (loss + decay / len(train) / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 2e-6  # fp32's rounding of the weight
    assert bias.grad.abs().max() < 2e-6
    (other,) = torch.autograd.grad(F.cross_entropy(features @ weight.T + bias, train.labels), bias)
    assert torch.equal(other, bias.grad), "the bias does not decay"


def test_three_classes_are_scikit_learns_with_c_one_over_decay(blobs):
    train, test = blobs(noise=2.0)
    oracle = LogisticRegression(C=1 / 0.3, max_iter=5000, tol=1e-10).fit(train.features.double(), train.labels)
    probe = fit_linear_probe(train, decays=[0.3], tolerance=1e-10)
    torch.testing.assert_close(probe.weight.double(), torch.tensor(oracle.coef_), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probe.bias.double(), torch.tensor(oracle.intercept_), rtol=1e-5, atol=1e-5)
    assert probe.accuracy(test) == pytest.approx(oracle.score(test.features.double(), test.labels))


def test_logits_give_the_predictions_and_a_head_can_start_from_them(blobs):
    train, test = blobs(noise=2.0)
    probe = fit_linear_probe(train, standardise=True)
    assert probe.weight.shape == (3, 6)
    assert probe.classes.tolist() == [0, 1, 2]
    head = F.linear(
        (test.features - train.features.mean(0)) / (train.features.std(0) + 1e-6), probe.weight, probe.bias
    )
    torch.testing.assert_close(probe.logits(test.features), head, rtol=1e-4, atol=1e-4)
    assert probe.accuracy(test) == float((head.argmax(1) == test.labels).double().mean())
    plain = fit_linear_probe(train, decays=[1.0])
    assert (plain.mean.any().item(), plain.std.eq(1).all().item()) == (False, True)


def test_labels_with_gaps_are_predicted_as_they_are(blobs):
    train, test = blobs(noise=0.1)
    apart = [Features(part.features, part.labels * 5 + 2) for part in (train, test)]
    probe = fit_linear_probe(apart[0])
    assert probe.classes.tolist() == [2, 7, 12]
    assert probe.accuracy(apart[1]) == 1.0


def test_the_decay_is_the_best_on_the_validation_part(blobs):
    train, test = blobs(n=60, dim=40, noise=3.0, distance=0.8)
    probe = fit_linear_probe(train, decays=DECAYS, seed=1)
    assert set(probe.validation) == set(DECAYS)
    assert probe.validation[probe.decay] == max(probe.validation.values()) > min(probe.validation.values())
    alone = fit_linear_probe(train, decays=[probe.decay])
    assert torch.equal(probe.weight, alone.weight), "the last fit takes all training features"
    assert linear_probe(train, test, seed=1) == probe.accuracy(test)


def test_the_strongest_of_equal_decays_is_taken(blobs):
    train, _ = blobs(noise=0.01, distance=10)
    probe = fit_linear_probe(train)
    assert set(probe.validation.values()) == {1.0}
    assert probe.decay == max(DECAYS)
    assert fit_linear_probe(train, decays=[0.1, 1.0]).decay == 0.1


def test_the_validation_part_is_seeded_and_other_features_can_be_given(blobs):
    train, test = blobs(n=60, dim=40, noise=3.0, distance=0.8)
    first, again = (fit_linear_probe(train, seed=3).validation for _ in range(2))
    assert first == again
    assert len({tuple(fit_linear_probe(train, seed=seed).validation.values()) for seed in range(4)}) > 1
    given = fit_linear_probe(train, validation=test)
    assert given.validation == {
        decay: fit_linear_probe(train, decays=[decay]).accuracy(test) for decay in given.validation
    }


def test_rare_classes_stay_in_the_fit(blobs):
    train, _ = blobs(noise=0.1)
    rare = train.subset(torch.cat([(train.labels < 2).nonzero().squeeze(1), (train.labels == 2).nonzero()[0]]))
    assert fit_linear_probe(rare, seed=2).classes.tolist() == [0, 1, 2]
    one_each = train.subset(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"All 3 classes have one sample each.*one decay, such as decays=\[0\.01\]"):
        fit_linear_probe(one_each)
    assert fit_linear_probe(one_each, decays=[PAPER_DECAY]).accuracy(one_each) == 1.0


def test_standardising_undoes_scales(blobs):
    train, test = blobs(noise=2.0)
    scales = torch.tensor([1e-3, 1.0, 1e3, 1.0, 1e2, 1.0])
    scaled = [Features(part.features * scales + 5, part.labels) for part in (train, test)]
    expected = fit_linear_probe(train, decays=[1.0], standardise=True, tolerance=1e-8)
    found = fit_linear_probe(scaled[0], decays=[1.0], standardise=True, tolerance=1e-8)
    torch.testing.assert_close(found.weight, expected.weight, rtol=2e-3, atol=2e-3)
    assert found.accuracy(scaled[1]) == pytest.approx(expected.accuracy(test), abs=0.02)


def test_a_constant_feature_can_be_standardised(blobs):
    train, _ = blobs()
    constant = Features(torch.cat([train.features, torch.full((120, 1), 7.0)], 1), train.labels)
    assert fit_linear_probe(constant, decays=[1.0], standardise=True).weight.isfinite().all()


def test_no_convergence_is_said_clearly_and_once_per_decay(blobs):
    train, _ = blobs(noise=3.0)
    words = (
        r"decay 0\.01 did not converge in 2 iterations.*Pass standardise=True, a larger decay, or a larger max_iter"
    )
    with pytest.warns(UserWarning, match=words) as caught:
        fit_linear_probe(train, decays=[0.01], max_iterations=2)
    assert [warning.category for warning in caught] == [UserWarning], "scikit-learn's own is replaced"
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_linear_probe(train)


def test_scikit_learn_missing_is_said_with_the_extra(blobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"scikit-learn, which is not installed: pip install 'smn_peft\[eval\]'"):
        fit_linear_probe(blobs()[0])


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (Features(torch.ones(4, 2)), {}, r"A linear probe needs labels"),
        (Features(torch.ones(4, 2), torch.ones(4)), {}, r"two classes at least, and all 4 samples .* of class 1"),
        (None, {"decays": []}, r"decays must be one or more numbers above 0, got \[\]; the paper's is 0\.01"),
        (None, {"decays": [1, 0]}, r"decays must be one or more numbers above 0, got \[1, 0\]"),
        (None, {"validation": 1.5}, r"validation must be a fraction between 0 and 1, or Features; got 1\.5"),
        (None, {"validation": Features(torch.ones(2, 3), torch.ones(2))}, r"dim 2 and is tested on dim 3"),
    ],
)
def test_what_cannot_be_fitted_is_refused(train, options, message):
    good = Features(torch.eye(2).repeat(3, 1), torch.tensor([0, 1] * 3))
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(good if train is None else train, **options)


def test_test_features_are_checked_before_the_fit(blobs):
    train, _ = blobs()
    with pytest.raises(ValueError, match=r"dim 6 and is tested on dim 2"):
        linear_probe(train, Features(torch.ones(3, 2), torch.ones(3)))


def test_a_cautious_choice_is_the_strongest_decay_within_a_standard_error():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    features = torch.randn(200, 16, generator=generator) + 0.8 * torch.eye(4)[labels].repeat(1, 4)
    train = Features(features, labels)
    probe = fit_linear_probe(train, decays=(100.0, 1.0, 0.01), cautious=True)
    assert probe.validation is not None
    best = max(probe.validation.values())
    margin = (best * (1 - best) / 40) ** 0.5
    assert probe.decay == max(decay for decay, found in probe.validation.items() if found >= best - margin)
    for gain, errors in ((2, 0), (2.5, 2)):  # another decay is within so many standard errors
        # The classes lie in the smallest of the features, so that a strong decay is a bad one.
        features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
        features[:, :4] = 0.1 * (features[:, :4] + gain * torch.eye(4)[labels])
        found = fit_linear_probe(Features(features, labels), decays=(10, 1, 0.1, 0.01), cautious=True)
        best = max(found.validation.values())
        margin = (best * (1 - best) / 40) ** 0.5

        def within(count, found=found, best=best, margin=margin):
            return max(decay for decay, score in found.validation.items() if score >= best - count * margin)

        assert found.decay == within(1) != within(errors)
    held = Features(features[:40], labels[:40])
    choices = {
        cautious: fit_linear_probe(train, decays=(1e4, 1.0, 0.01), cautious=cautious, validation=held).decay
        for cautious in (False, True)
    }
    assert choices[True] >= choices[False]
