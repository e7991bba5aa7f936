# SPDX-License-Identifier: Apache-2.0
"""The router against scikit-learn's own prediction, back from its file without scikit-learn, and bad files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import normalize

from smn_peft.cascade.router import Router, check_clusters, fit_router

K, DIM = 4, 5


def blobs(n: int, seed: int = 0) -> torch.Tensor:
    """Features in overlapping clusters of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(K, 12, generator=torch.Generator().manual_seed(9))
    mixing = torch.randn(K, 12, 12, generator=torch.Generator().manual_seed(8)) / 3
    which = torch.randint(K, (n,), generator=generator)
    noise = torch.randn(n, 12, generator=generator)
    return centres[which] + (mixing[which] @ noise[:, :, None]).squeeze(2)


@pytest.fixture(scope="module", params=["gmm", "kmeans"])
def router(request) -> Router:
    return fit_router(blobs(400), K, kind=request.param, dim=DIM, seed=1)


def test_it_assigns_as_scikit_learn_predicts(router):
    train, test = (normalize(blobs(n, seed).double().numpy()) for n, seed in ((400, 0), (300, 5)))
    pca = PCA(DIM, whiten=True, svd_solver="full").fit(train)
    cls, options = {"gmm": (GaussianMixture, {}), "kmeans": (KMeans, {"n_clusters": K})}[router.kind]
    options = options or {"n_components": K}
    model = cls(**options, n_init=5, max_iter=500, random_state=1).fit(pca.transform(train))
    expected = model.predict(pca.transform(test))
    found = router.assign(blobs(300, 5)).numpy()
    # The signs of the components may differ, and the order of the clusters with them: one permutation explains all.
    pairs = set(zip(found.tolist(), expected.tolist(), strict=True))
    assert len(pairs) == len(set(expected)) == K
    sizes = np.bincount(model.predict(pca.transform(train)), minlength=K)
    assert sorted(router.sizes) == sorted(sizes)
    assert sum(router.sizes) == 400


def test_the_mixtures_scores_are_scikit_learns_up_to_a_constant():
    router = fit_router(blobs(400), K, dim=DIM)
    model = GaussianMixture(K)
    model.weights_, model.means_ = (router.clusters[name].numpy() for name in ("weights", "means"))
    model.precisions_cholesky_ = router.clusters["precisions_cholesky"].numpy()
    points = router.whitening(torch.nn.functional.normalize(blobs(50, 3).double(), dim=1), unit_variance=True)
    expected = torch.as_tensor(model._estimate_weighted_log_prob(points.double().numpy()))
    constant = -0.5 * DIM * np.log(2 * np.pi)
    torch.testing.assert_close(router.scores(blobs(50, 3)) + constant, expected)


def test_both_kinds_come_back(router, tmp_path):
    router.save(tmp_path)
    loaded = Router.load(tmp_path)
    assert torch.equal(loaded.scores(blobs(50)), router.scores(blobs(50)))
    assert (loaded.kind, loaded.seed, loaded.sizes) == (router.kind, 1, router.sizes)


def test_degenerate_clusters_are_named():
    check_clusters([64, 100], 64)
    with pytest.raises(
        ValueError,
        match=r"Of n=170 training images in K=3 clusters cluster 1 has 0, cluster 2 has 63, .* a batch of 64 at "
        r"least: take fewer experts",
    ):
        check_clusters([107, 0, 63], 64)
    with pytest.raises(ValueError, match="3 images cannot make 4 clusters: take fewer experts"):
        fit_router(blobs(3), K)
    with pytest.raises(ValueError, match=r"kind must be one of gmm, kmeans; got 'knn'"):
        fit_router(blobs(30), K, kind="knn")
    with pytest.raises(ValueError, match="All 30 features are the same to rounding"):
        fit_router(torch.ones(30, 4), K)


def damage_json(folder, **changes):
    path = folder / "router.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage_tensors(folder, **changes):
    path = folder / "router.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: damage_json(f, kind="pickle"), "kind must be one of gmm, kmeans; it is 'pickle'"),
        (lambda f: damage_json(f, format=7), "not of format 1"),
        (lambda f: damage_json(f, sizes=[1, 2]), r"router\.json has 2 clusters, .*safetensors 4"),
        (lambda f: damage_json(f, sizes="all"), "sizes is missing or of another type"),
        (lambda f: (f / "router.json").write_text("{"), r"router\.json is damaged"),
        (lambda f: (f / "router.safetensors").write_bytes(b"\x08"), r"router\.safetensors is truncated"),
        (lambda f: damage_tensors(f, weights=None), "holds components, mean, means, precisions_cholesky, samples"),
        (lambda f: damage_tensors(f, means=torch.zeros(4, 3).double()), r"precisions_cholesky|means must be finite"),
        (lambda f: damage_tensors(f, weights=torch.full((4,), float("nan")).double()), "weights must be finite"),
        (lambda f: damage_tensors(f, samples=torch.ones(1).double()), "samples a number from 2 on"),
        (lambda f: damage_tensors(f, precisions_cholesky=torch.zeros(4, 5, 5).double()), "positive diagonals"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    fit_router(blobs(400), K, dim=DIM).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Router.load(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"router\.json does not exist"):
        Router.load(tmp_path)
    fit_router(blobs(400), K, dim=DIM).save(tmp_path)
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"router\.safetensors does not exist: the copy"):
        Router.load(tmp_path)
