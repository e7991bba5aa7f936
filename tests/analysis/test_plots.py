# SPDX-License-Identifier: Apache-2.0
"""Lines from runs, and pictures: white, whole, with every label; nothing is left of one that fails."""

from __future__ import annotations

import matplotlib
import pytest
import torch
from PIL import Image

from smn_peft.analysis import (
    Series,
    low_shot_series,
    low_shot_table,
    plot_curves,
    plot_densities,
    plot_embedding_maps,
    plot_low_shot,
    plot_similarity,
    plot_sizes,
    smooth,
)
from smn_peft.analysis.masks import (
    ClusterComposition,
    EmbeddingMap,
    LayerDensity,
    Similarity,
)
from smn_peft.analysis.plots import (
    canvas,
    mean_curve,
    plot_clusters,
    plot_selective,
    share_series,
)
from smn_peft.evaluation import EvalReport


def test_a_picture_is_white_and_the_users_settings_stay(tmp_path):
    before = dict(matplotlib.rcParams)
    with canvas(tmp_path / "new" / "a.png", columns=2) as axes:
        assert len(axes) == 2
        axes[0].plot([0, 1], [0, 1], label="line")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    assert dict(matplotlib.rcParams) == before


def test_nothing_is_left_of_a_plot_that_fails(tmp_path):
    with pytest.raises(RuntimeError, match="half"), canvas(tmp_path / "a.png"):
        raise RuntimeError("half way")
    with pytest.raises(ValueError, match=r"a\.jpeg must end in \.png, \.svg or \.pdf"), canvas(tmp_path / "a.jpeg"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_mean_is_over_what_all_have():
    curve = mean_curve("a", [{1: 1.0, 2: 2.0, 3: 9.0}, {2: 4.0, 1: 1.0}])
    assert (curve.x, curve.y) == ((1, 2), (1.0, 3.0))
    assert curve.spread == (0.0, pytest.approx(2**0.5))
    assert mean_curve("b", [{1: 1.0}]).spread == ()
    for nothing in ([], [{1: 1.0}, {2: 1.0}]):
        with pytest.raises(ValueError, match="'c' have no position in common"):
            mean_curve("c", nothing)


def test_smoothing_is_trailing():
    assert smooth([4.0, 0.0, 2.0, 6.0], 2) == [4.0, 2.0, 1.0, 4.0]
    with pytest.raises(ValueError, match="at least 1; got 0"):
        smooth([1.0], 0)


def report(label: str, fraction: float | None, *values: float) -> EvalReport:
    seeds = tuple(range(len(values))) if len(values) > 1 else ()
    settings = {} if fraction is None else {"label_fraction": fraction}
    return EvalReport(label, "cifar10", "test", "accuracy", values, seeds, settings=settings)


REPORTS = [report("probe", 0.1, 0.5, 0.7), report("probe", 0.01, 0.3, 0.3), report("mask", 0.1, 0.8)]
SELECTIVE = [
    ("random", 0.5, 0.9),
    ("random", 0.01, 0.6),
    ("random", 0.01, 0.7),
    ("random", 0.5, 0.8),
    ("first stages", 0.009, 0.79),
]


def test_lines_over_the_labelled_fraction():
    probe, mask = low_shot_series(REPORTS)
    assert (probe.label, probe.x, probe.y) == ("probe", (1.0, 10.0), (30.0, pytest.approx(60.0)))
    assert probe.spread == pytest.approx((0.0, 100 * 0.02**0.5))
    assert (mask.y, mask.spread) == ((80.0,), ())
    with pytest.raises(ValueError, match="'x' has no label_fraction"):
        low_shot_series([report("x", None, 0.5)])
    assert low_shot_table(REPORTS).splitlines()[2:] == [
        "| probe  |    60.0 ± 14.1 |    30.0 ± 0.0 |",
        "| mask   |           80.0 |             – |",
    ]


def test_lines_over_the_share_of_the_weights():
    random, stages = share_series(SELECTIVE)
    assert (random.x, random.y) == ((1.0, 50.0), pytest.approx((65.0, 85.0)))
    assert random.spread == pytest.approx((10 / 2**0.5,) * 2)
    assert (stages.y, stages.spread) == ((79.0,), ())


LINES = [Series("λ = 50", (0, 1, 2), (2.3, 1.0, 0.5), (0.1, 0.1, 0.1)), Series("λ = 100", (0, 1), (2.3, 0.7))]
LAYERS = [
    LayerDensity(f"{block}{kind}", block.rstrip("."), kind, 10, density)
    for block, kind, density in (("", "conv1.weight", 1.0), ("layer1.0.", "conv1.weight", 0.8))
]
CLUSTERS = [ClusterComposition(0, 2, (0.5, 1.0)), ClusterComposition(2, 4, (0.75, 1.0))]
MAP = EmbeddingMap("adapted", torch.randn(6, 2), torch.arange(6) % 3)
PAIRS = [Similarity("x", "y", 0.42, 0.31, 0.0, 0.0), Similarity("x", "z", 0.53, 0.29, 0.0, 0.0)]
# What is drawn, by what, and the texts that the picture holds.
PICTURES = {
    "curves": (
        lambda path: plot_curves({"equivalent": LINES[:1], "changed": LINES}, path),
        "equivalent|changed|λ = 50|λ = 100|optimizer step|training loss (nats)",
    ),
    "low-shot": (
        lambda path: plot_low_shot(low_shot_series(REPORTS), path, title="CIFAR-10"),
        "probe|mask|CIFAR-10|labelled training images (%)|test accuracy (%)|10|1",
    ),
    "selective": (
        lambda path: plot_selective(share_series(SELECTIVE), path, frozen=0.5),
        "random|first stages|frozen base|weights that a mask may touch (%)|k-NN accuracy (%)",
    ),
    "kinds of layers": (
        lambda path: plot_densities({"one": LAYERS}, path, title="A title"),
        "conv1.weight|layer1.0|outside|active weights (%)|A title",
    ),
    "layers of runs": (
        lambda path: plot_densities({"with labels": LAYERS, "without": LAYERS}, path),
        "with labels|without|layer1.0|active weights (%)",
    ),
    "similarity": (
        lambda path: plot_similarity(PAIRS, path),
        "42.0|31.0|53.0|29.0|x|y|z|Jaccard index of the inactive weights (%)",
    ),
    "clusters": (
        lambda path: plot_clusters(CLUSTERS, path),
        "cluster 1: 2 images|cluster 3: 4 images|images of the cluster (%)|all classes alike",
    ),
    "maps": (
        lambda path: plot_embedding_maps([MAP, MAP], path, names=["cat", "dog"]),
        "adapted|cat|dog|class 2|t-SNE 1 (no unit)",
    ),
}


def test_pictures_have_every_label(tmp_path):
    for name, (draw, texts) in PICTURES.items():
        draw(tmp_path / "a.svg")
        written = (tmp_path / "a.svg").read_text("utf-8")
        assert [text for text in texts.split("|") if f">{text}</text>" not in written] == [], name


def test_a_run_that_failed_does_not_decide_the_scale(tmp_path):
    lines = [Series("mask", (50.0, 100.0), (70.0, 75.0), (1.0, 1.0)), Series("LoKr", (60.0, 130.0), (72.0, 12.5))]
    plot_sizes({"one": lines, "other": lines[1:]}, tmp_path / "a.svg", ylabel="accuracy (%)")
    written = (tmp_path / "a.svg").read_text("utf-8")
    assert written.count(">LoKr 12.5 ↓</text>") == 2
    assert ">75</text>" in written
    assert ">20</text>" not in written
