# SPDX-License-Identifier: Apache-2.0
"""Linear probes: logistic regression with L2 on frozen features by scikit-learn, of all labels or of a few."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data import held_out, label_subset
from .accuracy import check_classes, check_pair
from .features import Features
from .report import EvalReport

__all__ = [
    "DECAYS",
    "FRACTIONS",
    "PAPER_DECAY",
    "LinearProbe",
    "fit_linear_probe",
    "linear_probe",
    "low_shot_reports",
]

PAPER_DECAY = 0.01
DECAYS = (100.0, 10.0, 1.0, 0.1, PAPER_DECAY)
"""Grid of λ · n, strongest first: among equals the strongest is taken."""
FRACTIONS = (0.1, 0.04, 0.02, 0.01, 0.005, 0.0025)
"""Of the labels in low-shot learning, the paper's: 10 to 0.25 %."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted probe, of whose weight and bias a head can start."""

    weight: Tensor  # fp32 (classes, dim)
    bias: Tensor  # fp32 (classes,)
    classes: Tensor  # int64 (classes,), the label of each row
    decay: float  # λ · n of the fit
    mean: Tensor  # fp32 (dim,) to subtract from features; 0 if not standardised
    std: Tensor  # fp32 (dim,) to divide them by; 1 if not standardised
    validation: dict[float, float]  # accuracy on the validation part by decay; empty where one was given

    def logits(self, features: Tensor) -> Tensor:
        """(n, dim) -> (n, classes), columns as in `classes`."""
        return (features.float() - self.mean) / self.std @ self.weight.T + self.bias

    def accuracy(self, test: Features) -> float:
        """Fraction of labelled features that are predicted right."""
        predicted = self.classes[self.logits(test.features).argmax(dim=1)]
        return float((predicted == test.labels_for("A linear probe")).double().mean())


def linear_probe(train: Features, test: Features, **options: Any) -> float:
    """Accuracy on `test` of a probe of `train`; `options` as of [`fit_linear_probe`]."""
    check_pair(train, test, "A linear probe")
    return fit_linear_probe(train, **options).accuracy(test)


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
    mean, std = torch.zeros(train.features.shape[1]), torch.ones(train.features.shape[1])
    if standardise:
        mean, std = train.features.mean(0), train.features.std(0) + 1e-6

    def fit(part: Features, decay: float) -> LinearProbe:
        return _fit(part, decay, mean, std, max_iter=max_iterations, tol=tolerance)

    scores: dict[float, float] = {}
    if len(decays) > 1:
        part, held = _parts(train, labels, validation, seed)
        scores = {decay: fit(part, decay).accuracy(held) for decay in decays}
    best = max(decays, key=lambda decay: scores.get(decay, 0.0))  # the first among equals
    if cautious and scores:
        margin = math.sqrt(scores[best] * (1 - scores[best]) / len(held))
        best = max(decay for decay in decays if scores[decay] >= scores[best] - margin)
    return replace(fit(train, best), validation=scores)


def _parts(train: Features, labels: Tensor, validation: float | Features, seed: int) -> tuple[Features, Features]:
    """What to fit and what to choose on."""
    if isinstance(validation, Features):
        check_pair(train, validation, "A linear probe")
        return train, validation
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a fraction between 0 and 1, or Features; got {validation}.")
    if len(labels.unique()) == len(labels):
        problem = f"All {len(labels)} classes have one sample each, so none is left to choose the decay on"
        raise ValueError(f"{problem}: pass validation=Features, or one decay, such as decays=[{PAPER_DECAY}].")
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[held_out(labels, validation, seed=seed)] = True
    return train.subset(~held), train.subset(held)


def _fit(train: Features, decay: float, mean: Tensor, std: Tensor, **settings: Any) -> LinearProbe:
    """Fit with one decay and scikit-learn's `settings`."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        message = "A linear probe is fitted by scikit-learn, which is not installed: pip install 'smn_peft[eval]'."
        raise ImportError(message) from error
    labels = train.labels_for("A linear probe")
    features = ((train.features - mean) / std).double()
    centre = features.mean(dim=0)  # the bias is free of decay: the same minimum, in far fewer steps
    # scikit-learn minimises C · (sum of losses) + ‖w‖² / 2, so C = 1 / (λ n). Two classes it fits by one vector v, and
    # the multinomial model's two are ± v / 2, whose ‖w‖² is ‖v‖² / 2: the same decay is C twice as large.
    binary = len(labels.unique()) == 2
    model = LogisticRegression(C=(2 if binary else 1) / decay, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((features - centre).numpy(), labels.numpy())
    if (steps := int(model.n_iter_.max())) >= settings["max_iter"]:
        problem = f"The linear probe with decay {decay:g} did not converge in {steps} iterations"
        advice = "Pass standardise=True, a larger decay, or a larger max_iterations."
        warnings.warn(f"{problem}, so its accuracy may be too low. {advice}", stacklevel=4)
    weight, bias = torch.as_tensor(model.coef_), torch.as_tensor(model.intercept_)
    bias = bias - weight @ centre.to(weight.dtype)
    if binary:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return LinearProbe(weight.float(), bias.float(), torch.as_tensor(model.classes_), decay, mean, std, {})


# --- Low-shot: only a small fraction of the training images has labels -----------------------------------------------


def low_shot_reports(
    train: Features,
    test: Features,
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0, 1, 2),
    probe: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **fields: Any,
) -> list[EvalReport]:
    """Accuracy of linear probes that see a part of the features of `train` only: a report per fraction, over seeds.

    As many images are taken of every class, one at least; with one seed a smaller part lies in every larger one.

    Args:
        train: Features of all training images.
        test: Features to test on.
        fractions: Parts of the labels, each in (0, 1].
        seeds: Each draws other subsets.
        probe: Options of [`fit_linear_probe`]. With one image per class there is nothing to choose a decay on: give
            one in ``decays``.
        settings: Settings of the reports, beside fraction and number of images.
        fields: Other fields of [`EvalReport`].
    """
    labels, _ = check_pair(train, test, "Low-shot")
    for name, given in (("fractions", fractions), ("seeds", seeds)):
        if not given or len(set(given)) != len(given):
            raise ValueError(f"{name} must hold at least one value, each once; got {list(given)}.")
    reports = []
    for fraction in fractions:
        parts = {seed: train.subset(label_subset(labels, fraction=fraction, seed=seed)) for seed in seeds}
        probes = (fit_linear_probe(seen, **{"seed": seed, **(probe or {})}) for seed, seen in parts.items())
        values = tuple(fitted.accuracy(test) for fitted in probes)
        own = {**(settings or {}), "label_fraction": fraction, "labelled_images": len(parts[seeds[0]])}
        reports.append(EvalReport(values=values, seeds=tuple(seeds), settings=own, **fields))
    return reports
