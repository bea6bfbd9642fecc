"""Textures against true ones: each measure against a reference on the same pictures, and the mask alone counts."""

import math

import pytest
import skimage.metrics
import torch
from torch.nn import functional as F
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from common.errors import UserError
from evaluation import texture_space
from evaluation.texture_space import compare_textures, filled

SIDE = 192


@pytest.fixture(scope="module")
def pictures():
    """Smooth pictures and the same with noise: (3, 3, SIDE, SIDE) each."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 12, 12, generator=generator)
    truths = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
    noise = torch.randn(truths.shape, generator=generator) * torch.tensor([0.02, 0.08, 0.2]).view(3, 1, 1, 1)
    return (truths + noise).clamp(0, 1), truths


@pytest.fixture(scope="module")
def mask():
    """Two islands, one of which reaches the edge of the texture."""
    islands = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    islands[20:110, 15:90] = True
    islands[60:, 120:] = True
    return islands


def test_with_everything_inside_they_are_torchmetrics_own(pictures):
    everywhere = torch.ones(SIDE, SIDE, dtype=torch.bool)
    values = compare_textures(*pictures, everywhere)
    for name, reference in (
        ("psnr", peak_signal_noise_ratio),
        ("ssim", structural_similarity_index_measure),
        ("ms_ssim", multiscale_structural_similarity_index_measure),
    ):
        for row, (picture, truth) in enumerate(zip(*pictures)):
            expected = reference(picture[None], truth[None], data_range=1.0).item()
            assert values[name][row] == pytest.approx(expected, abs=1e-4), name
    assert torch.allclose(values["mse"], (pictures[0] - pictures[1]).square().mean((1, 2, 3)))


def test_inside_the_mask_they_are_those_of_scikit_image(pictures, mask):
    values = compare_textures(*pictures, mask)
    for row in range(3):
        inside = [side[row][:, mask].numpy() for side in pictures]
        assert values["mse"][row] == pytest.approx(skimage.metrics.mean_squared_error(*inside), abs=1e-4)
        assert values["psnr"][row] == pytest.approx(
            skimage.metrics.peak_signal_noise_ratio(*inside, data_range=1), abs=1e-4
        )
        _, maps = skimage.metrics.structural_similarity(
            *(filled(side, mask)[row].numpy() for side in pictures), channel_axis=0, data_range=1.0, full=True,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        away = mask.clone()  # the two libraries reflect differently at the edge of the texture
        away[-6:] = away[:, -6:] = False
        ours = texture_space.similarity_maps(*(filled(side, mask) for side in pictures))[0][row][:, away]
        assert ours.mean() == pytest.approx(maps[:, away.numpy()].mean(), abs=1e-4)
    assert len(values["ssim"]) == len(values["ms_ssim"]) == 3


def test_what_is_outside_the_mask_changes_nothing(pictures, mask):
    textures, truths = pictures
    painted = textures.clone()
    painted[:, :, ~mask] = torch.rand(3, 3, int((~mask).sum()))
    for name, values in compare_textures(painted, truths, mask).items():
        if not isinstance(values, str):
            assert torch.equal(values, compare_textures(textures, truths, mask)[name]), name


def test_each_falls_with_the_noise_and_ends_at_the_same_picture(pictures, mask):
    values = compare_textures(*pictures, mask)
    for name, sign in (("psnr", -1), ("ssim", -1), ("ms_ssim", -1), ("mse", 1)):
        assert (values[name].diff() * sign > 0).all(), name
    same = compare_textures(pictures[1], pictures[1], mask)
    assert (same["psnr"] == 80).all() and (same["mse"] == 0).all()
    assert torch.allclose(same["ssim"], torch.ones(3)) and torch.allclose(same["ms_ssim"], torch.ones(3))


def test_a_batch_changes_nothing(pictures, mask):
    whole = compare_textures(*pictures, mask, batch=8)
    for name, values in compare_textures(*pictures, mask, batch=1).items():
        assert values == whole[name] if isinstance(values, str) else torch.allclose(values, whole[name]), name


def test_what_a_measure_needs_is_said(pictures, mask, monkeypatch):
    small, islands = [side[..., :128, :128] for side in pictures], mask[:128, :128]
    assert compare_textures(*small, islands)["ms_ssim"] == "ms_ssim needs pictures of 176 texels a side, has 128"
    texture_space.perceptual_network.cache_clear()
    monkeypatch.setattr(texture_space.importlib.util, "find_spec", lambda name: None)
    values = compare_textures(*small, islands)
    assert values["lpips"] == "lpips needs torchvision, with the weights of AlexNet"
    assert values["dists"] == "dists needs torchvision, with the weights of VGG16"
    texture_space.perceptual_network.cache_clear()


def test_networks_see_filled_pictures_in_their_range(pictures, mask, monkeypatch):
    """A stand-in for LPIPS and DISTS: the mean distance of all texels, those outside included."""

    class Distance(torch.nn.Module):
        def forward(self, ours, truths, normalize=False):
            assert ours.min() >= 0 and ours.max() <= 1
            return (ours - truths).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(texture_space, "perceptual_network", lambda name: Distance())
    expected = (filled(pictures[0], mask) - filled(pictures[1], mask)).abs().mean((1, 2, 3))
    values = compare_textures(*pictures, mask, batch=2)
    assert torch.allclose(values["lpips"], expected) and torch.allclose(values["dists"], expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda textures, mask: (textures[:0], textures[:0], mask), "there are no pictures"),
        (lambda textures, mask: (textures, textures[..., :64], mask), "differ in size"),
        (lambda textures, mask: (textures, textures, mask[:64]), "differ in size"),
        (lambda textures, mask: (textures, textures * 2 - 1, mask), "references hold values outside 0 to 1"),
        (lambda textures, mask: (textures * math.nan, textures, mask), "pictures hold values outside 0 to 1"),
        (lambda textures, mask: (textures, textures, mask & False), "the mask is empty"),
    ],
)
def test_what_is_no_pair_of_textures_is_refused(pictures, mask, change, message):
    with pytest.raises(UserError, match=message):
        compare_textures(*change(pictures[1], mask))
