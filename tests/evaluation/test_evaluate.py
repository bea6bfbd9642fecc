"""The measures of evaluate.py: right on the truth, wrong on what is wrong."""

import pytest
import torch

from embedded.painter import TOP
from evaluation.procedural import (
    PatternClassifier,
    Tally,
    colours_named,
    held_out_paintings,
    lab,
    limbs,
    nearest_word,
    score,
    score_both,
    score_pixels,
    view_of,
    words_for,
)


def test_lab_is_cielab():
    colours = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0]])
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]])
    assert torch.allclose(lab(colours), expected, atol=0.1) and torch.equal(lab(colours[2]), lab(colours)[2])


@pytest.fixture(scope="module")
def truths():
    return held_out_paintings(40)


@pytest.fixture(scope="module")
def classifier(truths):
    return PatternClassifier(truths, [painting.texture[:3] for _, painting in truths])


def shares(truths, classifier, change):
    tally, limb_masks = Tally(), limbs()
    for outfit, painting in truths:
        score(tally, "t2uv", outfit, painting, change(painting.texture[:3]), classifier, limb_masks)
    return tally.nested()["t2uv"]


def test_the_truth_scores_high_and_another_texture_low(truths, classifier):
    right = shares(truths, classifier, lambda texture: texture)
    assert min(right["color"].values()) > 0.9 and right["pattern"] > 0.9 and right["length"] == 1
    wrong = shares(truths, classifier, lambda texture: 1 - texture)
    assert max(wrong["color"].values()) < 0.4
    flat = shares(truths, classifier, lambda texture: torch.full_like(texture, 0.5))
    assert flat["pattern"] < 0.8 and flat["color"]["top"] < 0.3


def test_colours_are_named_by_the_nearest_word(truths):
    assert nearest_word(torch.tensor([0.15, 0.33, 0.7]), words_for("top")) == "blue"
    assert nearest_word(torch.tensor([0.85, 0.68, 0.4]), words_for("hair")) == "blonde"
    assert (truths[0][1].regions == TOP).any()


def test_pixels_that_the_picture_shows_are_told_from_those_it_hides(truths):
    painting = truths[0][1]
    _, seen = view_of(painting, 0)
    share = (seen & (painting.texture[3] > 0)).sum() / (painting.texture[3] > 0).sum()
    assert 0.2 < share < 0.7, "a picture shows about half a body"
    texture = painting.texture[:3].clone()
    texture[:, ~seen] += 0.1
    tally = Tally()
    score_pixels(tally, painting, seen, texture)
    measures = tally.nested()["i2uv"]
    assert measures["psnr_visible"] == 80 and measures["psnr_hidden"] == pytest.approx(20, abs=0.01)
    assert 20 < measures["psnr"] < 30 and 0.8 < measures["ssim"] < 1


def test_of_both_inputs_the_one_whose_colours_are_there_wins(truths):
    told, words = truths[0], colours_named(truths[0][0])
    all_words = [colours_named(outfit) for outfit, _ in truths]
    shown = next(truths[row] for row, others in enumerate(all_words) if others.keys() & words and others != words)
    tally = Tally()
    score_both(tally, 0.5, told, shown, told[1].texture[:3])
    assert tally.nested()["both"]["img_weight_0_5"]["text_wins"] == 1
