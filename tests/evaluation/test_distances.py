"""Distances between two sets of features: against closed forms on Gaussians and against torchmetrics."""

import math

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_kernel

from evaluation.distances import (
    clip_discrepancy,
    frechet_distance,
    gaussian_kernel,
    kernel_distance,
    monge_distance,
    set_distances,
    unbiased_mmd,
)
from evaluation.uncertainty import Figure


class Unchanged(torch.nn.Module):
    """An extractor for torchmetrics whose pictures are features."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features):
        return features


def gaussians(count: int, width: int, shift: float = 0.0, scale: float = 1.0, seed: int = 0):
    """Features (count, 1, width) of N(shift, scale^2) in every direction."""
    return shift + scale * torch.randn(count, 1, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sets():
    return gaussians(120, 16, seed=1), gaussians(120, 16, 0.4, 1.5, seed=2)


def exact_gaussians(count: int, width: int, shift: float, scale: float, seed: int):
    """Gaussian features whose sample mean and covariance are exactly those asked for."""
    draws = gaussians(count, width, seed=seed)[:, 0].double()
    draws -= draws.mean(0)
    whitened = draws @ torch.linalg.inv(torch.linalg.cholesky(draws.T.cov())).T
    return (shift + scale * whitened)[:, None]


def test_fid_is_its_closed_form():
    ours, theirs = exact_gaussians(90, 8, 0.0, 1.0, 3), exact_gaussians(70, 8, 0.5, 1.6, 4)
    assert frechet_distance(ours, theirs) == pytest.approx(8 * 0.5**2 + 8 * 0.6**2, abs=1e-4)
    assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-6)


def test_fid_and_kid_are_those_of_torchmetrics(sets):
    fid = FrechetInceptionDistance(feature=Unchanged(16))
    kid = KernelInceptionDistance(feature=Unchanged(16), subsets=1, subset_size=120)
    for metric in (fid, kid):
        metric.update(sets[0][:, 0], real=False)
        metric.update(sets[1][:, 0], real=True)
    assert frechet_distance(*sets) == pytest.approx(fid.compute().item(), abs=1e-4)
    assert kernel_distance(*sets) == pytest.approx(kid.compute()[0].item(), abs=1e-4)


def test_kid_is_the_mean_over_subsets(sets):
    kid = KernelInceptionDistance(feature=Unchanged(16), subsets=2000, subset_size=20)
    kid.update(sets[0][:, 0], real=False)
    kid.update(sets[1][:, 0], real=True)
    mean, spread = kid.compute()
    assert kernel_distance(*sets) == pytest.approx(mean.item(), abs=3 * spread.item() / math.sqrt(2000))


def test_kid_is_its_closed_form_on_gaussians():
    """E k of independent x, y from N(0, 1) and N(m, s^2) in d directions, by their moments up to the third."""
    width, shift, scale, repeats = 4, 0.5, 1.3, 60
    squared, variance = width * shift**2, scale**2
    theirs = 1 + 3 * squared / width + 3 * (squared**2 + 2 * variance * squared + width * variance**2) / width**2
    theirs += (squared**3 + 6 * variance * squared**2 + variance**2 * squared * (3 * width + 6)) / width**3
    expected = (1 + 3 / width) + theirs - 2 * (1 + 3 * (squared + width * variance) / width**2)
    values = torch.tensor([
        kernel_distance(gaussians(150, width, seed=seed), gaussians(100, width, shift, scale, seed + 1000))
        for seed in range(repeats)
    ])  # fmt: skip
    assert values.mean() == pytest.approx(expected, abs=4 * (values.std() / math.sqrt(repeats)).item())
    assert values.std() / math.sqrt(repeats) < 0.05 * expected


def test_the_discrepancy_is_its_closed_form_under_a_gaussian_kernel():
    """E exp(-|x - y|^2 / 2 b^2) = (b^2 / v)^(d/2) exp(-|m|^2 / 2 v), v = b^2 and both variances (Gretton et al.)."""
    width, shift, scale, bandwidth, repeats = 3, 0.6, 1.4, 1.5, 40

    def mean_kernel(variances: float, distance: float) -> float:
        total = bandwidth**2 + variances
        return (bandwidth**2 / total) ** (width / 2) * math.exp(-distance / (2 * total))

    within = mean_kernel(2, 0) + mean_kernel(2 * scale**2, 0)
    expected = within - 2 * mean_kernel(1 + scale**2, width * shift**2)
    values = torch.tensor([
        unbiased_mmd(
            lambda left, right: gaussian_kernel(left, right, bandwidth),
            gaussians(200, width, seed=seed), gaussians(150, width, shift, scale, seed + 1000),
        )
        for seed in range(repeats)
    ])  # fmt: skip
    assert values.mean() == pytest.approx(expected, abs=4 * (values.std() / math.sqrt(repeats)).item())
    assert values.std() / math.sqrt(repeats) < 0.05 * expected


def test_cmmd_is_of_unit_features_in_thousandths():
    """Two sets that each point one way, at right angles: k is 1 within, exp(-2 / 200) across."""
    one_way, another = torch.tensor([[[3.0, 0]]]).expand(5, 1, 2), torch.tensor([[[0.0, 7]]]).expand(4, 1, 2)
    assert clip_discrepancy(one_way, another) == pytest.approx(2000 * (1 - math.exp(-0.01)), abs=1e-4)
    assert clip_discrepancy(one_way, one_way * 2) == pytest.approx(0, abs=1e-6)


def test_mind_is_its_closed_form_on_gaussians():
    """3 d (1 - s)^2 for a scale s, which every direction sees alike, and 3 |m|^2 for a shift, on average over them."""
    ours, wider = gaussians(4000, 16, seed=5), gaussians(3000, 16, 0, 1.7, seed=6)
    assert monge_distance(ours, wider) == pytest.approx(3 * 16 * 0.7**2, rel=0.02)
    assert monge_distance(ours, ours + 0.5) == pytest.approx(3 * 16 * 0.5**2, rel=0.1)  # 4.5 % with 1000 directions
    assert monge_distance(ours, ours) == 0


def test_mind_of_one_direction_is_the_distance_of_sorted_values():
    ours, theirs = torch.tensor([3.0, 1, 2]), torch.tensor([2.0, 5, 4])
    on_a_line = [torch.stack([side, 0 * side], -1)[:, None] for side in (ours, theirs)]
    # A direction at angle t sees cos(t) times the sorted differences 1, 2, 2, whose mean square is 3; 3 d E cos^2 = 3.
    assert monge_distance(*on_a_line) == pytest.approx(3 * 3, rel=0.06)  # a thousand directions


@pytest.mark.parametrize("distance", [kernel_distance, clip_discrepancy])
def test_views_of_one_texture_are_not_taken_for_likeness(distance):
    """Two sets of one kind, four views a texture: on average nothing lies between them."""
    values, as_pictures = [], []
    for seed in range(60):
        sets = [gaussians(12, 8, 1.0, seed=2 * seed + side) + 0.1 * torch.randn(12, 4, 8) for side in range(2)]
        values.append(distance(*sets))
        as_pictures.append(distance(*(side.flatten(0, 1)[:, None] for side in sets)))
    values, as_pictures = torch.tensor(values), torch.tensor(as_pictures)
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(60)
    assert as_pictures.mean() > 5 * as_pictures.std() / math.sqrt(60), "as pictures of their own they are"


def test_figures_have_intervals_or_say_how_many_pictures_they_need(sets):
    figures = set_distances(*sets, repeats=10)
    assert figures["mind"] == "mind needs 1000 pictures, has 120"
    for name, value in (("fid", frechet_distance(*sets)), ("kid", kernel_distance(*sets))):
        assert isinstance(figures[name], Figure) and figures[name].count == 120
        assert figures[name].value == pytest.approx(value) and figures[name].low < value < figures[name].high
    few = set_distances(*(side[:4].expand(-1, 4, -1) for side in sets), repeats=3)
    assert few["fid"] == "fid needs 17 pictures, has 16"
    assert isinstance(few["kid"], Figure)
    assert set_distances(sets[0][:1], sets[1])["kid"] == "kid needs 2 pictures, has 1"
    assert set_distances(sets[0][:1].expand(-1, 4, -1), sets[1])["cmmd"] == "cmmd needs 2 textures, has 1"


def test_chunks_of_the_kernel_change_nothing(sets, monkeypatch):
    whole = unbiased_mmd(poly_kernel, *sets)
    monkeypatch.setattr("evaluation.distances.ROWS", 7)
    assert unbiased_mmd(poly_kernel, *sets) == pytest.approx(whole, rel=1e-9)
