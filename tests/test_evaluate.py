"""The measures of evaluate.py: right on the truth, wrong on what is wrong."""

import pytest
import torch

from atlas_dataset.procedural import TOP
from evaluate import PatternClassifier, Tally, held_out_paintings, lab, limbs, nearest_word, score, words_for


def test_lab_is_cielab():
    colours = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0]])
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]])
    assert torch.allclose(lab(colours), expected, atol=0.1)


@pytest.fixture(scope="module")
def truths():
    return held_out_paintings(40)


@pytest.fixture(scope="module")
def classifier(truths):
    return PatternClassifier(truths)


def shares(truths, classifier, change):
    tally, limb_masks = Tally(), limbs()
    for outfit, painting in truths:
        score(tally, "t2uv", outfit, painting, change(painting.texture[:3]), classifier, limb_masks)
    return tally.nested()["t2uv"]


def test_the_truth_scores_high_and_another_texture_low(truths, classifier):
    right = shares(truths, classifier, lambda texture: texture)
    assert min(right["color"].values()) > 0.9 and right["pattern"] > 0.9 and right["length"] > 0.9
    wrong = shares(truths, classifier, lambda texture: 1 - texture)
    assert max(wrong["color"].values()) < 0.4
    flat = shares(truths, classifier, lambda texture: torch.full_like(texture, 0.5))
    assert flat["pattern"] < 0.8 and flat["color"]["top"] < 0.3


def test_colours_are_named_by_the_nearest_word(truths):
    assert nearest_word(torch.tensor([0.15, 0.33, 0.7]), words_for("top")) == "blue"
    assert nearest_word(torch.tensor([0.85, 0.68, 0.4]), words_for("hair")) == "blonde"
    assert (truths[0][1].regions == TOP).any()
