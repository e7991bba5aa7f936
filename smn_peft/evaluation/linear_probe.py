# SPDX-License-Identifier: Apache-2.0
"""`linear_probe`: multinomial logistic regression with L2 on frozen features, fitted by scikit-learn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .features import Features, check_classes, check_pair

__all__ = ["DECAYS", "PAPER_DECAY", "LinearProbe", "fit_linear_probe", "linear_probe"]

PAPER_DECAY = 0.01
DECAYS = (100.0, 10.0, 1.0, 0.1, PAPER_DECAY)
"""Grid of λ · n, strongest first: among equals the strongest is taken."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted probe, of whose weight and bias a head can start."""

    weight: Tensor  # fp32 (classes, dim)
    bias: Tensor  # fp32 (classes,)
    classes: Tensor  # int64 (classes,), the label of each row
    decay: float  # λ · n of the fit
    mean: Tensor | None  # fp32 (dim,) to subtract from features; None: not standardised
    std: Tensor | None  # fp32 (dim,) to divide them by
    validation: dict[float, float]  # accuracy on the validation part by decay; empty where one was given

    def logits(self, features: Tensor) -> Tensor:
        """(n, dim) -> (n, classes), columns as in `classes`."""
        features = features.float()
        if self.mean is not None and self.std is not None:
            features = (features - self.mean) / self.std
        return features @ self.weight.T + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """(n, dim) -> labels (n,)."""
        return self.classes[self.logits(features).argmax(dim=1)]

    def accuracy(self, test: Features) -> float:
        """Fraction of labelled features that are predicted right."""
        return float((self.predict(test.features) == test.labels_for("A linear probe")).double().mean())


def linear_probe(train: Features, test: Features, **options: object) -> float:
    """Accuracy on `test` of a probe of `train`; `options` as of [`fit_linear_probe`]."""
    check_pair(train, test, "A linear probe")
    return fit_linear_probe(train, **options).accuracy(test)  # type: ignore[arg-type]


def fit_linear_probe(
    train: Features,
    *,
    decays: Sequence[float] = DECAYS,
    validation: float | Features = 0.2,
    standardise: bool = False,
    cautious: bool = False,
    seed: int = 0,
    max_iterations: int = 5000,
    tolerance: float = 1e-6,
) -> LinearProbe:
    """Minimise mean cross-entropy + (λ / 2) ‖w‖², with λ = decay / n and the bias free of decay.

    That is the paper's probe with ``decays=[PAPER_DECAY]``. Of several decays the one is taken that is best on a
    validation part of the training features; the probe is then fitted on all of these. Test features take no part.

    Args:
        train: Labelled features, of two classes at least.
        decays: λ · n to choose from; one leaves nothing to choose.
        validation: Fraction of each class to choose on, or other labelled features, which the fit never sees.
        standardise: Fit on features of mean 0 and standard deviation 1, measured on `train`.
        cautious: Take the strongest decay within one standard error of the best (Breiman et al., CART, 1984): on a
            hundred validation samples the best itself is largely chance.
        seed: Of the validation part.
        max_iterations: Steps of L-BFGS; a warning says if they do not suffice.
        tolerance: Largest entry of the gradient of the mean loss to stop at; 1e-4 can cost a point at small decays.
    """
    labels = train.labels_for("A linear probe")
    check_classes(labels, "A linear probe")
    if not decays or not all(decay > 0 for decay in decays):
        raise ValueError(f"decays must be one or more numbers above 0, got {[*decays]}; the paper's is {PAPER_DECAY}.")
    mean, std = (train.features.mean(0), train.features.std(0) + 1e-6) if standardise else (None, None)
    scores: dict[float, float] = {}
    fit = partial(_fit, mean=mean, std=std, max_iter=max_iterations, tol=tolerance)
    if len(decays) > 1:
        part, held = _parts(train, labels, validation, seed)
        for decay in decays:
            scores[decay] = fit(part, decay).accuracy(held)
    best = max(decays, key=lambda decay: scores.get(decay, 0.0))  # the first among equals
    if cautious and scores:
        margin = math.sqrt(scores[best] * (1 - scores[best]) / len(held.features))
        best = max(decay for decay in decays if scores[decay] >= scores[best] - margin)
    return replace(fit(train, best), validation=scores)


def _parts(train: Features, labels: Tensor, validation: float | Features, seed: int) -> tuple[Features, Features]:
    """What to fit and what to choose on: of each class a fraction, one at least, but never its only sample."""
    if isinstance(validation, Features):
        check_pair(train, validation, "A linear probe")
        return train, validation
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a fraction between 0 and 1, or Features; got {validation}.")
    generator = torch.Generator().manual_seed(seed)
    fitted, held = [], []
    for label in labels.unique():
        indices = (labels == label).nonzero().squeeze(1)
        indices = indices[torch.randperm(len(indices), generator=generator)]
        count = min(max(1, round(validation * len(indices))), len(indices) - 1)
        held.append(indices[:count])
        fitted.append(indices[count:])
    chosen = torch.cat(held)
    if not len(chosen):
        problem = f"All {len(labels)} classes have one sample each, so none is left to choose the decay on"
        raise ValueError(f"{problem}: pass validation=Features, or one decay, such as decays=[{PAPER_DECAY}].")
    return train.subset(torch.cat(fitted)), train.subset(chosen)


def _fit(train: Features, decay: float, *, mean: Tensor | None, std: Tensor | None, **settings: Any) -> LinearProbe:
    """Fit with one decay and scikit-learn's `settings`."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        message = "A linear probe is fitted by scikit-learn, which is not installed: pip install 'smn_peft[eval]'."
        raise ImportError(message) from error
    labels = train.labels_for("A linear probe")
    features = (train.features if mean is None or std is None else (train.features - mean) / std).double()
    centre = features.mean(dim=0)  # the bias is free of decay: the same minimum, in far fewer steps
    # scikit-learn minimises C · (sum of losses) + ‖w‖² / 2, so C = 1 / (λ n). Two classes it fits by one vector v, and
    # the multinomial model's two are ± v / 2, whose ‖w‖² is ‖v‖² / 2: the same decay is C twice as large.
    binary = len(labels.unique()) == 2
    model = LogisticRegression(C=(2 if binary else 1) / decay, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit((features - centre).numpy(), labels.numpy())
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            continue
        problem = f"The linear probe with decay {decay:g} did not converge in {int(model.n_iter_.max())} iterations"
        advice = "Pass standardise=True, a larger decay, or a larger max_iterations."
        warnings.warn(f"{problem}, so its accuracy may be too low. {advice}", stacklevel=3)
    weight, bias = torch.as_tensor(model.coef_), torch.as_tensor(model.intercept_)
    bias = bias - weight @ centre.to(weight.dtype)
    if binary:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return LinearProbe(weight.float(), bias.float(), torch.as_tensor(model.classes_), decay, mean, std, {})
