"""Intervals hold the truth as often as they say, and the number of samples is enough and no more."""

import math

import pytest
import torch

from evaluation.uncertainty import (
    Figure,
    mean_figure,
    paired_difference,
    samples_needed,
    samples_needed_for_sets,
    set_difference,
    set_figure,
    share_figure,
)


def test_the_interval_of_a_mean_is_the_normal_one_on_normal_values():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 3 + 10
    figure = mean_figure("psnr", values)
    error = 1.96 * values.std().item() / math.sqrt(400)
    assert figure.value == pytest.approx(values.mean().item(), abs=1e-5) and figure.count == 400
    assert figure.high - figure.value == pytest.approx(error, rel=0.1)
    assert figure.value - figure.low == pytest.approx(error, rel=0.1)
    assert mean_figure("psnr", values) == figure, "the same seed gives the same interval"


def test_the_interval_holds_the_truth_nineteen_times_of_twenty():
    generator = torch.Generator().manual_seed(2)
    figures = [mean_figure("psnr", torch.randn(60, generator=generator), seed) for seed in range(200)]
    held = sum(figure.low < 0 < figure.high for figure in figures) / 200
    assert 0.90 <= held <= 0.985  # 0.95 give or take 2.5 standard errors


def test_what_cannot_be_measured_is_said_and_counted():
    assert mean_figure("lpips", "needs torchvision") == "needs torchvision"
    assert mean_figure("psnr", torch.tensor([])) == "psnr needs 2 samples that it can be measured on, has 0"
    values = torch.tensor([1.0, float("nan"), 3.0])
    figure = mean_figure("fill", values)
    assert (figure.value, figure.count, figure.skipped) == (2, 2, 1)
    assert "infinite on 1 of 3" in mean_figure("psnr", torch.tensor([1.0, 2.0, float("inf")]))
    assert mean_figure("hits", torch.ones(5)) == Figure(1, 1, 1, 5)
    one_differs = mean_figure("hits", torch.tensor([0.0, 1.0]))
    assert one_differs.low <= one_differs.value <= one_differs.high


def test_five_hits_of_five_do_not_make_sure():
    """Wilson's interval for k hits of n: (k + z^2 / 2 ± z sqrt(k (n - k) / n + z^2 / 4)) / (n + z^2)."""
    z = 1.959964
    figure = share_figure("retrieval", torch.ones(5))
    assert (figure.value, figure.high) == (1, pytest.approx(1)) and figure.low == pytest.approx(5 / (5 + z**2))
    figure = share_figure("retrieval", torch.tensor([1.0, 0, 0, 0, float("nan")]))
    spread = z * math.sqrt(3 / 4 + z**2 / 4)
    assert figure.low == pytest.approx((1 + z**2 / 2 - spread) / (4 + z**2)) and figure.skipped == 1
    assert figure.high == pytest.approx((1 + z**2 / 2 + spread) / (4 + z**2))
    ties = torch.tensor([1.0, 0.5, 0, 1])
    assert share_figure("retrieval", ties) == mean_figure("retrieval", ties)
    assert share_figure("retrieval", "needs CLIP") == "needs CLIP"


def test_paired_differences_are_surer_than_two_intervals():
    generator = torch.Generator().manual_seed(3)
    difficulty = torch.randn(100, generator=generator) * 5
    better = difficulty + 0.3 + 0.5 * torch.randn(100, generator=generator)
    worse = difficulty + 0.5 * torch.randn(100, generator=generator)
    difference = paired_difference("psnr", better, worse)
    assert difference.low > 0
    assert mean_figure("psnr", better).low < mean_figure("psnr", worse).value
    with pytest.raises(ValueError, match="not pairs"):
        paired_difference("psnr", better, worse[1:])


def test_the_number_of_samples_finds_the_difference_four_times_of_five():
    # Half a standard deviation: (1.960 + 0.842)^2 / 0.25 = 31.4.
    differences = torch.tensor([0.5 - math.sqrt(0.5), 0.5 + math.sqrt(0.5)])  # mean 0.5, standard deviation 1
    assert samples_needed("psnr", differences, torch.zeros(2)) == 32
    draws = torch.randn(4000, 32, generator=torch.Generator().manual_seed(4)) + 0.5
    power = (draws.mean(1) * math.sqrt(32) > 1.96).float().mean()
    assert power == pytest.approx(0.8, abs=0.03)
    assert "no difference" in samples_needed("psnr", torch.ones(4), torch.ones(4))
    assert samples_needed("psnr", torch.tensor([2.0, 2.0]), torch.ones(2)) == 2
    # A hundred textures with a standard error of a tenth: one texture's difference has a spread of 1.
    assert samples_needed_for_sets("fid", Figure(0.5, 0.5 - 0.195996, 0.5 + 0.195996, 100)) == 32
    assert samples_needed_for_sets("fid", "FID needs 129 pictures, has 8").startswith("FID needs")


def mean_gap(features, references):
    return (features.mean() - references.mean()).item()


def test_half_samples_spread_as_the_statistic_does():
    """The standard error of a difference of means is known: s sqrt(1 / n + 1 / m)."""
    generator = torch.Generator().manual_seed(5)
    features, references = (torch.randn(count, 1, generator=generator) for count in (200, 400))
    figure = set_figure(mean_gap(features, references), mean_gap, features, references, repeats=400)
    assert (figure.high - figure.low) / 2 == pytest.approx(1.96 * math.sqrt(1 / 200 + 1 / 400), rel=0.15)


def test_sets_are_compared_on_the_same_draws():
    generator = torch.Generator().manual_seed(6)
    features, references = (torch.randn(100, 1, generator=generator) for _ in range(2))
    figure = set_difference("fid", mean_gap, features + 0.1, features, references)
    assert figure.value == pytest.approx(0.1, abs=1e-5) and figure.high - figure.low < 1e-4
    assert set_figure("FID needs 129 pictures, has 8", mean_gap, features, references).startswith("FID needs")
    assert "needs 4 textures" in set_figure(0.0, mean_gap, features[:3], references)
